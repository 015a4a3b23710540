"""SAM's three parts as one plain module, whatever the image encoder.

Prompt encoder and mask decoder are transformers'. `SamModel` itself is not kept: it runs the encoder
without gradients and expects it to be its own, and peft wants a module without such expectations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamModel


class Sam(nn.Module):
    """An image encoder with SAM's prompt encoder and mask decoder behind it."""

    def __init__(self, vision_encoder: nn.Module, config: SamConfig):
        super().__init__()
        model = SamModel(config)
        self.vision_encoder = vision_encoder
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder

    def positions(self) -> Tensor:
        """(1, 256, h, w): the positional embedding of every cell's centre, random Fourier features of (x, y)."""
        height, width = self.prompt_encoder.image_embedding_size
        fourier = self.prompt_encoder.shared_embedding.positional_embedding
        y = (torch.arange(height, device=fourier.device) + 0.5) / height
        x = (torch.arange(width, device=fourier.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2) as (x, y) in 0…1
        return self.prompt_encoder.shared_embedding(grid).permute(2, 0, 1)[None]
