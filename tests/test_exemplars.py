import numpy as np
import pytest

from cheaplunch.data.index import SliceArea, SliceIndex
from cheaplunch.errors import UserError
from cheaplunch.exemplars import (
    SliceKey,
    background_slices,
    count_of_percent,
    pick_exemplars,
    read_exemplars,
    require_every_class,
    write_exemplars,
)


def index_of(cases: dict[str, list[tuple[int, ...]]], labels=("liver", "kidney")) -> SliceIndex:
    """Case → the class areas of its slices."""
    rows = (SliceArea(case, n, areas) for case, slices in cases.items() for n, areas in enumerate(slices))
    return SliceIndex("axial", labels, tuple(rows))


#        slice   0        1        2         3        4       5
TWO = {
    "a": [(0, 0), (50, 0), (100, 4), (60, 8), (0, 8), (0, 0)],
    "b": [(40, 0), (90, 2), (10, 5), (9, 0)],
}


def pick(index, count, strategy, seed=0):
    return [
        (key.case_id, key.slice_number) for key in pick_exemplars(index, count, strategy, np.random.default_rng(seed))
    ]


def test_a_slice_with_pixels_nobody_decided_on_is_neither_exemplar_nor_background(tmp_path):
    """The one that shows the kidney best is ignored in part, and so is an empty one."""
    rows = [((0, 0), 0), ((50, 90), 3), ((60, 0), 0), ((70, 20), 0), ((0, 0), 7)]
    index = SliceIndex("axial", ("liver", "kidney"), tuple(SliceArea("a", n, *row) for n, row in enumerate(rows)))
    for strategy in ("most-classes", "spread", "random"):
        assert pick(index, 2, strategy) == [("a", 2), ("a", 3)]
    assert pick(index, 1, "spread") == [("a", 3)]  # for the kidney
    assert background_slices(index) == [SliceKey("a", 0)]
    named = tmp_path / "chosen.csv"
    named.write_text("case,slice\na,1\n")
    with pytest.raises(UserError, match="line 2: slice 1 of a has pixels labelled to be ignored"):
        read_exemplars(named, index)


# ---- most classes


def test_most_classes_and_ties_by_area_relative_to_each_class():
    # a: slices 2 and 3 show both. 104 px against 68, but 100/100 + 4/8 = 1.5 against 60/100 + 8/8 = 1.6.
    # b: slices 1 and 2 show both: 0.9 + 0.25 against 0.1 + 0.625.
    for seed in range(5):
        assert pick(index_of(TWO), 2, "most-classes", seed) == [("a", 3), ("b", 1)]


def test_one_of_each_volume_before_a_second_of_any():
    found = {tuple(pick(index_of(TWO), 1, "most-classes", seed)) for seed in range(20)}
    assert found == {(("a", 3),), (("b", 1),)}  # which volume comes first is drawn
    third = {frozenset(case for case, _ in pick(index_of(TWO), 3, "most-classes", seed)) for seed in range(20)}
    assert third == {frozenset("ab")}


def test_the_second_of_a_volume_is_far_from_the_first():
    # Slice 4 has both classes and the most of them. Its neighbours 3 and 5 show nearly the same and are left; of the
    # rest 7 alone shows both.
    areas = [(20, 0), (30, 0), (40, 0), (90, 9), (99, 10), (98, 9), (40, 0), (20, 1), (15, 0)]
    assert pick(index_of({"c": areas}), 2, "most-classes") == [("c", 4), ("c", 7)]


def test_slices_of_a_volume_are_a_tenth_of_it_apart_until_there_is_no_room():
    # 40 slices with foreground, the fuller the nearer to slice 20, and two without at each end: a tenth is 4.
    areas = [(0, 0)] * 2 + [(10 + 40 - 2 * abs(20 - n), 5) for n in range(2, 42)] + [(0, 0)] * 2
    index = index_of({"c": areas})
    assert pick(index, 3, "most-classes") == [("c", 16), ("c", 20), ("c", 24)]
    everywhere = [number for _, number in pick(index, 40, "most-classes")]
    assert everywhere == list(range(2, 42))  # all of them, though that brings neighbours


def test_the_papers_numbers_of_synapse_slices():
    """9: one of each of nine volumes; 18: one a volume; 36: two a volume (§3.2)."""
    index = index_of({f"v{n:02}": [(30 + k, 9) if 2 <= k < 28 else (30, 0) for k in range(30)] for n in range(18)})
    for count, volumes, each in ((9, 9, 1), (18, 18, 1), (36, 18, 2)):
        cases = [case for case, _ in pick(index, count, "most-classes")]
        assert len(set(cases)) == volumes
        assert all(cases.count(case) == each for case in cases)


# ---- random


def test_random_takes_slices_of_ten_pixels_and_more_only():
    index = index_of({"a": [(9, 0), (10, 0), (5, 5), (0, 0)], "b": [(0, 9), (0, 300)]})
    assert pick(index, 3, "random") == [("a", 1), ("a", 2), ("b", 1)]  # all there are
    drawn = [pick(index, 1, "random", seed)[0] for seed in range(90)]
    assert all(drawn.count(key) >= 15 for key in [("a", 1), ("a", 2), ("b", 1)])  # 30 each expected


# ---- spread


def test_spread_takes_each_height_once_and_each_volume_once():
    # Five volumes of ten slices, the first two of each without foreground enough: heights (i + ½) / 5 of eight
    # slices are 0.8, 2.4, 4, 5.6 and 7.2, so slices 2, 4, 6, 7 and 9.
    index = index_of({case: [(0,), (9,)] + [(50,)] * 8 for case in "abcde"}, labels=("tumour",))
    orders = set()
    for seed in range(20):
        picked = pick(index, 5, "spread", seed)
        assert [case for case, _ in picked] == list("abcde")
        assert sorted(number for _, number in picked) == [2, 4, 6, 7, 9]
        orders.add(tuple(number for _, number in picked))
    assert len(orders) > 10  # which volume gives which height is drawn


