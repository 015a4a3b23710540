"""Exemplar-guided synthesis (Cheap Lunch §2.1, Eq. 1–3), batched on tensors.

Every organ of an exemplar is cut out by its label, transformed by itself, merged with the others and
pasted onto a transformed slice without organs:

    O_k = T_k(I_e ⊗ Y_e^k)                                              (Eq. 2)
    I_s = Merge(O_1 … O_K) where Merge(…) > 0, else T(I_b)              (Eq. 3; Eq. 1 is K = 1)

T is blur, intensity variation, scale, flip and rotation. An image and its label are moved by one matrix.

A sample is first drawn, then made: a `Plan` is all that is random about it, some numbers on the CPU, and `render`
makes the pictures of any plans at once, where the pool's tensors are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cheaplunch.config import SynthesisConfig

# Foreground that is black would count as background in "> 0"; it is lifted by less than one grey level of 255.
BLACK = 1e-3
SOFT_EDGE_PX = 1.0  # standard deviation of the Gaussian that softens an organ's edge with `paste: soft`
SOFT_REACH_PX = 3
_SMALL = 20480  # values, up to which PyTorch convolves one channel by a product of matrices


@dataclass(frozen=True, eq=False)
class Organs:
    """Where the classes of one exemplar are, on the CPU."""

    present: list[int]
    """Of 1…K."""
    centres: Tensor
    """(K, 2) as `centroids` gives them."""
    boxes_px: Tensor
    """(K, 4) left, top, right, bottom edge, the tight box of each; of a class that is not there, anything."""


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
    paired: tuple[int, ...] = ()
    """Classes that have a twin on the other side (`left_right_pairs`): they are not mirrored left to right."""
    _found: dict[int, Organs] = field(default_factory=dict, repr=False)

    def organs(self, exemplar: int) -> Organs:
        """Looked for once; the rest is from memory."""
        if exemplar not in self._found:
            numbers = torch.arange(1, self.classes + 1, dtype=torch.uint8, device=self.labels.device)
            masks = self.labels[exemplar] == numbers[:, None, None]  # (K, S, S)
            rows, columns = masks.any(dim=2).cpu(), masks.any(dim=1).cpu()  # (K, S) each
            present = (rows.any(dim=1).nonzero()[:, 0] + 1).tolist()
            edges = [*_extent(columns), *_extent(rows)]  # left, right, top, bottom
            boxes = torch.stack([edges[0], edges[2], edges[1], edges[3]], dim=1)
            self._found[exemplar] = Organs(present, centroids(masks).cpu(), boxes)
        return self._found[exemplar]

    @cached_property
    def showing(self) -> dict[int, list[int]]:
        """Class → the exemplars that show it; classes that none shows are left out."""
        counts = [torch.bincount(label.flatten(), minlength=self.classes + 1) for label in self.labels]
        shown = torch.stack(counts).cpu() > 0  # (N, K + 1)
        return {k: shown[:, k].nonzero()[:, 0].tolist() for k in range(1, self.classes + 1) if shown[:, k].any()}

    def to(self, device: torch.device) -> Pool:
        """The pool with its pictures on `device`, where samples are then made; random draws stay on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "backgrounds")}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Batch:
    images: Tensor
    """(B, C, S, S) in [0, 1]."""
    labels: Tensor
    """(B, S, S) uint8; of slabs (B, D, S, S)."""
    sizes: Tensor
    """Width and height in px (B, 2) that each image fills of its square."""


