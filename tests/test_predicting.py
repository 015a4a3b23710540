"""`cheaplunch predict`: from files to masks, on a run of a tiny network with random weights."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.affines import apply_affine
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from cheaplunch import predicting
from cheaplunch.__main__ import main
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.volume import read_label, read_volume, write_mask
from cheaplunch.errors import UserError
from cheaplunch.interactive import Mark, open_model
from cheaplunch.material import pick_window
from cheaplunch.predicting import Image, Request, assign, find_images
from cheaplunch.prediction import Predictor, segment_draws
from cheaplunch.prompting import Prompting
from cheaplunch.prompts import furthest_point
from cheaplunch.runs import RunFolder

SHARED = Path(__file__).parents[2] / "shared" / "data"
CLICKS = [{"class": "disc", "voxel": [11, 10, 2]}, {"class": "block", "voxel": [21, 22, 3]}]


def finetune(data: Path, out: Path, *more: object) -> Path:
    """A run of two steps."""
    words = ["finetune", "--data", data, "--out", out, "--backbone", "tiny-random", "--image-size", 64, "--steps", 2]
    assert main([str(word) for word in (*words, "--exemplars", 2, "--warmup-steps", 1, "--device", "cpu", *more)]) == 0
    return out


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory) -> Path:
    return finetune(tiny_dataset, tmp_path_factory.mktemp("predict") / "run")


def predict(run: Path, *words: object) -> int:
    return main(["predict", str(run), *map(str, words)])


def prompts(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def complaints(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("cheaplunch:")]


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


# ---- the command line


def test_a_folder_becomes_masks_on_their_grids(run, tiny_dataset, tmp_path, capsys):
    out, asked = tmp_path / "masks", {"case_0": CLICKS, "case_2_0000.nii.gz": CLICKS, "case_9": CLICKS}
    words = [tiny_dataset, "--out", out, "--prompts", prompts(tmp_path / "p.json", asked)]
    assert predict(run, *words) == 0
    told = capsys.readouterr().out
    assert f"masks written to {out}: 2" in told
    assert "without a mask: case_1" in told and "not among the inputs: case_9" in told
    assert sorted(path.name for path in out.iterdir()) == ["case_0.nii.gz", "case_2.nii.gz", "predictions.jsonl"]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        mask, image = nib.load(out / line["mask"]), line["mask"].replace(".nii", "_0000.nii")
        original = nib.load(tiny_dataset / "imagesTr" / image)
        assert mask.shape == original.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, original.affine)
        voxels = np.asarray(mask.dataobj)
        assert line["voxels"] == {"disc": (voxels == 1).sum(), "block": (voxels == 2).sum()}
        assert line["voxels"]["disc"] and line["voxels"]["block"]
        assert 0.5 < line["quality"]["disc"] <= 1

    before = (out / "case_0.nii.gz").stat().st_mtime_ns
    assert predict(run, *words) == 0
    told = capsys.readouterr().out
    assert f"masks written to {out}: 0\nthere already: 2" in told
    assert (out / "case_0.nii.gz").stat().st_mtime_ns == before


def test_a_mask_of_other_prompts_is_not_taken_nor_replaced_unasked(run, tiny_dataset, tmp_path, capsys):
    image, out = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz", tmp_path / "masks"
    words = [image, "--out", out, "--no-propagate", "--prompts"]
    assert predict(run, *words, prompts(tmp_path / "p.json", CLICKS)) == 0
    first = read(out / "case_0.nii.gz")
    assert first[..., 2:4].any() and not first[..., [0, 1, 4, 5]].any()
    assert predict(run, *words, prompts(tmp_path / "same.json", CLICKS)) == 0  # whatever the file is called
    capsys.readouterr()
    other = prompts(tmp_path / "q.json", CLICKS[:1])
    assert predict(run, *words, other) == 2
    [line] = complaints(capsys)
    assert "case_0.nii.gz is there, made from something else; --overwrite" in line
    np.testing.assert_array_equal(read(out / "case_0.nii.gz"), first)
    assert predict(run, *words, other, "--overwrite") == 0
    assert not read(out / "case_0.nii.gz")[..., 3].any()


def test_voxels_and_both_worlds_mean_the_same(run, tmp_path):
    """On an image whose axes are turned, flipped and permuted."""
    turn = np.array([[0, -0.6, 0.8], [0, 0.8, 0.6], [-1, 0, 0]]) @ np.diag([1.0, 1.2, 3])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, (11, -7, 30)
    array = np.random.default_rng(0).normal(100, 20, (20, 24, 7)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "scan.nii.gz")
    masks = []
    for coordinates, flip in (("voxel", None), ("world_ras", (1, 1, 1)), ("world_lps", (-1, -1, 1))):
        entries = []
        for name, voxel in (("disc", (11, 10, 2)), ("block", (6, 18, 4))):
            place = voxel if flip is None else apply_affine(affine, voxel) * flip
            entries.append({"class": name, coordinates: [float(number) for number in place]})
        out, file = tmp_path / coordinates, prompts(tmp_path / f"{coordinates}.json", {"scan": entries})
        assert predict(run, tmp_path / "scan.nii.gz", "--out", out, "--prompts", file) == 0
        masks.append(read(out / "scan.nii.gz"))
    assert set(np.unique(masks[0])) == {0, 1, 2}
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])


def test_one_bad_file_does_not_stop_the_others(run, tiny_dataset, tmp_path, capsys):
    images = Path(shutil.copytree(tiny_dataset / "imagesTr", tmp_path / "images"))
    whole = (images / "case_1_0000.nii.gz").read_bytes()
    (images / "case_1_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    shutil.copy(images / "case_0_0000.nii.gz", images / "off_0000.nii.gz")
    off = [{"class": "disc", "voxel": [40, 0, 0]}]
    asked = {"case_0": CLICKS, "case_1": CLICKS, "case_2": CLICKS, "off": off}
    out, file = tmp_path / "masks", prompts(tmp_path / "p.json", asked)
    assert predict(run, images, "--out", out, "--prompts", file) == 1
    damaged, outside = complaints(capsys)
    assert "case_1_0000.nii.gz is cut off or damaged" in damaged
    assert f"{file}, entry 1 of 'off': voxel [40.0, 0.0, 0.0] lies outside of off_0000.nii.gz" in outside
    assert sorted(path.name for path in out.iterdir()) == ["case_0.nii.gz", "case_2.nii.gz", "predictions.jsonl"]


def test_formats(run, tiny_dataset, tmp_path, capsys):
    image = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"
    words = [image, "--prompts", prompts(tmp_path / "p.json", CLICKS), "--out"]
    assert predict(run, *words, tmp_path / "same") == 0
    assert predict(run, *words, tmp_path / "nrrd", "--format", "nrrd") == 0
    volume = read_volume([image])
    label = read_label(tmp_path / "same" / "case_0.nii.gz", volume)
    assert label.any()
    np.testing.assert_array_equal(read_label(tmp_path / "nrrd" / "case_0.nrrd", volume), label)
    capsys.readouterr()
    assert predict(run, *words, tmp_path / "seg", "--format", "seg") == 2
    assert f"--format seg cannot hold a mask of {image}" in capsys.readouterr().err
    assert not (tmp_path / "seg").exists()  # nor a record of a mask that is not there


def test_a_damaged_run_is_named(run, tiny_dataset, tmp_path, capsys):
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    words = [tiny_dataset, "--out", tmp_path / "masks", "--prompts", prompts(tmp_path / "p.json", {"case_0": CLICKS})]
    for content in ("{", "[]", "null", '{"labels": ["disc", "block"], "channels": 1}', '{"labels": {"disc": "1"}}'):
        (damaged / "environment.json").write_text(content)
        assert predict(damaged, *words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{damaged / 'environment.json'} is damaged" in line


def test_a_mistake_about_the_only_image_is_the_users(run, tiny_dataset, tmp_path, capsys):
    image, twice = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz", {"voxel": [[5, 5, 2], [9, 9, 2]]}
    damaged = tmp_path / "case_7.nii.gz"
    damaged.write_bytes(image.read_bytes()[:900])
    (series := tmp_path / "series").mkdir()
    (series / "IM1.dcm").write_bytes(bytes(128) + b"DICM")
    for given, asked, naming in (
        (image, [{"class": "disc", "voxel": [11, 140, 2]}], "p.json, entry 1: voxel [11.0, 140.0, 2.0] lies outside"),
        (image, [{"class": "disc", "box": twice}] * 2, "p.json, entry 2: its slice has a box of disc already"),
        (image, {"case_9": CLICKS}, "p.json is for case_9, and there is no such image; the input has: case_0"),
        (image, {"case_0": []}, "p.json has no prompts in it"),
        (damaged, CLICKS, "case_7.nii.gz is cut off or damaged"),
        (series, CLICKS, "IM1.dcm is cut off or damaged"),
    ):
        assert predict(run, given, "--out", tmp_path / "masks", "--prompts", prompts(tmp_path / "p.json", asked)) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.strip().splitlines()
        assert naming in line and not captured.out
        assert not (tmp_path / "masks").exists()


def test_ctrl_c_leaves_whole_masks(run, tiny_dataset, tmp_path, monkeypatch, capsys):
    request = Request((tiny_dataset,), tmp_path / "masks", str(prompts(tmp_path / "p.json", {"case_0": CLICKS})))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nib, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            predicting.predict(RunFolder(run), RunFolder(run).load_config(), request)
    assert [path.name for path in request.out.iterdir()] == ["predictions.jsonl"]
    outcome = predicting.predict(RunFolder(run), RunFolder(run).load_config(), request)
    assert [path.name for path in outcome.written] == ["case_0.nii.gz"]
    monkeypatch.setattr(predicting, "predict", stop)
    assert predict(run, tiny_dataset, "--out", request.out, "--prompts", request.prompts) == 1
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        ("SET", "--prompts is missing: "),
        ("SET --prompts auto", "--prompts auto: "),
        ("SET --prompts nowhere.json", "nowhere.json: no such file"),
        ("SET --prompts list.json", "entry 1 does not say which of 3 images it is for (case_0, case_1, case_2)"),
        ("nowhere --prompts list.json", "nowhere: no such file or folder"),
        ("SET/imagesTr/case_0_0000.nii.gz --prompts lung.json", "entry 1: \"class\" is 'lung'; choose of: disc, block"),
        ("SET --out SET/masks --prompts list.json", "would pass for images"),
        ("SET --out list.json --prompts list.json", "--out list.json is a file"),
    ],
)
def test_wrong_words(words, naming, run, tiny_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts(tmp_path / "list.json", CLICKS)
    prompts(tmp_path / "lung.json", [{"class": "lung", "voxel": [1, 2, 3]}])
    given = words.replace("SET", str(tiny_dataset)).split()
    assert predict(run, *given, *([] if "--out" in given else ["--out", "masks"])) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert naming in line
    assert not captured.out
    assert not (tmp_path / "masks").exists()


def test_a_network_of_classes_needs_no_prompts(tiny_dataset, tmp_path, capsys):
    free = finetune(tiny_dataset, tmp_path / "free", "--head", "classes", "--training-prompts", "none")
    masks, scored = tmp_path / "masks", tmp_path / "scored"
    assert predict(free, tiny_dataset, "--out", masks) == 0
    evaluate = ["evaluate", free, "--data", tiny_dataset, "--no-baseline", "--out", tmp_path / "r.json"]
    assert main([str(word) for word in (*evaluate, "--save-masks", scored)]) == 0
    (same,) = scored.iterdir()
    np.testing.assert_array_equal(read(masks / same.name), read(same))
    assert len(list(masks.glob("*.nii.gz"))) == 3
    capsys.readouterr()
    assert predict(free, tiny_dataset, "--out", masks, "--prompts", prompts(tmp_path / "p.json", CLICKS)) == 2
    assert "finds its classes by itself" in capsys.readouterr().err


# ---- DICOM


def save_series(folder: Path, array: np.ndarray, affine: np.ndarray, prefix: str = "IM") -> str:
    """(i, j, k) uint16 voxels and their RAS affine as a CT series, slices from the top down; returns its UID."""
    lps, uid, frame, study = np.diag([-1, -1, 1, 1]) @ affine, generate_uid(), generate_uid(), generate_uid()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(array.shape[2]):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = uid, study, frame
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", 1, array.shape[2] - k
        for tag in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"):
            setattr(data, tag, "")
        for tag in ("StudyDate", "StudyTime", "ReferringPhysicianName", "Manufacturer"):
            setattr(data, tag, "")
        data.ImagePositionPatient = [f"{v:.6f}" for v in apply_affine(lps, (0, 0, k))]
        data.ImageOrientationPatient = [f"{v:.10f}" for v in (lps[:3, :2] / spacing[:2]).T.ravel()]
        data.PixelSpacing, data.SliceThickness = [float(spacing[1]), float(spacing[0])], float(spacing[2])
        data.Columns, data.Rows = array.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelData = np.ascontiguousarray(array[:, :, k].T).tobytes()
        data.save_as(folder / f"{prefix}{array.shape[2] - k}", enforce_file_format=True)
    return uid


@pytest.fixture
def study(tmp_path) -> tuple[Path, Path]:
    """A tree of two patients' series, and the first as NIfTI."""
    array = np.random.default_rng(3).integers(20, 220, (20, 24, 6)).astype(np.uint16)
    affine = np.diag([-1.5, -1.5, 4, 1.0])
    affine[:3, 3] = 20, 30, -40
    save_series(tmp_path / "tree" / "p1" / "ct", array, affine)
    save_series(tmp_path / "tree" / "p2" / "ct", array[..., ::-1], affine)
    (tmp_path / "tree" / "p2" / "readme.txt").write_text("not an image")
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "p1.nii.gz")
    return tmp_path / "tree", tmp_path / "p1.nii.gz"


