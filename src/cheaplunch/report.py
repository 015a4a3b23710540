"""A run as one page: report.html, which needs nothing but itself."""

from __future__ import annotations

import base64
import csv
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.colors import to_hex

from cheaplunch.config import RunConfig, as_values, settings
from cheaplunch.errors import UserError
from cheaplunch.evaluation.protocols import PROTOCOLS
from cheaplunch.evaluation.tables import describe_prompts
from cheaplunch.figures import class_colours, training_curves
from cheaplunch.files import write_text
from cheaplunch.models.baselines import BASELINES
from cheaplunch.pages import render
from cheaplunch.report_cases import MODES, ROLES, Verdict, rank_cases
from cheaplunch.runs import RunFolder, read_json

FOLDED_CLASSES = 6  # of a picture's scores, more are folded away

_RULES = {
    "strict": "whole volumes, HD95 as the larger of the two directed percentiles; a missed or invented structure "
    "scores Dice 0 and the image's diagonal, one absent from both is left out and counted",
    "paper": "as TransUNet and SAMed score: HD95 in voxels, pooled; a missed structure scores HD95 0, an invented "
    "one Dice 1",
    "msa": "as Medical SAM Adapter scores: slice by slice, the mean over five thresholds of the probability; a slice "
    "where a structure is neither present nor predicted scores 1",
    "nnunet": "as nnU-Net scores: Dice and IoU of whole volumes; a missed or invented structure scores 0, one absent "
    "from both is left out and counted",
    "brats": "as the BraTS challenge scored: a missed or invented structure scores Dice 0 and 373.13 mm, one absent "
    "from both Dice 1 and 0 mm",
}
_INTERVALS = {
    "studentised": "a studentised bootstrap (of fewer than four patients Student's t)",
    "percentile": "a percentile bootstrap",
}
_FIGURES: dict[str, tuple[str, int | None]] = {
    "dice": ("Dice", 3),
    "hd95": ("HD95", 1),
    "iou": ("IoU", 3),
    "nsd": ("NSD", 3),
    "asd": ("mean distance", 2),
    "volume_error": ("volume error", None),
}
"""Figure in the JSON of `evaluate` → heading, to which lengths add their unit, and digits; None: a percentage."""
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
class ClassOfCase:
    name: str
    dice: float | None
    verdict: Verdict | None  # None where there was nothing to find, or where it is not known

    @property
    def rank(self) -> float:
        """To sort by, worst first, undefined last."""
        return 2.0 if self.dice is None else self.dice


@dataclass(frozen=True)
class CaseView:
    """A case as the page lists it."""

    id: str
    dice: float | None  # mean over classes
    classes: tuple[ClassOfCase, ...]
    picture: str | None = None  # data URI
    slice_number: int = 0  # of the picture
    given: tuple[str, ...] = ()  # classes with a prompt in the picture

    @property
    def failures(self) -> list[ClassOfCase]:
        """What is worse than a boundary."""
        return [each for each in self.classes if each.verdict and each.verdict.failed]


@dataclass(frozen=True)
class Evaluation:
    """A folder of RUN/evaluations: results of one protocol and unit, and the cases drawn."""

    name: str
    results: dict[str, dict]  # "fine-tuned" and perhaps "zero-shot" → JSON of DESIGN §1
    shown: tuple[Shown, ...]
    cases: tuple[CaseView, ...]  # worst first
    labels: tuple[str, ...] = ()  # classes of the masks, in the order of their colours
    clicks: str | None = None  # data URI of Dice by clicks
    pictures_in: str | None = None  # the evaluation with the same pictures, further up the page

    @property
    def tuned(self) -> dict:
        return self.results["fine-tuned"]

    @property
    def title(self) -> str:
        """The prompts and the protocol, in few words."""
        return f"{self.tuned['prompts']}, protocol {self.tuned['protocol']}"

    @property
    def rule(self) -> str:
        return _RULES.get(self.tuned["protocol"], "")

    @property
    def prompts(self) -> dict[str, str]:
        """What the prompts were, in words, for each of the results."""
        return {name: describe_prompts(r["prompts"], r["oracle_prompts"]) for name, r in self.results.items()}

    @property
    def unsteady(self) -> list[str]:
        """How the prompts were moved on purpose."""
        widths = {"box_margin_px": "boxes wider by", "box_jitter_px": "box sides out by up to"}
        widths |= {"point_jitter_px": "points off by up to"}
        return [f"{words} {self.tuned[name]:g} px" for name, words in widths.items() if self.tuned.get(name)]

    @property
    def interval(self) -> str:
        """How the 95 % interval was made, in words; "" where there is none."""
        if all(result["ci95"]["dice"] is None for result in self.results.values()):
            return ""
        kind = self.tuned.get("ci95_method", "percentile")
        patients = len({row.get("patient", row["id"]) for row in self.tuned["cases"]})
        return f"of the mean Dice over {patients} patients, by {_INTERVALS.get(kind, kind)}"

    @property
    def figures(self) -> list[tuple[str, str, int | None]]:
        """(key, heading, digits) of the figures that any class has; as `_FIGURES`."""
        unit, tolerance = self.tuned["unit"], self.tuned["nsd_tolerance"]
        more = {"hd95": f", {unit}", "asd": f", {unit}", "nsd": f" at {tolerance:g} {unit}"}
        rows = [figures for result in self.results.values() for figures in result["classes"].values()]
        return [
            (key, heading + more.get(key, ""), digits)
            for key, (heading, digits) in _FIGURES.items()
            if any(row.get(key) is not None for row in rows)
        ]

    @property
    def colours(self) -> dict[str, str]:
        """Class of the masks → its colour in the pictures."""
        return dict(zip(self.labels, map(to_hex, class_colours(len(self.labels))), strict=True))

    @property
    def modes(self) -> dict[str, Counter[str]]:
        """Class → how often it failed in which way."""
        counts: dict[str, Counter[str]] = {name: Counter() for name in self.tuned["classes"]}
        for case in self.cases:
            for each in case.classes:
                if each.verdict:
                    counts[each.name][each.verdict.mode] += 1
        return counts if any(counts.values()) else {}

    def counts(self, class_: str) -> str:
        """Cases with a score of the class, and those without; twice, as the columns go, where these differ."""
        figures = [result["classes"].get(class_, {"n": 0}) for result in self.results.values()]
        undefined = [f" ({f['n_undefined']} undefined)" if f.get("n_undefined") else "" for f in figures]
        return " / ".join(dict.fromkeys(f"{f['n']}{u}" for f, u in zip(figures, undefined, strict=True)))

    def rows(self) -> Iterator[tuple[dict, dict]]:
        """Of each case and class the fine-tuned and the zero-shot row, cases worst first."""
        place = {case.id: number for number, case in enumerate(self.cases)}
        before = {(r["id"], r["class"]): r for r in self.results.get("zero-shot", {"cases": []})["cases"]}
        for row in sorted(self.tuned["cases"], key=lambda row: place[row["id"]]):
            yield row, before.get((row["id"], row["class"]), {})


