import csv
import json
import pickle
import shutil

import h5py
import numpy as np
import pytest
from PIL import Image

from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import LAYOUTS, open_dataset, patients, split_by_patient
from cheaplunch.data.slices import Window, default_window
from cheaplunch.data.volume import read_volume, write_mask
from cheaplunch.errors import UserError


@pytest.fixture
def save(tmp_path, save_nifti):
    """(name below tmp_path, values) → the file; pictures (H, W), (H, W, 3), volumes (i, j, k)."""

    def write(name, values, dtype=np.uint8):
        path, values = tmp_path / name, np.asarray(values, dtype)
        if name.endswith((".nii.gz", ".nii")):
            return save_nifti(path, values)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
        return path

    return write


def label_of(dataset, id_):
    """What training sees of a case's label."""
    (case,) = (case for case in dataset.cases if case.id == id_)
    assert pickle.loads(pickle.dumps(case)) == case
    return load_case(case, dataset, Window(0, 255)).label.tolist()


def sides(dataset):
    return tuple([case.id for case in dataset.split(side)] for side in ("train", "test"))


# ---- nnU-Net


def test_cases_in_natural_order_with_labels_and_channels(folder):
    dataset = open_dataset(folder)
    assert sorted(c.id for c in dataset.cases) == ["case_1", "case_10", "case_2"]
    train = [c.id for c in dataset.split("train")]
    assert train == [id_ for id_ in ("case_1", "case_2", "case_10") if id_ in train]
    assert dataset.labels == {"one": 1, "two": 2} and dataset.channel_names == ("MRI",)
    first = dataset.cases[0]
    assert first.label.paths == (folder / "labelsTr" / f"{first.id}.nii.gz",)
    assert first.mask_name == f"{first.id}.nii.gz" and dataset.layout == "nnU-Net raw" and "imagesTr" in dataset.why


def test_images_ts_is_the_test_split_even_without_labels(folder):
    (folder / "imagesTs").mkdir()
    shutil.move(folder / "imagesTr" / "case_2_0000.nii.gz", folder / "imagesTs")
    dataset = open_dataset(folder)
    assert [(c.id, c.label) for c in dataset.split("test")] == [("case_2", None)]
    assert len(dataset.split("train")) == 2 and "imagesTs" in dataset.split_rule


def test_a_single_rgb_picture_holds_three_channels(tmp_path):
    for name in ("imagesTr/p1_1_0000", "imagesTr/p2_1_0000", "labelsTr/p1_1", "labelsTr/p2_1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{name}.png")
    about = {"modality": {"0": "R", "1": "G", "2": "B"}, "labels": {"0": "background", "1": "x"}}
    (tmp_path / "dataset.json").write_text(json.dumps(about))  # nnU-Net 1 spelling, no file_ending
    dataset = open_dataset(tmp_path)
    assert len(dataset.cases[0].images) == 1 and len(dataset.channel_names) == 3
    assert dataset.labels == {"x": 1}


@pytest.mark.parametrize(
    ("ids", "pictures", "expected"),
    [
        (["TCGA_DU_5851_19950428_12", "TCGA_DU_5851_19950428_13", "TCGA_HT_7608_19940304_4"], True, 2),
        (["hc18_374_HC", "hc18_136_2HC"], True, 2),  # one image a subject
        (
            ["benign_1", "benign_2", "malignant_1"],
            True,
            3,
        ),  # no digit before the number: not a patient's name
        (["scan2024_1", "scan2024_2"], True, 2),  # all alike: the data set's name
        (["p1_01", "p1_02", "p2_01"], False, 3),  # volumes
    ],
)
def test_patients_as_far_as_ids_tell(ids, pictures, expected):
    assert len(set(patients(ids, pictures).values())) == expected


def test_the_split_is_by_patient_and_always_the_same():
    names = [f"p{i}" for i in range(10)]
    held_out = split_by_patient(names)
    assert held_out == split_by_patient(reversed(names * 3)) and len(held_out) == 2
    assert len(split_by_patient(["a", "b"])) == 1 and not split_by_patient(["a"])


