"""How sure a figure is: intervals of a mean over patients, and the paired test of two runs on the same patients.

The patient is the unit everywhere: cases of one patient, and organs of one case, resemble each other, and an interval
that drew them singly would be too narrow. What each kind of interval covers was measured (docs/evaluation.md).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from cheaplunch.errors import UserError

_TAILS = np.array([0.025, 0.975])


@dataclass(frozen=True, eq=False)
class PatientSums:
    """A figure summed by patient and class: total, count (patients, classes); count is 0 where a patient has none."""

    total: np.ndarray
    count: np.ndarray

    def class_means(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The means over cases (B, classes), and the number of cases, when patients are drawn (B, patients) times."""
        n = drawn @ self.count
        return np.divide(drawn @ self.total, n, out=np.zeros_like(n), where=n > 0), n

    def means(self, drawn: np.ndarray) -> np.ndarray:
        """(B, patients) → (B,): the mean over classes of the mean over cases.

        A class that no drawn patient has is left out, as it would be of a study of those patients.
        """
        means, n = self.class_means(drawn)
        return means.sum(axis=1) / (n > 0).sum(axis=1)

    def standard_errors(self, drawn: np.ndarray) -> np.ndarray:
        """(B, patients) → (B,): the standard error of each mean, from how far each patient moves it.

        The linearised (delta-method) variance of a ratio of sums. With one class and one case a patient it is the
        familiar s / √n.
        """
        means, n = self.class_means(drawn)
        weight = np.divide(1, n, out=np.zeros_like(n), where=n > 0) / (n > 0).sum(axis=1, keepdims=True)
        moves = weight @ self.total.T - (weight * means) @ self.count.T  # (B, patients)
        patients = self.total.shape[0]
        return np.sqrt((drawn * moves**2).sum(axis=1) * patients / (patients - 1))


def sum_by_patient(figures: Iterable[tuple[str, str, float | None]]) -> PatientSums:
    """(patient, class, figure) of every case and class → sums; undefined figures are left out."""
    defined = [(patient, name, value) for patient, name, value in figures if value is not None]
    who, patient = np.unique([patient for patient, _, _ in defined], return_inverse=True)
    what, class_ = np.unique([name for _, name, _ in defined], return_inverse=True)
    total, count = np.zeros((2, len(who), len(what)))
    np.add.at(total, (patient, class_), [value for _, _, value in defined])
    np.add.at(count, (patient, class_), 1)
    return PatientSums(total, count)


def interval(
    sums: PatientSums,
    rng: np.random.Generator,
    *,
    method: str | None = None,
    resamples: int = 2000,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> list[float] | None:
    """The 95 % interval [lo, hi] of the mean over classes of the mean over cases; None for fewer than two patients.

    method: of METHODS, DEFAULT where left out. within: what the figure cannot leave, (0, 1) for Dice.
    """
    patients = len(sums.total)
    if patients < 2:
        return None
    drawn = rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples)
    lo, hi = METHODS[method or DEFAULT](sums, drawn.astype(float))
    return [float(np.clip(lo, *within)), float(np.clip(hi, *within))]


# --- the methods: (sums, how often each resample drew each patient (B, patients)) → (lo, hi) -------------------------


