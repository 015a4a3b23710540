"""Intervals by hand and against scipy's, and two runs compared with the patient as the unit."""

import numpy as np
import pytest
from scipy import stats

from cheaplunch.errors import UserError
from cheaplunch.evaluation.statistics import DEFAULT, METHODS, PatientSums, interval, paired, sum_by_patient


def one_class(values) -> PatientSums:
    """One case of one class a patient."""
    return sum_by_patient((str(i), "organ", value) for i, value in enumerate(values))


def dice_of(n: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).beta(8, 2, n)


# --- sums -----------------------------------------------------------------------------------------


def uneven_study():
    """Three patients of two cases and two classes, one figure undefined: (case, patient, class, figure)."""
    figures = np.random.default_rng(1).random((6, 2))
    return [(i, f"p{i // 2}", f"c{j}", None if (i, j) == (4, 1) else figures[i, j]) for i in range(6) for j in range(2)]


def test_sums_are_by_patient_and_class():
    sums = sum_by_patient([("b", "x", 0.5), ("a", "x", 0.25), ("b", "x", 0.25), ("b", "y", 1.0), ("a", "y", None)])
    assert sums.total.tolist() == [[0.25, 0], [0.75, 1.0]]
    assert sums.count.tolist() == [[1, 0], [2, 1]]