def test_a_dicom_tree_becomes_segs_on_the_right_slices(run, study, tmp_path):
    tree, nifti = study
    entries = [
        {"class": "disc", "world_lps": [0.0, -12.0, -32.0]},
        {"class": "block", "world_lps": [-11.0, -20.0, -28.0]},
    ]
    assert nib.load(nifti).affine[2, 3] == -40  # so that -32 mm is slice 2 and -28 slice 3
    file = prompts(tmp_path / "p.json", {"p1/ct": entries, "p2/ct": entries})
    assert predict(run, tree, "--out", tmp_path / "segs", "--prompts", file, "--no-propagate") == 0
    file = prompts(tmp_path / "q.json", entries)
    assert predict(run, nifti, "--out", tmp_path / "niftis", "--prompts", file, "--no-propagate") == 0
    mask = read(tmp_path / "niftis" / "p1.nii.gz")
    found = tmp_path / "segs" / "p1" / "ct.dcm"
    label = read_label(found, read_volume([tree / "p1" / "ct"]), {"disc": 1, "block": 2})
    np.testing.assert_array_equal(label, read_label(tmp_path / "niftis" / "p1.nii.gz", read_volume([nifti])))
    assert [k for k in range(6) if (mask[..., k] == 1).any()] == [2]
    assert [k for k in range(6) if (mask[..., k] == 2).any()] == [3]
    assert [s.SegmentLabel for s in pydicom.dcmread(found).SegmentSequence] == ["disc", "block"]
    assert (tmp_path / "segs" / "p2" / "ct.dcm").is_file()


