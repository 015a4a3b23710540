"""The raw folder for nnU-Net: what is in it, where it lies, and how predictions come back."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cheaplunch.__main__ import main
from cheaplunch.data.dataset import Dataset
from cheaplunch.data.layouts import open_dataset
from cheaplunch.errors import UserError
from cheaplunch.nnunet import number_labels


def export(data: Path, out: Path, *more: object) -> int:
    return main([str(word) for word in ("export-nnunet", "--data", data, "--out", out, *more)])


def score(predictions: Path, data: Path, out: Path) -> dict:
    line = ["evaluate", "--predictions", predictions, "--data", data, "--out", out]
    assert main([str(word) for word in line]) == 0
    return json.loads(out.read_text())


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def renumbered(data: Path, root: Path, numbers: list[int], labels: dict) -> Path:
    """A copy of an nnU-Net folder in which label k is numbers[k]."""
    shutil.copytree(data, root)
    for path in (root / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.array(numbers, np.uint8)[np.asanyarray(image.dataobj)], image.affine), path)
    about = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(about | {"labels": labels}))
    return root


@pytest.fixture(scope="module")
def gaps(tiny_dataset, tmp_path_factory) -> Path:
    """The tiny set with the numbers 7 (disc) and 3 (block)."""
    labels = {"background": 0, "disc": 7, "block": 3}
    return renumbered(tiny_dataset, tmp_path_factory.mktemp("gaps") / "set", [0, 7, 3], labels)


@pytest.fixture(scope="module")
def tilted(tmp_path_factory) -> Path:
    """Three volumes of 12 × 10 × 8 voxels whose file axes run R, A, S, 1 × 1 × 2 mm, a little oblique; one class."""
    root = tmp_path_factory.mktemp("tilted") / "set"
    turn = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    affine = turn @ np.diag([1.0, 1, 2, 1])
    affine[:3, 3] = -30, 12, 5
    for number in range(3):
        image = np.random.default_rng(number).normal(0, 9, (12, 10, 8)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[2:8, 3:8, 2:6] = 1
        for part, array in ((f"imagesTr/p{number}_0000", image), (f"labelsTr/p{number}", label)):
            path = root / f"{part}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)
    about = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


# ---- what is written


def test_exemplars_become_volumes_of_one_slice_and_test_images_stay_whole(tiny_dataset, tmp_path, capsys):
    out = tmp_path / "Dataset007_Tiny"
    assert export(tiny_dataset, out, "--exemplars", 3) == 0
    told = capsys.readouterr().out
    assert f"nnU-Net raw folder: {out}\n" in told
    assert "nnUNetv2_plan_and_preprocess -d 7 -c 2d" in told

    chosen = [line.split(",")[:2] for line in (out / "exemplars.csv").read_text().splitlines()[1:]]
    assert len(chosen) == 3
    names = {f"{case}_slice{int(number):03d}" for case, number in chosen}
    assert {path.name for path in (out / "imagesTr").iterdir()} == {f"{name}_0000.nii.gz" for name in names}
    assert {path.name for path in (out / "labelsTr").iterdir()} == {f"{name}.nii.gz" for name in names}
    case, number = chosen[0][0], int(chosen[0][1])
    source, written = (
        nib.load(path)
        for path in (
            tiny_dataset / "imagesTr" / f"{case}_0000.nii.gz",
            out / "imagesTr" / f"{case}_slice{number:03d}_0000.nii.gz",
        )
    )
    assert written.shape == (32, 32, 1)
    np.testing.assert_array_equal(written.get_fdata()[..., 0], source.get_fdata()[..., number])
    np.testing.assert_allclose(written.affine @ [5, 6, 0, 1], source.affine @ [5, 6, number, 1])
    label = out / "labelsTr" / f"{case}_slice{number:03d}.nii.gz"
    np.testing.assert_array_equal(
        voxels(label)[..., 0], voxels(tiny_dataset / "labelsTr" / f"{case}.nii.gz")[..., number]
    )
    assert voxels(label).dtype == np.uint8

    (test,) = open_dataset(tiny_dataset).split("test")
    np.testing.assert_array_equal(voxels(out / "imagesTs" / f"{test.id}_0000.nii.gz"), voxels(test.images[0]))
    np.testing.assert_array_equal(voxels(out / "labelsTs" / f"{test.id}.nii.gz"), voxels(test.label.paths[0]))

    about = json.loads((out / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "disc": 1, "block": 2}
    assert about["channel_names"] == {"0": "MRI"}
    assert (about["numTraining"], about["file_ending"]) == (3, ".nii.gz")


def test_all_are_whole(tiny_dataset, tmp_path):
    assert export(tiny_dataset, tmp_path / "raw", "--strategy", "all") == 0
    out = tmp_path / "raw" / "Dataset501_set"
    training = open_dataset(tiny_dataset).split("train")
    assert len(list((out / "imagesTr").iterdir())) == len(training) == 2
    for case in training:
        np.testing.assert_array_equal(voxels(out / "imagesTr" / f"{case.id}_0000.nii.gz"), voxels(case.images[0]))
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 2
    assert not (out / "exemplars.csv").exists()


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_nnunet_cuts_as_asked_and_every_voxel_stays_in_its_place(axis, tilted, tmp_path):
    """nnU-Net's 2d slices are across the axis of the largest spacing, the first of equals, of the array (k, j, i)."""
    out = tmp_path / "Dataset501_Tilted"
    assert export(tilted, out, "--exemplars", 2, "--axis", axis) == 0
    across = {"axial": 2, "coronal": 1, "sagittal": 0}[axis]  # of the file's axes, which run R, A, S
    for path in (out / "imagesTr").iterdir():
        written, source = nib.load(path), nib.load(tilted / "imagesTr" / f"{path.name[:2]}_0000.nii.gz")
        assert written.shape[2] == 1
        assert np.argmax(written.header.get_zooms()[::-1]) == 0
        in_plane = [zoom for axis_, zoom in enumerate((1, 1, 2)) if axis_ != across]
        np.testing.assert_allclose(sorted(written.header.get_zooms()[:2]), sorted(in_plane), rtol=1e-6)
        assert_same_places(written, source)
    (test,) = open_dataset(tilted).split("test")
    whole = nib.load(out / "imagesTs" / f"{test.id}_0000.nii.gz")
    assert whole.shape[2] == (12, 10, 8)[across]
    assert_same_places(whole, nib.load(test.images[0]))


