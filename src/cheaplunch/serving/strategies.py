"""Which image to label next. A strategy is one entry of `STRATEGIES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.slices import slice_step_mm
from cheaplunch.interactive import Mark, Model, OpenCase, quality_of
from cheaplunch.prediction import segment_auto
from cheaplunch.serving.datastore import Datastore, Entry
from cheaplunch.serving.opened import Served

LOOKED_AT = 8  # images of which the model is asked; the user waits

Choose = Callable[[Sequence[Entry], Served, Datastore, np.random.Generator], Entry]


@dataclass(frozen=True)
class Strategy:
    description: str
    choose: Choose
    """Of at least one image."""


def next_image(strategy: Strategy, served: Served, datastore: Datastore, rng: np.random.Generator) -> Entry | None:
    """Of the images that nobody has labelled, and when there are none, of those whose label only came with them.

    None when a label of every image was submitted.
    """
    left = [entry for entry in datastore.all() if not datastore.is_submitted(entry)]
    left = [entry for entry in left if entry.came_with is None] or left
    return strategy.choose(left, served, datastore, rng) if left else None


def first(left: Sequence[Entry], served: Served, datastore: Datastore, rng: np.random.Generator) -> Entry:
    return left[0]


def at_random(left: Sequence[Entry], served: Served, datastore: Datastore, rng: np.random.Generator) -> Entry:
    return left[int(rng.integers(len(left)))]


def least_sure(left: Sequence[Entry], served: Served, datastore: Datastore, rng: np.random.Generator) -> Entry:
    """Whose masks the network is least sure of: lowest mean over classes of the mean probability inside each mask.

    A network that has to be prompted is clicked where each class lay in the labels that were submitted, on average and
    relative to the image's sides; an empty mask there counts 0. Without such labels it is `first`. At most `LOOKED_AT`
    images are asked about, drawn at random where there are more. Lewis & Gale, "A sequential algorithm for training
    text classifiers", SIGIR 1994, have the idea of asking for what a model is least sure of.
    """
    model = served.current.model
    places = mean_places(datastore)
    if model.prompted and not places:
        return left[0]
    looked_at = [left[i] for i in sorted(rng.permutation(len(left))[:LOOKED_AT])]
    sure = [_how_sure(model.open(entry.sources), model, places) for entry in looked_at]
    return looked_at[int(np.argmin(sure))]


def mean_places(datastore: Datastore) -> dict[str, tuple[float, ...]]:
    """Class → (z, y, x) as shares of the image's sides, on average over the submitted labels that show it."""
    records = [datastore.record(entry)["places"] for entry in datastore.all() if datastore.is_submitted(entry)]
    shown = {name: [record[name] for record in records if name in record] for name in datastore.classes}
    return {name: tuple(np.mean(places, axis=0).tolist()) for name, places in shown.items() if places}


def _how_sure(case: OpenCase, model: Model, places: dict[str, tuple[float, ...]]) -> float:
    """0 to 1."""
    if model.prompted:
        sides, to_voxels = case.volume.array.shape[1:], case.volume.grid.voxels_from_array
        marks = []
        for name, place in places.items():
            z, y, x = np.floor(np.multiply(place, sides))
            marks.append(Mark(name, "voxel", (tuple((to_voxels @ (x, y, z, 1))[:3].tolist()),)))
        answers = case.segment([case.place(mark, model.labels) for mark in marks])
        quality = quality_of(answers, {name: model.labels[name] for name in places})
        return float(np.mean([q or 0.0 for q in quality.values()]))
    numbers = list(model.labels.values())
    slices = CaseSlices(case.images, None, case.volume, step_mm=slice_step_mm(case.volume, case.axis))
    found = segment_auto(model.predictor, slices, numbers, keep=numbers)
    inside = [found.probabilities[place][found.label == number] for place, number in enumerate(numbers)]
    return float(np.mean([own.mean(dtype=np.float64) if own.size else 0.0 for own in inside]))


STRATEGIES = {
    "first": Strategy("the first in the order of names", first),
    "random": Strategy("any, all equally likely", at_random),
    "uncertainty": Strategy(f"what the model is least sure of, of {LOOKED_AT} looked at", least_sure),
}
