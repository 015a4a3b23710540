"""Files ↔ voxels in the files' own axes, by ending; which way those axes point is volume.py's business.

A reader knows two things: the header, and the voxels it promises. To add a format is to add a reader to `READERS`.
"""

import gzip
import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from PIL import Image

from cheaplunch.data.headers import (
    DEFLATE,
    HARMLESS,
    Header,
    Reader,
    Role,
    check_affine,
    check_claim,
    check_scalars,
    reading,
)
from cheaplunch.data.itk import block_header, block_voxels
from cheaplunch.errors import UserError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
ARRAY_SUFFIXES = (".npz", ".npy.h5", ".h5")  # keys 'image' and 'label', as in the Synapse slices of TransUNet

_PILLOW = ("PNG", "TIFF", "JPEG", "BMP", "DIB")  # no reader that starts other programs
_MODES = {"1": "?", "L": "u1", "P": "u1", "RGB": "u1", "I;16": "u2", "I;16B": "u2", "I;16L": "u2", "I": "i4", "F": "f4"}
_COLOURS = ("RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "PA")


# -------------------------------------------------------------------- NIfTI


def _nifti_header(path: Path, role: Role) -> Header:
    with reading(path):
        image: Any = nib.load(path, mmap=False)
        shape, dtype = tuple(map(int, image.shape)), image.get_data_dtype()
        own, affine, offset = image.header.copy(), np.array(image.affine, float), int(image.dataobj.offset)
    if len(shape) == 2:
        raise UserError(f"{path} has two axes: export it with three (one slice: a third axis of length 1)")
    if len(shape) not in (3, 4):
        raise UserError(f"{path} has shape {shape}: three axes are read, and a fourth for channels")
    check_scalars(path, shape, dtype)
    packed = path.name.lower().endswith(".gz")
    check_claim(path, offset + math.prod(shape) * dtype.itemsize, path.stat().st_size, DEFLATE if packed else 1)
    check_affine(path, affine)
    own["descrip"] = own["aux_file"] = own["db_name"] = own["intent_name"] = b""  # may name the patient,
    own.extensions = type(own.extensions)()  # and so may these
    own["vox_offset"] = 0
    return Header(shape[:3], math.prod(shape[3:]), dtype, affine, "RAS", own)


def _nifti_voxels(path: Path, role: Role, header: Header) -> np.ndarray:
    with reading(path):
        image: Any = nib.load(path, mmap=False)
        if not path.name.lower().endswith(".gz"):
            return np.asanyarray(image.dataobj).reshape(*header.shape, header.channels)
        with gzip.open(path) as stream:
            voxels = np.asanyarray(type(image).from_stream(stream).dataobj)
            while stream.read(2**20):  # to its end, where the checksum is looked at
                pass
        return voxels.reshape(*header.shape, header.channels)


def write_nifti(mask: np.ndarray, affine: np.ndarray, own: nib.Nifti1Header | None, path: Path) -> None:
    """(i, j, k) with its RAS affine; qform, sform, their codes and the byte order are `own`'s where there is one."""
    header = nib.Nifti1Header() if own is None else own.copy()
    header.set_data_dtype(mask.dtype)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    form = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = form(mask, affine, header)
    if own is None:
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
    nib.save(image, path)


# -------------------------------------------------------------------- pictures


def _picture_header(path: Path, role: Role) -> Header:
    with _picture(path) as picture:
        mode, pages, (width, height) = _mode(path, picture, role), _pages(picture), picture.size
        if pages > 1 and picture.format != "TIFF":
            raise UserError(f"{path} has {pages} pages: save each as its own file, or all as one TIFF")
    dtype, channels = np.dtype(_MODES[mode]), 3 if mode == "RGB" else 1
    claimed = pages * height * width * channels * dtype.itemsize
    check_claim(path, claimed, path.stat().st_size, DEFLATE, HARMLESS)
    return Header((pages, height, width) if pages > 1 else (height, width), channels, dtype)


def _picture_voxels(path: Path, role: Role, header: Header) -> np.ndarray:
    height, width = header.shape[-2:]
    pixels = np.empty((math.prod(header.shape[:-2]), height, width, header.channels), header.dtype)
    with _picture(path) as picture:
        for page in range(len(pixels)):
            picture.seek(page)
            mode = _mode(path, picture, role)
            if picture.size != (width, height) or np.dtype(_MODES[mode]) != header.dtype:
                raise UserError(f"{path}: page {page + 1} has another size or type than the first; save it apart")
            page_pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode))
            pixels[page] = page_pixels.reshape(height, width, -1)
    return pixels.reshape(*header.shape, header.channels)


