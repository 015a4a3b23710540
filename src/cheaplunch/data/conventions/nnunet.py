"""nnU-Net raw folders (versions 1 and 2) and the Medical Segmentation Decathlon: a dataset.json beside imagesTr."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cheaplunch.data.dataset import Case, Dataset, Folder, Split, are_pictures, make_dataset, patients
from cheaplunch.data.labels import label_map
from cheaplunch.data.names import natural_order, stem
from cheaplunch.data.volume import PICTURE_SUFFIXES, SUFFIXES, suffix_of
from cheaplunch.errors import UserError

DECATHLON = "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022)"

# --- nnU-Net ---------------------------------------------------------------------------------------------------------


def is_nnunet(folder: Folder) -> str | None:
    root = folder.root
    sides = [name for name in ("imagesTr", "labelsTr", "imagesTs") if (root / name).is_dir()]
    if not sides:
        return None
    return " and ".join([name for name in ("dataset.json",) if (root / name).is_file()] + sides[:1]) + " are here"


def read_nnunet(folder: Folder) -> Dataset:
    """nnU-Net raw: imagesTr/ID_0000.ext, labelsTr/ID.ext, imagesTs, labelsTs, dataset.json."""
    root = folder.root
    about = read_json(root / "dataset.json")
    labels, regions, ignore = read_labels(about, root / "dataset.json")
    channels = read_channels(about, root / "dataset.json")
    suffix = about.get("file_ending") or _ending(root)
    if suffix not in SUFFIXES:
        raise UserError(
            f"{root / 'dataset.json'}: file_ending {suffix!r} is not read; use one of {', '.join(SUFFIXES)}"
        )

    cases = _cases(root, "Tr", channels, suffix)
    if not cases:
        raise UserError(f"{root / 'imagesTr'} has no ID_0000{suffix}: put the training images there")
    test = _cases(root, "Ts", channels, suffix)
    return _dataset(
        root,
        about,
        cases + test,
        labels,
        channels,
        rule="imagesTr trains and imagesTs tests, as the folder has it" if test else "no imagesTs: {}",
        regions=regions,
        ignore=ignore,
    )


def _cases(root: Path, side: str, channels: tuple[str, ...], suffix: str) -> list[Case]:
    """The cases of imagesTr ('Tr') or imagesTs ('Ts'), the patient still unknown."""
    images, labels = root / f"images{side}", root / f"labels{side}"
    if not images.is_dir():
        return []
    files = {p.name for p in images.iterdir() if not p.name.startswith(".")}
    named = {m[1] for name in files if (m := re.fullmatch(rf"(.+)_\d{{4}}{re.escape(suffix)}", name))}
    cases = []
    for id_ in sorted(named, key=natural_order):
        names = [f"{id_}_{c:04d}{suffix}" for c in range(len(channels))]
        if suffix in PICTURE_SUFFIXES and len(channels) == 3 and not files & set(names[1:]):
            names = names[:1]  # one RGB picture holds the three
        for number, name in enumerate(names):
            if name not in files:
                raise UserError(f"{images / name} is missing: it is {id_}'s channel {channels[number]!r}")
        label = labels / f"{id_}{suffix}"
        if not label.is_file():
            if side == "Tr" or labels.is_dir():
                raise UserError(f"{label} is missing: label {id_} or move its image out of {images.name}")
            label = None
        paths = tuple(images / name for name in names)
        split: Split = "train" if side == "Tr" else "test"
        cases.append(Case(id_, paths, label_map(label) if label else None, split, id_))
    return cases


def _dataset(
    root: Path, about: dict, cases: list[Case], labels: dict[str, int], channels: tuple[str, ...], rule: str, **more
) -> Dataset:
    """`rule` has '{}' where the split is to be made, by patient."""
    patient_of = patients([case.id for case in cases], are_pictures(cases))
    cases = [Case(c.id, c.images, c.label, c.split, patient_of[c.id]) for c in cases]
    made = make_dataset(
        root,
        cases=cases,
        labels=labels,
        channel_names=channels,
        split_rule=None if "{}" in rule else rule,
        name=str(about.get("name") or root.resolve().name),
        description=str(about.get("description", "")),
        license=str(about.get("licence") or about.get("license") or ""),
        citation=str(about.get("reference", "")),
        **more,
    )
    return replace(made, split_rule=rule.format(made.split_rule)) if "{}" in rule else made


def _ending(root: Path) -> str:
    """The ending of the first training image, where dataset.json (nnU-Net 1) does not say it."""
    images = root / "imagesTr"
    names = sorted(p for p in images.iterdir() if not p.name.startswith(".")) if images.is_dir() else []
    if not names:
        raise UserError(f"{images} is missing or empty: put the training images there as ID_0000.nii.gz")
    return suffix_of(names[0])


# --- Medical Segmentation Decathlon ----------------------------------------------------------------------------------


def is_decathlon(folder: Folder) -> str | None:
    """dataset.json lists its training pairs by the files' own names; nnU-Net 1 lists them too, without _0000."""
    path = folder.root / "dataset.json"
    if not path.is_file():
        return None
    listed = read_json(path).get("training")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        return None
    first = str(listed[0].get("image", ""))
    if not first or not (folder.root / first).is_file():
        return None
    return f'dataset.json lists {len(listed)} pairs under "training"'


