"""L = λ1 · cross-entropy + λ2 · Dice (Cheap Lunch §3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def segmentation_loss(outputs: Tensor, targets: Tensor, ce_weight: float, dice_weight: float) -> Tensor:
    """Outputs (…, 2, h, w), background and target, against targets (…, H, W) bool, at least one leading axis: a scalar.

    Where an encoder's outputs are coarser than its input the targets are brought to them, as SAMed does.
    Soft Dice is of the target, per mask, over the probabilities: 1 − 2|P·T| / (|P| + |T|), as SAMed's without
    the squares; cross-entropy is over both outputs, per pixel.
    """
    flat, truth = outputs.flatten(0, -4), targets.flatten(0, -3)  # (M, 2, h, w), (M, H, W)
    if truth.shape[-2:] != flat.shape[-2:]:
        truth = F.interpolate(truth[:, None].float(), flat.shape[-2:], mode="nearest-exact")[:, 0] > 0.5  # (M, h, w)
    cross_entropy = F.cross_entropy(flat, truth.long())
    probability = flat.softmax(dim=1)[:, 1]  # (M, h, w)
    truth = truth.to(probability.dtype)
    overlap = (probability * truth).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + truth.sum(dim=(1, 2))
    dice = 1 - 2 * overlap / total.clamp(min=1e-6)
    return ce_weight * cross_entropy + dice_weight * dice.mean()
