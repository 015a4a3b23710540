"""Eq. 1–3 on arrays small enough to read, and what must hold whatever is drawn."""

import dataclasses

import pytest
import torch

from cheaplunch.config import SynthesisConfig
from cheaplunch.synthesis import (
    Pool,
    blur,
    centroids,
    cut_and_transform,
    fill_foreground,
    merge,
    paste,
    synthesize,
    vary_intensity,
)

STILL = SynthesisConfig(drop=0, real_share=0, rotation_deg=0, scale=0, shift=0, flip=0, blur_px=0, intensity=0)
LIVELY = SynthesisConfig(real_share=0.5, rotation_deg=30, scale=0.3, shift=0.1, flip=0.5, blur_px=1, intensity=0.3)


def drawing(text: str) -> torch.Tensor:
    """Digits are class numbers, '.' is 0; one line a row → (H, W) uint8."""
    rows = [line.split() for line in text.strip().splitlines()]
    return torch.tensor([[0 if c == "." else int(c) for c in row] for row in rows], dtype=torch.uint8)


def with_(config: SynthesisConfig, **changes) -> SynthesisConfig:
    return dataclasses.replace(config, **changes)


def pool_of(image, label, background, classes) -> Pool:
    size = torch.tensor([[image.shape[-1], image.shape[-2]]])
    return Pool(image[None], label[None], background[None], size, size, classes)


def ellipse(size: int, row: float, col: float, height: float, width: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((y - row) / height) ** 2 + ((x - col) / width) ** 2 <= 1


def centre(mask: torch.Tensor) -> torch.Tensor:
    """(row, col), mean over the mask."""
    return mask.nonzero().float().mean(dim=0)


# ---- the equations by hand


def test_eq_1_foreground_where_it_is_above_zero_else_background():
    foreground = torch.tensor([[[0.0, 0.5, 0.0], [0.0, 0.7, 0.2], [0.0, 0.0, 0.0]]])
    background = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.0, 0.6], [0.7, 0.8, 0.9]]])
    expected = torch.tensor([[[0.1, 0.5, 0.3], [0.4, 0.7, 0.2], [0.7, 0.8, 0.9]]])
    assert torch.equal(paste(foreground, background), expected)


def test_eq_1_with_channels_takes_a_pixel_whole():
    foreground = torch.tensor([[[0.0, 0.0]], [[0.8, 0.0]]])  # (2, 1, 2): the first pixel is seen in one channel only
    background = torch.tensor([[[0.3, 0.3]], [[0.4, 0.4]]])
    assert torch.equal(paste(foreground, background), torch.tensor([[[0.0, 0.3]], [[0.8, 0.4]]]))


def test_eq_3_merge_lays_the_last_on_top():
    # a a .     . b b     a b b
    # a a .  +  . b b  =  a b b      and with a last   a a b
    # . . .     . . .     . . .                        a a b
    a = drawing("1 1 .\n1 1 .\n. . .").bool()
    b = drawing(". 1 1\n. 1 1\n. . .").bool()
    organs, regions = torch.stack([0.25 * a, 0.75 * b])[:, None], torch.stack([a, b])
    image, label = merge(organs, regions, torch.tensor([4, 2]))
    assert torch.equal(label, drawing("4 2 2\n4 2 2\n. . ."))
    assert torch.equal(image, torch.tensor([[[0.25, 0.75, 0.75], [0.25, 0.75, 0.75], [0, 0, 0]]]))
    image, label = merge(organs.flip(0), regions.flip(0), torch.tensor([2, 4]))
    assert torch.equal(label, drawing("4 4 2\n4 4 2\n. . ."))
    assert torch.equal(image, torch.tensor([[[0.25, 0.25, 0.75], [0.25, 0.25, 0.75], [0, 0, 0]]]))


