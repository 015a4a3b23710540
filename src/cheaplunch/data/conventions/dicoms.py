"""A tree of DICOM files: a case for each image series, labelled by the DICOM SEG objects drawn on it."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from cheaplunch.data.dataset import Case, Dataset, Folder, make_dataset
from cheaplunch.data.dicom import Series, find_segmentations, find_series
from cheaplunch.data.labels import LabelFiles, Segments
from cheaplunch.data.names import ending
from cheaplunch.errors import UserError

_LOOKED_AT = 50  # files without a known ending, which DICOM files often are


def is_dicom(folder: Folder) -> str | None:
    candidates = [name for name in folder.files if ending(name) == ".dcm"]  # those of no known ending, too
    named = [name for name in candidates if name.lower().endswith(".dcm")]
    other = [name for name in candidates if "." not in name.rpartition("/")[2] or name.rpartition(".")[2].isdecimal()]
    found = next((name for name in (named + other)[:_LOOKED_AT] if _is_dicom(folder.root / name)), None)
    return f"{found} is a DICOM file" if found else None


def read_dicom(folder: Folder) -> Dataset:
    """The patient is the first folder, where there are several; nothing in the files that names anyone is read."""
    series = find_series(folder.root)
    usable = [one for one in series if not one.flaw]
    left_out = tuple(f"{one.source} {one.flaw}" for one in series if one.flaw)
    if not usable:
        reason = left_out[0] if left_out else f"{folder.root} has DICOM files, but none is an image"
        raise UserError(f"{reason}; no series here can be read as a volume")
    drawn = defaultdict(list)
    names: dict[str, int] = {}
    for segmentation in find_segmentations(folder.root):
        if segmentation.series_uid in {one.uid for one in usable}:
            drawn[segmentation.series_uid].append(segmentation.path)
            for label in segmentation.labels:
                names.setdefault(label, len(names) + 1)
        else:
            left_out += (f"{segmentation.path} is drawn on a series that is not here",)
    ids = {uid: name.replace("/", "_") for uid, name in series_names(usable, folder.root).items()}
    sources = series_sources(usable, series)
    patients = _patients(usable, ids, folder.root)
    rule = Segments(tuple(names.items()))
    cases = []
    for one in usable:
        label = LabelFiles(tuple(drawn[one.uid]), rule) if drawn[one.uid] else None
        cases.append(Case(ids[one.uid], (sources[one.uid],), label, "train", patients[one.uid]))
    labelled = [case for case in cases if case.label is not None]
    if labelled and len(labelled) < len(cases):
        left_out += (f"{len(cases) - len(labelled)} series without a DICOM SEG",)
    modalities = {one.modality for one in usable if drawn[one.uid] or not labelled}
    return make_dataset(
        folder.root,
        cases=labelled or cases,
        labels=names,
        channel_names=(modalities.pop() if len(modalities) == 1 else "image",),
        split_rule=None if labelled else "no series is labelled: all train, none tests",
        left_out=left_out,
    )


def series_names(usable: Sequence[Series], root: Path) -> dict[str, str]:
    """UID → the folders that lead to it, joined by '/', and its number among several in one folder."""
    places = {one.uid: "/".join(_place(one, root)) or root.resolve().name for one in usable}
    counts, seen = Counter(places.values()), Counter[str]()
    names = {}
    for one in usable:
        place = places[one.uid]
        seen[place] += 1
        names[one.uid] = f"{place}_{seen[place]}" if counts[place] > 1 else place
    return names


def series_sources(usable: Sequence[Series], series: Sequence[Series]) -> dict[str, Path]:
    """UID → the folder where no other of all `series` lies below it, else FOLDER#UID."""
    folders = {one.uid: _folder(one) for one in series}
    return {
        one.uid: folders[one.uid]
        if sum(folder.is_relative_to(folders[one.uid]) for folder in folders.values()) == 1
        else one.source
        for one in usable
    }


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _folder(one: Series) -> Path:
    """The deepest that holds all files of a series."""
    return one.source.with_name(one.source.name.rpartition("#")[0])


def _place(one: Series, root: Path) -> tuple[str, ...]:
    """The folders below the root that lead to a series."""
    return _folder(one).relative_to(root).parts


def _patients(series: list[Series], ids: dict[str, str], root: Path) -> dict[str, str]:
    first = {one.uid: next(iter(_place(one, root)), ids[one.uid]) for one in series}
    return first if len(set(first.values())) > 1 else ids