def assert_same_places(written, source):
    """Every voxel of `written` has in the patient the place and the value of a voxel of `source`."""
    indices = np.stack(np.indices(written.shape), -1).reshape(-1, 3)
    there = nib.affines.apply_affine(np.linalg.inv(source.affine) @ written.affine, indices)
    np.testing.assert_allclose(there, np.rint(there), atol=1e-4)
    np.testing.assert_array_equal(written.get_fdata().ravel(), source.get_fdata()[tuple(np.rint(there).astype(int).T)])


def test_pictures_stay_pictures_a_channel_a_file(tmp_path):
    """JPEG too, as PNG; a picture keeps its name; 16 bits stay."""
    data, noise = tmp_path / "set", np.random.default_rng(0)
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    mask = np.zeros((20, 30), np.uint8)
    mask[4:12, 5:20] = 255
    for number in range(5):
        pixels = noise.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "images" / f"p{number}.jpg", quality=100)
        Image.fromarray(mask).save(data / "masks" / f"p{number}.png")
    out = tmp_path / "Dataset501_Pictures"
    assert export(data, out, "--exemplars", 4) == 0
    training = sorted(path.name for path in (out / "imagesTr").iterdir())
    ids = [case.id for case in open_dataset(data).split("train")]
    assert training == sorted(f"{id_}_{channel:04d}.png" for id_ in ids for channel in range(3))
    for id_ in ids:
        source = np.asarray(Image.open(data / "images" / f"{id_}.jpg"))
        for channel in range(3):
            plane = np.asarray(Image.open(out / "imagesTr" / f"{id_}_{channel:04d}.png"))
            np.testing.assert_array_equal(plane, source[..., channel])
        np.testing.assert_array_equal(np.asarray(Image.open(out / "labelsTr" / f"{id_}.png")), mask // 255)
    assert json.loads((out / "dataset.json").read_text())["file_ending"] == ".png"
    assert score(out / "labelsTs", data, tmp_path / "own.json")["mean"]["dice"] == 1


# ---- numbers, there and back


def test_predictions_in_nnunets_numbers_score_as_they_would_in_the_datas(gaps, tmp_path, capsys):
    out = tmp_path / "Dataset501_Gaps"
    assert export(gaps, out, "--exemplars", 3) == 0
    about = json.loads((out / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "disc": 2, "block": 1}
    assert about["original_numbers"] == {"1": 3, "2": 7}
    assert "| disc | 2 | 7 |" in (out / "README.md").read_text()
    assert {*np.unique(voxels(next((out / "labelsTs").iterdir())))} == {0, 1, 2}

    # As nnU-Net leaves them: ID.nii.gz and its own JSON beside. The disc one column off, the block whole.
    (test,) = open_dataset(gaps).split("test")
    truth = nib.load(out / "labelsTs" / f"{test.id}.nii.gz")
    predicted = np.where(voxels(out / "labelsTs" / f"{test.id}.nii.gz") == 1, 1, 0)
    predicted[np.roll(voxels(out / "labelsTs" / f"{test.id}.nii.gz") == 2, 1, axis=1)] = 2
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder, lookup in ((theirs, [0, 1, 2]), (ours, [0, 3, 7])):
        folder.mkdir()
        nib.save(nib.Nifti1Image(np.array(lookup, np.uint8)[predicted], truth.affine), folder / f"{test.id}.nii.gz")
        (folder / "predict_from_raw_data_args.json").write_text("{}")
    found = score(theirs, out, tmp_path / "theirs.json")
    expected = score(ours, gaps, tmp_path / "ours.json")
    assert found["cases"] == expected["cases"]
    assert 0.5 < found["classes"]["disc"]["dice"] < 1
    assert found["classes"]["block"]["dice"] > found["classes"]["disc"]["dice"]

    # Against the data itself nnU-Net's numbers would be mistaken for others: they are refused.
    line = ["evaluate", "--predictions", theirs, "--data", gaps, "--out", tmp_path / "wrong.json"]
    assert main([str(word) for word in line]) == 2
    assert "[1, 2] that are no class" in capsys.readouterr().err


def test_what_nobody_decided_on_is_the_largest_number(tiny_dataset, tmp_path):
    """Numbers 5 (disc), 2 (ignore) → 1, 2."""
    labels = {"background": 0, "disc": 5, "ignore": 2}
    data = renumbered(tiny_dataset, tmp_path / "set", [0, 5, 2], labels)
    out = tmp_path / "Dataset501_Undecided"
    assert export(data, out, "--exemplars", 1) == 0
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "disc": 1, "ignore": 2}
    assert open_dataset(out).ignore == 2

    # The whole disc predicted, and more where nobody decided, which does not count.
    (test,) = open_dataset(out).split("test")
    truth = nib.load(test.label.paths[0])
    masks = tmp_path / "masks"
    masks.mkdir()
    nib.save(
        nib.Nifti1Image((voxels(test.label.paths[0]) > 0).astype(np.uint8), truth.affine), masks / f"{test.id}.nii.gz"
    )
    assert score(masks, out, tmp_path / "own.json")["mean"]["dice"] == 1


def test_some_classes(tiny_dataset, tmp_path):
    assert export(tiny_dataset, tmp_path / "raw", "--exemplars", 2, "--classes", "block") == 0
    out = tmp_path / "raw" / "Dataset501_set"
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "block": 1}
    (test,) = open_dataset(tiny_dataset).split("test")
    np.testing.assert_array_equal(voxels(out / "labelsTs" / f"{test.id}.nii.gz"), voxels(test.label.paths[0]) == 2)


