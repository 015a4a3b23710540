import math

import pytest
import torch
from monai.losses import DiceCELoss

from cheaplunch.losses import class_loss, segmentation_loss


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


def test_together_what_is_marked_for_a_target_that_is_not_there_costs():
    # A mask found, and an empty one of which half is marked: Dice is 2 · 50 / (50 + 50 + 50) of both, 1 and 0 of each.
    truth = torch.zeros(1, 2, 10, 10, dtype=torch.bool)
    truth[0, 0, :, :5] = True
    logits = torch.full((1, 2, 10, 10), -40.0)
    logits[..., :5] = 40.0
    logits.requires_grad_()
    outputs = torch.stack([torch.zeros_like(logits), logits], dim=2)
    assert segmentation_loss(outputs, truth, 0, 1, together=True).item() == pytest.approx(1 / 3, abs=1e-6)
    assert segmentation_loss(outputs, truth, 0, 1).item() == pytest.approx(0.5, abs=1e-6)
    soft = outputs / 80
    for together in (True, False):
        [gradient] = torch.autograd.grad(segmentation_loss(soft, truth, 0, 1, together), logits, retain_graph=True)
        assert (
            (gradient[0, 1] > 0).all() == together == gradient[0, 1].any()
        )  # less would be better, or is all the same
    # Images stay apart: of two, the mean.
    both = segmentation_loss(
        torch.cat([outputs, outputs[:, [0, 0]]]), truth[:, [0, 1, 0, 0]].view(2, 2, 10, 10), 0, 1, True
    )
    assert both.item() == pytest.approx(1 / 6, abs=1e-6)


def test_targets_come_to_coarser_outputs():
    # 4 × 4 targets, 2 × 2 outputs: the middles of the quarters are read, and a perfect answer costs nothing.
    target = torch.zeros(1, 4, 4, dtype=torch.bool)
    target[0, :2, :2] = True
    logits = torch.where(torch.tensor([[True, False], [False, False]]), 40.0, -40.0)
    outputs = torch.stack([torch.zeros(2, 2), logits])[None]  # (1, 2, 2, 2)
    assert segmentation_loss(outputs, target, 1.0, 0.8).item() < 1e-6


# ---- all classes at once


def test_classes_by_hand():
    # Two pixels, three outputs: probabilities 1/2 1/4 1/4 where class 1 is, 1/5 1/5 3/5 where the background is.
    outputs = torch.tensor([[2.0, 1.0], [1.0, 1.0], [1.0, 3.0]]).log()[None, None, :, None]  # (1, 1, 3, 1, 2)
    labels = torch.tensor([[[[1, 0]]]], dtype=torch.uint8)
    cross_entropy = -(math.log(1 / 4) + math.log(1 / 5)) / 2
    dice = [
        1 - 2 * (1 / 5) / (1 / 4 + 1 / 25 + 1),  # background: ΣP² = 1/4 + 1/25, ΣT² = 1
        1 - 2 * (1 / 4) / (1 / 16 + 1 / 25 + 1),
        1,  # the batch does not show it, and it is seen
    ]
    for ce_weight, dice_weight in ((1, 0), (0, 1), (0.2, 0.8)):
        loss = class_loss(outputs, labels, ce_weight, dice_weight)
        assert loss.item() == pytest.approx(ce_weight * cross_entropy + dice_weight * sum(dice) / 3, abs=1e-4)


def test_classes_parity_with_monai():
    torch.manual_seed(0)
    outputs = torch.randn(3, 1, 5, 9, 7) * 3
    labels = torch.randint(5, (3, 1, 9, 7)).to(torch.uint8)
    monai = DiceCELoss(
        softmax=True,
        to_onehot_y=True,
        squared_pred=True,
        batch=True,
        lambda_ce=0.2,
        lambda_dice=0.8,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    expected = monai(outputs[:, 0], labels.long())
    torch.testing.assert_close(class_loss(outputs, labels, 0.2, 0.8), expected, atol=1e-5, rtol=0)


def test_labels_come_to_coarser_outputs_without_mixing_classes():
    labels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    labels[..., :4, :4], labels[..., 4:, 4:] = 3, 1
    outputs = torch.full((1, 1, 4, 2, 2), -40.0)
    outputs[0, 0, 3, 0, 0] = outputs[0, 0, 1, 1, 1] = outputs[0, 0, 0, 0, 1] = outputs[0, 0, 0, 1, 0] = 40.0
    assert class_loss(outputs, labels, 1.0, 0.0).item() < 1e-6
