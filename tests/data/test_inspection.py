"""Each suspicious thing is planted once and found once; the clean folder beside it has none."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cheaplunch.data.inspection import FEWEST_TO_COMPARE, _pairs, inspect_dataset
from cheaplunch.data.layouts import open_dataset

SHAPE = 20, 12, 6  # (i, j, k), i towards the patient's left
AFFINE = np.diag([-1.0, -1, 2, 1])
AFFINE[:3, 3] = 10, 20, -30


def found(root: Path) -> list[tuple[str, str]]:
    return [(finding.kind, finding.text) for finding in inspect_dataset(open_dataset(root)).findings]


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).copy()


def abdomen() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[1:9, 1:6, 1:5], label[2:5, 8:11, 1:4], label[15:18, 8:11, 1:4] = 1, 2, 3  # 160, 27 and 27 voxels
    return label


@pytest.fixture
def clean(tmp_path) -> Path:
    """Four training and two test volumes of a liver and two kidneys, noise of their own on each."""
    root, random = tmp_path / "abdomen", np.random.default_rng(3)
    for number in range(6):
        side = "Tr" if number < 4 else "Ts"
        image = (100 * (abdomen() > 0) + random.normal(50, 9, SHAPE)).astype(np.float32)
        save(root / f"images{side}" / f"case_{number}_0000.nii.gz", image)
        save(root / f"labels{side}" / f"case_{number}.nii.gz", abdomen())
    labels = {"background": 0, "liver": 1, "kidney_right": 2, "kidney_left": 3}
    about = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def image(root: Path, change, affine: np.ndarray = AFFINE) -> None:
    path = root / "imagesTr" / "case_1_0000.nii.gz"
    save(path, change(read(path)), affine)


def label(root: Path, change, affine: np.ndarray = AFFINE) -> None:
    path = root / "labelsTr" / "case_1.nii.gz"
    save(path, change(read(path)), affine)


def put(where, value):
    def change(array):
        array[where] = value
        return array

    return change


def far_spacing(root: Path) -> None:
    wide = AFFINE @ np.diag([1, 1, 4, 1])
    image(root, lambda voxels: voxels, wide)
    label(root, lambda voxels: voxels, wide)


def cut_off(root: Path) -> None:
    path = root / "imagesTr" / "case_1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def name_more(root: Path) -> None:
    about = json.loads((root / "dataset.json").read_text())
    about["labels"]["spleen"] = 4
    (root / "dataset.json").write_text(json.dumps(about))


def stray_values(voxels: np.ndarray) -> np.ndarray:
    voxels[9, 1:4, 2], voxels[9, 4, 1:5] = (5, 9, 11), 17  # at the liver's edge
    return voxels


SWAPPED = np.array([0, 1, 3, 2], np.uint8)

PLANTED = {
    "an empty label": (lambda root: label(root, np.zeros_like), "empty", "labelsTr/case_1.nii.gz"),
    "a label value without a name": (
        lambda root: label(root, put(np.s_[10:13, 8:11, 1:4], 9)),
        "unnamed",
        "labelsTr/case_1.nii.gz: a value of no class (9) on 11.2% of what is labelled",
    ),
    "an interpolated label": (
        lambda root: label(root, lambda voxels: (voxels + np.roll(voxels, 1, 0)) / np.float32(2)),
        "soft",
        "labelsTr/case_1.nii.gz: 2 values of no class (0.5, 1.5)",
    ),
    "stray values at an edge": (lambda root: label(root, stray_values), "soft", "4 values of no class (5, 9, 11, 17)"),
    "an image that tests and trains": (
        lambda root: shutil.copy(root / "imagesTr" / "case_1_0000.nii.gz", root / "imagesTs" / "case_4_0000.nii.gz"),
        "duplicate",
        "imagesTs/case_4_0000.nii.gz = imagesTr/case_1_0000.nii.gz: on both sides of the split, same label",
    ),
    "an image that trains twice": (
        lambda root: (
            shutil.copy(root / "imagesTr" / "case_1_0000.nii.gz", root / "imagesTr" / "case_2_0000.nii.gz"),
            save(root / "labelsTr" / "case_2.nii.gz", put(np.s_[10, 0, 0], 1)(abdomen())),
        ),
        "duplicate",
        "imagesTr/case_2_0000.nii.gz = imagesTr/case_1_0000.nii.gz: both train, labelled differently",
    ),
    "kidneys swapped in one label": (
        lambda root: label(root, lambda voxels: SWAPPED[voxels]),
        "sides",
        "labelsTr/case_1.nii.gz: kidney_left and kidney_right lie the other way round than anatomy has it",
    ),
    "a label of another shape": (
        lambda root: label(root, lambda voxels: voxels[:-1]),
        "unusable",
        "labelsTr/case_1.nii.gz has shape (19, 12, 6)",
    ),
    "a label of another affine": (
        lambda root: label(root, lambda voxels: voxels, AFFINE + np.eye(4, k=3)),
        "unusable",
        "labelsTr/case_1.nii.gz has another affine",
    ),
    "NaN": (lambda root: image(root, put(np.s_[0, 0, 0], np.nan)), "unusable", "imagesTr/case_1_0000.nii.gz has 1 NaN"),
    "a file cut off": (cut_off, "unusable", "imagesTr/case_1_0000.nii.gz is cut off or damaged"),
    "an image of one value": (lambda root: image(root, np.ones_like), "constant", "imagesTr/case_1_0000.nii.gz: 1"),
    "slices far apart": (far_spacing, "spacing", "imagesTr/case_1_0000.nii.gz: 8 × 1 × 1 mm"),
    "a class that nobody labelled": (name_more, "unlabelled", "spleen: in no case"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found_once_and_nothing_on_the_clean_twin(clean, planted):
    plant, kind, text = PLANTED[planted]
    assert found(clean) == []
    plant(clean)
    ((found_kind, said),) = found(clean)
    assert found_kind == kind and text in said
    assert str(clean) not in said


def test_a_class_that_only_tests(clean):
    name_more(clean)
    save(clean / "labelsTs" / "case_4.nii.gz", put(np.s_[10:13, 0:2, 0], 4)(abdomen()))
    assert found(clean) == [("unlabelled", "spleen: in no training case")]


def test_two_duplicates_of_constant_images_are_only_constant(clean):
    for id_ in ("case_1", "case_2"):
        save(clean / "imagesTr" / f"{id_}_0000.nii.gz", np.zeros(SHAPE, np.float32))
    assert [kind for kind, _ in found(clean)] == ["constant", "constant"]


# ---- left and right


def turn_all(root: Path, change) -> None:
    for path in root.glob("labelsT?/*"):
        save(path, change(read(path)))


def test_all_swapped_is_one_finding(clean):
    turn_all(clean, lambda voxels: SWAPPED[voxels])
    ((kind, said),) = found(clean)
    assert kind == "sides" and said.startswith("kidney_left lies on the patient's right of kidney_right in all 6 cases")


def test_an_affine_that_places_nothing_is_not_believed(clean):
    """At the isocentre's very corner: the majority counts, not anatomy."""
    for path in clean.glob("*/*.nii.gz"):
        swapped = path.parent.name.startswith("labels") and path.name != "case_3.nii.gz"
        save(path, SWAPPED[read(path)] if swapped else read(path), np.diag([-1.0, -1, 2, 1]))
    ((kind, said),) = found(clean)
    assert kind == "sides" and "labelsTr/case_3.nii.gz" in said and said.endswith("than in most cases")


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["liver", "kidney_right", "kidney_left"], [(2, 1)]),
        (["Left Lung", "Right Lung", "heart"], [(0, 1)]),
        (["LeftKidney", "RightKidney"], [(0, 1)]),
        (["L", "R"], [(0, 1)]),
        (["hippocampus_l_anterior", "hippocampus_r_posterior"], []),
        (["left", "leftover", "bright"], []),
    ],
)
def test_pairs_by_name(names, pairs):
    assert _pairs(names) == pairs