def test_what_was_predicted_of_a_dicom_tree_is_found_to_be_scored(run, study, tmp_path):
    tree, _ = study
    entries = [{"class": "disc", "voxel": [8, 8, 2]}, {"class": "block", "voxel": [16, 12, 3]}]
    file = prompts(tmp_path / "p.json", {"p1/ct": entries, "p2/ct": entries})
    assert predict(run, tree, "--out", tmp_path / "segs", "--prompts", file, "--no-propagate") == 0
    for patient in ("p1", "p2"):
        volume = read_volume([tree / patient / "ct"])
        label = read_label(tmp_path / "segs" / patient / "ct.dcm", volume)
        assert set(np.unique(label)) == {0, 1, 2}
        # What the tree names first is not what the run does: segments are known by their names.
        write_mask(np.choose(label, [0, 2, 1]), volume, tree / patient / "seg.dcm", {"block": 1, "disc": 2})
    words = ["--predictions", tmp_path / "segs", "--data", tree, "--out", tmp_path / "scores.json"]
    assert main(["evaluate", *map(str, words)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: own["dice"] for name, own in scores["classes"].items()} == {"block": 1, "disc": 1}


def test_series_are_called_as_cases_are(study):
    tree, _ = study
    save_series(tree / "p1" / "ct", np.full((4, 4, 5), 9, np.uint16), np.diag([-1.0, -1, 2, 1]), "B")
    save_series(tree / "p2" / "ct", np.full((4, 4, 5), 9, np.uint16), np.diag([-1.0, -1, 2, 1]), "B")
    (tree / "p2" / "ct" / "B2").unlink()  # a series that lacks a slice is none, and has no number
    images, _ = find_images([tree], 1, tree.parent / "out")
    assert sorted(image.name for image in images) == ["p1/ct_1", "p1/ct_2", "p2/ct"]
    cases = open_dataset(tree, labelled=False).cases
    assert {case.id: case.images for case in cases} == {i.name.replace("/", "_"): i.sources for i in images}


def test_a_damaged_slice_spoils_its_series_alone(study):
    tree, _ = study
    broken = next((tree / "p2" / "ct").iterdir())
    broken.write_bytes(broken.read_bytes()[:900])
    images, failed = find_images([tree], 1, tree.parent / "out")
    assert [image.name for image in images] == ["p1/ct"]
    assert len(failed) == 1 and str(broken) in failed[0]


# ---- which images


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(*inputs: Path, channels: int | None = 1) -> dict[str, list[str]]:
    """Of what `find_images` finds: name → file names."""
    images, failed = find_images(inputs, channels, inputs[0].parent / "out of the way")
    assert not failed
    return {image.name: [source.name for source in image.sources] for image in images}


def test_masks_are_named_as_images_and_lie_as_they_do(tmp_path):
    root = touch(tmp_path / "in", "a/t2.nii.gz", "b/t2.nrrd", "c.png", "notes.txt", ".hidden.png")
    assert names(root) == {"a/t2": ["t2.nii.gz"], "b/t2": ["t2.nrrd"], "c": ["c.png"]}
    assert names(root / "a" / "t2.nii.gz") == {"t2": ["t2.nii.gz"]}
    # Two of one name go by their folders; a file that is given twice is one.
    assert sorted(names(root / "a" / "t2.nii.gz", root / "b", root / "b" / "t2.nrrd")) == ["a/t2", "b/t2"]


def test_channels_are_files_side_by_side(tmp_path):
    two = touch(tmp_path / "two", "x_0000.nii.gz", "x_0001.nii.gz", "y_0000.nii.gz")
    assert names(two, channels=2) == {"x": ["x_0000.nii.gz", "x_0001.nii.gz"], "y_0000": ["y_0000.nii.gz"]}
    assert names(two / "x_0001.nii.gz", two / "x_0000.nii.gz", channels=2) == {"x": ["x_0000.nii.gz", "x_0001.nii.gz"]}
    # For a run of one channel these are numbers of frames, and y_0000 is the only one of y.
    assert sorted(names(two, channels=1)) == ["x_0000", "x_0001", "y"]


def test_masks_never_take_an_image_s_place(tmp_path, run):
    root = touch(tmp_path / "in", "a.nii.gz", "a.nrrd")
    file = str(prompts(tmp_path / "p.json", {"a": CLICKS}))
    config = RunFolder(run).load_config()
    with pytest.raises(UserError, match="would take the place of"):
        predicting.predict(RunFolder(run), config, Request((root / "a.nii.gz",), root, file))
    with pytest.raises(UserError, match="would both become"):
        predicting.predict(RunFolder(run), config, Request((root,), tmp_path / "out", file, "nii.gz"))


def test_prompts_find_their_image_by_any_of_its_names():
    images = [Image(f"{ward}/scan", (Path(f"in/{ward}/scan.nii.gz"),), ("scan.nii.gz", "scan")) for ward in "ab"]
    mark = Mark("disc", "voxel", ((1, 2, 3),))
    assert assign({"a/scan": [mark], "c": [mark]}, images) == ({"a/scan": [mark]}, ["c"])
    assert assign({"scan.nii.gz": [mark]}, images[:1]) == ({"a/scan": [mark]}, [])
    with pytest.raises(UserError, match="could mean a/scan or b/scan"):
        assign({"scan": [mark]}, images)


# ---- as evaluation has it


@pytest.mark.real
def test_real_clicks_give_the_masks_of_evaluation(tmp_path, weights):
    """One click per organ and slice, on a real volume of oblique axes, in millimetres, by a run of LiteMedSAM."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    data = tmp_path / "chaos"
    for name in ("imagesTr/chaos_13_0000", "labelsTr/chaos_13", "imagesTs/chaos_1_0000", "labelsTs/chaos_1"):
        link = data / f"{name}.nii.gz"
        link.parent.mkdir(parents=True)
        link.symlink_to(SHARED / "chaos" / f"{name}.nii.gz")
    shutil.copy(SHARED / "chaos" / "dataset.json", data)
    more = ["--backbone", "lite-medsam", "--image-size", 64, "--prompts-per-image", 1]
    run = RunFolder(finetune(data, tmp_path / "run", *more))
    config, dataset = run.load_config(), open_dataset(data)
    (case,) = dataset.split("test")
    loaded = load_case(case, dataset, pick_window(config, dataset), config.data.axis)
    affine = nib.load(case.images[0]).affine
    model = open_model(run, config)
    opened = model.open(case.images)
    entries = []
    for number, truth in enumerate(loaded.label):
        for name, k in dataset.labels.items():
            if (truth == k).any():
                x, y = furthest_point(truth == k)
                voxel = opened.places.off_slices(x, y, number, "voxel")
                entries.append({"class": name, "world_ras": apply_affine(affine, voxel).tolist()})
    file = prompts(tmp_path / "p.json", {case.id: entries})
    assert predict(run.root, *case.images, "--out", tmp_path / "masks", "--prompts", file, "--no-propagate") == 0
    predictor: Predictor = model.predictor
    [drawn] = segment_draws(predictor, loaded, Prompting("furthest"), [np.random.default_rng(0)])
    label = read_label(tmp_path / "masks" / case.mask_name, loaded.volume)
    np.testing.assert_array_equal(label, drawn.label)
    assert len(np.unique(label)) > 1

    [drawn] = segment_draws(predictor, loaded, Prompting("one-click"), [np.random.default_rng(0)])
    homes = {k: int((loaded.label == k).sum(axis=(1, 2)).argmax()) for k in dataset.labels.values()}
    clicks = []
    for name, k in dataset.labels.items():
        x, y = furthest_point(loaded.label[homes[k]] == k)
        clicks.append({"class": name, "voxel": [round(v) for v in opened.places.off_slices(x, y, homes[k], "voxel")]})
    file = prompts(tmp_path / "one.json", clicks)
    assert predict(run.root, *case.images, "--out", tmp_path / "carried", "--prompts", file) == 0
    np.testing.assert_array_equal(read_label(tmp_path / "carried" / case.mask_name, loaded.volume), drawn.label)
