"""What a file says of its voxels, and how far it is to be believed: the ground that the readers of all formats share.

What a header claims is held against the size of the file before memory is taken for it, so that a damaged or hostile
one costs a line of text and nothing else.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cheaplunch.errors import UserError

Role = Literal["image", "label"]
Frame = Literal["RAS", "LPS", "LAS"]  # where x, y and z of an affine point

DEFLATE = 1100  # zlib makes nothing smaller than 1/1032
HARMLESS = 2**26  # bytes; picture codecs have no such limit, and a blank page of this size does no harm


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


def check_affine(path: Path, affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise UserError(f"{path} has no usable affine (zero or NaN spacing): export it again")
