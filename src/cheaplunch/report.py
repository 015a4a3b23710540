"""A run as one page: report.html, which needs nothing but itself."""

from __future__ import annotations

import base64
import csv
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from cheaplunch.config import RunConfig, as_values, settings
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import Dataset
from cheaplunch.data.slices import Axis, Window, in_plane_spacing, to_slices
from cheaplunch.data.volume import read_label
from cheaplunch.errors import UserError
from cheaplunch.evaluation.tables import describe_prompts
from cheaplunch.figures import case_overlays, telling_slice, training_curves
from cheaplunch.files import whole_or_nothing, write_json, write_text
from cheaplunch.runs import RunFolder

ROLES = ("best", "median", "worst")

_PROTOCOLS = {
    "strict": "whole volumes, HD95 as the larger of the two directed percentiles; a missed or invented structure "
    "scores Dice 0 and the image's diagonal, one absent from both is left out and counted",
    "paper": "as TransUNet and SAMed score: HD95 in voxels, pooled; a missed structure scores HD95 0, an invented "
    "one Dice 1",
}
_CONTAMINATION = (
    "The pretrained weights were trained on public data that may include this test set. So compare with the same "
    "weights untuned (zero-shot), not with zero."
)
_BOXES_ONLY = (
    "LiteMedSAM's weights were trained with boxes only: without fine-tuning a point means next to nothing to them, "
    "so zero-shot with points is near 0. With --prompts box they are a far stronger start."
)
_FILLED = (
    "No training slice was free of foreground: the background slices of the synthesis were made by filling the "
    "foreground in from its surroundings."
)


@dataclass(frozen=True)
class Shown:
    """A case drawn as overlays."""

    role: str  # of ROLES
    id: str
    dice: float  # mean over classes
    slice_number: int
    picture: str  # data URI


@dataclass(frozen=True)
class Evaluation:
    """A folder of RUN/evaluations: results of one protocol and unit, and the cases drawn."""

    name: str
    results: dict[str, dict]  # "fine-tuned" and perhaps "zero-shot" → JSON of DESIGN §1
    shown: tuple[Shown, ...]

    @property
    def tuned(self) -> dict:
        return self.results["fine-tuned"]

    @property
    def rule(self) -> str:
        return _PROTOCOLS.get(self.tuned["protocol"], "")

    @property
    def prompts(self) -> dict[str, str]:
        """What the prompts were, in words, for each of the results."""
        return {name: describe_prompts(r["prompts"], r["oracle_prompts"]) for name, r in self.results.items()}

    def counts(self, class_: str) -> str:
        """Cases with a score of the class, and those without; twice, as the columns go, where these differ."""
        figures = [result["classes"].get(class_, {"n": 0}) for result in self.results.values()]
        undefined = [f" ({f['n_undefined']} undefined)" if f.get("n_undefined") else "" for f in figures]
        return " / ".join(dict.fromkeys(f"{f['n']}{u}" for f, u in zip(figures, undefined, strict=True)))

    def dice_of(self, column: str) -> dict[tuple[str, str], float | None]:
        """(case id, class) → Dice."""
        return {(row["id"], row["class"]): row["dice"] for row in self.results[column]["cases"]}