# ---- pictures


def pictures(root: Path, ids: dict[str, str], random: np.random.Generator) -> Path:
    """id → side ("Tr", "Ts"); a disc of class 1 in noise."""
    disc = (np.hypot(*(np.mgrid[:24, :24] - 12)) < 6).astype(np.uint8)
    for id_, side in ids.items():
        for folder, array, ending in (("images", random.integers(0, 255, (24, 24)), "_0000"), ("labels", disc, "")):
            path = root / f"{folder}{side}" / f"{id_}{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    about = {"channel_names": {"0": "US"}, "labels": {"background": 0, "head": 1}, "file_ending": ".png"}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def test_one_patient_on_both_sides(tmp_path):
    ids = {"p1_1": "Tr", "p1_2": "Tr", "p2_1": "Tr", "p3_1": "Ts", "p3_2": "Ts"}
    root = pictures(tmp_path / "set", ids, np.random.default_rng(0))
    assert found(root) == []
    pictures(root, {"p1_9": "Ts"}, np.random.default_rng(1))
    ((kind, said),) = found(root)
    assert kind == "patient"
    assert said == "imagesTs/p1_9_0000.png tests, imagesTr/p1_1_0000.png and 1 more train"


@pytest.fixture
def plain(tmp_path) -> Path:
    """images/ and masks/ of 0 and 255, nothing that names a class."""
    root, random = tmp_path / "plain", np.random.default_rng(0)
    disc = np.hypot(*(np.mgrid[:24, :24] - 12)) < 6
    for number in range(6):
        for folder, array in (("images", random.integers(0, 255, disc.shape)), ("masks", 255 * disc)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(root / folder / f"scan{number}.png")
    return root


def test_a_soft_edge_where_values_are_all_there_is_to_name_classes(plain):
    assert found(plain) == []
    mask = np.asarray(Image.open(plain / "masks" / "scan3.png")).copy()
    mask[12, 5], mask[12, 19], mask[5, 12] = 90, 37, 200
    Image.fromarray(mask).save(plain / "masks" / "scan3.png")
    ((kind, said),) = found(plain)
    assert kind == "soft" and said.startswith("masks/scan3.png: 3 values of no class (37, 90, 200) on 2.7%")


def test_masks_saved_as_jpeg(plain):
    for path in (plain / "masks").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    assert found(plain) == [("jpeg", "6 of 6, the first masks/scan0.jpg")]


def test_few_cases_are_not_compared(tmp_path):
    """One of two volumes is no outlier."""
    root = tmp_path / "set"
    for number in range(FEWEST_TO_COMPARE - 1):
        affine = AFFINE @ np.diag([1, 1, 1 + 9 * number, 1])
        save(root / "imagesTr" / f"c{number}_0000.nii.gz", np.random.default_rng(number).random(SHAPE), affine)
        save(root / "labelsTr" / f"c{number}.nii.gz", abdomen(), affine)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    about = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))
    assert found(root) == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["chaos", "hippocampus", "hc18"])
def test_the_shared_folders(shared_data, name):
    inspection = inspect_dataset(open_dataset(shared_data / name))
    assert all(record.problem is None for record in inspection.records)
    assert not {finding.kind for finding in inspection.findings} & {"unusable", "soft", "unnamed", "patient", "sides"}