def regions_of(regions: dict[str, tuple[int, ...]]) -> Dataset:
    numbers = sorted({number for members in regions.values() for number in members})
    labels = {f"part {number}": number for number in numbers}
    return Dataset(Path("brats"), "brats", labels, ("T1",), (), "", regions=regions)


def test_regions_are_written_over_each_other():
    """BraTS: 1 necrosis, 2 edema, 4 enhancing → 1, 2, 3. Whole tumour writes the edema, core on it the necrosis."""
    found = number_labels(regions_of({"enhancing": (4,), "core": (1, 4), "whole": (1, 2, 4)}))
    assert list(found.table.items()) == [("background", 0), ("whole", [1, 2, 3]), ("core", [1, 3]), ("enhancing", [3])]
    assert found.order == [2, 1, 3]
    assert found.lookup[[0, 1, 2, 4]].tolist() == [0, 1, 2, 3]

    # A region that its parts fill, and one whose parts nobody tells apart.
    assert number_labels(regions_of({"both": (1, 2), "left": (1,), "right": (2,)})).order == [1, 1, 2]
    assert number_labels(regions_of({"any": (3, 5)})).order == [1]
    with pytest.raises(UserError, match="--classes"):
        number_labels(regions_of({"a": (1, 2), "b": (2, 3)}))


# ---- whole or not at all


def test_what_is_there_is_not_touched(tiny_dataset, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    for out, naming in ((tmp_path, "not empty"), (tmp_path / "kept.txt", "a file")):
        assert export(tiny_dataset, out) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"--out {out} is {naming}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_nothing_half_written_stays(tiny_dataset, tmp_path, capsys):
    """A test image is damaged, which shows only when the others have been written."""
    data = shutil.copytree(tiny_dataset, tmp_path / "set")
    (test,) = open_dataset(data).split("test")
    test.images[0].write_bytes(test.images[0].read_bytes()[:2000])
    assert export(data, tmp_path / "made" / "raw", "--exemplars", 2) == 2
    assert str(test.images[0]) in capsys.readouterr().err
    assert not list((tmp_path / "made").iterdir())
