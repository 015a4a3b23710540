"""A model, or masks from anywhere, over the test cases: predict, write the masks, score them by protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cheaplunch import processes
from cheaplunch.config import RunConfig, check_prompting
from cheaplunch.data.cases import load_case, read_checked
from cheaplunch.data.layouts import Case, Dataset, open_dataset
from cheaplunch.data.slices import Window, from_slices
from cheaplunch.data.subset import take_classes
from cheaplunch.data.volume import SUFFIXES, Volume, read_label, write_mask
from cheaplunch.errors import UserError
from cheaplunch.evaluation.protocols import Score, find_protocol, score_labels
from cheaplunch.evaluation.tables import CaseScore, summarise
from cheaplunch.material import pick_window
from cheaplunch.models.segmenter import Segmenter
from cheaplunch.models.text import TextBank
from cheaplunch.prediction import Predictor, segment_draws
from cheaplunch.prompting import Prompting
from cheaplunch.runtime import Precision
from cheaplunch.synthesis import derive_seed

Progress = Callable[[int, int], None]
"""Is told (cases done, of how many) of this process."""


@dataclass(frozen=True)
class Assessment:
    """How a model is put to the test."""

    data: Path
    prompting: Prompting = Prompting()
    protocols: tuple[str, ...] = ("strict",)
    """All are of the same predictions."""
    draws: int = 1
    """Of the prompts; the figures are the mean over them."""
    nsd_tolerance: float = 2.0
    """mm under `strict`, voxels under `paper`."""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Answer:
    """A case with what is to be scored of it, all in the order of `Volume.array`."""

    volume: Volume
    truth: np.ndarray
    """(Z, Y, X) label numbers, the dataset's `ignore` among them."""
    labels: list[dict[int, np.ndarray]]
    """For each draw, clicks given → label map (Z, Y, X)."""
    probabilities: list[dict[int, np.ndarray]]
    """For each draw, label number → (Z, Y, X) in 0..1 of what the last click gave; empty where none was kept."""


@dataclass(frozen=True)
class _Row:
    """A score, and of what."""

    protocol: str
    draw: int
    clicks: int
    case: CaseScore


def open_for_scoring(config: RunConfig, assessment: Assessment) -> tuple[Dataset, Window]:
    """The data to be tested on, seen through the run's window."""
    dataset = take_classes(open_dataset(assessment.data), config.data.classes)
    return dataset, pick_window(config, dataset)


def zero_shot_of(config: RunConfig) -> RunConfig:
    """The same network, weights, input size and window as `config`'s, with nothing trained."""
    return replace(config, method="zero-shot", model=replace(config.model, tuning="none"))


def output_numbers(config: RunConfig, dataset: Dataset) -> list[int]:
    """The labels of `dataset` that a network of classes answers with, in the order of its outputs.

    Raises UserError where the two do not have the same classes.
    """
    names = config.model.class_names or ()
    if set(names) != set(dataset.labels):
        raise UserError(
            f"--data {dataset.root} has the classes {', '.join(dataset.labels)}, but the network answers with "
            f"{', '.join(names)}; give data with these"
        )
    return [dataset.labels[name] for name in names]


