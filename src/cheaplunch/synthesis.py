"""Exemplar-guided synthesis (Cheap Lunch §2.1, Eq. 1–3), batched on tensors.

Every organ of an exemplar is cut out by its label, transformed by itself, merged with the others and
pasted onto a transformed slice without organs:

    O_k = T_k(I_e ⊗ Y_e^k)                                              (Eq. 2)
    I_s = Merge(O_1 … O_K) where Merge(…) > 0, else T(I_b)              (Eq. 3; Eq. 1 is K = 1)

T is blur, intensity variation, scale, flip and rotation. An image and its label are moved by one matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cheaplunch.config import SynthesisConfig

# Foreground that is black would count as background in "> 0"; it is lifted by less than one grey level of 255.
BLACK = 1e-3


@dataclass(frozen=True, eq=False)
class Pool:
    """What is synthesized from, in the network's input frame."""

    images: Tensor
    """Exemplars (N, C, S, S) in [0, 1]."""
    labels: Tensor
    """(N, S, S) uint8: 0 is background, k the k-th class."""
    backgrounds: Tensor
    """Slices without foreground (M, C, S, S)."""
    sizes: Tensor
    """Width and height in px (N, 2) that an exemplar fills of its square; the rest is padding."""
    background_sizes: Tensor
    """(M, 2), likewise."""
    classes: int
    backgrounds_filled: bool = False
    """True where no training slice was free of foreground and the backgrounds are exemplars filled in."""

    def to(self, device: torch.device) -> Pool:
        """The pool with its pictures on `device`, where samples are then made; random draws stay on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "backgrounds")}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Batch:
    images: Tensor
    """(B, C, S, S) in [0, 1]."""
    labels: Tensor
    """(B, S, S) uint8."""
    sizes: Tensor
    """Width and height in px (B, 2) that each image fills of its square."""


def synthesize(pool: Pool, indices: list[int], config: SynthesisConfig, seed: int) -> Batch:
    """Samples number `indices` of the set that `seed` describes: the same ones, whichever are asked for together."""
    samples = []
    for index in indices:
        generator = torch.Generator().manual_seed(derive_seed(seed, "sample", index))
        samples.append(_one(pool, config, generator))
    images, labels, sizes = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.stack(labels), torch.stack(sizes))


def write_samples(
    folder: Path,
    pool: Pool,
    count: int,
    config: SynthesisConfig,
    seed: int,
    names: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """The first `count` samples as an nnU-Net raw folder of PNG: 8-bit images, labels 1…K named `names`.

    One or three channels are one picture each; other numbers of channels become a picture a channel.
    """
    channels = pool.images.shape[1]
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        batch = synthesize(pool, [index], config, seed)
        pixels = (batch.images[0] * 255).round().to(torch.uint8)  # (C, S, S)
        planes = [pixels.permute(1, 2, 0)] if channels == 3 else list(pixels)
        for channel, plane in enumerate(planes):
            Image.fromarray(plane.numpy()).save(folder / "imagesTr" / f"synthetic_{index:05d}_{channel:04d}.png")
        Image.fromarray(batch.labels[0].numpy()).save(folder / "labelsTr" / f"synthetic_{index:05d}.png")
        if progress is not None:
            progress(index + 1, count)
    about = {
        "name": "synthetic",
        "channel_names": {str(channel): f"channel {channel}" for channel in range(channels)},
        "labels": {"background": 0, **{name: number for number, name in enumerate(names, start=1)}},
        "numTraining": count,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from whatever identifies the draw, so that no draw depends on those before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _one(pool: Pool, config: SynthesisConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One sample (C, S, S), (S, S), (2,): a pasted one, or with `real_share` an exemplar transformed as a whole."""
    exemplar = _integer(len(pool.images), generator)
    image, label, size = pool.images[exemplar], pool.labels[exemplar], pool.sizes[exemplar]
    if _uniform(1, generator).item() < config.real_share:
        upright = replace(config, flip=0.0)  # its organs keep their sides
        moved, moved_label = _transform_whole(image, label, size, upright, generator)
    else:
        number = _integer(len(pool.backgrounds), generator)
        background, behind = pool.backgrounds[number], pool.background_sizes[number]
        background, _ = _transform_whole(background, torch.zeros_like(label), behind, config, generator)
        organs, regions = cut_and_transform(image, label, pool.classes, config, generator)
        order = torch.randperm(len(organs), generator=generator)
        kept = order[_uniform(len(order), generator) >= config.drop]
        order = kept if regions[kept].any() else order
        merged, moved_label = merge(organs[order], regions[order], order + 1)
        moved, size = paste(merged, background), torch.maximum(size, behind)
    if not moved_label.any():  # every organ left the image: keep the sample, but unmoved
        return image, label, pool.sizes[exemplar]
    return moved, moved_label, size


