"""Prompts drawn from the truth: what a careful user would have clicked. Not a word here of any model.

The only file that knows (x, y) from (row, col). Prompts are (x, y) with x to the right and y down, in
pixels whose centres are whole numbers; masks are arrays indexed [row, col] = [y, x].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cheaplunch.data.slices import Frame
from cheaplunch.prompting import PromptKind


@dataclass(frozen=True)
class Prompts:
    """P prompts on each of B images, in px of the network's input; all of one kind and count.

    `points_xy` (B, P, K, 2) with `point_labels` (B, P, K), 1 on the target and 0 off it; or `boxes_xyxy` (B, P, 4),
    both corners inside; or `texts` (B, P, E), their embeddings (`models.text`); the others are None. `masks`
    (B, P, s, s) are the logits that the network gave before, as it gave them, which a prompt may go on from.
    """

    points_xy: Tensor | None = None
    point_labels: Tensor | None = None
    boxes_xyxy: Tensor | None = None
    masks: Tensor | None = None
    texts: Tensor | None = None

    @classmethod
    def of_points(cls, points_xy: Tensor) -> Prompts:
        """One point on the target for each prompt: (B, P, 2)."""
        return cls(points_xy[:, :, None], torch.ones(*points_xy.shape[:2], 1, dtype=torch.long))

    def to(self, device: torch.device) -> Prompts:
        return self._each(lambda tensor: tensor.to(device))

    def __getitem__(self, images: slice) -> Prompts:
        """The prompts of some of the images."""
        return self._each(lambda tensor: tensor[images])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Prompts:
        fields = (self.points_xy, self.point_labels, self.boxes_xyxy, self.masks, self.texts)
        return Prompts(*(None if tensor is None else change(tensor) for tensor in fields))


def furthest_point(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the pixel of `mask` (H, W) furthest from its boundary; the image's edge is a boundary too.

    Cheap Lunch §3.4: "those furthest from the margin". Of several, the first in reading order.
    """
    inside = np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
    row, col = np.unravel_index(np.argmax(inside), mask.shape)
    return float(col), float(row)


def random_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(x, y) of a pixel of `mask` (H, W), all equally likely."""
    row, col = divmod(int(rng.choice(np.flatnonzero(mask))), mask.shape[1])
    return float(col), float(row)


def tight_box(mask: np.ndarray, margin_px: float = 0.0) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of the first and last pixels of `mask` (H, W), widened by `margin_px`, kept in the image."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    return (
        max(0.0, cols[0] - margin_px),
        max(0.0, rows[0] - margin_px),
        min(width - 1.0, cols[-1] + margin_px),
        min(height - 1.0, rows[-1] + margin_px),
    )


def jitter_point(
    point: tuple[float, float], shape: tuple[int, ...], jitter_px: float, rng: np.random.Generator
) -> tuple[float, float]:
    """(x, y) moved by up to `jitter_px` along each axis, all amounts equally likely, and kept in the image (H, W)."""
    if not jitter_px:
        return point  # and nothing drawn: other draws stay as they are
    x, y = np.clip(point + rng.uniform(-jitter_px, jitter_px, 2), 0, (shape[1] - 1, shape[0] - 1))
    return float(x), float(y)


def jitter_box(
    box: tuple[float, float, float, float], shape: tuple[int, ...], jitter_px: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1), each side moved outward by up to `jitter_px`, never inward, and kept in the image (H, W).

    As MedSAM's training boxes, which are 0 to 20 px of 1024 too wide on each side.
    """
    if not jitter_px:
        return box
    moved = box + np.array([-1, -1, 1, 1]) * rng.uniform(0, jitter_px, 4)
    x0, y0, x1, y1 = np.clip(moved, 0, np.array(shape)[[1, 0, 1, 0]] - 1).tolist()
    return x0, y0, x1, y1