def write_picture(mask: np.ndarray, path: Path) -> None:
    """(D, H, W) label numbers as grey; a TIFF takes several pages."""
    if mask.dtype.itemsize > 2 or (mask.dtype.itemsize > 1 and path.suffix.lower() == ".bmp"):
        raise UserError(f"{path}: label number {mask.max()} does not fit into this format; use .npz")
    first, *others = (Image.fromarray(page) for page in mask)
    first.save(path, **({"save_all": True, "append_images": others} if others else {}))


def picture_range(path: Path) -> tuple[float, float] | None:
    """(0, 255) for a picture of 8 bits a channel; None where its type says nothing of the range."""
    with _picture(path) as picture:
        mode = _mode(path, picture, "image")
    return {"?": (0.0, 1.0), "u1": (0.0, 255.0)}.get(_MODES[mode])


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image]:
    Image.init()  # `formats` finds only readers that are loaded
    with reading(path):
        try:
            picture = Image.open(path, formats=_PILLOW)
        except Image.DecompressionBombError:
            raise UserError(f"{path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels: cut it up") from None
        with picture:
            yield picture


def _pages(picture: Image.Image) -> int:
    return getattr(picture, "n_frames", 1)


def _mode(path: Path, picture: Image.Image, role: Role) -> str:
    """Pillow's word for what a pixel is read as: colours as RGB (8 bits), and no transparency."""
    mode = picture.mode
    # A palette holds an image's values, but only the colours of a label map's numbers.
    if mode in _COLOURS or (mode == "P" and role == "image"):
        return "RGB"
    if mode in ("LA", "La"):
        return "L"
    if mode not in _MODES:
        raise UserError(f"{path} has {mode} pixels: save it as grey or RGB")
    return mode


# -------------------------------------------------------------------- NumPy and HDF5


def _npz_header(path: Path, role: Role) -> Header:
    with reading(path), zipfile.ZipFile(path) as archive:
        _check_keys(path, role, [name.removesuffix(".npy") for name in archive.namelist()])
        member = archive.getinfo(f"{role}.npy")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
    claimed = math.prod(shape) * dtype.itemsize
    held = min(member.compress_size, path.stat().st_size)
    check_claim(
        path, max(claimed, member.file_size), held, 1 if member.compress_type == zipfile.ZIP_STORED else DEFLATE
    )
    check_claim(path, claimed, member.file_size)
    return _array_header(path, shape, dtype)


def _npz_voxels(path: Path, role: Role, header: Header) -> np.ndarray:
    with reading(path), zipfile.ZipFile(path) as archive:
        member = io.BytesIO(archive.read(f"{role}.npy"))  # to its end, where the checksum is looked at
        return np.lib.format.read_array(member, allow_pickle=False)[..., None]


def write_npz(mask: np.ndarray, path: Path) -> None:
    """(H, W) or (D, H, W) under the key 'label', where the Synapse slices have theirs."""
    np.savez_compressed(path, label=mask)


def _h5_header(path: Path, role: Role) -> Header:
    with reading(path), h5py.File(path, "r") as file:
        _check_keys(path, role, list(file))
        data: Any = file[role]
        shape, dtype, chunked = tuple(map(int, data.shape)), data.dtype, data.chunks is not None
        if data.is_virtual or data.external:
            raise UserError(f"{path} keeps its {role} in other files: copy the voxels into it")
        held = min(data.id.get_storage_size(), path.stat().st_size)
    check_claim(path, math.prod(shape) * dtype.itemsize, held, DEFLATE if chunked else 1)
    return _array_header(path, shape, dtype)


def _h5_voxels(path: Path, role: Role, header: Header) -> np.ndarray:
    with reading(path), h5py.File(path, "r") as file:
        data: Any = file[role]
        return data[()][..., None]


def _check_keys(path: Path, role: Role, keys: list[str]) -> None:
    if role not in keys:
        raise UserError(f"{path} has no array {role!r} (it has {', '.join(sorted(keys)[:8]) or 'none'}): name it so")


def _array_header(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> Header:
    if len(shape) not in (2, 3):
        raise UserError(f"{path} has shape {shape}: (H, W) and (D, H, W) are read")
    check_scalars(path, shape, dtype)
    return Header(shape, 1, dtype)


# -------------------------------------------------------------------- the table

READERS = (
    dict.fromkeys(NIFTI_SUFFIXES, Reader(_nifti_header, _nifti_voxels))
    | dict.fromkeys(ITK_SUFFIXES, Reader(block_header, block_voxels))
    | dict.fromkeys(PICTURE_SUFFIXES, Reader(_picture_header, _picture_voxels))
    | {".npz": Reader(_npz_header, _npz_voxels)}
    | dict.fromkeys((".npy.h5", ".h5"), Reader(_h5_header, _h5_voxels))
)
