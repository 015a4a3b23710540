"""What is in a dataset, and what looks wrong with it: findings, each with its file.

A new check is a function of (dataset, records) and an entry of `CHECKS`. Patients are counted and compared and never
named: what a finding names is a file, or a class.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cheaplunch.data.dataset import Case, Dataset
from cheaplunch.data.index import CaseRecord, Progress, read_records
from cheaplunch.data.labels import LabelFiles
from cheaplunch.data.volume import read_volume
from cheaplunch.errors import UserError

# A mask's stray values: so many numbers that no class has, each on less than this share of the labelled voxels.
SOFT_VALUES, SOFT_SHARE = 3, 0.05
SPACING_RATIO = 3.0  # to the median over the cases, either way, along one axis
FEWEST_TO_COMPARE = 3  # cases, for what is odd only beside the others
FEWEST_APART = 0.05  # of the image's width, between a left and a right part, to say which is which


@dataclass(frozen=True)
class Kind:
    """A kind of finding, in words."""

    title: str
    advice: str
    stops: bool = False  # training refuses such a file


KINDS = {
    "unusable": Kind("cannot be used", "training stops there; each line says the way out", stops=True),
    "unnamed": Kind(
        "label value without a name", "name it among the labels or set it to 0; training stops there", stops=True
    ),
    "soft": Kind(
        "softened mask edges",
        "saved as JPEG, or resized by interpolation: export them again as PNG or NIfTI, by nearest neighbour",
        stops=True,
    ),
    "jpeg": Kind("masks saved as JPEG", "their edges are blurred and cut at half brightness: export them again as PNG"),
    "patient": Kind(
        "patient on both sides of the split", "move all the cases to one side, or the test flatters the model"
    ),
    "duplicate": Kind("image that is there twice", "keep one; across the split, the test flatters the model"),
    "sides": Kind("left and right likely swapped", "look at it: the labels are swapped, or the image is mirrored"),
    "empty": Kind("label without any class", "label it, or leave the case out if the structure is there"),
    "unlabelled": Kind("class that is never labelled", "label some, or take its name out"),
    "constant": Kind("image of one single value", "export it again"),
    "spacing": Kind("spacing far from the others'", "check the export: slices left out, or a wrong header"),
}


@dataclass(frozen=True)
class Finding:
    kind: str  # of KINDS
    text: str  # one line that names the file, or the class
    cases: tuple[str, ...] = ()  # ids of the cases it is about


@dataclass(frozen=True, eq=False)
class Inspection:
    """A dataset, what reading every case found, and what looks wrong, what stops training first."""

    dataset: Dataset
    records: tuple[CaseRecord, ...]  # in the order of dataset.cases
    findings: tuple[Finding, ...]


def inspect_dataset(dataset: Dataset, progress: Progress | None = None) -> Inspection:
    """Reads every case (or takes it from the index's cache) and looks for what is wrong. Bad files do not raise."""
    records = tuple(read_records(dataset, dataset.cases, "axial", progress))
    findings = [finding for check in CHECKS for finding in check(dataset, records)]
    order = list(KINDS)
    return Inspection(dataset, records, tuple(sorted(findings, key=lambda finding: order.index(finding.kind))))


# --- checks: one case ------------------------------------------------------------------------------------------------


def _unusable(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    """Cases that training refuses; the values in their label say why, where it is not said already."""
    for case, record in zip(dataset.cases, records, strict=True):
        if record.problem is None:
            continue
        values, counts = _label_values(case)
        stray = ~np.isin(values, [0, *dataset.labels.values(), dataset.ignore or 0])
        if not stray.any():
            yield Finding("unusable", in_words(record.problem, dataset), (case.id,))
            continue
        shares = counts[stray] / max(1, counts[values != 0].sum())
        whole = (values == np.rint(values)).all()
        soft = not whole or (stray.sum() >= SOFT_VALUES and (shares < SOFT_SHARE).all())
        yield _stray("soft" if soft else "unnamed", case, dataset, values[stray], shares)


def _label_values(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The values in a label map and how often each is there; none of a file that is damaged or on another grid."""
    if case.label is not None:
        with contextlib.suppress(UserError):
            return np.unique(case.label.read(read_volume(case.images)), return_counts=True)
        with contextlib.suppress(UserError):  # not whole numbers? Then as an image.
            values = read_volume(case.label.paths[:1]).array
            if (values != np.rint(values)).any():
                return np.unique(values, return_counts=True)
    return np.zeros(0), np.zeros(0, int)


def _soft(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    """Masks whose classes have no names, so that what lies between two of them looks like classes too."""
    numbers = np.array([number if _guessed(name, number) else 0 for name, number in dataset.labels.items()])
    for case, record in zip(dataset.cases, records, strict=True):
        if not record.labelled or not any(record.total_px):
            continue
        shares = np.array(record.total_px) / sum(record.total_px)
        stray = (numbers > 0) & (shares > 0) & (shares < SOFT_SHARE)
        if stray.sum() >= SOFT_VALUES:
            yield _stray("soft", case, dataset, numbers[stray], shares[stray])


def _jpeg(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    """Masks saved as JPEG are read as what is brighter than half."""
    cases = [c for c in dataset.cases if c.label and c.label.paths[0].suffix.lower() in (".jpg", ".jpeg")]
    if cases:
        text = f"{len(cases)} of {len(dataset.cases)}, the first {_shown(cases[0].label, dataset)}"
        yield Finding("jpeg", text, tuple(case.id for case in cases))


def _stray(kind: str, case: Case, dataset: Dataset, values: np.ndarray, shares: np.ndarray) -> Finding:
    few = ", ".join(f"{value:g}" for value in values[:4]) + (", …" if len(values) > 4 else "")
    count = f"{len(values)} values" if len(values) > 1 else "a value"
    text = f"{_shown(case.label, dataset)}: {count} of no class ({few}) on {shares.sum():.1%} of what is labelled"
    return Finding(kind, text, (case.id,))


def _empty(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    for case, record in zip(dataset.cases, records, strict=True):
        if record.labelled and not any(record.total_px):
            yield Finding("empty", _shown(case.label, dataset), (case.id,))


def _constant(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    for case, record in zip(dataset.cases, records, strict=True):
        for name, channel in zip(dataset.channel_names, record.channels, strict=False):
            if channel.minimum == channel.maximum:
                which = f", channel {name}" if len(dataset.channel_names) > 1 else ""
                yield Finding("constant", f"{_shown(case.images[0], dataset)}{which}: {channel.minimum:g}", (case.id,))


# --- checks: beside the others ---------------------------------------------------------------------------------------


def _duplicates(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    """The same voxels in two cases; a constant image is its own finding."""
    alike = defaultdict(list)
    for case, record in zip(dataset.cases, records, strict=True):
        if any(channel.minimum < channel.maximum for channel in record.channels):
            alike[record.image_hash].append((case, record))
    for (first, found), *others in alike.values():
        for case, record in others:
            where = "on both sides of the split" if case.split != first.split else f"both {case.split}"
            label = ""
            if found.labelled and record.labelled:
                label = ", same label" if found.label_hash == record.label_hash else ", labelled differently"
            files = f"{_shown(case.images[0], dataset)} = {_shown(first.images[0], dataset)}"
            yield Finding("duplicate", f"{files}: {where}{label}", (case.id, first.id))


def _patients(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    cases = defaultdict(list)
    for case in dataset.cases:
        cases[case.patient].append(case)
    for same in cases.values():
        train, test = ([case for case in same if case.split == side] for side in ("train", "test"))
        if train and test:
            more = f" and {len(train) - 1} more" if len(train) > 1 else ""
            files = f"{_shown(test[0].images[0], dataset)} tests, {_shown(train[0].images[0], dataset)}{more} train"
            yield Finding("patient", files, tuple(case.id for case in same))


def _spacing(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    rows = [(c, r.spacing_mm) for c, r in zip(dataset.cases, records, strict=True) if r.spacing_mm is not None]
    if len(rows) < FEWEST_TO_COMPARE:
        return
    median = np.median([spacing for _, spacing in rows], axis=0)  # (z, y, x)
    for case, spacing in rows:
        ratio = np.array(spacing) / median
        if (np.maximum(ratio, 1 / ratio) > SPACING_RATIO).any():
            own, usual = (" × ".join(f"{mm:.3g}" for mm in values) for values in (spacing, median))
            text = f"{_shown(case.images[0], dataset)}: {own} mm (z × y × x), the median is {usual} mm"
            yield Finding("spacing", text, (case.id,))


def _sides(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    """Paired classes whose left part lies right of the right one.

    X of our arrays runs towards the patient's left where the file says how it lies; where none does, the majority
    of the cases is taken for right.
    """
    for left, right in _pairs(list(dataset.labels)):
        rows = []  # (case, record, left part's lead towards left, share of the width)
        for case, record in zip(dataset.cases, records, strict=True):
            ends = [record.centre_x[k] for k in (left, right)] if record.labelled else [None]
            if None not in ends and abs(lead := ends[0] - ends[1]) > FEWEST_APART:  # type: ignore[operator]
                rows.append((case, record, lead))
        known = bool(rows) and all(record.placed for _, record, _ in rows)
        if not known and len(rows) < FEWEST_TO_COMPARE:
            continue
        expected = 1 if known else np.sign(sum(np.sign(lead) for *_, lead in rows))
        wrong = [case for case, _, lead in rows if expected and np.sign(lead) != expected]
        names = [list(dataset.labels)[k] for k in (left, right)]
        if known and len(wrong) == len(rows) > 1:
            text = f"{names[0]} lies on the patient's right of {names[1]} in all {len(wrong)} cases that show both"
            yield Finding("sides", text, tuple(case.id for case in wrong))
            continue
        than = "anatomy has it" if known else "in most cases"
        for case in wrong:
            text = f"{_shown(case.label, dataset)}: {names[0]} and {names[1]} lie the other way round than {than}"
            yield Finding("sides", text, (case.id,))


def _pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of (left, right) among class names that differ in nothing else: "kidney_left", "Right Kidney", "L"."""
    by_rest: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for position, name in enumerate(names):
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]
        for word in words:
            side = {"left": "l", "l": "l", "lt": "l", "lh": "l", "right": "r", "r": "r", "rt": "r", "rh": "r"}.get(word)
            if side:
                rest = sorted(other for other in words if other is not word)
                by_rest[tuple(rest)][side] = position
                break
    return [(pair["l"], pair["r"]) for pair in by_rest.values() if len(pair) == 2]


def _unlabelled(dataset: Dataset, records: Sequence[CaseRecord]) -> Iterator[Finding]:
    """Classes of the table that no case shows, or none that trains."""
    if any(record.problem is not None for record in records):
        return  # they may be there
    for k, (name, number) in enumerate(dataset.labels.items()):
        if _guessed(name, number):
            continue  # nobody asked for it
        shows = {
            case.split
            for case, record in zip(dataset.cases, records, strict=True)
            if record.labelled and record.total_px[k]
        }
        if "train" not in shows:
            yield Finding("unlabelled", f"{name}: in no {'training ' if shows else ''}case")


CHECKS: tuple[Callable[[Dataset, Sequence[CaseRecord]], Iterator[Finding]], ...] = (
    _unusable,
    _soft,
    _jpeg,
    _patients,
    _duplicates,
    _sides,
    _empty,
    _unlabelled,
    _constant,
    _spacing,
)


def _guessed(name: str, number: int) -> bool:
    """Whether a class has its name from nothing but a value in some mask."""
    return name == f"label_{number}"


def _shown(source: Path | LabelFiles | None, dataset: Dataset) -> str:
    """A file as the folder's owner knows it: below the dataset's root, without the number of a DICOM series."""
    path = source.paths[0] if isinstance(source, LabelFiles) else source
    return "" if path is None else _without_series(os.path.relpath(path, dataset.root))


def in_words(sentence: str, dataset: Dataset) -> str:
    """A reader's sentence with its files named in the same way."""
    return _without_series(sentence.replace(f"{dataset.root}{os.sep}", ""))


def _without_series(text: str) -> str:
    return re.sub(r"#[\d.]+", "", text)
