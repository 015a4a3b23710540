"""From what was found class by class and slice by slice to one label map of a case. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def merge_classes(probabilities: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """(P, H, W) of classes `numbers` → one label map (H, W): the likelier class where two overlap, 0 up to a half."""
    best = probabilities.argmax(axis=0)
    label = np.asarray(numbers, dtype=np.uint8)[best]
    return np.where(probabilities.max(axis=0) > 0.5, label, 0).astype(np.uint8)


Found = dict[int, dict[int, np.ndarray]]
"""Slice number → class prompted there → (H, W) probability."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a model makes of a case from one draw of prompts."""

    labels: dict[int, np.ndarray]
    """Clicks given → label map (N, H, W) uint8 of the dataset's numbers, in ascending order; 1 for all else."""
    probabilities: np.ndarray
    """(K, N, H, W) float16 of the K classes asked for, each on its own; 0 where a class was not prompted."""

    @property
    def label(self) -> np.ndarray:
        """The final one."""
        return self.labels[max(self.labels)]

    @classmethod
    def of(
        cls,
        found: dict[int, Found],
        shape: tuple[int, ...],
        keep: Sequence[int],
        step_mm: float | None,
        smooth_mm: float,
    ) -> Segmentation:
        """From what was found after each number of clicks on the slices (N, H, W) `shape` of a case.

        The probabilities of the classes `keep` after the last click are kept.
        """
        labels = {clicks: np.zeros(shape, np.uint8) for clicks in found}
        probabilities = np.zeros((len(keep), *shape), np.float16)
        for clicks, slices in found.items():
            for number, classes in smooth_across(slices, step_mm, smooth_mm):
                if not classes:
                    continue
                labels[clicks][number] = merge_classes(np.stack(list(classes.values())), list(classes))
                for place, k in enumerate(keep):
                    if k in classes and clicks == max(found):
                        probabilities[place, number] = classes[k]
        return cls(labels, probabilities)


def smooth_across(found: Found, step_mm: float | None, smooth_mm: float) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
    """Each slice with its classes' probabilities, every class's logits averaged with those on the slices around.

    Weights are Gaussian in the distance, cut at three standard deviations of `smooth_mm`; only slices on which the
    class was prompted count. An organ's boundary goes on from slice to slice, the errors of slices that are looked at
    one by one do not. Where slices are further apart, or have no distance (None), they come as they are.
    """
    weights = slice_weights(step_mm, smooth_mm)
    if len(weights) == 1:
        yield from found.items()
        return
    logits = {number: {k: _logit(p) for k, p in classes.items()} for number, classes in found.items()}
    for number, classes in logits.items():
        steadied = {}
        for k in classes:
            near = [(w, logits[number + away][k]) for away, w in weights.items() if k in logits.get(number + away, ())]
            mean = sum(w * logit for w, logit in near) / sum(w for w, _ in near)
            steadied[k] = 1 / (1 + np.exp(-mean))
        yield number, steadied


def smooth_scores(scores: Iterable[np.ndarray], step_mm: float | None, smooth_mm: float) -> Iterator[np.ndarray]:
    """As `smooth_across`, of slices in their order with the logarithms of all outputs' probabilities, (K + 1, h, w).

    Takes no more of them into memory than are averaged.
    """
    weights = slice_weights(step_mm, smooth_mm)
    reach, near = max(weights), dict[int, np.ndarray]()

    def mean(number: int) -> np.ndarray:
        taken = {away: w for away, w in weights.items() if number + away in near}
        return np.sum([w * near[number + away] for away, w in taken.items()], axis=0) / sum(taken.values())

    for number, score in enumerate(scores):
        near[number] = np.maximum(score, math.log(CERTAIN))
        if number >= reach:
            yield mean(number - reach)
            near.pop(number - 2 * reach, None)
    last = max(near, default=-1)
    for number in range(max(0, last + 1 - reach), last + 1):
        yield mean(number)


def slice_weights(step_mm: float | None, smooth_mm: float) -> dict[int, float]:
    """How much the slice so many further counts: {0: 1} where no other is near enough."""
    if not step_mm or step_mm > 3 * smooth_mm:
        return {0: 1.0}
    reach = int(3 * smooth_mm / step_mm)
    return {away: math.exp(-0.5 * (away * step_mm / smooth_mm) ** 2) for away in range(-reach, reach + 1)}


CERTAIN = 1e-4  # probabilities are taken this far from 0 and 1, so that one slice does not outvote its neighbours


def _logit(probability: np.ndarray) -> np.ndarray:
    bounded = np.clip(probability, CERTAIN, 1 - CERTAIN)
    return np.log(bounded / (1 - bounded))
