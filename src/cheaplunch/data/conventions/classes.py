"""What the values or colours of masks mean: from a small file beside them, or else from the masks themselves."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheaplunch.data.labels import Colours, Numbers, Rule, guess_rule
from cheaplunch.errors import UserError

FILES = ("classes.csv", "palette.json", "label_colors.txt", "class_dict.csv", "classes.json", "labels.json")

_BACKGROUND = ("background", "unlabelled", "unlabeled", "void", "none")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """What masks mean: names and numbers, how to read them, and where that was learned."""

    labels: dict[str, int]
    rule: Rule
    source: str


def find_classes(root: Path, masks: Sequence[Path]) -> Classes:
    """Of masks with one file an image. Raises UserError where neither a file nor the masks say what is what."""
    path = classes_file(root)
    if path is None:
        labels, rule = guess_rule(masks)
        return Classes(labels, rule, "the values in the masks")
    rows = read_classes(path)
    if any(colour is not None for _, colour, _ in rows):
        return _by_colour(rows, path)
    labels = {}
    for place, (name, _, number) in enumerate(rows):
        number = _next_number(rows, place) if number is None else number
        if number in labels.values():
            raise UserError(f"{path}: two classes have the number {number}; give each its own")
        if number != 0:
            labels[name] = number
    if not labels:
        raise UserError(f"{path} names no class but background: name what is to be segmented")
    # A list of names says nothing of masks that hold 0 and 255 for the only one of them.
    rule = guess_rule(masks)[1] if list(labels.values()) == [1] else Numbers()
    return Classes(labels, rule, path.name)


def classes_file(root: Path) -> Path | None:
    found = [root / name for name in FILES if (root / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} both name the classes: keep one")
    return found[0] if found else None


def read_classes(path: Path) -> list[tuple[str, Colour | None, int | None]]:
    """(name, colour, number) of each class as the file has them; UserError where it is of no known form."""
    readers = {".json": _from_json, ".csv": _from_csv, ".txt": _from_text}
    try:
        rows = list(readers[path.suffix](path.read_text(encoding="utf-8-sig")))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} is not understood ({error}): write it as CSV with the columns name, r, g, b or name, number"
        ) from error
    if not rows:
        raise UserError(f"{path} names no class: write it as CSV with the columns name, r, g, b or name, number")
    for name, colour, number in rows:
        if any(not 0 <= value <= 255 for value in (*(colour or ()), number or 0)):
            raise UserError(f"{path}: class {name!r} has {colour or number}; colours and numbers run from 0 to 255")
    return rows


def _by_colour(rows: list[tuple[str, Colour | None, int | None]], path: Path) -> Classes:
    labels: dict[str, int] = {}
    palette: dict[Colour, int] = {}
    for name, colour, number in rows:
        if colour is None:
            raise UserError(f"{path}: class {name!r} has no colour; give it r, g and b")
        if colour in palette:
            raise UserError(f"{path}: two classes have the colour {colour}; give each its own")
        background = colour == (0, 0, 0) or name.lower() in _BACKGROUND
        palette[colour] = 0 if background else number or len(labels) + 1
        if not background:
            labels[name] = palette[colour]
    if not labels:
        raise UserError(f"{path} names no class but background: name what is to be segmented")
    return Classes(labels, Colours(tuple(palette.items())), path.name)


def _next_number(rows: Sequence[tuple[str, Any, Any]], place: int) -> int:
    """Names without numbers count from 0 where the first is the background, else from 1."""
    return place + (rows[0][0].lower() not in _BACKGROUND)


def _from_json(text: str) -> Iterator[tuple[str, Colour | None, int | None]]:
    """{"name": [r, g, b]}, {"name": number} or a list of {"name", "color", "id"}, or of names."""
    table = json.loads(text)
    if isinstance(table, dict):
        table = [{"name": name, "value": value} for name, value in table.items()]
    for entry in table:
        entry = entry if isinstance(entry, dict) else {"name": entry}
        value = next((entry[key] for key in ("value", "color", "colour", "rgb") if key in entry), None)
        number = next((int(entry[key]) for key in ("number", "id", "index") if key in entry), None)
        if isinstance(value, list):
            yield str(entry["name"]), _colour(value), number
        else:
            yield str(entry["name"]), None, number if value is None else int(value)


def _from_csv(text: str) -> Iterator[tuple[str, Colour | None, int | None]]:
    """Columns name, and r, g, b, and number; only the first is needed."""
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}

    def find(*names: str) -> str | None:
        return next((columns[name] for name in names if name in columns), None)

    name, number = find("name", "class", "label", "class_name"), find("number", "id", "index", "value")
    colour = [find(*names) for names in (("r", "red"), ("g", "green"), ("b", "blue"))]
    if name is None:
        raise ValueError("no column 'name'")
    for row in rows:
        mixed = [row[column] for column in colour if column is not None]
        yield row[name].strip(), _colour(mixed) if mixed else None, int(row[number]) if number else None


def _from_text(text: str) -> Iterator[tuple[str, Colour | None, int | None]]:
    """A line a class: three numbers and a name, in either order (CamVid's label_colors.txt has the colour first)."""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        parts = re.split(r"[\s,;:]+", line.strip())
        if all(part.isdecimal() for part in parts[:3]):
            colour, name = parts[:3], parts[3:]
        else:
            colour, name = parts[-3:], parts[:-3]
        yield " ".join(name), _colour(colour), None


def _colour(values: Sequence[Any]) -> Colour:
    red, green, blue = (int(value) for value in values)
    return red, green, blue
