"""Slices and volumes as NumPy and HDF5 files that hold image and label together, as TransUNet and SAMed have them."""

from dataclasses import replace

from cheaplunch.data.conventions.classes import find_classes
from cheaplunch.data.dataset import Case, Dataset, Folder, Split, make_dataset
from cheaplunch.data.labels import LabelFiles, label_map
from cheaplunch.data.names import stem
from cheaplunch.errors import UserError

_TRAIN = r"(?:.*/)?train_npz/(?P<id>[^/]+)\.npz"
_TEST = r"(?:.*/)?test_vol_h5/(?P<id>[^/]+)\.npy\.h5"
_LIST = r"(?:.*/)?lists?(?:_[^/]*)?/(?:[^/]+/)?(?P<name>train|test_vol)\.txt"


def is_arrays(folder: Folder) -> str | None:
    here = [name for name, pattern in (("train_npz", _TRAIN), ("test_vol_h5", _TEST)) if folder.has(pattern)]
    return " and ".join(here) + " are here, as TransUNet and SAMed name them" if here else None


def read_arrays(folder: Folder) -> Dataset:
    """train_npz/CASE_sliceNNN.npz trains and test_vol_h5/CASE.npy.h5 tests, as far as lists/…/*.txt name them."""
    cases = array_cases(folder)
    learned = find_classes(folder.root, [case.images[0] for case in cases])
    cases = [replace(case, label=LabelFiles(case.images, learned.rule)) for case in cases]
    return make_dataset(
        folder.root, cases=cases, labels=learned.labels, channel_names=("image",), split_rule=split_rule(cases)
    )


def array_cases(folder: Folder) -> list[Case]:
    """A case a slice (train) or volume (test); the patient is the part of the name before '_slice'."""
    lists = {match["name"].lower(): folder.root / match[0] for match in folder.find(_LIST)}
    cases = []
    sides: dict[Split, tuple[str, str]] = {"train": (_TRAIN, "train"), "test": (_TEST, "test_vol")}
    for side, (pattern, list_name) in sides.items():
        files = {match["id"]: folder.root / match[0] for match in folder.find(pattern)}
        wanted = list(files)
        if files and list_name in lists:
            lines = lists[list_name].read_text(encoding="utf-8").split()
            wanted = [line.removesuffix(".npy.h5").removesuffix(".npz") for line in lines]
        for id_ in wanted:
            if id_ not in files:
                raise UserError(f"{lists[list_name]} names {id_}, which is missing beside {next(iter(files.values()))}")
            path = files[id_]
            cases.append(Case(id_, (path,), label_map(path), side, stem(path).partition("_slice")[0]))
    return cases


def split_rule(cases: list[Case]) -> str | None:
    """None where one side is missing, and patients have to be divided."""
    if {case.split for case in cases} != {"train", "test"}:
        return None
    return "train_npz trains and test_vol_h5 tests, as the folder has it"