def oracle_prompts(
    kind: PromptKind,
    masks: np.ndarray,
    frame: Frame,
    rng: np.random.Generator,
    box_margin_px: float = 0.0,
    point_jitter_px: float = 0.0,
    box_jitter_px: float = 0.0,
) -> Prompts:
    """Prompts for one image (B = 1), one for each of the non-empty `masks` (P, H, W) of its classes.

    `kind` is furthest, random or box. They are drawn on the image's own pixels, all px are of these, and then moved
    into the network's input by `frame`.
    """
    shape = masks.shape[1:]
    if kind == "box":
        drawn = [jitter_box(tight_box(mask, box_margin_px), shape, box_jitter_px, rng) for mask in masks]
        boxes = np.array(drawn).reshape(1, -1, 4)
        return Prompts(boxes_xyxy=torch.from_numpy(frame.box_to_model(boxes)).float())
    if kind not in ("furthest", "random"):
        raise ValueError(f"{kind} is not drawn from a mask alone")
    draw = furthest_point if kind == "furthest" else lambda mask: random_point(mask, rng)
    drawn = [jitter_point(draw(mask), shape, point_jitter_px, rng) for mask in masks]
    points = torch.tensor(drawn, dtype=torch.float64)
    return Prompts.of_points(frame.point_to_model(points)[None].float())


def next_click(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float, int] | None:
    """Where a user who sees `predicted` and wants `truth`, both (H, W) bool, clicks: (x, y, label); None if they agree.

    In the largest region that was missed (label 1) or is too much (label 0), on its pixel furthest from the region's
    boundary. Regions are connected by sides, not corners; of equal ones a missed one, then the first in reading order.
    """
    click, largest = None, 0
    for wrong, label in ((truth & ~predicted, 1), (predicted & ~truth, 0)):
        regions: np.ndarray = ndimage.label(wrong)[0]  # type: ignore[index]
        sizes = np.bincount(regions.ravel())[1:]  # without what is right
        if sizes.max(initial=0) > largest:
            largest = sizes.max()
            click = (*furthest_point(regions == sizes.argmax() + 1), label)
    return click


class SimulatedUser:
    """Clicks on the targets of one image until each is found: the first at random, each next in the largest error.

    As SAM was trained and as interactive segmentation is measured. The user of evaluation and of training is this
    one: it sees masks, not the model. A target that was found exactly gets no more clicks.
    """

    def __init__(self, targets: np.ndarray, rng: np.random.Generator, jitter_px: float = 0.0):
        """`targets` (P, H, W) bool, none empty; every click is off by up to `jitter_px` (`jitter_point`)."""
        self._targets = targets
        self._rng = rng
        self._jitter_px = jitter_px
        self.clicks = [[self._place(*random_point(target, rng), 1)] for target in targets]
        """(x, y, label) of each target's clicks so far, in px of the image."""
        self.unfinished = list(range(len(targets)))
        """Targets still being clicked on; all of them have as many clicks."""

    def look(self, predicted: np.ndarray) -> None:
        """Adds a click on each unfinished target, having seen (P, H, W) bool."""
        going_on = []
        for target in self.unfinished:
            click = next_click(predicted[target], self._targets[target])
            if click is not None:
                self.clicks[target].append(self._place(*click))
                going_on.append(target)
        self.unfinished = going_on

    def prompts(self, frame: Frame, masks: Tensor | None = None) -> Prompts:
        """Of the U unfinished targets, all clicks so far, in the network's input; with their `masks` (U, s, s)."""
        clicks = torch.tensor([self.clicks[target] for target in self.unfinished], dtype=torch.float64)  # (U, K, 3)
        points = frame.point_to_model(clicks[..., :2]).float()
        return Prompts(points[None], clicks[None, ..., 2].long(), masks=None if masks is None else masks[None])

    def _place(self, x: float, y: float, label: int) -> tuple[float, float, int]:
        return (*jitter_point((x, y), self._targets.shape[1:], self._jitter_px, self._rng), label)


def training_points(masks: Tensor, generator: torch.Generator, furthest_share: float = 0.0) -> Tensor:
    """One point of each mask of an image, for training: (P, S, S) bool in the network's input → (P, 2) as (x, y).

    A random one (§2.2), or with probability `furthest_share` the one furthest from the mask's boundary.
    """
    width = masks.shape[-1]
    noise = torch.rand(masks.shape, generator=generator) * masks  # (P, S, S); the largest is uniform on the mask
    place = noise.flatten(1).argmax(dim=1)  # (P,)
    points = torch.stack([place % width, place // width], dim=-1).float()  # (P, 2) as x, y
    central = torch.rand(len(masks), generator=generator) < furthest_share
    for prompt in central.nonzero()[:, 0].tolist():
        points[prompt] = torch.tensor(furthest_point(masks[prompt].numpy()))
    return points
