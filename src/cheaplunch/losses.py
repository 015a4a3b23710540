"""L = λ1 · cross-entropy + λ2 · Dice (Cheap Lunch §3.3): of a prompt's target, or of all classes at once (SAMed)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELLED = 255  # in a label map: nobody said what is there


def segmentation_loss(
    outputs: Tensor, targets: Tensor, ce_weight: float, dice_weight: float, together: bool = False
) -> Tensor:
    """Outputs (…, 2, h, w), background and target, against targets (…, H, W) bool, at least one leading axis: a scalar.

    Where an encoder's outputs are coarser than its input the targets are brought to them, as SAMed does.
    Soft Dice is of the target, per mask, over the probabilities: 1 − 2|P·T| / (|P| + |T|), as SAMed's without
    the squares; cross-entropy is over both outputs, per pixel. A mask that should be empty has a Dice loss of 1
    whatever it is, and so no gradient; with `together` the masks (…, P, 2, h, w) of an image, of prompts that may ask
    for what it does not show, count as one mask P times as large.
    """
    flat, truth = outputs.flatten(0, -4), targets.flatten(0, -3)  # (M, 2, h, w), (M, H, W)
    truth = _at(truth, flat.shape[-2:])  # (M, h, w)
    cross_entropy = F.cross_entropy(flat, truth.long())
    probability = flat.softmax(dim=1)[:, 1]  # (M, h, w)
    truth = truth.to(probability.dtype)
    overlap = (probability * truth).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + truth.sum(dim=(1, 2))
    if together:
        overlap, total = (one.unflatten(0, outputs.shape[:-3]).sum(dim=-1) for one in (overlap, total))
    dice = 1 - 2 * overlap / total.clamp(min=1e-6)
    return ce_weight * cross_entropy + dice_weight * dice.mean()


def class_loss(outputs: Tensor, labels: Tensor, ce_weight: float, dice_weight: float) -> Tensor:
    """Outputs (…, K + 1, h, w), background first, against label maps (…, H, W) of 0…K, uint8: a scalar.

    Maps with UNLABELLED pixels do not count; at least one must be without.

    As SAMed's: cross-entropy per pixel, and the mean over all outputs, the background among them, of soft Dice over
    the whole batch with squares, 1 − 2 ΣPT / (ΣP² + ΣT²). A class that the batch does not show has a Dice loss of 1
    as soon as it is seen anywhere at all.
    """
    flat, truth = outputs.flatten(0, -4), labels.flatten(0, -3)  # (B, K + 1, h, w), (B, H, W)
    labelled = (truth != UNLABELLED).flatten(1).all(dim=1)
    flat, truth = flat[labelled], _at(truth[labelled], flat.shape[-2:]).long()
    cross_entropy = F.cross_entropy(flat, truth)
    probability = flat.softmax(dim=1)
    shown = F.one_hot(truth, flat.shape[1]).movedim(-1, 1).to(probability.dtype)  # (B, K + 1, h, w)
    overlap = (probability * shown).sum(dim=(0, 2, 3))
    total = probability.square().sum(dim=(0, 2, 3)) + shown.sum(dim=(0, 2, 3))
    dice = 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)
    return ce_weight * cross_entropy + dice_weight * dice.mean()


SMOOTH = 1e-5  # SAMed's


def _at(targets: Tensor, shape: torch.Size) -> Tensor:
    """Masks or label maps (M, H, W) at the outputs' own pixels (M, h, w)."""
    if targets.shape[-2:] == shape:
        return targets
    return F.interpolate(targets[:, None].float(), shape, mode="nearest-exact")[:, 0].to(targets.dtype)
