"""A data set as a raw folder of nnU-Net v2, with the exemplars alone to train on: nnU-Net on the same slices.

Every image is written anew with its slices in one order, the slice's number last, and its intensities as they are,
because nnU-Net normalises them itself. An exemplar is a volume of one slice, so nnU-Net's `2d` configuration trains on
just that slice; test images are whole. Labels are numbered from 1 without gaps, as nnU-Net demands. The folder is one
that `evaluate --data` reads, and in it predictions have the numbers and the grid that they were made with.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cheaplunch.config import RunConfig
from cheaplunch.data.cases import read_checked
from cheaplunch.data.dataset import Case, Dataset
from cheaplunch.data.formats import write_nifti, write_picture
from cheaplunch.data.index import Progress, in_order
from cheaplunch.data.slices import Axis, Places, to_slices
from cheaplunch.data.volume import NOWHERE, lone_slice, read_grid
from cheaplunch.errors import UserError
from cheaplunch.exemplars import write_exemplars
from cheaplunch.files import whole_folder, write_json, write_text
from cheaplunch.material import choose_exemplars

NUMBER = 501  # of the dataset, where `out` names none; nnU-Net leaves those from 500 on to users

_DATASET = re.compile(r"Dataset(\d{3})_.+")
# A lone slice is thicker than its pixels are wide: nnU-Net takes slices across the axis of the largest spacing, the
# first of equals, and would turn those of isotropic volumes, or those cut along their coarse axis, into lines.
_THICKER = 1.01


@dataclass(frozen=True)
class Labels:
    """The classes as nnU-Net is told of them."""

    table: dict[str, int | list[int]]  # of dataset.json: background 0, classes or regions, ignore last
    lookup: np.ndarray  # (256,) uint8: the data's number → nnU-Net's
    order: list[int] | None = None  # regions_class_order: what nnU-Net writes for each region, a later one on top


@dataclass(frozen=True)
class Writer:
    """Writes cases below `folder` as nnU-Net reads them."""

    folder: Path
    dataset: Dataset
    axis: Axis
    lookup: np.ndarray
    suffix: str

    def write(self, case: Case, slices: Sequence[int] | None) -> None:
        """The whole of a case, or each of some slices of it as a case of its own."""
        volume, label = read_checked(case, self.dataset, self.axis)
        images = to_slices(volume.array, self.axis)  # (N, C, H, W)
        in_patient = volume.grid.affine is not None
        affine = Places(volume.grid, self.axis).affine("world_ras") if in_patient else NOWHERE
        parts = {case.id: slice(None)}
        if slices is not None:
            parts = {slice_id(case.id, n, len(images)): slice(n, n + 1) for n in slices}
        side = "Tr" if case.split == "train" else "Ts"
        for id_, part in parts.items():
            own = affine if slices is None else lone_slice(affine, part.start, _THICKER)
            for channel in range(images.shape[1]):
                self._save(images[part, channel], own, f"images{side}", f"{id_}_{channel:04d}")
            if label is not None:
                self._save(self.lookup[to_slices(label, self.axis)[part]], own, f"labels{side}", id_)

    def _save(self, planes: np.ndarray, affine: np.ndarray, part: str, name: str) -> None:
        """(N, H, W)"""
        path = self.folder / part / f"{name}{self.suffix}"
        path.parent.mkdir(exist_ok=True)
        if self.suffix == ".png":
            write_picture(planes.astype(np.min_scalar_type(int(planes.max()))), path)
        else:
            write_nifti(planes.transpose(2, 1, 0), affine, None, path)


def export_nnunet(
    config: RunConfig, out: Path, read: Progress | None = None, written: Progress | None = None
) -> tuple[Path, bool]:
    """Chooses the exemplars and writes the raw folder; returns it, and whether it has test images.

    The folder is `out` where that has a name as nnU-Net wants it, such as Dataset501_Liver, or else one inside. Under
    the strategy `all` every training case is written whole. Of the test cases those with a label are written, or all
    where none has one. Raises UserError where `out` is not empty or the data is not in order; `out` appears whole or
    not at all.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out {out} is {'a file' if out.is_file() else 'not empty'}; give a new folder")
    dataset, index, exemplars = choose_exemplars(config, read)
    labels = number_labels(dataset)
    whole = config.data.strategy == "all" and config.data.exemplar_file is None
    slices = {key.case_id: [k.slice_number for k in exemplars if k.case_id == key.case_id] for key in exemplars}
    training = [case for case in dataset.split("train") if whole or case.id in slices]
    tests = dataset.split("test")
    tests = [case for case in tests if case.label is not None] or list(tests)
    jobs: list[tuple[Case, list[int] | None]] = [(case, None if whole else slices[case.id]) for case in training]
    jobs += [(case, None) for case in tests]
    count = len(training) if whole else len(exemplars)

    inside = "." if _DATASET.fullmatch(out.resolve().name) else f"Dataset{NUMBER}_{_word(dataset.name)}"
    with whole_folder(out.resolve()) as unfinished:
        folder = unfinished / inside
        folder.mkdir(exist_ok=True)
        writer = Writer(folder, dataset, config.data.axis, labels.lookup, file_ending([*training, *tests]))
        for done, _ in enumerate(in_order(lambda job: writer.write(*job), jobs), start=1):
            if written is not None:
                written(done, len(jobs))
        write_json(_about(dataset, labels, count, writer.suffix), folder / "dataset.json")
        write_text(_readme(dataset, labels, out / inside, bool(tests)), folder / "README.md")
        if not whole:
            write_exemplars(folder / "exemplars.csv", index, exemplars)
    return out / inside, bool(tests)


