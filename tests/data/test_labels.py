import pickle

import numpy as np
import pytest
from PIL import Image

from cheaplunch.data import outlines
from cheaplunch.data.labels import (
    Colours,
    Drawings,
    Ellipse,
    LabelFiles,
    Levels,
    Masks,
    Numbers,
    Polygons,
    Threshold,
    guess_rule,
)
from cheaplunch.data.volume import read_volume
from cheaplunch.errors import UserError

GREY = [[0, 128, 255], [0, 128, 200]]


@pytest.fixture
def save(tmp_path):
    def write(name, values):
        Image.fromarray(np.asarray(values, np.uint8)).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def like(save):
    """A picture of 2 × 3."""
    return read_volume((save("image.png", np.zeros((2, 3))),))


def read(rule, like, *paths):
    files = pickle.loads(pickle.dumps(LabelFiles(paths, rule)))
    assert hash(files.rule) == hash(rule)  # what is cached goes by it
    label = files.read(like)
    assert label.dtype == np.int32 and label.shape == like.array.shape[1:]
    return label[0].tolist()


def test_numbers_are_mapped_all_at_once(save, like):
    path = save("mask.png", [[0, 1, 2], [2, 1, 4]])
    assert read(Numbers(), like, path) == [[0, 1, 2], [2, 1, 4]]
    assert read(Numbers(((1, 2), (2, 1))), like, path) == [[0, 2, 1], [1, 2, 4]]


def test_a_grey_mask_saved_in_colour_is_grey(save, like):
    path = save("mask.png", np.repeat(np.array([[0, 1, 2], [2, 1, 4]])[..., None], 3, axis=-1))
    assert read(Numbers(), like, path) == [[0, 1, 2], [2, 1, 4]]
    coloured = np.zeros((2, 3, 3))
    coloured[0, 0] = 255, 0, 0
    with pytest.raises(UserError, match="mask.png is coloured"):
        read(Numbers(), like, save("mask.png", coloured))


def test_grey_levels_may_be_a_little_off(save, like):
    levels = Levels(((0, 2), (128, 1), (255, 0)))
    assert read(levels, like, save("mask.png", [[3, 128, 255], [0, 140, 240]])) == [[2, 1, 0], [2, 1, 0]]
    with pytest.raises(UserError, match="the grey 200, which is near none of 0, 128, 255"):
        read(levels, like, save("mask.png", GREY))


def test_what_jpeg_leaves_is_cut_in_the_middle(save, like):
    assert read(Threshold(), like, save("mask.png", [[0, 9, 127], [128, 250, 255]])) == [[0, 0, 0], [1, 1, 1]]


def test_masks_of_several_classes_must_not_overlap_unless_their_order_is_given(save, like):
    disc, cup = save("disc.png", [[255, 255, 0], [0, 0, 0]]), save("cup.png", [[0, 1, 0], [0, 0, 0]])
    with pytest.raises(UserError, match=r"cup.png and .*disc.png overlap on 1 pixels"):
        read(Masks((1, 2)), like, disc, cup)
    assert read(Masks((1, 2), stacked=True), like, disc, cup) == [[1, 2, 0], [0, 0, 0]]
    assert read(Masks((2, 1), stacked=True), like, cup, disc) == [[1, 2, 0], [0, 0, 0]]  # by number, not by file
    assert read(Masks((1, 1)), like, disc, cup) == [[1, 1, 0], [0, 0, 0]]  # two findings of one class


def test_colours(save, like):
    rule = Colours((((255, 0, 0), 1), ((0, 0, 255), 2)))
    values = np.zeros((2, 3, 3))
    values[0, 0], values[1, 2] = (255, 0, 0), (0, 0, 255)
    assert read(rule, like, save("mask.png", values)) == [[1, 0, 0], [0, 0, 2]]
    values[0, 1:] = 0, 255, 1
    with pytest.raises(UserError, match=r"the colour \(0, 255, 1\) on 2 pixels, which no class has: add it"):
        read(rule, like, save("mask.png", values))
    with pytest.raises(UserError, match="JPEG changes colours"):
        read(rule, like, save("mask.jpg", values))
    with pytest.raises(UserError, match=r"mask.png has 2 × 4 but 3 × 2 pixels"):
        read(rule, like, save("mask.png", np.zeros((4, 2, 3))))


def disc(shape, row, column, radius_rows, radius_columns):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - row) / radius_rows) ** 2 + ((x - column) / radius_columns) ** 2 <= 1


def rim(filled):
    """The outermost pixels of a mask, those on the image's border only where they end it."""
    inner = filled.copy()
    for axis in (0, 1):
        for step in (1, -1):
            moved = np.roll(filled, step, axis)
            index = [slice(None)] * 2
            index[axis] = 0 if step == 1 else -1
            moved[tuple(index)] = True
            inner &= moved
    return filled & ~inner


