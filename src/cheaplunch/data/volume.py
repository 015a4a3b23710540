"""Image files ↔ arrays in one anatomical orientation: the only file that knows affines and orientations.

Arrays run (C, Z, Y, X) with Z towards superior, Y towards posterior and X towards left: the file axes nearest
to these, permuted and flipped, never interpolated. `array[:, z]` is an axial slice as radiologists see it.

A source of an image is the path of a file, of a folder that holds one DICOM series, or `FOLDER#UID` for one of
several series (dicom.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from cheaplunch.data import dicom, formats, itk
from cheaplunch.data.formats import ARRAY_SUFFIXES, ITK_SUFFIXES, NIFTI_SUFFIXES, PICTURE_SUFFIXES, READERS
from cheaplunch.data.headers import Geometry, Header, Reader, Role
from cheaplunch.errors import UserError
from cheaplunch.files import whole_or_nothing

SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + PICTURE_SUFFIXES + ARRAY_SUFFIXES + (dicom.SUFFIX,)

_READERS = READERS | {dicom.SUFFIX: Reader(dicom.read_header, dicom.read_voxels)}
_MASK_SUFFIX = {".jpg": ".png", ".jpeg": ".png", ".nhdr": ".nrrd", ".mhd": ".mha", ".npy.h5": ".npz", ".h5": ".npz"}

_LPS = axcodes2ornt("LPS")  # X towards left, Y towards posterior, Z towards superior
_RAS_FROM = {"RAS": np.eye(4), "LPS": np.diag([-1.0, -1, 1, 1]), "LAS": np.diag([-1.0, 1, 1, 1])}
_LPS_FROM_RAS = _RAS_FROM["LPS"]  # its own inverse
NOWHERE = _RAS_FROM["LPS"]  # an affine for images that have none: 1 mm a voxel, towards left, posterior and superior
_AFFINE_TOLERANCE = 1e-3  # mm; exports of one scan by two programs differ by rounding

Coordinates = Literal["voxel", "world_ras", "world_lps"]
"""Of the file's own array, (i, j, k) as nibabel and ITK count them, of a picture (x, y) or (x, y, page); or mm in the
patient: RAS as NIfTI has it, LPS as DICOM, ITK and 3D Slicer's files."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A file's own grid: all that is needed to write a mask back onto it. It can be pickled."""

    path: Path
    shape: tuple[int, ...]  # the file's axes: (i, j, k) with an affine; pictures (H, W), their stacks (D, H, W)
    affine: np.ndarray | None = None  # (4, 4), (i, j, k) → RAS mm; None for pictures and bare arrays
    # What the file has beyond the affine: qform, sform, codes and byte order; ITK's numbers; the DICOM series.
    header: nib.Nifti1Header | Geometry | dicom.Series | None = field(default=None, repr=False)
    channels: int = 1
    dtype: np.dtype = np.dtype(np.float32)  # as stored

    @property
    def orientation(self) -> np.ndarray:
        """(3, 2): for each file axis the world axis nearest to it (R, A, S) and its sign."""
        return io_orientation(self.affine)

    @property
    def axcodes(self) -> str | None:
        """Where the file's axes point, such as 'LPS' or 'RAS'; None without an affine."""
        return None if self.affine is None else "".join(aff2axcodes(self.affine))

    @property
    def array_shape(self) -> tuple[int, int, int, int]:
        """(C, Z, Y, X): the shape of the volume's array."""
        if self.affine is None:
            z, y, x = (1, *self.shape)[-3:]
        else:
            lengths = dict(zip(self.orientation[:, 0].astype(int), self.shape, strict=True))
            z, y, x = lengths[2], lengths[1], lengths[0]
        return self.channels, z, y, x

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """(z, y, x); each file axis carries its voxel size to the world axis nearest to it."""
        if self.affine is None:
            return None
        spacing = dict(zip(self.orientation[:, 0].astype(int), voxel_sizes(self.affine), strict=True))
        return float(spacing[2]), float(spacing[1]), float(spacing[0])

    @property
    def voxels_from_array(self) -> np.ndarray:
        """(4, 4): (x, y, z) of the volume's array → (i, j, k) of the file's; of pictures the same."""
        if self.affine is None:
            return np.eye(4)
        return inv_ornt_aff(ornt_transform(self.orientation, _LPS), self.shape)

    def from_voxels(self, coordinates: Coordinates) -> np.ndarray:
        """(4, 4): (i, j, k) of the file's array → a place. UserError for mm without a patient's space."""
        if coordinates == "voxel":
            return np.eye(4)
        if self.affine is None:
            raise UserError(f"{self.path} has no place in a patient; give its voxels")
        return self.affine if coordinates == "world_ras" else _LPS_FROM_RAS @ self.affine

    @property
    def mask_suffix(self) -> str:
        """The file's own ending; where that would change label numbers or need a second file, the nearest one.

        JPEG → '.png', .nhdr → '.nrrd', .mhd → '.mha', HDF5 → '.npz'; '.dcm' (DICOM SEG) for a series.
        """
        suffix = suffix_of(self.path)
        return _MASK_SUFFIX.get(suffix, suffix)

    @property
    def mask_suffixes(self) -> tuple[str, ...]:
        """Every ending that `write_mask` takes for this grid."""
        if self.affine is not None:
            series = isinstance(self.header, dicom.Series)
            return (".nii.gz", ".nii", ".nrrd", ".mha") + ((dicom.SUFFIX,) if series else ())
        flat = self.array_shape[1] == 1
        return ((".png", ".bmp") if flat else ()) + (".tif", ".tiff", ".npz")


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels in the orientation of this module, with the grid they came from."""

    array: np.ndarray  # (C, Z, Y, X) float32; pictures (C, 1, H, W), their stacks (C, D, H, W)
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
    """The ending that names the format, lower case ('.nii.gz' as a whole), '.dcm' for a DICOM series.

    UserError where it is unknown.
    """
    if dicom.names_series(path):
        return dicom.SUFFIX
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise UserError(f"{path} has an unknown ending: give one of {', '.join(SUFFIXES)}")


def source_files(source: Path) -> tuple[Path, ...]:
    """The files an image is made of: itself, its detached voxels, or a series' slices in their order."""
    source = Path(source)
    suffix = suffix_of(source)
    if suffix == dicom.SUFFIX:
        return dicom.open_series(source).files
    return itk.block_files(source) if suffix in ITK_SUFFIXES else (source,)


