"""Image files ↔ arrays in one anatomical orientation: the only file that knows affines and orientations.

Arrays run (C, Z, Y, X) with Z towards superior, Y towards posterior and X towards left: the file axes nearest
to these, permuted and flipped, never interpolated. `array[:, z]` is an axial slice as radiologists see it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from cheaplunch.errors import UserError
from cheaplunch.files import whole_or_nothing

NIFTI_SUFFIXES = (".nii.gz", ".nii")
PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
SUFFIXES = NIFTI_SUFFIXES + PICTURE_SUFFIXES

_LPS = axcodes2ornt("LPS")  # X towards left, Y towards posterior, Z towards superior
_AFFINE_TOLERANCE = 1e-3  # mm; exports of one scan by two programs differ by rounding


@dataclass(frozen=True, eq=False)
class Grid:
    """A file's own grid: all that is needed to write a mask back onto it. It can be pickled."""

    path: Path
    shape: tuple[int, ...]  # the file's axes: NIfTI (i, j, k), pictures (H, W)
    affine: np.ndarray | None = None  # (4, 4), (i, j, k) → RAS mm; None for pictures
    header: nib.Nifti1Header | None = None  # qform and sform with their codes, byte order

    @property
    def orientation(self) -> np.ndarray:
        """(3, 2): for each file axis the world axis nearest to it (R, A, S) and its sign."""
        return io_orientation(self.affine)

    @property
    def mask_suffix(self) -> str:
        """The file's own ending, or '.png' where that format would change label numbers."""
        suffix = suffix_of(self.path)
        return ".png" if suffix in (".jpg", ".jpeg") else suffix


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels in the orientation of this module, with the grid they came from."""

    array: np.ndarray  # (C, Z, Y, X) float32; pictures (C, 1, H, W)
    spacing_mm: tuple[float, float, float] | None  # (z, y, x); None where the file has none
    grid: Grid

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(z, y, x) in `unit`."""
        return self.spacing_mm or (1.0, 1.0, 1.0)

    @property
    def unit(self) -> str:
        return "mm" if self.spacing_mm else "px"


