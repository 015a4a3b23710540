"""Prompts from files: our own JSON, and the point lists of 3D Slicer. docs/predict.md describes both for their writers.

Ours is one object, image name → list of entries, or for one image that list alone:

    {"class": NAME, "voxel": [i, j, k], "label": 1}                    a click; label 0 is off the target (default: 1)
    {"class": NAME, "box": {"voxel": [[i, j, k], [i, j, k]]}}          a box by two opposite corners, both inside it

`world_ras` or `world_lps` may stand for `voxel`. A picture's voxels are [x, y]. A network that is asked by texts takes
these instead, and a list alone is then for every image:

    {"class": NAME, "text": "the large organ on the right"}
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cheaplunch.data.volume import Coordinates
from cheaplunch.errors import UserError
from cheaplunch.interactive import Mark

ANY_IMAGE = ""
"""Stands for the image's name where a file is for one image and does not name it."""

SLICER_SUFFIX = ".mrk.json"
_SPACES = typing.get_args(Coordinates)
_NO_PLACE = 1e9  # nor are inf, NaN and whole numbers of hundreds of digits, which JSON has too


@dataclass(frozen=True)
class TextPrompt:
    """What a class is asked for with, on every slice of an image."""

    class_name: str
    text: str
    source: str = field(default="a prompt", compare=False)
    """What messages call it."""


Given = TypeVar("Given", Mark, TextPrompt)


def read_prompts(path: Path, classes: Collection[str]) -> dict[str, list[Mark]]:
    """Image name → its marks; ANY_IMAGE where the file does not say which.

    Of a folder each file in it, named NAME.json or NAME.mrk.json as the image NAME is. UserError, one line that names
    the file and the entry, for anything that does not follow the format or names none of the `classes`.
    """
    return _read(path, classes, _mark)


def read_texts(path: Path, classes: Collection[str]) -> dict[str, list[TextPrompt]]:
    """As `read_prompts`, of texts; UserError also where a class has two for one image."""
    found = _read(path, classes, _text)
    for texts in found.values():
        asked = set[str]()
        for one in texts:
            if one.class_name in asked:
                raise UserError(f"{one.source}: {one.class_name} has a text for this image already; leave one")
            asked.add(one.class_name)
    return found


ReadEntry = Callable[[str, Any, Collection[str]], Given]
"""(What messages call it, an entry, the classes) → what it says; UserError where that is nothing."""


def _read(path: Path, classes: Collection[str], entry: ReadEntry[Given]) -> dict[str, list[Given]]:
    if not path.is_dir():
        return _read_file(path, classes, entry)
    marks: dict[str, list[Given]] = {}
    for file in sorted(p for p in path.iterdir() if p.name.endswith(".json") and not p.name.startswith(".")):
        image = file.name.removesuffix(".json").removesuffix(".mrk")
        for name, of_image in _read_file(file, classes, entry).items():
            if name not in (ANY_IMAGE, image):
                raise UserError(f"{file} is for the image {name!r}; in a folder of prompts give each image a file")
            marks.setdefault(image, []).extend(of_image)
    if not marks:
        raise UserError(f"--prompts {path} has no prompts in it; put NAME.json or NAME.mrk.json there for each image")
    return marks


def _read_file(path: Path, classes: Collection[str], read_entry: ReadEntry[Given]) -> dict[str, list[Given]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise UserError(f"--prompts {path}: no such file; give a .json of prompts, or 3D Slicer's .mrk.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path} is no JSON: {error}") from None
    if isinstance(content, dict) and "markups" in content:
        if read_entry is not _mark:
            raise UserError(f"--prompts {path} has points, and the run is asked by texts: {_TEXT_FORM}")
        return {ANY_IMAGE: _slicer_marks(path, content["markups"], classes)}  # pyright: ignore[reportReturnType]
    if isinstance(content, list):
        content = {ANY_IMAGE: content}
    if not isinstance(content, dict) or not all(isinstance(entries, list) for entries in content.values()):
        raise UserError(f"{path} is no file of prompts; write {{IMAGE: [{{'class': NAME, 'voxel': [i, j, k]}}, …]}}")
    marks = {}
    for image, entries in content.items():
        of = f" of {image!r}" if image else ""
        marks[image] = [
            read_entry(f"{path}, entry {n}{of}", entry, classes) for n, entry in enumerate(entries, start=1)
        ]
    return marks


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON itself would forget all but the last of two lists for one image."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice; make it one")
    return found


# --- our own ---------------------------------------------------------------------------------------------------------


_MARK_FORM = "write {'class': NAME, 'voxel': [i, j, k]}"
_TEXT_FORM = "write {'class': NAME, 'text': 'what it is'}"


def _text(source: str, entry: Any, classes: Collection[str]) -> TextPrompt:
    name = _class_in(source, entry, classes, _TEXT_FORM)
    text = entry.get("text")
    if entry.keys() != {"class", "text"} or not isinstance(text, str) or not text.strip():
        raise UserError(f"{source}: the run is asked by texts; {_TEXT_FORM}")
    return TextPrompt(name, " ".join(text.split()), source)


