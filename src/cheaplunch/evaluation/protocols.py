"""What a case scores, by the name of the rule: one small function a protocol, and the table that lists them.

Papers in this field report "Dice and HD95" under rules that differ in unit, in the definition of HD95 and in
what an empty mask scores. To add a protocol, write its function, with its source and its empties in the
docstring, and enter it in `PROTOCOLS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from math import isfinite

import numpy as np

from cheaplunch.errors import UserError
from cheaplunch.evaluation import metrics
from cheaplunch.evaluation.metrics import MaskPair


@dataclass(frozen=True)
class Score:
    """Figures of one class of one case; None is undefined: left out of means, and counted.

    dice, iou, nsd: 0..1; hd95: in the protocol's unit. Raises ValueError for nan or inf.
    """

    dice: float | None
    iou: float | None
    hd95: float | None
    nsd: float | None

    def __post_init__(self) -> None:
        if not all(value is None or isfinite(value) for value in astuple(self)):
            raise ValueError(f"undefined figures are None, never nan or inf: {self}")


UNDEFINED = Score(dice=None, iou=None, hd95=None, nsd=None)


def strict(pair: MaskPair, tolerance_mm: float) -> Score:
    """Whole volumes, in mm, HD95 as the larger of the two directed percentiles. The default.

    Both empty: undefined. One empty: Dice, IoU and NSD 0, HD95 the length of the image's diagonal, so that a
    missed or an invented organ never improves a mean.
    """
    if not (pair.prediction.any() or pair.truth.any()):
        return UNDEFINED
    if not (pair.prediction.any() and pair.truth.any()):
        return Score(dice=0.0, iou=0.0, hd95=metrics.image_diagonal(pair), nsd=0.0)
    return _measured(pair, "max-directed", tolerance_mm)


def paper(pair: MaskPair, tolerance_vox: float) -> Score:
    """TransUNet's and SAMed's `calculate_metric_percase`: medpy's pooled HD95 without spacing, so in voxels.

    Predicted but absent: Dice 1, HD95 0. Missed: Dice 0, HD95 0 (which improves the mean HD95). Both empty:
    Dice 0, HD95 0. IoU and NSD are not in the source; they follow Dice's empties, and NSD's tolerance counts
    voxels.
    """
    if pair.prediction.any() and pair.truth.any():
        return _measured(replace(pair, spacing_mm=(1.0,) * pair.truth.ndim), "pooled", tolerance_vox)
    full_or_nothing = 1.0 if pair.prediction.any() else 0.0
    return Score(dice=full_or_nothing, iou=full_or_nothing, hd95=0.0, nsd=full_or_nothing)


@dataclass(frozen=True)
class Protocol:
    """score: (masks of a class, NSD tolerance) → Score; in_voxels: lengths ignore the images' spacing."""

    score: Callable[[MaskPair, float], Score]
    in_voxels: bool


PROTOCOLS: Mapping[str, Protocol] = {
    "strict": Protocol(strict, in_voxels=False),
    "paper": Protocol(paper, in_voxels=True),
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises UserError for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: no such protocol; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def score_labels(
    prediction: np.ndarray,
    truth: np.ndarray,
    labels: Mapping[str, int],
    spacing_mm: tuple[float, ...],
    *,
    protocol: str = "strict",
    nsd_tolerance: float = 2.0,
) -> dict[str, Score]:
    """The score of every class of one case, class name → Score.

    prediction, truth: integer label maps of the whole image or volume, one shape, 2-D or 3-D; labels: name →
    number (1 or more); spacing_mm: in array-axis order, all 1 for an image without spacing; nsd_tolerance: in
    the protocol's unit. Raises ValueError as `metrics.label_pairs` does, UserError for an unknown protocol.
    """
    score = find_protocol(protocol).score
    pairs = metrics.label_pairs(prediction, truth, labels, spacing_mm)
    return {name: score(pair, nsd_tolerance) for name, pair in pairs.items()}


def _measured(pair: MaskPair, definition: metrics.HD95Definition, tolerance_mm: float) -> Score:
    """Both masks hold something: every figure is as measured."""
    distances = metrics.surface_distances(pair)
    return Score(
        dice=metrics.dice(pair),
        iou=metrics.iou(pair),
        hd95=metrics.hd95(distances, definition),
        nsd=metrics.nsd(distances, tolerance_mm),
    )
