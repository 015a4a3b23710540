"""Every combination of empty and non-empty masks, under every protocol, and the unit each measures in."""

import math

import numpy as np
import pytest

from cheaplunch.errors import UserError
from cheaplunch.evaluation.metrics import mask_pair
from cheaplunch.evaluation.protocols import (
    BRATS_DIAGONAL_MM,
    PROTOCOLS,
    UNDEFINED,
    Score,
    brats,
    msa,
    nnunet,
    paper,
    score_labels,
    strict,
)

SPACING_MM = (3.0, 1.0)
EMPTY = np.zeros((4, 5), bool)
LEFT, RIGHT = EMPTY.copy(), EMPTY.copy()
LEFT[0, 0], RIGHT[2, 0] = True, True  # two rows of 3 mm apart
DIAGONAL_MM = math.sqrt((4 * 3) ** 2 + (5 * 1) ** 2)  # 13


def scored(protocol, prediction, truth):
    return protocol(mask_pair(prediction, truth, SPACING_MM), 2.0)


def test_strict_both_empty_is_undefined():
    assert scored(strict, EMPTY, EMPTY) == UNDEFINED


def test_strict_missed_scores_0_and_the_diagonal():
    assert scored(strict, EMPTY, LEFT) == Score(dice=0, iou=0, hd95=DIAGONAL_MM, nsd=0, asd=DIAGONAL_MM)


def test_strict_invented_scores_0_and_the_diagonal():
    assert scored(strict, LEFT, EMPTY) == Score(dice=0, iou=0, hd95=DIAGONAL_MM, nsd=0, asd=DIAGONAL_MM)


def test_strict_both_there_is_measured_in_mm():
    assert scored(strict, LEFT, RIGHT) == Score(dice=0, iou=0, hd95=6, nsd=0, asd=6)


def test_paper_both_empty_scores_0_and_0():
    assert scored(paper, EMPTY, EMPTY) == Score(dice=0, iou=0, hd95=0, nsd=0, asd=0)


def test_paper_missed_scores_0_and_0():
    assert scored(paper, EMPTY, LEFT) == Score(dice=0, iou=0, hd95=0, nsd=0, asd=0)


def test_paper_invented_scores_1_and_0():
    assert scored(paper, LEFT, EMPTY) == Score(dice=1, iou=1, hd95=0, nsd=1, asd=0)


def test_paper_both_there_is_measured_in_voxels():
    assert scored(paper, LEFT, RIGHT) == Score(dice=0, iou=0, hd95=2, nsd=1, asd=2)


def test_nnunet_both_empty_is_undefined():
    assert scored(nnunet, EMPTY, EMPTY) == UNDEFINED


@pytest.mark.parametrize("masks", [(EMPTY, LEFT), (LEFT, EMPTY)], ids=["missed", "invented"])
def test_nnunet_one_empty_scores_0(masks):
    assert scored(nnunet, *masks) == Score(dice=0, iou=0, hd95=None, nsd=None)


def test_nnunet_counts_voxels():
    prediction, truth = np.zeros((2, 4, 5), bool)
    prediction[0, :3], truth[0, 1:5] = True, True  # TP 2, FP 1, FN 2
    assert scored(nnunet, prediction, truth) == Score(dice=2 * 2 / (2 * 2 + 1 + 2), iou=2 / 5, hd95=None, nsd=None)


def test_brats_both_empty_is_perfect():
    assert scored(brats, EMPTY, EMPTY) == Score(dice=1, iou=1, hd95=0, nsd=1, asd=0)


@pytest.mark.parametrize("masks", [(EMPTY, LEFT), (LEFT, EMPTY)], ids=["missed", "invented"])
def test_brats_one_empty_scores_0_and_373_13_mm(masks):
    assert scored(brats, *masks) == Score(dice=0, iou=0, hd95=BRATS_DIAGONAL_MM, nsd=0, asd=BRATS_DIAGONAL_MM)
    assert round(BRATS_DIAGONAL_MM, 2) == 373.13


def test_brats_both_there_is_measured_in_mm():
    assert scored(brats, LEFT, RIGHT) == Score(dice=0, iou=0, hd95=6, nsd=0, asd=6)


def test_brats_scores_a_region():
    prediction, truth = np.array([[1, 2, 4, 0]]), np.array([[4, 2, 0, 0]])
    regions = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4}
    scores = score_labels(prediction, truth, regions, (1.0, 1.0), protocol="brats")
    assert [scores[name].dice for name in regions] == [2 * 2 / 5, 2 * 1 / 3, 0]


@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if not protocol.needs_probabilities])
def test_equal_masks_are_perfect(name):
    score = scored(PROTOCOLS[name].score, LEFT | RIGHT, LEFT | RIGHT)
    assert (score.dice, score.iou) == (1, 1)
    assert (score.hd95, score.nsd, score.asd) in [(0, 1, 0), (None, None, None)]


@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7)], ids=["2d", "3d"])
@pytest.mark.parametrize("prediction_has", [False, True])
@pytest.mark.parametrize("truth_has", [False, True])
def test_paper_is_sameds_rule_on_medpy(shape, prediction_has, truth_has):
    """`calculate_metric_percase`: both there, medpy without spacing; only predicted, 1 and 0; otherwise 0 and 0."""
    medpy = pytest.importorskip("medpy.metric.binary")
    rng = np.random.default_rng(3)
    prediction, truth = (rng.random((2, *shape)) < 0.4) & np.reshape(
        [prediction_has, truth_has], (2, *[1] * len(shape))
    )
    spacing_mm = (2.5, 0.7, 0.9)[: len(shape)]
    score = paper(mask_pair(prediction, truth, spacing_mm), 2.0)
    if prediction_has and truth_has:
        expected = [medpy.dc(prediction, truth), medpy.hd95(prediction, truth)]
    else:
        expected = [1.0 if prediction_has else 0.0, 0.0]
    assert [score.dice, score.hd95] == pytest.approx(expected, abs=1e-9)


