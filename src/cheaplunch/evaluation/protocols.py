"""What a case scores, by the name of the rule: one small function a protocol, and the table that lists them.

Papers in this field report "Dice and HD95" under rules that differ in unit, in the definition of HD95 and in
what an empty mask scores. To add a protocol, write its function, with its source and its empties in the
docstring, and enter it in `PROTOCOLS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from math import hypot, isfinite
from typing import Literal

import numpy as np

from cheaplunch.errors import UserError
from cheaplunch.evaluation import metrics
from cheaplunch.evaluation.metrics import Label, MaskPair


@dataclass(frozen=True)
class Score:
    """Figures of one class of one case; None is undefined: left out of means, and counted.

    dice, iou, nsd: 0..1; hd95, asd: in the protocol's unit; volume_error: (|P| − |T|) / |T|. missed: 1 where the truth
    has the class and the prediction has not, otherwise 0; invented: the other way round; in between where a score is
    the mean of several. Raises ValueError for nan or inf.
    """

    dice: float | None
    iou: float | None
    hd95: float | None
    nsd: float | None
    asd: float | None = None
    volume_error: float | None = None
    missed: float = 0
    invented: float = 0

    def __post_init__(self) -> None:
        if not all(value is None or isfinite(value) for value in astuple(self)):
            raise ValueError(f"undefined figures are None, never nan or inf: {self}")


UNDEFINED = Score(dice=None, iou=None, hd95=None, nsd=None)


def strict(pair: MaskPair, tolerance_mm: float) -> Score:
    """Whole volumes, in mm, HD95 as the larger of the two directed percentiles. The default.

    Both empty: undefined. One empty: Dice, IoU and NSD 0, HD95 and the average distance the length of the image's
    diagonal, so that a missed or an invented organ never improves a mean.
    """
    if not (pair.prediction.any() or pair.truth.any()):
        return UNDEFINED
    if not (pair.prediction.any() and pair.truth.any()):
        diagonal = metrics.image_diagonal(pair)
        return Score(dice=0.0, iou=0.0, hd95=diagonal, nsd=0.0, asd=diagonal)
    return _measured(pair, "max-directed", tolerance_mm)


def paper(pair: MaskPair, tolerance_vox: float) -> Score:
    """TransUNet's and SAMed's `calculate_metric_percase`: medpy's pooled HD95 without spacing, so in voxels.

    Predicted but absent: Dice 1, HD95 0. Missed: Dice 0, HD95 0 (which improves the mean HD95). Both empty:
    Dice 0, HD95 0. IoU, NSD and the average distance are not in the source; the first two follow Dice's empties, the
    third HD95's, and NSD's tolerance counts voxels.
    """
    if pair.prediction.any() and pair.truth.any():
        return _measured(replace(pair, spacing_mm=(1.0,) * pair.truth.ndim), "pooled", tolerance_vox)
    full_or_nothing = 1.0 if pair.prediction.any() else 0.0
    return Score(dice=full_or_nothing, iou=full_or_nothing, hd95=0.0, nsd=full_or_nothing, asd=0.0)


MSA_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def msa(pair: MaskPair, _tolerance: float) -> Score:
    """Medical SAM Adapter's validation: Dice and IoU of each 2-D image, means over five thresholds of the probability.

    A volume (D, H, W) is D images; its score is their mean, over those without the organ too. Both empty at a
    threshold: 1. One empty: 0. No distances. The public code adds 1e-4 (Dice) and 1e-6 (IoU) above and below each
    fraction so that 0 / 0 is 1, which moves an image by less than that; it is left out here.

    pair: uncut, with its probability. ValueError where it has none.
    """
    if pair.probability is None:
        raise ValueError("the protocol msa scores probabilities")
    truth = pair.truth.reshape(-1, *pair.truth.shape[-2:])  # (D, H, W)
    probability = pair.probability.reshape(truth.shape)
    dice, iou = [], []
    for threshold in MSA_THRESHOLDS:
        prediction = probability > threshold
        shared, of_prediction, of_truth = (  # (D,) each
            np.count_nonzero(masks, axis=(1, 2)) for masks in (prediction & truth, prediction, truth)
        )
        total = of_prediction + of_truth
        dice.append(np.where(total == 0, 1.0, 2 * shared / np.maximum(total, 1)))
        iou.append(np.where(total == 0, 1.0, shared / np.maximum(total - shared, 1)))
    return Score(dice=float(np.mean(dice)), iou=float(np.mean(iou)), hd95=None, nsd=None)


def nnunet(pair: MaskPair, _tolerance: float) -> Score:
    """nnU-Net v2's `evaluate_folder`: Dice 2·TP / (2·TP + FP + FN) and IoU TP / (TP + FP + FN). No distances.

    Both empty: undefined, left out of the mean (its nanmean). One empty: 0.
    """
    if not (pair.prediction.any() or pair.truth.any()):
        return UNDEFINED
    return Score(dice=metrics.dice(pair), iou=metrics.iou(pair), hd95=None, nsd=None)


BRATS_DIAGONAL_MM = hypot(240, 240, 155)  # 373.13: of the challenge's images, 240 × 240 × 155 voxels of 1 mm


def brats(pair: MaskPair, tolerance_mm: float) -> Score:
    """The BraTS challenge's rule, in mm, for classes or regions; HD95 is medpy's pooled, as in nnU-Net's BraTS scoring.

    Both empty: Dice 1, HD95 0. One empty: Dice 0, HD95 373.13 mm, whatever the image's size. IoU, NSD and the average
    distance are not in the source; the first two follow Dice's empties, the third HD95's.
    """
    if pair.prediction.any() and pair.truth.any():
        return _measured(pair, "pooled", tolerance_mm)
    if pair.prediction.any() or pair.truth.any():
        return Score(dice=0.0, iou=0.0, hd95=BRATS_DIAGONAL_MM, nsd=0.0, asd=BRATS_DIAGONAL_MM)
    return Score(dice=1.0, iou=1.0, hd95=0.0, nsd=1.0, asd=0.0)


@dataclass(frozen=True)
class Protocol:
    """A rule and what it is for.

    score: (masks of a class, NSD tolerance) → Score; in_voxels: lengths ignore the images' spacing; works_on: what one
    score of it is of; needs_probabilities: label maps alone cannot be scored.
    """

    score: Callable[[MaskPair, float], Score]
    in_voxels: bool = False
    works_on: Literal["volumes", "slices"] = "volumes"
    needs_probabilities: bool = False


PROTOCOLS: Mapping[str, Protocol] = {
    "strict": Protocol(strict),
    "paper": Protocol(paper, in_voxels=True),
    "msa": Protocol(msa, works_on="slices", needs_probabilities=True),
    "nnunet": Protocol(nnunet),
    "brats": Protocol(brats),
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises UserError for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: no such protocol; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def score_labels(
    prediction: np.ndarray,
    truth: np.ndarray,
    labels: Mapping[str, Label],
    spacing_mm: tuple[float, ...],
    *,
    protocol: str = "strict",
    nsd_tolerance: float = 2.0,
    ignore: int | None = None,
    probabilities: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Score]:
    """The score of every class of one case, class name → Score.

    prediction, truth: integer label maps of the whole image or volume, one shape, 2-D or 3-D; labels: name →
    number (1 or more), or a tuple of those that a region joins; spacing_mm: in array-axis order, all 1 for an image
    without spacing; nsd_tolerance: in the protocol's unit; ignore: voxels where the truth has this number are left out
    of both; probabilities: class name → float in 0..1 of the same shape, slices along the first axis of a volume.

    Volume errors and what is missed or invented are of the label maps, under every protocol alike. Raises ValueError
    as `metrics.label_pairs` does, UserError for an unknown protocol and for one whose probabilities are missing.
    """
    rule = find_protocol(protocol)
    if rule.needs_probabilities:
        if probabilities is None or labels.keys() - probabilities.keys():
            others = ", ".join(name for name, other in PROTOCOLS.items() if not other.needs_probabilities)
            raise UserError(
                f"--protocol {protocol} scores probabilities, which masks read from --predictions do not hold: "
                f"evaluate a RUN or --method zero-shot, or choose one of {others}"
            )
    else:
        probabilities = None
    pairs = metrics.label_pairs(prediction, truth, labels, spacing_mm, ignore=ignore, probabilities=probabilities)
    return {name: _with_volumes(rule.score(pair, nsd_tolerance), pair) for name, pair in pairs.items()}


def _with_volumes(score: Score, pair: MaskPair) -> Score:
    there, predicted = bool(pair.truth.any()), bool(pair.prediction.any())
    error = metrics.volume_error(pair) if there else None
    return replace(
        score, volume_error=error, missed=int(there and not predicted), invented=int(predicted and not there)
    )


def _measured(pair: MaskPair, definition: metrics.HD95Definition, tolerance_mm: float) -> Score:
    """Both masks hold something: every figure is as measured."""
    distances = metrics.surface_distances(pair)
    return Score(
        dice=metrics.dice(pair),
        iou=metrics.iou(pair),
        hd95=metrics.hd95(distances, definition),
        nsd=metrics.nsd(distances, tolerance_mm),
        asd=metrics.asd(distances),
    )
