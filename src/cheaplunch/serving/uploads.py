"""Files that somebody sends: told by their content, bounded before they are unpacked, kept under names of our own."""

from __future__ import annotations

import contextlib
import gzip
import math
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom.filereader import read_file_meta_info

from cheaplunch.data.dicom import find_series
from cheaplunch.data.headers import reading
from cheaplunch.data.names import stem
from cheaplunch.errors import UserError
from cheaplunch.serving.opened import Opened, Served, TooLarge

KINDS = "NIfTI, NRRD, MetaImage, PNG, TIFF, JPEG, BMP, or the files of one DICOM series"
MOST_FILES = 10_000  # a series has a file a slice

_START = 2**12  # bytes that tell what a file is
_BEFORE_VOXELS = 2**20  # bytes of a NIfTI's header and what else stands before its voxels; nibabel reads them whole
_PICTURES = {
    b"\x89PNG\r\n\x1a\n": ".png",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"\xff\xd8\xff": ".jpg",
    b"BM": ".bmp",
}


@dataclass(frozen=True)
class Stored:
    """An upload as files of ours."""

    sources: tuple[Path, ...]
    """One a channel, as `read_volume` takes them."""
    name: str
    """Of the image, for people to read; never a path."""
    given: dict[str, str]
    """Our files' names → those they came with."""


