"""Images and masks that belong together by their names, or by a table that says so."""

import csv
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from cheaplunch.data.conventions.classes import FILES, classes_file, find_classes, read_classes
from cheaplunch.data.dataset import Case, Dataset, Folder, Split, are_pictures, make_dataset, patients
from cheaplunch.data.formats import READERS
from cheaplunch.data.labels import FOREGROUND, LabelFiles, Masks
from cheaplunch.data.names import ending, natural_order, stem
from cheaplunch.data.volume import SUFFIXES, suffix_of
from cheaplunch.errors import UserError

_MASK = r"masks?|seg|segs|segmentations?|labels?|labelmaps?|annotations?|gt|gts|ground ?truths?|ground|targets?|manual"
_IMAGE = r"images?|imgs?|inputs?|originals?|photos?|scans?|pictures?"
_SPLIT: dict[str, Split] = {"train": "train", "training": "train", "tr": "train"}
_SPLIT |= dict.fromkeys(("val", "valid", "validation", "dev", "va"), "train")
_SPLIT |= dict.fromkeys(("test", "testing", "ts"), "test")
_NUMBERED = re.compile(rf"(.+?)[-_. ]({_MASK})(?:[-_. ](.+))?", re.IGNORECASE)

# --- a plain folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """What the name of an image or mask says."""

    path: str  # below the root
    key: str  # equal for an image and its masks: the name and folders without the words for mask, image and split
    is_mask: bool
    split: str | None  # the word that says it: train, val, test
    class_name: str | None  # of a mask
    folders: tuple[str, ...]  # what is left of the folders


def is_plain(folder: Folder) -> str | None:
    files = _sort(folder)
    masks, images = [f for f in files if f.is_mask], {f.key: f for f in files if not f.is_mask}
    if not masks or not images:
        return None
    mask = next((f for f in masks if f.key in images), None)
    return f"{mask.path} is the mask of {images[mask.key].path}" if mask else f"{masks[0].path} looks like a mask"


def read_plain(folder: Folder) -> Dataset:
    """X.png + X_mask.png; images/X.png + masks/X.png, also below train/ and test/; a mask a class in masks/CLASS/X.png
    or X_mask_CLASS.png. Words are compared without regard to capitals."""
    files = _sort(folder)
    images: dict[str, _File] = {}
    masks: dict[str, list[_File]] = defaultdict(list)
    for file in files:
        if file.is_mask:
            masks[file.key].append(file)
        elif file.key in images:
            both = f"{folder.root / images[file.key].path} and {file.path}"
            raise UserError(f"{both} go by one name: give each its own, or keep one")
        else:
            images[file.key] = file
    for key in masks:
        if key not in images:
            raise UserError(f"{folder.root / masks[key][0].path} is a mask without an image: put its image beside it")
    classes = sorted({m.class_name or FOREGROUND for found in masks.values() for m in found}, key=natural_order)
    by_class = classes != [FOREGROUND]
    words = {f.split for f in images.values()} - {None}
    sided = any(_SPLIT[word] == "test" for word in words if word) or _holds_out_validation(words)
    labelled_sides = {images[key].split for key in masks}

    drafts = []
    for key, image in images.items():
        found = masks.get(key, [])
        path = folder.root / image.path
        if not found and (not sided or image.split in labelled_sides):
            raise UserError(f"{path} has no mask: add {mask_beside(path)}, or take the image away")
        if not by_class and any(not _is_numbered(mask) for mask in found[1:]):
            both = f"{folder.root / found[0].path} and {found[1].path}"
            raise UserError(f"{both} are both masks of {image.path}: keep one, or name their classes (X_mask_CLASS)")
        drafts.append((image, found))

    single = [folder.root / found[0].path for _, found in drafts if found]
    if by_class or any(len(found) > 1 for _, found in drafts):
        labels, stacked = _order(classes, folder.root)
        rules = {
            image.key: Masks(tuple(labels[m.class_name or FOREGROUND] for m in found), stacked)
            for image, found in drafts
        }
    else:
        learned = find_classes(folder.root, single)
        labels, rules = learned.labels, {image.key: learned.rule for image, _ in drafts}

    cases = []
    for image, found in drafts:
        label = LabelFiles(tuple(folder.root / m.path for m in found), rules[image.key]) if found else None
        cases.append(Case(image.key, (folder.root / image.path,), label, _side(image.split, words), ""))
    cases = _with_patients(_short_ids(cases), [image.folders for image, _ in drafts])
    rule = None
    if sided:
        where = ", ".join(f"{word} {_side(word, words)}s" for word in sorted(filter(None, words)))
        rule = f"as the folders say: {where}"
    return make_dataset(
        folder.root,
        cases=cases,
        labels=labels,
        channel_names=channels_of(cases[0].images[0]),
        split_rule=rule,
    )


