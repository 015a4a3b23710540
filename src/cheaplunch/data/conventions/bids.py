"""BIDS: sub-*/[ses-*/]anat/*.nii.gz with *_dseg.nii.gz beside them or below derivatives/."""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from cheaplunch.data.conventions.classes import find_classes
from cheaplunch.data.dataset import Case, Dataset, Folder, make_dataset
from cheaplunch.data.labels import LabelFiles, Numbers
from cheaplunch.data.names import stem
from cheaplunch.errors import UserError

_FILE = r"(?:.*/)?(sub-[^/_]+)/(?:ses-[^/_]+/)?[^/]+/(sub-[^/]+)_([A-Za-z0-9]+)\.nii(\.gz)?"
_PREFERRED = ("T1w", "T2w", "FLAIR")

Place = tuple[str, ...]  # the entities that say which scan: sub, ses, run


def is_bids(folder: Folder) -> str | None:
    masks = [match for match in folder.find(_FILE) if match[3] == "dseg"]
    return f"{masks[0][0]} is a BIDS segmentation" if masks else None


def read_bids(folder: Folder) -> Dataset:
    """One case a mask: the image is of the same subject, session and run; of several modalities, the one that most
    masks have, T1w first. The patient is the subject."""
    masks: dict[Place, list[str]] = defaultdict(list)
    images: dict[Place, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for match in folder.find(_FILE):
        name, entities, suffix = match[0], match[2], match[3]
        if suffix == "dseg":
            masks[_place(entities)].append(name)
        elif not re.search(r"_(mask|probseg)\.", name) and not name.startswith("derivatives/"):
            images[_place(entities)][suffix].append(name)
    modality = _choose_modality(folder, images, masks)
    cases, others = [], 0
    for place, found in masks.items():
        if len(found) > 1:
            raise UserError(f"{folder.root / found[0]} and {found[1]} are masks of one scan: keep one in the folder")
        fitting = images[place][modality]
        if not fitting:
            raise UserError(f"{folder.root / found[0]} has no {modality} image of the same subject, session and run")
        others += sum(map(len, images[place].values())) - 1
        if len(fitting) > 1:
            raise UserError(f"{folder.root / fitting[0]} and {fitting[1]} both go with {found[0]}: keep one")
        label = LabelFiles((folder.root / found[0],))
        cases.append(Case(stem(fitting[0]), (folder.root / fitting[0],), label, "train", place[0]))
    names = _names(folder, list(masks.values()))
    if names is None:
        learned = find_classes(folder.root, [case.label.paths[0] for case in cases if case.label])
        if learned.rule != Numbers():
            cases = [Case(c.id, c.images, LabelFiles(c.files[1:], learned.rule), c.split, c.patient) for c in cases]
        names = learned.labels
    left_out = (f"{others} images of the same scans that are not {modality}",) if others else ()
    unlabelled = len(images.keys() - masks.keys())
    left_out += (f"{unlabelled} scans without a dseg file",) if unlabelled else ()
    return make_dataset(folder.root, cases=cases, labels=names, channel_names=(modality,), left_out=left_out)


def _place(entities: str) -> Place:
    return tuple(part for part in entities.split("_") if part.split("-")[0] in ("sub", "ses", "run"))


def _choose_modality(folder: Folder, images: dict, masks: dict[Place, list[str]]) -> str:
    counts = Counter(suffix for place in masks for suffix in images[place])
    if not counts:
        first = next(iter(masks.values()))[0]
        raise UserError(f"{folder.root / first} has no image of the same subject, session and run beside it")
    rank = {name: -number for number, name in enumerate(_PREFERRED)}
    return max(counts, key=lambda suffix: (counts[suffix], rank.get(suffix, -len(rank)), suffix))


def _names(folder: Folder, masks: list[list[str]]) -> dict[str, int] | None:
    """From a *dseg.tsv (columns index and name) beside a mask or at the top of the dataset or of its derivative."""
    tables = [match[0] for match in folder.find(r"(?:.*/)?[^/]*dseg\.tsv")]
    if not tables:
        return None
    beside = [t for t in tables if any(t == re.sub(r"\.nii(\.gz)?$", ".tsv", m) for found in masks for m in found)]
    path = folder.root / (beside[0] if beside else min(tables, key=lambda name: len(PurePosixPath(name).parts)))
    return _read_names(path)


def _read_names(path: Path) -> dict[str, int]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    try:
        labels = {row["name"].strip(): int(row["index"]) for row in rows if int(row["index"]) != 0}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no columns index and name, of numbers and names: add them") from error
    if not labels or not all(0 < number <= 255 for number in labels.values()):
        raise UserError(f"{path} has label numbers outside 1 to 255: give them smaller ones, here and in the masks")
    return labels
