"""Our network under the names of the original packages, so that their code opens it: `layouts.our_names` backwards.

segment-anything for a ViT; MobileSAM's and LiteMedSAM's for a TinyViT, which are alike.
"""

from __future__ import annotations

import re

import torch
from transformers.models.sam.modeling_sam import SamVisionEncoder

from cheaplunch.models.heads import BACKGROUND, TARGET, Head
from cheaplunch.models.layouts import PROJECTIONS, Names, State
from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import TinyViT

_DECODER: Names = (
    (r"\.layer_norm(\d|_final_attn)\.", r".norm\1."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"(_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.layers.1."),
    (r"(_mlps\.\d+|iou_prediction_head)\.proj_in\.", r"\1.layers.0."),
    (r"(_mlps\.\d+|iou_prediction_head)\.proj_out\.", r"\1.layers.2."),
)
_PROMPT_ENCODER: Names = (
    (r"\.shared_embedding\.positional_embedding$", ".pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
)
_VIT: Names = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.layers\.(\d+)\.layer_norm(\d)\.", r".layers.\1.norm\2."),
    (r"\.layers\.", ".blocks."),
    (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."),
    (r"\.neck\.layer_norm2\.", ".neck.3."),
)
_TINY_VIT: Names = ((r"^vision_encoder\.", "image_encoder."),)

_NORM_EPS = 1e-5  # of the batch norms in a TinyViT
_IMAGENET_CLASSES = 1000

MASK_TOKENS = {"two": (TARGET, BACKGROUND, 0, 3), "single": (0, 1, 2, 3)}
"""Head → which of our tokens stands in each place of SAM's four. The target takes that of SAM's single mask.

Tokens carry no order: all that follows from moving them is which output comes when.
"""


def to_original(network: Sam, head: Head) -> State:
    """A merged network → the state dict that the original's own code loads, tensors shared where they are the same.

    With two outputs, `multimask_output=False` is then the target's logit, the first mask of `multimask_output=True`
    the background's, and what we predict from is their difference. No file of this layout can hold that difference as
    one mask: each is a small MLP of its own token's state, and after the decoder's last self-attention no token's
    state knows of another's.
    """
    state = _reordered(network.state_dict(), MASK_TOKENS[head])
    vit = isinstance(network.vision_encoder, SamVisionEncoder)
    rooms = {"vision_encoder": _VIT if vit else _TINY_VIT, "prompt_encoder": _PROMPT_ENCODER, "mask_decoder": _DECODER}
    original: State = {}
    for name, tensor in state.items():
        renamed = name
        for pattern, replacement in rooms[name.partition(".")[0]]:
            renamed = re.sub(pattern, replacement, renamed)
        original[renamed] = tensor
    original = _fused(original, ".attn.qkv.") if vit else _fused(_with_norms(original), ".attn.")
    if isinstance(network.vision_encoder, TinyViT) and network.vision_encoder.config.patch_stride == 4:
        original |= _classifier(network.vision_encoder.config.embed_dims[-1])
    return {name: tensor.detach().cpu().contiguous() for name, tensor in original.items()}


def _reordered(state: State, order: tuple[int, ...]) -> State:
    """The decoder's four mask tokens, with what belongs to each, in another order."""
    hypernetworks = "mask_decoder.output_hypernetworks_mlps."
    moved = {}
    for name, tensor in state.items():
        if name.startswith(hypernetworks):
            token, _, rest = name.removeprefix(hypernetworks).partition(".")
            moved[f"{hypernetworks}{order.index(int(token))}.{rest}"] = tensor
        elif name == "mask_decoder.mask_tokens.weight" or ".iou_prediction_head.proj_out." in name:
            moved[name] = tensor[list(order)]
        else:
            moved[name] = tensor
    return moved


def _fused(state: State, place: str) -> State:
    """q, k and v as one: [q | k | v] in a ViT; [head][q | k | v] in a TinyViT, whose biases say how many heads."""
    fused = {}
    for name, tensor in state.items():
        if not name.startswith("image_encoder.") or not any(f"{place}{p}." in name for p in PROJECTIONS):
            fused[name] = tensor
        elif f"{place}q_proj." in name:
            parts = [state[name.replace("q_proj", projection)] for projection in PROJECTIONS]
            if place == ".attn.qkv.":
                fused[name.replace("q_proj.", "")] = torch.cat(parts)
            else:
                heads = len(state[re.sub(r"q_proj\.\w+$", "attention_biases", name)])
                by_head = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1)  # (heads, 3, C', …)
                fused[name.replace("q_proj", "qkv")] = by_head.flatten(0, 2)
    return fused


def _with_norms(state: State) -> State:
    """A TinyViT with the batch norms that its convolutions have absorbed, now adding the bias and nothing else."""
    full: State = {}
    for name, tensor in state.items():
        if not name.endswith(".c.bias"):
            full[name] = tensor
            continue
        norm = f"{name.removesuffix('c.bias')}bn."
        gain = torch.full_like(tensor, (1 + _NORM_EPS) ** 0.5)  # over the root of variance + eps: 1
        full |= {f"{norm}weight": gain, f"{norm}bias": tensor}
        full |= {f"{norm}running_mean": torch.zeros_like(tensor), f"{norm}running_var": torch.ones_like(tensor)}
        full[f"{norm}num_batches_tracked"] = torch.tensor(0)
    return full


def _classifier(width: int) -> State:
    """Zeros for the ImageNet classifier that MobileSAM's code builds, loads and never calls."""
    shapes = {"norm_head.weight": (width,), "norm_head.bias": (width,)}
    shapes |= {"head.weight": (_IMAGENET_CLASSES, width), "head.bias": (_IMAGENET_CLASSES,)}
    return {f"image_encoder.{name}": torch.zeros(shape) for name, shape in shapes.items()}
