import gzip
import pickle
from itertools import permutations, product
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from nibabel.nifti1 import Nifti1Extension
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image

from cheaplunch.data.volume import (
    lone_slice,
    read_grid,
    read_label,
    read_volume,
    source_files,
    stored_range,
    suffix_of,
    write_mask,
)
from cheaplunch.errors import UserError

SHAPE_RAS, SPACING_RAS = (2, 3, 4), (1.0, 1.5, 3.0)
ORIENTATIONS = ["".join(c) for order in permutations(("RL", "AP", "SI")) for c in product(*order)]


def oriented(array_ras, codes, affine=None):
    """The same anatomy stored with other axes, and the affine that says so."""
    image = nib.Nifti1Image(array_ras, np.diag([*SPACING_RAS, 1]) if affine is None else affine)
    return image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)))


def oblique():
    """RAS affine of SPACING_RAS, turned by 20° about S and then 10° about R, off the origin."""
    a, b = np.deg2rad(20), np.deg2rad(10)
    about_s = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_r = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = about_r @ about_s @ np.diag(SPACING_RAS), (12.3, -40, 7.75)
    return affine


def as_itk(array, affine):
    """(i, j, k[, C]) and its RAS affine → ITK's image, whose world is LPS."""
    image = sitk.GetImageFromArray(array.swapaxes(0, 2), isVector=array.ndim == 4)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def save(array, affine, path, endianness="<"):
    if path.name.endswith((".nii", ".nii.gz")):
        header = nib.Nifti1Header(endianness=endianness)
        header.set_data_dtype(array.dtype)
        nib.save(nib.Nifti1Image(array, affine, header), path)
    else:
        sitk.WriteImage(as_itk(array, affine), str(path))
    return path


def places_by_nibabel(path):
    """(N, 4) in order of the values: value and world (R, A, S) mm, of every voxel."""
    image = nib.load(path)
    return in_order(np.asarray(image.dataobj), lambda indices: apply_affine(image.affine, indices))


def places_by_itk(path):
    image = sitk.ReadImage(str(path))

    def world(indices):
        return np.array([image.TransformIndexToPhysicalPoint(i) for i in indices.tolist()]) * (-1, -1, 1)

    return in_order(sitk.GetArrayFromImage(image).T, world)


def in_order(array, world):
    indices = np.argwhere(np.ones(array.shape))
    places = np.column_stack([array.ravel(), world(indices)])
    return places[places[:, 0].argsort()]


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


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_masks_of_every_format_lie_where_the_image_lies(tmp_path, codes):
    """An oblique, anisotropic volume of voxel-unique numbers, out again and read by nibabel and by ITK."""
    image = oriented(np.arange(24, dtype=np.int16).reshape(SHAPE_RAS), codes, oblique())
    array, affine = np.asarray(image.dataobj), image.affine
    truth = in_order(array, lambda indices: apply_affine(affine, indices))
    first = None
    for ending, endianness in ((".nii", "<"), (".nii.gz", ">"), (".nrrd", "<"), (".mha", "<")):
        volume = read_volume([save(array, affine, tmp_path / f"image{ending}", endianness)])
        first = volume if first is None else first
        np.testing.assert_array_equal(volume.array, first.array)
        assert volume.grid.axcodes == codes
        for out in volume.grid.mask_suffixes:
            path = tmp_path / f"mask{out}"
            write_mask(volume.array[0].astype(int), volume, path)
            np.testing.assert_allclose(places_by_itk(path), truth, rtol=0, atol=1e-4)  # NIfTI's numbers are float32
            if out.startswith(".nii"):
                np.testing.assert_allclose(places_by_nibabel(path), truth, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(read_label(path, first), volume.array[0])
        mask = tmp_path / f"mask{ending}"
        if ending in (".nrrd", ".mha"):
            before, after = (sitk.ReadImage(str(tmp_path / f"{name}{ending}")) for name in ("image", "mask"))
            for ask in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(before, ask)() == getattr(after, ask)()
            assert after.GetPixelID() == sitk.sitkUInt8
        else:
            before, after = nib.load(tmp_path / f"image{ending}"), nib.load(mask)
            assert after.header.endianness == endianness
            np.testing.assert_array_equal(after.affine, before.affine)


def test_a_label_may_have_other_axes_than_its_image(tmp_path):
    anatomy = np.arange(24, dtype=np.int16).reshape(SHAPE_RAS)
    volume = read_volume([save(anatomy, oblique(), tmp_path / "image.mha")])
    turned = oriented(anatomy, "PIL", oblique())
    label = save(np.asarray(turned.dataobj), turned.affine, tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(read_label(label, volume), volume.array[0])


def test_oblique_affine_and_codes_and_byte_order_stay(tmp_path):
    a = np.deg2rad(20)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([-0.7, 0.8, 5]), (12.3, -40, 7)
    image = nib.Nifti1Image(np.zeros((5, 4, 3), ">i2"), affine, nib.Nifti1Header(endianness=">"))
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=4)
    image.header["descrip"] = image.header["intent_name"] = b"DOE^JANE"
    image.header.extensions.append(Nifti1Extension(2, b"DOE^JANE"))
    nib.save(image, tmp_path / "image.nii")

    volume = read_volume([tmp_path / "image.nii"])
    assert b"DOE" not in pickle.dumps(volume)
    volume = pickle.loads(pickle.dumps(volume))
    np.testing.assert_allclose(volume.spacing_mm, (5, 0.8, 0.7), rtol=1e-6)
    write_mask(np.full((3, 4, 5), 300), volume, tmp_path / "mask.nii.gz")
    before, after = nib.load(tmp_path / "image.nii"), nib.load(tmp_path / "mask.nii.gz")
    assert after.header.endianness == ">" and after.shape == before.shape
    assert int(after.header["qform_code"]) == 1 and int(after.header["sform_code"]) == 4
    np.testing.assert_array_equal(after.get_qform(), before.get_qform())
    np.testing.assert_array_equal(after.get_sform(), before.get_sform())
    assert after.get_data_dtype() == ">u2" and after.get_fdata().max() == 300
    assert b"DOE" not in gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())