def assess(
    segmenter: Segmenter,
    config: RunConfig,
    assessment: Assessment,
    precision: Precision,
    masks: Path,
    progress: Progress | None = None,
    texts: TextBank | None = None,
) -> dict[str, dict]:
    """Predicts every labelled test case into `masks`; protocol → the JSON of DESIGN §1.

    Scores are of the merged label maps as written; of several draws of prompts the first is. A network that is asked by
    texts is asked by those of `texts` that were held out, in each draw by others. UserError where the
    network cannot be asked as `assessment` wants. Under `accelerate launch`
    or `torchrun` the processes share the cases and each returns the whole.
    """
    check_prompting(config.model, assessment.prompting)
    dataset, window = open_for_scoring(config, assessment)
    predictor = Predictor(segmenter, precision, config.model.smooth_mm)
    axis = config.data.axis
    numbers = output_numbers(config, dataset) if assessment.prompting.kind == "auto" else []
    wordings = texts.phrasings.tests(dataset.labels, assessment.draws) if texts else []  # one a draw
    asked = [texts.ask({dataset.labels[k]: text for k, text in own.items()}) for own in wordings] if texts else []
    needed = any(find_protocol(name).needs_probabilities for name in assessment.protocols)
    keep = list(dataset.labels.values()) if needed else []

    def predict(case: Case) -> Answer:
        loaded = load_case(case, dataset, window, axis)
        rngs = [np.random.default_rng(_prompt_seed(assessment, case, draw)) for draw in range(assessment.draws)]
        drawn = segment_draws(predictor, loaded, assessment.prompting, rngs, keep, numbers, asked)
        masks.mkdir(parents=True, exist_ok=True)
        write_mask(from_slices(drawn[0].label, axis), loaded.volume, masks / case.mask_name)
        truth: np.ndarray = loaded.label  # pyright: ignore[reportAssignmentType]
        if loaded.ignore is not None and dataset.ignore is not None:
            truth = np.where(loaded.ignore, dataset.ignore, truth)
        return Answer(
            loaded.volume,
            from_slices(truth, axis),
            [{clicks: from_slices(label, axis) for clicks, label in one.labels.items()} for one in drawn],
            [{k: from_slices(p, axis) for k, p in zip(keep, one.probabilities, strict=True)} for one in drawn],
        )

    about: dict[str, Any] = {"backbone": config.model.backbone, "method": config.method}
    if config.model.tuning != "none" and config.data.exemplar_file is None:
        about["exemplars"] = config.data.exemplars
    about["smooth_mm"] = config.model.smooth_mm
    if config.model.mask != "single":
        about["mask"] = config.model.mask
    if texts is not None:
        about["texts"] = {name: [own[name] for own in wordings] for name in dataset.labels}
        about["texts_held_out"] = {name: bool(texts.phrasings.held_out.get(name)) for name in dataset.labels}
    return _score(dataset, assessment, predict, about, predictor.device.type == "cpu", progress)


def assess_predictions(
    folder: Path, name: str, assessment: Assessment, progress: Progress | None = None
) -> dict[str, dict]:
    """Masks that another tool, called `name`, made of the labelled test cases: protocol → the JSON of DESIGN §1.

    Each is found by `find_mask`; the segments of a DICOM SEG are known by their names, of other files by their numbers.
    UserError names the file that is missing, lies on another grid than its image, or holds what is no class.
    """
    if not folder.is_dir():
        raise UserError(f"--predictions {folder}: no such folder; give the one with a mask for each test case")
    dataset = open_dataset(assessment.data)

    def read(case: Case) -> Answer:
        volume, truth = read_checked(case, dataset, "axial")
        path = find_mask(folder, case)
        label = read_label(path, volume, dataset.labels)
        unknown = sorted(set(np.unique(label).tolist()) - {0, *dataset.labels.values()})
        if unknown:
            raise UserError(f"{path} has values {unknown} that are no class of --data {assessment.data}; renumber them")
        return Answer(volume, truth, [{assessment.prompting.clicks: label}], [{}])  # pyright: ignore[reportArgumentType]

    return _score(dataset, assessment, read, {"backbone": "none", "method": name}, True, progress)


def find_mask(folder: Path, case: Case) -> Path:
    """The one file in `folder` that is named as the case, with any ending that is read.

    `predict` keeps the folders of a DICOM tree, which the names of cases join: A/CT.dcm is the mask of A_CT.
    """
    names = dict.fromkeys([case.mask_name, *(case.id + suffix for suffix in SUFFIXES)])
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        below = sorted(folder.rglob("*"))
        found = [p for p in below if p.relative_to(folder).as_posix().replace("/", "_") in names and p.is_file()]
    if not found:
        raise UserError(f"{folder / case.mask_name} is missing: there is no mask of test case {case.id}")
    if len(found) > 1:
        both = " and ".join(path.relative_to(folder).as_posix() for path in found[:2])
        raise UserError(f"{folder} has {both} for one case; leave one")
    return found[0]


def _score(
    dataset: Dataset,
    assessment: Assessment,
    answer: Callable[[Case], Answer],
    about: Mapping[str, Any],
    on_cpu: bool,
    progress: Progress | None,
) -> dict[str, dict]:
    """Asks for every labelled test case, shared among the processes, and scores it under each protocol."""
    cases = [case for case in dataset.split("test") if case.label is not None]
    if not cases:
        raise UserError(f"--data {assessment.data} has no labelled test case; add imagesTs and labelsTs")
    group = processes.join(on_cpu)
    mine = cases[group.process_index :: group.num_processes]
    rows: list[_Row] = []
    unit = "mm"
    for done, case in enumerate(mine, start=1):
        answered = answer(case)
        unit = answered.volume.unit
        rows += _rows(case, dataset, answered, assessment)
        if progress is not None:
            progress(done, len(mine))
    place = {case.id: number for number, case in enumerate(cases)}
    rows = sorted(processes.gather(rows, on_cpu), key=lambda row: place[row.case.case_id])
    said = {
        "backbone": about["backbone"],
        "method": about["method"],
        "prompts": str(assessment.prompting),
        "oracle_prompts": assessment.prompting.from_truth,
        "present_classes_only": assessment.prompting.tells_presence,
        "unit": unit,
        "nsd_tolerance": assessment.nsd_tolerance,
        "patients": {case.id: case.patient for case in cases},
    }
    more = {"dataset": dataset.name, **{name: value for name, value in about.items() if name not in said}}
    return {
        protocol: _summary([row for row in rows if row.protocol == protocol], protocol, assessment, said) | more
        for protocol in assessment.protocols
    }


