"""The index of a dataset: what one reading of every case found, kept in the user's cache until a file changes.

The index is small: per case its grid, intensities and content hashes, per slice the area of each class. Voxels stay
in their files, and a worker holds one case at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np

from cheaplunch import processes, runtime
from cheaplunch.data.cases import read_checked
from cheaplunch.data.dataset import Case, Dataset
from cheaplunch.data.slices import Axis, to_slices
from cheaplunch.data.volume import Grid, source_files
from cheaplunch.errors import UserError
from cheaplunch.files import cache_folder, whole_or_nothing

Progress = Callable[[int, int], None]  # told (cases done, of how many)
Item = TypeVar("Item")
Result = TypeVar("Result")

VERSION = 1  # of what a record holds; another one is not reused
PERCENTILES = (1, 50, 99)

_SAMPLE = 1 << 20  # voxels that percentiles are taken from, at about even distances; the rest changes no digit shown
_MOST_KEPT = 64  # datasets and axes in the cache; the longest unused goes first
_MOST_WORKERS = 8  # beyond, the disk is the limit, and each holds a case


@dataclass(frozen=True, slots=True)  # there may be a million
class SliceArea:
    """How much of each class one slice shows."""

    case_id: str
    slice_number: int  # along the index's axis, from 0
    area_px: tuple[int, ...]  # in the order of SliceIndex.labels
    ignored_px: int = 0  # pixels that nobody decided on; they are neither foreground nor background

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


@dataclass(frozen=True)
class Intensities:
    """Of one channel of one case, in the file's own units."""

    minimum: float
    maximum: float
    percentiles: tuple[float, ...]  # at PERCENTILES
    mean: float
    std: float


@dataclass(frozen=True)
class CaseRecord:
    """What one reading of a case found. Of a file that cannot be read there is the problem alone."""

    case_id: str
    problem: str | None = None  # what `read_checked` said against it, one line
    shape_vox: tuple[int, int, int] | None = None  # (Z, Y, X)
    spacing_mm: tuple[float, float, float] | None = None  # (z, y, x)
    orientation: str | None = None  # the file's axes, for example "LPS"; None for a picture
    placed: bool = False  # the file says where in the scanner it lies, so its left and right can be believed
    channels: tuple[Intensities, ...] = ()
    image_hash: str | None = None  # of the voxels, whatever file holds them
    label_hash: str | None = None
    area_px: tuple[tuple[int, ...], ...] = ()  # (N slices, K classes), classes in the dataset's order
    ignored_px: tuple[int, ...] = ()  # (N,)
    centre_x: tuple[float | None, ...] = ()  # (K,) mean place along X, 0 the patient's right end, 1 the left end

    @property
    def labelled(self) -> bool:
        return self.label_hash is not None

    @property
    def total_px(self) -> tuple[int, ...]:
        """(K,): voxels of each class in the whole case."""
        return tuple(map(sum, zip(*self.area_px, strict=True)))


def index_slices(
    dataset: Dataset,
    cases: Sequence[Case],
    axis: Axis = "axial",
    progress: Progress | None = None,
) -> SliceIndex:
    """Class areas of every slice of labelled cases. `progress` is told (cases done, of how many).

    Images are read too, so that what is wrong with any case (damage, NaN, another grid, a label number
    without a name) is said here, before an hour of training: UserError for the first bad one.
    """
    areas = []
    with contextlib.closing(read_records(dataset, cases, axis, progress)) as records:
        for case, record in zip(cases, records, strict=True):
            if record.problem is not None:
                raise UserError(record.problem)
            if not record.labelled:
                raise UserError(f"{case.images[0]} has no label: only labelled cases can be indexed")
            rows = zip(record.area_px, record.ignored_px, strict=True)
            areas += [SliceArea(case.id, number, area, ignored) for number, (area, ignored) in enumerate(rows)]
    return SliceIndex(axis, tuple(dataset.labels), tuple(areas))


