"""A case from its files: read, checked against the dataset, windowed and cut into slices."""

from dataclasses import dataclass

import numpy as np

from cheaplunch.data.layouts import Case, Dataset
from cheaplunch.data.slices import Axis, Window, slice_step_mm, to_slices
from cheaplunch.data.volume import Volume, read_volume
from cheaplunch.errors import UserError


@dataclass(frozen=True, eq=False)
class CaseSlices:
    """A case cut into slices, ready for a model."""

    image: np.ndarray  # (N, C, H, W) float32 in [0, 1]
    label: np.ndarray | None  # (N, H, W) uint8, the dataset's label numbers
    volume: Volume  # to write masks back, and for the spacing
    ignore: np.ndarray | None = None  # (N, H, W) bool, where nobody decided; 0 in `label`. None: nowhere
    step_mm: float | None = None  # from slice to slice; None for pictures


def load_case(case: Case, dataset: Dataset, window: Window, axis: Axis = "axial") -> CaseSlices:
    """Read, window and cut a case. UserError names the file that is damaged or does not fit the dataset."""
    volume, label = read_checked(case, dataset, axis)
    image = np.ascontiguousarray(to_slices(window(volume.array), axis))
    if label is None:
        return CaseSlices(image, None, volume, step_mm=slice_step_mm(volume, axis))
    ignore = None
    if dataset.ignore is not None and (label == dataset.ignore).any():
        ignore = np.ascontiguousarray(to_slices(label == dataset.ignore, axis))
        label = np.where(label == dataset.ignore, 0, label)
    label = np.ascontiguousarray(to_slices(label, axis), dtype=np.uint8)
    return CaseSlices(image, label, volume, ignore, slice_step_mm(volume, axis))


def read_checked(case: Case, dataset: Dataset, axis: Axis) -> tuple[Volume, np.ndarray | None]:
    """A case's volume and label map (Z, Y, X) int32, both checked against what the dataset says of itself.

    Pixels that nobody decided on have the number `dataset.ignore` there.
    """
    volume = read_volume(case.images)
    if len(volume.array) != len(dataset.channel_names):
        raise UserError(
            f"{case.images[0]} has {len(volume.array)} channels but {_teller(dataset)} names "
            f"{len(dataset.channel_names)}: {', '.join(dataset.channel_names)}"
        )
    if volume.spacing_mm is None and axis != "axial":
        raise UserError(f"--axis {axis}: {case.images[0]} is a single picture; leave the flag out")
    if case.label is None:
        return volume, None
    label = case.label.read(volume)
    known = {0, *dataset.labels.values()} | ({dataset.ignore} if dataset.ignore is not None else set())
    unknown = sorted(set(np.unique(label).tolist()) - known)
    if unknown:
        raise UserError(
            f"{case.label.paths[0]} has label values {unknown} that {_teller(dataset)} does not name: "
            "add them to its labels or set them to 0 in the mask"
        )
    return volume, label


def _teller(dataset: Dataset) -> str:
    """What says how many channels and which labels there are."""
    return "dataset.json" if dataset.layout in ("nnU-Net raw", "Medical Segmentation Decathlon") else "the dataset"