def _rows(case: Case, dataset: Dataset, answered: Answer, assessment: Assessment) -> list[_Row]:
    """Every class of a case under every protocol, in every draw, after each number of clicks."""
    rows = []
    for draw, (labels, probabilities) in enumerate(zip(answered.labels, answered.probabilities, strict=True)):
        for protocol in assessment.protocols:
            needed = find_protocol(protocol).needs_probabilities
            for clicks, label in labels.items():
                if needed and clicks < max(labels):
                    continue  # only the last ones are kept
                scores = score_labels(
                    label,
                    answered.truth,
                    dataset.scored,
                    answered.volume.spacing,
                    protocol=protocol,
                    nsd_tolerance=assessment.nsd_tolerance,
                    ignore=dataset.ignore,
                    probabilities=_of_scored(probabilities, dataset) if needed and probabilities else None,
                )
                rows += [_Row(protocol, draw, clicks, CaseScore(case.id, name, s)) for name, s in scores.items()]
    return rows


def _of_scored(probabilities: Mapping[int, np.ndarray], dataset: Dataset) -> dict[str, np.ndarray]:
    """Class or region → (Z, Y, X); a region is as likely as the likeliest of its labels."""
    members = {name: label if isinstance(label, tuple) else (label,) for name, label in dataset.scored.items()}
    return {name: np.maximum.reduce([probabilities[k] for k in some]) for name, some in members.items()}


def _summary(rows: Sequence[_Row], protocol: str, assessment: Assessment, said: Mapping[str, Any]) -> dict:
    """The JSON of one protocol: the mean over draws, after the last click; with spread, and Dice by clicks."""
    prompting = assessment.prompting

    def figures(some: Sequence[_Row]) -> dict:
        rng = np.random.default_rng(derive_seed(assessment.seed, "bootstrap"))
        return summarise(_over_draws(some), protocol=protocol, rng=rng, **said)

    final = [row for row in rows if row.clicks == prompting.clicks]
    result = figures(final)
    result |= {name: value for name, value in asdict(prompting).items() if name.endswith("_px") and value}
    if prompting.clicks > 1:
        result["mask_prompt"] = prompting.mask_prompt
    if assessment.draws > 1:
        means = [figures([row for row in final if row.draw == draw])["mean"] for draw in range(assessment.draws)]
        dice = [mean["dice"] for mean in means if mean["dice"] is not None]
        result["draws"] = means
        result["spread"] = {"dice": float(np.std(dice, ddof=1)) if len(dice) > 1 else None}
    if prompting.kind == "clicks":
        result["by_clicks"] = {
            str(clicks): figures([row for row in rows if row.clicks == clicks])["mean"]["dice"]
            for clicks in sorted({row.clicks for row in rows})
        }
    return result


def _over_draws(rows: Sequence[_Row]) -> list[CaseScore]:
    """Each case's and class's mean over draws; a figure that is undefined in some draws is the mean of the others."""
    drawn: dict[tuple[str, str], list[Score]] = {}
    for row in rows:
        drawn.setdefault((row.case.case_id, row.case.class_name), []).append(row.case.score)
    return [CaseScore(*key, _mean_score(scores)) for key, scores in drawn.items()]


def _mean_score(scores: Sequence[Score]) -> Score:
    if len(scores) == 1:
        return scores[0]
    figures = {}
    for name in asdict(scores[0]):
        defined = [value for score in scores if (value := getattr(score, name)) is not None]
        figures[name] = float(np.mean(defined)) if defined else None
    return Score(**figures)


def _prompt_seed(assessment: Assessment, case: Case, draw: int) -> int:
    """The first draw does not depend on how many there are."""
    return derive_seed(assessment.seed, "prompts", case.id, *([draw] if draw else []))
