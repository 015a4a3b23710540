"""A folder's convention → Dataset: which files make a case, what is labelled, who trains and who tests.

Named datasets (recipes.py) go first, then the conventions, each recognised by what is in the folder. A new convention
is one more entry of `LAYOUTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cheaplunch.data.conventions.arrays import is_arrays, read_arrays
from cheaplunch.data.conventions.bids import is_bids, read_bids
from cheaplunch.data.conventions.dicoms import is_dicom, read_dicom
from cheaplunch.data.conventions.nnunet import is_decathlon, is_nnunet, read_decathlon, read_nnunet
from cheaplunch.data.conventions.pairs import (
    is_plain,
    is_table,
    mask_beside,
    read_pairs,
    read_plain,
    read_table,
    read_unlabelled,
)
from cheaplunch.data.dataset import Case, Dataset, Folder, Split, patients, split_by_patient
from cheaplunch.data.names import natural_order
from cheaplunch.data.recipes import find_recipe
from cheaplunch.errors import UserError

__all__ = [
    "LAYOUTS",
    "Case",
    "Dataset",
    "Layout",
    "Split",
    "natural_order",
    "open_dataset",
    "patients",
    "split_by_patient",
]


@dataclass(frozen=True)
class Layout:
    name: str
    recognise: Callable[[Folder], str | None]  # what in the folder made it so, or None
    read: Callable[[Folder], Dataset]


DICOM = "DICOM tree"
LAYOUTS = (
    Layout("Medical Segmentation Decathlon", is_decathlon, read_decathlon),
    Layout("nnU-Net raw", is_nnunet, read_nnunet),
    Layout("slices as arrays", is_arrays, read_arrays),
    Layout("BIDS", is_bids, read_bids),
    Layout(DICOM, is_dicom, read_dicom),
    Layout("table of pairs", is_table, read_table),
    Layout("images and masks", is_plain, read_plain),
)
UNLABELLED = "images without masks"


def open_dataset(root: Path, labelled: bool = True) -> Dataset:
    """Recognise the folder, or the CSV of pairs, by what is in it and list its cases.

    `labelled=False` takes images without masks too. Raises UserError, one line that names the file and the way out,
    where the folder is missing or empty, follows no known convention, or lacks a file.
    """
    root = Path(root)
    if root.suffix.lower() == ".csv" and not root.is_dir():
        return replace(read_pairs(root), layout="table of pairs", why=f"{root.name} lists images and masks")
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give the one with the images and their masks")
    folder = Folder.listed(root)
    if not folder.files:
        raise UserError(
            f"--data {root}: the folder is empty; put images and their masks into it (docs/datasets.md says how they "
            "may lie), or give another"
        )
    dataset = find_recipe(folder) or _by_layout(folder)
    if dataset is None:
        raise UserError(
            f"--data {root}: {_count(len(folder.files), 'file')} ({folder.files[0]} first) and not one image that is "
            "read; docs/datasets.md lists the layouts and formats that are"
        )
    if labelled and not any(case.label is not None for case in dataset.cases):
        raise UserError(f"--data {root}: {_unlabelled(dataset)}")
    return dataset


def _unlabelled(dataset: Dataset) -> str:
    """What there is instead of labels, and what would be one."""
    if dataset.layout == DICOM:
        return (
            f"{len(dataset.cases)} DICOM series and no DICOM SEG drawn on one of them; put a SEG below the folder for "
            "each that is labelled (docs/clinic.md says how it is made)"
        )
    first = dataset.cases[0].images[0]
    return (
        f"{_count(len(dataset.cases), 'image')} and not one mask; put {mask_beside(first)} beside {first.name}, and so "
        "on, or the masks into masks/ and the images into images/"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _by_layout(folder: Folder) -> Dataset | None:
    for layout in LAYOUTS:
        why = layout.recognise(folder)
        if why is not None:
            return replace(layout.read(folder), layout=layout.name, why=why)
    if folder.images:
        why = f"{len(folder.images)} images, and no file that looks like a mask"
        return replace(read_unlabelled(folder), layout=UNLABELLED, why=why)
    return None
