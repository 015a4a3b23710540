"""Files as they come from broken disks, half copies, wrong exports and hostile hands: one line that names the file."""

import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from cheaplunch.data.volume import read_grid, read_label, read_volume
from cheaplunch.errors import UserError

SHAPE = (20, 16, 12)
VOXELS = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
PAGES = VOXELS.astype(np.uint8).T


# -------------------------------------------------------------------- whole files, by ending


def saved(save, suffix, folder):
    path = folder / f"whole{suffix}"
    save(path)
    return path.read_bytes()


def nifti(array=VOXELS, affine=None):
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_bytes()


def itk(suffix, packed=False, array=VOXELS):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    return lambda folder: saved(lambda path: sitk.WriteImage(image, str(path), packed), suffix, folder)


def picture(form, array=PAGES[0], **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(**options):
    first, *others = map(Image.fromarray, PAGES)
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=others, **options)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def h5(fill):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return buffer.getvalue()


def dicom(array=VOXELS[:, :, 0], **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=["1"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.Modality, data.PatientName = generate_uid(entropy_srcs=["2"]), "CT", "DOE^JANE"
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [1, 1], 2
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Columns, data.Rows = array.shape
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelData = array.T.tobytes()
    for tag, value in tags.items():
        if value is None:
            delattr(data, tag)
        else:
            setattr(data, tag, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    return buffer.getvalue()


WHOLE = {
    "plain.nii": lambda _: nifti(),
    "packed.nii.gz": lambda _: gzip.compress(nifti(), mtime=0),
    "plain.nrrd": itk(".nrrd"),
    "packed.nrrd": itk(".nrrd", True),
    "plain.mha": itk(".mha"),
    "packed.mha": itk(".mha", True),
    "grey.png": lambda _: picture("PNG"),
    "grey.jpg": lambda _: picture("JPEG"),
    "grey.bmp": lambda _: picture("BMP"),
    "plain.tif": lambda _: tiff(),
    "packed.tif": lambda _: tiff(compression="tiff_deflate"),
    "slice.npz": lambda _: npz(image=VOXELS[0], label=VOXELS[0]),
    "case.npy.h5": lambda _: h5(lambda file: file.create_dataset("image", data=VOXELS, compression="gzip")),
    "slice.dcm": lambda _: dicom(),
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {name: make(folder) for name, make in WHOLE.items()}


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_files_read(tmp_path, whole, name):
    (tmp_path / name).write_bytes(whole[name])
    assert read_volume([tmp_path / name]).array.size in (VOXELS.size, VOXELS[0].size, PAGES[0].size, 20 * 16)


# -------------------------------------------------------------------- what happens to any file


def flip(data, at, mask=0xFF):
    at = at if at >= 0 else len(data) + at
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


ANY = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "cut in the header": lambda data: data[:60],
    "a third": lambda data: data[: len(data) // 3],
    "half": lambda data: data[: len(data) // 2],
    "nine tenths": lambda data: data[: len(data) * 9 // 10],
    "zeros": lambda data: bytes(len(data)),
    "a web page": lambda data: b"<html><body>404 Not Found</body></html>\n",
    "header garbled": lambda data: bytes(b ^ 0x55 for b in data[:400]) + data[400:],
    "its first half lost": lambda data: data[len(data) // 2 :],
}


# -------------------------------------------------------------------- what happens to one format


def put(form, at, *values):
    """Overwrites bytes of a plain NIfTI header."""
    return lambda data: data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def in_gz(change):
    return lambda data: gzip.compress(change(gzip.decompress(data)), mtime=0)


def line(key, value, separator):
    """Replaces a line of a text header."""
    pattern = rb"(?m)^" + re.escape(key.encode()) + rb" ?" + separator.encode() + rb".*$"

    def change(data):
        changed, count = re.subn(pattern, f"{key}{separator} {value}".encode(), data, count=1)
        assert count == 1
        return changed

    return change


def nrrd(key, value):
    return line(key, value, ":")


def mha(key, value):
    return line(key, value, "=")


def png_size(width, height, bits=8):
    """A PNG header that says so, with its checksum."""

    def change(data):
        head = b"IHDR" + struct.pack(">II", width, height) + bytes([bits]) + data[25:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]

    return change


def tiff_tag(tag, value):
    """Overwrites the value of a tag in the first directory (little-endian)."""

    def change(data):
        (start,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from("<H", data, entry)[0] == tag:
                return data[: entry + 2] + struct.pack("<HII", 4, 1, value) + data[entry + 12 :]
        raise AssertionError(tag)

    return change


def jpeg_size(width, height):
    def change(data):
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]

    return change


def member(header, content=b"", name="image.npy"):
    """An .npz of one array with a header made by hand."""

    def change(_):
        text = header.encode() + b" " * (117 - len(header)) + b"\n"
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content)
        return buffer.getvalue()

    return change


def array(shape, descr="<f4"):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def with_value(value, kind=np.float32):
    changed = VOXELS.astype(kind)
    changed[3, 2, 1] = value
    return changed


def always(data):
    return lambda _: data


def made(save):
    """Made anew rather than changed."""
    return lambda _: save()


DIMS = 40  # where a NIfTI-1 header has dim[0]
HUGE = "1000000 1000000 1000"

ONE = {
    "plain.nii": {
        "dim huge": put("<4h", DIMS, 3, 32000, 32000, 32000),
        "dim 5": put("<h", DIMS, 5),
        "dim 2": put("<h", DIMS, 2),
        "dim zero": put("<4h", DIMS, 3, 0, 16, 12),
        "dim negative": put("<4h", DIMS, 3, -20, 16, 12),
        "dim one more": put("<4h", DIMS, 3, 20, 16, 13),
        "type unknown": put("<h", 70, 77),
        "type wider": put("<h", 70, 64),
        "type complex": put("<2h", 70, 32, 64),
        "type RGB": put("<2h", 70, 128, 24),
        "offset huge": put("<f", 108, 1e9),
        "offset NaN": put("<f", 108, float("nan")),
        "sform zero": put("<12f", 280, *[0] * 12),
        "sform NaN": put("<12f", 280, *[float("nan")] * 12),
        "magic of Analyze": put("4s", 344, b"XXXX"),
        "a NaN": made(lambda: nifti(with_value(np.nan))),
        "infinity": made(lambda: nifti(with_value(-np.inf))),
        "beyond float32": made(lambda: nifti(with_value(1e300, np.float64))),
        "slope huge": put("<2f", 112, 3e38, 0),
    },
    "packed.nii.gz": {
        "checksum": lambda data: flip(data, -6),
        "length": lambda data: flip(data, -2),
        "middle": lambda data: flip(data, len(data) // 2),
        "early": lambda data: flip(data, 30),
        "not packed": lambda data: gzip.decompress(data),
        "dim huge": in_gz(put("<4h", DIMS, 3, 32000, 32000, 32000)),
        "dim 4 huge": in_gz(put("<5h", DIMS, 4, 20, 16, 12, 32000)),
        "type wider": in_gz(put("<h", 70, 64)),
        "half inside": in_gz(lambda data: data[: len(data) // 2]),
        "packed twice": lambda data: gzip.compress(data, mtime=0),
        "nothing inside": always(gzip.compress(b"", mtime=0)),
    },
    "plain.nrrd": {
        "sizes huge": nrrd("sizes", HUGE),
        "sizes beyond 64 bits": nrrd("sizes", "9999999999 9999999999 9999999999"),
        "sizes one more": nrrd("sizes", "20 16 13"),
        "sizes zero": nrrd("sizes", "20 16 0"),
        "sizes negative": nrrd("sizes", "20 16 -12"),
        "sizes two": nrrd("sizes", "20 16"),
        "dimension 17": nrrd("dimension", "17"),
        "dimension words": nrrd("dimension", "three"),
        "type unknown": nrrd("type", "quaternion"),
        "type wider": nrrd("type", "double"),
        "type block": nrrd("type", "block"),
        "directions zero": nrrd("space directions", "(0,0,0) (0,0,0) (0,0,0)"),
        "directions NaN": nrrd("space directions", "(nan,0,0) (0,1,0) (0,0,1)"),
        "encoding unknown": nrrd("encoding", "rot13"),
        "voxels elsewhere": nrrd("encoding", "raw\ndata file: gone.raw"),
        "voxels of the system": nrrd("encoding", "raw\ndata file: /etc/passwd"),
        "voxels in a list": nrrd("encoding", "raw\ndata file: LIST"),
    },
    "packed.nrrd": {
        "sizes huge": nrrd("sizes", HUGE),
        "sizes ten times": nrrd("sizes", "200 16 12"),
        "middle": lambda data: flip(data, len(data) * 2 // 3),
        "checksum": lambda data: flip(data, -6),
        "called raw": nrrd("encoding", "raw"),
    },
    "plain.mha": {
        "size huge": mha("DimSize", HUGE),
        "size one more": mha("DimSize", "20 16 13"),
        "size zero": mha("DimSize", "20 16 0"),
        "size negative": mha("DimSize", "20 -16 12"),
        "size words": mha("DimSize", "many"),
        "dimensions 99": mha("NDims", "99"),
        "type unknown": mha("ElementType", "MET_OTHER"),
        "type wider": mha("ElementType", "MET_DOUBLE"),
        "spacing zero": mha("ElementSpacing", "0 0 0"),
        "matrix zero": mha("TransformMatrix", "0 0 0 0 0 0 0 0 0"),
        "voxels elsewhere": mha("ElementDataFile", "gone.raw"),
        "voxels of the system": mha("ElementDataFile", "/etc/passwd"),
        "voxels in a list": mha("ElementDataFile", "LIST"),
    },
    "packed.mha": {
        "size huge": mha("DimSize", HUGE),
        "size ten times": mha("DimSize", "200 16 12"),
        "middle": lambda data: flip(data, len(data) * 2 // 3),
        "checksum": lambda data: flip(data, -2),
        "called plain": mha("CompressedData", "False"),
    },
    "grey.png": {
        "size huge": png_size(100000, 100000),
        "size below Pillow's limit": png_size(9000, 9000),
        "size zero": png_size(0, 16),
        "depth unknown": png_size(20, 16, 5),
        "header checksum": lambda data: flip(data, 29),
        "middle": lambda data: flip(data, len(data) // 2),
    },
    "grey.jpg": {
        "size huge": jpeg_size(65000, 65000),
        "size below Pillow's limit": jpeg_size(9000, 9000),
        "size zero": jpeg_size(0, 16),
        "tables lost": lambda data: data.replace(b"\xff\xdb", b"\xff\xfe", 1),
    },
    "grey.bmp": {
        "size huge": lambda data: data[:18] + struct.pack("<ii", 60000, 60000) + data[26:],
        "size taller": lambda data: data[:18] + struct.pack("<ii", 20, 99) + data[26:],
        "depth unknown": lambda data: data[:28] + struct.pack("<H", 7) + data[30:],
    },
    "plain.tif": {
        "width huge": tiff_tag(256, 2**31),
        "width below Pillow's limit": tiff_tag(256, 9_000_000),
        "height zero": tiff_tag(257, 0),
        "depth unknown": tiff_tag(258, 77),
        "compression unknown": tiff_tag(259, 9999),
        "strip elsewhere": tiff_tag(273, 2**31),
        "second page elsewhere": lambda data: data[:4] + struct.pack("<I", 2**31) + data[8:],
        "width of one page": tiff_tag(256, 9),
    },
    "packed.tif": {
        "width huge": tiff_tag(256, 2**30),
        "strip elsewhere": tiff_tag(273, 2**31),
    },
    "slice.npz": {
        "shape huge": member(array((100000, 100000))),
        "shape beyond 64 bits": member(array((10**12, 10**12))),
        "shape larger": member(array((9, 9)), b"\0" * 80),
        "shape one axis": member(array((9,)), b"\0" * 36),
        "shape four axes": member(array((1, 1, 3, 3)), b"\0" * 36),
        "shape empty": member(array((0, 3))),
        "shape negative": member(array((-3, 3))),
        "a pickle": member(array((2, 2), "|O"), b"cos\nsystem\n(S'touch pwned'\ntR."),
        "text": member(array((2, 2), "<U1"), b"\0" * 16),
        "code for a header": member("__import__('os').system('touch pwned')"),
        "another key": member(array((3, 3)), b"\0" * 36, "data.npy"),
        "middle": lambda data: flip(data, len(data) // 3),
        "a NaN": made(lambda: npz(image=with_value(np.nan)[0] * np.nan)),
    },
    "case.npy.h5": {
        "never written": made(lambda: h5(lambda file: file.create_dataset("image", (10**5, 10**5, 100), "f4"))),
        "never written in chunks": made(
            lambda: h5(lambda file: file.create_dataset("image", (10**5, 10**5, 100), "f4", chunks=(1, 100, 100)))
        ),
        "another key": made(lambda: h5(lambda file: file.create_dataset("data", data=VOXELS))),
        "a folder": made(lambda: h5(lambda file: file.create_group("image"))),
        "one axis": made(lambda: h5(lambda file: file.create_dataset("image", data=VOXELS[0, 0]))),
        "a number": made(lambda: h5(lambda file: file.create_dataset("image", data=3.0))),
        "text": made(
            lambda: h5(lambda file: file.create_dataset("image", data=[["a", "b"]], dtype=h5py.string_dtype()))
        ),
        "in other files": made(
            lambda: h5(
                lambda f: f.create_dataset("image", (4, 4), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
            )
        ),
        "a NaN": made(lambda: h5(lambda file: file.create_dataset("image", data=with_value(np.nan)))),
    },
    "slice.dcm": {
        "rows huge": made(lambda: dicom(Rows=65535, Columns=65535)),
        "rows one more": made(lambda: dicom(Rows=17)),
        "rows zero": made(lambda: dicom(Rows=0)),
        "rows missing": made(lambda: dicom(Rows=None)),
        "frames huge": made(lambda: dicom(NumberOfFrames="99999999")),
        "bits odd": made(lambda: dicom(BitsAllocated=13)),
        "bits missing": made(lambda: dicom(BitsAllocated=None)),
        "sign missing": made(lambda: dicom(PixelRepresentation=None)),
        "pixels missing": made(lambda: dicom(PixelData=None)),
        "place missing": made(lambda: dicom(ImagePositionPatient=None)),
        "spacing zero": made(lambda: dicom(PixelSpacing=[0, 0])),
        "spacing words": lambda data: data.replace(b"1.0\\1.0 ", b"a.0\\b.0 "),
        "place of two numbers": made(lambda: dicom(ImagePositionPatient=[0, 0])),
        "syntax unknown": lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0", 1),
        "called JPEG": lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.70"[:20], 1),
        "a report": made(lambda: dicom(Modality="SR")),
        "in colour": made(lambda: dicom(SamplesPerPixel=3, BitsAllocated=8, Rows=5)),
    },
}

CASES = [(name, damage) for name in WHOLE for damage in (*ANY, *ONE[name])]
ABSURD = [
    (name, damage)
    for name, damage in CASES
    if re.search("huge|beyond 64|times|Pillow's limit|never written|one more|wider|larger", damage)
]


def damaged(folder, whole, name, damage):
    change = ANY.get(damage) or ONE[name][damage]
    path = folder / f"{damage.replace(' ', '-')}-{name}"
    data = change(whole[name])
    assert data != whole[name]
    path.write_bytes(data)
    return path


def assert_one_line(call, path):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 400 + 2 * len(str(path)), text
    assert "DOE" not in text
    return text


def test_there_are_at_least_200():
    assert len(CASES) >= 200 and len(ABSURD) >= 30


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_image_costs_one_line(tmp_path, whole, monkeypatch, name, damage):
    monkeypatch.chdir(tmp_path)
    path = damaged(tmp_path, whole, name, damage)
    assert_one_line(lambda: read_volume([path]), path)
    try:
        read_grid([path])  # which may find nothing wrong, as it does not read the voxels
    except UserError as error:
        assert str(path) in str(error)
    assert not (tmp_path / "pwned").exists()


LIMITED = """
import json, resource, sys
from pathlib import Path
from cheaplunch.data.volume import read_volume
from cheaplunch.errors import UserError

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = {}
for path in sys.argv[1:]:
    try:
        read_volume([Path(path)])
    except UserError as error:
        said[path] = str(error)
print(json.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_absurd_headers_cost_no_memory(tmp_path, whole):
    """In a process that may take 256 MB more than its imports, none runs out of it, and far less is touched."""
    paths = [str(damaged(tmp_path, whole, *case)) for case in ABSURD]
    done = subprocess.run([sys.executable, "-c", LIMITED, *paths], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    said, grown_kb = json.loads(done.stdout)
    assert sorted(said) == sorted(paths)
    assert not [text for text in said.values() if "memory" in text]
    assert grown_kb < 150_000
    assert done.stderr == ""


# -------------------------------------------------------------------- label maps


LABELS = {
    "missing.nii.gz": None,
    "half.nii": lambda: nifti(VOXELS.astype(np.float32) + 0.5),
    "nan.nii": lambda: nifti(with_value(np.nan)),
    "infinite.nii": lambda: nifti(with_value(np.inf)),
    "large.nii": lambda: nifti(with_value(1e12)),
    "two.nii": lambda: nifti(np.stack([VOXELS, VOXELS], -1)),
    "shape.nii": lambda: nifti(VOXELS[1:]),
    "shifted.nii": lambda: nifti(affine=np.array([[1, 0, 0, 9], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])),
    "spacing.nii": lambda: nifti(affine=np.diag([1, 1, 2, 1])),
    "turned.nii": lambda: nifti(affine=np.diag([-1, 1, 1, 1])),
    "flat.png": lambda: picture("PNG"),
    "colour.png": lambda: picture("PNG", np.stack([PAGES[0]] * 3, -1)),
    "bare.npz": lambda: npz(label=VOXELS),
    "nolabel.npz": lambda: npz(image=VOXELS),
    "half.npz": lambda: npz(label=VOXELS + 0.5),
    "stack.tif": lambda: tiff(),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_label_that_does_not_fit_costs_one_line(tmp_path, whole, name):
    (tmp_path / "image.nii").write_bytes(whole["plain.nii"])
    like = read_volume([tmp_path / "image.nii"])
    make = LABELS[name]
    if make is not None:
        (tmp_path / name).write_bytes(make())
    assert_one_line(lambda: read_label(tmp_path / name, like), tmp_path / name)


def test_a_colour_label_of_a_picture_and_channels_unlike(tmp_path, whole):
    (tmp_path / "grey.png").write_bytes(whole["grey.png"])
    like = read_volume([tmp_path / "grey.png"])
    (tmp_path / "colour.png").write_bytes(LABELS["colour.png"]())
    assert "3 channels" in assert_one_line(lambda: read_label(tmp_path / "colour.png", like), tmp_path / "colour.png")
    (tmp_path / "other.png").write_bytes(picture("PNG", PAGES[0][1:]))
    paths = [tmp_path / "grey.png", tmp_path / "other.png"]
    assert_one_line(lambda: read_volume(paths), tmp_path / "other.png")
    assert_one_line(lambda: read_volume([tmp_path / "grey.png", tmp_path / "gone.png"]), tmp_path / "gone.png")


@pytest.mark.parametrize("kept", [slice(None, -100), slice(300), slice(450)], ids=["pixels", "300 bytes", "450 bytes"])
def test_a_damaged_slice_of_a_series_is_named(tmp_path, kept):
    """Also the last one, cut off before it says which series it is of: the rest would be a shorter volume."""
    for number in range(4):
        data = dicom(VOXELS[:, :, number], ImagePositionPatient=[0, 0, 2 * number])
        (tmp_path / f"{number}.dcm").write_bytes(data[kept] if number == 3 else data)
    assert_one_line(lambda: read_volume([tmp_path]), tmp_path / "3.dcm")