@dataclass(frozen=True, eq=False)
class Transforms:
    """n draws of T."""

    matrices: Tensor
    """(n, 2, 3) for affine_grid: where each output place reads."""
    blur_px: Tensor
    """(n,) standard deviation of the Gaussian; 0 is sharp."""
    tones: Tensor
    """(3, n): gamma, gain and bias."""

    def __getitem__(self, some: slice) -> Transforms:
        return Transforms(self.matrices[some], self.blur_px[some], self.tones[:, some])


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is random about one sample."""

    exemplar: int
    background: int | None
    """None: the exemplar is transformed as a whole."""
    ground: Transforms
    """Of the background, or of the whole exemplar (n = 1)."""
    organs: Transforms | None = None
    """One for each class (n = K)."""
    order: tuple[int, ...] = ()
    """Classes to paste, the last on top."""
    undropped: tuple[int, ...] = ()
    """All classes in that order, for where none of the former is left in the image."""


# --- samples ---------------------------------------------------------------------------------------------------------


def synthesize(pool: Pool, indices: Sequence[int], config: SynthesisConfig, seed: int) -> Batch:
    """Samples number `indices` of the set that `seed` describes: the same ones, whichever are asked for together."""
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", index)) for index in indices]
    plans = [draw(pool, config, generator) for generator in generators]
    if pool.images.is_cuda:
        return render(pool, plans, config, step_px=max(32, pool.images.shape[-1] // 4))
    # On a CPU one sample at a time stays in its cache.
    batches = [render(pool, [plan], config) for plan in plans]
    return Batch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "sizes")))


def draw(pool: Pool, config: SynthesisConfig, generator: torch.Generator) -> Plan:
    """A pasted sample, or with probability `real_share` an exemplar transformed as a whole."""
    wanted = None
    if config.balance:
        wanted = list(pool.showing)[_integer(len(pool.showing), generator)]
        exemplar = pool.showing[wanted][_integer(len(pool.showing[wanted]), generator)]
    else:
        exemplar = _integer(len(pool.images), generator)
    if _uniform(1, generator).item() < config.real_share:
        upright = replace(config, flip=0.0)  # its organs keep their sides
        return Plan(exemplar, None, draw_transforms(_middle(pool.sizes[exemplar], pool), upright, generator))
    background = _integer(len(pool.backgrounds), generator)
    ground = draw_transforms(_middle(pool.background_sizes[background], pool), config, generator)
    organs = draw_transforms(pool.organs(exemplar).centres, config, generator, pool.paired)
    order = torch.randperm(pool.classes, generator=generator) + 1
    stays = _uniform(pool.classes, generator) >= config.drop
    if wanted is not None:
        stays |= order == wanted
    return Plan(exemplar, background, ground, organs, tuple(order[stays].tolist()), tuple(order.tolist()))


def draw_empty(pool: Pool, config: SynthesisConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A slice without organs, transformed as a whole: (C, S, S), and its width and height (2,)."""
    number = _integer(len(pool.backgrounds), generator)
    size, side = pool.background_sizes[number], pool.images.shape[-1]
    ground = draw_transforms(_middle(size, pool), config, generator)
    [image], _ = transform(pool.backgrounds[number][None], ground, [(0, 0)], (side, side), config, whole=True)
    return image, size


def draw_transforms(
    centres: Tensor, config: SynthesisConfig, generator: torch.Generator, paired: Sequence[int] = ()
) -> Transforms:
    """T about each centre (n, 2); the classes `paired`, numbered from 1, are not mirrored left to right."""
    matrices = random_matrices(centres, config, generator, paired)
    count = len(centres)
    blur_px = _uniform(count, generator) * config.blur_px * (_uniform(count, generator) < 0.5)  # half stay sharp
    draws = (2 * _uniform((3, count), generator) - 1) * config.intensity
    return Transforms(matrices, blur_px, torch.stack([draws[0].exp(), draws[1].exp(), draws[2] / 2]))


