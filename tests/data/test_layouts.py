import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cheaplunch.data.layouts import open_dataset, patients, split_by_patient
from cheaplunch.errors import UserError


def test_cases_in_natural_order_with_labels_and_channels(folder):
    dataset = open_dataset(folder)
    assert sorted(c.id for c in dataset.cases) == ["case_1", "case_10", "case_2"]
    train = [c.id for c in dataset.split("train")]
    assert train == [id_ for id_ in ("case_1", "case_2", "case_10") if id_ in train]
    assert dataset.labels == {"one": 1, "two": 2} and dataset.channel_names == ("MRI",)
    assert dataset.cases[0].label == folder / "labelsTr" / f"{dataset.cases[0].id}.nii.gz"


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
    says(tmp_path, "empty")
    (tmp_path / "notes.txt").write_text("")
    says(tmp_path, "no dataset.json")


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
        ({"labels": {"background": 0, "whole": [1, 2]}}, "'whole' is a region"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "'ignore'"),
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
