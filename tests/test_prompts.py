"""Points and boxes on shapes drawn by hand; # is the mask, @ the point that must be found."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cheaplunch.data.slices import Frame
from cheaplunch.prompts import Prompts, furthest_point, oracle_prompts, random_point, tight_box, training_points


def drawing(text: str) -> np.ndarray:
    return np.array([line.split() for line in text.strip().splitlines()])


# ---- furthest from the margin


@pytest.mark.parametrize(
    "text",
    [
        # 5 × 5 in a wide image: the middle, and (x, y), not (row, col)
        """
        . . . . . . . . .
        . . # # # # # . .
        . . # # # # # . .
        . . # # @ # # . .
        . . # # # # # . .
        . . # # # # # . .
        """,
        # the thick end of a club
        """
        . . . . . . . . . .
        . . . . . . # # # .
        # # # # # # # @ # .
        . . . . . . # # # .
        . . . . . . . . . .
        """,
        # the image's edge is a margin too: not the corner, which is furthest from the background
        """
        # # # .
        # @ # .
        # # # .
        . . . .
        """,
        # of several the first in reading order
        """
        . . . . . .
        . @ # . # .
        . # # . . .
        """,
        # everything
        """
        # # #
        # @ #
        # # #
        """,
        # a ring: never its hollow centre
        """
        @ # # # #
        # . . . #
        # . . . #
        # . . . #
        # # # # #
        """,
    ],
)
def test_furthest_point(text):
    picture = drawing(text)
    (row,), (col,) = np.where(picture == "@")
    assert furthest_point(picture != ".") == (col, row)


masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)).filter(np.any)


@given(masks, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_points_are_inside_and_the_box_is_tight(mask, seed):
    for x, y in (furthest_point(mask), random_point(mask, np.random.default_rng(seed))):
        assert mask[int(y), int(x)]
    x0, y0, x1, y1 = map(int, tight_box(mask))
    assert mask[y0 : y1 + 1, x0 : x1 + 1].sum() == mask.sum()
    assert mask[[y0, y1], :].any(axis=1).all()
    assert mask[:, [x0, x1]].any(axis=0).all()


def test_random_point_takes_every_pixel_alike():
    mask = (
        drawing("""
        . . . # .
        # . . # .
    """)
        == "#"
    )
    rng = np.random.default_rng(0)
    drawn = [random_point(mask, rng) for _ in range(900)]
    assert set(drawn) == {(3, 0), (0, 1), (3, 1)}
    assert all(240 < drawn.count(place) < 360 for place in set(drawn))  # 300, four standard deviations


# ---- boxes


def test_box_holds_first_and_last_pixel_and_its_margin_stays_in_the_image():
    mask = (
        drawing("""
        . . . . . . .
        . . # # . . .
        . . . . . # .
        . . . . . . .
    """)
        == "#"
    )
    assert tight_box(mask) == (2, 1, 5, 2)
    assert tight_box(mask, 1) == (1, 0, 6, 3)
    assert tight_box(mask, 2) == (0, 0, 6, 3)  # the image has columns 0–6, rows 0–3
    assert tight_box(np.eye(1, dtype=bool)) == (0, 0, 0, 0)


# ---- in the network's frame


@pytest.mark.parametrize(("shape", "size"), [((30, 20), 120), ((20, 30), 120), ((200, 300), 64), ((300, 200), 64)])
def test_oracle_prompts_find_their_way_back(shape, size):
    height, width = shape
    block = np.zeros(shape, bool)
    block[height // 5 : height // 2, width // 4 : width // 4 * 3] = True
    corner = np.zeros(shape, bool)
    corner[-height // 5 :, -width // 4 :] = True
    targets, frame = np.stack([block, corner]), Frame(height, width, size)

    points = oracle_prompts("furthest", targets, frame, np.random.default_rng(0))
    assert points.points_xy.shape == (1, 2, 1, 2)
    assert points.boxes_xyxy is None
    assert points.point_labels.tolist() == [[[1], [1]]]
    back = frame.point_from_model(points.points_xy)[0, :, 0].numpy()
    np.testing.assert_allclose(back, [furthest_point(block), furthest_point(corner)], atol=1e-3)
    in_square = frame.label_to_model(torch.from_numpy(targets))  # (2, size, size)
    for mask, (x, y) in zip(in_square, points.points_xy[0, :, 0].round().long().tolist(), strict=True):
        assert mask[y, x]

    boxes = oracle_prompts("box", targets, frame, np.random.default_rng(0))
    assert boxes.boxes_xyxy.shape == (1, 2, 4)
    assert boxes.points_xy is None
    back = frame.point_from_model(boxes.boxes_xyxy.reshape(2, 2, 2)).reshape(2, 4).numpy()
    np.testing.assert_allclose(back, [tight_box(block), tight_box(corner)], atol=0.501)  # within the outer pixels


def test_oracle_points_at_random_follow_the_generator():
    targets = np.ones((1, 40, 60), bool)

    def draw(seed):
        return oracle_prompts("random", targets, Frame(40, 60, 60), np.random.default_rng(seed)).points_xy

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# ---- for training


def test_random_points_are_inside_and_alike(generator):
    # Two pixels, one pixel, and all of a square of 8.
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, 2, 5] = masks[0, 7, 7] = True
    masks[1, 6, 1] = True
    masks[2] = True
    draws = torch.stack([training_points(masks, generator) for _ in range(400)])  # (400, P, 2)
    assert draws.shape == (400, 3, 2)
    first = [tuple(xy) for xy in draws[:, 0].tolist()]
    assert set(first) == {(5, 2), (7, 7)}
    assert 150 < first.count((5, 2)) < 250
    assert (draws[:, 1] == torch.tensor([1.0, 6.0])).all()
    spread = torch.histc(draws[:, 2, 0], 8, 0, 8), torch.histc(draws[:, 2, 1], 8, 0, 8)
    assert all(25 < count < 80 for histogram in spread for count in histogram.tolist())  # 50 each


def test_points_become_prompts_on_the_target():
    prompts = Prompts.of_points(torch.tensor([[[3.0, 4.0], [5.0, 6.0]]]))  # B = 1, P = 2
    assert prompts.points_xy.tolist() == [[[[3, 4]], [[5, 6]]]]
    assert prompts.point_labels.tolist() == [[[1], [1]]]
    assert prompts[0:1].points_xy.shape == (1, 2, 1, 2)


def test_a_share_of_training_points_is_furthest_from_the_boundary(generator):
    # A square of 5 × 5 has one pixel furthest inside; drawn at random it would come up once in 25.
    masks = torch.zeros(1, 12, 12, dtype=torch.bool)
    masks[0, 4:9, 1:6] = True
    points = [training_points(masks, generator, 0.5)[0].tolist() for _ in range(400)]
    assert 160 < points.count([3.0, 6.0]) < 260  # 200 and a few by chance
    assert training_points(masks, generator, 1.0)[0].tolist() == [3.0, 6.0]