def read_unlabelled(folder: Folder) -> Dataset:
    """Any images, without masks: to predict on, or to pretrain with."""
    paths = [folder.root / name for name in folder.images]
    cases = [
        Case(str(PurePosixPath(name)), (path,), None, "train", "")
        for name, path in zip(folder.images, paths, strict=True)
    ]
    cases = [replace(case, id=case.id.removesuffix(ending(case.id)).replace("/", "_")) for case in cases]
    cases = _with_patients(_short_ids(cases), [PurePosixPath(name).parts[:-1] for name in folder.images])
    return make_dataset(
        folder.root,
        cases=cases,
        labels={},
        channel_names=channels_of(paths[0]),
        split_rule="no image is labelled: all train, none tests",
    )


def mask_beside(image: Path) -> str:
    """What its mask may be called, in the image's folder; a JPEG would spoil label numbers."""
    return f"{stem(image)}_mask{'.png' if ending(image) in ('.jpg', '.jpeg') else ending(image)}"


def channels_of(path: Path) -> tuple[str, ...]:
    """Names for the channels of a file that nothing names, by how many it has."""
    if path.is_dir():  # a DICOM series
        return ("image",)
    count = READERS[suffix_of(path)].header(path, "image").channels
    if count == 3 and ending(path) in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"):
        return ("red", "green", "blue")
    return ("image",) if count == 1 else tuple(f"channel {number}" for number in range(count))


def _sort(folder: Folder) -> list[_File]:
    """What the names say, leaving out the folders that all files lie in."""
    shared = len(PurePosixPath(os.path.commonpath([os.path.dirname(name) for name in folder.images] or [""])).parts)
    files = [_understand(name, shared, frozenset()) for name in folder.images]
    groups = frozenset(part for file in files if not file.is_mask for part in file.folders)
    return [_understand(name, shared, groups) for name in folder.images]


def _understand(name: str, shared: int, groups: frozenset[str]) -> _File:
    """`groups`: folders that images lie in, which therefore are no classes where they are below masks/."""
    folders = PurePosixPath(name).parts[shared:-1]
    base = stem(name)
    split, is_mask, in_images, class_name, rest = None, False, False, None, []
    for part in folders:
        words = re.split(r"[-_. ]+", part.lower())
        word = next((w for w in words if w in _SPLIT), None)
        mask = any(re.fullmatch(_MASK, w) for w in words)
        image = any(re.fullmatch(_IMAGE, w) for w in words)
        if word and (mask or image or len(words) == 1):
            split = word
        if mask:
            is_mask = True
        elif image:
            in_images = True
        elif is_mask and part not in groups and not (word and len(words) == 1):
            class_name = part  # masks/CLASS/X.png
        elif not (word and len(words) == 1):
            rest.append(part)
    if (match := _NUMBERED.fullmatch(base)) and not in_images:
        base, is_mask = match[1], True
        class_name = match[3] if match[3] else class_name
    elif is_mask:
        base = re.sub(rf"^({_MASK})[-_. ](?=.)", "", base, flags=re.IGNORECASE)
    if class_name and class_name.isdecimal():
        class_name = None  # X_mask_1.png, X_mask_2.png: several findings of one kind
    return _File(name, "/".join([*rest, base]), is_mask, split, class_name, tuple(rest))


