"""A tiny nnU-Net folder to break in every way."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def shared_data():
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


def _save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def save_nifti():
    """(path, array in file axes, affine = identity) → path."""
    return _save_nifti


@pytest.fixture
def folder(tmp_path):
    """Three training volumes of (i, j, k) = (4, 3, 2) voxels; label 1 on one voxel, 2 on two."""
    root = tmp_path / "set"
    label = np.zeros((4, 3, 2), np.uint8)
    label[0, 0, 0], label[1:3, 0, 1] = 1, 2
    for id_ in ("case_10", "case_2", "case_1"):
        image = np.random.default_rng(0).normal(100, 20, (4, 3, 2)).astype(np.float32)
        _save_nifti(root / "imagesTr" / f"{id_}_0000.nii.gz", image)
        _save_nifti(root / "labelsTr" / f"{id_}.nii.gz", label)
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return root


@pytest.fixture
def edit_json(folder):
    def edit(**changes):
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.fixture
def write_series():
    """(folder, heights in mm, file name with {} for a number, modality) → a DICOM series of 4 columns × 2 rows.

    The first file is at the first height; its pixels are 1, those of the next 2, and so on.
    """

    def write(folder: Path, heights: tuple[float, ...], name: str, modality: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        series, study, frame = generate_uid(), generate_uid(), generate_uid()
        for number, height in enumerate(heights, start=1):
            data = pydicom.Dataset()
            data.file_meta = FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
            data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
            data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, study, frame
            data.Modality, data.SeriesNumber, data.InstanceNumber = modality, 1, number
            for tag in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"):
                setattr(data, tag, "")
            for tag in ("StudyDate", "StudyTime", "ReferringPhysicianName", "Manufacturer"):
                setattr(data, tag, "")
            data.Columns, data.Rows, data.PixelSpacing, data.SliceThickness = 4, 2, [1, 1], 5
            data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, height], [1, 0, 0, 0, 1, 0]
            data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
            data.PixelRepresentation, data.SamplesPerPixel = 0, 1
            data.PhotometricInterpretation = "MONOCHROME2"
            data.PixelData = np.full((2, 4), number, np.uint16).tobytes()
            data.save_as(folder / name.format(number), enforce_file_format=True)
        return folder

    return write
