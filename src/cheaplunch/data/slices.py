"""Volume ↔ slices: window, axis, the model's square and its exact inverse."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from cheaplunch.data.layouts import Dataset
from cheaplunch.data.volume import Coordinates, Grid, Volume, stored_range

Axis = Literal["axial", "coronal", "sagittal"]
Array = TypeVar("Array", np.ndarray, torch.Tensor)

CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue of the abdomen


# -------------------------------------------------------------------- intensities


@dataclass(frozen=True)
class Window:
    """How intensities become [0, 1]: fixed limits, or percentiles of each channel of each volume."""

    low: float | None = None
    high: float | None = None  # both or neither
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """(C, Z, Y, X) → the same, float32 in [0, 1]; a constant channel becomes 0."""
        return np.stack([self._one(channel) for channel in array])

    def _one(self, channel: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if low is None or high is None:
            low, high = self._limits(channel)
        if high <= low:
            return np.zeros(channel.shape, np.float32)
        return np.clip((channel - np.float32(low)) / np.float32(high - low), 0, 1, dtype=np.float32)

    def _limits(self, channel: np.ndarray) -> tuple[float, float]:
        """Over the voxels that are not 0 where more than 1 % are exactly 0 (air, not tissue)."""
        tissue = channel[channel != 0]
        if tissue.size == 0 or tissue.size >= 0.99 * channel.size:
            tissue = channel
        low, high = np.percentile(tissue, self.percentiles)
        return float(low), float(high)


def default_window(dataset: Dataset) -> Window:
    """The source's own where it has one; CT has a scale, and so have 8-bit pictures; the rest goes by percentiles."""
    if dataset.window is not None:
        return Window(*dataset.window)
    if all(name.strip().upper() == "CT" for name in dataset.channel_names):
        return Window(*CT_WINDOW_HU)
    return Window(*(stored_range(dataset.cases[0].images[0]) or (None, None)))


def as_rgb(image: Array) -> Array:
    """(…, C, H, W) → (…, 3, H, W): one channel is repeated, of two the second is; more lose the rest."""
    channels = image.shape[-3]
    return image[..., {1: [0, 0, 0], 2: [0, 1, 1]}.get(channels, [0, 1, 2]), :, :]


# -------------------------------------------------------------------- axes


def to_slices(array: np.ndarray, axis: Axis) -> np.ndarray:
    """(…, Z, Y, X) → (N, …, H, W), a view, as radiologists see it.

    axial: H towards posterior, W towards left. coronal: superior on top, W towards left. sagittal: superior
    on top, W towards posterior.
    """
    if axis == "axial":
        return np.moveaxis(array, -3, 0)
    upright = array[..., ::-1, :, :]
    return np.moveaxis(upright, {"coronal": -2, "sagittal": -1}[axis], 0)


def from_slices(slices: np.ndarray, axis: Axis) -> np.ndarray:
    """(N, H, W) → (Z, Y, X), a view: the inverse of `to_slices`."""
    if axis == "axial":
        return slices
    return np.moveaxis(slices, 0, {"coronal": -2, "sagittal": -1}[axis])[::-1]


def in_plane_spacing(volume: Volume, axis: Axis) -> tuple[float, float]:
    """(row, column) spacing of a slice in `volume.unit`."""
    z, y, x = volume.spacing
    return {"axial": (y, x), "coronal": (z, x), "sagittal": (z, y)}[axis]


def slice_step_mm(volume: Volume, axis: Axis) -> float | None:
    """From one slice to the next; None where the images have no spacing."""
    return volume.spacing_mm and volume.spacing_mm[{"axial": 0, "coronal": 1, "sagittal": 2}[axis]]


_ARRAY_FROM_SLICES = {  # (x, y, slice number) → (x, y, z) of a volume's array; z runs down the rows, see `to_slices`
    "axial": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "coronal": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "sagittal": [[0, 0, 1], [1, 0, 0], [0, -1, 0]],
}


@dataclass(frozen=True, eq=False)
class Places:
    """Slices ↔ the file's voxels ↔ the patient's space. All are of voxel centres."""

    grid: Grid
    axis: Axis = "axial"

    def on_slices(self, place: Sequence[float], coordinates: Coordinates) -> tuple[float, float, float]:
        """(x, y, slice number) of a place; none of them need be whole, or inside. UserError for mm without a space."""
        padded = (*place, 0.0)[:3]  # a picture's third number is its page
        x, y, number, _ = np.linalg.solve(self.affine(coordinates), [*padded, 1.0]).tolist()
        return x, y, number

    def off_slices(self, x: float, y: float, number: float, coordinates: Coordinates) -> tuple[float, float, float]:
        """The inverse of `on_slices`."""
        i, j, k, _ = (self.affine(coordinates) @ [x, y, number, 1.0]).tolist()
        return i, j, k

    def affine(self, coordinates: Coordinates) -> np.ndarray:
        """(4, 4): (x, y, slice number) → a place. UserError for mm without a space."""
        return self.grid.from_voxels(coordinates) @ self._voxels_from_slices

    @cached_property
    def _voxels_from_slices(self) -> np.ndarray:
        array = np.eye(4)
        array[:3, :3] = _ARRAY_FROM_SLICES[self.axis]
        array[2, 3] = 0 if self.axis == "axial" else self.grid.array_shape[1] - 1
        return self.grid.voxels_from_array @ array


