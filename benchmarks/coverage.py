"""How often a 95 % interval holds the true mean, for each kind of interval in `evaluation/statistics.py`.

Studies of 3, 5, 12 and 50 patients are made up whose true mean Dice is known. Dice is logit-normal: a patient's, an
organ's in a patient and a case's own part add up, so cases of a patient and organs of a case resemble each other, and
scores pile up below 1 with a tail towards 0; some are failures of Dice 0. Two kinds of study:
- organs: four classes of different difficulty, one to four cases a patient, 15 % of organs absent, 3 % failures;
- lesion: one class, one case a patient, wider, 8 % failures.
Nominal is 0.95. The interval closest to it over all studies is what `summarise` uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from scipy.special import expit, logit

from cheaplunch.evaluation.statistics import METHODS, PatientSums

PATIENTS = (3, 5, 12, 50)


@dataclass(frozen=True)
class Study:
    """Medians of the classes' Dice; spreads on the logit scale; how many cases a patient has at most."""

    medians: tuple[float, ...]
    patient: float
    organ: float
    case: float
    failures: float
    absent: float
    most_cases: int


STUDIES = {
    "organs": Study((0.95, 0.90, 0.80, 0.65), 0.5, 0.4, 0.3, failures=0.03, absent=0.15, most_cases=4),
    "lesion": Study((0.85,), 0.9, 0.0, 0.5, failures=0.08, absent=0.0, most_cases=1),
}


def draw(study: Study, patients: int, rng: np.random.Generator) -> PatientSums:
    classes, cases = len(study.medians), study.most_cases
    place = logit(np.array(study.medians)) + study.patient * rng.standard_normal((patients, 1, 1))
    place = place + study.organ * rng.standard_normal((patients, 1, classes))
    place = place + study.case * rng.standard_normal((patients, cases, classes))  # (P, cases, classes)
    dice = expit(place) * (rng.random(place.shape) >= study.failures)
    there = np.arange(cases) < rng.integers(1, cases, size=(patients, 1), endpoint=True)  # (P, cases)
    there = there[..., None] & (rng.random(place.shape) >= study.absent)
    return PatientSums((dice * there).sum(axis=1), there.sum(axis=1).astype(float))


def true_mean(study: Study, rng: np.random.Generator) -> float:
    """From so many patients that its own error is far below what is measured."""
    many = draw(study, 500_000, rng)
    return float((many.total.sum(axis=0) / many.count.sum(axis=0)).mean())


def measure(study: Study, patients: int, studies: int, resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    """For each method the share of intervals that hold the mean, those that lie below and above it, and their width."""
    truth = true_mean(study, rng)
    intervals = np.zeros((len(METHODS), studies, 2))
    for number in range(studies):
        sums = draw(study, patients, rng)
        while not (sums.count.sum(axis=1) > 0).all():  # a patient without any organ is no patient of the study
            sums = draw(study, patients, rng)
        drawn = rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(float)
        intervals[:, number] = np.clip([method(sums, drawn) for method in METHODS.values()], 0, 1)
    low, high = intervals[..., 0], intervals[..., 1]  # (methods, studies)
    return {
        name: {
            "coverage": round(float(((low[i] <= truth) & (truth <= high[i])).mean()), 4),
            "below": round(float((high[i] < truth).mean()), 4),
            "above": round(float((low[i] > truth).mean()), 4),
            "mean_width": round(float((high[i] - low[i]).mean()), 4),
        }
        for i, name in enumerate(METHODS)
    }


def main() -> None:
    parser = common.arguments(__file__, __doc__)
    parser.add_argument("--studies", type=int, default=2000, help="of each kind and size (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="of each study (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    cells = [(name, patients) for name in STUDIES for patients in PATIENTS]
    found = {
        f"{name}, {patients} patients": measure(STUDIES[name], patients, options.studies, options.resamples, rng)
        for name, patients in common.progress(cells, "coverage")
    }
    off = {m: float(np.mean([abs(cell[m]["coverage"] - 0.95) for cell in found.values()])) for m in METHODS}
    closest = min(off, key=lambda method: off[method])
    result = {"found": found, "mean_distance_from_0.95": {m: round(d, 4) for m, d in off.items()}, "closest": closest}
    common.write(options, result)


if __name__ == "__main__":
    main()