def test_eq_2_at_rest_cuts_every_class_out():
    label = drawing("1 1 .\n2 . .\n2 . 4")
    image = torch.arange(1, 10).reshape(1, 3, 3) / 10
    organs, regions = cut_and_transform(image, label, 4, STILL, torch.Generator().manual_seed(0))
    assert torch.equal(regions, torch.stack([label == k for k in (1, 2, 3, 4)]))  # class 3 is not there: empty
    expected = torch.zeros(4, 1, 3, 3)
    expected[0, 0, 0, :2] = torch.tensor([0.1, 0.2])
    expected[1, 0, 1:, 0] = torch.tensor([0.4, 0.7])
    expected[3, 0, 2, 2] = 0.9
    torch.testing.assert_close(organs, expected, atol=1e-5, rtol=0)


def test_at_rest_a_sample_is_the_organ_on_the_background():
    label = drawing(". . . .\n. 1 2 .\n. 1 2 .\n. . . .")
    image, background = torch.rand(1, 4, 4) * 0.9 + 0.1, torch.rand(1, 4, 4)
    batch = synthesize(pool_of(image, label, background, 2), [0, 1, 2], STILL, seed=0)
    assert torch.equal(batch.labels, label.expand(3, 4, 4))
    expected = torch.where(label > 0, image, background).expand(3, 1, 4, 4)
    torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=0)


def test_at_rest_a_whole_sample_is_the_exemplar():
    label, image = drawing(". 1\n2 ."), torch.rand(1, 2, 2)
    batch = synthesize(pool_of(image, label, torch.ones(1, 2, 2), 2), [0], with_(STILL, real_share=1.0), seed=0)
    assert torch.equal(batch.labels[0], label)
    torch.testing.assert_close(batch.images[0], image, atol=1e-5, rtol=0)


def test_a_black_organ_is_pasted_too():
    label = drawing(". . . .\n. 1 1 .\n. 1 1 .\n. . . .")
    image = torch.stack([torch.zeros(4, 4), torch.where(label > 0, 0.0, 0.5)])  # (2, 4, 4): black in both channels
    batch = synthesize(pool_of(image, label, torch.ones(2, 4, 4), 1), [0], STILL, seed=0)
    assert (batch.images[0][:, label > 0] < 1 / 255).all()
    assert (batch.images[0][:, label == 0] > 0.99).all()


# ---- movement


def test_both_flips_turn_an_organ_about_its_own_centre():
    # The centre of mass is the c at row 3, column 4 (not itself of the organ).
    label = drawing("""
        . . . . . . . .
        . . . . . . . .
        . . . 1 1 . . .
        . . . 1 . . . .
        . . . . . . . .
        . . . . . . 1 .
        . . . . . . . .
        . . . . . . . .
    """)
    flipped = drawing("""
        . . . . . . . .
        . . 1 . . . . .
        . . . . . . . .
        . . . . . 1 . .
        . . . . 1 1 . .
        . . . . . . . .
        . . . . . . . .
        . . . . . . . .
    """)
    assert centre(label).tolist() == [3, 4]
    organs, regions = cut_and_transform(
        label[None].float(), label, 1, with_(STILL, flip=1.0), torch.Generator().manual_seed(0)
    )
    assert torch.equal(regions[0], flipped.bool())
    torch.testing.assert_close(organs[0, 0], flipped.float(), atol=1e-4, rtol=0)


def test_centroids_are_in_units_of_affine_grid():
    # 4 × 4: pixel centres lie at −0.75, −0.25, 0.25, 0.75; (x, y).
    masks = torch.stack([drawing(". . . .\n. . 1 1\n. . . .\n. . . ."), torch.zeros(4, 4, dtype=torch.uint8)]).bool()
    assert centroids(masks).tolist() == [[0.5, -0.25], [0.0, 0.0]]  # empty: the middle