# -------------------------------------------------------------------- the square


@dataclass(frozen=True)
class Frame:
    """One slice's place in the model's square: longest side resized to `size`, padded below and right.

    Coordinates are pixel centres at whole numbers, so a point moves as (x + 0.5) · scale − 0.5.
    """

    height: int
    width: int
    size: int

    @property
    def resized(self) -> tuple[int, int]:
        """(h, w) of the slice inside the square."""
        scale = self.size / max(self.height, self.width)
        return max(1, int(self.height * scale + 0.5)), max(1, int(self.width * scale + 0.5))

    def to_model(self, image: torch.Tensor) -> torch.Tensor:
        """(C, H, W) or (B, C, H, W) → (…, size, size): bilinear, antialiased in shrinking; padding is 0."""
        h, w = self.resized
        batch = image if image.ndim == 4 else image[None]  # (B, C, H, W)
        if (h, w) != (self.height, self.width):
            shrinks = self.size < max(self.height, self.width)
            batch = F.interpolate(batch, (h, w), mode="bilinear", align_corners=False, antialias=shrinks)
        batch = F.pad(batch, (0, self.size - w, 0, self.size - h))  # (B, C, size, size)
        return batch if image.ndim == 4 else batch[0]

    def label_to_model(self, label: torch.Tensor) -> torch.Tensor:
        """(…, H, W) → (…, size, size) of the same type: nearest neighbour; padding is 0."""
        h, w = self.resized
        rows = ((torch.arange(h, device=label.device) + 0.5) * (self.height / h)).long()
        columns = ((torch.arange(w, device=label.device) + 0.5) * (self.width / w)).long()
        return F.pad(label[..., rows[:, None], columns], (0, self.size - w, 0, self.size - h))

    def from_model(self, logits: torch.Tensor) -> torch.Tensor:
        """(…, s, s) on the square at any resolution s → (…, H, W) float32 on the slice, bilinear.

        The slice's share of the square is sampled directly (it need not be a whole number of pixels at s),
        and never beyond its last pixel centre, so that padding does not bleed in.
        """
        s = logits.shape[-1]
        ticks = []
        for length, share in zip((self.height, self.width), self.resized, strict=True):
            centres = (torch.arange(length, device=logits.device, dtype=torch.float32) + 0.5) / length
            inside = share / self.size  # of the square's side
            ticks.append(2 * (centres * inside).clamp(max=max(inside - 0.5 / s, 0.5 / s)) - 1)
        y, x = torch.meshgrid(*ticks, indexing="ij")
        planes = logits.float().reshape(1, -1, s, s)
        sampled = F.grid_sample(
            planes, torch.stack((x, y), -1)[None], mode="bilinear", padding_mode="border", align_corners=False
        )  # (1, planes, H, W)
        return sampled.reshape(*logits.shape[:-2], self.height, self.width)

    def point_to_model(self, points: Array) -> Array:
        """(…, 2) of (x, y) in slice pixels → in the square's pixels."""
        return (points + 0.5) * self._scale(points) - 0.5

    def box_to_model(self, boxes: Array) -> Array:
        """(…, 4) of (x0, y0, x1, y1), first and last slice pixels → first and last pixels of the square.

        Where the slice is enlarged a pixel becomes several, and the box reaches to the outermost of them.
        """
        corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
        half_pixel = (self._scale(boxes).clip(1) - 1) / 2
        moved: Any = self.point_to_model(corners)
        moved[..., 0, :] -= half_pixel
        moved[..., 1, :] += half_pixel
        return moved.reshape(boxes.shape)

    def point_from_model(self, points: Array) -> Array:
        """(…, 2) of (x, y) in the square's pixels → in slice pixels."""
        return (points + 0.5) / self._scale(points) - 0.5

    def _scale(self, points: Array) -> Array:
        h, w = self.resized
        scale = (w / self.width, h / self.height)
        if isinstance(points, torch.Tensor):
            return torch.tensor(scale, device=points.device)
        return np.asarray(scale)
