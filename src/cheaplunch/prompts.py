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

from cheaplunch.config import PromptKind
from cheaplunch.data.slices import Frame


@dataclass(frozen=True)
class Prompts:
    """P prompts on each of B images, in px of the network's input; all of one kind and count.

    `points_xy` (B, P, K, 2) with `point_labels` (B, P, K), 1 on the target and 0 off it; or
    `boxes_xyxy` (B, P, 4), both corners inside. One of the two is None.
    """

    points_xy: Tensor | None = None
    point_labels: Tensor | None = None
    boxes_xyxy: Tensor | None = None

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
        fields = (self.points_xy, self.point_labels, self.boxes_xyxy)
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


def oracle_prompts(
    kind: PromptKind, masks: np.ndarray, frame: Frame, rng: np.random.Generator, box_margin_px: float = 0.0
) -> Prompts:
    """Prompts for one image (B = 1), one for each of the non-empty `masks` (P, H, W) of its classes.

    They are drawn on the image's own pixels and then moved into the network's input by `frame`.
    """
    if kind == "box":
        boxes = np.array([tight_box(mask, box_margin_px) for mask in masks]).reshape(1, -1, 4)
        return Prompts(boxes_xyxy=torch.from_numpy(frame.box_to_model(boxes)).float())
    draw = furthest_point if kind == "furthest" else lambda mask: random_point(mask, rng)
    points = torch.tensor([draw(mask) for mask in masks], dtype=torch.float64)
    return Prompts.of_points(frame.point_to_model(points)[None].float())


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
