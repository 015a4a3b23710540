"""From files to masks: which images there are, what is asked on each, and the masks on their grids.

A mask is written whole or not at all, and `predictions.jsonl` beside the masks says of each what it was made from, so
that the same command goes on where it stopped, and a mask of other prompts is neither taken for this one nor replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cheaplunch.config import RunConfig, asked_by_text
from cheaplunch.data import dicom
from cheaplunch.data.conventions.dicoms import is_dicom, series_names, series_sources
from cheaplunch.data.dataset import Folder
from cheaplunch.data.layouts import LAYOUTS, open_dataset
from cheaplunch.data.names import ending, natural_order, stem
from cheaplunch.data.recipes import find_recipe
from cheaplunch.data.volume import Grid, source_files
from cheaplunch.errors import UserError
from cheaplunch.interactive import Box, Mark, Model, OpenCase, Prompt, open_model, quality_of
from cheaplunch.prompt_files import ANY_IMAGE, Given, TextPrompt, read_prompts, read_texts
from cheaplunch.runs import RunFolder

Format = Literal["nii.gz", "nrrd", "seg", "same"]
RECORD = "predictions.jsonl"
ADAPTER = "adapter_model.safetensors"

_SUFFIX_OF: dict[Format, str] = {"nii.gz": ".nii.gz", "nrrd": ".nrrd", "seg": dicom.SUFFIX}

Progress = Callable[[int, int], None]
"""Is told (images done, of how many)."""


@dataclass(frozen=True)
class Image:
    """An image to predict on."""

    name: str
    """Of its mask below the output folder, without the ending; '/' between folders."""
    sources: tuple[Path, ...]
    """One a channel."""
    called: tuple[str, ...] = ()
    """Other names by which a file of prompts may mean it."""
    files: tuple[Path, ...] = ()
    """What the sources are made of, where that is known already."""

    def mask_suffix(self, wanted: Format) -> str:
        """The ending of its mask; 'same' is its own, or the nearest that can hold a mask."""
        return _SUFFIX_OF.get(wanted) or Grid(self.sources[0], shape=()).mask_suffix


@dataclass
class Outcome:
    """What became of the images."""

    written: list[Path] = field(default_factory=list)
    done_before: int = 0
    unprompted: list[str] = field(default_factory=list)
    """Names of images without prompts, which have no mask."""
    unknown: list[str] = field(default_factory=list)
    """Names in the file of prompts that no image has."""
    failed: list[str] = field(default_factory=list)
    """A sentence each, which names the file."""

    def summary(self, out: Path) -> str:
        """What to tell the user, but for what failed."""
        lines = [f"masks written to {out}: {len(self.written)}"]
        if self.done_before:
            lines.append(f"there already: {self.done_before}")
        if self.unprompted:
            lines.append(f"without prompts, so without a mask: {', '.join(self.unprompted)}")
        if self.unknown:
            lines.append(f"prompts for images that are not among the inputs: {', '.join(self.unknown)}")
        return "\n".join(lines)


# --- which images ----------------------------------------------------------------------------------------------------


def find_images(inputs: Sequence[Path], channels: int | None, out: Path) -> tuple[list[Image], list[str]]:
    """The images that the inputs are or hold, and a sentence for each of what cannot be read as one.

    A folder is searched to its depths: DICOM series, and what `--data` would make of it, or else every image file.
    Files NAME_0000, NAME_0001, … are one image where they are as many as the run's `channels`. Masks are named as the
    images, below the folder they were found in; where two of different inputs would have one name, below the folder
    that all inputs share. UserError where nothing is found, or where masks in `out` would be found the next time.
    """
    found: list[tuple[Path, Image]] = []  # with the folder that its name starts from
    failed: list[str] = []
    for given in dict.fromkeys(inputs):
        if given.is_dir():
            if out.resolve().is_relative_to(given.resolve()):
                raise UserError(f"--out {out} lies in {given}, where masks would pass for images; give another folder")
            images, troubles = _in_folder(given, channels)
            found += [(given, image) for image in images]
            failed += troubles
        elif given.exists() or dicom.names_series(given):
            found += [(given.parent, image) for image in _from_files(given.parent, [given.name], channels)]
        else:
            raise UserError(f"{given}: no such file or folder; give images, or folders of images")
    if not found and not failed:
        raise UserError(f"{inputs[0]} has no images; give NIfTI, NRRD, DICOM or picture files, or a folder of them")
    # A file may be given beside its folder.
    unique = {tuple(path.resolve() for path in image.sources): (root, image) for root, image in found}.values()
    if len({image.name for _, image in unique}) < len(unique):
        shared = Path(os.path.commonpath([root.resolve() for root, _ in unique]))
        below = [(root.resolve().relative_to(shared), image) for root, image in unique]
        unique = [(root, replace(image, name=(root / image.name).as_posix())) for root, image in below]
    return [image for _, image in unique], failed


def _in_folder(root: Path, channels: int | None) -> tuple[list[Image], list[str]]:
    folder = Folder.listed(root)
    if _is_data(folder):
        try:
            cases = open_dataset(root, labelled=False).cases
        except UserError as error:
            return [], [str(error)]
        return [Image(case.id, case.images, tuple(path.name for path in case.images)) for case in cases], []
    series, failed = _series_below(root) if is_dicom(folder) else ([], [])
    return series + _from_files(root, [n for n in folder.images if ending(n) != dicom.SUFFIX], channels), failed


def _is_data(folder: Folder) -> bool:
    """Whether it follows a convention that tells its images from its masks; DICOM does by itself."""
    if find_recipe(folder) is not None:
        return True
    first = next((layout for layout in LAYOUTS if layout.recognise(folder) is not None), None)
    return first is not None and first.recognise is not is_dicom


def _from_files(root: Path, names: Iterable[str], channels: int | None) -> list[Image]:
    """Images of the files `names` below `root`; the channels of one lie beside one another."""
    images: dict[tuple[Path, ...], Image] = {}
    for name in names:
        path = root / name
        base, suffix = stem(path), path.name[len(stem(path)) :]
        sources, kept = (path,), name[: len(name) - len(suffix)]
        if base[-5:-4] == "_" and base[-4:].isdecimal():
            siblings = [path.with_name(f"{base[:-4]}{number:04d}{suffix}") for number in range(channels or 1)]
            more = path.with_name(f"{base[:-4]}{len(siblings):04d}{suffix}")  # then the numbers mean something else
            if path in siblings and all(sibling.is_file() for sibling in siblings) and not more.is_file():
                sources, kept = tuple(siblings), kept[:-5]
        called = (*(source.name for source in sources), name, base, Path(kept).name)
        images[sources] = Image(Path(kept).as_posix(), sources, called)
    return list(images.values())


def _series_below(root: Path) -> tuple[list[Image], list[str]]:
    """Every DICOM series below a folder, called as the cases of `--data` are, but for its folders' '/'.

    A damaged file spoils its folder and not the tree.
    """
    series, failed = _find_series(root)
    failed += [f"{one.source} {one.flaw}" for one in series if one.flaw]
    usable = [one for one in series if not one.flaw]
    names, sources = series_names(usable, root), series_sources(usable, series)
    images = [
        Image(names[one.uid], (sources[one.uid],), (one.uid, Path(names[one.uid]).name), one.files) for one in usable
    ]
    return images, failed


def _find_series(folder: Path) -> tuple[list[dicom.Series], list[str]]:
    try:
        return dicom.find_series(folder), []
    except UserError as error:
        below = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda path: natural_order(path.name))
        if not below:
            return [], [str(error)]
        parts = [_find_series(part) for part in below]
        series, failed = [one for part, _ in parts for one in part], [trouble for _, part in parts for trouble in part]
        return series, failed or [str(error)]


# --- which prompts ---------------------------------------------------------------------------------------------------


def assign(prompts: Mapping[str, Sequence[Given]], images: Sequence[Image]) -> tuple[dict[str, list[Given]], list[str]]:
    """Image name → its marks, and names in the file of prompts that no image has.

    UserError where a name could mean several images, or the file is for one image and there are more.
    """
    if ANY_IMAGE in prompts and len(images) != 1:
        source = next((mark.source for mark in prompts[ANY_IMAGE]), "the file of prompts")
        raise UserError(
            f"{source} does not say which of {len(images)} images it is for ({_listed([i.name for i in images])}); "
            "give one image, or a folder with NAME.json or NAME.mrk.json for each"
        )
    by_name, by_other = {image.name: image for image in images}, defaultdict(list)
    for image in images:
        for other in set(image.called):
            by_other[other].append(image)
    assigned: dict[str, list[Given]] = {}
    unknown = []
    for name, marks in prompts.items():
        meant = images if name == ANY_IMAGE else [by_name[name]] if name in by_name else by_other[name]
        if len(meant) > 1:
            raise UserError(f"prompts for {name!r} could mean {meant[0].name} or {meant[1].name}; write one of these")
        if meant:
            assigned.setdefault(meant[0].name, []).extend(marks)
        else:
            unknown.append(name)
    return assigned, unknown


# --- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is wanted of a run."""

    inputs: tuple[Path, ...]
    out: Path
    prompts: str | None = None
    """A file or folder of prompts, or 'auto', or 'text'."""
    format: Format = "same"
    propagate: bool = True
    """Carry what was found on prompted slices to those around."""
    overwrite: bool = False