@pytest.mark.parametrize("settings", [{"rotation_deg": 180.0}, {"flip": 0.5}, {"scale": 0.3}])
def test_turning_flipping_and_scaling_keep_the_place(settings):
    label = ellipse(64, 20, 41, 6, 11).byte()
    area, moved_much = label.sum().item(), 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, regions = cut_and_transform(label[None].float(), label, 1, with_(STILL, **settings), generator)
        assert (centre(regions[0]) - centre(label)).abs().max() < 0.5
        ratio = regions.sum().item() / area
        assert 1 / 1.3**2 - 0.05 < ratio < 1.3**2 + 0.05 if "scale" in settings else abs(ratio - 1) < 0.06
        moved_much = max(moved_much, (regions[0] != (label > 0)).float().sum().item() / area)
    assert moved_much > (0.5 if "rotation_deg" in settings else 0) or "flip" in settings


def test_shift_is_a_share_of_the_side_either_way():
    label = ellipse(64, 32, 32, 5, 5).byte()
    moves = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        _, regions = cut_and_transform(label[None].float(), label, 1, with_(STILL, shift=0.125), generator)
        moves.append(centre(regions[0]) - centre(label))
    moved = torch.stack(moves)  # (40, 2) px
    assert moved.abs().max() <= 8.5  # an eighth of 64, and rounding
    assert (moved.amin(dim=0) < -5).all()
    assert (moved.amax(dim=0) > 5).all()


def test_each_class_moves_by_itself():
    label = ellipse(64, 32, 20, 5, 5).byte() + 2 * ellipse(64, 32, 44, 5, 5).byte()
    apart = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        _, regions = cut_and_transform(torch.ones(1, 64, 64), label, 2, with_(STILL, shift=0.125), generator)
        first, second = (centre(regions[k]) - centre(label == k + 1) for k in (0, 1))
        apart.append((first - second).abs().max().item())
    assert sum(distance > 2 for distance in apart) >= 7


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_image_and_label_are_moved_by_the_same_matrix(share):
    # An image equal to its label: bilinear gives the nearest pixel a weight of at least ¼, so wherever the moved
    # label is 1 the image has at least ¼, elsewhere at most ¾.
    label = ellipse(64, 26, 36, 12, 7)
    config = with_(LIVELY, real_share=share, blur_px=0, intensity=0)
    pool = pool_of(label[None].float(), label.byte(), torch.zeros(1, 64, 64), 1)
    batch = synthesize(pool, list(range(12)), config, seed=3)
    image, moved = batch.images[:, 0], batch.labels > 0
    assert image[moved].min() >= 0.25 - 1e-3
    assert image[~moved].max() <= 0.75 + 1e-3
    assert image[moved].mean() > 0.9  # and inside it is the organ
    assert ((moved != label).sum(dim=(1, 2)) > 20).all()  # all of them did move


def test_the_label_is_where_the_organ_was_pasted():
    label = ellipse(64, 30, 24, 8, 6).byte() + 2 * ellipse(64, 34, 42, 7, 6).byte()
    pool = pool_of(torch.full((1, 64, 64), 0.8), label, torch.full((1, 64, 64), 0.3), 2)
    batch = synthesize(pool, list(range(8)), with_(LIVELY, real_share=0, blur_px=0, intensity=0), seed=1)
    assert torch.equal(batch.images[:, 0] > 0.5, batch.labels > 0)


# ---- draws


@pytest.fixture
def pool():
    torch.manual_seed(0)
    first = ellipse(32, 14, 12, 5, 4).byte() + 3 * ellipse(32, 20, 23, 4, 4).byte()
    second = 2 * ellipse(32, 16, 16, 6, 5).byte()
    sizes = torch.full((3, 2), 32)
    return Pool(torch.rand(2, 1, 32, 32), torch.stack([first, second]), torch.rand(3, 1, 32, 32), sizes[:2], sizes, 3)


def test_sample_i_is_the_same_whatever_it_is_asked_for_with(pool):
    together = synthesize(pool, [5, 0, 9], LIVELY, seed=4)
    torch.rand(7)  # the global generator plays no part
    for place, index in enumerate([5, 0, 9]):
        alone = synthesize(pool, [index], LIVELY, seed=4)
        assert torch.equal(alone.images[0], together.images[place])
        assert torch.equal(alone.labels[0], together.labels[place])