def test_a_slice_alone_stays_where_it_is_and_is_thicker_than_wide():
    """Steps of 2 × 3 mm, and of 5 or 1 mm to the next slice; (3, 2) on slice 4."""
    for step_mm, thickness_mm in ((5, 5), (1, 1.5 * 3)):
        affine = np.array([[2.0, 0, 0, 10], [0, 0, step_mm, 20], [0, 3, 0, 30], [0, 0, 0, 1]])
        own = lone_slice(affine, 4, 1.5)
        np.testing.assert_allclose(apply_affine(own, (3, 2, 0)), (16, 20 + 4 * step_mm, 36))
        np.testing.assert_allclose(nib.affines.voxel_sizes(own), (2, 3, thickness_mm))


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
    with pytest.raises(UserError, match="70000 does not fit"):
        write_mask(np.full((1, 5, 7), 70000), volume, tmp_path / "mask.png")
    Image.fromarray(rgb[..., 0] > 99).save(tmp_path / "bits.png")
    assert stored_range(tmp_path / "bits.png") == (0, 1) and read_volume([tmp_path / "bits.png"]).array.max() == 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_pages_of_a_tiff_are_z(tmp_path, kind):
    pages = np.random.default_rng(0).integers(0, 250, (3, 5, 7)).astype(kind)
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=others, compression="tiff_deflate")
    volume = read_volume([tmp_path / "stack.tif"])
    np.testing.assert_array_equal(volume.array, pages[None])
    assert (volume.grid.shape, volume.grid.affine, volume.unit) == ((3, 5, 7), None, "px")
    assert stored_range(tmp_path / "stack.tif") == ((0, 255) if kind is np.uint8 else None)

    mask = np.arange(105).reshape(3, 5, 7) * 3
    write_mask(mask, volume, tmp_path / f"mask{volume.grid.mask_suffix}")
    np.testing.assert_array_equal(read_label(tmp_path / "mask.tif", volume), mask)
    with pytest.raises(UserError, match="cannot end so; use .tif"):
        write_mask(mask, volume, tmp_path / "mask.png")


def test_pages_in_colour_and_pages_unlike(tmp_path):
    pages = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    first, second = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "colour.tif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_volume([tmp_path / "colour.tif"]).array, pages.transpose(3, 0, 1, 2))
    first.save(tmp_path / "thumb.tif", save_all=True, append_images=[second.resize((3, 2))])
    with pytest.raises(UserError, match="thumb.tif: page 2 has another size"):
        read_volume([tmp_path / "thumb.tif"])


