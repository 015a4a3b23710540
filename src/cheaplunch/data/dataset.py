"""What a folder of images is once it is understood: cases, classes, and who trains and who tests."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from cheaplunch.data.labels import LabelFiles, Numbers
from cheaplunch.data.names import ending, natural_order
from cheaplunch.data.volume import ITK_SUFFIXES, PICTURE_SUFFIXES, SUFFIXES, Grid, source_files
from cheaplunch.errors import UserError

Split = Literal["train", "test"]

_ENOUGH = 5000  # files to recognise a folder by
_TEST_SHARE = 0.2  # of the patients, where the folder brings no test images


@dataclass(frozen=True)
class Case:
    """One image with its channels: a volume, or a single picture."""

    id: str
    images: tuple[Path, ...]  # one a channel; a single RGB picture holds three, a folder one DICOM series
    label: LabelFiles | None  # None: not labelled
    split: Split
    patient: str  # never on both sides of a split made here

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that belongs to the case, images first: the slices of a series, not its folder."""
        sources = self.images + (self.label.paths if self.label is not None else ())
        return tuple(file for source in sources for file in _files_of(source))

    @property
    def mask_name(self) -> str:
        """The file name of a mask predicted for this case: its id, and an ending that goes with its image."""
        suffix = Grid(self.images[0], shape=()).mask_suffix  # which goes by the name alone
        return f"{self.id}{'.nii.gz' if suffix == '.dcm' else suffix}"


@dataclass(frozen=True)
class Dataset:
    root: Path
    name: str
    labels: dict[str, int]  # name → number in the masks, without background; no pixel has two of them
    channel_names: tuple[str, ...]
    cases: tuple[Case, ...]  # training cases first, each side in natural order of id
    split_rule: str  # one sentence for reports
    description: str = ""  # the folder's own words about itself
    layout: str = ""  # the entry of LAYOUTS or RECIPES that it follows
    why: str = ""  # one sentence: what in the folder made it so
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # name → label numbers that make it up
    ignore: int | None = None  # the number in the masks of pixels that nobody decided on
    window: tuple[float, float] | None = None  # intensities that become 0 and 1, where the source gives them
    left_out: tuple[str, ...] = ()  # what is in the folder and not among the cases, a sentence each
    license: str = ""
    citation: str = ""

    @property
    def scored(self) -> Mapping[str, int | tuple[int, ...]]:
        """What is evaluated: regions, each the union of its labels, or else the labels."""
        return self.regions or self.labels

    def split(self, name: Split) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.split == name)

    def fingerprint(self) -> str:
        """sha256 (hex) of the files' names and sizes and of what their labels mean, wherever the folder is."""
        files = {(case.split, file) for case in self.cases for file in case.files}
        lines = sorted(f"{side} {self._name_of(file)} {file.stat().st_size}" for side, file in files)
        meaning: list = [lines, list(self.labels.items())]
        rules = sorted({repr(c.label.rule) for c in self.cases if c.label and c.label.rule != Numbers()})
        if self.regions or self.ignore is not None or rules:
            meaning += [list(self.regions.items()), self.ignore, rules]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def _name_of(self, file: Path) -> str:
        """Where it lies below the root; a list of pairs may name files elsewhere."""
        return Path(os.path.relpath(file, self.root)).as_posix()


@dataclass(frozen=True)
class Folder:
    """A folder and the names of all files below it, listed once for whoever wants to recognise it."""

    root: Path
    files: tuple[str, ...]  # below root, parts joined by '/', in natural order; hidden ones left out

    @classmethod
    def listed(cls, root: Path) -> Folder:
        found, seen = [], set()
        for folder, below, names in os.walk(root, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # a link to a folder above would never end
                below.clear()
                continue
            seen.add(real)
            below[:] = [name for name in below if not name.startswith(".") and name != "__MACOSX"]
            place = Path(folder).relative_to(root)
            found += [(place / name).as_posix() for name in names if not name.startswith(".")]
        return cls(root, tuple(sorted(found, key=natural_order)))

    def find(self, pattern: str) -> list[re.Match[str]]:
        """The files whose whole name below the root matches, capitals or not."""
        compiled = re.compile(pattern, re.IGNORECASE)
        return [match for name in self.files if (match := compiled.fullmatch(name))]

    def might_have(self, pattern: str) -> bool:
        """Whether a file matches; of very many files some thousand are looked at, spread evenly."""
        compiled = re.compile(pattern, re.IGNORECASE)
        return any(compiled.fullmatch(name) for name in self.files[:: 1 + len(self.files) // _ENOUGH])

    def has(self, pattern: str) -> bool:
        compiled = re.compile(pattern, re.IGNORECASE)
        return any(compiled.fullmatch(name) for name in self.files)

    @cached_property
    def images(self) -> tuple[str, ...]:
        """The files that can be read as images or masks."""
        return tuple(name for name in self.files if name.lower().endswith(SUFFIXES))


def make_dataset(
    root: Path,
    *,
    cases: Sequence[Case],
    labels: dict[str, int],
    channel_names: tuple[str, ...],
    split_rule: str | None = None,
    name: str | None = None,
    **more,
) -> Dataset:
    """Cases in order; split by patient where `split_rule` does not say how they are already.

    Raises UserError where two cases have one id.
    """
    known: dict[str, Case] = {}
    for case in cases:
        if known.setdefault(case.id, case) is not case:
            both = f"{known[case.id].images[0]} and {case.images[0]}"
            raise UserError(f"{both} have one name, {case.id!r}: give each its own")
    if split_rule is None:
        held_out = split_by_patient(case.patient for case in cases)
        cases = [replace(case, split="test" if case.patient in held_out else "train") for case in cases]
        split_rule = (
            f"{len(held_out)} of {len({case.patient for case in cases})} patients test, "
            "the first in the order of their names' sha256"
        )
    ordered = sorted(cases, key=lambda case: (case.split == "test", natural_order(case.id)))
    return Dataset(
        root, name or root.resolve().name, labels, channel_names, tuple(ordered), split_rule=split_rule, **more
    )


def patients(ids: Iterable[str], pictures: bool) -> dict[str, str]:
    """Case id → patient, as far as ids tell.

    Slices exported as pictures are commonly named `<patient>_<slice number>` (`TCGA_DU_5851_19950428_12`).
    Such ids share a patient where the part before the number has a digit of its own and the folder has more
    than one such part: `benign_1`, and a lone `scan2024_1 … scan2024_9`, number images, not slices.
    Everything else, volumes among them, is a patient of its own.
    """
    ids = list(ids)
    prefixes = {i: m[1] for i in ids if pictures and (m := re.fullmatch(r"(.*\d.*)[_-]\d+", i))}
    return {i: prefixes.get(i, i) if len(set(prefixes.values())) > 1 else i for i in ids}


def are_pictures(cases: Iterable[Case]) -> bool:
    return all(ending(case.images[0]) in PICTURE_SUFFIXES for case in cases)


def split_by_patient(names: Iterable[str]) -> frozenset[str]:
    """The patients that test: a fifth, at least one, none where there is only one patient.

    They come first in the order of their names' sha256, so that a patient added later seldom moves another.
    """
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = min(max(1, round(_TEST_SHARE * len(ordered))), len(ordered) - 1)
    return frozenset(ordered[:count])


def _files_of(source: Path) -> tuple[Path, ...]:
    alone = source.is_file() and ending(source) not in ITK_SUFFIXES  # voxels of those may lie in a file beside them
    return (source,) if alone else source_files(source)