def test_spread_follows_the_area():
    # 10, 20, 60 and 10 px: shares up to 0.1, 0.3, 0.9 and 1. A third of three lies at 1/6, 1/2 and 5/6 of them:
    # slice 1, and slice 2 twice, which is the largest by far.
    index = index_of({case: [(10,), (20,), (60,), (10,)] for case in "abc"}, labels=("tumour",))
    for seed in range(20):
        assert sorted(number for _, number in pick(index, 3, "spread", seed)) == [1, 2, 2]


def test_spread_within_one_volume_repeats_no_slice():
    index = index_of({"a": [(50,)] * 6}, labels=("tumour",))
    for seed in range(20):
        assert pick(index, 6, "spread", seed) == [("a", n) for n in range(6)]
        low, high = (number for _, number in pick(index, 2, "spread", seed))
        assert low < 3 <= high


def test_spread_shows_every_class_there_is():
    # 'kidney' is on two slices of one volume only, most of it on b7; 'liver' is everywhere and stays.
    cases = {case: [(50, 0)] * 9 for case in "abc"}
    cases["b"][6], cases["b"][7] = (0, 30), (0, 40)
    for seed in range(30):
        picked = pick(index_of(cases), 3, "spread", seed)
        assert len(set(picked)) == 3
        assert {("b", 6), ("b", 7)} & set(picked)
        assert len(set(picked) - {("b", 6), ("b", 7)}) >= 1


def test_auto_is_spread_but_a_single_slice_shows_every_class():
    index = index_of(TWO)
    assert pick(index, 2, "auto", seed=3) == pick(index, 2, "spread", seed=3)
    # Most of both organs' foreground is on slices that show one of them alone.
    apart = index_of({case: [(500, 0), (20, 20), (0, 500)] for case in "abc"})
    for seed in range(10):
        [(_, number)] = pick(apart, 1, "auto", seed)
        assert number == 1


# ---- too many


@pytest.mark.parametrize("strategy", ["most-classes", "random", "spread"])
def test_more_than_there_are(strategy):
    # Worth having in TWO: a1, a2, a3, b0, b1, b2. a4 has 8 px, b3 has 9.
    assert len(set(pick(index_of(TWO), 6, strategy))) == 6
    with pytest.raises(UserError, match=r"--exemplars 7: only 6 "):
        pick(index_of(TWO), 7, strategy)


@pytest.mark.parametrize(("percent", "count"), [(0.5, 2), (1, 4), (3, 12), (100, 400), (0.01, 1)])
def test_a_percentage_is_of_the_slices_with_ten_pixels(percent, count):
    slices = [(10,)] * 400 + [(9,)] * 300 + [(0,)] * 300
    assert count_of_percent(index_of({"a": slices}, labels=("tumour",)), percent) == count


# ---- what they show


def test_a_class_on_no_exemplar_is_named():
    index = index_of(TWO)
    require_every_class(index, [SliceKey("a", 1), SliceKey("a", 4)], "--exemplars 2")
    with pytest.raises(UserError, match=r"^--exemplars 2: no exemplar shows kidney; ") as error:
        require_every_class(index, [SliceKey("a", 1), SliceKey("b", 0)], "--exemplars 2")
    assert "liver" not in str(error.value)


def test_background_is_without_any_foreground():
    assert background_slices(index_of(TWO)) == [SliceKey("a", 0), SliceKey("a", 5)]  # b3's 9 px are foreground


# ---- the CSV


def test_csv_round_trip_with_areas(tmp_path):
    index, path = index_of(TWO), tmp_path / "picked.csv"
    keys = [SliceKey("a", 3), SliceKey("b", 1)]
    write_exemplars(path, index, keys)
    assert path.read_text().split() == ["case,slice,liver_px,kidney_px", "a,3,60,8", "b,1,90,2"]
    assert read_exemplars(path, index) == keys


def test_csv_as_a_spreadsheet_saves_it(tmp_path):
    path = tmp_path / "picked.csv"
    path.write_bytes(b"\xef\xbb\xbfslice,note,case\r\n1,clear,b\r\n3,,a\r\n3,again,a\r\n")
    assert read_exemplars(path, index_of(TWO)) == [SliceKey("a", 3), SliceKey("b", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,slice\na,3\na,x\n", "line 3: needs the columns case and slice"),
        ("case,slice\na,1.5\n", "line 2: needs the columns"),
        ("case,slice\na\n", "line 2: needs the columns"),
        ("volume,slice\na,3\n", "line 2: needs the columns"),
        ("case;slice\na;3\n", "line 2: needs the columns"),
        ("case,slice\n\n\na,x\n", "line 4: needs the columns"),
        ("case,slice\na,3\nc,3\n", "line 3: there is no slice 3 of c"),
        ("case,slice\na,6\n", "line 2: there is no slice 6 of a"),
        ("case,slice\na,-1\n", "line 2: there is no slice -1 of a"),
        ("case,slice\n", "names no slice"),
        ("", "names no slice"),
    ],
)
def test_csv_with_a_bad_line(tmp_path, text, message):
    path = tmp_path / "picked.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_exemplars(path, index_of(TWO))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, b"case,slice\n\xff\xfe,3\n"])
def test_csv_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "picked.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--exemplar-file .*picked\.csv cannot be read"):
        read_exemplars(path, index_of(TWO))
