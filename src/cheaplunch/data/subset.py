"""Some of a dataset's classes, as if it had no others: these become background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cheaplunch.data.dataset import Case, Dataset
from cheaplunch.data.labels import LabelFiles, Rule
from cheaplunch.data.volume import Volume
from cheaplunch.errors import UserError


@dataclass(frozen=True)
class Without:
    """Another rule's label map with some numbers set to 0; a number that no class has stays, to be found."""

    rule: Rule
    numbers: tuple[int, ...]

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        label = self.rule(paths, like)
        return np.where(np.isin(label, self.numbers), np.int32(0), label)


def take_classes(dataset: Dataset, names: Sequence[str] | None) -> Dataset:
    """The dataset with the classes `names` alone, in its own order; None: as it is.

    What is scored can be named: labels, or the regions where there are such, which keep the labels they are made of.
    Raises UserError for a name that it does not have.
    """
    if names is None:
        return dataset
    unknown = [name for name in names if name not in dataset.scored]
    if unknown:
        raise UserError(
            f"--classes {unknown[0]}: {dataset.root} has no such class; choose of: {', '.join(dataset.scored)}"
        )
    chosen = {name: label for name, label in dataset.scored.items() if name in names}
    kept = {k for label in chosen.values() for k in (label if isinstance(label, tuple) else (label,))}
    dropped = tuple(sorted(set(dataset.labels.values()) - kept))

    def thin(case: Case) -> Case:
        if case.label is None or not dropped:
            return case
        return replace(case, label=LabelFiles(case.label.paths, Without(case.label.rule, dropped)))

    return replace(
        dataset,
        labels={name: number for name, number in dataset.labels.items() if number in kept},
        regions={name: label for name, label in chosen.items() if isinstance(label, tuple)},
        cases=tuple(map(thin, dataset.cases)),
    )
