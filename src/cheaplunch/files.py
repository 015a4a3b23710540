"""Files and folders that appear whole or not at all, and where a user's cache is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNFINISHED = re.compile(r"^\..+\.\d+\.unfinished")


def cache_folder() -> Path:
    """`$CHEAPLUNCH_CACHE`, or `cheaplunch` in the user's cache folder."""
    base = os.environ.get("CHEAPLUNCH_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cheaplunch"


@contextmanager
def whole_or_nothing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary path to write to, beside `path`, that takes its place once the block ends without an error.

    It ends in `suffix` where the writer goes by that. The folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished{suffix}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:  # on the disk before it has the name: power may fail between the two
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, beside `path`, that becomes it once the block ends without an error, and goes away else.

    `path` may be there already, empty. The folder around it is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir()
        yield unfinished
        if path.is_dir():
            path.rmdir()
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed process left half-written below `folder`; none may be writing there."""
    for leftover in folder.rglob(".*"):
        if leftover.is_file() and UNFINISHED.search(leftover.name):
            leftover.unlink()


def write_text(text: str, path: Path) -> None:
    with whole_or_nothing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(value: Any, path: Path) -> None:
    """Raises ValueError for nan or inf, which JSON does not have."""
    write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", path)
