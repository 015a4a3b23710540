"""How far two masks of one class agree: the only file that measures in mm.

A mask is a boolean array (2-D or 3-D); its spacing gives the step along each axis *in array-axis order*, in
mm. Spacing (1, 1) or (1, 1, 1) makes every length below a number of pixels or voxels. Pass a 2-D image as
2-D: in a volume one slice thick every voxel of a mask is boundary.

Empty masks: a figure is nan where it has no value (0 / 0, or a distance to a surface that is not there). What
such a case *scores* is for `protocols` to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

HD95Definition = Literal["max-directed", "pooled"]

# A nanometre: 12 * 0.4 - 7 * 0.4 is a little more than 2.0 and must still lie within 2 mm.
_ROUNDING_MM = 1e-6


@dataclass(frozen=True, eq=False)
class MaskPair:
    """One class of one case: both masks, cut to the box that holds them, and what the cut took away.

    prediction, truth: boolean arrays of one shape; spacing_mm: in array-axis order; image_shape: before the
    cut.
    """

    prediction: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, ...]
    image_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """From each boundary voxel of one mask to the nearest boundary voxel of the other, in the spacing's unit.

    pred_to_truth: (P,), truth_to_pred: (T,); P and T are the numbers of boundary voxels. Where the other mask
    is empty the distances are inf.
    """

    pred_to_truth: np.ndarray
    truth_to_pred: np.ndarray


def mask_pair(prediction: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, ...]) -> MaskPair:
    """Cut two boolean masks of one shape to the box of their union.

    Raises ValueError for masks of different shapes or of other than two or three axes, and for a bad spacing.
    """
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    return label_pairs(prediction, truth, {"mask": 1}, spacing_mm)["mask"]


def label_pairs(
    prediction: np.ndarray, truth: np.ndarray, labels: Mapping[str, int], spacing_mm: tuple[float, ...]
) -> dict[str, MaskPair]:
    """The pair of masks of every class of two label maps; the boxes of all classes are found in one pass.

    prediction, truth: integer arrays of one shape, (H, W) or (D, H, W) in any axis order; labels: name →
    number, background (0) not among them.

    Raises ValueError for label maps that differ in shape, have other than two or three axes or no integer
    type, for a label below 1, and for a spacing that is not one positive number an axis.
    """
    prediction, truth = _label_map(prediction), _label_map(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth differ in shape: {prediction.shape} and {truth.shape}")
    if truth.ndim not in (2, 3):
        raise ValueError(f"masks have two or three axes, not {truth.ndim}")
    if len(spacing_mm) != truth.ndim or not all(0 < step < np.inf for step in spacing_mm):
        raise ValueError(f"spacing {spacing_mm} is not one positive number for each of {truth.ndim} axes")
    if min(labels.values(), default=1) < 1:
        raise ValueError(f"labels count from 1, background is not scored: {dict(labels)}")

    highest = max(labels.values(), default=0)
    pred_boxes, truth_boxes = (ndimage.find_objects(m, max_label=highest) for m in (prediction, truth))
    pairs = {}
    for name, label in labels.items():
        box = _union(pred_boxes[label - 1], truth_boxes[label - 1], truth.ndim)
        pairs[name] = MaskPair(prediction[box] == label, truth[box] == label, tuple(spacing_mm), truth.shape)
    return pairs


def dice(pair: MaskPair) -> float:
    """2 |P ∩ T| / (|P| + |T|), in 0..1; one mask empty: 0; both empty: nan."""
    p, t = pair.prediction, pair.truth
    return _ratio(2 * np.count_nonzero(p & t), np.count_nonzero(p) + np.count_nonzero(t))


def iou(pair: MaskPair) -> float:
    """|P ∩ T| / |P ∪ T|, in 0..1; one mask empty: 0; both empty: nan."""
    p, t = pair.prediction, pair.truth
    return _ratio(np.count_nonzero(p & t), np.count_nonzero(p | t))


def surface_distances(pair: MaskPair) -> SurfaceDistances:
    """Distances between the boundaries, centre of voxel to centre of voxel, in the spacing's unit.

    The boundary is the mask without its erosion by the 4- (2-D) or 6-neighbourhood (3-D), with the outside of
    the image as background: MONAI's and medpy's convention.
    """
    step_mm = np.asarray(pair.spacing_mm, dtype=float)
    pred_mm, truth_mm = (np.argwhere(_boundary(mask)) * step_mm for mask in (pair.prediction, pair.truth))
    return SurfaceDistances(_nearest(pred_mm, truth_mm), _nearest(truth_mm, pred_mm))


def hd95(distances: SurfaceDistances, definition: HD95Definition = "max-directed") -> float:
    """The 95th percentile Hausdorff distance, in the spacing's unit; nan where either mask is empty.

    "HD95" is several metrics that can differ from 0 to tens of mm for one pair of masks:
    - "max-directed": the larger of the two directed percentiles (MONAI `compute_hausdorff_distance`);
    - "pooled": the percentile of both sets of distances together (medpy `hd95`).
    """
    there, back = distances.pred_to_truth, distances.truth_to_pred
    if not (there.size and back.size):
        return nan
    if definition == "max-directed":
        return float(max(np.percentile(there, 95), np.percentile(back, 95)))
    if definition == "pooled":
        return float(np.percentile(np.concatenate([there, back]), 95))
    raise ValueError(f"unknown definition of HD95: {definition!r}")


def nsd(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalised surface Dice: the share of both masks' boundary voxels within the tolerance of the other's.

    In 0..1; one mask empty: 0; both empty: nan. Counts boundary voxels as MONAI's `compute_surface_dice` does
    (Seidlitz et al. 2021, arXiv 2111.05408), not surface area as the surface-distance package does.
    """
    both = np.concatenate([distances.pred_to_truth, distances.truth_to_pred])
    return _ratio(np.count_nonzero(both <= tolerance_mm + _ROUNDING_MM), both.size)


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


def _union(a: tuple[slice, ...] | None, b: tuple[slice, ...] | None, ndim: int) -> tuple[slice, ...]:
    """The smallest box around two boxes; None is the box of an absent class."""
    boxes = [box for box in (a, b) if box is not None]
    if not boxes:
        return (slice(0, 0),) * ndim
    axes = zip(*boxes, strict=True)
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in axes)


def _boundary(mask: np.ndarray) -> np.ndarray:
    # The box needs no margin: beyond it this class has only background, which is what border_value=0 says.
    return mask & ~ndimage.binary_erosion(mask, border_value=0) if mask.size else mask


def _nearest(from_mm: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
    """(N, axes), (M, axes) → (N,): from each point to the nearest of the others, inf where there is none."""
    if not len(to_mm):
        return np.full(len(from_mm), np.inf)
    # Boundaries are thin: a tree over their points costs less than a distance transform of the box. On a grid
    # many coordinates are equal, which makes the median splits of a balanced tree slow.
    return KDTree(to_mm, leafsize=32, balanced_tree=False, compact_nodes=False).query(from_mm)[0]


def _ratio(part: int | np.integer, whole: int | np.integer) -> float:
    return float(part / whole) if whole else nan