def _is_numbered(mask: _File) -> bool:
    return bool((match := _NUMBERED.fullmatch(stem(mask.path))) and match[3] and match[3].isdecimal())


def _holds_out_validation(words: set[str | None]) -> bool:
    """train and val, and no test: then val is what is held out."""
    kinds = {w for w in words if w}
    return any(w.startswith("tr") for w in kinds) and any(w.startswith(("va", "dev")) for w in kinds)


def _side(word: str | None, words: set[str | None]) -> Split:
    if word is None:
        return "train"
    if _SPLIT[word] == "test" or any(_SPLIT[w] == "test" for w in words if w):
        return _SPLIT[word]
    return "test" if _holds_out_validation(words) and word.startswith(("va", "dev")) else "train"


def _order(classes: list[str], root: Path) -> tuple[dict[str, int], bool]:
    """Class name → number; in the order of a file of names, which also says that later ones lie on top."""
    path = classes_file(root)
    if path is None:
        return {name: number for number, name in enumerate(classes, start=1)}, False
    listed = [name for name, _, _ in read_classes(path)]
    for name in classes:
        if name not in listed:
            raise UserError(f"{path} does not name {name!r}, of which there are masks: add it")
    return {name: number for number, name in enumerate((n for n in listed if n in classes), start=1)}, True


def _short_ids(cases: list[Case]) -> list[Case]:
    """The last part of an id is enough where that is unlike all others."""
    last = [PurePosixPath(case.id).name for case in cases]
    unique = len(set(last)) == len(last)
    return [replace(c, id=name if unique else c.id.replace("/", "_")) for c, name in zip(cases, last, strict=True)]


def _with_patients(cases: list[Case], folders: Sequence[tuple[str, ...]]) -> list[Case]:
    """The patient is a folder with a number in its name, where there are several such; else as far as the id tells."""
    by_id = patients([case.id for case in cases], are_pictures(cases))
    numbered = [next((part for part in parts if re.search(r"\d", part)), None) for parts in folders]
    use_folders = None not in numbered and len(set(numbered)) > 1
    patient_of = [n if use_folders and n else by_id[c.id] for c, n in zip(cases, numbered, strict=True)]
    return [replace(case, patient=patient) for case, patient in zip(cases, patient_of, strict=True)]


# --- a table of pairs ------------------------------------------------------------------------------------------------

_COLUMNS = {
    "image": ("image", "img", "image_path", "img_path", "filename", "file", "input", "scan"),
    "mask": ("mask", "label", "mask_path", "label_path", "segmentation", "seg", "annotation", "gt", "target"),
    "patient": ("patient", "patient_id", "subject", "subject_id", "case", "case_id", "pid"),
    "split": ("split", "set", "fold", "subset"),
    "id": ("id", "name"),
}


def is_table(folder: Folder) -> str | None:
    """One CSV at the top of the folder that has a column of images and one of masks."""
    found = [name for name in folder.files if "/" not in name and name.lower().endswith(".csv") and name not in FILES]
    tables = [name for name in found if _is_pairs(folder.root / name)]
    if len(tables) > 1:
        raise UserError(f"{folder.root / tables[0]} and {tables[1]} both list images and masks: give one as --data")
    return f"{tables[0]} lists images and masks" if tables else None


def read_table(folder: Folder) -> Dataset:
    name = next(n for n in folder.files if "/" not in n and n.lower().endswith(".csv") and _is_pairs(folder.root / n))
    return read_pairs(folder.root / name)


