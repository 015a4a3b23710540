"""What clients of MONAI Label ask and are told: clicks read, masks and messages made (monailabel.py has the routes).

A client clicks in the voxels of the image as it loads it, which are those of its file; a class is known to it by its
name, and in label maps by its place among the classes (datastore.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi.responses import Response

from cheaplunch import __version__
from cheaplunch.data.formats import write_nifti
from cheaplunch.data.names import ending
from cheaplunch.data.volume import Volume, read_grid, write_mask
from cheaplunch.errors import UserError
from cheaplunch.interactive import Mark
from cheaplunch.serving.datastore import ONE_FILE, Datastore, Entry, file_name
from cheaplunch.serving.opened import NotOpen, Opened, Served, on_voxels, slice_axis
from cheaplunch.serving.strategies import STRATEGIES
from cheaplunch.serving.training_job import Task, TrainingJobs

Json = dict[str, Any]


# --- clicks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a client asks of an image."""

    marks: list[Mark]
    label: str | None
    """The only class that is asked for and answered; None: all that are clicked."""
    propagate: bool | int
    suffix: str


def read_question(params: Mapping[str, Any], opened: Opened, served: Served) -> Question:
    """Clicks come in two forms, as lists of voxels (i, j, k):

    - {"label": NAME, "foreground": [...], "background": [...]}: one class, as for DeepGrow. A "roi"
      [i0, i1, j0, j1, k0, k1] is a box on its middle slice.
    - {NAME: [...], NAME: [...], "background": [...]}: several classes, as for DeepEdit; background is off them all.

    UserError for what is not understood, and where nothing is clicked that a network needs to be told.
    """
    loaded = served.current
    propagate = params.get("propagate", True)
    if not isinstance(propagate, (bool, int)) or propagate < 0:
        raise UserError(f"propagate is {propagate!r}; it must be true, false or a number of slices")
    suffix = str(params.get("result_extension") or ".nii.gz")
    suffixes = opened.image.volume.grid.mask_suffixes
    if suffix not in suffixes:
        raise UserError(
            f"result_extension {suffix!r} cannot hold a mask of this image; choose of: {', '.join(suffixes)}"
        )
    if not loaded.model.prompted:
        return Question([], None, propagate, suffix)
    classes = [name for name in loaded.model.labels if isinstance(params.get(name), list) and params[name]]
    off = _voxels(params, "background")
    if classes:
        marks = [
            Mark(name, "voxel", (at,), True, f"{name}: click {at}") for name in classes for at in _voxels(params, name)
        ]
        marks += [Mark(name, "voxel", (at,), False, f"background: click {at}") for name in classes for at in off]
        return Question(marks, None, propagate, suffix)
    label = params.get("label") or (next(iter(loaded.model.labels)) if len(loaded.model.labels) == 1 else None)
    if not isinstance(label, str) or label not in loaded.model.labels:
        raise UserError(f"label is {label!r}; the classes are: {', '.join(loaded.model.labels)}")
    marks = [Mark(label, "voxel", (at,), True, f"foreground: click {at}") for at in _voxels(params, "foreground")]
    marks += [Mark(label, "voxel", (at,), False, f"background: click {at}") for at in off]
    if params.get("roi"):
        marks.append(Mark(label, "voxel", _box(params["roi"], opened, served), source="roi"))
    if not marks:
        raise UserError(f"nothing is clicked of {label}; place a foreground point on it")
    return Question(marks, label, propagate, suffix)


def _voxels(params: Mapping[str, Any], name: str) -> list[tuple[float, float, float]]:
    points = params.get(name) or []
    if not isinstance(points, list) or not all(_are_numbers(point, 3) for point in points):
        raise UserError(f"{name} is not understood; send a list of voxels [i, j, k]")
    return [(float(i), float(j), float(k)) for i, j, k in points]