def random_matrices(
    centres: Tensor, config: SynthesisConfig, generator: torch.Generator, paired: Sequence[int] = ()
) -> Tensor:
    """(n, 2, 3) for affine_grid: turn, scale and flip about each centre (n, 2), then move by up to `shift` of a side.

    affine_grid asks, for each output place, where to read: so these are the inverse movements,
    in = M (out − centre − move) + centre.
    """
    count = len(centres)
    angle = torch.deg2rad((2 * _uniform(count, generator) - 1) * config.rotation_deg)
    scale = torch.exp((2 * _uniform(count, generator) - 1) * torch.log1p(torch.tensor(config.scale)))
    flips = torch.where(_uniform((count, 2), generator) < config.flip, -1.0, 1.0)  # (n, 2) in x and y
    flips[[number - 1 for number in paired], 0] = 1.0
    move = (2 * _uniform((count, 2), generator) - 1) * 2 * config.shift  # the side is 2 long in these units
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack([torch.stack([cos, sin], dim=1), torch.stack([-sin, cos], dim=1)], dim=1)  # (n, 2, 2)
    linear = flips[:, :, None] * turn / scale[:, None, None]
    offset = centres - (linear @ (centres + move)[:, :, None])[:, :, 0]
    return torch.cat([linear, offset[:, :, None]], dim=2)


def render(pool: Pool, plans: Sequence[Plan], config: SynthesisConfig, step_px: int = 32) -> Batch:
    """The samples that `plans` describe.

    Organs are made in windows just large enough for them, with sides that are multiples of `step_px`: the smaller it
    is the less there is to compute, and the larger the more organs share a size and are made together. It changes no
    pixel.
    """
    grounds = [pool.images[p.exemplar] if p.background is None else pool.backgrounds[p.background] for p in plans]
    side = pool.images.shape[-1]
    ground = _joined([plan.ground for plan in plans])
    images, places = transform(_stack(grounds), ground, [(0, 0)] * len(plans), (side, side), config, whole=True)
    labels = torch.zeros_like(images[:, 0], dtype=torch.uint8)  # (B, S, S)
    sizes = pool.sizes[[plan.exemplar for plan in plans]]
    for n, plan in enumerate(plans):
        if plan.background is None:
            labels[n] = nearest(pool.labels[plan.exemplar, None].float(), places[n : n + 1])[0]
        else:
            sizes[n] = torch.maximum(sizes[n], pool.background_sizes[plan.background])

    cuts = [cut for n, plan in enumerate(plans) for cut in _cuts(pool, plan, n, config, step_px)]
    for cut, (organ, region, cover) in zip(cuts, _cut_out_all(pool, cuts, config), strict=True):
        window = slice(cut.top, cut.top + cut.height), slice(cut.left, cut.left + cut.width)
        paste(organ, region, cut.number, images[cut.sample][:, *window], labels[cut.sample][window], cover)

    for n in (labels.flatten(1).amax(dim=1) == 0).nonzero()[:, 0].tolist():
        plan = plans[n]
        if plan.order != plan.undropped:
            again = render(pool, [replace(plan, order=plan.undropped)], config, step_px)
            images[n], labels[n], sizes[n] = again.images[0], again.labels[0], again.sizes[0]
        else:  # every organ left the image: keep the sample, but unmoved
            images[n], labels[n] = pool.images[plan.exemplar], pool.labels[plan.exemplar]
            sizes[n] = pool.sizes[plan.exemplar]
    return Batch(images, labels, sizes)


# --- Eq. 2: an organ, cut out and transformed ------------------------------------------------------------------------


def cut_out(
    images: Tensor,
    labels: Tensor,
    numbers: Tensor,
    transforms: Transforms,
    corners: Sequence[tuple[int, int]],
    shape: tuple[int, int],
    config: SynthesisConfig,
) -> tuple[Tensor, Tensor]:
    """T_k(I ⊗ Y_k) of n organs, each with a transform of its own, in windows of the image.

    Exemplars (n, C, S, S), their labels (n, S, S) as float and the classes' numbers (n,), windows of `shape` (h, w)
    with their (left, top) `corners` → the transformed image (n, C, h, w), above 0 in some channel everywhere, and
    where the organ is (n, h, w) bool. What lies beside the organ is left in the image for soft pasting.
    """
    moved, places = transform(images, transforms, corners, shape, config)
    regions = nearest(labels, places) == numbers[:, None, None]
    return moved.clamp_(min=BLACK), regions


