"""What tests of the server share: a run of a tiny network with random weights, and a DICOM series."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from cheaplunch.__main__ import main
from cheaplunch.runs import RunFolder
from cheaplunch.serving.opened import Loaded, load


@pytest.fixture(scope="session")
def run(tiny_dataset, tmp_path_factory) -> Path:
    """Of two steps, on the discs and blocks of `tiny_dataset`."""
    out = tmp_path_factory.mktemp("serving") / "run"
    words = ["finetune", "--data", tiny_dataset, "--out", out, "--backbone", "tiny-random", "--image-size", 64]
    words += ["--steps", 2, "--exemplars", 2, "--warmup-steps", 1, "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="session")
def loaded(run) -> Loaded:
    folder = RunFolder(run)
    return load(folder, folder.load_config())


@pytest.fixture
def save_series():
    """(folder, array) → the files of a series."""
    return _save_series


def _save_series(folder: Path, array: np.ndarray) -> list[Path]:
    """(k, rows, columns) uint16 as a CT series of 1 × 1 × 3 mm, files numbered from the top down."""
    uids = {tag: generate_uid() for tag in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")}
    folder.mkdir(parents=True)
    for k, pixels in enumerate(array):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        for tag, value in uids.items():
            setattr(data, tag, value)
        data.Modality, data.SeriesNumber, data.InstanceNumber, data.PatientName = "CT", 1, k + 1, "Doe^Jane"
        for tag in ("PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber", "StudyDate"):
            setattr(data, tag, "")
        for tag in ("StudyTime", "ReferringPhysicianName", "Manufacturer"):
            setattr(data, tag, "")
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 3 * k], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [1, 1], 3
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelData = pixels.tobytes()
        data.save_as(folder / f"IM{len(array) - k}", enforce_file_format=True)
    return sorted(folder.iterdir())
