"""`cheaplunch inspect`, end to end: the table in the terminal, the page, and what neither may say."""

import base64
import io
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from cheaplunch.__main__ import main
from cheaplunch.figures import class_colours
from cheaplunch.inspect_report import PICTURE_PX, slice_picture


def rewrite(path: Path, change) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj).copy()), image.affine), path)


def say(capsys, *words) -> str:
    """What `cheaplunch inspect` prints; one line a file however long, for the tests' folders have long names."""
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def data(tiny_dataset, tmp_path) -> Path:
    """The tiny data set under a name that HTML and rich's markup would trip over."""
    root = tmp_path / "a <b> [red]"
    for path in tiny_dataset.rglob("*.*"):
        copy = root / path.relative_to(tiny_dataset)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return root


def test_the_terminal_says_what_is_there(data, capsys):
    told = say(capsys, "--data", data)
    assert told.startswith("a <b> [red]\n")
    for line in (r"recognised +nnU-Net raw", r"cases +3: 2 train, 1 test", r"patients +3: 2 train, 1 test"):
        assert re.search(line, told)
    assert re.search(r"size, z×y×x +6 × 32 × 32 px", told) and re.search(r"orientation +LPS \(3\)", told)
    assert re.search(r"disc +1 +2 +1 +9 +0\.\d+", told) and "ml a case" in told
    assert "nothing suspicious found" in told


def test_findings_end_with_status_zero_and_name_the_file(data, capsys):
    for path in (data / "labelsTr").iterdir():
        rewrite(path, lambda label: np.where(label == 2, 7, label).astype(np.uint8))
    rewrite(data / "imagesTr" / "case_1_0000.nii.gz", lambda image: image * np.nan)
    told = say(capsys, "--data", data)
    assert "3 findings" in told
    assert "imagesTr/case_1_0000.nii.gz has 6144 NaN" in told
    assert told.count("a value of no class (7)") == 2


def test_a_folder_that_is_none_ends_with_status_two(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["inspect", "--data", str(tmp_path / "empty")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "the folder is empty" in captured.err


# ---- the page


def page_of(capsys, data: Path, out: Path) -> str:
    path = Path(say(capsys, "--data", data, "--out", out).splitlines()[-1].removeprefix("page: "))
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone_with_a_picture_of_every_case(data, tmp_path, capsys):
    page = page_of(capsys, data, tmp_path / "out")
    assert (tmp_path / "out" / "inspect.html").is_file()
    assert "<h1>a &lt;b&gt; [red]</h1>" in page and "Nothing suspicious found" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(pictures) == len(re.findall("src=", page)) == 3
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    assert picture.size == (PICTURE_PX, PICTURE_PX)
    assert "Slice 2 of case_" in page and "with the outlines of disc, block" in page


def test_findings_stand_first_and_bad_files_have_a_place(data, tmp_path, capsys):
    (data / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"broken")
    rewrite(data / "labelsTr" / "case_2.nii.gz", lambda label: label[:, :, :3])
    page = page_of(capsys, data, tmp_path / "page.html")
    order = [
        'Cannot be used <span class="count">2</span>',
        "labelsTr/case_2.nii.gz has shape",
        'id="folder"',
        'id="cases"',
    ]
    assert sorted(order, key=page.index) == order
    assert page.count("cannot be read</span>") == 1 and page.count('class="case odd"') == 2


def test_images_without_any_label(tmp_path, capsys):
    for number in range(2):
        Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(tmp_path / f"photo{number}.png")
    assert "2 of them unlabelled" in page_of(capsys, tmp_path, tmp_path / "out")


def save_series(folder: Path, voxels: np.ndarray, seed: int, gap: int | None = None) -> str:
    """A CT series of (k, rows, columns) int16, without the slice `gap`, of a patient who has a name; its UID."""
    uid = generate_uid()
    for k in range(len(voxels)):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = uid, generate_uid(), generate_uid()
        data.PatientName, data.PatientID, data.PatientBirthDate = "DOE^JANE", "4711", "19700203"
        data.StudyDate = data.SeriesDate = data.ContentDate = "20200304"
        data.SeriesDescription, data.Modality, data.InstanceNumber = "abdomen of Jane Doe", "CT", k + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [-20, -30, 5 * k], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [0.8, 0.8], 5
        data.Rows, data.Columns = voxels.shape[1:]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelData = voxels[k].astype(np.int16).tobytes()
        if k != gap:
            path = folder / f"IM{seed}{k}.dcm"
            data.save_as(path, enforce_file_format=True)
    return uid


def test_no_patient_is_named(tmp_path, capsys):
    """Two series in one folder, the second twice, and one with a gap, which is left out with a reason."""
    scans, random = tmp_path / "scans", np.random.default_rng(0)
    scans.mkdir()
    twice = random.normal(0, 200, (4, 8, 8))
    series = [(random.normal(0, 200, (4, 8, 8)), None), (twice, None), (twice, None), (twice, 1)]
    uids = [save_series(scans, voxels, seed, gap) for seed, (voxels, gap) in enumerate(series)]
    told = say(capsys, "--data", scans, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "image that is there twice: 1" in told and "left out" in told and page.count("<figure") == 3
    assert re.search(r"spacing, z×y×x +5 × 0.8 × 0.8 mm", told) and re.search(r"orientation +LPS \(3\)", told)
    for secret in ("doe", "jane", "4711", "1970", "2020", *uids):
        assert secret not in told.lower() and secret not in re.sub(r"base64,[^\"]+", "", page).lower()


def test_a_picture_keeps_proportions_and_outlines_in_the_class_colours():
    image, label = np.zeros((1, 20, 10), np.float32), np.zeros((20, 10), np.uint8)
    label[5:15, 2:8] = 3
    drawn = slice_picture(image, label, {"other": 1, "block": 3}, (0.5, 2.0))  # 10 mm high, 20 mm wide
    assert drawn.size == (PICTURE_PX, PICTURE_PX // 2)
    pixels = np.asarray(drawn)
    colour = (255 * class_colours(2)[1]).astype(np.uint8)
    line = (pixels == colour).all(axis=-1)
    assert line.any() and (pixels[~line] == 0).all()
    rows, columns = np.nonzero(line)
    assert rows.min() == pytest.approx(40, abs=4) and columns.max() == pytest.approx(256, abs=18)
    assert not line[80, 160]  # an outline, not a patch


@pytest.mark.real
def test_the_shared_folders(capsys, tmp_path):
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    for name in ("chaos", "hc18"):
        assert "nothing suspicious found" in say(capsys, "--data", folder / name)