def write_report(run: RunFolder) -> Path:
    """Renders RUN/report.html from what lies in the run's folder; whole or not at all.

    What is not there yet (evaluations, curves, the sheet) is left out and the next command is given instead.
    Raises UserError where the folder is no run or a file in it is damaged.
    """
    config = run.load_config()
    environment = read_json(run.environment) if run.environment.is_file() else {}
    evaluations = _read_evaluations(run.evaluations)
    records = _read_records(run.metrics)
    filters = {"figure": _figure, "percent": _percent, "capital": lambda words: words[:1].upper() + words[1:]}
    page = render(
        "report.html.j2",
        filters,
        config=config,
        dataset=environment.get("dataset") or config.data.data.resolve().name,
        unfinished=config.model.tuning != "none" and not run.finished(),
        steps_done=records[-1]["step"] if records else 0,
        evaluations=evaluations,
        modes=MODES,
        folded=FOLDED_CLASSES,
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


def _read_evaluations(folder: Path) -> list[Evaluation]:
    """Protocols in their usual order; of those with equal pictures only the first shows them."""
    found = [_read_evaluation(path.parent) for path in folder.glob("*/fine-tuned.json")]
    usual = {name: place for place, name in enumerate(PROTOCOLS)}
    found.sort(key=lambda e: (e.tuned["prompts"], usual.get(e.tuned["protocol"], len(usual)), e.name))
    first: dict[tuple, str] = {}
    for number, evaluation in enumerate(found):
        pictures = tuple(sorted(case.picture for case in evaluation.cases if case.picture))
        if pictures and (title := first.setdefault(pictures, evaluation.title)) != evaluation.title:
            found[number] = replace(evaluation, pictures_in=title)
    return found


def _read_evaluation(folder: Path) -> Evaluation:
    results = {
        name: read_json(path) for name in ("fine-tuned", "zero-shot") if (path := folder / f"{name}.json").is_file()
    }
    if len({(result["protocol"], result["unit"]) for result in results.values()}) > 1:
        raise UserError(f"{folder}: its results are of different protocols; evaluate both with the same --protocol")
    said = read_json(path) if (path := folder / "cases.json").is_file() else {}
    shown = tuple(
        Shown(role, case["id"], case["dice"], case["slice"], _data_uri((folder / f"{role}.png").read_bytes()))
        for role in ROLES
        if (case := said.get(role)) and (folder / f"{role}.png").is_file()
    )
    failures = read_json(path) if (path := folder / "failures.json").is_file() else {"labels": [], "cases": []}
    clicks = _data_uri(path.read_bytes()) if (path := folder / "clicks.png").is_file() else None
    cases = _case_views(folder, results["fine-tuned"], failures["cases"])
    return Evaluation(folder.name, results, shown, cases, tuple(failures["labels"]), clicks)


def _case_views(folder: Path, results: Mapping[str, Any], failures: list[dict]) -> tuple[CaseView, ...]:
    known = {failure["id"]: failure for failure in failures}
    classes: dict[str, list[ClassOfCase]] = {}
    for row in results["cases"]:
        verdict = known.get(row["id"], {"classes": {}})["classes"].get(row["class"])
        of_class = ClassOfCase(row["class"], row["dice"], Verdict(**verdict) if verdict else None)
        classes.setdefault(row["id"], []).append(of_class)
    views = []
    for id_, dice in rank_cases(results):
        view, failure = CaseView(id_, dice, tuple(classes[id_])), known.get(id_, {})
        if (path := folder / failure.get("picture", "")).is_file():
            picture = _data_uri(path.read_bytes(), "webp")
            view = replace(view, picture=picture, slice_number=failure["slice"], given=tuple(failure["given"]))
        views.append(view)
    return tuple(views)


def _read_records(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); take the broken line out") from error
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{path} is damaged (line {number} is of no step); take the broken line out")
    return records


def _read_table(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _notes(config: RunConfig, environment: Mapping, evaluations: list[Evaluation]) -> list[str]:
    """What a reader must know to take the figures for what they are."""
    points = any("point" in words for evaluation in evaluations for words in evaluation.prompts.values())
    return [
        *([] if config.model.backbone in BASELINES else [_CONTAMINATION]),
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


def _percent(value: float | None) -> str:
    """With its sign."""
    return "—" if value is None else f"{100 * value:+.0f} %".replace("-", "−")


def _data_uri(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()