def test_slices_of_one_patient_stay_together(tmp_path):
    for patient in range(5):
        for number in range(3):
            for name in (f"imagesTr/p{patient}_{number}_0000", f"labelsTr/p{patient}_{number}"):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / f"{name}.png")
    about = {"channel_names": {"0": "US"}, "labels": {"background": 0, "x": 1}, "file_ending": ".png"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    dataset = open_dataset(tmp_path)
    train, test = ({c.patient for c in dataset.split(side)} for side in ("train", "test"))
    assert len(train) == 4 and len(test) == 1 and not train & test
    assert "1 of 5 patients" in dataset.split_rule


def test_fingerprint_follows_content_not_place(folder, tmp_path, edit_json):
    here = open_dataset(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "elsewhere").fingerprint() == here
    edit_json(labels={"background": 0, "one": 2, "two": 1})
    relabelled = open_dataset(folder).fingerprint()
    with open(folder / "labelsTr" / "case_1.nii.gz", "ab") as file:
        file.write(b"\0")
    assert len({here, relabelled, open_dataset(folder).fingerprint()}) == 3


def says(root, text):
    with pytest.raises(UserError, match=text) as caught:
        open_dataset(root)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_unknown_folders(tmp_path):
    says(tmp_path / "nowhere", "nowhere: no such folder")
    says(tmp_path, "the folder is empty; put images and their masks into it")
    (tmp_path / "notes.txt").write_text("")
    says(tmp_path, r"1 file \(notes.txt first\) and not one image")


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        ("dataset.json", "dataset.json is missing"),
        ("labelsTr/case_2.nii.gz", "labelsTr/case_2.nii.gz is missing: label case_2"),
        ("imagesTr", "imagesTr has no ID_0000.nii.gz"),
    ],
)
def test_a_missing_file_is_named(folder, gone, text):
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    says(folder, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"channel_names": {"0": "T1", "1": "T2"}},
            "case_1_0001.nii.gz is missing: it is case_1's channel 'T2'",
        ),
        ({"channel_names": None}, "channel_names is missing"),
        ({"file_ending": ".xyz"}, "file_ending '.xyz' is not read"),
        ({"labels": {}}, "labels is missing"),
        ({"labels": {"background": 0}}, "only background"),
        ({"labels": {"background": 0, "whole": [0, 1]}}, "the region 'whole' has 0 in it"),
        ({"labels": {"background": 0, "whole": []}}, "'whole' is \\[\\]"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "'ignore' is 1; give it one number of its own"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "same number"),
        ({"labels": {"background": 0, "a": 1.5}}, "whole number"),
    ],
)
def test_a_wrong_dataset_json_is_explained(folder, edit_json, change, text):
    edit_json(**change)
    says(folder, text)


def test_a_dataset_json_that_is_not_json(folder):
    (folder / "dataset.json").write_text("{")
    says(folder, "dataset.json is not JSON")


def test_regions_train_on_their_parts_and_are_scored_as_unions(folder, edit_json):
    edit_json(labels={"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[1, 2])
    dataset = open_dataset(folder)
    assert dataset.labels == {"whole_1": 1, "core": 2}
    assert dataset.scored == dataset.regions == {"whole": (1, 2), "core": (2,)}
    edit_json(labels={"background": 0, "one": 1, "two": 2})
    assert open_dataset(folder).scored == {"one": 1, "two": 2}


def test_pixels_to_ignore_are_no_background(folder, edit_json):
    edit_json(labels={"background": 0, "one": 1, "ignore": 2})
    dataset = open_dataset(folder)
    case = load_case(dataset.cases[0], dataset, Window())
    assert dataset.labels == {"one": 1} and dataset.ignore == 2
    assert case.label.sum() == 1 and case.ignore.shape == (2, 3, 4) and case.ignore.sum() == 2
    assert not (case.label.astype(bool) & case.ignore).any()
    edit_json(labels={"background": 0, "one": 1, "two": 2, "ignore": 3})
    dataset = open_dataset(folder)
    assert load_case(dataset.cases[0], dataset, Window()).ignore is None


# ---- Medical Segmentation Decathlon


def write_decathlon(save, root, cases=5):
    for number in range(cases):
        save(f"imagesTr/brain_{number:03d}.nii.gz", np.zeros((3, 2, 2, 2)))
        save(f"labelsTr/brain_{number:03d}.nii.gz", np.arange(12).reshape(3, 2, 2) % 3)
    save("imagesTs/brain_900.nii.gz", np.zeros((3, 2, 2, 2)))
    names = [f"brain_{number:03d}.nii.gz" for number in range(cases)]
    about = {
        "name": "BRAIN",
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "oedema", "2": "core"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/brain_900.nii.gz"],
        "licence": "CC-BY-SA 4.0",
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return about


def test_decathlon(save, tmp_path):
    write_decathlon(save, tmp_path)
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "Medical Segmentation Decathlon" and "lists 5 pairs" in dataset.why
    assert dataset.labels == {"oedema": 1, "core": 2} and dataset.channel_names == ("FLAIR", "T1w")
    assert [len(ids) for ids in sides(dataset)] == [4, 1] and dataset.license == "CC-BY-SA 4.0"
    assert "1 of 5 patients" in dataset.split_rule and "1 images" in dataset.left_out[0]
    case = load_case(dataset.cases[0], dataset, Window())
    assert case.image.shape == (2, 2, 2, 3) and np.bincount(case.label.ravel()).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"training": [{"image": "imagesTr/brain_000.nii.gz"}]}, 'number 1 of "training" is no pair'),
        (
            {"training": [{"image": "imagesTr/brain_000.nii.gz", "label": "labelsTr/x.nii.gz"}]},
            "labelsTr/x.nii.gz is missing",
        ),
        ({"modality": None}, "channel_names is missing"),
    ],
)
def test_a_wrong_decathlon_is_explained(save, tmp_path, change, text):
    about = write_decathlon(save, tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(about | change))
    says(tmp_path, text)