def suffix_of(path: Path) -> str:
    """The ending that names the format, lower case ('.nii.gz' as a whole); UserError where it is unknown."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise UserError(f"{path} has an unknown ending: give one of {', '.join(SUFFIXES)}")


def read_volume(paths: Sequence[Path]) -> Volume:
    """Read an image, one path per channel; a file with several channels (RGB, 4-D NIfTI) gives them all.

    Raises UserError where a file is missing, damaged, not an image of scalars, holds NaN or infinity, or
    where the channels' grids differ.
    """
    channels, grid = [], None
    for path in map(Path, paths):
        voxels, own = _read(path)  # file axes + (C,)
        with np.errstate(over="ignore"):
            voxels = voxels.astype(np.float32)
        if not np.isfinite(voxels).all():
            bad = np.count_nonzero(~np.isfinite(voxels))
            raise UserError(f"{path} has {bad} NaN or infinite voxels: give them the background's value")
        if grid is None:
            grid = own
        else:
            _check_same_grid(own, grid)
        channels += [_to_lps(voxels[..., c], own) for c in range(voxels.shape[-1])]
    if grid is None:
        raise ValueError("a volume has at least one channel")
    return Volume(np.stack(channels), _spacing_mm(grid), grid)


def read_label(path: Path, like: Volume) -> np.ndarray:
    """Read a label map, (Z, Y, X) int32, turned by its own affine to lie voxel by voxel on `like.array[c]`.

    Raises UserError where it is missing, damaged, on another grid than the image, or not made of integers.
    """
    path = Path(path)
    voxels, grid = _read(path, label=True)
    _check_same_grid(grid, like.grid)
    if voxels.shape[-1] != 1:
        raise UserError(f"{path} has {voxels.shape[-1]} channels: a label map has one, of label numbers")
    voxels = voxels[..., 0]
    if not np.issubdtype(voxels.dtype, np.integer) and voxels.dtype != bool:
        if np.isnan(voxels).any():
            raise UserError(f"{path} has NaN voxels: write the label map with an integer type")
        if not (voxels == np.rint(voxels)).all():
            raise UserError(f"{path} has values that are not integers: resample it by nearest neighbour")
    if np.abs(voxels.astype(float)).max(initial=0) >= 2**31:
        raise UserError(f"{path} has values beyond 2^31: write the label numbers of dataset.json")
    return np.ascontiguousarray(_to_lps(voxels, grid), dtype=np.int32)


def write_mask(mask: np.ndarray, like: Volume, path: Path) -> None:
    """Write label numbers, (Z, Y, X) non-negative integers, on the exact grid of `like`'s file.

    Shape, affine, qform and sform are the file's; the type is the smallest unsigned integer that holds the
    numbers (never the image's own). The file appears whole or not at all. A picture's mask is grey.
    """
    path, grid = Path(path), like.grid
    if mask.shape != like.array.shape[1:]:
        raise ValueError(f"mask {mask.shape} does not fit the image {like.array.shape[1:]}")
    suffix = suffix_of(path)
    if (suffix in NIFTI_SUFFIXES) != (grid.header is not None):
        raise UserError(f"{path}: a mask of {grid.path.name} cannot end so; use {grid.mask_suffix}")
    if suffix in (".jpg", ".jpeg"):
        raise UserError(f"{path}: JPEG would change the label numbers; use .png")
    if mask.size and mask.min() < 0:
        raise ValueError("label numbers are not negative")
    mask = mask.astype(np.min_scalar_type(int(mask.max(initial=0))))
    with whole_or_nothing(path, suffix) as unfinished:
        if grid.header is None:
            Image.fromarray(mask[0]).save(unfinished)
        else:
            header = grid.header.copy()
            header.set_data_dtype(mask.dtype)
            header.set_slope_inter(1, 0)
            header.set_intent("none")
            header["cal_min"] = header["cal_max"] = 0
            header["descrip"] = header["aux_file"] = header["db_name"] = b""  # may name the patient
            image = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
            nib.save(image(_from_lps(mask, grid), grid.affine, header), unfinished)


def stored_range(path: Path) -> tuple[float, float] | None:
    """(0, 255) for a picture of 8 bits a channel; None where the file's type says nothing of the range."""
    if suffix_of(path) in NIFTI_SUFFIXES:
        return None
    with _reading(path), Image.open(path) as picture:
        return None if picture.mode.startswith(("I", "F")) else (0.0, 255.0)


def _read(path: Path, label: bool = False) -> tuple[np.ndarray, Grid]:
    """Voxels in file axes with a last axis of channels, of the file's own type (scaled), and the grid."""
    voxels, grid = _read_nifti(path) if suffix_of(path) in NIFTI_SUFFIXES else _read_picture(path, label)
    if voxels.dtype.kind not in "biuf":  # complex numbers, NIfTI's RGB triples
        raise UserError(f"{path} holds {voxels.dtype} voxels: export it with one real number a voxel")
    return voxels, grid


def _read_nifti(path: Path) -> tuple[np.ndarray, Grid]:
    with _reading(path):
        image: Any = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
    if voxels.ndim == 2:
        raise UserError(f"{path} has two axes: export it with three (one slice: a third axis of length 1)")
    if voxels.ndim not in (3, 4) or 0 in voxels.shape:
        raise UserError(f"{path} has shape {voxels.shape}: three axes are read, and a fourth for channels")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise UserError(f"{path} has no usable affine (zero or NaN spacing): export it again")
    grid = Grid(path, voxels.shape[:3], image.affine, image.header.copy())
    return voxels.reshape(*grid.shape, -1), grid


def _read_picture(path: Path, label: bool) -> tuple[np.ndarray, Grid]:
    with _reading(path), Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{path} has {getattr(picture, 'n_frames', 1)} pages: save each as its own file")
        # A palette holds an image's values, but only the colours of a label map's numbers.
        if (not label and picture.mode == "P") or picture.mode in ("RGBA", "CMYK", "YCbCr"):
            picture = picture.convert("RGB")
        elif picture.mode == "LA":
            picture = picture.convert("L")
        pixels = np.asarray(picture)  # (H, W) or (H, W, 3)
    return pixels.reshape(*pixels.shape[:2], -1), Grid(path, pixels.shape[:2])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Damage shows as a dozen kinds of exception in the readers; to the user it is one thing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: check the path")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is cut off or damaged, copy it again ({reason})") from error


def _to_lps(voxels: np.ndarray, grid: Grid) -> np.ndarray:
    """File axes (i, j, k) or (H, W) → (Z, Y, X), a view."""
    if grid.affine is None:
        return voxels[None]
    return apply_orientation(voxels, ornt_transform(grid.orientation, _LPS)).transpose(2, 1, 0)


def _from_lps(array: np.ndarray, grid: Grid) -> np.ndarray:
    """(Z, Y, X) → file axes (i, j, k), a view: the inverse of `_to_lps`."""
    return apply_orientation(array.transpose(2, 1, 0), ornt_transform(_LPS, grid.orientation))


def _spacing_mm(grid: Grid) -> tuple[float, float, float] | None:
    """(z, y, x); each file axis carries its voxel size to the world axis nearest to it."""
    if grid.affine is None:
        return None
    spacing = dict(zip(grid.orientation[:, 0].astype(int), voxel_sizes(grid.affine), strict=True))
    return float(spacing[2]), float(spacing[1]), float(spacing[0])


def _check_same_grid(grid: Grid, like: Grid) -> None:
    if grid.shape != like.shape:
        raise UserError(
            f"{grid.path} has shape {grid.shape} but {like.path.name} has {like.shape}: "
            "export it again on the image's grid"
        )
    ours, theirs = grid.affine, like.affine
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None or not np.allclose(ours, theirs, rtol=0, atol=_AFFINE_TOLERANCE):
        raise UserError(f"{grid.path} has another affine than {like.path.name}: export it again on the image's grid")
