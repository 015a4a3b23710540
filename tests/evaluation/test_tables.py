"""Means by hand, what is undefined left out and counted, the interval, the JSON and the printed table."""

import json
import math

import numpy as np
import pytest

from cheaplunch.evaluation.protocols import UNDEFINED, Score
from cheaplunch.evaluation.tables import (
    CaseScore,
    bootstrap_ci95,
    describe_prompts,
    format_table,
    summarise,
)
from cheaplunch.files import write_json


def score(dice: float, hd95: float = 4.0) -> Score:
    return Score(dice=dice, iou=dice / (2 - dice), hd95=hd95, nsd=dice)


ROWS = [
    CaseScore("a", "liver", score(1.0, 2.0)),
    CaseScore("a", "spleen", score(0.5, 8.0)),
    CaseScore("a", "gallbladder", UNDEFINED),
    CaseScore("b", "liver", score(0.0, 6.0)),
    CaseScore("b", "spleen", UNDEFINED),
    CaseScore("b", "gallbladder", UNDEFINED),
]
OWN_PATIENT = {"a": "a", "b": "b"}


def summary(rows=ROWS, patients=OWN_PATIENT, seed=0, **settings):
    usual = {"protocol": "strict", "prompts": "furthest", "oracle_prompts": True, "backbone": "lite-medsam"}
    usual |= {"method": "cheap-lunch", "unit": "mm", "nsd_tolerance": 2.0}
    return summarise(rows, patients=patients, rng=np.random.default_rng(seed), **usual | settings)


def test_undefined_scores_are_left_out_and_counted():
    # liver: (1 + 0) / 2 of two cases; spleen: 0.5 of one, the other undefined; gallbladder: none.
    classes = summary()["classes"]
    assert classes["liver"] == {"dice": 0.5, "hd95": 4.0, "iou": 0.5, "nsd": 0.5, "n": 2, "n_undefined": 0}
    assert classes["spleen"] == {
        "dice": 0.5,
        "hd95": 8.0,
        "iou": 0.5 / 1.5,
        "nsd": 0.5,
        "n": 1,
        "n_undefined": 1,
    }
    assert classes["gallbladder"] == dict.fromkeys(["dice", "hd95", "iou", "nsd"]) | {
        "n": 0,
        "n_undefined": 2,
    }


def test_mean_is_over_classes_of_the_mean_over_cases():
    rows = [CaseScore(case, "liver", score(0.9)) for case in "abc"] + [CaseScore("a", "spleen", score(0.1))]
    # (0.9 + 0.1) / 2, not the mean of the four scores, 0.7.
    assert summary(rows, dict(zip("abc", "abc", strict=True)))["mean"]["dice"] == pytest.approx(0.5)
    assert summary()["mean"]["hd95"] == (4.0 + 8.0) / 2  # the gallbladder has none