def test_samples_and_seeds_differ(pool):
    batch = synthesize(pool, list(range(10)), LIVELY, seed=4)
    other = synthesize(pool, list(range(10)), LIVELY, seed=5)
    samples = torch.cat([batch.images, other.images]).flatten(1)
    apart = torch.cdist(samples, samples) + torch.eye(20)
    assert apart.min() > 0.1


def test_labels_are_those_of_one_exemplar_and_never_none(pool):
    batch = synthesize(pool, list(range(40)), LIVELY, seed=0)
    kinds = [frozenset(label.unique().tolist()) - {0} for label in batch.labels]
    assert all(kind and (kind <= {1, 3} or kind == {2}) for kind in kinds)
    assert {2} in kinds
    assert any(kind & {1, 3} for kind in kinds)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1


def test_an_organ_that_would_leave_the_image_does_not_leave_an_empty_sample():
    label = torch.zeros(32, 32, dtype=torch.uint8)
    label[0, 0] = 1
    pool = pool_of(torch.rand(1, 32, 32), label, torch.rand(1, 32, 32), 1)
    batch = synthesize(pool, list(range(30)), LIVELY, seed=0)
    assert batch.labels.flatten(1).any(dim=1).all()


# ---- blur and intensity


def test_blur_spreads_alike_in_all_directions_and_keeps_the_sum():
    images = torch.zeros(60, 2, 21, 21)
    images[:, :, 10, 10] = 1
    blurred = blur(images, with_(STILL, blur_px=1.5), torch.Generator().manual_seed(0))
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), torch.ones(60, 2))
    assert torch.equal(blurred[:, 0], blurred[:, 1])  # channels alike
    torch.testing.assert_close(blurred, blurred.transpose(2, 3))
    offsets = torch.arange(-10, 11).float()
    deviation = ((blurred[:, 0].sum(dim=1) * offsets**2).sum(dim=1)).sqrt()  # (60,) px
    assert deviation.max() <= 1.5
    assert deviation.max() > 1.0
    sharp = (blurred[:, 0, 10, 10] == 1).sum().item()
    assert 15 <= sharp <= 45  # half of them


def test_intensity_keeps_the_order_of_greys_the_range_and_black():
    grey = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).expand(30, 2, 8, 8)
    varied = vary_intensity(grey, with_(STILL, intensity=0.4), torch.Generator().manual_seed(0))
    assert varied.min() >= 0
    assert varied.max() <= 1
    assert torch.equal(varied[:, 0], varied[:, 1])
    flat = varied[:, 0].flatten(1)
    assert (flat[:, 2:].diff(dim=1) >= 0).all()
    assert (flat[:, 0] == 0).all()  # padding stays black
    assert flat[:, 32].std() > 0.05


# ---- backgrounds from slices that all show foreground


def test_a_dropped_organ_leaves_the_other_but_never_nothing():
    label = drawing(". . . .\n. 1 2 .\n. 1 2 .\n. . . .")
    pool = pool_of(torch.full((1, 4, 4), 0.5), label, torch.zeros(1, 4, 4), 2)
    seen = synthesize(pool, list(range(40)), dataclasses.replace(STILL, drop=0.5), seed=0).labels
    classes = {frozenset(sample.unique().tolist()) - {0} for sample in seen}
    assert classes == {frozenset({1}), frozenset({2}), frozenset({1, 2})}
    always = synthesize(pool, [0, 1, 2], dataclasses.replace(STILL, drop=1.0), seed=0).labels
    assert torch.equal(always, label.expand(3, 4, 4))


def whole(images: torch.Tensor) -> torch.Tensor:
    """Width and height of slices that fill their square."""
    return torch.tensor([[images.shape[-1], images.shape[-2]]]).expand(len(images), 2)


def test_filling_does_not_let_the_padding_in():
    # A slice 20 px wide in a square of 32: its hole reaches to the padding at the right and must not turn dark.
    images = torch.zeros(1, 1, 32, 32)
    images[..., :20] = 0.6
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[0, 8:24, 14:20] = 1
    filled = fill_foreground(images, labels, torch.tensor([[20, 32]]))
    torch.testing.assert_close(filled[..., :20], torch.full((1, 1, 32, 20), 0.6), atol=1e-5, rtol=0)


