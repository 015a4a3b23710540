"""NRRD and MetaImage ↔ voxels in the files' own axes.

They are read here and not by ITK, which aborts the whole process on some damaged headers, takes memory for absurd ones
and does not look at checksums; ITK writes them. Formats: teem.sourceforge.net/nrrd/format.html and
itk.org/Wiki/MetaIO/Documentation.
"""

import io
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from cheaplunch.data.headers import (
    DEFLATE,
    Frame,
    Geometry,
    Header,
    Role,
    check_affine,
    check_claim,
    check_scalars,
    reading,
)
from cheaplunch.errors import UserError

_HEADER_BYTES = 2**20  # of text at most, before the voxels

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


def block_header(path: Path, role: Role) -> Header:
    block = _read_block(path)
    if len(block.axes) not in (2, 3) or len(block.sizes) > len(block.axes) + 1:
        raise UserError(f"{path} has shape {block.sizes}: three axes are read, and a fourth for channels")
    check_scalars(path, block.sizes, block.dtype)
    held = block.data.stat().st_size - max(block.start, 0)
    check_claim(path, math.prod(block.sizes) * block.dtype.itemsize, held, DEFLATE if block.packed else 1)
    with reading(path, private=True):
        affine, (count, world) = np.eye(4), block.vectors.shape
        affine[:world, :count], affine[:world, 3] = block.vectors.T, block.origin
    check_affine(path, affine)
    shape = tuple(block.sizes[axis] for axis in block.axes)
    channels = math.prod(block.sizes) // math.prod(shape)
    own = geometry(affine, count) if block.frame == "LPS" else None
    return Header((*shape, 1)[:3], channels, block.dtype, affine, block.frame, own)


def block_voxels(path: Path, role: Role, header: Header) -> np.ndarray:
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