def test_means_equal_those_of_cases_drawn_one_by_one():
    rows = uneven_study()
    sums = sum_by_patient((patient, name, value) for _, patient, name, value in rows)
    drawn = np.random.default_rng(3).multinomial(3, [1 / 3] * 3, size=200)
    for times, mean in zip(drawn, sums.means(drawn), strict=True):
        copies = [(name, value) for i, _, name, value in rows for _ in range(times[i // 2]) if value is not None]
        by_class = [[value for name, value in copies if name == class_] for class_ in ("c0", "c1")]
        assert mean == pytest.approx(np.mean([np.mean(values) for values in by_class if values]))


def test_standard_error_of_one_class_and_case_is_s_over_root_n():
    values = dice_of(12)
    error = one_class(values).standard_errors(np.ones((1, 12)))
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(12))


def test_standard_error_agrees_with_a_large_bootstrap():
    rng = np.random.default_rng(0)
    rows = [(f"p{i}", f"c{j}", v) for i in range(60) for j in range(3) for v in rng.random(1 + i % 3) * (j + 1) / 3]
    sums = sum_by_patient(rows)
    resampled = sums.means(rng.multinomial(60, np.full(60, 1 / 60), size=20_000))
    assert sums.standard_errors(np.ones((1, 60)))[0] == pytest.approx(resampled.std(), rel=0.05)


# --- intervals ------------------------------------------------------------------------------------


def test_percentile_of_two_patients_by_hand():
    # Resamples are aa, ab, ba, bb: a quarter are 0 and a quarter 1, so 2.5 and 97.5 % are 0 and 1.
    assert interval(one_class([1.0, 0.0]), np.random.default_rng(0), method="percentile") == [0.0, 1.0]


def test_t_is_students():
    values = dice_of(7)
    expected = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert interval(one_class(values), np.random.default_rng(0), method="t") == pytest.approx(expected)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_agrees_with_scipys_bootstrap(method):
    values = dice_of(15)
    ours = interval(one_class(values), np.random.default_rng(0), method=method, resamples=40_000)
    rng = np.random.default_rng(1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=40_000, method=method, rng=rng).confidence_interval
    assert ours == pytest.approx(list(theirs), abs=0.003)  # the width is 0.1


def test_studentised_is_the_pivot_turned_round():
    values = dice_of(9)
    rng = np.random.default_rng(2)
    found = interval(one_class(values), np.random.default_rng(0), method="studentised", resamples=40_000)
    picks = rng.choice(values, (40_000, 9))
    off = (picks.mean(axis=1) - values.mean()) / (picks.std(axis=1, ddof=1) / 3 + 1e-300)
    lo, hi = np.quantile(off, [0.025, 0.975])
    error = values.std(ddof=1) / 3
    assert found == pytest.approx([values.mean() - hi * error, values.mean() - lo * error], abs=0.01)


def test_studentised_of_too_few_patients_is_students():
    intervals = [
        interval(one_class([0.9, 0.7, 0.8]), np.random.default_rng(0), method=name) for name in ("studentised", "t")
    ]
    assert intervals[0] == intervals[1]


@pytest.mark.parametrize("method", METHODS)
def test_patients_who_are_all_alike_leave_no_doubt(method):
    assert interval(one_class([0.75] * 5), np.random.default_rng(0), method=method) == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize("method", METHODS)
def test_an_interval_holds_the_mean_stays_within_and_is_the_same_for_a_seed(method):
    values = [0.99, 0.98, 0.2]
    first, again = (
        interval(one_class(values), np.random.default_rng(4), method=method, within=(0, 1)) for _ in range(2)
    )
    assert first == again
    assert first is not None
    lo, hi = first
    assert 0 <= lo < np.mean(values) < hi <= 1


def test_cases_of_one_patient_are_no_patients():
    assert interval(sum_by_patient([("p", "x", 0.5), ("p", "x", 0.9)]), np.random.default_rng(0)) is None
    assert interval(sum_by_patient([]), np.random.default_rng(0)) is None
    # Four equal cases a patient instead of one say nothing more.
    values = dice_of(6)
    four = sum_by_patient((str(i), "x", value) for i, value in enumerate(values) for _ in range(4))
    intervals = [interval(sums, np.random.default_rng(0), method=DEFAULT) for sums in (one_class(values), four)]
    assert intervals[0] == pytest.approx(intervals[1])


# --- two runs -------------------------------------------------------------------------------------


def result(dice, patients=None, **settings):
    """What `evaluate` writes, of one class a case, or of {class: figures}."""
    by_class = dice if isinstance(dice, dict) else {"organ": dice}
    rows = [
        {"id": f"case {i}", "class": name, "dice": value, "nsd": value}
        | ({} if patients is None else {"patient": patients[i]})
        for name, values in by_class.items()
        for i, value in enumerate(values)
    ]
    usual = {"protocol": "strict", "prompts": "box", "oracle_prompts": True, "unit": "mm", "nsd_tolerance": 2.0}
    return usual | settings | {"cases": rows}


def compare(a, b, **settings):
    return paired(a, b, np.random.default_rng(0), **settings)


def test_paired_by_hand():
    # All six differences are above 0: of 2^6 signs only one is as extreme each way, p = 2 / 64.
    a, b = [0.9, 0.8, 0.7, 0.9, 0.6, 0.8], [0.8, 0.6, 0.4, 0.5, 0.1, 0.2]
    found = compare(result(a), result(b))
    assert found.n == 6
    assert found.p == pytest.approx(2 / 64)
    assert found.median_difference == pytest.approx(0.35)
    assert found.mean_difference == pytest.approx(0.35)
    assert found.ci95 is not None and found.ci95[0] > 0
    assert found.left_out == 0
    back = compare(result(b), result(a))
    assert (back.p, back.mean_difference) == (found.p, pytest.approx(-0.35))


def test_paired_counts_patients_not_cases():
    a, b = [0.9] * 6, [0.8, 0.7, 0.6, 0.8, 0.7, 0.5]
    assert compare(result(a), result(b)).n == 6
    found = compare(result(a, patients="xxyyzz"), result(b, patients="xxyyzz"))
    assert found.n == 3
    assert found.median_difference == pytest.approx(0.2)  # of 0.15, 0.2 and 0.3
    assert found.p == pytest.approx(2 / 8)


def test_paired_leaves_out_what_is_undefined_in_either():
    a = {"liver": [0.9, 0.8], "spleen": [None, 0.6]}
    b = {"liver": [0.7, 0.7], "spleen": [0.0, 0.2]}
    found = compare(result(a), result(b))
    assert found.left_out == 1
    assert found.median_difference == pytest.approx((0.2 + (0.1 + 0.4) / 2) / 2)
    # The mean over classes of the mean over cases, as everywhere: liver 0.15, spleen 0.4.
    assert found.mean_difference == pytest.approx((0.15 + 0.4) / 2)


def test_a_run_does_not_differ_from_itself():
    found = compare(result([0.5, 0.6, 0.7]), result([0.5, 0.6, 0.7]))
    assert (found.p, found.mean_difference, found.ci95) == (1.0, 0.0, [0.0, 0.0])


def test_one_patient_has_no_interval():
    assert compare(result([0.5]), result([0.4])).ci95 is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol": "paper"}, "protocol is strict and paper"),
        ({"prompts": "clicks:3"}, "prompts is box and clicks:3"),
        ({"unit": "px"}, "unit is mm and px"),
    ],
)
def test_what_is_not_comparable_is_refused(change, says):
    with pytest.raises(UserError, match=rf"a.json and b.json cannot be paired: {says}"):
        compare(result([0.5, 0.6]), result([0.5, 0.6], **change), names=("a.json", "b.json"))


def test_other_tolerances_matter_to_nsd_alone():
    a, b = result([0.5, 0.6]), result([0.5, 0.6], nsd_tolerance=1.0)
    assert compare(a, b).n == 2
    with pytest.raises(UserError, match="nsd_tolerance is 2.0 and 1.0"):
        compare(a, b, metric="nsd")


def test_other_cases_are_refused():
    with pytest.raises(UserError, match=r"only b.json has organ of case case 2; .*--data"):
        compare(result([0.5, 0.6]), result([0.5, 0.6, 0.7]), names=("a.json", "b.json"))
    with pytest.raises(UserError, match="no case has a hd95 in both"):
        compare(result([0.5]), result([0.5]), metric="hd95")