def read_grid(sources: Sequence[Path]) -> Grid:
    """The grid of an image, one source per channel, from headers alone; UserError as of `read_volume`."""
    return _joined([_open(Path(source), "image")[1] for source in sources])


def read_volume(paths: Sequence[Path]) -> Volume:
    """Read an image, one source per channel; a file with several channels (RGB, 4-D NIfTI) gives them all.

    Of .npz and .h5 the array 'image' is read. Pages of a TIFF are Z. Raises UserError where a file is missing,
    damaged, not an image of scalars, holds NaN or infinity, or where the channels' grids differ.
    """
    opened = [(Path(path), *_open(Path(path), "image")) for path in paths]
    channels, grid = [], _joined([own for _, _, own in opened])
    for path, header, own in opened:
        voxels = _READERS[suffix_of(path)].voxels(path, "image", header)  # file axes + (C,)
        with np.errstate(over="ignore"):
            voxels = voxels.astype(np.float32)
        if not np.isfinite(voxels).all():
            bad = np.count_nonzero(~np.isfinite(voxels))
            raise UserError(f"{path} has {bad} NaN or infinite voxels: give them the background's value")
        channels += [to_lps(voxels[..., c], own) for c in range(voxels.shape[-1])]
    return Volume(np.stack(channels), grid.spacing_mm, grid)


def read_label(path: Path, like: Volume, names: Mapping[str, int] | None = None) -> np.ndarray:
    """Read a label map, (Z, Y, X) int32, turned by its own affine to lie voxel by voxel on `like.array[c]`.

    Of .npz and .h5 the array 'label' is read. Of a DICOM SEG each segment gets the number `names` has for its
    label; without `names`, the number cheaplunch wrote beside it, else its segment number.

    Raises UserError where it is missing, damaged, on another grid than the image, or not made of integers.
    """
    path, grid = Path(path), like.grid
    if suffix_of(path) == dicom.SUFFIX and dicom.is_segmentation(path):
        if grid.affine is None:
            raise UserError(f"{path} has places in a patient but {grid.path.name} has none: export the image again")
        segments = dicom.read_segmentation(path, grid.shape, _LPS_FROM_RAS @ grid.affine, names)
        return np.ascontiguousarray(to_lps(segments, grid), dtype=np.int32)
    header, grid = _open(path, "label")
    _check_same_grid(grid, like.grid)
    if grid.channels != 1:
        raise UserError(f"{path} has {grid.channels} channels: a label map has one, of label numbers")
    voxels = _READERS[suffix_of(path)].voxels(path, "label", header)[..., 0]
    if not np.issubdtype(voxels.dtype, np.integer) and voxels.dtype != bool:
        if np.isnan(voxels).any():
            raise UserError(f"{path} has NaN voxels: write the label map with an integer type")
        if not (voxels == np.rint(voxels)).all():
            raise UserError(f"{path} has values that are not integers: resample it by nearest neighbour")
    if np.abs(voxels.astype(float)).max(initial=0) >= 2**31:
        raise UserError(f"{path} has values beyond 2^31: write the label numbers of dataset.json")
    return np.ascontiguousarray(to_lps(voxels, grid), dtype=np.int32)


