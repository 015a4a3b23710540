"""The index of a dataset: how much of each class every slice shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cheaplunch.data.cases import read_checked
from cheaplunch.data.layouts import Case, Dataset
from cheaplunch.data.slices import Axis, to_slices
from cheaplunch.errors import UserError


@dataclass(frozen=True)
class SliceArea:
    """How much of each class one slice shows."""

    case_id: str
    slice_number: int  # along the index's axis, from 0
    area_px: tuple[int, ...]  # in the order of SliceIndex.labels

    @property
    def has_foreground(self) -> bool:
        return any(self.area_px)


@dataclass(frozen=True)
class SliceIndex:
    axis: Axis
    labels: tuple[str, ...]
    slices: tuple[SliceArea, ...]  # cases in the order given, slices in theirs

    @cached_property
    def area_px(self) -> np.ndarray:
        """(N, K) int64: pixels of each label on each slice."""
        rows = [s.area_px for s in self.slices]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.labels))


def index_slices(
    dataset: Dataset,
    cases: Sequence[Case],
    axis: Axis = "axial",
    progress: Callable[[int, int], None] | None = None,
) -> SliceIndex:
    """Class areas of every slice of labelled cases. `progress` is told (cases done, of how many).

    Images are read too, so that what is wrong with any case (damage, NaN, another grid, a label number
    without a name) is said here, before an hour of training.
    """
    numbers = list(dataset.labels.values())
    areas = []
    for done, case in enumerate(cases, start=1):
        _, label = read_checked(case, dataset, axis)
        if label is None:
            raise UserError(f"{case.images[0]} has no label: only labelled cases can be indexed")
        for number, plane in enumerate(to_slices(label, axis)):
            counts = np.bincount(plane.ravel(), minlength=256)
            areas.append(SliceArea(case.id, number, tuple(counts[numbers].tolist())))
        if progress:
            progress(done, len(cases))
    return SliceIndex(axis, tuple(dataset.labels), tuple(areas))