# ---- BIDS


def write_bids(save, root):
    label = np.zeros((3, 2, 2))
    label[0, 0, 0], label[2, 1, 1] = 4, 9
    for subject in ("01", "02"):
        anat = f"sub-{subject}/ses-1/anat/sub-{subject}_ses-1"
        for modality in ("T1w", "T2w"):
            save(f"{anat}_{modality}.nii.gz", np.zeros((3, 2, 2)))
        save(f"derivatives/manual/{anat}_space-orig_dseg.nii.gz", label)
    save("sub-03/anat/sub-03_T1w.nii.gz", np.zeros((3, 2, 2)))
    (root / "derivatives/manual/dseg.tsv").write_text("index\tname\n0\tbackground\n4\tventricle\n9\tthalamus\n")


def test_bids(save, tmp_path):
    write_bids(save, tmp_path)
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "BIDS" and dataset.labels == {"ventricle": 4, "thalamus": 9}
    assert {case.patient for case in dataset.cases} == {"sub-01", "sub-02"} and dataset.channel_names == ("T1w",)
    assert all(case.images[0].name.endswith("_T1w.nii.gz") for case in dataset.cases)
    assert len(dataset.left_out) == 2 and [len(ids) for ids in sides(dataset)] == [1, 1]
    label = np.array(label_of(dataset, "sub-01_ses-1_T1w"))  # (Z, Y, X) of a RAS file: X and Y turned round
    assert label[0, 1, 2] == 4 and label[1, 0, 0] == 9 and label.sum() == 13
    (tmp_path / "derivatives/manual/dseg.tsv").unlink()
    assert open_dataset(tmp_path).labels == {"label_4": 4, "label_9": 9}


def test_a_wrong_bids_is_explained(save, tmp_path):
    write_bids(save, tmp_path)
    tsv = tmp_path / "derivatives/manual/dseg.tsv"
    tsv.write_text("index\tname\n1002\tctx-lh\n")
    says(tmp_path, "dseg.tsv has label numbers outside 1 to 255")
    tsv.write_text("number\tname\n1\tx\n")
    says(tmp_path, "dseg.tsv has no columns index and name")
    save("sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz", np.zeros((3, 2, 2)))
    says(tmp_path, "masks of one scan")


# ---- slices as arrays


def write_arrays(root):
    for name in ("train_npz", "test_vol_h5", "lists/lists_Synapse"):
        (root / name).mkdir(parents=True)
    plane = np.array([[0, 3], [8, 0]], np.float32)
    for case, number in ((5, 0), (5, 12), (6, 0)):
        np.savez(root / f"train_npz/case{case:04d}_slice{number:03d}.npz", image=plane / 8, label=plane)
    with h5py.File(root / "test_vol_h5/case0001.npy.h5", "w") as file:
        file["image"], file["label"] = np.stack([plane / 8] * 3), np.stack([plane, 0 * plane, plane])
    (root / "lists/lists_Synapse/train.txt").write_text("case0005_slice000\ncase0005_slice012\n")
    (root / "lists/lists_Synapse/test_vol.txt").write_text("case0001\n")