def read_records(
    dataset: Dataset,
    cases: Sequence[Case],
    axis: Axis = "axial",
    progress: Progress | None = None,
    workers: int | None = None,
) -> Generator[CaseRecord]:
    """A record of each case, in order: from the cache where no file of it has changed, else read, several at a time.

    Nothing raises; what is wrong with a case is its record's `problem`. Cases with a problem are read anew each
    time. What was read is kept even where the caller stops early.
    """
    cache = _Cache(dataset, axis)
    files = [_identity(case, dataset.root) for case in cases]  # before they are read, in case they change meanwhile
    known = [cache.find(case, found) for case, found in zip(cases, files, strict=True)]
    new = [case for case, line in zip(cases, known, strict=True) if line is None]
    try:
        read = partial(read_record, dataset=dataset, axis=axis)
        with contextlib.closing(in_order(read, new, workers)) as fresh:
            for done, (case, found, line) in enumerate(zip(cases, files, known, strict=True), start=1):
                if line is None:
                    record = next(fresh)
                    cache.add(case, found, record)
                else:
                    record = _record(json.loads(line))
                yield record
                if progress:
                    progress(done, len(cases))
    finally:
        cache.save()


def read_record(case: Case, dataset: Dataset, axis: Axis) -> CaseRecord:
    """Reads a case and measures it."""
    try:
        volume, label = read_checked(case, dataset, axis)
        record = CaseRecord(case.id)
    except UserError as error:
        record = CaseRecord(case.id, problem=str(error))
        try:  # what can be said of the image without its label
            volume, label = read_checked(replace(case, label=None), dataset, axis)
        except UserError:
            return record
    record = replace(
        record,
        shape_vox=volume.array.shape[1:],
        spacing_mm=volume.spacing_mm,
        orientation=volume.grid.axcodes,
        placed=_placed(volume.grid),
        channels=tuple(map(_intensities, volume.array)),
        image_hash=_hash(volume.array),
    )
    if label is None:
        return record
    numbers = list(dataset.labels.values())
    counts = np.array([np.bincount(plane.ravel(), minlength=256) for plane in to_slices(label, axis)])  # (N, 256)
    ignored = counts[:, dataset.ignore] if dataset.ignore is not None else np.zeros(len(counts), int)
    return replace(
        record,
        label_hash=_hash(label.astype(np.uint8)),
        area_px=tuple(map(tuple, counts[:, numbers].tolist())),
        ignored_px=tuple(ignored.tolist()),
        centre_x=_centres_x(label, numbers),
    )


def _placed(grid: Grid) -> bool:
    """Whether the affine looks like a scanner's, and not like what a program writes that knows of none."""
    if grid.affine is None or not grid.affine[:3, 3].any():  # the first voxel at the very isocentre
        return False
    codes = ("qform_code", "sform_code") if isinstance(grid.header, nib.Nifti1Header) else ()
    return not codes or any(int(grid.header[code]) > 0 for code in codes)  # pyright: ignore