def _class_in(source: str, entry: Any, classes: Collection[str], form: str) -> str:
    if not isinstance(entry, dict):
        raise UserError(f"{source} is no object; {form}")
    if not isinstance(entry.get("class"), str) or entry["class"] not in classes:
        raise UserError(f'{source}: "class" is {entry.get("class")!r}; choose of: {", ".join(classes)}')
    return entry["class"]


def _mark(source: str, entry: Any, classes: Collection[str]) -> Mark:
    name = _class_in(source, entry, classes, _MARK_FORM)
    if "text" in entry:
        raise UserError(f"{source} has a text, and the run has learned none (--training-prompts text); {_MARK_FORM}")
    unknown = sorted(entry.keys() - {"class", "label", "box", *_SPACES})
    if unknown:
        raise UserError(f"{source} has {unknown[0]!r}, which says nothing here; leave it out")
    places: list[Any] = [key for key in ("box", *_SPACES) if key in entry]
    label = entry.get("label", 1)
    if len(places) != 1:
        raise UserError(f"{source} needs one of: {', '.join(_SPACES)}, box")
    if label not in (0, 1) or isinstance(label, float):
        raise UserError(f'{source}: "label" is {label!r}; 1 is on the target, 0 off it')
    if places != ["box"]:
        place = _place(source, entry[places[0]], places[0])
        return Mark(name, places[0], (place,), bool(label), source)
    box = entry["box"]
    if not (isinstance(box, dict) and len(box) == 1 and next(iter(box)) in _SPACES):
        raise UserError(f"{source}: a box is {{'voxel': [[i, j, k], [i, j, k]]}}, or world_ras or world_lps")
    if not label:
        raise UserError(f"{source} is a box with label 0; a box is always around the target")
    [(coordinates, corners)] = box.items()
    if not (isinstance(corners, list) and len(corners) == 2):
        raise UserError(f"{source}: a box has two opposite corners")
    first, second = (_place(source, corner, coordinates) for corner in corners)
    return Mark(name, coordinates, (first, second), source=source)


def _place(source: str, numbers: Any, coordinates: str) -> tuple[float, ...]:
    counts = (2, 3) if coordinates == "voxel" else (3,)
    wanted = "three numbers (for a picture two)" if coordinates == "voxel" else "three numbers, in mm"
    if not isinstance(numbers, list) or len(numbers) not in counts:
        raise UserError(f"{source}: {coordinates} takes {wanted}, not {json.dumps(numbers)[:60]}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < _NO_PLACE:
            raise UserError(f"{source}: {coordinates} takes {wanted}, not {repr(number)[:60]}")
    return tuple(float(number) for number in numbers)


# --- 3D Slicer's -----------------------------------------------------------------------------------------------------


def _slicer_marks(path: Path, lists: Any, classes: Collection[str]) -> list[Mark]:
    """Of Slicer's markups JSON, version 1: point lists in mm, whose points say the class by their label.

    `liver`, and `liver-1` as Slicer numbers the points of a list called liver; a leading '-', or the description
    "negative", takes away.
    """
    if not isinstance(lists, list) or not all(isinstance(markup, dict) for markup in lists):
        raise UserError(f"{path} has no list of markups; save the point list in 3D Slicer once more")
    marks = []
    for number, markup in enumerate(lists, start=1):
        source, kind, system = f"{path}, list {number}", markup.get("type"), markup.get("coordinateSystem", "LPS")
        if kind != "Fiducial":
            raise UserError(f"{source} is a {kind}; only point lists (Fiducial) are read")
        if system not in ("LPS", "RAS"):
            raise UserError(f"{source} has the coordinate system {system!r}; save it as LPS or RAS")
        if markup.get("coordinateUnits", "mm") not in ("mm", ["mm", "mm", "mm"]):
            raise UserError(f"{source} is in {markup['coordinateUnits']}; save it in mm")
        points = markup.get("controlPoints", [])
        if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
            raise UserError(f"{source} has no list of control points; save it in 3D Slicer once more")
        for place, point in enumerate(points, start=1):
            if point.get("positionStatus", "defined") != "defined":
                continue  # begun and never placed
            label = str(point.get("label", ""))
            name, positive = _class_of(label, classes)
            if name is None:
                raise UserError(
                    f"{source}, point {place}: its label {label!r} names no class; rename it to one of: "
                    f"{', '.join(classes)} (with a leading '-' to take away)"
                )
            positive = positive and str(point.get("description", "")).strip().lower() != "negative"
            said = f"{source}, point {place} ({label})"
            corner = _place(said, point.get("position"), coordinates := f"world_{system.lower()}")
            marks.append(Mark(name, typing.cast(Coordinates, coordinates), (corner,), positive, said))
    return marks


def _class_of(label: str, classes: Collection[str]) -> tuple[str | None, bool]:
    """The class that a label means, and whether it adds."""
    word = label.strip()
    positive = not word.startswith("-")
    word = word.removeprefix("-").strip()
    for name in (word, re.sub(r"[-_ ]\d+$", "", word)):
        if name in classes:
            return name, positive
    return None, positive
