"""What was found on some slices of a volume, carried to those around. Knows no model: it asks, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cheaplunch.merging import merge_classes
from cheaplunch.prompts import furthest_point

CARRIED_SHARE = 0.05  # of the area of the mask that was set out from; a smaller mask is not carried further
CARRIED_IOU = 0.4  # with what was carried; an answer that overlaps it less is not taken (docs/prompts.md)

Carried = TypeVar("Carried")


@dataclass(frozen=True, eq=False)
class _Front:
    """A class on its way, where it has got to."""

    number: int  # of the class
    ahead: int  # 1 towards later slices, -1 towards earlier ones
    slice_number: int
    away: int  # slices from the seed that it set out from
    mask: np.ndarray  # (H, W) what the label map shows of it there
    least_px: float  # a smaller mask goes no further

    @property
    def next(self) -> int:
        return self.slice_number + self.ahead


def carry(
    seeds: Mapping[int, Mapping[int, Carried]],
    count: int,
    ask: Callable[[int, dict[int, tuple[float, float]]], Mapping[int, Carried]],
    probability_of: Callable[[Carried], np.ndarray],
    reach: int | None = None,
) -> dict[int, dict[int, Carried]]:
    """From prompted slices to all around, slice number → class → what was found, the `seeds` among them.

    Of `count` slices some have `seeds`, what the user's own prompts found. From each a class is carried to both sides:
    on the next slice it is asked for by the point furthest from the boundary of what the merged label map shows of it
    on the slice before. `ask` takes a slice number and class → (x, y), and what it gives has a probability (H, W). What
    others hide of a class is not carried on: it may lie in another organ.

    All classes go on together, a slice at a time, so that those come first to a slice whose seeds are nearest. They are
    merged as they come, and the further does not change what the nearer carries on: a class that has run into another
    organ comes from afar, and must not end that organ. Outside the outermost seeds all go the same way, and each slice
    is asked about once, for all of them.

    A network that was trained with points on the target finds something wherever it is pointed at, so that a class does
    not end by itself: it ends at the volume's end, before an answer that is empty or overlaps what was carried by less
    than CARRIED_IOU, or after a mask that is smaller than CARRIED_SHARE of the one it set out from; also before a slice
    that has a seed of it, or that it was carried to from a nearer one (of two as near, the lower), and after `reach`
    slices.
    """
    if not seeds:
        return {}
    reached = {number: {k: (0, found) for k, found in classes.items()} for number, classes in seeds.items()}

    def shown(number: int, k: int) -> np.ndarray:
        """(H, W) bool: the pixels of class `k` in the label map of all that have come no further than it."""
        there = reached[number]
        classes = sorted(other for other, (away, _) in there.items() if away <= there[k][0])
        return merge_classes(np.stack([probability_of(there[other][1]) for other in classes]), classes) == k

    def step(number: int, coming: Sequence[_Front]) -> list[_Front]:
        """Slice `number` with all that come to it at a time, and those that have got there."""
        there = reached.setdefault(number, {})
        fronts: dict[int, _Front] = {}
        for front in sorted(coming, key=lambda front: (front.number, front.away, -front.ahead)):
            ends = front.away == reach or np.count_nonzero(front.mask) < front.least_px
            if not ends and front.number not in there:
                fronts.setdefault(front.number, front)
        if fronts:
            for k, found in ask(number, {k: furthest_point(front.mask) for k, front in fronts.items()}).items():
                if _iou(probability_of(found) > 0.5, fronts[k].mask) >= CARRIED_IOU:
                    there[k] = fronts[k].away + 1, found
        return [
            _Front(k, front.ahead, number, front.away + 1, shown(number, k), front.least_px)
            for k, front in fronts.items()
            if k in there
        ]

    fronts = []
    for number, classes in seeds.items():
        for k in classes:
            mask = shown(number, k)
            least_px = max(1, CARRIED_SHARE * np.count_nonzero(mask))
            fronts += [_Front(k, ahead, number, 0, mask, least_px) for ahead in (1, -1)]
    between = range(min(seeds), max(seeds) + 1)
    while inside := [front for front in fronts if front.next in between]:
        fronts = [front for front in fronts if front.next not in between]
        for number in sorted({front.next for front in inside}):
            fronts += step(number, [front for front in inside if front.next == number])
    for number in (*range(between.stop, count), *range(between.start - 1, -1, -1)):
        coming = [front for front in fronts if front.next == number]
        fronts = [front for front in fronts if front.next != number] + step(number, coming)
    return {
        number: {k: found for k, (_, found) in sorted(there.items())}
        for number, there in sorted(reached.items())
        if there
    }


def _iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Of two masks (H, W), the second of them not empty."""
    return np.count_nonzero(mask & other) / np.count_nonzero(mask | other)