def write_report(run: RunFolder) -> Path:
    """Renders RUN/report.html from what lies in the run's folder; whole or not at all.

    What is not there yet (evaluations, curves, the sheet) is left out and the next command is given instead.
    Raises UserError where the folder is no run or a file in it is damaged.
    """
    config = run.load_config()
    environment = _read_json(run.environment) if run.environment.is_file() else {}
    evaluations = _read_evaluations(run.evaluations)
    records = _read_records(run.metrics)
    jinja = Environment(
        loader=PackageLoader("cheaplunch"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["figure"] = _figure
    page = jinja.get_template("report.html.j2").render(
        config=config,
        dataset=environment.get("dataset") or config.data.data.resolve().name,
        unfinished=config.model.tuning != "none" and not run.finished(),
        steps_done=records[-1]["step"] if records else 0,
        evaluations=evaluations,
        notes=_notes(config, environment, evaluations),
        exemplars=_read_table(run.exemplars),
        sheet=_data_uri(run.preview.read_bytes()) if run.preview.is_file() else None,
        curves=training_curves(records) if records else {},
        settings=_describe_settings(config),
        environment=list(_flatten({key: value for key, value in environment.items() if key != "notes"})),
        evaluate=shlex.join(
            ["cheaplunch", "evaluate", str(run.root), "--data", str(config.data.data), "--out", "results.json"]
        ),
    )
    write_text(page, run.report)
    return run.report


def save_case_overlays(
    folder: Path, results: dict, dataset: Dataset, masks: Path, window: Window, axis: Axis = "axial"
) -> None:
    """Draws the best, median and worst case of `results` into `folder`, as PNGs, and says in cases.json which.

    results: JSON of `evaluate`; masks: the folder of its saved masks, named as the labels. Each case is drawn on
    the slice that shows most of the truth.
    """
    cases = {case.id: case for case in dataset.cases}  # of an id on both sides, the test case, which comes later
    folder.mkdir(parents=True, exist_ok=True)
    said = {}
    for role, (id_, dice) in pick_cases(results).items():
        loaded = load_case(cases[id_], dataset, window, axis)
        truth: np.ndarray = loaded.label  # pyright: ignore[reportAssignmentType]
        mask = masks / cases[id_].mask_name
        prediction = to_slices(read_label(mask, loaded.volume), axis)
        n = telling_slice(truth, prediction)
        spacing = in_plane_spacing(loaded.volume, axis)
        picture = case_overlays(loaded.image[n], truth[n], prediction[n], dataset.labels, spacing)
        with whole_or_nothing(folder / f"{role}.png") as unfinished:
            unfinished.write_bytes(picture)
        said[role] = {"id": id_, "dice": dice, "slice": n}
    write_json(said, folder / "cases.json")


def pick_cases(results: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Role → (case id, mean Dice over its classes) of the best, the median and the worst case.

    Undefined scores do not count, nor does a case without any other. Of an even number the median is the lower of
    the middle two; two cases are the best and the worst, a single one is the best.
    """
    dice: dict[str, list[float]] = {}
    for row in results["cases"]:
        if row["dice"] is not None:
            dice.setdefault(row["id"], []).append(row["dice"])
    ranked = sorted(((id_, float(np.mean(scores))) for id_, scores in dice.items()), key=lambda item: -item[1])
    n = len(ranked)
    picked = {"best": 0, "median": n // 2, "worst": n - 1}
    wanted = ROLES if n > 2 else ("best", "worst")[:n]
    return {role: ranked[picked[role]] for role in wanted}


def _read_evaluations(folder: Path) -> list[Evaluation]:
    found = sorted(path.parent for path in folder.glob("*/fine-tuned.json"))
    return [_read_evaluation(path) for path in found]


def _read_evaluation(folder: Path) -> Evaluation:
    results = {
        name: _read_json(path) for name in ("fine-tuned", "zero-shot") if (path := folder / f"{name}.json").is_file()
    }
    if len({(result["protocol"], result["unit"]) for result in results.values()}) > 1:
        raise UserError(f"{folder}: its results are of different protocols; evaluate both with the same --protocol")
    said = _read_json(path) if (path := folder / "cases.json").is_file() else {}
    shown = tuple(
        Shown(role, case["id"], case["dice"], case["slice"], _data_uri((folder / f"{role}.png").read_bytes()))
        for role in ROLES
        if (case := said.get(role)) and (folder / f"{role}.png").is_file()
    )
    return Evaluation(folder.name, results, shown)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); write it again") from error


def _read_records(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); take the broken line out") from error


def _read_table(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _notes(config: RunConfig, environment: Mapping, evaluations: list[Evaluation]) -> list[str]:
    """What a reader must know to take the figures for what they are."""
    points = any("point" in words for evaluation in evaluations for words in evaluation.prompts.values())
    return [
        _CONTAMINATION,
        *([_BOXES_ONLY] if points and config.model.backbone == "lite-medsam" else []),
        *([_FILLED] if environment.get("backgrounds_filled") else []),
        *environment.get("notes", []),
    ]


def _describe_settings(config: RunConfig) -> list[tuple[str, Any, str]]:
    """(name, value, what it means) of every setting."""
    meaning = {"method": "the named values that the settings start from"}
    meaning |= {name: item.metadata["help"] for name, (_, item) in settings().items()}
    return [(name, value, meaning[name]) for name, value in as_values(config).items()]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every leaf of nested dicts, names joined by a space."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{name} {key}".strip().replace("_", " "))


def _figure(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