def read_decathlon(folder: Folder) -> Dataset:
    """{"training": [{"image": "./imagesTr/a.nii.gz", "label": …}], "modality", "labels"}; channels are the 4th axis."""
    path = folder.root / "dataset.json"
    about = read_json(path)
    labels, regions, ignore = read_labels(about, path)
    channels = read_channels(about, path)
    cases = []
    for number, entry in enumerate(about["training"], start=1):
        names = [str(entry[key]) for key in ("image", "label") if isinstance(entry, dict) and key in entry]
        if len(names) != 2:
            raise UserError(f'{path}: number {number} of "training" is no pair; write {{"image": FILE, "label": FILE}}')
        image, label = (folder.root / name for name in names)
        for file in (image, label):
            if not file.is_file():
                raise UserError(f'{file} is missing: dataset.json lists it under "training"')
        cases.append(Case(stem(image), (image,), label_map(label), "train", stem(image)))
    unlabelled = len(about.get("test") or [])
    left_out = (f'{unlabelled} images under "test" come without labels',) if unlabelled else ()
    rule = "the test images have no labels, so of the training images {}" if unlabelled else "{}"
    dataset = _dataset(
        folder.root, about, cases, labels, channels, rule, regions=regions, ignore=ignore, left_out=left_out
    )
    return replace(dataset, citation=DECATHLON) if re.match(r"Task\d\d_", folder.root.resolve().name) else dataset


# --- dataset.json ----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} is missing: it names the channels and labels of an nnU-Net raw folder")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise UserError(f"{path} is not an nnU-Net dataset.json: it needs channel_names and labels")
    return about


def read_labels(about: dict, path: Path) -> tuple[dict[str, int], dict[str, tuple[int, ...]], int | None]:
    """(labels, regions, the number of 'ignore') of a dataset.json.

    Where a label is a list of numbers, all are regions: each is evaluated as the union of its numbers. What trains
    are the numbers themselves, which are disjoint; a number goes by the name of the smallest region it is part of.
    nnU-Net's regions_class_order is about writing regions over each other, which disjoint parts do not need.
    """
    table = about.get("labels")
    if not isinstance(table, dict) or not table:
        raise UserError(f'{path}: labels is missing; write "labels": {{"background": 0, "NAME": 1}}')
    if all(str(key).isdecimal() for key in table):  # nnU-Net 1 and the Decathlon: number → name
        table = {name: int(number) for number, name in table.items()}
    named = {str(name): _numbers(name, value, path) for name, value in table.items()}
    ignore = named.pop("ignore", None)
    named = {name: numbers for name, numbers in named.items() if numbers != (0,)}
    if not named:
        raise UserError(f"{path}: labels has only background; name what is to be segmented")
    regions: dict[str, tuple[int, ...]] = {}
    if any(isinstance(value, list) for value in table.values()):
        regions = named
        labels = parts_of(regions)
    else:
        labels = {name: numbers[0] for name, numbers in named.items()}
        if len(set(labels.values())) < len(labels):
            raise UserError(f"{path}: two labels have the same number; give each its own")
    if ignore is not None and (len(ignore) != 1 or ignore[0] in (0, *labels.values())):
        raise UserError(f"{path}: 'ignore' is {table['ignore']!r}; give it one number of its own")
    return labels, regions, ignore[0] if ignore else None


def parts_of(regions: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Regions that may overlap → the disjoint parts they are made of, one a label number, by number."""
    parts = {}
    for number in sorted({number for numbers in regions.values() for number in numbers}):
        smallest = min((n for n in regions if number in regions[n]), key=lambda name: len(regions[name]))
        parts[smallest if len(regions[smallest]) == 1 else f"{smallest}_{number}"] = number
    return parts


def _numbers(name: str, value: Any, path: Path) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(str(n).isdecimal() and 0 <= int(n) <= 255 for n in numbers):
        raise UserError(f"{path}: label {name!r} is {value!r}; give it a whole number from 0 to 255")
    if len(numbers) > 1 and 0 in map(int, numbers):
        raise UserError(f"{path}: the region {name!r} has 0 in it, which is background; take it out")
    return tuple(map(int, numbers))


def read_channels(about: dict, path: Path) -> tuple[str, ...]:
    table = about.get("channel_names", about.get("modality"))
    if isinstance(table, list) and table:
        return tuple(map(str, table))
    if not isinstance(table, dict) or not table or not all(str(key).isdecimal() for key in table):
        raise UserError(f'{path}: channel_names is missing; write "channel_names": {{"0": "MRI"}}')
    return tuple(str(table[key]) for key in sorted(table, key=int))
