"""Eq. 1–3 on arrays small enough to read, and what must hold whatever is drawn."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cheaplunch.config import SynthesisConfig
from cheaplunch.errors import UserError
from cheaplunch.sample_sets import open_samples, write_samples
from cheaplunch.synthesis import (
    Plan,
    Pool,
    Transforms,
    blur,
    centroids,
    cut_out,
    draw,
    draw_transforms,
    fill_foreground,
    left_right_pairs,
    paste,
    random_matrices,
    render,
    synthesize,
    transform,
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


def cut_and_transform(image, label, classes, config, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2 for every class, in windows as large as the image: (C, S, S), (S, S) → (K, C, S, S), (K, S, S)."""
    numbers = torch.arange(1, classes + 1)
    transforms = draw_transforms(centroids(label == numbers[:, None, None]), config, generator)
    images, labels = (t.expand(classes, *t.shape) for t in (image, label.float()))
    organs, regions = cut_out(images, labels, numbers, transforms, [(0, 0)] * classes, (*label.shape,), config)
    return organs * regions[:, None], regions


def merge(organs, regions, numbers) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 3: pasted one after another onto nothing."""
    image, label = torch.zeros_like(organs[0]), torch.zeros(regions.shape[1:], dtype=torch.uint8)
    for organ, region, number in zip(organs, regions, numbers, strict=True):
        paste(organ, region, number, image, label)
    return image, label


def ellipse(size: int, row: float, col: float, height: float, width: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((y - row) / height) ** 2 + ((x - col) / width) ** 2 <= 1


def centre(mask: torch.Tensor) -> torch.Tensor:
    """(row, col), mean over the mask."""
    return mask.nonzero().float().mean(dim=0)


# ---- the equations by hand


def test_eq_1_foreground_where_it_is_above_zero_else_background():
    foreground = torch.tensor([[[0.0, 0.5, 0.0], [0.0, 0.7, 0.2], [0.0, 0.0, 0.0]]])
    image = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.0, 0.6], [0.7, 0.8, 0.9]]])
    label = torch.zeros(3, 3, dtype=torch.uint8)
    paste(foreground, foreground[0] > 0, 1, image, label)
    assert torch.equal(image, torch.tensor([[[0.1, 0.5, 0.3], [0.4, 0.7, 0.2], [0.7, 0.8, 0.9]]]))
    assert torch.equal(label, drawing(". 1 .\n. 1 1\n. . ."))


def test_eq_1_with_channels_takes_a_pixel_whole():
    organ = torch.tensor([[[0.0, 0.0]], [[0.8, 0.0]]])  # (2, 1, 2): the first pixel is seen in one channel only
    image, label = torch.tensor([[[0.3, 0.3]], [[0.4, 0.4]]]), torch.zeros(1, 2, dtype=torch.uint8)
    paste(organ, (organ > 0).any(dim=0), 1, image, label)
    assert torch.equal(image, torch.tensor([[[0.0, 0.3]], [[0.8, 0.4]]]))


def test_eq_3_merge_lays_the_last_on_top():
    # a a .     . b b     a b b
    # a a .  +  . b b  =  a b b      and with a last   a a b
    # . . .     . . .     . . .                        a a b
    a = drawing("1 1 .\n1 1 .\n. . .").bool()
    b = drawing(". 1 1\n. 1 1\n. . .").bool()
    organs, regions = torch.stack([0.25 * a, 0.75 * b])[:, None], torch.stack([a, b])
    image, label = merge(organs, regions, [4, 2])
    assert torch.equal(label, drawing("4 2 2\n4 2 2\n. . ."))
    assert torch.equal(image, torch.tensor([[[0.25, 0.75, 0.75], [0.25, 0.75, 0.75], [0, 0, 0]]]))
    image, label = merge(organs.flip(0), regions.flip(0), [2, 4])
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
    assert (batch.images[0][:, label > 0] > 0).all()  # Eq. 1's rule for what is foreground
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
    images = torch.zeros(3, 2, 29, 29)
    images[:, :, 14, 14] = 1
    blurred = blur(images, torch.tensor([0.0, 0.8, 1.5]), reach=4)  # (3, 2, 21, 21)
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), torch.ones(3, 2))
    assert torch.equal(blurred[:, 0], blurred[:, 1])  # channels alike
    torch.testing.assert_close(blurred, blurred.transpose(2, 3))
    offsets = torch.arange(-10, 11).float()
    deviation = ((blurred[:, 0].sum(dim=1) * offsets**2).sum(dim=1)).sqrt()  # (3,) px
    assert deviation.tolist() == pytest.approx([0.0, 0.8, 1.5], abs=0.05)
    assert torch.equal(blurred[0], images[0, :, 4:-4, 4:-4])


@pytest.mark.parametrize("whole", [False, True])
def test_beyond_the_edge_a_slice_goes_on_as_it_ends(whole):
    # Quarters of four greys: blur mixes them where they meet, and the corners stay as they are.
    image = torch.tensor([[0.2, 0.4], [0.6, 0.8]]).repeat_interleave(16, 0).repeat_interleave(16, 1)[None, None]
    tone = torch.tensor([[1.0], [1.0], [0.0]])
    transforms = Transforms(torch.eye(2, 3)[None], torch.tensor([1.5]), tone)
    blurred, _ = transform(image, transforms, [(0, 0)], (32, 32), with_(STILL, blur_px=1.5), whole)
    corners = [blurred[0, 0, y, x].item() for y in (0, -1) for x in (0, -1)]
    assert corners == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=1e-5)
    assert blurred[0, 0, 15, 15].item() == pytest.approx(0.5, abs=0.1)


def test_blur_is_the_same_alone_and_in_company():
    images = torch.rand(5, 1, 40, 48, generator=torch.Generator().manual_seed(0))
    deviations = torch.tensor([0.3, 0.0, 1.5, 0.7, 1.1])
    together = blur(images, deviations, reach=4)
    for n in range(5):
        assert torch.equal(blur(images[n : n + 1], deviations[n : n + 1], reach=4)[0], together[n])


def test_half_are_blurred_at_most_so_much():
    drawn = draw_transforms(torch.zeros(200, 2), with_(STILL, blur_px=1.5), torch.Generator().manual_seed(0)).blur_px
    assert 70 < (drawn == 0).sum() < 130
    assert 1.0 < drawn.max() <= 1.5


def tones(intensity: float, count: int) -> torch.Tensor:
    config = with_(STILL, intensity=intensity)
    return draw_transforms(torch.zeros(count, 2), config, torch.Generator().manual_seed(0)).tones


def test_intensity_keeps_the_order_of_greys_the_range_and_black():
    grey = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).expand(30, 2, 8, 8)
    varied = vary_intensity(grey, tones(0.4, 30))
    assert varied.min() >= 0
    assert varied.max() <= 1
    assert torch.equal(varied[:, 0], varied[:, 1])
    flat = varied[:, 0].flatten(1)
    assert (flat[:, 2:].diff(dim=1) >= 0).all()
    assert (flat[:, 0] == 0).all()  # padding stays black
    assert flat[:, 32].std() > 0.05


def test_a_colour_is_varied_as_one():
    # Every channel goes through one curve: what is as bright as the red here is so there, black in one channel too.
    image = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image[:, 0, 0], image[:, 1, 1] = 0, 0
    image[:, 2] = image[:, :2].amax(dim=1).clamp(min=0.01)
    varied = vary_intensity(image, tones(0.4, 20))
    greys = vary_intensity(image.flatten(1)[:, None, None].clamp(min=1e-9), tones(0.4, 20))[:, 0, 0]
    torch.testing.assert_close(varied.flatten(1), greys, atol=1e-4, rtol=0)


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


# ---- what must hold whatever is drawn


THREE = ellipse(64, 18, 20, 8, 6).byte() + 2 * ellipse(64, 44, 26, 7, 9).byte() + 3 * ellipse(64, 30, 48, 10, 5).byte()


def lively_plans(pool: Pool, count: int, **changes) -> tuple[list[Plan], SynthesisConfig]:
    config = with_(LIVELY, **{"real_share": 0, "shift": 0.2, **changes})
    return [draw(pool, config, torch.Generator().manual_seed(seed)) for seed in range(count)], config


def test_an_exemplar_is_seen_where_the_label_is_and_nowhere_else():
    """With another exemplar the same plans differ on labelled pixels: none is pasted without label, or the reverse."""
    background = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(1))
    pool = pool_of(torch.full((1, 64, 64), 0.3), THREE, background, 3)
    plans, config = lively_plans(pool, 30)
    one = render(pool, plans, config)
    other = render(dataclasses.replace(pool, images=torch.full((1, 1, 64, 64), 0.5)), plans, config)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal((one.images != other.images)[:, 0], one.labels > 0)


def test_image_and_label_agree_on_which_organ_is_on_top():
    # Only the surroundings of class k change in the exemplar, and they are seen where the label says k.
    background = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(1))
    pool = pool_of(torch.full((1, 64, 64), 0.3), THREE, background, 3)
    plans, config = lively_plans(pool, 30, drop=0, blur_px=0, shift=0.35)
    before = render(pool, plans, config)
    covered = 0
    for k in (1, 2, 3):
        near = torch.nn.functional.max_pool2d(THREE.eq(k)[None].float(), 5, 1, 2) > 0
        changed = render(dataclasses.replace(pool, images=torch.where(near, 0.5, 0.3)[None]), plans, config)
        assert torch.equal((changed.images != before.images)[:, 0], before.labels == k)
        alone = render(pool, [dataclasses.replace(plan, order=(k,)) for plan in plans], config)
        covered += ((alone.labels == k) & (before.labels != k)).sum().item()
    assert covered > 500  # px on which one organ did hide another


def test_windows_change_no_pixel():
    generator = torch.Generator().manual_seed(2)
    pool = pool_of(torch.rand(2, 64, 64, generator=generator), THREE, torch.rand(2, 64, 64, generator=generator), 3)
    for paste_ in ("hard", "soft"):
        plans, config = lively_plans(pool, 20, shift=0.4, paste=paste_)
        tight, whole = (render(pool, plans, config, step) for step in (8, 64))
        assert torch.equal(tight.labels, whole.labels)
        assert torch.equal(tight.images, whole.images)


def test_no_organ_moves_further_than_the_bound():
    pool = pool_of(torch.full((1, 64, 64), 0.3), THREE, torch.zeros(1, 64, 64), 3)
    config = with_(LIVELY, real_share=0, shift=0.0625, scale=0.1)  # 4 of 64 px
    plans = [draw(pool, config, torch.Generator().manual_seed(seed)) for seed in range(40)]
    furthest = 0.0
    for k in (1, 2, 3):
        for label in render(pool, [dataclasses.replace(plan, order=(k,)) for plan in plans], config).labels:
            furthest = max(furthest, (centre(label == k) - centre(THREE.eq(k))).abs().max().item())
    assert 3 < furthest <= 4.5  # and half a pixel for the rounding of a shape turned about its centre


def test_every_merge_order_occurs():
    pool = pool_of(torch.rand(1, 64, 64), THREE, torch.rand(1, 64, 64), 3)
    plans, _ = lively_plans(pool, 60, drop=0)
    assert len({plan.order for plan in plans}) == 6


# ---- left and right


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["liver", "left kidney", "right kidney", "spleen"], (2, 3)),
        (["Kidney(L)", "Kidney(R)"], (1, 2)),
        (["lung_r", "heart", "lung_l"], (1, 3)),
        (["LeftLung", "RightLung", "right adrenal gland"], (1, 2)),
        (["left ventricle", "right atrium", "l", "leftover"], ()),
        (["liver", "liver 2"], ()),
    ],
)
def test_names_that_differ_in_their_side_alone(names, pairs):
    assert left_right_pairs(names) == pairs


def test_paired_organs_are_never_mirrored_left_to_right():
    matrices = random_matrices(torch.zeros(3, 2), with_(STILL, flip=1.0), torch.Generator().manual_seed(0), (1, 3))
    assert matrices[:, 0, 0].tolist() == [1, -1, 1]  # x
    assert matrices[:, 1, 1].tolist() == [-1, -1, -1]  # y


def test_left_and_right_keep_their_sides_whatever_is_flipped():
    label = ellipse(64, 34, 18, 9, 5).byte() + 2 * ellipse(64, 30, 46, 8, 6).byte()
    pool = dataclasses.replace(pool_of(torch.rand(1, 64, 64), label, torch.rand(1, 64, 64), 2), paired=(1, 2))
    batch = synthesize(pool, range(40), with_(LIVELY, flip=1.0, drop=0), seed=0)
    for sample in batch.labels:
        assert centre(sample == 1)[1] < centre(sample == 2)[1]


# ---- soft edges


def test_soft_pasting_mixes_edges_and_nothing_else():
    # A white organ on black at rest: what is white by half or more is the label, six pixels across the edge mix.
    label = ellipse(64, 32, 32, 14, 10).byte()
    pool = pool_of(torch.ones(1, 64, 64), label, torch.zeros(1, 64, 64), 1)
    soft = synthesize(pool, [0], with_(STILL, paste="soft"), seed=0)
    image = soft.images[0, 0]
    assert torch.equal(soft.labels[0], label)
    assert torch.equal(image >= 0.5, label > 0)
    inside = -torch.nn.functional.max_pool2d(-label[None].float(), 9, 1, 4)[0] > 0  # 4 px from the edge
    outside = torch.nn.functional.max_pool2d(label[None].float(), 9, 1, 4)[0] == 0
    torch.testing.assert_close(image[inside], torch.ones(int(inside.sum())))
    assert (image[outside] == 0).all()
    row = image[32, 32:]
    assert (row.diff() <= 0).all()  # fades outwards
    assert ((row > 0.05) & (row < 0.95)).sum() in (2, 3, 4)


def test_soft_and_hard_differ_in_the_image_alone():
    generator = torch.Generator().manual_seed(2)
    pool = pool_of(torch.rand(1, 64, 64, generator=generator), THREE, torch.rand(1, 64, 64, generator=generator), 3)
    hard, soft = (synthesize(pool, range(10), with_(LIVELY, paste=kind), seed=5) for kind in ("hard", "soft"))
    assert torch.equal(hard.labels, soft.labels)
    assert not torch.equal(hard.images, soft.images)


# ---- balance


def test_balance_shows_a_rare_class_as_often_as_a_common_one():
    # Class 1 is on five exemplars, class 2 on one, class 3 on none.
    labels = torch.stack([ellipse(32, 16, 16, 6, 5).byte()] * 5 + [2 * ellipse(32, 16, 16, 6, 5).byte()])
    sizes = torch.full((6, 2), 32)
    pool = Pool(torch.rand(6, 1, 32, 32), labels, torch.rand(1, 1, 32, 32), sizes, sizes[:1], 3)
    shown = {}
    for balance in (False, True):
        drawn = synthesize(pool, range(200), with_(STILL, real_share=0.3, drop=0.9, balance=balance), seed=0).labels
        shown[balance] = (drawn == 2).flatten(1).any(dim=1).sum().item()
    assert 18 <= shown[False] <= 50  # a sixth
    assert 80 <= shown[True] <= 120  # a half


def test_balance_keeps_the_class_it_drew():
    pool = pool_of(torch.rand(1, 64, 64), THREE, torch.rand(1, 64, 64), 3)
    config = with_(STILL, drop=1.0, balance=True)
    seen = [label.unique().tolist() for label in synthesize(pool, range(60), config, seed=0).labels]
    assert {len(classes) for classes in seen} == {2}  # background and the one
    assert {classes[1] for classes in seen} == {1, 2, 3}


# ---- on the disk


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_set_comes_back_from_the_disk(channels, tmp_path):
    pool = narrow_pool()  # and an exemplar that fills the square
    pool = dataclasses.replace(
        pool,
        images=pool.images.repeat(2, 1, 1, 1),
        labels=pool.labels.repeat(2, 1, 1),
        sizes=torch.tensor([[16, 32], [32, 32]]),
    )
    images, backgrounds = (t.repeat(1, channels, 1, 1) * torch.linspace(1, 0.5, channels)[:, None, None]
                           for t in (pool.images, pool.backgrounds))  # fmt: skip
    pool = dataclasses.replace(pool, images=images, backgrounds=backgrounds)
    told = []
    write_samples(tmp_path, pool, 18, LIVELY, 3, ["disc"], {"from": "here"}, lambda *done: told.append(done))
    assert told == [(n, 18) for n in range(1, 19)]
    stored = open_samples(tmp_path)
    assert stored.origin == {"from": "here"}
    made, read = synthesize(pool, [17, 0, 5, 9], LIVELY, 3), stored.load([17, 0, 5, 9])
    torch.testing.assert_close(read.images, made.images, atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(read.labels, made.labels)
    assert torch.equal(read.sizes, made.sizes)
    assert len(stored.sizes.unique(dim=0)) == 2


def test_a_set_that_is_not_as_it_was_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no synthesis\.json; make the set anew"):
        open_samples(tmp_path)
    write_samples(tmp_path, narrow_pool(), 2, LIVELY, 0, ["disc"], {})
    mask = tmp_path / "labelsTr" / "synthetic_00001.png"
    before = mask.read_bytes()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(mask)
    with pytest.raises(UserError, match="its pictures are not those that were written"):
        open_samples(tmp_path)
    mask.unlink()
    with pytest.raises(UserError, match=r"has no synthetic_00001\.png"):
        open_samples(tmp_path)
    mask.write_bytes(before)
    record = json.loads((tmp_path / "synthesis.json").read_text())
    del record["sizes_px"]
    (tmp_path / "synthesis.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"has a damaged synthesis\.json"):
        open_samples(tmp_path)