def transform(
    images: Tensor,
    transforms: Transforms,
    corners: Sequence[tuple[int, int]],
    shape: tuple[int, int],
    config: SynthesisConfig,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """T of images (n, C, S, S), as far as it is seen in windows of `shape` (h, w) with their (left, top) `corners`.

    → (n, C, h, w), and the places (n, h, w, 2) it was read at, in affine_grid's units, for the labels.
    """
    reach = max(1, round(3 * config.blur_px)) if transforms.blur_px.any() else 0
    places = read_places(transforms.matrices.to(images.device), corners, shape, reach, images.shape[-1])
    moved = F.grid_sample(images, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved = vary_intensity(blur(moved, transforms.blur_px, reach, whole), transforms.tones)
    inner = slice(reach, reach + shape[0]), slice(reach, reach + shape[1])
    return moved, places[:, *inner]


def read_places(
    matrices: Tensor, corners: Sequence[tuple[int, int]], shape: tuple[int, int], reach: int, side: int
) -> Tensor:
    """The part of affine_grid's answer for (n, 2, 3) that lies in windows, and `reach` px around them.

    Beyond the edge of the image of `side` px the places of the edge are repeated: (n, h + 2 reach, w + 2 reach, 2).
    """
    ticks = torch.linspace(-1, 1, side, device=matrices.device) * (side - 1) / side  # centres of pixels
    start = torch.tensor(corners, device=matrices.device)  # (n, 2)
    height, width = (torch.arange(-reach, length + reach, device=matrices.device) for length in shape)
    x = ticks[(start[:, :1] + width).clamp(0, side - 1)][:, None, :]  # (n, 1, w + 2 reach)
    y = ticks[(start[:, 1:] + height).clamp(0, side - 1)][:, :, None]  # (n, h + 2 reach, 1)
    rows = matrices[..., None, None].unbind(dim=1)  # (n, 3, 1, 1) each
    planes = [torch.addcmul(x * row[:, 0], y, row[:, 1]).add_(row[:, 2]) for row in rows]
    return torch.stack(planes, dim=1).movedim(1, 3)  # a view: each plane stays in one piece, which is read faster


def move_labels(labels: Tensor, ground: Transforms) -> Tensor:
    """Labels (n, S, S) of one volume's slices, transformed as their images are by one T: the same shape."""
    side = labels.shape[-1]
    places = read_places(ground.matrices.to(labels.device), [(0, 0)], (side, side), 0, side)
    return nearest(labels.float(), places.expand(len(labels), -1, -1, -1))


def nearest(labels: Tensor, places: Tensor) -> Tensor:
    """Labels (n, S, S), as float, at places (n, h, w, 2): (n, h, w) uint8; 0 outside."""
    return F.grid_sample(labels[:, None], places, mode="nearest", align_corners=False)[:, 0].to(torch.uint8)


def blur(images: Tensor, deviations_px: Tensor, reach: int, whole: bool = False) -> Tensor:
    """Gaussian blur of (n, C, h + 2 reach, w + 2 reach), cut off at `reach`: (n, C, h, w).

    Each image has its own standard deviation (n,); where it is 0 the image comes out as it was, to the bit. Taps are
    added one by one: the sums of a convolution are rounded otherwise for other shapes, and a pixel must not depend on
    the window that it is made in. `whole` slices have one shape; a small one is convolved, which is faster on a CPU.
    """
    if not reach:
        return images
    offsets = torch.arange(-reach, reach + 1).float()
    weights = torch.exp(-0.5 * (offsets / deviations_px.clamp(min=1e-3)[:, None]) ** 2)  # (n, taps)
    taps = (weights / weights.sum(dim=1, keepdim=True)).T.to(images.device)  # (taps, n)
    if whole and not images.is_cuda and images.shape[:2] == (1, 1) and images.numel() <= _SMALL:
        return F.conv2d(F.conv2d(images, taps.reshape(1, 1, -1, 1)), taps.reshape(1, 1, 1, -1))
    for axis in (-2, -1):
        length = images.shape[axis] - 2 * reach
        blurred = images.narrow(axis, 0, length) * taps[0, :, None, None, None]
        for start, tap in enumerate(taps[1:, :, None, None, None], start=1):
            blurred.addcmul_(images.narrow(axis, start, length), tap)
        images = blurred
    return images


def vary_intensity(images: Tensor, tones: Tensor) -> Tensor:
    """gain · image^gamma + bias, clipped to [0, 1], of (n, C, h, w) by `tones` (3, n), the same for all channels.

    Channels thus keep their order, and a colour its hue as far as that can be. Padding, black in all, stays black.
    """
    gamma, gain, bias = tones.to(images.device)[:, :, None, None, None]
    varied = images.clamp(0, 1).pow_(gamma).mul_(gain).add_(bias).clamp_(0, 1)
    return torch.where((images > 0).any(dim=1, keepdim=True), varied, images)


def centroids(masks: Tensor) -> Tensor:
    """(K, S, S) bool → (K, 2) centres as (x, y) in affine_grid's units, −1 to 1; empty masks give the centre."""
    size = masks.shape[-1]
    ticks = (torch.arange(size, device=masks.device) + 0.5) * (2 / size) - 1
    weight = masks.float()
    total = weight.sum(dim=(1, 2)).clamp(min=1)
    x = (weight.sum(dim=1) * ticks).sum(dim=1) / total
    y = (weight.sum(dim=2) * ticks).sum(dim=1) / total
    return torch.stack([x, y], dim=1)


# --- Eq. 1 and 3: pasted ---------------------------------------------------------------------------------------------


def paste(
    organ: Tensor, region: Tensor, number: int, image: Tensor, label: Tensor, cover: Tensor | None = None
) -> None:
    """Lays an organ (C, h, w) over an image (C, h, w) and its number over the label (h, w), both in place.

    The organ is seen where `region` (h, w) holds, which is where the foreground of Eq. 1 is above 0, and covers what
    was there: done one organ after another this is the Merge of Eq. 3, the last on top. With `cover` (h, w) in [0, 1]
    the two are mixed; the label stays that of the region.
    """
    mixed = torch.where(region, organ, image) if cover is None else torch.lerp(image, organ, cover)
    image.copy_(mixed)
    label.masked_fill_(region, number)


def soft_covers(regions: Tensor) -> Tensor:
    """How much of an organ is seen: (n, h, w) bool → (n, h, w), at least a half on it, less than that beside it.

    The region's edge is blurred by SOFT_EDGE_PX; at the edge of the window it goes on as it is.
    """
    padded = F.pad(regions[:, None].float(), [SOFT_REACH_PX] * 4, mode="replicate")
    covers = blur(padded, torch.full((len(regions),), SOFT_EDGE_PX), SOFT_REACH_PX)[:, 0]
    return torch.where(regions, covers.clamp(min=0.5), covers.clamp(max=0.49))


@dataclass(frozen=True, eq=False)
class _Cut:
    """One organ, and the window of the batch's sample in which it will be."""

    sample: int
    exemplar: int
    number: int
    transforms: Transforms
    left: int
    top: int
    width: int
    height: int


def _cuts(pool: Pool, plan: Plan, sample: int, config: SynthesisConfig, step_px: int) -> list[_Cut]:
    """The organs that a plan pastes, from the bottom to the top; those that leave the image are left out."""
    if plan.organs is None:
        return []
    organs = pool.organs(plan.exemplar)
    margin = 1 + (SOFT_REACH_PX if config.paste == "soft" else 0)
    windows = landing_windows(organs.boxes_px, plan.organs.matrices, pool.images.shape[-1], margin, step_px)
    cuts = []
    for number in plan.order:
        left, top, width, height = windows[number - 1]
        if number in organs.present and width and height:
            one = plan.organs[number - 1 : number]
            cuts.append(_Cut(sample, plan.exemplar, number, one, left, top, width, height))
    return cuts


def landing_windows(boxes_px: Tensor, matrices: Tensor, side: int, margin_px: int, step_px: int) -> list[list[int]]:
    """Left, top, width and height in px of windows of the image that moved boxes (K, 4) and a margin lie in.

    Width and height are multiples of `step_px` where the image of `side` px has room, 0 where the box is outside.
    """
    edges = boxes_px.double() * 2 / side - 1
    corners = edges[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]  # (K, 4, 2) of (x, y) in affine_grid's units
    linear, offset = matrices.double()[:, :, :2], matrices.double()[:, None, :, 2]
    landed = (torch.linalg.solve(linear, (corners - offset).mT).mT + 1) * side / 2  # (K, 4, 2) px
    low = (landed.amin(dim=1).floor() - margin_px).clamp(0, side)
    high = (landed.amax(dim=1).ceil() + margin_px).clamp(0, side)
    lengths = (((high - low) / step_px).ceil() * step_px).clamp(max=side)  # (K, 2)
    return torch.cat([torch.minimum(low, side - lengths), lengths], dim=1).long().tolist()


def _cut_out_all(
    pool: Pool, cuts: Sequence[_Cut], config: SynthesisConfig
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Organ, region and, pasting softly, cover of every cut; those of one shape are made together."""
    sources = {e: (pool.images[e], pool.labels[e].float()) for e in {cut.exemplar for cut in cuts}}
    stacks: dict[tuple[int, int, bool], list[int]] = {}
    for place, cut in enumerate(cuts):
        stacks.setdefault((cut.height, cut.width, bool(cut.transforms.blur_px)), []).append(place)
    made: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    for (height, width, _), stack in stacks.items():
        some = [cuts[place] for place in stack]
        images, labels = (_stack([sources[cut.exemplar][part] for cut in some]) for part in (0, 1))
        organs, regions = cut_out(
            images,
            labels,
            torch.tensor([cut.number for cut in some], device=images.device),
            _joined([cut.transforms for cut in some]),
            [(cut.left, cut.top) for cut in some],
            (height, width),
            config,
        )
        covers = soft_covers(regions) if config.paste == "soft" else [None] * len(some)
        made |= dict(zip(stack, zip(organs, regions, covers, strict=True), strict=True))
    return [made[place] for place in range(len(cuts))]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack, without a copy where all are one tensor."""
    first = tensors[0]
    alike = all(tensor is first for tensor in tensors)
    return first.expand(len(tensors), *first.shape) if alike else torch.stack(list(tensors))


def _joined(parts: Sequence[Transforms]) -> Transforms:
    if len(parts) == 1:
        return parts[0]
    return Transforms(
        torch.cat([part.matrices for part in parts]),
        torch.cat([part.blur_px for part in parts]),
        torch.cat([part.tones for part in parts], dim=1),
    )


# --- what samples are made of ----------------------------------------------------------------------------------------


def left_right_pairs(names: Sequence[str]) -> tuple[int, ...]:
    """Numbers, from 1, of the classes whose name is another's but for the side: left kidney, Lung_R, kidney(L)."""
    other = {"left": "right", "right": "left", "l": "r", "r": "l"}
    words = [tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)) for name in names]
    twins = [tuple(other.get(word, word) for word in name) for name in words]
    return tuple(n for n, (own, twin) in enumerate(zip(words, twins, strict=True), start=1) if own != twin in words)


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


def _middle(size_px: Tensor, pool: Pool) -> Tensor:
    """(1, 2): the centre of a slice of such width and height, which padding moves away from the square's."""
    return size_px[None] / pool.images.shape[-1] - 1


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and past the last True of each row: (K, S) → (K,), (K,)."""
    marks = occupied.int()
    return marks.argmax(dim=1), occupied.shape[1] - marks.flip(1).argmax(dim=1)


# --- random numbers ---------------------------------------------------------------------------------------------------


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from whatever identifies the draw, so that no draw depends on those before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))