def read_pairs(table: Path) -> Dataset:
    """A CSV with the columns image and mask (or mask_CLASS, one each), and patient, split and id where wanted.

    Paths are below the CSV's folder, or absolute. An empty mask is an absent class, and without any the image is
    not labelled.
    """
    rows, columns, mask_columns = _read_rows(table)
    if "image" not in columns or not mask_columns:
        raise UserError(f"{table} has no columns 'image' and 'mask': name the columns of files so")
    root = table.parent
    classes = [name for name in mask_columns if name is not None]
    labels, stacked = _order(classes, root) if classes else ({}, False)
    cases = []
    for line, row in enumerate(rows, start=2):
        image = _existing(root, row[columns["image"]], table, line)
        cells = {name: row[column].strip() for name, column in mask_columns.items() if (row[column] or "").strip()}
        files = tuple(_existing(root, cell, table, line) for cell in cells.values())
        rule = Masks(tuple(labels[name] for name in cells if name is not None), stacked)
        split = (row[columns["split"]] or "").strip().lower() if "split" in columns else ""
        if split and split not in _SPLIT:
            raise UserError(f"{table}, line {line}: the split {split!r} is unknown; write train, val or test")
        id_ = (row[columns["id"]] or "").strip() if "id" in columns else ""
        patient = (row[columns["patient"]] or "").strip() if "patient" in columns else ""
        if not files and _SPLIT.get(split) != "test":
            raise UserError(f"{table}, line {line}: {image.name} has no mask; name one, or take the line out")
        label = LabelFiles(files, rule) if files else None
        cases.append(Case(id_ or stem(image), (image,), label, _SPLIT.get(split, "train"), patient))
    if not cases:
        raise UserError(f"{table} lists no image: write a line for each")
    if not classes:
        learned = find_classes(root, [c.label.paths[0] for c in cases if c.label is not None])
        labels = learned.labels
        cases = [c if c.label is None else replace(c, label=replace(c.label, rule=learned.rule)) for c in cases]
    cases = _unique_ids(cases, root)
    if "patient" not in columns or not all(case.patient for case in cases):
        cases = _with_patients(cases, [()] * len(cases))
    has_split = any(case.split == "test" for case in cases)
    return make_dataset(
        root,
        cases=cases,
        labels=labels,
        channel_names=channels_of(cases[0].images[0]),
        split_rule=f"as {table.name} has it" if has_split else None,
        name=table.stem,
    )


def _is_pairs(table: Path) -> bool:
    """A column named 'label' often holds a diagnosis, so at least one cell has to name a file."""
    try:
        rows, columns, mask_columns = _read_rows(table)
    except UserError:
        return False
    cells = ((row[column] or "").strip().lower() for row in rows for column in mask_columns.values())
    return "image" in columns and any(cell.endswith(SUFFIXES) for cell in cells)


def _read_rows(table: Path) -> tuple[list[dict[str, str]], dict[str, str], dict[str | None, str]]:
    """Rows; our word for a column → its name; class → its column of masks (None where masks hold all classes)."""
    if not table.is_file():
        raise UserError(f"{table} is missing: check the path")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise UserError(f"{table} is not UTF-8: save it as CSV in UTF-8") from error
    head = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=head.count), skipinitialspace=True)
    names = [name for name in reader.fieldnames or () if name]
    spelled = {name.strip().lower(): name for name in names}
    ours = {
        word: next(spelled[option] for option in options if option in spelled)
        for word, options in _COLUMNS.items()
        if spelled.keys() & set(options)
    }
    masks: dict[str | None, str] = {
        match[1]: name for name in names if (match := re.fullmatch(r"(?i:mask|label|seg)_(?!path$)(.+)", name.strip()))
    }
    if not masks and "mask" in ours:
        masks = {None: ours["mask"]}
    return [row for row in reader if any(row.values())], ours, masks


def _existing(root: Path, cell: str | None, table: Path, line: int) -> Path:
    path = root / (cell or "").strip()
    if not cell or not path.exists() or path == root:
        raise UserError(f"{table}, line {line}: {cell or 'an image'} is missing; paths are below {root}, or absolute")
    return path


def _unique_ids(cases: list[Case], root: Path) -> list[Case]:
    if len({case.id for case in cases}) == len(cases):
        return cases
    return [replace(c, id="_".join(PurePosixPath(str(c.images[0])).with_suffix("").parts[-2:])) for c in cases]