def test_json_is_the_contract(tmp_path):
    write_json(summary(), tmp_path / "results.json")
    read = json.loads((tmp_path / "results.json").read_text())
    head = {key: read[key] for key in list(read) if key not in ("classes", "mean", "ci95", "cases")}
    assert head == {
        "protocol": "strict",
        "prompts": "furthest",
        "oracle_prompts": True,
        "backbone": "lite-medsam",
        "method": "cheap-lunch",
        "n_cases": 2,
        "unit": "mm",
        "nsd_tolerance": 2.0,
    }
    assert set(read["mean"]) == {"dice", "hd95", "iou", "nsd"}
    assert read["cases"][0] == {"id": "a", "class": "liver", "dice": 1.0, "hd95": 2.0, "iou": 1.0, "nsd": 1.0}
    assert read["cases"][2] == {"id": "a", "class": "gallbladder"} | dict.fromkeys(["dice", "hd95", "iou", "nsd"])
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_an_evaluation_where_nothing_is_defined_is_null_not_nan():
    results = summary([CaseScore("a", "liver", UNDEFINED)])
    assert results["mean"] == dict.fromkeys(["dice", "hd95", "iou", "nsd"])
    assert results["ci95"] == {"dice": None}
    json.dumps(results, allow_nan=False)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    write_json({"dice": 0.5}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"dice": math.nan}, path)
    assert json.loads(path.read_text()) == {"dice": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_a_protocol_in_voxels_says_px_whatever_the_spacing():
    assert summary(protocol="paper", unit="mm")["unit"] == "px"
    assert summary(protocol="strict", unit="px")["unit"] == "px"


@pytest.mark.parametrize(
    ("rows", "patients", "says"),
    [
        ([], OWN_PATIENT, "at least one"),
        ([ROWS[0], ROWS[0]], OWN_PATIENT, "one at most"),
        (ROWS, {"a": "a"}, "without a patient: b"),
    ],
    ids=["no-rows", "scored-twice", "no-patient"],
)
def test_bad_rows_are_refused(rows, patients, says):
    with pytest.raises(ValueError, match=says):
        summary(rows, patients)


# --- the interval ---------------------------------------------------------------------------------


def test_interval_of_two_patients_by_hand():
    rows = [CaseScore("a", "liver", score(1.0)), CaseScore("b", "liver", score(0.0))]
    # Resamples are aa, ab, ba, bb: a quarter are 0 and a quarter 1, so 2.5 and 97.5 % are 0 and 1.
    assert bootstrap_ci95(rows, OWN_PATIENT, np.random.default_rng(0)) == [0.0, 1.0]


def test_interval_equals_one_resampled_case_by_case():
    truth = np.random.default_rng(1).random((6, 2))
    rows = [CaseScore(str(i), f"c{j}", score(truth[i, j])) for i in range(6) for j in range(2) if (i, j) != (4, 1)]
    patients = {str(i): "p" + str(i // 2) for i in range(6)}  # three patients of two cases
    drawn = np.random.default_rng(3).multinomial(3, [1 / 3] * 3, size=500)
    means = []
    for times in drawn:
        copies = [row for row in rows for _ in range(times[int(row.case_id) // 2])]
        by_class = [[row.score.dice for row in copies if row.class_name == name] for name in ("c0", "c1")]
        means.append(np.mean([np.mean(values) for values in by_class if values]))
    ours = bootstrap_ci95(rows, patients, np.random.default_rng(3), resamples=500)
    assert ours == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_interval_is_the_same_for_a_seed():
    rows = [CaseScore(str(i), "liver", score(i / 10)) for i in range(10)]
    patients = {str(i): str(i) for i in range(10)}
    first, again = (summary(rows, patients, seed=5)["ci95"]["dice"] for _ in range(2))
    assert first == again
    low, high = first
    assert 0.2 < low < 0.45 < high < 0.7


def test_interval_needs_two_patients():
    assert summary(patients={"a": "same", "b": "same"})["ci95"] == {"dice": None}


def test_a_patient_where_nothing_is_defined_is_no_patient_of_the_interval():
    rows = [CaseScore("a", "liver", score(0.5)), CaseScore("b", "liver", UNDEFINED)]
    assert summary(rows)["ci95"] == {"dice": None}


# --- the printed table ----------------------------------------------------------------------------


def test_table():
    fine_tuned = summary()
    zero_shot = summary([CaseScore(row.case_id, row.class_name, UNDEFINED) for row in ROWS], method="zero-shot")
    assert format_table({"zero-shot": zero_shot, "fine-tuned": fine_tuned}).splitlines() == [
        "protocol strict, HD95 in mm",
        "oracle prompts: one point a class and slice, the furthest from the boundary, drawn from the truth",
        "",
        "                  zero-shot      fine-tuned",
        "class          Dice    HD95    Dice    HD95",
        "-------------------------------------------",
        "liver             –       –   0.500     4.0",
        "spleen            –       –   0.500     8.0",
        "gallbladder       –       –       –       –",
        "-------------------------------------------",
        "mean              –       –   0.500     6.0",
    ]


def test_table_says_the_prompts_of_each_result_where_they_differ():
    table = format_table({"points": summary(), "none": summary(prompts="auto", oracle_prompts=False)})
    assert table.splitlines()[1:3] == [f"points: {describe_prompts('furthest', True)}", "none: no prompts"]


def test_table_refuses_to_mix_protocols():
    with pytest.raises(ValueError, match="one protocol"):
        format_table({"a": summary(), "b": summary(protocol="paper")})


@pytest.mark.parametrize(
    ("prompts", "oracle", "words"),
    [
        ("box", True, "oracle prompts: one box a class and slice, drawn from the truth"),
        ("clicks:3", False, "3 clicks a class and slice, each in the largest error"),
        ("auto", False, "no prompts"),
        ("by hand", False, "by hand"),
    ],
)
def test_prompts_in_words(prompts, oracle, words):
    assert describe_prompts(prompts, oracle) == words