def predict(run: RunFolder, config: RunConfig, request: Request, progress: Progress | None = None) -> Outcome:
    """Writes a mask for each image that has prompts; one that fails does not stop the others.

    `config` is the run's, with what the user wants otherwise. UserError where nothing can be done at all: for a run,
    prompts or inputs that are not there, where a mask would take the place of an image or of another mask, and of the
    only image.
    """
    if request.out.is_file():
        raise UserError(f"--out {request.out} is a file; give a folder")
    file = _file_of_prompts(run, config, request.prompts)
    model = open_model(run, config)
    read = read_prompts if model.texts is None else read_texts
    prompts = None if file is None else read(file, model.labels)
    images, failed = find_images(request.inputs, model.channels, request.out)
    if not images and len(failed) == 1:
        raise UserError(failed[0])  # there are no others to go on with
    assigned, unknown = _assign(prompts or {}, images, model) if images else ({}, [])
    if images and prompts is not None and not any(assigned.values()):
        raise UserError(_nothing_asked(f"--prompts {file}", unknown, images))
    outcome = Outcome(failed=failed, unknown=unknown)
    record = read_record(request.out)
    made_by = [_sha256(run.adapter / ADAPTER), asdict(model.window), model.axis, config.model.smooth_mm]
    for done, (image, target) in enumerate(zip(images, _targets(images, request), strict=True)):
        if progress is not None and done:  # so that what is wrong with the first stands alone
            progress(done, len(images))
        marks = assigned.get(image.name, [])
        if prompts is not None and not marks:
            outcome.unprompted.append(image.name)
            continue
        name = target.relative_to(request.out).as_posix()
        try:
            made_from = _made_from(made_by, image, marks, request.propagate)
            if target.exists() and not request.overwrite:
                if record.get(name) != made_from:
                    raise UserError(f"{target} is there, made from something else; --overwrite replaces it")
                outcome.done_before += 1
                continue
            case = model.open(image.sources)
            if not name.endswith(case.volume.grid.mask_suffixes):
                raise UserError(
                    f"--format {request.format} cannot hold a mask of {image.sources[0]}; give --format same"
                )
            label, about = _segment(model, case, marks, request.propagate)
            target.unlink(missing_ok=True)  # so that what is recorded is never beside another mask
            _append({"mask": name, "made_from": made_from, **about}, request.out / RECORD)
            case.write(label, target, model.labels)
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            if isinstance(error, UserError) and len(images) == 1 and not failed:
                raise  # there are no others to go on with
            outcome.failed.append(str(error) if isinstance(error, UserError) else f"{image.sources[0]}: {error!r}")
            continue
        outcome.written.append(target)
    if progress is not None:
        progress(len(images), len(images))
    return outcome


