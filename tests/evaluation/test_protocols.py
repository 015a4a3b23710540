"""Every combination of empty and non-empty masks, under every protocol, and the unit each measures in."""

import math

import numpy as np
import pytest

from cheaplunch.errors import UserError
from cheaplunch.evaluation.metrics import mask_pair
from cheaplunch.evaluation.protocols import PROTOCOLS, UNDEFINED, Score, paper, score_labels, strict

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
    assert scored(strict, EMPTY, LEFT) == Score(dice=0, iou=0, hd95=DIAGONAL_MM, nsd=0)


def test_strict_invented_scores_0_and_the_diagonal():
    assert scored(strict, LEFT, EMPTY) == Score(dice=0, iou=0, hd95=DIAGONAL_MM, nsd=0)


def test_strict_both_there_is_measured_in_mm():
    assert scored(strict, LEFT, RIGHT) == Score(dice=0, iou=0, hd95=6, nsd=0)


def test_paper_both_empty_scores_0_and_0():
    assert scored(paper, EMPTY, EMPTY) == Score(dice=0, iou=0, hd95=0, nsd=0)


def test_paper_missed_scores_0_and_0():
    assert scored(paper, EMPTY, LEFT) == Score(dice=0, iou=0, hd95=0, nsd=0)


def test_paper_invented_scores_1_and_0():
    assert scored(paper, LEFT, EMPTY) == Score(dice=1, iou=1, hd95=0, nsd=1)


def test_paper_both_there_is_measured_in_voxels():
    assert scored(paper, LEFT, RIGHT) == Score(dice=0, iou=0, hd95=2, nsd=1)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_equal_masks_are_perfect(name):
    assert scored(PROTOCOLS[name].score, LEFT | RIGHT, LEFT | RIGHT) == Score(dice=1, iou=1, hd95=0, nsd=1)


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
    zero = Score(dice=0, iou=0, hd95=diagonal, nsd=0)
    assert score_labels(prediction, truth, labels, (1.0, 1.0)) == {
        "hit": Score(dice=1, iou=1, hd95=0, nsd=1),
        "invented": zero,
        "missed": zero,
        "nowhere": UNDEFINED,
    }
    assert score_labels(prediction, truth, labels, (1.0, 1.0), protocol="paper")["invented"].dice == 1


def test_unknown_protocol_is_the_users_to_mend():
    labels = np.zeros((2, 2), np.uint8)
    with pytest.raises(UserError, match=r"--protocol loose.*strict, paper"):
        score_labels(labels, labels, {"a": 1}, (1.0, 1.0), protocol="loose")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_never_holds_nan_or_inf(bad):
    with pytest.raises(ValueError, match="never nan"):
        Score(dice=bad, iou=None, hd95=None, nsd=None)