def _box(roi: Any, opened: Opened, served: Served) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two opposite voxels on the middle slice of a region, kept in the image."""
    if not _are_numbers(roi, 6):
        raise UserError("roi is not understood; send [i0, i1, j0, j1, k0, k1]")
    across = slice_axis(opened.image.case(served.current))
    ranges = []
    for axis, (pair, side) in enumerate(
        zip(zip(roi[::2], roi[1::2], strict=True), opened.image.volume.grid.shape, strict=True)
    ):
        low, high = (min(max(float(end), 0.0), side - 1.0) for end in sorted(pair))
        ranges.append((middle := float((low + high) // 2), middle) if axis == across else (low, high))
    return tuple(low for low, _ in ranges), tuple(high for _, high in ranges)


def _are_numbers(values: Any, count: int) -> bool:
    numbers = isinstance(values, list) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    return numbers and len(values) == count


# --- what is answered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A label map as a file, and what is said of it."""

    content: bytes
    name: str
    said: Json


def find(served: Served, opened: Opened, params: Mapping[str, Any]) -> Found:
    """Asks the network; UserError as of `read_question`."""
    question = read_question(params, opened, served)
    answered = served.segment(opened, question.marks, question.propagate)
    names = [question.label] if question.label is not None else list(answered.labels)
    label = np.zeros(answered.label.shape, np.uint8)
    for place, name in enumerate(names, start=1):
        label[answered.label == answered.labels[name]] = place
    places = {name: place for place, name in enumerate(names, start=1)}
    said = {
        "label_names": places,
        "voxels": {name: answered.voxels[name] for name in names},
        "quality": {name: answered.quality.get(name) for name in names},
    }
    content = mask_file(served, opened.image.volume, label, question.suffix, places)
    return Found(content, f"label-{secrets.token_hex(4)}{question.suffix}", said)


def mask_file(served: Served, volume: Volume, label: np.ndarray, suffix: str, names: Mapping[str, int]) -> bytes:
    """A label map (Z, Y, X) on the grid of the volume's file."""
    folder = served.new_folder()
    try:
        write_mask(label, volume, folder / f"label{suffix}", names)
        return (folder / f"label{suffix}").read_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def multipart(said: Json, content: bytes, name: str) -> Response:
    """`params` as JSON and the file, as multipart/form-data."""
    boundary = secrets.token_hex(16)
    parts = [
        (b'name="params"\r\nContent-Type: application/json', json.dumps(said).encode()),
        (f'name="image"; filename="{name}"\r\nContent-Type: application/octet-stream'.encode(), content),
    ]
    body = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary.encode(), head, part)
        for head, part in parts
    )
    return Response(body + f"--{boundary}--\r\n".encode(), media_type=f"multipart/form-data; boundary={boundary}")


def download(content: bytes, name: str) -> Response:
    plain = name.encode("ascii", "replace").decode().replace("?", "_")
    disposition = f'attachment; filename="{plain}"' if plain == name else f"attachment; filename*=utf-8''{quote(name)}"
    return Response(content, media_type="application/octet-stream", headers={"Content-Disposition": disposition})


# --- images ----------------------------------------------------------------------------------------------------------


