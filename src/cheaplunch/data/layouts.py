"""A folder's convention → Dataset: which files make a case, what is labelled, who trains and who tests.

Nothing here reads voxels. A new convention is one more entry of `LAYOUTS`.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cheaplunch.data.volume import PICTURE_SUFFIXES, SUFFIXES, suffix_of
from cheaplunch.errors import UserError

Split = Literal["train", "test"]

_TEST_SHARE = 0.2  # of the patients, where the folder brings no test images


@dataclass(frozen=True)
class Case:
    """One image with its channels: a volume, or a single picture."""

    id: str
    images: tuple[Path, ...]  # one a channel; a single RGB picture holds three
    label: Path | None
    split: Split
    patient: str  # never on both sides of a split made here

    @property
    def mask_name(self) -> str:
        """The file name of a mask predicted for this case: its label's."""
        if self.label is None:
            raise ValueError(f"case {self.id} has no label to be named after")
        return self.label.name


@dataclass(frozen=True)
class Dataset:
    root: Path
    name: str
    labels: dict[str, int]  # name → number in the masks, without background, in the file's order
    channel_names: tuple[str, ...]
    cases: tuple[Case, ...]  # training cases first, each side in natural order of id
    split_rule: str  # one sentence for reports
    description: str = ""  # the folder's own words about itself

    def split(self, name: Split) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.split == name)

    def fingerprint(self) -> str:
        """sha256 (hex) of the files' names and sizes and the label table, wherever the folder is."""
        files = [(c.split, p) for c in self.cases for p in (*c.images, c.label) if p is not None]
        lines = sorted(f"{side} {p.relative_to(self.root).as_posix()} {p.stat().st_size}" for side, p in files)
        return hashlib.sha256(json.dumps([lines, list(self.labels.items())]).encode()).hexdigest()


def open_dataset(root: Path) -> Dataset:
    """Recognise the folder by what is in it and list its cases.

    Raises UserError, one line that names the file and the way out, where the folder is missing or empty,
    follows no known convention, or lacks a file.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give the one that holds dataset.json and imagesTr")
    if not any(root.iterdir()):
        raise UserError(f"--data {root}: the folder is empty; it needs dataset.json, imagesTr and labelsTr")
    for looks_like, read in LAYOUTS:
        if looks_like(root):
            return read(root)
    raise UserError(f"--data {root}: no dataset.json and no imagesTr here; an nnU-Net raw folder has both")


def natural_order(text: str) -> list[str | int]:
    """Sorting key under which case_2 comes before case_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


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


def split_by_patient(names: Iterable[str]) -> frozenset[str]:
    """The patients that test: a fifth, at least one, none where there is only one patient.

    They come first in the order of their names' sha256, so that a patient added later seldom moves another.
    """
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = min(max(1, round(_TEST_SHARE * len(ordered))), len(ordered) - 1)
    return frozenset(ordered[:count])


def _looks_like_nnunet(root: Path) -> bool:
    return (root / "dataset.json").is_file() or (root / "imagesTr").is_dir()


def _read_nnunet(root: Path) -> Dataset:
    """nnU-Net raw: imagesTr/ID_0000.ext, labelsTr/ID.ext, imagesTs, labelsTs, dataset.json."""
    about = _read_json(root / "dataset.json")
    labels, channels = _labels(about, root), _channels(about, root)
    ending = about.get("file_ending") or _ending(root)
    if ending not in SUFFIXES:
        raise UserError(
            f"{root / 'dataset.json'}: file_ending {ending!r} is not read; use one of {', '.join(SUFFIXES)}"
        )

    cases = _cases(root, "Tr", channels, ending)
    if not cases:
        raise UserError(f"{root / 'imagesTr'} has no ID_0000{ending}: put the training images there")
    test = _cases(root, "Ts", channels, ending)
    patient_of = patients([c.id for c in cases + test], ending in PICTURE_SUFFIXES)
    sides: dict[str, Split] = {}
    if test:
        rule = "imagesTr trains and imagesTs tests, as the folder has it"
    else:
        held_out = split_by_patient(patient_of.values())
        sides = {c.id: "test" for c in cases if patient_of[c.id] in held_out}
        rule = (
            f"no imagesTs: {len(held_out)} of {len(set(patient_of.values()))} patients test, "
            "the first in the order of their names' sha256"
        )
    cases = [Case(c.id, c.images, c.label, sides.get(c.id, c.split), patient_of[c.id]) for c in cases + test]
    cases.sort(key=lambda c: c.split == "test")
    name, description = str(about.get("name") or root.resolve().name), str(about.get("description", ""))
    return Dataset(root, name, labels, channels, tuple(cases), rule, description)


