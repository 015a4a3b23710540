import math

import pytest
import torch
from monai.losses import DiceCELoss

from cheaplunch.losses import segmentation_loss


def test_by_hand():
    # target logit − background logit      probability of target      truth
    #         0    ln 3                        1/2  3/4                 1 0
    #        ln 3    0                         3/4  1/2                 1 0
    # CE = −(ln 1/2 + ln 1/4 + ln 3/4 + ln 1/2) / 4;  Dice = 1 − 2 · 1.25 / (2.5 + 2)
    log3 = math.log(3)
    outputs = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0 + log3], [3.0 + log3, 4.0]]]])  # (1, 2, 2, 2)
    truth = torch.tensor([[[True, False], [True, False]]])
    cross_entropy = -math.log(0.5 * 0.25 * 0.75 * 0.5) / 4
    dice = 1 - 2.5 / 4.5
    for ce_weight, dice_weight in ((1, 0), (0, 1), (1, 0.8)):
        loss = segmentation_loss(outputs, truth, ce_weight, dice_weight)
        assert loss.item() == pytest.approx(ce_weight * cross_entropy + dice_weight * dice, abs=1e-6)


def test_parity_with_monai():
    torch.manual_seed(0)
    outputs = torch.randn(2, 3, 2, 9, 7) * 3  # (B, P, 2, H, W)
    truth = torch.rand(2, 3, 9, 7) < torch.tensor([0.05, 0.3, 0.7])[:, None, None]
    monai = DiceCELoss(
        softmax=True, to_onehot_y=True, include_background=False, lambda_ce=1.0, lambda_dice=0.8, smooth_nr=0
    )
    expected = monai(outputs.flatten(0, 1), truth.flatten(0, 1)[:, None].long())
    torch.testing.assert_close(segmentation_loss(outputs, truth, 1.0, 0.8), expected, atol=1e-5, rtol=0)


def test_dice_is_of_each_mask_so_that_a_small_one_counts_as_a_large_one():
    outputs = torch.full((1, 2, 2, 10, 10), 0.0)
    outputs[:, :, 0] = 20.0  # both masks are missed
    truth = torch.zeros(1, 2, 10, 10, dtype=torch.bool)
    truth[0, 0, 0, 0] = truth[0, 1, :, :5] = True
    assert segmentation_loss(outputs, truth, 0, 1).item() == pytest.approx(1, abs=1e-6)
    outputs[0, 0, 1] = torch.where(truth[0, 0], 40.0, 0.0)  # the small one is found: half the loss goes
    assert segmentation_loss(outputs, truth, 0, 1).item() == pytest.approx(0.5, abs=1e-6)


def test_targets_come_to_coarser_outputs():
    # 4 × 4 targets, 2 × 2 outputs: the middles of the quarters are read, and a perfect answer costs nothing.
    target = torch.zeros(1, 4, 4, dtype=torch.bool)
    target[0, :2, :2] = True
    logits = torch.where(torch.tensor([[True, False], [False, False]]), 40.0, -40.0)
    outputs = torch.stack([torch.zeros(2, 2), logits])[None]  # (1, 2, 2, 2)
    assert segmentation_loss(outputs, target, 1.0, 0.8).item() < 1e-6