def next_steps(folder: Path, tested: bool) -> list[str]:
    """Commands for a shell, from the raw folder to scores."""
    number, root = int(_DATASET.fullmatch(folder.resolve().name)[1]), folder.parent  # pyright: ignore
    places = {"raw": root, "preprocessed": root / "nnUNet_preprocessed", "results": root / "nnUNet_results"}
    quoted = {name: shlex.quote(str(path)) for name, path in places.items()}
    images, masks, own = (shlex.quote(str(p)) for p in (folder / "imagesTs", root / f"predicted_{number}", folder))
    steps = [
        "export " + " ".join(f"nnUNet_{name}={path}" for name, path in quoted.items()),
        f"nnUNetv2_plan_and_preprocess -d {number} -c 2d --verify_dataset_integrity",
        f"nnUNetv2_train {number} 2d all",
    ]
    if tested:
        steps += [
            f"nnUNetv2_predict -d {number} -c 2d -f all -i {images} -o {masks}",
            f"cheaplunch evaluate --predictions {masks} --label nnU-Net --data {own} --out nnunet.json",
        ]
    return steps


# --- numbers ---------------------------------------------------------------------------------------------------------


def number_labels(dataset: Dataset) -> Labels:
    """1…K in the order of the data's own numbers, K + 1 for `ignore`, which nnU-Net wants to be the largest."""
    lookup = np.zeros(256, np.uint8)
    for new, old in enumerate(sorted(dataset.labels.values()), start=1):
        lookup[old] = new
    table: dict[str, int | list[int]] = {"background": 0}
    order = None
    if dataset.regions:
        # Where all that a region has is in larger ones too, it lies on top of them.
        regions = {name: sorted(lookup[list(old)].tolist()) for name, old in dataset.regions.items()}
        regions = dict(sorted(regions.items(), key=lambda region: -len(region[1])))
        table |= regions
        order = _written_over_each_other(regions, dataset.root)
    else:
        table |= {name: int(lookup[old]) for name, old in dataset.labels.items()}
    if dataset.ignore is not None:
        table["ignore"] = int(lookup.max()) + 1
        lookup[dataset.ignore] = table["ignore"]
    return Labels(table, lookup, order)


def _written_over_each_other(regions: Mapping[str, Sequence[int]], root: Path) -> list[int]:
    """The number that each region is written with, so that those written over one another tell all regions again.

    Raises UserError where no numbers do: two regions overlap, and neither is a part of the other.
    """
    members = list(regions.values())
    top = {number: max(i for i, m in enumerate(members) if number in m) for m in members for number in m}
    written = [min([n for n, last in top.items() if last == i] or m) for i, m in enumerate(members)]
    for number, last in top.items():
        if any((number in m) != (written[last] in m) for m in members):
            raise UserError(
                f"--data {root}: nnU-Net cannot learn regions that overlap in part; choose some with --classes"
            )
    return written


# --- files -----------------------------------------------------------------------------------------------------------


def file_ending(cases: Sequence[Case]) -> str:
    """.png where every image is a picture of whole numbers that PNG holds, else .nii.gz, for there is one for all."""
    grids = [read_grid(case.images) for case in cases]
    flat = all(grid.affine is None and grid.array_shape[1] == 1 for grid in grids)
    return ".png" if flat and all(grid.dtype in (np.uint8, np.uint16, bool) for grid in grids) else ".nii.gz"


def slice_id(case_id: str, number: int, count: int) -> str:
    """A case of one slice keeps its name."""
    return case_id if count == 1 else f"{case_id}_slice{number:03d}"


def _word(name: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "", name) or "Data"


def _about(dataset: Dataset, labels: Labels, count: int, suffix: str) -> dict[str, Any]:
    """dataset.json: nnU-Net's keys, ours about where the data is from, and the numbers it had there."""
    said = {
        "name": dataset.name,
        "description": dataset.description,
        "reference": dataset.citation,
        "licence": dataset.license,
    }
    about: dict[str, Any] = {key: text for key, text in said.items() if text}
    about |= {
        "channel_names": {str(channel): name for channel, name in enumerate(dataset.channel_names)},
        "labels": labels.table,
        "numTraining": count,
        "file_ending": suffix,
        "original_numbers": original_numbers(dataset, labels),
    }
    if labels.order is not None:
        about["regions_class_order"] = labels.order
    if suffix == ".nii.gz":
        about["overwrite_image_reader_writer"] = "NibabelIO"  # takes every affine, and gives back the same
    return about


def original_numbers(dataset: Dataset, labels: Labels) -> dict[str, int]:
    """nnU-Net's number, as text, → the data's."""
    old = [*sorted(dataset.labels.values()), *([] if dataset.ignore is None else [dataset.ignore])]
    return {str(labels.lookup[number]): number for number in old}


def _readme(dataset: Dataset, labels: Labels, folder: Path, tested: bool) -> str:
    names = {number: name for name, number in dataset.labels.items()} | {dataset.ignore: "ignore"}
    rows = [f"| {names[old]} | {new} | {old} |" for new, old in original_numbers(dataset, labels).items()]
    return "\n".join(
        [
            f"# {dataset.name} for nnU-Net v2",
            "",
            "Written by `cheaplunch export-nnunet`. In an environment with nnunetv2:",
            "",
            "```sh",
            *next_steps(folder, tested),
            "```",
            "",
            "Predictions have the numbers below. Against this folder they are scored as they are; for use with the",
            "data itself, renumber them where the two differ.",
            "",
            "| class | here | in the data |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )
