"""How far two masks of one class agree: the only file that measures in mm.

A mask is a boolean array (2-D or 3-D); its spacing gives the step along each axis *in array-axis order*, in
mm. Spacing (1, 1) or (1, 1, 1) makes every length below a number of pixels or voxels. Pass a 2-D image as
2-D: in a volume one slice thick every voxel of a mask is boundary.

Empty masks: a figure is nan where it has no value (0 / 0, or a distance to a surface that is not there). What
such a case *scores* is for `protocols` to say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import nan
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

HD95Definition = Literal["max-directed", "pooled", "surface"]
Label = int | tuple[int, ...]
"""The number of a class, or those that a region joins."""

# A nanometre: 12 * 0.4 - 7 * 0.4 is a little more than 2.0 and must still lie within 2 mm.
_ROUNDING_MM = 1e-6


@dataclass(frozen=True, eq=False)
class MaskPair:
    """One class of one case: both masks, cut to the box that holds them, and what the cut took away.

    prediction, truth: boolean arrays of one shape; spacing_mm: in array-axis order; image_shape: before the
    cut. probability: of the prediction, float in 0..1 of the same shape, where there is one; then nothing is cut.
    """

    prediction: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, ...]
    image_shape: tuple[int, ...]
    probability: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """From each piece of one mask's surface to the nearest of the other's, in the spacing's unit.

    pred_to_truth: (P,), truth_to_pred: (T,); P and T are the numbers of pieces. Where the other mask is empty the
    distances are inf. pred_sizes (P,), truth_sizes (T,): length (2-D) or area (3-D) of each piece; None where pieces
    are boundary voxels, which all count alike.
    """

    pred_to_truth: np.ndarray
    truth_to_pred: np.ndarray
    pred_sizes: np.ndarray | None = None
    truth_sizes: np.ndarray | None = None


def mask_pair(prediction: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, ...]) -> MaskPair:
    """Cut two boolean masks of one shape to the box of their union.

    Raises ValueError for masks of different shapes or of other than two or three axes, and for a bad spacing.
    """
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    return label_pairs(prediction, truth, {"mask": 1}, spacing_mm)["mask"]


def label_pairs(
    prediction: np.ndarray,
    truth: np.ndarray,
    labels: Mapping[str, Label],
    spacing_mm: tuple[float, ...],
    *,
    ignore: int | None = None,
    probabilities: Mapping[str, np.ndarray] | None = None,
) -> dict[str, MaskPair]:
    """The pair of masks of every class of two label maps; the boxes of all classes are found in one pass.

    prediction, truth: integer arrays of one shape, (H, W) or (D, H, W) in any axis order; labels: name → number, or
    the numbers that a region joins, background (0) not among them. ignore: where the truth has this number both masks
    are empty. probabilities: class name → float array of the same shape, to be carried along.

    Raises ValueError for arrays that differ in shape, label maps that have other than two or three axes or no integer
    type, a label below 1 or equal to `ignore`, and for a spacing that is not one positive number an axis.
    """
    prediction, truth = _label_map(prediction), _label_map(truth)
    probabilities = probabilities or {}
    for array in (prediction, *probabilities.values()):
        if array.shape != truth.shape:
            raise ValueError(f"prediction and truth differ in shape: {array.shape} and {truth.shape}")
    if truth.ndim not in (2, 3):
        raise ValueError(f"masks have two or three axes, not {truth.ndim}")
    if len(spacing_mm) != truth.ndim or not all(0 < step < np.inf for step in spacing_mm):
        raise ValueError(f"spacing {spacing_mm} is not one positive number for each of {truth.ndim} axes")
    numbers = {name: label if isinstance(label, tuple) else (label,) for name, label in labels.items()}
    if not all(some and min(some) >= 1 for some in numbers.values()):
        raise ValueError(f"labels count from 1, background is not scored: {dict(labels)}")
    if any(ignore in some for some in numbers.values()):
        raise ValueError(f"label {ignore} is to be ignored and cannot be a class: {dict(labels)}")

    kept = None if ignore is None else truth != ignore
    if kept is not None:
        prediction, truth = prediction * kept, truth * kept
    highest = max((number for some in numbers.values() for number in some), default=0)
    boxes = [ndimage.find_objects(m, max_label=highest) for m in (prediction, truth)]
    pairs = {}
    for name, some in numbers.items():
        probability = probabilities.get(name)
        box = _union([found[number - 1] for found in boxes for number in some], truth.ndim)
        if probability is not None:
            box = (slice(None),) * truth.ndim
            probability = probability if kept is None else probability * kept
        predicted, true = _mask(prediction[box], some), _mask(truth[box], some)
        pairs[name] = MaskPair(predicted, true, tuple(spacing_mm), truth.shape, probability)
    return pairs


def dice(pair: MaskPair) -> float:
    """2 |P ∩ T| / (|P| + |T|), in 0..1; one mask empty: 0; both empty: nan."""
    p, t = pair.prediction, pair.truth
    return _ratio(2 * np.count_nonzero(p & t), np.count_nonzero(p) + np.count_nonzero(t))


def iou(pair: MaskPair) -> float:
    """|P ∩ T| / |P ∪ T|, in 0..1; one mask empty: 0; both empty: nan."""
    p, t = pair.prediction, pair.truth
    return _ratio(np.count_nonzero(p & t), np.count_nonzero(p | t))


def volume_error(pair: MaskPair) -> float:
    """(|P| − |T|) / |T|: −1 for a missed mask, above 0 for too large a one; truth empty: nan."""
    truth = np.count_nonzero(pair.truth)
    return _ratio(np.count_nonzero(pair.prediction) - truth, truth)


def surface_distances(pair: MaskPair) -> SurfaceDistances:
    """Distances between the boundaries, centre of voxel to centre of voxel, in the spacing's unit.

    The boundary is the mask without its erosion by the 4- (2-D) or 6-neighbourhood (3-D), with the outside of
    the image as background: MONAI's and medpy's convention.
    """
    pred, truth = _boundary(pair.prediction), _boundary(pair.truth)
    return SurfaceDistances(_nearest(pred, truth, pair.spacing_mm), _nearest(truth, pred, pair.spacing_mm))


def element_distances(pair: MaskPair) -> SurfaceDistances:
    """Distances between surface elements, in the spacing's unit, with the elements' lengths (2-D) or areas (3-D).

    An element lies in each cell between 2 × 2 (× 2) voxel centres of which some are inside and some are not; its size
    is that of the surface a marching-cubes mesh has there: the convention of the surface-distance package
    (Nikolov et al. 2018, arXiv 1809.04430).
    """
    codes = [_cell_codes(mask) for mask in (pair.prediction, pair.truth)]
    sizes = _element_sizes(pair.spacing_mm)
    pred, truth = ((code != 0) & (code != len(sizes) - 1) for code in codes)
    return SurfaceDistances(
        _nearest(pred, truth, pair.spacing_mm),
        _nearest(truth, pred, pair.spacing_mm),
        sizes[codes[0][pred]],
        sizes[codes[1][truth]],
    )


def hd95(distances: SurfaceDistances, definition: HD95Definition = "max-directed") -> float:
    """The 95th percentile Hausdorff distance, in the spacing's unit; nan where either mask is empty.

    "HD95" is several metrics that can differ from 0 to tens of mm for one pair of masks:
    - "max-directed": the larger of the two directed percentiles (MONAI `compute_hausdorff_distance`);
    - "pooled": the percentile of both sets of distances together (medpy `hd95`);
    - "surface": of `element_distances`, the larger of the two distances within which 95 % of a surface lies
      (surface-distance `compute_robust_hausdorff`).
    """
    there, back = distances.pred_to_truth, distances.truth_to_pred
    if not (there.size and back.size):
        return nan
    if definition == "max-directed":
        return float(max(np.percentile(there, 95), np.percentile(back, 95)))
    if definition == "pooled":
        return float(np.percentile(np.concatenate([there, back]), 95))
    if definition == "surface":
        if distances.pred_sizes is None or distances.truth_sizes is None:
            raise ValueError('the definition "surface" of HD95 goes with element_distances')
        return max(_reach(there, distances.pred_sizes), _reach(back, distances.truth_sizes))
    raise ValueError(f"unknown definition of HD95: {definition!r}")


def asd(distances: SurfaceDistances) -> float:
    """The average symmetric surface distance, in the spacing's unit; nan where either mask is empty.

    The mean over both surfaces together, so the larger one weighs more (medpy `assd`, MONAI with `symmetric=True`);
    of `element_distances`, weighted by their sizes.
    """
    if not (distances.pred_to_truth.size and distances.truth_to_pred.size):
        return nan
    return float(
        np.average(np.concatenate([distances.pred_to_truth, distances.truth_to_pred]), weights=_sizes(distances))
    )


def nsd(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both masks' surface within the tolerance of the other's.

    In 0..1; one mask empty: 0; both empty: nan. Of `surface_distances` it counts boundary voxels, as MONAI's
    `compute_surface_dice` does (Seidlitz et al. 2021, arXiv 2111.05408); of `element_distances` it weighs them by
    size, as surface-distance's `compute_surface_dice_at_tolerance` does.
    """
    both = np.concatenate([distances.pred_to_truth, distances.truth_to_pred])
    within, sizes = both <= tolerance_mm + _ROUNDING_MM, _sizes(distances)
    if sizes is None:
        return _ratio(np.count_nonzero(within), both.size)
    return _ratio(sizes[within].sum(), sizes.sum())


def image_diagonal(pair: MaskPair) -> float:
    """Length of the whole image's diagonal, √Σ(voxels · spacing)², in the spacing's unit."""
    return float(np.linalg.norm(np.multiply(pair.image_shape, pair.spacing_mm)))


def _label_map(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype == bool:
        return array.view(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"a label map holds integers, not {array.dtype}")
    return array


def _mask(labels: np.ndarray, numbers: tuple[int, ...]) -> np.ndarray:
    return labels == numbers[0] if len(numbers) == 1 else np.isin(labels, numbers)


def _union(boxes: Sequence[tuple[slice, ...] | None], ndim: int) -> tuple[slice, ...]:
    """The smallest box around several; None is the box of an absent class."""
    found = [box for box in boxes if box is not None]
    if not found:
        return (slice(0, 0),) * ndim
    axes = zip(*found, strict=True)
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in axes)


def _boundary(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask of which a neighbour along an axis is not in it, or is beyond the array.

    The box needs no margin: beyond it this class has only background.
    """
    inside = mask.copy()
    for axis in range(mask.ndim if mask.size else 0):
        neighbours, of = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        of[1:] &= neighbours[:-1]
        of[:-1] &= neighbours[1:]
        of[[0, -1]] = False
    return mask & ~inside


def _nearest(from_: np.ndarray, to: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """From each place in one boolean array, in array order, to the nearest in the other of the same shape: (N,).

    In the spacing's unit; inf where there is none.
    """
    if not to.any():
        return np.full(np.count_nonzero(from_), np.inf)
    shared = to[from_]
    distances = np.zeros(shared.size)
    if not shared.all():
        step_mm = np.asarray(spacing_mm, dtype=float)
        # Surfaces are thin: a tree over their points costs less than a distance transform of the box. On a grid
        # many coordinates are equal, which makes the median splits of a balanced tree slow.
        tree = KDTree(np.argwhere(to) * step_mm, leafsize=32, balanced_tree=False, compact_nodes=False)
        distances[~shared] = tree.query(np.argwhere(from_ & ~to) * step_mm)[0]
    return distances


def _sizes(distances: SurfaceDistances) -> np.ndarray | None:
    if distances.pred_sizes is None or distances.truth_sizes is None:
        return None
    return np.concatenate([distances.pred_sizes, distances.truth_sizes])


def _reach(distances: np.ndarray, sizes: np.ndarray) -> float:
    """The distance within which 95 % of a surface lies: that of the element that completes them."""
    order = np.lexsort((sizes, distances))
    share = np.cumsum(sizes[order]) / sizes.sum()
    return float(distances[order][min(np.searchsorted(share, 0.95), len(order) - 1)])


def _corners(ndim: int) -> np.ndarray:
    """(2 ** ndim, ndim): the corners of a cell of neighbouring voxel centres, 0 or 1 along each axis."""
    return np.array(list(product((0, 1), repeat=ndim)))


def _cell_codes(mask: np.ndarray) -> np.ndarray:
    """For every cell of neighbouring voxel centres, those around the mask too: bit k is set where corner k is inside.

    Of shape n + 1 along each axis of n voxels.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, corner in enumerate(_corners(mask.ndim)):
        codes |= padded[tuple(slice(at, at + n) for at, n in zip(corner, codes.shape, strict=True))] << bit
    return codes


@lru_cache
def _element_sizes(spacing_mm: tuple[float, ...]) -> np.ndarray:
    """(2 ** 2 ** axes,): the length or area of the surface within a cell, by its code (see `_cell_codes`).

    The fewer of the inside and the outside corners, the inside ones of equally many, fall into groups that are joined
    along the cell's edges; each group is cut off by a surface of its own through the middles of edges.
    """
    corners = _corners(len(spacing_mm))
    facing = np.prod(spacing_mm) / np.array(spacing_mm)  # (axes,): of a cell's side that faces along an axis
    sizes = np.zeros(2 ** len(corners))
    for code in range(len(sizes)):
        inside = (code >> np.arange(len(corners))) & 1 == 1
        fewer = corners[inside if 2 * inside.sum() <= len(corners) else ~inside]
        for group in _joined(fewer):
            sizes[code] += np.linalg.norm(_cut(group) * facing, axis=1).sum()
    return sizes


def _joined(corners: np.ndarray) -> list[np.ndarray]:
    """(K, axes) corners → groups that are connected along edges."""
    groups: list[list[np.ndarray]] = []
    for corner in corners:
        joined, apart = [corner], []
        for group in groups:
            if any(np.abs(corner - other).sum() == 1 for other in group):
                joined += group
            else:
                apart.append(group)
        groups = [*apart, joined]
    return [np.array(group) for group in groups]


def _cut(group: np.ndarray) -> np.ndarray:
    """The faces (N, axes) that cut some corners (K, axes) off the unit cell; they are joined along edges, at most half.

    A face is its normal, without signs, as long as the face is large. Cuts go through the middles of edges:

        one corner            a triangle (2-D: a line) across it
        an edge               a rectangle (2-D: a line) along it
        an L of three         a triangle parallel to its plane, and a slope
        a square              a square
        a corner and its      a hexagon
        three neighbours
        a path of four        the two slopes of its ends, and the triangles that join them
    """
    axes = np.eye(group.shape[1])
    all_axes = axes.sum(axis=0)
    flat = axes[np.ptp(group, axis=0) == 0]  # the axes along which the group does not extend
    neighbours = (np.abs(group[:, None] - group).sum(axis=2) == 1).sum(axis=1)  # of each corner within the group
    if len(group) == 1:
        return all_axes[None] / (2 if len(axes) == 2 else 8)
    if len(group) == 2:
        return flat.sum(axis=0)[None] / (len(axes) - 1)
    if len(group) == 3:
        return np.stack([flat[0] / 2, all_axes * 3 / 8])
    if len(flat):
        return flat
    if neighbours.max() == 3:
        return all_axes[None] * 3 / 4
    middle = axes[np.ptp(group[neighbours == 2], axis=0) == 1][0]
    return np.stack([all_axes / 2, *((middle + other) / 4 for other in axes if not np.array_equal(other, middle))])


def _ratio(part: float | np.number, whole: float | np.number) -> float:
    return float(part / whole) if whole else nan