def test_slices_as_arrays(tmp_path):
    write_arrays(tmp_path)
    (tmp_path / "classes.csv").write_text("name,number\na,3\nb,8\n")  # not TransUNet's numbers, so not its recipe
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "slices as arrays" and dataset.labels == {"a": 3, "b": 8}
    assert sides(dataset) == (["case0005_slice000", "case0005_slice012"], ["case0001"])  # as the lists say
    assert {case.patient for case in dataset.split("train")} == {"case0005"}
    assert label_of(dataset, "case0005_slice012") == [[[0, 3], [8, 0]]]
    assert np.shape(label_of(dataset, "case0001")) == (3, 2, 2)
    with open(tmp_path / "lists/lists_Synapse/train.txt", "a") as file:
        file.write("case0007_slice000\n")
    says(tmp_path, "train.txt names case0007_slice000, which is missing")


# ---- a tree of DICOM series


def test_a_tree_of_dicom_series(write_series, tmp_path):
    names = {"liver": 1, "lesion": 2}
    for patient in ("A", "B"):
        scan = write_series(tmp_path / patient / "CT", (0, 5), "{:03d}", "CT")
        volume = read_volume((scan,))
        mask = np.zeros((2, 2, 4), np.uint8)
        mask[0, 0, 0], mask[1, 1, 2] = 1, 2
        own = names if patient == "A" else {"lesion": 2}
        write_mask(mask * np.isin(mask, list(own.values())), volume, tmp_path / patient / "seg.dcm", own)
    write_series(tmp_path / "A" / "scout", (0, 5, 30), "{:03d}", "CT")
    write_series(tmp_path / "C", (0, 5), "{:03d}.dcm", "CT")
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "DICOM tree" and dataset.labels == names and dataset.channel_names == ("CT",)
    assert {case.id: case.patient for case in dataset.cases} == {"A_CT": "A", "B_CT": "B"}
    assert "lacks slices" in dataset.left_out[0] and "1 series without a DICOM SEG" in dataset.left_out[-1]
    label = np.array(label_of(dataset, "A_CT"))
    assert label[0, 0, 0] == 1 and label[1, 1, 2] == 2 and label.sum() == 3
    assert np.array(label_of(dataset, "B_CT")).sum() == 2 and len(dataset.fingerprint()) == 64
    assert [len(case.files) for case in dataset.cases] == [3, 3]
    for patient in ("A", "B"):
        (tmp_path / patient / "seg.dcm").unlink()
    says(tmp_path, "3 DICOM series and no DICOM SEG drawn on one of them")
    assert len(open_dataset(tmp_path, labelled=False).cases) == 3


def test_several_series_in_one_folder(write_series, tmp_path):
    for letter in "ab":
        write_series(tmp_path, (0, 5), letter + "{:03d}.dcm", "MR")
    dataset = open_dataset(tmp_path, labelled=False)
    assert len({case.id for case in dataset.cases}) == 2 and all("#" in c.images[0].name for c in dataset.cases)
    assert load_case(dataset.cases[0], dataset, Window()).image.shape == (2, 1, 2, 4)
    write_series(tmp_path / "alone", (0, 5, 30), "{:03d}", "MR")
    says(tmp_path / "alone", "lacks slices .* no series here can be read")


# ---- a table of pairs


def write_table(root, rows, name="pairs.csv"):
    with (root / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root / name


def test_a_table_of_pairs(save, tmp_path):
    for number in range(3):
        save(f"scans/{number}.png", [[9, 9], [9, 9]])
        save(f"elsewhere/{number}.png", [[0, 255], [0, 0]])
    rows = [("image", "mask", "patient", "split")]
    rows += [
        (f"scans/{n}.png", tmp_path / f"elsewhere/{n}.png", f"p{n}", side) for n, side in enumerate(("train", "val"))
    ]
    table = write_table(tmp_path, [*rows, ("scans/2.png", "", "p2", "test")])
    for root in (table, tmp_path):
        dataset = open_dataset(root)
        assert dataset.layout == "table of pairs" and dataset.labels == {"foreground": 1}
        assert sides(dataset) == (["0", "1"], ["2"]) and "pairs.csv" in dataset.split_rule
        assert dataset.cases[1].patient == "p1" and dataset.cases[2].label is None
        assert label_of(dataset, "0") == [[[0, 1], [0, 0]]]
    shutil.copytree(tmp_path / "scans", tmp_path / "deep" / "scans")
    moved = write_table(tmp_path / "deep", [("image", "mask"), ("scans/0.png", "../elsewhere/0.png")])
    assert len(open_dataset(moved).fingerprint()) == 64  # a mask outside the root


def test_a_table_with_a_column_a_class(save, tmp_path):
    for number in range(2):
        save(f"{number}.png", [[9, 9]])
        save(f"left_{number}.png", [[255, 0]])
    save("right_0.png", [[0, 255]])
    rows = [("image", "mask_left", "mask_right"), ("0.png", "left_0.png", "right_0.png"), ("1.png", "left_1.png", "")]
    dataset = open_dataset(write_table(tmp_path, rows))
    assert dataset.labels == {"left": 1, "right": 2}
    assert label_of(dataset, "0") == [[[1, 2]]] and label_of(dataset, "1") == [[[1, 0]]]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([("picture", "mask"), ("0.png", "1.png")], "no columns 'image' and 'mask'"),
        ([("image", "mask"), ("0.png", "9.png")], "line 2: 9.png is missing"),
        ([("image", "mask"), ("0.png", "")], "line 2: 0.png has no mask"),
        ([("image", "mask", "split"), ("0.png", "1.png", "soon")], "the split 'soon' is unknown"),
        ([("image", "mask"), ("0.png", "1.png"), ("0.png", "1.png")], "0.png have one name"),
        ([("image", "mask")], "lists no image"),
    ],
)
def test_a_wrong_table_is_explained(save, tmp_path, rows, text):
    for number in range(2):
        save(f"{number}.png", [[0, 1]])
    says(write_table(tmp_path, rows), text)
    says(tmp_path / "nowhere.csv", "nowhere.csv is missing")


