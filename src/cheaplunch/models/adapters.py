"""The Medical SAM Adapter's network (Wu et al., arXiv:2304.12620, §2.2), on any `Sam`.

SAM stays frozen. Small bottlenecks are put into every attention block of the encoder and into the first block of the
decoder; what follows that block, and the mask head, are trained in full. Up-projections start at zero, so that the
first forward equals SAM. docs/msa.md gives each place's formula beside the paper's words, and what was decided where
they leave a choice. Written from the paper alone.

Adapted blocks take over the modules of the blocks that they replace: SAM's tensors keep their names. What is trained
is saved and loaded as of any network without LoRA (`lora.save_adapter`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cheaplunch.errors import UserError
from cheaplunch.models.depth import DepthBranch, Slab
from cheaplunch.models.lora import train_in_full
from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import AttentionStage, TinyViT, TinyViTBlock

BEHIND_FIRST_BLOCK = (
    "mask_decoder.transformer.layers.1",
    "mask_decoder.transformer.final_attn_token_to_image",
    "mask_decoder.transformer.layer_norm_final_attn",
)
"""Names, below the network, of the second block and what leads from it to the mask head: trained in full (§2.2)."""

PARTS = ("encoder", "decoder", "prompt", "depth")


@dataclass(frozen=True)
class AdapterSettings:
    """Which of the paper's parts, and what it does not state: the bottleneck's width and s, here as in its [4]."""

    parts: tuple[str, ...] = PARTS
    """encoder, decoder: adapters there. prompt: the decoder's first adapter sees the prompt (needs decoder). depth:
    the depth branch (needs encoder)."""
    width: int = 64
    """Channels of the bottleneck (Chen et al., "AdaptFormer", arXiv:2205.13535)."""
    scale: float = 0.1
    """s, of the adapters beside an MLP (AdaptFormer's)."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"--adapter-parts {part} is not known; choose from: {', '.join(PARTS)}")
        for part, base in (("prompt", "decoder"), ("depth", "encoder")):
            if part in self.parts and base not in self.parts:
                raise UserError(f"--adapter-parts has {part} without {base}, which it is part of; add {base}")


class Adapter(nn.Module):
    """Down, ReLU, up: (…, C) → (…, C), zero at the start.

    It has no residual connection of its own; where it stands in SAM's path, and not beside it, its input is added to
    what it gives.
    """

    def __init__(self, dim: int, width: int, generator: torch.Generator, prompted: bool = False):
        """`prompted`: the prompt embedding comes in by a down-projection of its own, added before the ReLU."""
        super().__init__()
        self.down = nn.Linear(dim, width)
        self.prompt_down = nn.Linear(dim, width, bias=False) if prompted else None  # `down` has a bias
        self.up = nn.Linear(width, dim)
        for linear in (self.down, self.prompt_down):
            if linear is not None:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        hidden = self.down(x)
        if self.prompt_down is not None:
            hidden = hidden + self.prompt_down(prompt)
        return self.up(F.relu(hidden))


class AdaptedViTBlock(GradientCheckpointingLayer):
    """A block of SAM's ViT with two adapters, and a depth branch beside its attention. (B, H, W, C) → the same."""

    def __init__(self, block: Any, settings: AdapterSettings, slab: Slab, generator: torch.Generator):
        super().__init__()
        self.layer_norm1 = block.layer_norm1
        self.attn = block.attn
        self.layer_norm2 = block.layer_norm2
        self.mlp = block.mlp
        self.after_attention, self.beside_mlp, self.depth = _encoder_parts(
            block.attn.proj.out_features, settings, slab, generator
        )
        self.scale = settings.scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        normed = self.layer_norm1(x)
        attended, _ = self.attn(normed)
        if self.depth is not None:
            attended = self.depth(attended, self.attn, normed)
        x = x + (attended + self.after_attention(attended))
        normed = self.layer_norm2(x)
        return x + self.mlp(normed) + self.scale * self.beside_mlp(normed)


class AdaptedTinyViTBlock(TinyViTBlock):
    """The same for a TinyViT's block, whose attention and MLP norm their input themselves."""

    def __init__(self, block: TinyViTBlock, settings: AdapterSettings, slab: Slab, generator: torch.Generator):
        nn.Module.__init__(self)
        self.window = block.window
        self.attn = block.attn
        self.local_conv = block.local_conv
        self.mlp = block.mlp
        self.after_attention, self.beside_mlp, self.depth = _encoder_parts(
            block.attn.proj.out_features, settings, slab, generator
        )
        self.scale = settings.scale

    def forward(self, x: Tensor) -> Tensor:
        attended = self._attend(x)
        if self.depth is not None:
            attended = self.depth(attended, self.attn, x)
        x = x + (attended + self.after_attention(attended))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x) + self.scale * self.beside_mlp(self.mlp.norm(x))