def _cases(root: Path, side: str, channels: tuple[str, ...], ending: str) -> list[Case]:
    """The cases of imagesTr ('Tr') or imagesTs ('Ts'), the patient still unknown."""
    images, labels = root / f"images{side}", root / f"labels{side}"
    if not images.is_dir():
        return []
    files = {p.name for p in images.iterdir() if not p.name.startswith(".")}
    named = {m[1] for name in files if (m := re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", name))}
    cases = []
    for id_ in sorted(named, key=natural_order):
        names = [f"{id_}_{c:04d}{ending}" for c in range(len(channels))]
        if ending in PICTURE_SUFFIXES and len(channels) == 3 and not files & set(names[1:]):
            names = names[:1]  # one RGB picture holds the three
        for number, name in enumerate(names):
            if name not in files:
                raise UserError(f"{images / name} is missing: it is {id_}'s channel {channels[number]!r}")
        label = labels / f"{id_}{ending}"
        if not label.is_file():
            if side == "Tr" or labels.is_dir():
                raise UserError(f"{label} is missing: label {id_} or move its image out of {images.name}")
            label = None
        paths = tuple(images / name for name in names)
        cases.append(Case(id_, paths, label, "train" if side == "Tr" else "test", id_))
    return cases


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} is missing: it names the channels and labels of an nnU-Net raw folder")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise UserError(f"{path} is not an nnU-Net dataset.json: it needs channel_names and labels")
    return about


def _labels(about: dict, root: Path) -> dict[str, int]:
    path, table = root / "dataset.json", about.get("labels")
    if not isinstance(table, dict) or not table:
        raise UserError(f'{path}: labels is missing; write "labels": {{"background": 0, "NAME": 1}}')
    if all(str(key).isdecimal() for key in table):  # nnU-Net 1 and the Decathlon: number → name
        table = {name: int(number) for number, name in table.items()}
    labels = {}
    for name, number in table.items():
        if isinstance(number, list):
            raise UserError(f"{path}: label {name!r} is a region {number}; give it one number")
        if name == "ignore":
            raise UserError(f"{path}: an 'ignore' label is not read; take it out, here and in the masks")
        if not str(number).isdecimal() or not 0 <= int(number) <= 255:
            raise UserError(f"{path}: label {name!r} is {number!r}; give it a whole number from 0 to 255")
        labels[str(name)] = int(number)
    if len(set(labels.values())) < len(labels):
        raise UserError(f"{path}: two labels have the same number; give each its own")
    labels = {name: number for name, number in labels.items() if number != 0}
    if not labels:
        raise UserError(f"{path}: labels has only background; name what is to be segmented")
    return labels


def _channels(about: dict, root: Path) -> tuple[str, ...]:
    table = about.get("channel_names", about.get("modality"))
    if isinstance(table, list) and table:
        return tuple(map(str, table))
    if not isinstance(table, dict) or not table or not all(str(key).isdecimal() for key in table):
        raise UserError(f'{root / "dataset.json"}: channel_names is missing; write "channel_names": {{"0": "MRI"}}')
    return tuple(str(table[key]) for key in sorted(table, key=int))


def _ending(root: Path) -> str:
    """The ending of the first training image, where dataset.json (nnU-Net 1) does not say it."""
    images = root / "imagesTr"
    names = sorted(p for p in images.iterdir() if not p.name.startswith(".")) if images.is_dir() else []
    if not names:
        raise UserError(f"{images} is missing or empty: put the training images there as ID_0000.nii.gz")
    return suffix_of(names[0])


LAYOUTS = ((_looks_like_nnunet, _read_nnunet),)