def _file_of_prompts(run: RunFolder, config: RunConfig, said: str | None) -> Path | None:
    """What `--prompts` names, or None where there is nothing to read. UserError where the network is not asked so."""
    file = None if said in (None, "auto", "text") else Path(said)
    if asked_by_text(config.model):
        if said == "auto":
            raise UserError(f"--prompts auto: {run.root} is asked by texts; give --prompts text, or FILE.json of texts")
        return file
    if said == "text":
        raise UserError(f"--prompts text: {run.root} has learned no texts (--training-prompts text); leave it out")
    if file is None and config.model.head != "classes":
        raise UserError(
            f"--prompts {said or 'is missing'}: {run.root} segments what it is pointed at; give a file "
            "of clicks, FILE.json or 3D Slicer's FILE.mrk.json (docs/predict.md)"
        )
    if file is not None and config.model.head == "classes":
        raise UserError(
            f"--prompts {file}: {run.root} finds its classes by itself; leave it out, or give --prompts auto"
        )
    return file


def _assign(
    prompts: Mapping[str, Sequence[Any]], images: Sequence[Image], model: Model
) -> tuple[dict[str, list[Any]], list[str]]:
    """As `assign`. Texts that name no image are for every one; all are embedded now, before minutes of work."""
    if model.texts is not None:
        if texts := [one.text for of_image in prompts.values() for one in of_image]:
            model.texts.vectors(texts)
        if ANY_IMAGE in prompts:
            return {image.name: list(prompts[ANY_IMAGE]) for image in images}, []
    return assign(prompts, images)