def narrow_pool() -> Pool:
    """A slice 16 px wide in a square of 32, its organ at the top left; the background's left half is the brighter."""
    image, label, background = torch.zeros(1, 32, 32), torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32)
    image[..., :16] = 0.5
    label[4:8, 2:5] = 1
    background[..., :8], background[..., 8:16] = 0.9, 0.3
    size = torch.tensor([[16, 32]])
    return Pool(image[None], label[None], background[None], size, size, 1)


def test_a_narrow_background_is_flipped_in_its_own_place():
    # Flipped about the square's centre it would land in the padding.
    pasted = synthesize(narrow_pool(), [0], with_(STILL, flip=1.0), seed=0).images[0, 0]
    assert pasted[20, 4] == pytest.approx(0.3)
    assert pasted[20, 12] == pytest.approx(0.9)
    assert (pasted[:, 16:] == 0).all()


def test_a_whole_exemplar_keeps_its_sides():
    pool = narrow_pool()
    sample = synthesize(pool, [0, 1, 2], with_(STILL, flip=1.0, real_share=1.0), seed=0)
    assert torch.equal(sample.labels, pool.labels.expand(3, 32, 32))


def test_filling_leaves_the_rest_untouched_and_stays_within_the_surroundings():
    torch.manual_seed(0)
    labels = ellipse(40, 18, 22, 7, 9).byte()[None]
    images = torch.rand(1, 2, 40, 40) * 0.2 + 0.3
    images[:, 1] += 0.4  # channels of different range
    images = torch.where(labels[:, None] > 0, 1.0, images)
    filled = fill_foreground(images, labels, whole(images))
    changed = (filled != images).any(dim=1)[0]
    near = torch.nn.functional.max_pool2d(labels[:, None].float(), 7, 1, 3)[0, 0] > 0  # at most 3 px off the organ
    assert (changed | (labels[0] == 0)).all()
    assert (~changed | near).all()
    for channel, (low, high) in enumerate([(0.3, 0.5), (0.7, 0.9)]):
        values = filled[0, channel][labels[0] > 0]
        assert values.min() >= low - 1e-4
        assert values.max() <= high + 1e-4


@pytest.mark.parametrize("size", [32, 45])
def test_filling_a_constant_gives_the_constant(size):
    labels = torch.zeros(1, size, size, dtype=torch.uint8)
    labels[0, 3 : size // 2, : size // 2] = 1  # touches the edge
    images = torch.where(labels[:, None] > 0, 0.9, 0.4)
    filled = fill_foreground(images, labels, whole(images))
    torch.testing.assert_close(filled, torch.full((1, 1, size, size), 0.4), atol=1e-5, rtol=0)


def test_filling_takes_the_soft_edge_of_the_organ_with_it():
    # The pixel next to the label is half organ; filled from there, its brightness would run into the hole.
    labels = ellipse(40, 18, 22, 7, 9).byte()[None]
    halo = torch.nn.functional.max_pool2d(labels[:, None].float(), 3, 1, 1)  # the organ and one pixel around it
    images = torch.where(labels[:, None] > 0, 0.9, torch.where(halo > 0, 0.6, 0.3))
    torch.testing.assert_close(
        fill_foreground(images, labels, whole(images)), torch.full((1, 1, 40, 40), 0.3), atol=1e-5, rtol=0
    )


def test_filling_counts_the_near_most():
    # Left half dark, right half bright, a hole across both: filled dark on the left, bright on the right.
    images = torch.cat([torch.full((1, 1, 32, 16), 0.2), torch.full((1, 1, 32, 16), 0.8)], dim=3)
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[0, 12:20, 6:26] = 1
    filled = fill_foreground(images, labels, whole(images))[0, 0, 16]
    assert filled[7] < 0.3
    assert filled[24] > 0.7
    assert (filled[6:26].diff() > -0.05).all()