@pytest.mark.parametrize("centre", [(40, 50), (12, 50), (40, 95)])  # the last two leave the image
def test_an_ellipse_is_filled_even_where_it_leaves_the_image(save, centre):
    whole = disc((80, 110), *centre, 20, 30)
    image = read_volume((save("image.png", np.zeros((80, 110))),))
    filled = np.array(read(Ellipse(), image, save("line.png", rim(whole) * 255)))
    assert (filled.astype(bool) ^ whole).sum() / whole.sum() < 0.02
    with pytest.raises(UserError, match="no outline of an ellipse"):
        read(Ellipse(), image, save("line.png", np.zeros((80, 110))))


@pytest.mark.real
def test_the_outlines_of_real_heads_are_filled_as_their_masks_are(shared_data):
    for path in sorted((shared_data / "hc18" / "labelsTs").iterdir()):
        with Image.open(path) as picture:
            head = np.asarray(picture) > 0
        again = outlines.fill_ellipse(rim(head))
        assert (again ^ head).sum() / head.sum() < 0.005


def test_polygons_of_the_image_whose_number_they_name(tmp_path, save):
    image = read_volume((save("7_2.png", np.zeros((5, 6))),))
    square = '[{"points": [{"x": 1, "y": 1}, {"x": 3, "y": 1}, {"x": 3, "y": 2}, {"x": 1, "y": 2}]}]'
    marks = f"<mark><image>1</image><svg>[]</svg></mark><mark><image>2</image><svg>{square}</svg></mark>"
    path = tmp_path / "7.xml"
    path.write_text(f"<case><number>7</number>{marks}</case>")
    expected = np.zeros((5, 6), int)
    expected[1:3, 1:4] = 1
    assert read(Polygons(), image, path) == expected.tolist()
    assert outlines.read_polygons(path, "1") == []
    path.write_text(f"<case>{marks[:-20]}</case>")
    with pytest.raises(UserError, match="7.xml is cut off or damaged"):
        read(Polygons(), image, path)


def test_drawings_are_compared_with_the_photograph_and_experts_vote(save):
    photograph = np.random.default_rng(0).integers(90, 150, (120, 140, 3))
    image = read_volume((save("prime.png", photograph),))
    outer, inner = disc((120, 140), 60, 70, 40, 38), disc((120, 140), 62, 72, 15, 14)
    larger = disc((120, 140), 60, 70, 45, 45)
    paths = []
    for number, shapes in enumerate([(outer, inner), (outer, inner), (larger, inner), (outer,)]):
        drawn = photograph + np.random.default_rng(number).integers(-5, 6, photograph.shape)  # as JPEG would
        for shape in shapes:
            drawn[rim(shape)] = 10, 10, 200
        drawn[5, 5] = 255  # a speck
        paths.append(save(f"{number}.png", drawn.clip(0, 255)))
    label = np.array(read(Drawings(), image, *paths))  # the last, without a cup, does not count
    assert ((label > 0) ^ outer).sum() / outer.sum() < 0.01
    assert ((label == 2) ^ inner).sum() / inner.sum() < 0.05
    with pytest.raises(UserError, match="3.png shows no outlines"):
        read(Drawings(), image, paths[3])


def test_an_outline_with_a_gap_is_closed(save):
    outer, inner = rim(disc((100, 100), 50, 50, 40, 40)), rim(disc((100, 100), 50, 50, 15, 15))
    lines = outer | inner
    lines[8:12, 48:52] = False
    found = outlines.disc_and_cup(lines * 100.0)
    assert found is not None
    assert found[0].sum() == pytest.approx(np.pi * 40**2, rel=0.03)
    assert found[1].sum() == pytest.approx(np.pi * 15**2, rel=0.1)
    assert outlines.disc_and_cup(outer * 100.0) is None and outlines.disc_and_cup(outer * 0.0) is None


@pytest.mark.parametrize(
    ("values", "labels", "rule"),
    [
        ([0, 255], {"foreground": 1}, Numbers(((255, 1),))),
        ([0, 1], {"foreground": 1}, Numbers()),
        ([0, 0], {"foreground": 1}, Numbers()),
        ([0, 128, 255], {"label_128": 128, "label_255": 255}, Numbers()),
        ([1, 2], {"label_1": 1, "label_2": 2}, Numbers()),
    ],
)
def test_what_values_without_names_mean(save, values, labels, rule):
    empty = save("empty.png", [[0]])
    assert guess_rule([empty, save("mask.png", [values])]) == (labels, rule)


def test_a_photograph_is_no_mask(save):
    with pytest.raises(UserError, match="has 60 different values, so it is no mask"):
        guess_rule([save("mask.png", [np.arange(60)])])
    assert guess_rule([save("mask.jpg", [[0, 255]])]) == ({"foreground": 1}, Threshold())