def _nothing_asked(source: str, unknown: Sequence[str], images: Sequence[Image]) -> str:
    """Why prompts that no image has any of are a mistake."""
    if not unknown:
        return f"{source} has no prompts in it; add clicks or boxes (docs/predict.md)"
    ours = _listed([image.name for image in images])
    return f"{source} is for {_listed(unknown)}, and there is no such image; the input has: {ours}"


def _listed(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)


def _segment(model: Model, case: OpenCase, marks: Sequence[Any], propagate: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """The label map (Z, Y, X), and of it the voxels of each class, how sure the network was, and the time taken."""
    started = time.perf_counter()
    about: dict[str, Any] = {}
    if model.prompted:
        prompts = _place(case, marks, model.labels)
        answers = case.segment(prompts)
        if propagate:
            answers = case.propagate(prompts, answers)
        label = case.label(answers)
        about["quality"] = {k: None if q is None else round(q, 4) for k, q in quality_of(answers, model.labels).items()}
    else:
        texts = {model.labels[one.class_name]: one.text for one in marks}
        asked = model.texts.ask(texts) if model.texts and texts else None
        label = case.label_unprompted(list(model.labels.values()), asked)
    voxels = {name: int(np.count_nonzero(label == number)) for name, number in model.labels.items()}
    return label, {"voxels": voxels, **about, "seconds": round(time.perf_counter() - started, 2)}


def _place(case: OpenCase, marks: Sequence[Mark], labels: Mapping[str, int]) -> list[Prompt]:
    """The marks on their slices. UserError names the mark that is nowhere, or a class's second box on a slice."""
    prompts = [case.place(mark, labels) for mark in marks]
    seen = set()
    for mark, prompt in zip(marks, prompts, strict=True):
        if isinstance(prompt, Box):
            if (prompt.slice_number, prompt.number) in seen:
                raise UserError(f"{mark.source}: its slice has a box of {mark.class_name} already; leave one")
            seen.add((prompt.slice_number, prompt.number))
    return prompts


def _targets(images: Sequence[Image], request: Request) -> list[Path]:
    """Where the masks go; UserError where that is an image, or one place for two."""
    targets = [request.out / f"{image.name}{image.mask_suffix(request.format)}" for image in images]
    sources = {source.resolve() for image in images for source in image.sources}
    known: dict[Path, Image] = {}
    for image, target in zip(images, targets, strict=True):
        if target.resolve() in sources:
            raise UserError(f"--out {request.out}: the mask would take the place of {target}; give another folder")
        if known.setdefault(target, image) is not image:
            raise UserError(
                f"{known[target].sources[0]} and {image.sources[0]} would both become {target}; "
                "predict them into folders of their own"
            )
    return targets


# --- what was done ---------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, str]:
    """Mask → what it was made from (`_made_from`), by the last word on each; a line that was cut off says nothing."""
    path = folder / RECORD
    made = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)
            made[said["mask"]] = said["made_from"]
    return made


def _append(said: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(said, ensure_ascii=False) + "\n")


def _made_from(made_by: Sequence[Any], image: Image, marks: Sequence[Mark | TextPrompt], propagate: bool) -> str:
    """sha256 (hex) of all that a mask follows from. Of files it is their names and sizes: they may be moved."""
    paths = image.files or [path for source in image.sources for path in source_files(source)]
    files = [(path.name, path.stat().st_size) for path in paths]
    asked = [
        (mark.class_name, mark.text)
        if isinstance(mark, TextPrompt)
        else (mark.class_name, mark.coordinates, mark.corners, mark.positive)
        for mark in marks
    ]
    return hashlib.sha256(json.dumps([made_by, files, asked, propagate]).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
