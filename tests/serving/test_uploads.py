"""What is sent: told by its content, bounded before it is unpacked, never a path."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image as Picture
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from cheaplunch.data.volume import read_volume
from cheaplunch.errors import UserError
from cheaplunch.serving.opened import TooLarge
from cheaplunch.serving.uploads import base_name, kind_of, series_name, store

LIMIT = 2**20


def nifti(array: np.ndarray, second: bool = False) -> bytes:
    return (nib.Nifti2Image if second else nib.Nifti1Image)(array, np.eye(4)).to_bytes()


def kept(folder: Path, content: bytes, name: str = "scan.nii.gz", limit_bytes: int = LIMIT):
    return store([(name, io.BytesIO(content))], folder, limit_bytes)


def written(array: np.ndarray, path: Path) -> bytes:
    if path.suffix == ".png":
        Picture.fromarray(array[0]).save(path)
    elif path.suffix in (".nrrd", ".mha"):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path), useCompression=True)
    else:
        nib.save(nib.Nifti1Image(array.T, np.diag([-1.0, -1, 1, 1])), path)
    return path.read_bytes()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".png"])
def test_the_content_counts_and_not_the_name(tmp_path, ending):
    array = np.random.default_rng(0).integers(0, 255, (3, 4, 5)).astype(np.uint8)
    content, folder = written(array, tmp_path / f"a{ending}"), tmp_path / "kept"
    folder.mkdir()
    stored = kept(folder, content, "../../etc/scan.dcm")
    assert stored.name == "scan"
    assert [path.name for path in folder.iterdir()] == [f"image{ending.removesuffix('.gz')}"]
    volume = read_volume(stored.sources)
    np.testing.assert_array_equal(volume.array[0], array[:1] if ending == ".png" else array)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_nifti_of_any_kind_unpacks_to_itself(tmp_path, second, order):
    form = nib.Nifti2Image if second else nib.Nifti1Image
    header = form.header_class(endianness=order)
    plain = form(np.arange(24, dtype=f"{order}i2").reshape(2, 3, 4), np.eye(4), header).to_bytes()
    assert kind_of(io.BytesIO(plain)) == ".nii"
    kept(tmp_path, gzip.compress(plain))
    assert (tmp_path / "image.nii").read_bytes() == plain


def test_what_is_none_of_them(tmp_path):
    for content in (b"", b"hello", gzip.compress(b"hello"), b"\x1f\x8b\x08junk", b"PK\x03\x04", b"%PDF-1.7", b"<svg/>"):
        with pytest.raises(UserError, match="scan.png is no image that is known here"):
            kept(tmp_path, content, "scan.png")
    with pytest.raises(UserError, match="0 files were sent"):
        store([], tmp_path, LIMIT)
    two = [("a.nii", io.BytesIO(nifti(np.zeros((2, 2, 2))))), ("b.nii", io.BytesIO(nifti(np.zeros((2, 2, 2)))))]
    with pytest.raises(UserError, match="2 files were sent"):
        store(two, tmp_path, LIMIT)


# ---- bombs


def test_a_header_that_promises_much_is_believed_and_refused(tmp_path):
    """64 GiB of zeros in a packed file of 1 KiB are not looked for."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((4096, 4096, 1024))
    header["vox_offset"] = 352
    bomb = gzip.compress(header.binaryblock + bytes(4 + 2**20))
    with pytest.raises(TooLarge, match=r"scan.nii.gz unpacks to 65536 MiB; at most 1 are taken"):
        kept(tmp_path, bomb)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0


def test_a_file_is_unpacked_no_further_than_it_says(tmp_path):
    """Behind 8 voxels come 50 MiB."""
    bomb = gzip.compress(nifti(np.zeros((2, 2, 2), np.uint8)) + bytes(50 * 2**20), 1)
    with pytest.raises(UserError, match="scan.nii.gz is cut off or damaged.*longer than it says"):
        kept(tmp_path, bomb)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000


@pytest.mark.parametrize("offset", [2.0**31, float("nan"), float("inf"), -1.0])
def test_voxels_begin_where_they_can(tmp_path, offset):
    """Before them nibabel would read as much as the header says."""
    plain = bytearray(nifti(np.zeros((2, 2, 2), np.uint8)))
    struct.pack_into("<f", plain, 108, offset)
    for content in (bytes(plain), gzip.compress(plain)):
        with pytest.raises(UserError, match="scan.nii.gz is cut off or damaged"):
            kept(tmp_path, content)


def test_damage_is_called_by_its_own_name(tmp_path):
    packed = gzip.compress(nifti(np.random.default_rng(0).normal(size=(9, 9, 9))))
    wrong_checksum = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    for content in (packed[: len(packed) // 2], wrong_checksum):
        with pytest.raises(UserError, match=r"^Müller scan.nii.gz is cut off or damaged"):
            kept(tmp_path, content, "C:\\patients\\Müller scan.nii.gz")


def dicom(path: Path, syntax: str, series: str = "1.2.3", position: float = 0) -> bytes:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.SeriesInstanceUID, data.Modality = series, "CT"
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, position], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [1, 1], 1
    data.Rows = data.Columns = 4
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelData = bytes(32)
    data.save_as(path, enforce_file_format=True)
    return path.read_bytes()


def test_dicom_files_are_taken_one_series_at_a_time(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    first = dicom(tmp_path / "a", ExplicitVRLittleEndian)
    second = dicom(tmp_path / "b", ExplicitVRLittleEndian, position=1)
    stored = store([("ct/I1", io.BytesIO(first)), ("ct/I2", io.BytesIO(second))], folder, LIMIT)
    assert (stored.name, stored.given) == ("ct", {"00000.dcm": "I1", "00001.dcm": "I2"})
    assert read_volume(stored.sources).array.shape == (1, 2, 4, 4)
    report = pydicom.dcmread(tmp_path / "a")
    report.Modality = "SR"
    report.save_as(tmp_path / "report")
    along = [("study/ct/I1", io.BytesIO(first)), ("study/R1", io.BytesIO((tmp_path / "report").read_bytes()))]
    assert store(along, folder, LIMIT).name == "ct"  # the folder of its images
    other = dicom(tmp_path / "c", ExplicitVRLittleEndian, series="1.2.4")
    with pytest.raises(UserError, match="^2 DICOM series were sent"):
        store([("I1", io.BytesIO(first)), ("I2", io.BytesIO(other))], folder, LIMIT)
    with pytest.raises(UserError, match="^I2 is cut off or damaged"):
        store([("I1", io.BytesIO(first)), ("I2", io.BytesIO(second[:300]))], folder, LIMIT)
    packed = dicom(tmp_path / "d", DeflatedExplicitVRLittleEndian)
    with pytest.raises(UserError, match="^I1 is a deflated DICOM file"):
        store([("I1", io.BytesIO(packed))], folder, LIMIT)


def test_names_are_for_reading():
    assert base_name("../../etc/passwd") == "passwd"
    assert base_name("C:\\scans\\a.nii") == "a.nii"
    assert base_name("a\r\nSet-Cookie: b") == "aSet-Cookie: b"
    assert base_name("") == base_name("x/") == "image"
    assert len(base_name("a" * 5000)) == 100
    assert series_name(["study/I1", "study/I2"]) == "study"
    assert series_name(["I1", "I2"]) == "series"
    assert series_name(["scan.dcm"]) == "scan"


def test_a_start_of_any_bytes_does_no_harm():
    """Told from a few bytes of each kind cut anywhere."""
    start = zlib.compress(bytes(2000), wbits=31)
    for length in range(len(start)):
        assert kind_of(io.BytesIO(start[:length])) is None
