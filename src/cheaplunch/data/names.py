"""What the names of files say."""

import re
from pathlib import Path

from cheaplunch.data.volume import SUFFIXES


def natural_order(text: str) -> list[str | int]:
    """Sorting key under which case_2 comes before case_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def ending(path: Path | str) -> str:
    """The ending that names the format, lower case ('.nii.gz' as a whole); a folder, one DICOM series, has '.dcm'."""
    name = str(path).lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default=".dcm")


def stem(path: Path | str) -> str:
    """The file's name without the ending that names the format."""
    name = Path(path).name
    return name[: len(name) - len(ending(name))] if name.lower().endswith(ending(name)) else name
