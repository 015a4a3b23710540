import pickle
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image

from cheaplunch.data.volume import read_label, read_volume, stored_range, write_mask
from cheaplunch.errors import UserError

SHAPE_RAS, SPACING_RAS = (2, 3, 4), (1.0, 1.5, 3.0)
ORIENTATIONS = ["".join(c) for order in permutations(("RL", "AP", "SI")) for c in product(*order)]


def oriented(array_ras, codes):
    """The same anatomy stored with other axes, and the affine that says so."""
    image = nib.Nifti1Image(array_ras, np.diag([*SPACING_RAS, 1]))
    return image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)))


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_reads_alike_and_writes_back_exactly(tmp_path, codes):
    anatomy = np.arange(24, dtype=np.uint8).reshape(SHAPE_RAS)  # (R, A, S)
    path = tmp_path / "mask.nii.gz"
    nib.save(oriented(anatomy, codes), path)

    volume = read_volume([path])
    label = read_label(path, volume)
    # (Z, Y, X): superior up, so S as it is; posterior and left up, so A and R from their far end.
    np.testing.assert_array_equal(label, anatomy[::-1, ::-1, :].transpose(2, 1, 0))
    np.testing.assert_array_equal(volume.array[0], label)
    assert volume.spacing_mm == (3.0, 1.5, 1.0)

    write_mask(label, volume, tmp_path / "again.nii.gz")
    before, after = nib.load(path), nib.load(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    np.testing.assert_array_equal(after.affine, before.affine)


def test_oblique_affine_and_codes_and_byte_order_stay(tmp_path):
    a = np.deg2rad(20)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([-0.7, 0.8, 5]), (12.3, -40, 7)
    image = nib.Nifti1Image(np.zeros((5, 4, 3), ">i2"), affine, nib.Nifti1Header(endianness=">"))
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=4)
    image.header["descrip"] = b"DOE^JANE"
    nib.save(image, tmp_path / "image.nii")

    volume = pickle.loads(pickle.dumps(read_volume([tmp_path / "image.nii"])))
    np.testing.assert_allclose(volume.spacing_mm, (5, 0.8, 0.7), rtol=1e-6)
    write_mask(np.full((3, 4, 5), 300), volume, tmp_path / "mask.nii.gz")
    before, after = nib.load(tmp_path / "image.nii"), nib.load(tmp_path / "mask.nii.gz")
    assert after.header.endianness == ">" and after.shape == before.shape
    assert int(after.header["qform_code"]) == 1 and int(after.header["sform_code"]) == 4
    np.testing.assert_array_equal(after.get_qform(), before.get_qform())
    np.testing.assert_array_equal(after.get_sform(), before.get_sform())
    assert after.get_data_dtype() == ">u2" and after.get_fdata().max() == 300
    assert bytes(after.header["descrip"]).strip(b"\0") == b""


