"""From scores of cases to the figures people quote: the JSON of `evaluate` and its plain-text table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cheaplunch.evaluation import statistics
from cheaplunch.evaluation.protocols import Score, find_protocol

METRICS = ("dice", "hd95", "iou", "nsd")
"""What methods are compared by."""
FIGURES = (*METRICS, "asd", "volume_error")
"""What is written of each score."""
COUNTS = ("missed", "invented")


@dataclass(frozen=True)
class CaseScore:
    """One class of one case."""

    case_id: str
    class_name: str
    score: Score


def summarise(
    rows: Sequence[CaseScore],
    *,
    protocol: str,
    prompts: str,
    oracle_prompts: bool,
    backbone: str,
    method: str,
    unit: str,
    nsd_tolerance: float,
    patients: Mapping[str, str],
    rng: np.random.Generator,
    present_classes_only: bool = True,
) -> dict:
    """The results of an evaluation as `evaluate` writes them (contract: DESIGN §1).

    unit: of the images' spacing, "mm", or "px" where there is none; a protocol that ignores spacing writes
    "px" whatever the images have (a pixel or voxel). nsd_tolerance: in the unit written. patients: case id →
    patient, the unit of the interval; written beside a case whose id it is not. present_classes_only: whether the
    prompts also said which classes a slice has. Classes keep the order of `rows`.

    "mean" is the mean over classes of the mean over cases. Undefined scores are left out of both and counted:
    for each class "n" cases have a Dice, "n_undefined" have none. A class without any is null and left out of
    the mean. In "missed" cases the truth has the class and the prediction has not, in "invented" ones the other way
    round. "ci95" is the interval over patients of the mean Dice (`statistics.DEFAULT`, named in "ci95_method"), null
    for fewer than two patients.

    Raises ValueError for no rows, a case and class scored twice, or a case without a patient.
    """
    keys = [(row.case_id, row.class_name) for row in rows]
    if not rows or len(set(keys)) < len(keys):
        raise ValueError("an evaluation has at least one score, and one at most for each case and class")
    if unknown := {row.case_id for row in rows} - patients.keys():
        raise ValueError(f"cases without a patient: {', '.join(sorted(unknown))}")

    classes = {}
    for name in dict.fromkeys(row.class_name for row in rows):
        scores = [row.score for row in rows if row.class_name == name]
        n = sum(score.dice is not None for score in scores)
        means = {figure: _mean(getattr(score, figure) for score in scores) for figure in FIGURES}
        counts = {count: sum(getattr(score, count) for score in scores) for count in COUNTS}
        classes[name] = means | {"n": n, "n_undefined": len(scores) - n} | counts

    return {
        "protocol": protocol,
        "prompts": prompts,
        "oracle_prompts": oracle_prompts,
        "present_classes_only": present_classes_only,
        "backbone": backbone,
        "method": method,
        "n_cases": len({row.case_id for row in rows}),
        "unit": "px" if find_protocol(protocol).in_voxels else unit,
        "nsd_tolerance": nsd_tolerance,
        "classes": classes,
        "mean": {name: _mean(figures[name] for figures in classes.values()) for name in (*FIGURES, *COUNTS)},
        "ci95": {"dice": dice_ci95(rows, patients, rng)},
        "ci95_method": statistics.DEFAULT,
        "cases": [_case_row(row, patients[row.case_id]) for row in rows],
    }


def dice_ci95(rows: Sequence[CaseScore], patients: Mapping[str, str], rng: np.random.Generator) -> list[float] | None:
    """The 95 % interval of the mean over classes of the mean Dice over cases, with patients drawn: [lo, hi].

    A patient brings all cases and classes along. None for fewer than two patients with a defined Dice.
    """
    sums = statistics.sum_by_patient((patients[row.case_id], row.class_name, row.score.dice) for row in rows)
    return statistics.interval(sums, rng, within=(0.0, 1.0))


def _case_row(row: CaseScore, patient: str) -> dict:
    whose = {"id": row.case_id} if patient == row.case_id else {"id": row.case_id, "patient": patient}
    return whose | {"class": row.class_name} | {name: getattr(row.score, name) for name in (*FIGURES, *COUNTS)}


_PROMPTS = {
    "furthest": "one point a class and slice, the furthest from the boundary",
    "random": "one random point a class and slice",
    "box": "one box a class and slice",
    "clicks": "{} clicks a class and slice, each in the largest error",
    "one-click": "one point a class and volume",
    "text": "each class by a text, on every slice",
    "auto": "no prompts",
}


def describe_prompts(prompts: str, oracle_prompts: bool) -> str:
    """What `--prompts` means, in words to stand wherever the figures do; an unknown kind is its own name."""
    kind, _, count = prompts.partition(":")
    words = _PROMPTS.get(kind, prompts).replace("{}", count)
    return f"oracle prompts: {words}, drawn from the truth" if oracle_prompts else words


def format_table(results: Mapping[str, Mapping]) -> str:
    """Plain text: a row a class and their mean, for each result (name → `summarise`'s dict) Dice and HD95.

    The heading says protocol, unit and prompts; results with other prompts each get a line of their own.
    Undefined is "–". Raises ValueError for no results, or results of different protocols or units: they are
    not comparable.
    """
    rules = {(result["protocol"], result["unit"]) for result in results.values()}
    if len(rules) != 1:
        raise ValueError(f"one table holds results of one protocol and unit, not of {sorted(rules)}")
    [(protocol, unit)] = rules
    words = {name: describe_prompts(r["prompts"], r["oracle_prompts"]) for name, r in results.items()}
    shared = len(set(words.values())) == 1
    heading = [f"protocol {protocol}, HD95 in {unit}"]
    heading += list(words.values())[:1] if shared else [f"{name}: {text}" for name, text in words.items()]

    classes = list(dict.fromkeys(name for result in results.values() for name in result["classes"]))
    body = [(name, [result["classes"].get(name, {}) for result in results.values()]) for name in classes]
    body += [("mean", [result["mean"] for result in results.values()])]

    first = max(len(name) for name, _ in [*body, ("class", [])])
    widths = [max(len(name), 14) for name in results]

    def line(label: str, cells: Iterable[str]) -> str:
        return f"{label:<{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True))

    rule = "-" * (first + sum(w + 2 for w in widths))
    lines = [*heading, "", line("", results), line("class", [f"{'Dice':>6}{'HD95':>8}"] * len(widths)), rule]
    lines += [line(label, [_cell(figures) for figures in row]) for label, row in body]
    lines.insert(-1, rule)
    return "\n".join(lines)


def _cell(figures: Mapping) -> str:
    dice, hd95 = figures.get("dice"), figures.get("hd95")
    return f"{'–' if dice is None else f'{dice:.3f}':>6}{'–' if hd95 is None else f'{hd95:.1f}':>8}"


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
