"""Points and boxes on shapes drawn by hand; # is the mask, @ the point that must be found."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cheaplunch.data.slices import Frame
from cheaplunch.prompts import (
    Prompts,
    SimulatedUser,
    furthest_point,
    jitter_box,
    jitter_point,
    next_click,
    oracle_prompts,
    random_point,
    tight_box,
    training_points,
)


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


# ---- hands that are not exact


def test_jitter_reaches_its_bounds_and_stays_in_the_image():
    rng = np.random.default_rng(0)
    points = np.array([jitter_point((5.0, 1.0), (8, 20), 3.0, rng) for _ in range(400)])
    assert points[:, 0].min() >= 2
    assert points[:, 0].max() <= 8
    assert np.ptp(points[:, 0]) > 5.8  # of 6
    assert points[:, 1].min() == 0  # cut off at the image's edge: 1 − 3 would be outside
    assert points[:, 1].max() <= 4

    boxes = np.array([jitter_box((2.0, 3.0, 17.0, 5.0), (8, 20), 4.0, rng) for _ in range(400)])
    assert boxes.min(axis=0).tolist() == pytest.approx([0, 0, 17, 5], abs=0.1)  # outward, never inward
    assert boxes.max(axis=0).tolist() == pytest.approx([2, 3, 19, 7], abs=0.1)
    assert (boxes[:, 2] == 19).mean() == pytest.approx(0.5, abs=0.1)  # columns 19…21 are outside


def test_without_jitter_nothing_is_drawn():
    rng = np.random.default_rng(0)
    assert jitter_point((5.0, 1.0), (8, 20), 0.0, rng) == (5, 1)
    assert jitter_box((2.0, 3.0, 17.0, 5.0), (8, 20), 0.0, rng) == (2, 3, 17, 5)
    assert rng.random() == np.random.default_rng(0).random()


# ---- the simulated user: m is missed, f is too much, # is right; the next click is on the capital letter


@pytest.mark.parametrize(
    ("text", "label"),
    [
        # a missed block of 9 against 4 too many: on the target
        (
            """
            # # . f f .
            # # . f f .
            . . . . . .
            m m m . . .
            m M m . . .
            m m m . . .
            . . . . . .
            """,
            1,
        ),
        # 6 too many against 4 and 4 missed, which touch at a corner only: off the target, all of it alike deep
        (
            """
            m m . . . . .
            m m . . . . .
            . . m m . . .
            . . m m . . .
            . . . . F f f
            . . . . f f f
            """,
            0,
        ),
        # of equal regions the missed one
        (
            """
            f f . . .
            f f . M m
            . . . m m
            """,
            1,
        ),
        # all is missed: as the first point, furthest from the boundary
        (
            """
            . m m m
            . m M m
            . m m m
            . . . .
            """,
            1,
        ),
    ],
)
def test_next_click(text, label):
    picture = drawing(text)
    predicted, truth = np.isin(picture, ["#", "f", "F"]), np.isin(picture, ["#", "m", "M"])
    (row,), (col,) = np.where(np.isin(picture, ["F", "M"]))
    assert next_click(predicted, truth) == (col, row, label)


def test_no_click_where_nothing_is_wrong():
    truth = np.eye(4, dtype=bool)
    assert next_click(truth, truth) is None
    assert next_click(np.zeros((4, 4), bool), np.zeros((4, 4), bool)) is None


def test_user_clicks_until_each_target_is_found():
    targets = np.zeros((2, 9, 9), bool)
    targets[0, 1:4, 1:4] = True
    targets[1, 5:8, 5:8] = True
    user = SimulatedUser(targets, np.random.default_rng(3))
    for target, [(x, y, label)] in zip(targets, user.clicks, strict=True):
        assert target[int(y), int(x)]
        assert label == 1
    frame = Frame(9, 9, 36)  # fourfold: pixel 2 becomes 4 · 2.5 − 0.5 = 9.5
    first = user.prompts(frame)
    assert first.points_xy.shape == (1, 2, 1, 2)
    assert first.masks is None

    predicted = targets.copy()
    predicted[0, 1:4, 5:8] = True  # nine too many, around (6, 2)
    user.look(predicted)
    assert user.unfinished == [0]  # the other is found
    logits = torch.randn(1, 18, 18)
    second = user.prompts(frame, logits)
    assert second.points_xy.shape == (1, 1, 2, 2)
    assert second.points_xy[0, 0, 1].tolist() == [25.5, 9.5]
    assert second.point_labels.tolist() == [[[1, 0]]]
    assert torch.equal(second.masks, logits[None])

    user.look(np.zeros_like(targets))  # worse for the one that was found: it gets no more clicks
    assert [len(clicks) for clicks in user.clicks] == [3, 1]
    assert user.clicks[0][-1] == (2, 2, 1)
    user.look(targets)
    assert user.unfinished == []


def test_masks_travel_with_their_prompts():
    masks = torch.arange(8.0).reshape(2, 1, 2, 2)
    prompts = Prompts(torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1), masks=masks)
    assert torch.equal(prompts[1:].masks, masks[1:])
    assert prompts.to(torch.device("meta")).masks.device.type == "meta"


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