# ---- plain folders


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.png", "{}_mask.png"),
        ("{}.jpg", "{}_seg.png"),
        ("set/images/{}.png", "set/masks/{}.png"),
        ("imgs/{}.tif", "GT/{}.png"),
        ("{}/scan.png", "{}/scan_label.png"),
        ("{}.nii.gz", "labels/{}.nii.gz"),
    ],
)
def test_images_and_masks_by_name(save, tmp_path, image, mask):
    shape = (1, 2, 1) if "nii" in image else (2, 2)
    for id_ in ("a1", "a2", "b1"):
        save(image.format(id_), np.zeros(shape))
        save(mask.format(id_), np.full(shape, 255))
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "images and masks" and mask.format("a1") in dataset.why
    assert dataset.labels == {"foreground": 1} and [len(ids) for ids in sides(dataset)] == [2, 1]
    assert len({case.id for case in dataset.cases}) == 3 and len({c.mask_name for c in dataset.cases}) == 3
    for case in dataset.cases:
        assert np.unique(label_of(dataset, case.id)).tolist() == [1]


def test_folders_say_who_tests_and_who_the_patient_is(save, tmp_path):
    for side, patient in (("train", "P01"), ("train", "P02"), ("val", "P03"), ("test", "P04")):
        for number in (1, 2):
            save(f"{side}/images/{patient}/{patient}_{number}.png", [[1]])
            save(f"{side}/masks/{patient}/{patient}_{number}.png", [[1]])
    dataset = open_dataset(tmp_path)
    assert [len(ids) for ids in sides(dataset)] == [6, 2] and "val trains" in dataset.split_rule
    assert {case.patient for case in dataset.split("test")} == {"P04"}
    for number in (1, 2):
        (tmp_path / f"test/masks/P04/P04_{number}.png").unlink()
    assert all(case.label is None for case in open_dataset(tmp_path).split("test"))
    shutil.rmtree(tmp_path / "test")
    dataset = open_dataset(tmp_path)  # train and val alone: val is what was held out
    assert {case.patient for case in dataset.split("test")} == {"P03"}


def test_a_mask_for_each_class(save, tmp_path):
    for id_ in ("a", "b"):
        save(f"images/{id_}.png", [[7, 7, 7]])
        save(f"masks/liver/{id_}.png", [[255, 0, 0]])
    save("masks/spleen/a.png", [[0, 0, 255]])
    dataset = open_dataset(tmp_path)
    assert dataset.labels == {"liver": 1, "spleen": 2}
    assert label_of(dataset, "a") == [[[1, 0, 2]]] and label_of(dataset, "b") == [[[1, 0, 0]]]