def open_upload(served: Served, files: Sequence[tuple[str, BinaryIO]]) -> Opened:
    """An image that somebody sent. UserError as of `store` and `Served.open_files`; TooLarge."""
    folder = served.new_folder()
    try:
        stored = store(files, folder, served.limits.image_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with called_as(stored.given, folder):
        return served.open_files(stored.sources, stored.name, folder)


def store(files: Sequence[tuple[str, BinaryIO]], folder: Path, limit_bytes: int) -> Stored:
    """Writes uploads, (name, content) each, into `folder`: one image, or the slices of a DICOM series.

    What is sent along and is no image (a DICOMDIR, notes) does not matter beside DICOM files. UserError, which calls
    files as they were called where they came from, for what is none of `KINDS`, and several images; TooLarge for
    what would unpack to more than `limit_bytes`.
    """
    kinds = [kind_of(content) for _, content in files]
    slices = [file for file, kind in zip(files, kinds, strict=True) if kind == ".dcm"]
    if slices:
        given = {f"{number:05d}.dcm": base_name(name) for number, (name, _) in enumerate(slices)}
        with called_as(given, folder):
            for ours, (_, content) in zip(given, slices, strict=True):
                _copy(content, folder / ours)
                _check_dicom(folder / ours)
            if len(series := find_series(folder)) > 1:
                raise UserError(
                    f"{len(series)} DICOM series were sent; send the files of one, "
                    "or start the server with --data FOLDER, which lists each"
                )
        own = {path.name for one in series for path in one.files}  # a SEG, say, may have come along
        names = [name for ours, (name, _) in zip(given, slices, strict=True) if ours in own]
        return Stored((folder,), series_name(names), given)
    if len(files) != 1:
        raise UserError(f"{len(files)} files were sent, none of DICOM; send one image: {KINDS}")
    [(name, content)], [kind] = files, kinds
    if kind is None:
        raise UserError(f"{base_name(name)} is no image that is known here; send {KINDS}")
    path = folder / f"image{kind.removesuffix('.gz')}"
    given = {path.name: base_name(name)}
    with called_as(given, folder):
        if kind == ".nii.gz":
            _unpack(content, path, limit_bytes)
        else:
            _copy(content, path)
        if kind == ".nii":
            with reading(path), path.open("rb") as file:
                _nifti_bytes(file.read(_START))
    return Stored((path,), stem(base_name(name)), given)


@contextlib.contextmanager
def called_as(given: Mapping[str, str], folder: Path) -> Iterator[None]:
    """Whoever sent files knows them by their own names."""
    try:
        yield
    except UserError as error:
        message = str(error).replace(f"{folder}/", "").replace(str(folder), "what was sent")
        for ours, theirs in given.items():
            message = message.replace(ours, theirs)
        raise type(error)(message) from None


def kind_of(content: BinaryIO) -> str | None:
    """The ending that a file's content calls for; None where it is unknown. It is left at its start."""
    content.seek(0)
    start = content.read(_START)
    content.seek(0)
    if start[128:132] == b"DICM":
        return ".dcm"
    if start[:2] == b"\x1f\x8b":
        return ".nii.gz" if _is_nifti(_unpacked_start(start)) else None
    if _is_nifti(start):
        return ".nii"
    if re.match(rb"NRRD000\d", start):
        return ".nrrd"
    if re.match(rb"\s*(ObjectType|NDims)\s*=", start):
        return ".mha"
    return next((suffix for magic, suffix in _PICTURES.items() if start.startswith(magic)), None)


def base_name(name: str) -> str:
    """The last part of a file's name, without what would not print."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(letter for letter in last if letter.isprintable())[:100] or "image"


def series_name(names: Sequence[str]) -> str:
    """What a series is called: its folder where one was dropped, else its file where it is one."""
    folders = {"/".join(re.split(r"[/\\]", name)[:-1]) for name in names}
    if len(folders) == 1 and (folder := folders.pop()):
        return base_name(folder)
    return stem(base_name(names[0])) if len(names) == 1 else "series"


def _copy(content: BinaryIO, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, 2**20)


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def _is_nifti(start: bytes) -> bool:
    return start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0")


def _unpacked_start(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(packed, _START)
    except zlib.error:
        return b""


def _nifti_bytes(start: bytes) -> int:
    """How long a NIfTI file says it is. ValueError where that is nonsense, or much stands before its voxels."""
    order = "<" if struct.unpack_from("<i", start)[0] in (348, 540) else ">"
    if start[4:8] == b"n+2\0":
        lengths, places = struct.unpack_from(f"{order}8q", start, 16), (("h", 14), ("q", 168))
    else:
        lengths, places = struct.unpack_from(f"{order}8h", start, 40), (("h", 72), ("f", 108))
    bits, offset = (struct.unpack_from(order + kind, start, place)[0] for kind, place in places)
    lengths = lengths[1 : 1 + lengths[0]]
    if not lengths or min(*lengths, bits) < 1 or not 0 < offset <= _BEFORE_VOXELS:
        raise ValueError("it has no header of a NIfTI file in one piece")
    return int(offset) + math.prod(lengths) * bits // 8


def _unpack(content: BinaryIO, path: Path, limit_bytes: int) -> None:
    """A .nii.gz as .nii, no longer than its header says."""
    with path.open("wb") as file, reading(path), gzip.GzipFile(fileobj=content, mode="rb") as stream:
        start = stream.read(_START)
        promised = _nifti_bytes(start)
        if promised > limit_bytes:
            raise TooLarge(
                f"{path.name} unpacks to {promised / 2**20:.0f} MiB; at most {limit_bytes / 2**20:.0f} are taken"
            )
        file.write(start[:promised])
        left = promised - len(start)
        while left > 0 and (part := stream.read(min(left, 2**20))):
            file.write(part)
            left -= len(part)
        if left > 0:
            raise ValueError("its voxels are fewer than it says")
        if len(stream.read(_BEFORE_VOXELS)) == _BEFORE_VOXELS:  # to its end, where the checksum is looked at
            raise ValueError("it is longer than it says")


# --- DICOM -----------------------------------------------------------------------------------------------------------


def _check_dicom(path: Path) -> None:
    """UserError for a file that is packed as a whole: nothing says how long it is unpacked."""
    with reading(path, private=True):
        packed = read_file_meta_info(path).TransferSyntaxUID.is_deflated
    if packed:
        raise UserError(f"{path} is a deflated DICOM file, which is not taken; unpack it (gdcmconv --raw)")