def percentile(sums: PatientSums, drawn: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentiles of the resampled means."""
    lo, hi = np.quantile(sums.means(drawn), _TAILS)
    return lo, hi


def bca(sums: PatientSums, drawn: np.ndarray) -> tuple[float, float]:
    """Percentiles corrected for bias and for a spread that changes with the mean (Efron 1987)."""
    patients = len(sums.total)
    resampled, mean = sums.means(drawn), sums.means(np.ones((1, patients)))[0]
    below = ((resampled < mean).sum() + (resampled == mean).sum() / 2) / len(resampled)
    bias = stats.norm.ppf(np.clip(below, 0.5 / len(resampled), 1 - 0.5 / len(resampled)))
    without_one = sums.means(1 - np.eye(patients))
    off = without_one.mean() - without_one
    spread = np.sum(off**2) ** 1.5
    skew = np.sum(off**3) / (6 * spread) if spread else 0.0
    z = bias + stats.norm.ppf(_TAILS)
    lo, hi = np.quantile(resampled, stats.norm.cdf(bias + z / (1 - skew * z)))
    return lo, hi


def studentised(sums: PatientSums, drawn: np.ndarray) -> tuple[float, float]:
    """Bootstrap-t: percentiles of how many standard errors, each resample's own, the resampled means lie off.

    Of fewer than four patients too few different resamples can be drawn: Student's t instead.
    """
    if len(sums.total) < 4:
        return student_t(sums, drawn)
    everyone = np.ones((1, len(sums.total)))
    mean, error = sums.means(everyone)[0], sums.standard_errors(everyone)[0]
    errors = sums.standard_errors(drawn)
    spread = errors > 1e-12  # one patient drawn n times has none
    if not spread.any():
        return mean, mean
    off = (sums.means(drawn[spread]) - mean) / errors[spread]
    hi, lo = mean - np.quantile(off, _TAILS) * error
    return lo, hi


def student_t(sums: PatientSums, _drawn: np.ndarray) -> tuple[float, float]:
    """Student's t interval with the patients' standard error; nothing is resampled."""
    patients = len(sums.total)
    everyone = np.ones((1, patients))
    mean, error = sums.means(everyone)[0], sums.standard_errors(everyone)[0]
    lo, hi = mean + stats.t.ppf(_TAILS, patients - 1) * error
    return lo, hi


METHODS: Mapping[str, Callable[[PatientSums, np.ndarray], tuple[float, float]]] = {
    "percentile": percentile,
    "bca": bca,
    "studentised": studentised,
    "t": student_t,
}
DEFAULT = "studentised"


# --- two runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Run a against run b on the same patients: differences are a − b, of each patient's mean over classes.

    n: patients; p: two-sided Wilcoxon signed-rank, 1 where all are equal; left_out: cases and classes that are
    undefined in either. mean_difference is as `summarise` takes means; ci95 is its interval, None for one patient.
    """

    metric: str
    n: int
    p: float
    median_difference: float
    mean_difference: float
    ci95: list[float] | None
    left_out: int


def paired(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    metric: str = "dice",
    names: tuple[str, str] = ("the first result", "the second"),
) -> Paired:
    """Compares two results of `evaluate` (their JSON) case by case, with the patient as the unit.

    names: what the two are called in messages, such as their files. Raises UserError for results that are not
    comparable: another protocol, unit or kind of prompts, other cases or classes, nothing defined in both.
    """
    for key in ("protocol", "prompts", "oracle_prompts", "unit", *(["nsd_tolerance"] if metric == "nsd" else [])):
        if a.get(key) != b.get(key):
            raise UserError(
                f"{names[0]} and {names[1]} cannot be paired: {key} is {a.get(key)} and {b.get(key)}; "
                "evaluate both the same way"
            )
    first, second = ({(row["id"], row["class"]): row for row in result["cases"]} for result in (a, b))
    if lone := sorted(first.keys() ^ second.keys()):
        (case_id, class_name), owner = lone[0], names[lone[0] not in first]
        raise UserError(
            f"{names[0]} and {names[1]} cannot be paired: only {owner} has {class_name} of case {case_id}; "
            "evaluate both on the same --data"
        )
    differences = [
        (row.get("patient", row["id"]), row["class"], row[metric] - second[key][metric])
        for key, row in first.items()
        if row.get(metric) is not None and second[key].get(metric) is not None
    ]
    if not differences:
        raise UserError(f"{names[0]} and {names[1]} cannot be paired: no case has a {metric} in both")
    sums = sum_by_patient(differences)
    by_patient = sums.means(np.eye(len(sums.total)))
    p = float(stats.wilcoxon(by_patient).pvalue) if by_patient.any() else 1.0  # pyright: ignore[reportAttributeAccessIssue]
    return Paired(
        metric,
        n=len(by_patient),
        p=p,
        median_difference=float(np.median(by_patient)),
        mean_difference=float(sums.means(np.ones((1, len(by_patient))))[0]),
        ci95=interval(sums, rng),
        left_out=len(first) - len(differences),
    )
