"""Files ↔ voxels in the files' own axes, by ending; which way those axes point is volume.py's business.

A reader knows two things: the header, and the voxels it promises. What a header claims is held against the size of
the file before memory is taken for it, so that a damaged or hostile one costs a line of text and nothing else.
"""

import gzip
import io
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import nibabel as nib
import numpy as np
import SimpleITK as sitk
from PIL import Image

from cheaplunch.errors import UserError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
ARRAY_SUFFIXES = (".npz", ".npy.h5", ".h5")  # keys 'image' and 'label', as in the Synapse slices of TransUNet

Role = Literal["image", "label"]
Frame = Literal["RAS", "LPS", "LAS"]  # where x, y and z of an affine point

DEFLATE = 1100  # zlib makes nothing smaller than 1/1032
HARMLESS = 2**26  # bytes; picture codecs have no such limit, and a blank page of this size does no harm
_HEADER_BYTES = 2**20  # of text at most, before the voxels of an NRRD or MetaImage

_PILLOW = ("PNG", "TIFF", "JPEG", "BMP", "DIB")  # no reader that starts other programs
_MODES = {"1": "?", "L": "u1", "P": "u1", "RGB": "u1", "I;16": "u2", "I;16B": "u2", "I;16L": "u2", "I": "i4", "F": "f4"}
_COLOURS = ("RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "PA")


@dataclass(frozen=True)
class Geometry:
    """Where ITK has the voxels, to the last bit: mm, axes as in `Header.frame` 'LPS'."""

    spacing_mm: tuple[float, ...]  # of 2 or 3 axes (i, j, k)
    origin_mm: tuple[float, ...]
    direction: tuple[float, ...]  # row by row; its columns are the axes' unit vectors


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its voxels. It holds no text of the file's, and can be pickled."""

    shape: tuple[int, ...]  # (i, j, k) with an affine; without, (H, W) or (D, H, W)
    channels: int
    dtype: np.dtype  # as stored
    affine: np.ndarray | None = None  # (4, 4), (i, j, k) → mm in `frame`
    frame: Frame = "RAS"
    own: Any = None  # nib.Nifti1Header, Geometry or dicom.Series: to write a mask exactly as the file is


@dataclass(frozen=True)
class Reader:
    header: Callable[[Path, Role], Header]
    voxels: Callable[[Path, Role, Header], np.ndarray]  # → (*shape, C), the values of the file's scale


@contextmanager
def reading(path: Path, private: bool = False) -> Iterator[None]:
    """Damage shows as a dozen kinds of exception in the readers; to the user it is one thing.

    `private` leaves out the reader's own words, which may quote the file: names, numbers, dates of a patient.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: check the path")
    try:
        with warnings.catch_warnings():  # of damage too, and they quote the file
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} asks for more memory than there is: copy it again, or use a larger machine") from None
    except Exception as error:
        if private:
            raise UserError(f"{path} is cut off or damaged, copy it again") from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is cut off or damaged, copy it again ({reason})") from error


def check_claim(path: Path, claimed: int, held: int, ratio: int = 1, harmless: int = 0) -> None:
    """UserError where a header promises more bytes of voxels than so many bytes of file can hold."""
    if claimed > max(held * ratio, harmless):
        raise UserError(
            f"{path} is cut off or damaged, copy it again (its header promises {claimed} bytes of voxels, "
            f"which {held} bytes cannot hold)"
        )


def check_scalars(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if min(shape, default=0) < 1:
        raise UserError(f"{path} has shape {shape}: export an image that has voxels")
    if dtype.kind not in "biuf":  # complex numbers, NIfTI's RGB triples, Python objects
        raise UserError(f"{path} holds {dtype} voxels: export it with one real number a voxel")


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
    _check_affine(path, affine)
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


def _check_affine(path: Path, affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise UserError(f"{path} has no usable affine (zero or NaN spacing): export it again")


# -------------------------------------------------------------------- NRRD and MetaImage
# Read here and not by ITK, which aborts the whole process on some damaged headers, takes memory for absurd ones and
# does not look at checksums. Formats: teem.sourceforge.net/nrrd/format.html, itk.org/Wiki/MetaIO/Documentation.

_NRRD_TYPES = {  # without a leading 'signed ' and a trailing ' int' or '_t'
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "unsigned", "uint32"), "u4"),
    **dict.fromkeys(("longlong", "long long", "int64"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "uint64"), "u8"),
    "float": "f4",
    "double": "f8",
}
_NRRD_SPACES: dict[str, Frame] = {
    **dict.fromkeys(("right-anterior-superior", "ras"), "RAS"),
    **dict.fromkeys(("left-anterior-superior", "las"), "LAS"),
}
_META_TYPES = {"CHAR": "i1", "SHORT": "i2", "INT": "i4", "LONG": "i4", "LONG_LONG": "i8", "FLOAT": "f4", "DOUBLE": "f8"}
_META_TYPES |= {f"U{name}": f"u{kind[1]}" for name, kind in _META_TYPES.items() if kind[0] == "i"}


@dataclass(frozen=True, eq=False)
class _Block:
    """What the header of an NRRD or MetaImage says, as it says it."""

    sizes: tuple[int, ...]  # fastest first
    dtype: np.dtype  # with its byte order
    axes: tuple[int, ...]  # which of `sizes` are of space; the others are channels
    vectors: np.ndarray  # (axes, axes or 3) mm from voxel to voxel
    origin: np.ndarray  # mm
    frame: Frame
    data: Path  # the file of the voxels
    start: int  # their first byte in it; −1: they are the file's last
    packed: bool  # by zlib or gzip


def _block_header(path: Path, role: Role) -> Header:
    block = _read_block(path)
    if len(block.axes) not in (2, 3) or len(block.sizes) > len(block.axes) + 1:
        raise UserError(f"{path} has shape {block.sizes}: three axes are read, and a fourth for channels")
    check_scalars(path, block.sizes, block.dtype)
    held = block.data.stat().st_size - max(block.start, 0)
    check_claim(path, math.prod(block.sizes) * block.dtype.itemsize, held, DEFLATE if block.packed else 1)
    with reading(path, private=True):
        affine, (count, world) = np.eye(4), block.vectors.shape
        affine[:world, :count], affine[:world, 3] = block.vectors.T, block.origin
    _check_affine(path, affine)
    shape = tuple(block.sizes[axis] for axis in block.axes)
    channels = math.prod(block.sizes) // math.prod(shape)
    own = geometry(affine, count) if block.frame == "LPS" else None
    return Header((*shape, 1)[:3], channels, block.dtype, affine, block.frame, own)


def _block_voxels(path: Path, role: Role, header: Header) -> np.ndarray:
    block = _read_block(path)
    claimed = math.prod(block.sizes) * block.dtype.itemsize
    with reading(path), block.data.open("rb") as file:
        if block.start >= 0:
            file.seek(block.start)
        else:
            file.seek(-claimed, io.SEEK_END)
        data = _unpacked(file.read(), claimed) if block.packed else file.read(claimed)
        if len(data) != claimed:
            raise UserError(f"{path} is cut off or damaged, copy it again (its voxels are not as many as it says)")
        array = np.frombuffer(data, block.dtype).reshape(block.sizes, order="F")
    channels = [axis for axis in range(array.ndim) if axis not in block.axes]
    return array.transpose(*block.axes, *channels).reshape(*header.shape, header.channels)


def _unpacked(packed: bytes, claimed: int) -> bytes:
    """zlib's or gzip's stream, or several behind one another, each to its checksum; empty where one is cut off."""
    parts, size = [], 0
    while packed and size < claimed:
        stream = zlib.decompressobj(wbits=47)  # 47: with zlib's header or gzip's
        parts.append(stream.decompress(packed, claimed + 1 - size))
        if not stream.eof:
            return b""
        size, packed = size + len(parts[-1]), stream.unused_data
    return b"".join(parts)


def write_itk(mask: np.ndarray, own: Geometry, path: Path) -> None:
    """(i, j, k) as NRRD or MetaImage, compressed; without the third axis where `own` has but two."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(mask.T[0] if len(own.spacing_mm) == 2 else mask.T))
    image.SetSpacing(own.spacing_mm)
    image.SetOrigin(own.origin_mm)
    image.SetDirection(own.direction)
    sitk.WriteImage(image, str(path), useCompression=True)


def geometry(affine: np.ndarray, axes: int = 3) -> Geometry:
    """ITK's words for an affine (4, 4) whose x, y and z point to L, P and S, or for its first two axes."""
    steps = affine[:axes, :axes]
    spacing = np.linalg.norm(steps, axis=0)
    return Geometry(
        tuple(spacing.tolist()), tuple(affine[:axes, 3].tolist()), tuple((steps / spacing).ravel().tolist())
    )


def block_files(path: Path) -> tuple[Path, ...]:
    """The header and, where the voxels lie in a file of their own, that file. UserError where it is missing."""
    return tuple(dict.fromkeys((path, _read_block(path).data)))


def _read_block(path: Path) -> _Block:
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    with reading(path, private=True):
        fields, end = _fields(path, ":" if nrrd else "=")
        return _nrrd_block(path, fields, end) if nrrd else _meta_block(path, fields, end)


def _fields(path: Path, separator: str) -> tuple[dict[str, str], int]:
    """The lines of a text header, keys in lower case without blanks, and the byte behind it."""
    with path.open("rb") as file:
        text = file.read(_HEADER_BYTES).decode("latin-1")
    fields: dict[str, str] = {}
    end = 0
    for line in text.split("\n"):
        end += len(line) + 1
        key, _, value = line.partition(separator)
        fields[key.strip().lower().replace(" ", "")] = value.strip()
        if not line.strip() or "elementdatafile" in fields:
            break
    return fields, min(end, len(text))


def _nrrd_block(path: Path, fields: dict[str, str], end: int) -> _Block:
    if not any(re.fullmatch(r"nrrd000\d", key) for key in fields):
        raise UserError(f"{path} is cut off or damaged, copy it again (no header of an NRRD)")
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise UserError(f"{path} has an encoding that is not read: export it as raw or gzip")
    sizes = tuple(map(int, fields["sizes"].split()))
    kind = re.sub(r"^signed | int$|_t$", "", fields["type"].lower())
    if kind not in _NRRD_TYPES:
        raise UserError(f"{path} holds voxels that are no real numbers: export it with one real number a voxel")
    dtype = np.dtype(_NRRD_TYPES[kind]).newbyteorder(">" if fields.get("endian", "").lower() == "big" else "<")

    steps = re.findall(r"none|\([^)]*\)", fields.get("spacedirections", ""))
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * min(3, len(sizes)) + ["list"] * (len(sizes) - 3)
    ways = steps or ["none" if kind not in ("domain", "space") else "" for kind in kinds]
    axes = tuple(axis for axis, way in enumerate(ways) if way != "none")
    if len(ways) != len(sizes) or int(fields["dimension"]) != len(sizes):
        raise UserError(f"{path} is cut off or damaged, copy it again (its header counts its axes differently)")
    if steps:
        vectors = np.array([_numbers(ways[axis].strip("()"), ",") for axis in axes])
    else:
        spacings = _numbers(fields.get("spacings", " ".join(["1"] * len(sizes))))
        vectors = np.diag([spacings[axis] for axis in axes])
    origin = np.array(_numbers(fields.get("spaceorigin", "").strip("()"), ",") or [0.0] * vectors.shape[1])
    # A space without a name is what ITK takes it for.
    frame = _NRRD_SPACES.get(fields.get("space", "").lower().removesuffix("-time"), "LPS")
    skip = int(fields.get("byteskip", 0))
    data = _data_file(path, fields.get("datafile", ""))
    start = -1 if skip < 0 else skip + (end if data == path else 0)
    if int(fields.get("lineskip", 0)):
        raise UserError(f"{path} skips lines before its voxels, which is not read: export it again")
    return _Block(sizes, dtype, axes, vectors, origin, frame, data, start, encoding != "raw")


def _meta_block(path: Path, fields: dict[str, str], end: int) -> _Block:
    if not {"dimsize", "elementtype", "elementdatafile"} <= set(fields):
        raise UserError(f"{path} is cut off or damaged, copy it again (no header of a MetaImage)")
    if fields.get("binarydata", "true").lower() != "true":
        raise UserError(f"{path} has its voxels as text, which is not read: export it as binary")
    sizes, channels = tuple(map(int, fields["dimsize"].split())), int(fields.get("elementnumberofchannels", 1))
    axes = len(sizes)
    if int(fields["ndims"]) != axes:
        raise UserError(f"{path} is cut off or damaged, copy it again (its header counts its axes differently)")
    kind = fields["elementtype"].upper().removeprefix("MET_").removesuffix("_ARRAY")
    if kind not in _META_TYPES:
        raise UserError(f"{path} holds voxels that are no real numbers: export it with one real number a voxel")
    swapped = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "false")).lower() == "true"
    dtype = np.dtype(_META_TYPES[kind]).newbyteorder(">" if swapped else "<")

    world = min(axes, 3)  # of four axes the last is time or channels
    spacing = np.array(_numbers(_first(fields, "elementspacing", "elementsize") or " ".join("1" * axes)))[:world]
    turn = _numbers(_first(fields, "transformmatrix", "rotation", "orientation"))  # a row is where an axis points
    turn = np.reshape(turn, (axes, axes))[:world, :world] if turn else np.eye(world)
    origin = np.array(_numbers(_first(fields, "offset", "position", "origin")) or [0.0] * axes)[:world]
    name = fields["elementdatafile"]
    data = _data_file(path, "" if name.lower() == "local" else name)
    start = int(fields.get("headersize", 0)) if data != path else end
    if channels != 1:
        sizes = (channels, *sizes)
    spatial = tuple(range(len(sizes) - axes, len(sizes) - axes + world))
    packed = fields.get("compresseddata", "false").lower() == "true"
    return _Block(sizes, dtype, spatial, turn * spacing[:, None], origin, "LPS", data, start, packed)


def _numbers(text: str, separator: str | None = None) -> list[float]:
    return [float(number) for number in text.split(separator)] if text else []


def _first(fields: dict[str, str], *keys: str) -> str:
    """The value of the first of several words for one thing; '' where none is there."""
    return next((fields[key] for key in keys if key in fields), "")


def _data_file(path: Path, name: str) -> Path:
    """The file beside a header that holds its voxels; the header's own where it names none."""
    if not name:
        return path
    data = path.parent / name
    if name.upper().startswith("LIST") or "%" in name:
        raise UserError(f"{path} names a list of files for its voxels: export it as one file")
    if not data.resolve().is_relative_to(path.parent.resolve()):
        raise UserError(f"{path} names a file outside its folder for its voxels: export it as one file")
    if not data.is_file():
        raise UserError(f"{path} is missing its voxels, {data.name}: copy that file beside it")
    return data


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
    | dict.fromkeys(ITK_SUFFIXES, Reader(_block_header, _block_voxels))
    | dict.fromkeys(PICTURE_SUFFIXES, Reader(_picture_header, _picture_voxels))
    | {".npz": Reader(_npz_header, _npz_voxels)}
    | dict.fromkeys((".npy.h5", ".h5"), Reader(_h5_header, _h5_voxels))
)