def test_a_mask_does_not_inherit_the_image_scaling_or_type(tmp_path):
    image = nib.Nifti1Image(np.full((3, 3, 1), 100, np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "image.nii.gz")
    volume = read_volume([tmp_path / "image.nii.gz"])
    mask = np.arange(9).reshape(1, 3, 3)
    write_mask(mask, volume, tmp_path / "mask.nii.gz")
    written = nib.load(tmp_path / "mask.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(read_label(tmp_path / "mask.nii.gz", volume), mask)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, save_nifti):
    volume = read_volume([save_nifti(tmp_path / "image.nii.gz", np.ones((2, 2, 2), np.float32))])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_mask(np.zeros((2, 2, 2), int), volume, tmp_path / "mask.nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["image.nii.gz"]


def test_pictures(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    volume = read_volume([tmp_path / "rgb.png"])
    np.testing.assert_array_equal(volume.array, rgb.transpose(2, 0, 1)[:, None])
    assert (volume.spacing_mm, volume.spacing, volume.unit) == (None, (1, 1, 1), "px")
    assert read_volume([tmp_path / "deep.png"]).array.max() == rgb[..., 0].max() * 200.0
    assert stored_range(tmp_path / "rgb.png") == (0, 255) and stored_range(tmp_path / "deep.png") is None

    mask = np.arange(35).reshape(1, 5, 7)
    write_mask(mask, volume, tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "L"
    np.testing.assert_array_equal(read_label(tmp_path / "mask.png", volume), mask)
    palette = Image.fromarray(mask[0].astype(np.uint8)).convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_label(tmp_path / "palette.png", volume), mask)
    with pytest.raises(UserError, match="JPEG"):
        write_mask(mask, volume, tmp_path / "mask.jpg")


def test_channels_come_from_files_or_from_the_last_axis(tmp_path, save_nifti):
    array = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    both = read_volume([save_nifti(tmp_path / "both.nii.gz", array)])
    paths = [save_nifti(tmp_path / f"{c}.nii.gz", array[..., c]) for c in range(2)]
    np.testing.assert_array_equal(both.array, read_volume(paths).array)
    assert both.array.shape == (2, 4, 3, 2)
    write_mask(np.zeros((4, 3, 2), int), both, tmp_path / "mask.nii.gz")
    assert nib.load(tmp_path / "mask.nii.gz").shape == (2, 3, 4)


def damaged(tmp_path, save_nifti, kind):
    path = tmp_path / "bad.nii.gz"
    array = np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)
    if kind == "nan":
        array[0, 0, 0] = np.nan
    elif kind == "complex":
        array = array.astype(np.complex64)
    elif kind == "flat":
        array = array[0]
    if kind == "affine":
        image = nib.Nifti1Image(array, None)
        image.header.set_sform(np.zeros((4, 4)), code=1)
        image.to_filename(path)
    elif kind != "missing":
        save_nifti(path, array)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "bits":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image")
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "1 NaN"),
        ("complex", "complex64"),
        ("flat", "two axes"),
        ("affine", "affine"),
        ("missing", "is missing"),
        ("cut", "cut off"),
        ("bits", "cut off or damaged"),
        ("empty", "cut off or damaged"),
        ("text", "cut off or damaged"),
    ],
)
def test_a_bad_image_gets_one_line_that_names_it(tmp_path, save_nifti, kind, says):
    with pytest.raises(UserError, match=says) as caught:
        read_volume([damaged(tmp_path, save_nifti, kind)])
    assert "bad.nii.gz" in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_off_picture(tmp_path):
    path = tmp_path / "bad.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="bad.png is cut off"):
        read_volume([path])


def shifted(mm):
    affine = np.eye(4)
    affine[0, 3] = mm
    return affine


@pytest.mark.parametrize(
    ("label", "affine", "says"),
    [
        (np.zeros((2, 3, 5), np.uint8), None, r"shape \(2, 3, 5\) but image.nii.gz has \(2, 3, 4\)"),
        (np.zeros((2, 3, 4), np.uint8), shifted(0.01), "another affine than image.nii.gz"),
        (np.full((2, 3, 4), 0.5, np.float32), None, "not integers"),
        (np.full((2, 3, 4), np.nan, np.float32), None, "NaN"),
        (np.full((2, 3, 4), 1e12, np.float32), None, "beyond"),
        (np.zeros((2, 3, 4, 2), np.uint8), None, "2 channels"),
    ],
)
def test_a_bad_label_gets_one_line_that_names_it(tmp_path, label, affine, says, save_nifti):
    volume = read_volume([save_nifti(tmp_path / "image.nii.gz", np.ones((2, 3, 4), np.float32))])
    with pytest.raises(UserError, match=says) as caught:
        read_label(save_nifti(tmp_path / "label.nii.gz", label, affine), volume)
    assert "label.nii.gz" in str(caught.value) and "\n" not in str(caught.value)


def test_rounding_of_the_affine_and_whole_numbers_as_floats_are_no_error(tmp_path, save_nifti):
    volume = read_volume([save_nifti(tmp_path / "image.nii.gz", np.ones((2, 3, 4), np.float32))])
    label = save_nifti(tmp_path / "label.nii.gz", np.full((2, 3, 4), 7, np.float32), shifted(5e-4))
    assert (read_label(label, volume) == 7).all()