class Images:
    """The datastore's images, open on the server while they are asked about."""

    def __init__(self, served: Served, datastore: Datastore):
        self._served = served
        self._datastore = datastore
        self._open: dict[str, str] = {}
        self._lock = threading.Lock()

    def opened(self, entry: Entry) -> Opened:
        with self._lock:
            known = self._open.get(entry.name)
        if known is not None:
            with contextlib.suppress(NotOpen):  # it was closed for want of use
                return self._served.find(known)
        served = self._served
        opened = served.open_files(entry.sources, entry.id) if entry.brought else served.open_case(entry.id)
        with self._lock:
            self._open[entry.name] = opened.id
        return opened

    def file(self, entry: Entry) -> tuple[bytes, str]:
        """The image for a viewer, and its name: its own file, or a NIfTI of its first channel on the same voxels."""
        suffix, grid = ending(entry.sources[0]), read_grid(entry.sources)
        if grid.channels == 1 and suffix in ONE_FILE:
            return entry.sources[0].read_bytes(), f"{entry.name}{suffix}"
        volume, folder = entry.read(), self._served.new_folder()
        try:
            path = folder / "image.nii.gz"
            affine = volume.grid.affine
            if affine is None:
                raise UserError(f"{entry.id} has no place in a patient")
            write_nifti(on_voxels(volume.array[0], volume.grid), affine, None, path)
            return path.read_bytes(), f"{entry.name}.nii.gz"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def about(self, entry: Entry) -> Json:
        """What a client is told of an image; where it lies is no concern of theirs."""
        suffix = ending(entry.sources[0])
        return {"id": entry.id, "name": f"{entry.name}{suffix if suffix in ONE_FILE else '.nii.gz'}"}


# --- what there is ---------------------------------------------------------------------------------------------------


def about_server(served: Served, datastore: Datastore, jobs: TrainingJobs) -> Json:
    """`/info/`: from this 3D Slicer makes its panels."""
    loaded, name = served.current, model_name(jobs)
    what = f"{loaded.config.method} on {loaded.config.model.backbone}, run {loaded.run.root.resolve().name}"
    model: Json = {
        # DeepGrow's panel has points on and off the target. With `labels` Slicer would take the model for one that
        # needs no clicks, and ask it as soon as an image is there.
        "type": "deepgrow",
        "labels": [],
        "dimension": 3,
        "description": f"{what}: click on what is to be segmented",
        "config": {"propagate": True},
    }
    if not loaded.model.prompted:
        model |= {"type": "segmentation", "labels": datastore.places, "description": what, "config": {}}
    return {
        "name": "cheaplunch",
        "description": "Medical segmentation models from a handful of labelled slices",
        "version": __version__,
        "labels": list(datastore.classes),
        "models": {name: model},
        "trainers": {
            name: {"description": f"fine-tunes as {name} was, on what is labelled", "config": vars(jobs.default)}
        },
        "strategies": {key: {"description": strategy.description} for key, strategy in STRATEGIES.items()},
        "scoring": {},
        "train_stats": {name: about_training(jobs.last)},
        "datastore": datastore.statistics(),
    }


def model_name(jobs: TrainingJobs) -> str:
    """What clients call the model, whatever it has learned since: the run that the server was started with."""
    return file_name(jobs.base.run.root.resolve().name)


def about_training(task: Task | None) -> Json:
    if task is None:
        return {}
    record = task.record
    stats: Json = {
        "epoch": record.get("step", 0),
        "total_epochs": task.wanted.steps,
        "best_metric": record.get("validation_dice", 0.0),
        "start_ts": _clock(task.started_s),
    }
    if "loss" in record:
        stats["train"] = {"loss": record["loss"]}
    if task.ended_s is not None:
        stats["total_time"] = str(round(task.ended_s - task.started_s)) + " s"
    return stats


def about_task(task: Task, name: str) -> Json:
    ended = {} if task.ended_s is None else {"end_ts": _clock(task.ended_s)}
    return {
        "id": task.id,
        "status": task.state,
        "request": {"model": name, **asdict(task.wanted)},
        "start_ts": _clock(task.started_s),
        **ended,
        "run": task.run.root.name,
        "details": task.lines() or ["reading what is labelled"],
    }


def about_datastore(datastore: Datastore, images: Images) -> Json:
    """Everything, as MONAI Label's own datastore says it."""
    named = {"label_names": datastore.places}
    info = {"params": named, **named}
    return {
        "name": "cheaplunch",
        "description": "",
        "objects": {
            entry.id: {
                "image": {"ext": ending(entry.sources[0]), "info": images.about(entry)},
                "labels": {tag: {"ext": ".nii.gz", "info": info} for tag in datastore.tags(entry)},
            }
            for entry in datastore.all()
        },
    }


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
