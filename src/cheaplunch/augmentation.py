"""SAMed's augmentation: half of the images are turned by quarters and flipped, half of the others rotated a little.

Only what an image shows moves, not the square it is padded to. SAMed reads both image and label at the nearest pixel
where it rotates; here the image is read bilinearly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cheaplunch.synthesis import Batch

ROTATION_DEG = 20.0


def augment(batch: Batch, generators: Sequence[torch.Generator]) -> Batch:
    """The batch with each image and its label moved as one, as its own generator says."""
    images, labels, sizes = torch.zeros_like(batch.images), torch.zeros_like(batch.labels), batch.sizes.clone()
    for n, generator in enumerate(generators):
        width, height = batch.sizes[n].tolist()
        image, label = batch.images[n, :, :height, :width], batch.labels[n, ..., :height, :width]
        moved, outlined = _augmented(image, label, generator)
        height, width = outlined.shape[-2:]
        images[n, :, :height, :width], labels[n, ..., :height, :width] = moved, outlined
        sizes[n, 0], sizes[n, 1] = width, height
    return Batch(images, labels, sizes)


def _augmented(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(C, h, w) and (…, h, w), and the same turned, rotated or as they were."""
    turned, rotated, angle = torch.rand(3, generator=generator).tolist()
    quarters, axis = torch.randint(4, (2,), generator=generator).tolist()
    if turned > 0.5:
        flipped = -1 - axis % 2
        return image.rot90(quarters, (-2, -1)).flip(flipped), label.rot90(quarters, (-2, -1)).flip(flipped)
    if rotated > 0.5:
        return rotate(image, label, (2 * angle - 1) * ROTATION_DEG)
    return image, label


def rotate(image: Tensor, label: Tensor, angle_deg: float) -> tuple[Tensor, Tensor]:
    """(C, h, w) and (…, h, w) about their middle, keeping their shape; black and background come in at the corners."""
    height, width = label.shape[-2:]
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    # affine_grid's units are half a side, which differs in x and y.
    matrix = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], device=image.device)
    places = F.affine_grid(matrix[None], [1, 1, height, width], align_corners=False)
    moved = F.grid_sample(image[None], places, mode="bilinear", align_corners=False)[0]
    flat = label.reshape(1, -1, height, width).float()
    outlined = F.grid_sample(flat, places, mode="nearest", align_corners=False)
    return moved, outlined.view(label.shape).to(label.dtype)