def write_mask(mask: np.ndarray, like: Volume, path: Path, names: Mapping[str, int] | None = None) -> None:
    """Write label numbers, (Z, Y, X) non-negative integers, on the exact grid of `like`'s file.

    Shape, affine, qform and sform are the file's; the type is the smallest unsigned integer that holds the
    numbers (never the image's own); no text of the file's is taken along. The file appears whole or not at all.

    Images in a patient's space take .nii.gz, .nii, .nrrd and .mha, a DICOM series .dcm too: a DICOM SEG of one
    segment for each of `names` (name → label number), which refers to the series. A picture's mask is grey, a
    stack's is a TIFF of its pages, and that of a bare array (.npz, .h5) is an .npz with the key 'label'.
    """
    path, grid = Path(path), like.grid
    if mask.shape != like.array.shape[1:]:
        raise ValueError(f"mask {mask.shape} does not fit the image {like.array.shape[1:]}")
    if mask.size and mask.min() < 0:
        raise ValueError("label numbers are not negative")
    suffix = suffix_of(path)
    if suffix in (".jpg", ".jpeg"):
        raise UserError(f"{path}: JPEG would change the label numbers; use .png")
    if suffix not in grid.mask_suffixes:
        raise UserError(f"{path}: a mask of {grid.path.name} cannot end so; use {grid.mask_suffix}")
    mask = mask.astype(np.min_scalar_type(int(mask.max(initial=0))))
    voxels, own = _from_lps(mask, grid), grid.header
    with whole_or_nothing(path, suffix) as unfinished:
        if suffix == dicom.SUFFIX and isinstance(own, dicom.Series):
            if names is None:
                raise ValueError("a DICOM SEG names its segments: give `names`")
            dicom.write_segmentation(voxels, own, names, unfinished)
        elif suffix in NIFTI_SUFFIXES and grid.affine is not None:
            formats.write_nifti(voxels, grid.affine, own if isinstance(own, nib.Nifti1Header) else None, unfinished)
        elif suffix in ITK_SUFFIXES and grid.affine is not None:
            place = own if isinstance(own, Geometry) else itk.geometry(_LPS_FROM_RAS @ grid.affine)
            itk.write_itk(voxels, place, unfinished)
        elif suffix in PICTURE_SUFFIXES:
            formats.write_picture(mask, unfinished)
        else:
            formats.write_npz(voxels, unfinished)


def stored_range(path: Path) -> tuple[float, float] | None:
    """(0, 255) for a picture of 8 bits a channel; None where the file's type says nothing of the range."""
    return formats.picture_range(path) if suffix_of(path) in PICTURE_SUFFIXES else None


def lone_slice(affine: np.ndarray, number: int, thicker: float) -> np.ndarray:
    """The affine of the slice (i, j, `number`) alone, where it is, and so many times thicker than its pixels are wide.

    One that is thicker already stays as it is.
    """
    own = affine @ from_matvec(np.eye(3), [0, 0, number])
    column, row, step = voxel_sizes(own)
    own[:3, 2] *= max(1.0, thicker * max(column, row) / step)
    return own


def _open(path: Path, role: Role) -> tuple[Header, Grid]:
    header = _READERS[suffix_of(path)].header(path, role)
    affine = None if header.affine is None else _RAS_FROM[header.frame] @ header.affine
    return header, Grid(path, header.shape, affine, header.own, header.channels, header.dtype.newbyteorder("="))


def _joined(grids: Sequence[Grid]) -> Grid:
    """The first of the grids with the channels of all; UserError where one is another."""
    if not grids:
        raise ValueError("a volume has at least one channel")
    for grid in grids[1:]:
        _check_same_grid(grid, grids[0])
    return replace(grids[0], channels=sum(grid.channels for grid in grids))


def to_lps(voxels: np.ndarray, grid: Grid) -> np.ndarray:
    """File axes (i, j, k), (H, W) or (D, H, W) → (Z, Y, X), a view."""
    if grid.affine is None:
        return voxels.reshape(grid.array_shape[1:])
    return apply_orientation(voxels, ornt_transform(grid.orientation, _LPS)).transpose(2, 1, 0)


def _from_lps(array: np.ndarray, grid: Grid) -> np.ndarray:
    """(Z, Y, X) → file axes, a view: the inverse of `to_lps`."""
    if grid.affine is None:
        return array.reshape(grid.shape)
    return apply_orientation(array.transpose(2, 1, 0), ornt_transform(_LPS, grid.orientation))


def _lps_affine(grid: Grid) -> np.ndarray:
    """(4, 4): (x, y, z) of the array → RAS mm, the same for one grid however its file's axes run."""
    return grid.affine @ grid.voxels_from_array


def _check_same_grid(grid: Grid, like: Grid) -> None:
    """The same voxels at the same places; the files' axes may run differently."""
    if grid.array_shape[1:] != like.array_shape[1:]:
        raise UserError(
            f"{grid.path} has shape {grid.shape} but {like.path.name} has {like.shape}: "
            "export it again on the image's grid"
        )
    if grid.affine is None and like.affine is None:
        return
    if (
        grid.affine is None
        or like.affine is None
        or not np.allclose(_lps_affine(grid), _lps_affine(like), rtol=0, atol=_AFFINE_TOLERANCE)
    ):
        raise UserError(f"{grid.path} has another affine than {like.path.name}: export it again on the image's grid")
