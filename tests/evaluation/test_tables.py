"""Means by hand, what is undefined left out and counted, the interval, the JSON and the printed table."""

import json
import math

import numpy as np
import pytest

from cheaplunch.evaluation import statistics
from cheaplunch.evaluation.protocols import UNDEFINED, Score
from cheaplunch.evaluation.tables import CaseScore, describe_prompts, format_table, summarise
from cheaplunch.files import write_json


def score(dice: float, hd95: float = 4.0) -> Score:
    return Score(dice=dice, iou=dice / (2 - dice), hd95=hd95, nsd=dice, asd=hd95 / 4, volume_error=dice - 1)


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


FIGURES = ["dice", "hd95", "iou", "nsd", "asd", "volume_error"]
NONE_LOST = {"missed": 0, "invented": 0}


def test_undefined_scores_are_left_out_and_counted():
    # liver: (1 + 0) / 2 of two cases; spleen: 0.5 of one, the other undefined; gallbladder: none.
    classes = summary()["classes"]
    liver = {
        "dice": 0.5,
        "hd95": 4.0,
        "iou": 0.5,
        "nsd": 0.5,
        "asd": 1.0,
        "volume_error": -0.5,
        "n": 2,
        "n_undefined": 0,
    }
    spleen = {"dice": 0.5, "hd95": 8.0, "iou": 0.5 / 1.5, "nsd": 0.5, "asd": 2.0, "volume_error": -0.5}
    assert classes["liver"] == liver | NONE_LOST
    assert classes["spleen"] == spleen | {"n": 1, "n_undefined": 1} | NONE_LOST
    assert classes["gallbladder"] == dict.fromkeys(FIGURES) | {"n": 0, "n_undefined": 2} | NONE_LOST


def test_missed_and_invented_organs_are_counted():
    missed = Score(dice=0, iou=0, hd95=9, nsd=0, volume_error=-1, missed=1)
    invented = Score(dice=0, iou=0, hd95=9, nsd=0, invented=1)
    rows = [CaseScore(case, "liver", one) for case, one in zip("abc", [missed, missed, invented], strict=True)]
    results = summary([*rows, CaseScore("a", "spleen", score(1.0))], {name: name for name in "abc"})
    counts = {name: (figures["missed"], figures["invented"]) for name, figures in results["classes"].items()}
    assert counts == {"liver": (2, 1), "spleen": (0, 0)}
    assert (results["mean"]["missed"], results["mean"]["invented"]) == (1, 0.5)
    assert [(row["missed"], row["invented"]) for row in results["cases"]] == [(1, 0), (1, 0), (0, 1), (0, 0)]


def test_a_case_says_its_patient_where_that_is_another_name():
    cases = summary(patients={"a": "anna", "b": "b"})["cases"]
    assert {(row["id"], row.get("patient")) for row in cases} == {("a", "anna"), ("b", None)}


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
        "present_classes_only": True,
        "backbone": "lite-medsam",
        "method": "cheap-lunch",
        "n_cases": 2,
        "unit": "mm",
        "nsd_tolerance": 2.0,
        "ci95_method": statistics.DEFAULT,
    }
    assert set(read["mean"]) == {*FIGURES, "missed", "invented"}
    first = {"dice": 1.0, "hd95": 2.0, "iou": 1.0, "nsd": 1.0, "asd": 0.5, "volume_error": 0.0}
    assert read["cases"][0] == {"id": "a", "class": "liver"} | first | NONE_LOST
    assert read["cases"][2] == {"id": "a", "class": "gallbladder"} | dict.fromkeys(FIGURES) | NONE_LOST
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_an_evaluation_where_nothing_is_defined_is_null_not_nan():
    results = summary([CaseScore("a", "liver", UNDEFINED)])
    assert results["mean"] == dict.fromkeys(FIGURES) | NONE_LOST
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
