"""What there is to label and what people have labelled, as the clients of MONAI Label see it.

The volumes are those of `--data`, which is never written to. What clients send lies in a folder of its own:

    labels/final/NAME.nii.gz   a label that was submitted, on its image's grid, with the run's class numbers
    labels/final/NAME.json     its voxels a class, and where in the image each class is
    images/NAME.…              a volume that a client brought
    training/RUN               what a fine-tuning learned from (training_job.py)

What a client calls an image is looked up among those that are known; where a new one is kept, `file_name` says.

To these clients a class is its place among the classes, from 1, because 3D Slicer knows segments by that alone. Files
have the numbers of the data that the run learned from.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cheaplunch.data.dataset import Case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.names import ending, natural_order, stem
from cheaplunch.data.volume import ITK_SUFFIXES, NIFTI_SUFFIXES, Volume, read_label, read_volume, write_mask
from cheaplunch.errors import UserError
from cheaplunch.files import whole_or_nothing, write_json
from cheaplunch.predicting import Image
from cheaplunch.prompts import furthest_point
from cheaplunch.serving.opened import NotOpen

Tag = Literal["final", "original"]
"""Submitted here, or there from the start."""

ONE_FILE = (*NIFTI_SUFFIXES, *(suffix for suffix in ITK_SUFFIXES if suffix not in (".mhd", ".nhdr")))
"""Endings of volumes that are one file."""

_IN_A_PATIENT = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".dcm")
_LONGEST = 80  # characters of a name


@dataclass(frozen=True)
class Entry:
    """A volume that can be labelled."""

    id: str
    sources: tuple[Path, ...]
    """One a channel."""
    came_with: Case | None = None
    """The case, where a label was with it in `--data`."""
    brought: bool = field(default=False, compare=False)
    """By a client."""

    @property
    def name(self) -> str:
        return file_name(self.id)

    def read(self) -> Volume:
        return read_volume(self.sources)


class Datastore:
    """Threads may share it. Pictures are left out: what these clients show has a place in a patient."""

    def __init__(self, images: Mapping[str, Image], data: Path | None, folder: Path, classes: Mapping[str, int]):
        """`images` of `--data` by id; `classes` are the run's, name → number in files."""
        if data is not None and folder.resolve().is_relative_to(data.resolve()):
            raise UserError(f"--labels {folder} lies in --data, which is not written to; give another folder")
        if folder.is_file():
            raise UserError(f"--labels {folder} is a file; give a folder")
        self.folder = folder
        self.classes = dict(classes)
        self._lock = threading.Lock()
        labelled = _labelled(data, classes)
        in_a_patient = [image for image in images.values() if ending(image.sources[0]) in _IN_A_PATIENT]
        entries = [Entry(image.name, image.sources, labelled.get(image.name)) for image in in_a_patient]
        entries += [Entry(stem(path), (path,), brought=True) for path in self._images.glob("[!.]*")]
        entries.sort(key=lambda entry: (entry.brought, natural_order(entry.id)))
        self._entries = {entry.name: entry for entry in entries}

    @property
    def _images(self) -> Path:
        return self.folder / "images"

    def all(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    def find(self, id_: str) -> Entry:
        """NotOpen where no image is called so."""
        with self._lock:
            entry = self._entries.get(file_name(id_))
        if entry is None:
            raise NotOpen(f"there is no image {id_!r}; GET /datastore/?output=all lists what there is")
        return entry

    def add(self, id_: str, source: Path) -> Entry:
        """Keeps a volume that a client brought; UserError for what is none, or another's name."""
        if ending(source) not in ONE_FILE:
            raise UserError(f"{id_}: send the volume as one file: {', '.join(ONE_FILE)}")
        if read_volume([source]).grid.affine is None:
            raise UserError(f"{id_}: the file has no place in a patient; send a volume")
        name = file_name(id_)
        path = self._images / f"{name}{ending(source)}"
        with self._lock:
            known = self._entries.get(name)
            if known is not None and not (known.brought and _same(known.sources[0], source)):
                raise UserError(f"there is another image {id_!r} already; give this one a name of its own")
            with whole_or_nothing(path, path.suffix) as unfinished:
                shutil.copyfile(source, unfinished)
            entry = self._entries[name] = Entry(name, (path,), brought=True)
        return entry

    # --- labels ------------------------------------------------------------------------------------------------------

    def submit(self, entry: Entry, file: Path, said: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps `file` as the image's label, in place of an earlier one, and returns what is said beside it.

        `said` may have `label_info`, a list of {"name", "idx"}: what the numbers in the file mean; otherwise they are
        the places of the classes. UserError for a label on another grid, or with voxels of no known class.
        """
        volume = entry.read()
        label = self._numbered(read_label(file, volume), said.get("label_info"))
        record = {
            "image": entry.id,
            "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
            "voxels": {name: int((label == number).sum()) for name, number in self.classes.items()},
            "places": {name: place for name, number in self.classes.items() if (place := _place(label == number))},
        }
        path = self._path(entry)
        with self._lock:
            write_mask(label, volume, path)
            write_json(record, _beside(path))
        return record

    def withdraw(self, entry: Entry) -> None:
        """Forgets what was submitted of an image."""
        path = self.submitted(entry)
        with self._lock:
            _beside(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def submitted(self, entry: Entry) -> Path:
        """The file of the label that was submitted; NotOpen where there is none."""
        path = self._path(entry)
        if not path.is_file():
            raise NotOpen(f"no label of {entry.id!r} was submitted yet")
        return path

    def is_submitted(self, entry: Entry) -> bool:
        return self._path(entry).is_file()

    def record(self, entry: Entry) -> dict[str, Any]:
        """What is said beside a submitted label."""
        return json.loads(_beside(self.submitted(entry)).read_text(encoding="utf-8"))

    def label(self, entry: Entry, tag: Tag, volume: Volume) -> np.ndarray:
        """(Z, Y, X) int32 with the run's numbers, on the image's `volume`; NotOpen where there is none."""
        if tag == "final":
            return read_label(self.submitted(entry), volume)
        if entry.came_with is None or entry.came_with.label is None:
            raise NotOpen(f"no label came with {entry.id!r}")
        label = entry.came_with.label.read(volume)
        return np.where(np.isin(label, list(self.classes.values())), label, np.int32(0))

    def tags(self, entry: Entry) -> list[Tag]:
        there: dict[Tag, bool] = {"final": self.is_submitted(entry), "original": entry.came_with is not None}
        return [tag for tag, is_there in there.items() if is_there]

    def in_places(self, label: np.ndarray) -> np.ndarray:
        """The run's numbers → the places of the classes, uint8."""
        places = np.zeros(label.shape, np.uint8)
        for place, number in enumerate(self.classes.values(), start=1):
            places[label == number] = place
        return places

    @property
    def places(self) -> dict[str, int]:
        """Class → its place."""
        return {name: place for place, name in enumerate(self.classes, start=1)}

    def statistics(self) -> dict[str, Any]:
        """What there is and how much of it is labelled, in MONAI Label's words."""
        entries = self.all()
        tags = [tag for entry in entries for tag in self.tags(entry)]
        counts = {tag: tags.count(tag) for tag in dict.fromkeys(tags)}
        return {"total": len(entries), "completed": counts.get("final", 0), "label_tags": counts}

    def _numbered(self, label: np.ndarray, info: Sequence[Mapping[str, Any]] | None) -> np.ndarray:
        """A client's numbers → the run's."""
        if info:
            try:
                names = {int(said.get("idx", place)): str(said["name"]) for place, said in enumerate(info, start=1)}
            except (AttributeError, KeyError, TypeError, ValueError):
                raise UserError('label_info is not understood; send a list of {"name": NAME, "idx": NUMBER}') from None
        else:
            names = {place: name for name, place in self.places.items()}
        numbered = np.zeros(label.shape, np.uint8)
        for value in np.unique(label[label != 0]).tolist():
            name = names.get(value, f"number {value}")
            if name not in self.classes:
                raise UserError(
                    f"the label has {np.count_nonzero(label == value)} voxels of {name!r}, and the classes are "
                    f"{', '.join(self.classes)}; rename the segment, or remove it"
                )
            numbered[label == value] = self.classes[name]
        return numbered

    def _path(self, entry: Entry) -> Path:
        return self.folder / "labels" / "final" / f"{entry.name}.nii.gz"


def file_name(id_: str) -> str:
    """A name for files that stands for `id_` alone, and cannot leave its folder: letters, digits and `_ - ( )`.

    A name as it comes out stands for itself.
    """
    plain = re.sub(r"[^\w()-]+", "_", id_)[:_LONGEST]
    if plain == id_ and plain:
        return plain
    return f"{plain[: _LONGEST - 9]}-{hashlib.sha256(id_.encode(errors='replace')).hexdigest()[:8]}"


def _labelled(data: Path | None, classes: Mapping[str, int]) -> dict[str, Case]:
    """Cases of `--data` by id that come with a label of the run's classes."""
    try:
        dataset = open_dataset(data, labelled=False) if data is not None else None
    except UserError:  # of images that can be shown all the same
        dataset = None
    if dataset is None or not classes.items() <= dataset.labels.items():
        return {}
    return {case.id: case for case in dataset.cases if case.label is not None}


def _place(mask: np.ndarray) -> list[float] | None:
    """(z, y, x) as shares of the volume's sides: the middle of `mask` (Z, Y, X) where it is thickest; None if empty."""
    if not mask.any():
        return None
    z = int(mask.sum(axis=(1, 2)).argmax())
    x, y = furthest_point(mask[z])
    return [round((at + 0.5) / side, 4) for at, side in zip((z, y, x), mask.shape, strict=True)]


def _beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _same(a: Path, b: Path) -> bool:
    return hashlib.sha256(a.read_bytes()).digest() == hashlib.sha256(b.read_bytes()).digest()