def _encoder_parts(
    dim: int, settings: AdapterSettings, slab: Slab, generator: torch.Generator
) -> tuple[Adapter, Adapter, DepthBranch | None]:
    after_attention = Adapter(dim, settings.width, generator)
    beside_mlp = Adapter(dim, settings.width, generator)
    return after_attention, beside_mlp, DepthBranch(dim, slab) if "depth" in settings.parts else None


class AdaptedTwoWayBlock(nn.Module):
    """The first block of SAM's decoder with three adapters.

    T prompt tokens (SAM's output tokens among them) and N image tokens of P prompts: (B, P, T, C) and (B · P, 1, N, C)
    as transformers lays them out.
    """

    def __init__(self, block: Any, settings: AdapterSettings, generator: torch.Generator):
        super().__init__()
        self.self_attn = block.self_attn
        self.layer_norm1 = block.layer_norm1
        self.cross_attn_token_to_image = block.cross_attn_token_to_image
        self.layer_norm2 = block.layer_norm2
        self.mlp = block.mlp
        self.layer_norm3 = block.layer_norm3
        self.cross_attn_image_to_token = block.cross_attn_image_to_token
        self.layer_norm4 = block.layer_norm4
        dim = block.hidden_size
        self.after_cross_attention = Adapter(dim, settings.width, generator, prompted="prompt" in settings.parts)
        self.beside_mlp = Adapter(dim, settings.width, generator)
        self.on_image = Adapter(dim, settings.width, generator)
        self.scale = settings.scale

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        query_point_embedding: Tensor,
        key_point_embedding: Tensor,
        attention_similarity: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt tokens, image tokens, and what SAM adds to each before it attends → both, and the last attention."""
        attended, _ = self.self_attn(query=queries, key=queries, value=queries)  # as SAM's first block: nothing added
        queries = self.layer_norm1(attended)

        prompt = queries + query_point_embedding
        attended, _ = self.cross_attn_token_to_image(
            query=prompt, key=keys + key_point_embedding, value=keys, attention_similarity=attention_similarity
        )
        attended = attended + self.after_cross_attention(attended, prompt)
        queries = self.layer_norm2(queries + attended)

        queries = self.layer_norm3(queries + self.mlp(queries) + self.scale * self.beside_mlp(queries))

        attended, _ = self.cross_attn_image_to_token(
            query=keys + key_point_embedding, key=queries + query_point_embedding, value=queries
        )
        keys = keys + attended
        keys = self.layer_norm4(keys + self.on_image(keys))
        return queries, keys, attended


def add_adapters(
    network: Sam, settings: AdapterSettings, generator: torch.Generator, trained: Sequence[str] = ()
) -> None:
    """Freezes `network` and puts the parts of `settings` into it, drawn with `generator`.

    Trained in full: the decoder's second block, and the modules that `trained` names, which are the mask head's.
    """
    train_in_full(network, [*BEHIND_FIRST_BLOCK, *trained])
    if "encoder" in settings.parts:
        _adapt_encoder(network, settings, generator)
    if "decoder" in settings.parts:
        layers: Any = network.mask_decoder.transformer.layers
        layers[0] = AdaptedTwoWayBlock(layers[0], settings, generator)


def _adapt_encoder(network: Sam, settings: AdapterSettings, generator: torch.Generator) -> None:
    """Every attention block; TinyViT's first stage has none, and stays as it is."""
    encoder: Any = network.vision_encoder
    slab = Slab()
    if isinstance(encoder, TinyViT):
        stages: list[Any] = [stage for stage in encoder.layers if isinstance(stage, AttentionStage)]
        for stage in stages:
            stage.blocks = nn.ModuleList(AdaptedTinyViTBlock(b, settings, slab, generator) for b in stage.blocks)
    else:
        encoder.layers = nn.ModuleList(AdaptedViTBlock(b, settings, slab, generator) for b in encoder.layers)
    if "depth" in settings.parts:
        encoder.register_forward_pre_hook(slab.begin)