def _intensities(channel: np.ndarray) -> Intensities:
    """(Z, Y, X) float32."""
    flat = channel.ravel()
    sample = flat[:: flat.size // _SAMPLE | 1]  # an odd step does not fall on one column of every row
    mean = float(flat.mean(dtype=np.float64))
    variance = np.mean([np.square(plane - mean, dtype=np.float64).mean() for plane in channel])
    percentiles = tuple(np.percentile(sample, PERCENTILES).tolist())
    return Intensities(float(flat.min()), float(flat.max()), percentiles, mean, float(np.sqrt(variance)))


def _hash(array: np.ndarray) -> str:
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _centres_x(label: np.ndarray, numbers: list[int]) -> tuple[float | None, ...]:
    """(Z, Y, X) → for each number its mean place along X, in 0…1; None where there is none of it."""
    width = label.shape[2]
    columns = np.zeros(256 * width, np.int64)  # voxels of each number at each x
    for plane in label:
        if plane.any():
            columns += np.bincount((plane * width + np.arange(width)).ravel(), minlength=columns.size)
    place = (np.arange(width) + 0.5) / width
    return tuple(float(c @ place / c.sum()) if c.any() else None for c in columns.reshape(256, width)[numbers])


# --- several at a time -----------------------------------------------------------------------------------------------


def in_order(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Generator[Result]:
    """`function` of each item, several at a time, in order; closing the iterator cancels what has not begun.

    Threads, because decompressing, copying, sorting and hashing all release the interpreter, and a thread starts at
    once; a process would import torch first, and run a script anew that has no `if __name__ == "__main__"`.
    """
    workers = workers or max(1, min(runtime.cores() // processes.on_this_machine(), _MOST_WORKERS))
    if workers == 1 or len(items) < 2:
        yield from map(function, items)
        return
    with warnings.catch_warnings():
        # Readers silence warnings, which may quote a patient's name; but one thread's silence ends with another's.
        warnings.simplefilter("ignore")
        pool = ThreadPoolExecutor(workers)
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


# --- the cache -------------------------------------------------------------------------------------------------------


class _Cache:
    """The records of a dataset along one axis, in one file: a line a case, of its key, its files and its record.

    A line stays text, a tenth of what it would be as objects, until its record is wanted. A record is good as long as
    name, size and time of change of each of its files are the same, and the dataset's labels and channels are. A file
    that is missing, damaged or cannot be written is no cache, and no error.
    """

    def __init__(self, dataset: Dataset, axis: Axis) -> None:
        self._root = dataset.root
        self._keys = {_key(case, dataset.root) for case in dataset.cases}
        about = [VERSION, dataset.layout, list(dataset.labels.items()), dataset.channel_names, dataset.ignore]
        self._about = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        name = hashlib.sha256(str(dataset.root.resolve()).encode()).hexdigest()[:32]
        self._path = cache_folder() / "index" / f"{name}-{axis}.txt"
        self._lines, self._changed = self._load(), False

    def find(self, case: Case, files: str) -> str | None:
        """The record as JSON, where there is one of these very files."""
        before, record = self._lines.get(_key(case, self._root), ("", ""))
        return record if before == files else None

    def add(self, case: Case, files: str, record: CaseRecord) -> None:
        if record.problem is None:
            self._lines[_key(case, self._root)] = files, json.dumps(asdict(record))
            self._changed = True

    def save(self) -> None:
        with contextlib.suppress(OSError):
            if not self._changed:
                os.utime(self._path)  # used
                return
            body = "\n".join("\t".join((key, *line)) for key, line in self._lines.items() if key in self._keys)
            with whole_or_nothing(self._path) as unfinished:
                unfinished.write_text(f"{self._about}\n{_digest(body)}\n{body}", encoding="utf-8")
            for old in sorted(self._path.parent.glob("*.txt"), key=lambda p: -p.stat().st_mtime)[_MOST_KEPT:]:
                old.unlink()

    def _load(self) -> dict[str, tuple[str, str]]:
        try:
            about, digest, body = self._path.read_text(encoding="utf-8").split("\n", 2)
        except (OSError, ValueError):
            return {}
        if about != self._about or digest != _digest(body):
            return {}
        lines = [line.split("\t") for line in body.splitlines()]
        return {key: (files, record) for key, files, record in lines}


def _digest(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=16).hexdigest()


def _key(case: Case, root: Path) -> str:
    return json.dumps([case.id, _relative(case.images[0], root)])


def _identity(case: Case, root: Path) -> str:
    """How the label is read; name, bytes and time of change of each file, nothing of one that is missing. As JSON."""
    found: list[Any] = [repr(case.label.rule) if case.label is not None else None]
    for path in case.files:
        for file in _files(path):
            with contextlib.suppress(OSError):
                about = file.stat()
                found.append([_relative(file, root), about.st_size, about.st_mtime_ns])
    return json.dumps(found)


def _files(source: Path) -> Sequence[Path]:
    """All that a change of may change the image, without opening what could be a thousand files."""
    folder = Path(str(source).partition("#")[0])  # FOLDER#UID is one of its DICOM series
    if folder.is_dir():
        return sorted(path for path in folder.rglob("*") if path.is_file())
    with contextlib.suppress(UserError):
        return source_files(source)
    return [source]


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


def _record(values: dict[str, Any]) -> CaseRecord:
    """The inverse of `asdict` after a trip through JSON, which turned tuples into lists."""
    channels = tuple(Intensities(**c | {"percentiles": tuple(c["percentiles"])}) for c in values["channels"])
    area_px = tuple(map(tuple, values["area_px"]))
    rest: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
    return CaseRecord(**rest | {"channels": channels, "area_px": area_px})
