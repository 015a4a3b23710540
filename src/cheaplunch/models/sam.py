"""SAM's three parts as one plain module, whatever the image encoder.

Prompt encoder, mask decoder and the ViT are transformers'. `SamModel` itself is not kept: it runs the encoder
without gradients and expects it to be its own, and peft wants a module without such expectations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamVisionEncoder

from cheaplunch.errors import UserError
from cheaplunch.models.layouts import to_transformers
from cheaplunch.models.vit import with_own_attention


@dataclass(frozen=True)
class PixelNorm:
    """What a network was trained to see: (value − mean) / std of each colour, for values in [0, 1]."""

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


AS_IS = PixelNorm()
IMAGENET = PixelNorm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""SAM's own, which it states on the scale of 0 to 255: 123.675 is 0.485 · 255."""


class Sam(nn.Module):
    """An image encoder with SAM's prompt encoder and mask decoder behind it.

    transformers' parts are built without memory: every tensor is taken over from a checkpoint (`layouts.fill`).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: SamConfig, vision_encoder: nn.Module | None = None, norm: PixelNorm = AS_IS):
        """Without a `vision_encoder` it is the ViT of `config`."""
        super().__init__()
        with torch.device("meta"):
            model = SamModel(config)
            if vision_encoder is None:
                vision_encoder = with_own_attention(model.vision_encoder)
        self.config = config
        self.norm = norm
        self.vision_encoder = vision_encoder
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder
        self.text_projection: nn.Module | None = None
        """Embeddings of texts (…, E) → prompt tokens (…, tokens, 256), where the network is asked by texts."""
        self.register_buffer("pixel_mean", torch.tensor(norm.mean)[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("pixel_std", torch.tensor(norm.std)[:, None, None], persistent=False)

    def encode(self, images: Tensor, shown_px: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) in [0, 1] → (B, 256, S / stride, S / stride).

        `shown_px` (B, 2) is the width and height of each image in its square. SAM normalises first and pads with
        zeros after it, so what lies to the right of and below an image is set to zero here. Without it padding counts
        as black. Where a network takes [0, 1] as it is, the two are the same.
        """
        if self.norm != AS_IS:
            images = (images - self.pixel_mean) / self.pixel_std
            if shown_px is not None:
                images = images * _inside(shown_px.to(images.device), images.shape[-1])
        embedding = self.vision_encoder(images)
        return embedding if isinstance(embedding, Tensor) else embedding.last_hidden_state

    def decode(
        self,
        embeddings: Tensor,
        points_xy: Tensor | None = None,
        point_labels: Tensor | None = None,
        boxes_xyxy: Tensor | None = None,
        masks: Tensor | None = None,
        texts: Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """B embeddings, P prompts on each → logits (B, P, O, 4 h, 4 w) and predicted IoU (B, P, O) of O outputs.

        Points (B, P, K, 2) with labels (B, P, K), boxes (B, P, 4), both in px of the input, masks (B, P, 4 h, 4 w) of
        logits, and texts (B, P, E) for the `text_projection`; any of them, or none, which is one prompt an image. O is
        1, or with `multimask` the other tokens' outputs. The batch stays B: every image has its own prompts.
        """
        prompts = (points_xy, point_labels, boxes_xyxy, texts)
        if masks is None:
            return self._decode(embeddings, *prompts, None, multimask)
        # transformers takes one mask an image: so each prompt gets an image of its own, and comes back to its image.
        batch, count = masks.shape[:2]
        prompts = (None if t is None else t.flatten(0, 1)[:, None] for t in prompts)
        logits, quality = self._decode(
            embeddings.repeat_interleave(count, 0),  # (B P, 256, h, w)
            *prompts,
            masks.flatten(0, 1)[:, None],  # (B P, 1, 4 h, 4 w)
            multimask,
        )  # (B P, 1, O, …)
        return logits.unflatten(0, (batch, count)).squeeze(2), quality.unflatten(0, (batch, count)).squeeze(2)

    def _decode(
        self,
        embeddings: Tensor,
        points_xy: Tensor | None,
        point_labels: Tensor | None,
        boxes_xyxy: Tensor | None,
        texts: Tensor | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(embeddings.device.type, enabled=False):  # bf16 positions of near pixels would coincide
            sparse, dense = self.prompt_encoder(points_xy, point_labels, boxes_xyxy, masks)
            if texts is not None:
                tokens = self._project(texts)  # (B, P, tokens, 256)
                sparse = tokens if sparse is None else torch.cat([sparse, tokens], dim=2)
            positions = self.positions()  # (1, 256, h, w)
        return self.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=positions.repeat(len(embeddings), 1, 1, 1),
            sparse_prompt_embeddings=sparse,  # (B, P, tokens, 256), or None
            dense_prompt_embeddings=dense,  # (B or 1, 256, h, w)
            multimask_output=multimask,
        )

    def _project(self, texts: Tensor) -> Tensor:
        if self.text_projection is None:
            raise ValueError("the network was not built for texts")
        return self.text_projection(texts)

    def checkpoint_encoder(self) -> None:
        """Keeps each encoder block's input only, in training, and computes the block again for its gradients."""
        encoder: Any = self.vision_encoder
        # transformers renamed it on the way to version 6, and warns of the old name.
        getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()

    def positions(self) -> Tensor:
        """(1, 256, h, w): the positional embedding of every cell's centre, random Fourier features of (x, y)."""
        height, width = self.prompt_encoder.image_embedding_size
        fourier = self.prompt_encoder.shared_embedding.positional_embedding
        y = (torch.arange(height, device=fourier.device) + 0.5) / height
        x = (torch.arange(width, device=fourier.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2) as (x, y) in 0…1
        return self.prompt_encoder.shared_embedding(grid).permute(2, 0, 1)[None]


@torch.no_grad()
def as_sam_model(network: Sam) -> SamModel:
    """A network with a ViT as transformers' own model, q, k and v fused again: for `save_pretrained`, and for others.

    `network` is plain (`lora.merge`). The tensors are shared but for the fused ones. Raises UserError for a TinyViT and
    for adapters, which transformers does not have.
    """
    if not isinstance(network.vision_encoder, SamVisionEncoder):
        raise UserError("a TinyViT cannot be written as a transformers model; export it as safetensors")
    with torch.device("meta"):
        model = SamModel(network.config)
    if network.state_dict().keys() != Sam(network.config).state_dict().keys():
        raise UserError("a network with adapters cannot be written as a transformers model; export it as safetensors")
    model.load_state_dict(to_transformers(network.state_dict()), strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _inside(shown_px: Tensor, side: int) -> Tensor:
    """Widths and heights (B, 2) → (B, 1, S, S) bool: where each square shows its image."""
    ticks = torch.arange(side, device=shown_px.device)
    columns, rows = (ticks < length[:, None] for length in shown_px.unbind(1))  # (B, S) each
    return (rows[:, :, None] & columns[:, None, :])[:, None]