# --- probabilities --------------------------------------------------------------------------------

ONE_CLASS = {"organ": 1}


def scored_by_msa(probability, truth):
    probability, truth = np.array(probability, float), np.array(truth, np.uint8)
    label = (probability > 0.5).astype(np.uint8)
    one = {"organ": probability}
    spacing_mm = (1.0,) * truth.ndim
    return score_labels(label, truth, ONE_CLASS, spacing_mm, protocol="msa", probabilities=one)["organ"]


def test_msa_averages_over_five_thresholds():
    # Predicted pixels above 0.1, 0.3, 0.5, 0.7, 0.9: 4, 3, 2, 1, 0; the truth is the two most probable.
    score = scored_by_msa([[0.2, 0.4, 0.6, 0.8]], [[0, 0, 1, 1]])
    assert score.dice == pytest.approx((4 / 6 + 4 / 5 + 1 + 2 / 3 + 0) / 5)
    assert score.iou == pytest.approx((2 / 4 + 2 / 3 + 1 + 1 / 2 + 0) / 5)
    assert (score.hd95, score.nsd, score.asd) == (None, None, None)


def test_msa_is_of_slices_and_both_empty_is_1():
    # One slice as above; an empty one, 1 at every threshold; one where 0.6 is invented at three of five.
    probability = [[[0.2, 0.4, 0.6, 0.8]], [[0, 0, 0, 0.05]], [[0.6, 0, 0, 0]]]
    score = scored_by_msa(probability, [[[0, 0, 1, 1]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]])
    first = (4 / 6 + 4 / 5 + 1 + 2 / 3 + 0) / 5
    assert score.dice == pytest.approx((first + 1 + 2 / 5) / 3)


def test_msa_missed_scores_0():
    assert scored_by_msa([[0.0, 0.1]], [[1, 1]]).dice == 0


def test_msa_leaves_ignored_voxels_out():
    probability, truth = np.array([[0.95, 0.95, 0.0]]), np.array([[1, 9, 0]])
    label = np.array([[1, 1, 0]])
    rule = {"protocol": "msa", "probabilities": {"organ": probability}, "ignore": 9}
    assert score_labels(label, truth, ONE_CLASS, (1.0, 1.0), **rule)["organ"].dice == 1


@pytest.mark.parametrize("probabilities", [None, {}])
def test_msa_of_masks_alone_is_the_users_to_mend(probabilities):
    label = np.ones((2, 2), np.uint8)
    with pytest.raises(UserError, match=r"--protocol msa.*--predictions.*strict, paper, nnunet, brats") as error:
        score_labels(label, label, ONE_CLASS, (1.0, 1.0), protocol="msa", probabilities=probabilities)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="probabilities"):
        msa(mask_pair(LEFT, LEFT, SPACING_MM), 2.0)


def test_what_each_protocol_is_for():
    assert {name for name, protocol in PROTOCOLS.items() if protocol.in_voxels} == {"paper"}
    assert {name for name, protocol in PROTOCOLS.items() if protocol.works_on == "slices"} == {"msa"}
    assert {name for name, protocol in PROTOCOLS.items() if protocol.needs_probabilities} == {"msa"}


def test_hd95_is_max_directed_under_strict_and_pooled_under_paper():
    prediction, truth = np.zeros((2, 3, 19), bool)
    prediction[0], truth[0], truth[:, 0] = True, True, True  # worked out in test_metrics, trap 6
    pair = mask_pair(prediction, truth, (1.0, 1.0))
    assert strict(pair, 2.0).hd95 == pytest.approx(1)
    assert paper(pair, 2.0).hd95 == pytest.approx(0.05)


def test_score_labels_scores_every_class_of_the_dataset():
    prediction = np.array([[1, 1, 0, 2]], np.uint8)
    truth = np.array([[1, 1, 3, 0]], np.uint8)
    labels = {"hit": 1, "invented": 2, "missed": 3, "nowhere": 4}
    diagonal = math.sqrt(1 + 16)
    zero = {"dice": 0, "iou": 0, "hd95": diagonal, "nsd": 0, "asd": diagonal}
    assert score_labels(prediction, truth, labels, (1.0, 1.0)) == {
        "hit": Score(dice=1, iou=1, hd95=0, nsd=1, asd=0, volume_error=0),
        "invented": Score(**zero, invented=1),
        "missed": Score(**zero, volume_error=-1, missed=1),
        "nowhere": UNDEFINED,
    }
    paper_scores = score_labels(prediction, truth, labels, (1.0, 1.0), protocol="paper")
    assert paper_scores["invented"].dice == 1
    assert (paper_scores["invented"].invented, paper_scores["missed"].missed, paper_scores["hit"].missed) == (1, 1, 0)


def test_ignored_voxels_are_scored_under_no_protocol():
    prediction, truth = np.array([[1, 1, 0]]), np.array([[1, 9, 9]])
    for name in ("strict", "paper", "nnunet", "brats"):
        assert score_labels(prediction, truth, ONE_CLASS, (1.0, 1.0), protocol=name, ignore=9)["organ"].dice == 1


def test_unknown_protocol_is_the_users_to_mend():
    labels = np.zeros((2, 2), np.uint8)
    with pytest.raises(UserError, match=r"--protocol loose.*strict, paper"):
        score_labels(labels, labels, {"a": 1}, (1.0, 1.0), protocol="loose")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_never_holds_nan_or_inf(bad):
    with pytest.raises(ValueError, match="never nan"):
        Score(dice=bad, iou=None, hd95=None, nsd=None)