def cut_and_transform(
    image: Tensor, label: Tensor, classes: int, config: SynthesisConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Eq. 2: T_k(I ⊗ Y_k) for each class, with a transform of its own.

    (C, S, S) and (S, S) → organs (K, C, S, S), 0 outside, and regions (K, S, S) bool. Each organ turns, scales and
    flips about its own centre and then moves a little, so that its place is roughly the exemplar's.
    """
    masks = (
        label[None] == torch.arange(1, classes + 1, dtype=label.dtype, device=label.device)[:, None, None]
    )  # (K, S, S)
    matrices = random_matrices(centroids(masks).cpu(), config, config.shift, generator)  # (K, 2, 3)
    images = image.expand(classes, *image.shape)
    warped, regions = warp(images, masks, matrices)
    warped = vary_intensity(blur(warped, config, generator), config, generator)
    return warped.clamp(min=BLACK) * regions[:, None], regions


def merge(organs: Tensor, regions: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Organs (K, C, S, S) with regions (K, S, S) laid over one another, the last on top: one image and its label.

    `numbers` (K,) are the label numbers in the same order.
    """
    merged = torch.zeros_like(organs[0])
    label = torch.zeros(regions.shape[1:], dtype=torch.uint8, device=regions.device)
    for organ, region, number in zip(organs, regions, numbers.tolist(), strict=True):
        merged = torch.where(region, organ, merged)
        label = label.masked_fill(region, number)
    return merged, label


def paste(foreground: Tensor, background: Tensor) -> Tensor:
    """Eq. 1 and 3: the foreground (C, S, S) where any channel of it is above 0, else the background."""
    return torch.where((foreground > 0).any(dim=0), foreground, background)


def _transform_whole(
    image: Tensor, label: Tensor, size: Tensor, config: SynthesisConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """T of a whole slice about its own centre, which padding moves away from the square's: (C, S, S), (S, S) → same."""
    matrix = random_matrices(size[None] / image.shape[-1] - 1, config, config.shift, generator)
    moved, moved_label = warp(image[None], label[None], matrix)
    return vary_intensity(blur(moved, config, generator), config, generator)[0], moved_label[0]


def centroids(masks: Tensor) -> Tensor:
    """(K, S, S) bool → (K, 2) centres as (x, y) in affine_grid's units, −1 to 1; empty masks give the centre."""
    size = masks.shape[-1]
    ticks = (torch.arange(size, device=masks.device) + 0.5) * (2 / size) - 1
    weight = masks.float()
    total = weight.sum(dim=(1, 2)).clamp(min=1)
    x = (weight.sum(dim=1) * ticks).sum(dim=1) / total
    y = (weight.sum(dim=2) * ticks).sum(dim=1) / total
    return torch.stack([x, y], dim=1)


def random_matrices(centres: Tensor, config: SynthesisConfig, shift: float, generator: torch.Generator) -> Tensor:
    """(K, 2, 3) for affine_grid: turn, scale and flip about each centre (K, 2), then move by up to `shift` of a side.

    affine_grid asks, for each output place, where to read: so these are the inverse movements,
    in = M (out − centre − move) + centre.
    """
    count = len(centres)
    angle = torch.deg2rad((2 * _uniform(count, generator) - 1) * config.rotation_deg)
    scale = torch.exp((2 * _uniform(count, generator) - 1) * torch.log1p(torch.tensor(config.scale)))
    flips = torch.where(_uniform((count, 2), generator) < config.flip, -1.0, 1.0)  # (K, 2) in x and y
    move = (2 * _uniform((count, 2), generator) - 1) * 2 * shift  # the side is 2 long in these units
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack([torch.stack([cos, sin], dim=1), torch.stack([-sin, cos], dim=1)], dim=1)  # (K, 2, 2)
    linear = flips[:, :, None] * turn / scale[:, None, None]
    offset = centres - (linear @ (centres + move)[:, :, None])[:, :, 0]
    return torch.cat([linear, offset[:, :, None]], dim=2)


def warp(images: Tensor, labels: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(K, C, S, S) bilinearly and (K, S, S) by nearest neighbour, moved by the same (K, 2, 3) matrices."""
    grid = F.affine_grid(matrices.to(images.device), [*images.shape], align_corners=False)  # (K, S, S, 2)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved_labels = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
    return moved, moved_labels.to(labels.dtype)


def blur(images: Tensor, config: SynthesisConfig, generator: torch.Generator) -> Tensor:
    """Gaussian blur of (K, C, S, S), each image with a standard deviation between 0 and `blur_px`; half stay sharp."""
    count, channels = images.shape[:2]
    sigma = _uniform(count, generator) * config.blur_px * (_uniform(count, generator) < 0.5)
    if not sigma.any():
        return images
    reach = max(1, round(3 * config.blur_px))
    offsets = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (
        (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0).to(images.device)
    )  # (K·C, taps)
    flat = F.pad(images.flatten(0, 1)[None], [reach] * 4, mode="replicate")  # (1, K·C, S + 2r, S + 2r)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    return flat[0].unflatten(0, (count, channels))


def vary_intensity(images: Tensor, config: SynthesisConfig, generator: torch.Generator) -> Tensor:
    """gain · image^gamma + bias, clipped to [0, 1], one draw per image of (K, C, S, S)."""
    draw = ((2 * _uniform((3, len(images), 1, 1, 1), generator) - 1) * config.intensity).to(images.device)
    gamma, gain, bias = torch.exp(draw[0]), torch.exp(draw[1]), draw[2] / 2
    # Padding outside a moved slice stays black.
    varied = (gain * images.clamp(0, 1) ** gamma + bias).clamp(0, 1)
    return torch.where(images > 0, varied, images)


def fill_foreground(images: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Backgrounds from slices that all show foreground: it is replaced by what surrounds it.

    (N, C, S, S), (N, S, S) and the slices' widths and heights (N, 2) → (N, C, S, S). Pull-push: known pixels are
    averaged down until the hole is covered and blended back up, so that near pixels count most; padding is unknown.
    """
    hole = F.max_pool2d((labels[:, None] > 0).float(), 5, stride=1, padding=2)  # soft edges belong to the organ
    ticks = torch.arange(images.shape[-1])
    across, down = ticks < sizes[:, :1], ticks < sizes[:, 1:]  # (N, S) each
    known = (1 - hole) * (down[:, None, :, None] & across[:, None, None, :])
    return torch.where(hole > 0, _pull_push(images * known, known), images)


def _pull_push(weighted: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the known pixels near each pixel: (N, C, S, S) and (N, 1, S, S) → (N, C, S, S)."""
    if min(weight.shape[-2:]) <= 1:
        return weighted / weight.clamp(min=1e-6)
    known = weight.clamp(max=1)
    coarse = _pull_push(F.avg_pool2d(weighted, 2, ceil_mode=True), F.avg_pool2d(weight, 2, ceil_mode=True))
    coarse = F.interpolate(coarse, size=weight.shape[-2:], mode="bilinear", align_corners=False)
    return weighted / weight.clamp(min=1e-6) * known + coarse * (1 - known)


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))