def test_the_arrays_of_the_synapse_slices(tmp_path):
    """TransUNet's: .npz slices with 'image' and 'label' (H, W), float32; .npy.h5 volumes (D, H, W)."""
    image = np.random.default_rng(0).random((4, 5, 7), np.float32)
    label = np.arange(140).reshape(4, 5, 7) % 9
    np.savez(tmp_path / "case0005_slice000.npz", image=image[0], label=label[0].astype(np.float32))
    with h5py.File(tmp_path / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = image, label.astype(np.float32)
    for name, depth in (("case0005_slice000.npz", 1), ("case0001.npy.h5", 4)):
        volume = read_volume([tmp_path / name])
        np.testing.assert_array_equal(volume.array, image[None, :depth])
        np.testing.assert_array_equal(read_label(tmp_path / name, volume), label[:depth])
        assert (volume.unit, volume.grid.mask_suffix, stored_range(tmp_path / name)) == ("px", ".npz", None)
        write_mask(label[:depth], volume, tmp_path / "mask.npz")
        np.testing.assert_array_equal(read_label(tmp_path / "mask.npz", volume), label[:depth])
        assert np.load(tmp_path / "mask.npz")["label"].dtype == np.uint8
        with pytest.raises(UserError, match="cannot end so; use .npz"):
            write_mask(label[:depth], volume, tmp_path / "mask.nii.gz")
    with pytest.raises(UserError, match=r"no array 'image' \(it has label\)"):
        read_volume([tmp_path / "mask.npz"])


NRRD = (
    "NRRD0004\n# by hand\ntype: {kind}\ndimension: 3\n{place}\nsizes: 2 3 4\nendian: {endian}\nencoding: {encoding}\n\n"
)
TURNED = "space directions: (0,2,0) (0,0,-3) (1.5,0,0)\nspace origin: (5,-6,7)"


@pytest.mark.parametrize("place", ["space: right-anterior-superior", "space: LAS", "space: left-posterior-superior"])
@pytest.mark.parametrize(("kind", "endian"), [("signed short", "big"), ("uint16_t", "little"), ("double", "big")])
def test_headers_by_hand_read_as_itk_reads_them(tmp_path, place, kind, endian):
    dtype = np.dtype({"signed short": "i2", "uint16_t": "u2", "double": "f8"}[kind])
    voxels = np.arange(24).astype(dtype.newbyteorder({"big": ">", "little": "<"}[endian])).tobytes()
    head = NRRD.format(kind=kind, place=f"{place}\n{TURNED}", endian=endian, encoding="gzip")
    (tmp_path / "hand.nrrd").write_bytes(head.encode() + gzip.compress(voxels))
    msb = "True" if endian == "big" else "False"
    met = {"i2": "MET_SHORT", "u2": "MET_USHORT", "f8": "MET_DOUBLE"}[dtype.str[1:]]
    (tmp_path / "hand.mha").write_bytes(
        f"ObjectType = Image\nNDims = 3\nBinaryDataByteOrderMSB = {msb}\nTransformMatrix = 0 1 0 0 0 -1 1 0 0\n"
        f"Offset = 5 -6 7\nElementSpacing = 2 3 1.5\nDimSize = 2 3 4\nElementType = {met}\n"
        "ElementDataFile = LOCAL\n".encode()
        + voxels
    )
    for name in ("hand.nrrd", "hand.mha"):
        volume = read_volume([tmp_path / name])
        itk = places_by_itk(tmp_path / name)
        write_mask(volume.array[0].astype(int), volume, tmp_path / "mask.nii.gz")
        np.testing.assert_allclose(places_by_nibabel(tmp_path / "mask.nii.gz"), itk, atol=1e-5)
        assert volume.grid.dtype == dtype and sorted(volume.spacing_mm) == [1.5, 2, 3]


def test_the_first_axis_of_an_nrrd_may_be_channels(tmp_path):
    head = "NRRD0005\ntype: uchar\ndimension: 4\nsizes: 2 3 4 5\nkinds: list domain domain domain\nencoding: raw\n"
    (tmp_path / "x.nrrd").write_bytes(head.encode() + b"spacings: nan 1 2 3\n\n" + bytes(range(120)))
    volume = read_volume([tmp_path / "x.nrrd"])
    assert volume.array.shape == (2, 5, 4, 3) and volume.spacing_mm == (3, 2, 1)
    np.testing.assert_array_equal(volume.array[1] - volume.array[0], np.ones((5, 4, 3)))


def test_detached_voxels_need_their_file(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(SHAPE_RAS)
    for name, compressed, data in (
        ("plain.mhd", False, "plain.raw"),
        ("packed.mhd", True, "packed.zraw"),
        ("plain.nhdr", False, "plain.raw"),
        ("packed.nhdr", True, "packed.raw.gz"),
    ):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        sitk.WriteImage(as_itk(array, oblique()), str(folder / name), compressed)
        volume = read_volume([folder / name])
        assert [file.name for file in source_files(folder / name)] == [name, data]
        assert volume.array.max() == 23 and volume.grid.mask_suffix in (".mha", ".nrrd")
        with pytest.raises(UserError, match="use .mha|use .nrrd"):
            write_mask(volume.array[0].astype(int), volume, folder / f"mask{suffix_of(Path(name))}")
        (folder / data).rename(tmp_path / data)
        with pytest.raises(UserError, match=f"{name} is missing its voxels, {data}"):
            read_volume([folder / name])
        header = (folder / name).read_text().replace(data, f"../{data}")
        (folder / name).write_text(header)
        with pytest.raises(UserError, match="outside its folder"):
            read_volume([folder / name])


def test_channels_and_flat_images_of_itk(tmp_path):
    array = np.random.default_rng(0).random((*SHAPE_RAS, 2), np.float32)
    both = read_volume([save(array, oblique(), tmp_path / "both.mha")])
    one = [read_volume([save(array[..., c], oblique(), tmp_path / f"{c}.nrrd")]).array[0] for c in (0, 1)]
    np.testing.assert_array_equal(both.array, one)

    flat = sitk.GetImageFromArray(np.arange(35, dtype=np.uint8).reshape(5, 7))
    flat.SetSpacing((0.5, 2))
    sitk.WriteImage(flat, str(tmp_path / "flat.mha"))
    volume = read_volume([tmp_path / "flat.mha"])
    assert volume.spacing_mm == (1, 2, 0.5)
    np.testing.assert_array_equal(volume.array[0, 0], np.arange(35).reshape(5, 7))
    write_mask(volume.array[0].astype(int), volume, tmp_path / "mask.mha")
    mask = sitk.ReadImage(str(tmp_path / "mask.mha"))
    assert mask.GetDimension() == 2 and mask.GetSpacing() == (0.5, 2)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), np.arange(35).reshape(5, 7))


