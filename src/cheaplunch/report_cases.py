"""What went wrong in each case, in words and in pictures: where to look, and what the model was given there.

Label maps come cut into slices, (N, H, W). No model is known here: pictures are of masks as they were written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import Dataset
from cheaplunch.data.slices import Axis, Frame, Window, in_plane_spacing, to_slices
from cheaplunch.data.volume import read_label
from cheaplunch.evaluation.metrics import Label, MaskPair, label_pairs
from cheaplunch.figures import case_overlays, telling_slice, thumbnail
from cheaplunch.files import whole_or_nothing, write_json
from cheaplunch.prompting import Prompting, read_prompting
from cheaplunch.prompts import SimulatedUser, furthest_point, jitter_point, oracle_prompts
from cheaplunch.synthesis import derive_seed

ROLES = ("best", "median", "worst")
PICTURED = 60  # cases with a thumbnail, the worst, so that a page stays a few MB

SWAPPED_SHARE = 0.5  # of the prediction on the truth of one other class
TOO_LARGE = 0.5  # volume error
STRAY_SHARE = 0.1  # of the prediction in pieces that hold nothing of the truth
FOUND_SHARE = 0.5  # of the truth

MODES: Mapping[str, str] = {
    "missed": "the truth has it, the prediction has none of it",
    "swapped": f"more than {100 * SWAPPED_SHARE:g} % of the prediction lies on the truth of one other class",
    "invented": "the prediction has it, the truth does not",
    "leaked": f"the prediction is more than {100 * TOO_LARGE:g} % too large, "
    f"or more than {100 * STRAY_SHARE:g} % of it is in pieces that hold nothing of the truth",
    "cut short": f"less than {100 * FOUND_SHARE:g} % of the truth is found",
    "boundary only": "none of these: what is wrong lies along the boundary",
}
"""Failure mode → its rule, in the order in which they are tried: the first that holds is the mode."""


@dataclass(frozen=True)
class Verdict:
    """What became of one class of one case."""

    mode: str  # of MODES
    detail: str = ""  # the figure that decided, in words

    @property
    def failed(self) -> bool:
        return self.mode != "boundary only"

    def __str__(self) -> str:
        return f"{self.mode}: {self.detail}" if self.detail else self.mode


def save_case_overlays(
    folder: Path,
    results: dict,
    dataset: Dataset,
    masks: Path,
    window: Window,
    axis: Axis = "axial",
    seed: int | None = None,
) -> None:
    """Draws the cases of `results` into `folder`, and says in it what went wrong in each.

    results: JSON of `evaluate`; masks: the folder of its saved masks, named as the labels; seed: of the evaluation,
    without which prompts that were drawn at random are not shown. The best, median and worst case become large PNGs on
    the slice with most of the truth (cases.json); the PICTURED worst become thumbnails on the slice that costs them
    most Dice; the failure mode of every class of every case is in failures.json, worst case first.
    """
    cases = {case.id: case for case in dataset.cases}  # of an id on both sides, the test case, which comes later
    px = (results.get(f"{name}_px", 0.0) for name in ("box_margin", "point_jitter", "box_jitter"))
    prompting = read_prompting(results["prompts"], *px)
    roles = pick_cases(results)
    said, failures = {}, []
    for place, (id_, _) in enumerate(rank_cases(results)):
        loaded = load_case(cases[id_], dataset, window, axis)
        truth: np.ndarray = loaded.label  # pyright: ignore[reportAssignmentType]
        prediction = to_slices(read_label(masks / cases[id_].mask_name, loaded.volume), axis)
        if loaded.ignore is not None:
            prediction = np.where(loaded.ignore, 0, prediction)
        spacing = in_plane_spacing(loaded.volume, axis)
        verdicts = judge(prediction, truth, dataset.scored)
        failures.append({"id": id_, "classes": {name: asdict(verdict) for name, verdict in verdicts.items()}})
        if place < PICTURED:
            n = costliest_slice(prediction, truth)
            rng = None if seed is None else np.random.default_rng(derive_seed(seed, "prompts", id_))
            given = prompts_given(n, truth, prompting, rng)
            picture = Path("thumbnails") / f"{place + 1:03}.webp"
            drawn = thumbnail(loaded.image[n], truth[n], prediction[n], dataset.labels, spacing, given)
            _write_bytes(drawn, folder / picture)
            names = [name for name, number in dataset.labels.items() if number in given]
            failures[-1] |= {"picture": picture.as_posix(), "slice": n, "given": names}
        for role in (role for role, (picked, _) in roles.items() if picked == id_):
            n = telling_slice(truth, prediction)
            overlays = case_overlays(loaded.image[n], truth[n], prediction[n], dataset.labels, spacing)
            _write_bytes(overlays, folder / f"{role}.png")
            said[role] = {"id": id_, "dice": roles[role][1], "slice": n}
    write_json(said, folder / "cases.json")
    write_json({"labels": list(dataset.labels), "cases": failures}, folder / "failures.json")


def _write_bytes(content: bytes, path: Path) -> None:
    with whole_or_nothing(path) as unfinished:
        unfinished.write_bytes(content)


# --- cases, by how they went -----------------------------------------------------------------------------------------


def rank_cases(results: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """(case id, mean Dice over its classes) of the JSON of `evaluate`, worst first.

    Undefined scores do not count; cases without any other come last, with None. Equal ones keep their order.
    """
    dice: dict[str, list[float]] = {}
    for row in results["cases"]:
        dice.setdefault(row["id"], [])
        if row["dice"] is not None:
            dice[row["id"]].append(row["dice"])
    means = {id_: float(np.mean(scores)) if scores else None for id_, scores in dice.items()}
    return sorted(means.items(), key=lambda item: np.inf if item[1] is None else item[1])


def pick_cases(results: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Role → (case id, mean Dice over its classes) of the best, the median and the worst case.

    Cases without a defined score do not count. Of an even number the median is the lower of the middle two; two cases
    are the best and the worst, a single one is the best.
    """
    ranked = [(id_, dice) for id_, dice in rank_cases(results) if dice is not None]
    n = len(ranked)
    picked = {"best": n - 1, "median": (n - 1) // 2, "worst": 0}
    wanted = ROLES if n > 2 else ("best", "worst")[:n]
    return {role: ranked[picked[role]] for role in wanted}


# --- what went wrong -------------------------------------------------------------------------------------------------


def judge(prediction: np.ndarray, truth: np.ndarray, classes: Mapping[str, Label]) -> dict[str, Verdict]:
    """Class → the failure mode of MODES that describes it, of a case's label maps (N, H, W).

    classes: name → number, or the numbers that a region joins. A class that neither has is left out.
    """
    pairs = label_pairs(prediction, truth, classes, (1.0,) * truth.ndim)
    called = prediction > 0
    size = 1 + max((int(label_map.max(initial=0)) for label_map in (prediction, truth)), default=0)
    places = prediction[called].astype(np.int64) * size + truth[called]
    confusion = np.bincount(places, minlength=size * size).reshape(size, size)  # [predicted, true] voxels
    return {
        name: _judge(pair, *_most_confused(name, classes, confusion))
        for name, pair in pairs.items()
        if pair.prediction.any() or pair.truth.any()
    }


def _judge(pair: MaskPair, other: str, share: float) -> Verdict:
    """`share` of the prediction lies on the truth of the class `other`."""
    predicted, true = np.count_nonzero(pair.prediction), np.count_nonzero(pair.truth)
    if not predicted:
        return Verdict("missed")
    if share > SWAPPED_SHARE:
        return Verdict("swapped", f"{_percent(share)} on {other}")
    if not true:
        return Verdict("invented")
    error, stray = predicted / true - 1, _stray_share(pair)
    if error > TOO_LARGE:
        return Verdict("leaked", f"{_percent(error)} too large")
    if stray > STRAY_SHARE:
        return Verdict("leaked", f"{_percent(stray)} apart")
    found = np.count_nonzero(pair.prediction & pair.truth) / true
    if found < FOUND_SHARE:
        return Verdict("cut short", f"{_percent(found)} found")
    return Verdict("boundary only")


def _most_confused(name: str, classes: Mapping[str, Label], confusion: np.ndarray) -> tuple[str, float]:
    """The other class on whose truth most of the class's prediction lies, and that share; overlapping regions are none.

    confusion: [predicted, true] voxels.
    """
    numbers = {key: set(label) if isinstance(label, tuple) else {label} for key, label in classes.items()}
    held = {key: [k for k in some if k < len(confusion)] for key, some in numbers.items()}
    lies_on = confusion[held[name]].sum(axis=0)  # true class → voxels
    shares = {
        key: float(lies_on[held[key]].sum() / max(1, lies_on.sum()))
        for key, some in numbers.items()
        if not some & numbers[name]
    }
    return max(shares.items(), key=lambda item: item[1], default=("", 0.0))


def _stray_share(pair: MaskPair) -> float:
    """Of the prediction, what is in pieces (connected by faces, across slices too) that hold nothing of the truth."""
    pieces: np.ndarray = ndimage.label(pair.prediction)[0]  # type: ignore[index]
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    total = sizes.sum()
    sizes[np.unique(pieces[pair.truth])] = 0
    return float(sizes.sum() / total)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# --- where to look, and what was given there -------------------------------------------------------------------------


def costliest_slice(prediction: np.ndarray, truth: np.ndarray) -> int:
    """The slice of (N, H, W) that costs the case most Dice; where nothing is wrong, the one with most of the truth.

    1 − Dice of a class is its wrong voxels over the sum of both volumes. So each voxel costs what it takes from the
    class it was called and from the class it is.
    """
    wrong = prediction != truth
    if not wrong.any():
        return telling_slice(truth, prediction)
    highest = int(max(prediction.max(), truth.max()))
    volumes = sum(np.bincount(label_map.ravel(), minlength=highest + 1) for label_map in (prediction, truth))
    price = 1 / np.maximum(volumes, 1)
    price[0] = 0
    return int(((price[prediction] + price[truth]) * wrong).sum(axis=(1, 2)).argmax())


def prompts_given(
    number: int, truth: np.ndarray, prompting: Prompting, rng: np.random.Generator | None
) -> dict[int, tuple[float, ...]]:
    """What the model was given on slice `number` of a case: label number → (x, y), or (x0, y0, x1, y1), in px.

    Drawn again from the truth (N, H, W) in the order in which `prediction.segment_draws` draws, so with `rng` as the
    evaluation had it; without it, where draws differ, nothing is known. Of several clicks only the first is, since the
    others answer the model, and with jitter none.
    """
    answers_model = prompting.kind == "clicks" and prompting.point_jitter_px > 0
    if not prompting.from_truth or answers_model or (prompting.varies and rng is None):
        return {}
    rng = rng or np.random.default_rng()  # of which nothing is drawn
    if prompting.kind == "one-click":
        return _only_clicks(truth, prompting.point_jitter_px, rng).get(number, {})
    if prompting.varies:
        for before in truth[:number]:
            _draw(before, prompting, rng)
    return _draw(truth[number], prompting, rng)


def _draw(truth: np.ndarray, prompting: Prompting, rng: np.random.Generator) -> dict[int, tuple[float, ...]]:
    """Class → prompt on one slice (H, W)."""
    classes = _numbers(truth)
    if not classes:
        return {}
    masks = truth == np.array(classes)[:, None, None]  # (P, H, W)
    if prompting.kind == "clicks":
        clicks = SimulatedUser(masks, rng).clicks
        return {k: (x, y) for k, [(x, y, _)] in zip(classes, clicks, strict=True)}
    own = Frame(*truth.shape, size=max(truth.shape))  # the slice's own pixels
    px = (prompting.box_margin_px, prompting.point_jitter_px, prompting.box_jitter_px)
    drawn = oracle_prompts(prompting.kind, masks, own, rng, *px)
    places = drawn.boxes_xyxy if drawn.points_xy is None else drawn.points_xy[:, :, 0]  # (1, P, 4) or (1, P, 2)
    return {k: tuple(place) for k, place in zip(classes, places[0].tolist(), strict=True)}  # type: ignore[index]


def _only_clicks(truth: np.ndarray, jitter_px: float, rng: np.random.Generator) -> dict[int, dict]:
    """Slice → class → the volume's one click on it (`prediction.carry_click`)."""
    clicks: dict[int, dict] = {}
    for k in _numbers(truth):
        n = int((truth == k).sum(axis=(1, 2)).argmax())
        clicks.setdefault(n, {})[k] = jitter_point(furthest_point(truth[n] == k), truth.shape[1:], jitter_px, rng)
    return clicks


def _numbers(truth: np.ndarray) -> list[int]:
    return [int(value) for value in np.unique(truth) if value]
