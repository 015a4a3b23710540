"""What is carried from slice to slice, in pictures whose rows are all alike."""

import numpy as np

from cheaplunch.carrying import carry
from cheaplunch.merging import merge_classes
from cheaplunch.prompts import furthest_point


def rows(text: str) -> np.ndarray:
    """(9, W) probabilities from digits, '9' is 0.9 and '.' is 0: the middle of a mask is that of its columns."""
    return np.tile([0 if digit == "." else int(digit) / 10 for digit in text], (9, 1))


class World:
    """Slices as texts of who is where; a point on a letter finds what that letter finds on its slice."""

    def __init__(self, slices: list[str], finds: dict[tuple[int, str], str]):
        self.slices, self.finds = slices, finds
        self.asked: list[tuple[int, str]] = []

    def ask(self, number, points):
        letters = {k: self.slices[number][int(x)] for k, (x, _) in points.items()}
        self.asked.append((number, "".join(letters.values())))
        return {k: rows(self.finds[number, letter]) for k, letter in letters.items()}

    def carry(self, seeds: dict[int, dict[int, str]]) -> dict[int, dict[int, np.ndarray]]:
        given = {number: {k: rows(text) for k, text in classes.items()} for number, classes in seeds.items()}
        return carry(given, len(self.slices), self.ask, lambda found: found)


def merged(found: dict[int, dict[int, np.ndarray]]) -> list[str]:
    """The label map of each slice."""
    labels = [merge_classes(np.stack([*classes.values()]), list(classes)) for classes in found.values()]
    return ["".join(map(str, label[0])) for label in labels]


def test_the_nearer_seed_has_a_slice_and_a_seed_ends_what_comes_to_it():
    """Each seed's mask says by its place which one a slice was reached from.

    slice   0  1  2  3  4  5
    seed    a           b
    takes   a  a  a  b  b  b      slice 2 is as near to both, and the lower one's has it
    """
    a, b = rows("9999.."), rows(".9999.")
    from_a, from_b = furthest_point(a > 0.5), furthest_point(b > 0.5)
    assert from_a != from_b
    asked = []

    def ask(number, points):
        asked.append(number)
        return {1: a if points[1] == from_a else b}

    found = carry({0: {1: a}, 4: {1: b}}, 6, ask, lambda found: found)
    assert [found[number][1].tolist() for number in range(6)] == [one.tolist() for one in (a, a, a, b, b, b)]
    assert sorted(asked) == [1, 2, 3, 5]  # each once


def test_a_class_goes_on_from_what_is_seen_of_it():
    """Class 1's click finds the neighbour too, less surely than the neighbour's own; the middle of both is in it."""
    slices = ["aaabbbbb"] * 4
    finds = {(number, "a"): "999....." for number in range(4)} | {(number, "b"): "...99999" for number in range(4)}
    world = World(slices, finds)
    assert furthest_point(rows("99966666") > 0.5)[0] == 3
    found = world.carry({1: {1: "99966666", 2: "...99999"}})
    assert merged(found) == ["11122222"] * 4
    assert world.asked == [(2, "ab"), (3, "ab"), (0, "ab")]  # all classes of a slice at once


def test_a_class_that_comes_from_afar_does_not_end_the_one_that_is_at_home():
    """On slice 3 class 1 has come to its end, and takes all of class 2, as surely as that finds itself.

    Class 2, clicked on slice 4, is carried to slice 3 first, and on to 2, though the label map will show 1 there.
    """
    slices = ["aaabbbb"] * 3 + ["bbbbbbb"] * 2
    finds = {(number, "a"): "999...." for number in range(3)} | {(number, "b"): "...9999" for number in range(3)}
    world = World(slices, finds | {(3, "b"): "9999999", (4, "b"): "9999999"})
    found = world.carry({1: {1: "999...."}, 4: {2: "9999999"}})
    assert merged(found) == ["1112222"] * 3 + ["1111111"] * 2


def test_an_answer_ends_a_class_as_it_is_not_as_much_as_is_seen_of_it():
    """On slice 1 class 1 is gone and its point finds all; what class 2 leaves to be seen of that looks like class 1."""

    def ask(number, points):
        return {1: rows("77777777"), 2: rows("..999999")}

    found = carry({0: {1: rows("99......"), 2: rows("..999999")}}, 2, ask, lambda found: found)
    assert sorted(found[1]) == [2]


def test_nothing_is_carried_from_nowhere():
    assert World(["a", "a"], {}).carry({}) == {}