def test_a_mask_for_each_class_or_finding_by_suffix(save, tmp_path):
    for id_ in ("x (1)", "x (2)"):
        save(f"{id_}.png", [[7, 7, 7]])
        save(f"{id_}_mask.png", [[255, 0, 0]])
    save("x (1)_mask_1.png", [[0, 0, 255]])  # a second finding of the same kind
    dataset = open_dataset(tmp_path)
    assert dataset.labels == {"foreground": 1}
    assert label_of(dataset, "x (1)") == [[[1, 0, 1]]] and label_of(dataset, "x (2)") == [[[1, 0, 0]]]
    for id_ in ("x (1)", "x (2)"):
        save(f"{id_}_mask_cyst.png", [[0, 255, 0]])
    dataset = open_dataset(tmp_path)
    assert dataset.labels == {"cyst": 1, "foreground": 2} and label_of(dataset, "x (1)") == [[[2, 1, 2]]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("palette.json", '{"background": [0, 0, 0], "gut": [255, 0, 0], "tool": [0, 0, 255]}'),
        ("classes.csv", "name,r,g,b\ngut,255,0,0\ntool,0,0,255\n"),
        ("label_colors.txt", "255 0 0\tgut\n0 0 255\ttool\n"),
    ],
)
def test_colours_by_a_palette(save, tmp_path, name, text):
    for id_ in ("a", "b"):
        save(f"images/{id_}.png", np.zeros((1, 3, 3)))
        save(f"masks/{id_}.png", [[[255, 0, 0], [0, 0, 0], [0, 0, 255]]])
    says(tmp_path, "is coloured: name the colours in palette.json")
    (tmp_path / name).write_text(text)
    dataset = open_dataset(tmp_path)
    assert dataset.labels == {"gut": 1, "tool": 2} and label_of(dataset, "a") == [[[1, 0, 2]]]
    before = dataset.fingerprint()
    (tmp_path / name).write_text(text.replace("gut", "bowel"))
    assert open_dataset(tmp_path).fingerprint() != before


def test_numbers_with_and_without_names(save, tmp_path):
    for id_ in ("a", "b"):
        save(f"images/{id_}.png", [[7, 7]])
        save(f"masks/{id_}.png", [[2, 5]])
    assert open_dataset(tmp_path).labels == {"label_2": 2, "label_5": 5}
    (tmp_path / "classes.csv").write_text("name,number\nbackground,0\nrib,2\nlung,5\n")
    dataset = open_dataset(tmp_path)
    assert dataset.labels == {"rib": 2, "lung": 5} and label_of(dataset, "a") == [[[2, 5]]]
    (tmp_path / "classes.csv").write_text("name,number\nrib,2\nlung,2\n")
    says(tmp_path, "two classes have the number 2")
    (tmp_path / "classes.csv").write_text("colour\nred\n")
    says(tmp_path, "classes.csv is not understood")


def test_what_is_ambiguous_gets_one_line(save, tmp_path):
    for id_ in ("a", "b"):
        save(f"{id_}.png", [[7]])
        save(f"{id_}_mask.png", [[1]])
    save("c.png", [[7]])
    says(tmp_path, "c.png has no mask: add c_mask.png")
    save("c_mask.png", [[1]])
    save("c_seg.png", [[1]])
    says(tmp_path, "c_mask.png and c_seg.png are both masks of c.png")
    (tmp_path / "c_seg.png").unlink()
    save("d_mask.png", [[1]])
    says(tmp_path, "d_mask.png is a mask without an image")
    (tmp_path / "d_mask.png").unlink()
    save("c.jpg", [[7]])
    says(tmp_path, "go by one name")


def test_images_without_masks(save, tmp_path):
    for id_ in ("a/1", "b/1"):
        save(f"{id_}.png", np.zeros((2, 2, 3)))
    says(tmp_path, "2 images and not one mask; put 1_mask.png beside 1.png")
    dataset = open_dataset(tmp_path, labelled=False)
    assert sides(dataset) == (["a_1", "b_1"], []) and dataset.layout == "images without masks"
    assert dataset.channel_names == ("red", "green", "blue") and not dataset.scored
    assert default_window(dataset) == Window(0, 255)
    assert load_case(dataset.cases[0], dataset, Window(0, 255)).label is None


def test_every_layout_has_a_name_of_its_own():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train", "test", "train_patients"),
    [("hippocampus", 40, 20, 40), ("chaos", 10, 4, 10), ("lgg", 226, 91, 20), ("hc18", 28, 12, 28)],
)
def test_the_shared_folders(shared_data, name, train, test, train_patients):
    dataset = open_dataset(shared_data / name)
    assert (len(dataset.split("train")), len(dataset.split("test"))) == (train, test)
    on_train, on_test = ({c.patient for c in dataset.split(side)} for side in ("train", "test"))
    assert len(on_train) == train_patients and not on_train & on_test
