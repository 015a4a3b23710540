"""Evaluations as `evaluate` wrote them: read, named, and several of one row made one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cheaplunch.errors import UserError
from cheaplunch.evaluation.statistics import interval, sum_by_patient

METRICS = {"dice": "Dice", "hd95": "HD95", "iou": "IoU", "nsd": "NSD", "asd": "ASD"}  # and what they are called
LENGTHS = frozenset({"hd95", "asd"})  # have a unit, and less is better


@dataclass(frozen=True)
class Run:
    """An evaluation's JSON (contract: DESIGN §1) and what its row is called."""

    name: str
    source: str  # the file, for messages
    result: Mapping[str, Any]

    @property
    def dataset(self) -> str | None:
        return self.result.get("dataset")

    @property
    def case_ids(self) -> frozenset[str]:
        return frozenset(row["id"] for row in self.result["cases"])


def read_runs(words: Sequence[str]) -> list[Run]:
    """`FILE.json` or `NAME=FILE.json` each → Run, named by method, backbone and exemplars where not given.

    `NAME=FILE.json,FILE.json,…` is one row: runs that differ by their seed, and their mean (`mean_of_runs`).
    Raises UserError for a file that is missing or no evaluation, and for two rows of one name.
    """
    runs = []
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or Path(word).is_file():
            name, path = "", word
        paths = [path] if Path(path).is_file() else path.split(",")
        if len(set(paths)) < len(paths):
            raise UserError(f"{word}: a file is there twice, and a row is the mean of different runs; leave one")
        results = {path: _read_evaluation(Path(path)) for path in paths}
        result = mean_of_runs(results) if len(results) > 1 else results[path]
        runs.append(Run(name or _default_name(result), path, result))
    runs = [replace(run, name=f"{run.name} ({Path(run.source).stem})") if _twice(run, runs) else run for run in runs]
    for run in runs:
        if _twice(run, runs):
            raise UserError(f"two rows are called {run.name}; name them apart: NAME=FILE.json")
    return runs


def mean_of_runs(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One evaluation of several of the same cases (file → JSON): every figure is their mean, undefined ones left out.

    "spread" is the standard deviation over the runs of each mean figure; "runs" their number. Raises UserError naming
    the files that are not of the same cases, classes, protocol and prompts.
    """
    (name, first), *others = results.items()
    places = [(row["id"], row["class"]) for row in first["cases"]]
    for other, result in others:
        if [(row["id"], row["class"]) for row in result["cases"]] != places:
            raise UserError(f"{name} and {other} are of other cases or classes: no mean can be taken of them")
        for said in ("protocol", "prompts", "unit", "nsd_tolerance"):
            if result.get(said) != first.get(said):
                raise UserError(f"{name} and {other} differ in {said}: no mean can be taken of them")
    runs = list(results.values())
    cases = [{**rows[0], **_mean_figures(rows)} for rows in zip(*(result["cases"] for result in runs), strict=True)]
    means = {key: [run["mean"][key] for run in runs if run["mean"].get(key) is not None] for key in METRICS}
    sums = sum_by_patient((row.get("patient", row["id"]), row["class"], row.get("dice")) for row in cases)
    return {
        **first,
        "classes": {
            k: {**first["classes"][k], **_mean_figures([run["classes"][k] for run in runs])} for k in first["classes"]
        },
        "mean": {**first["mean"], **_mean_figures([run["mean"] for run in runs])},
        "ci95": {"dice": interval(sums, np.random.default_rng(0), within=(0.0, 1.0))},
        "spread": {key: float(np.std(values, ddof=1)) for key, values in means.items() if len(values) > 1},
        "runs": len(runs),
        "cases": cases,
    }


def _mean_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of each metric that the rows have, the mean of what is defined."""
    figures = {}
    for key in (key for key in METRICS if key in rows[0]):
        defined = [row[key] for row in rows if row.get(key) is not None]
        figures[key] = float(np.mean(defined)) if defined else None
    return figures


def _twice(run: Run, runs: Sequence[Run]) -> bool:
    """Whether another row under the same protocol and prompts has the run's name."""

    def place(run: Run) -> tuple:
        return run.name, run.result["protocol"], run.result["prompts"]

    return [place(other) for other in runs].count(place(run)) > 1


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the --out of `cheaplunch evaluate`") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON; give the --out of `cheaplunch evaluate`") from error
    shape = {"protocol": str, "prompts": str, "unit": str, "classes": dict, "mean": dict, "cases": list}
    whole = isinstance(result, dict)
    lacking = [key for key, kind in shape.items() if not (whole and isinstance(result.get(key), kind))]
    if not lacking:
        figures, rows = result["classes"].values(), result["cases"]
        if not figures or not all(isinstance(row, dict) for row in figures):
            lacking.append("classes")
        if not rows or not all(isinstance(row, dict) and {"id", "class"} <= row.keys() for row in rows):
            lacking.append("cases")
    if lacking:
        said = f"it lacks {', '.join(lacking)}"
        raise UserError(f"{path} is no evaluation: {said}; give the --out of `cheaplunch evaluate`")
    return result


def _default_name(result: Mapping[str, Any]) -> str:
    exemplars = result.get("exemplars")
    said = [result.get("method"), result.get("backbone"), exemplars and f"{exemplars} exemplars"]
    return ", ".join(str(word) for word in said if word and word != "none")  # another tool's masks have no backbone