def test_no_text_of_an_nrrd_or_metaimage_reaches_the_mask(tmp_path):
    image = as_itk(np.arange(24, dtype=np.int16).reshape(SHAPE_RAS), oblique())
    image.SetMetaData("PatientName", "DOE^JANE")
    for ending in (".nrrd", ".mha"):
        sitk.WriteImage(image, str(tmp_path / f"image{ending}"))
        assert b"DOE" in (tmp_path / f"image{ending}").read_bytes()
        volume = read_volume([tmp_path / f"image{ending}"])
        for out in volume.grid.mask_suffixes:
            write_mask(volume.array[0].astype(int), volume, tmp_path / f"mask{out}")
            assert not any(b"DOE" in value.encode() for value in metadata(tmp_path / f"mask{out}").values())
        assert b"DOE" not in pickle.dumps(volume) and "DOE" not in repr(volume.grid)


def metadata(path):
    image = sitk.ReadImage(str(path))
    return {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}


def test_the_grid_alone_tells_what_the_voxels_will_be(tmp_path, save_nifti):
    array = np.arange(24, dtype=np.int16).reshape(SHAPE_RAS)
    turned = oriented(array, "AIR", oblique())
    paths = [save(np.asarray(turned.dataobj), turned.affine, tmp_path / f"x{e}") for e in (".nii.gz", ".nrrd", ".mha")]
    Image.fromarray(array[0].astype(np.uint8)).convert("RGB").save(tmp_path / "x.png")
    np.savez(tmp_path / "x.npz", image=array, label=array)
    with h5py.File(tmp_path / "x.npy.h5", "w") as file:
        file["image"] = array
    for path in (*paths, *(tmp_path / f"x{e}" for e in (".png", ".npz", ".npy.h5"))):
        grid, volume = read_grid([path, path]), read_volume([path, path])
        assert grid.array_shape == volume.array.shape and grid.channels == len(volume.array)
        assert grid.spacing_mm == volume.spacing_mm and grid.axcodes == ("AIR" if path in paths else None)
        assert grid.dtype == (np.uint8 if path.suffix == ".png" else np.int16)
        assert source_files(path) == (path,)


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
