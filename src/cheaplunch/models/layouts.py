"""Checkpoints: reading them safely, and what each publisher calls its tensors.

The only file that knows key names other than ours, which are those of `models.sam.Sam`: transformers' but for q, k and
v, three projections here. Every tensor of a checkpoint must find its place and every parameter of the network must be
filled; anything else is an error that lists the tensors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cheaplunch.errors import UserError

State = dict[str, Tensor]
Names = tuple[tuple[str, str], ...]

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# What segment-anything, and all that took over its prompt encoder and mask decoder, call a part of a name, and what we
# do; # is a number. Theirs become ours from the first line to the last, ours theirs from the last to the first.
_DECODER: Names = (
    (".norm#.", ".layer_norm#."),
    (".norm_final_attn.", ".layer_norm_final_attn."),
    (".output_upscaling.0.", ".upscale_conv1."),
    (".output_upscaling.1.", ".upscale_layer_norm."),
    (".output_upscaling.3.", ".upscale_conv2."),
    ("_mlps.#.layers.0.", "_mlps.#.proj_in."),
    ("_mlps.#.layers.1.", "_mlps.#.layers.0."),
    ("_mlps.#.layers.2.", "_mlps.#.proj_out."),
    (".iou_prediction_head.layers.0.", ".iou_prediction_head.proj_in."),
    (".iou_prediction_head.layers.1.", ".iou_prediction_head.layers.0."),
    (".iou_prediction_head.layers.2.", ".iou_prediction_head.proj_out."),
    (".pe_layer.positional_encoding_gaussian_matrix", ".shared_embedding.positional_embedding"),
    (".point_embeddings.", ".point_embed."),
    (".mask_downscaling.0.", ".mask_embed.conv1."),
    (".mask_downscaling.1.", ".mask_embed.layer_norm1."),
    (".mask_downscaling.3.", ".mask_embed.conv2."),
    (".mask_downscaling.4.", ".mask_embed.layer_norm2."),
    (".mask_downscaling.6.", ".mask_embed.conv3."),
)
_TINY_VIT: Names = (("image_encoder.", "vision_encoder."),)
_VIT: Names = (
    *_TINY_VIT,
    (".patch_embed.proj.", ".patch_embed.projection."),
    (".norm#.", ".layer_norm#."),
    (".blocks.", ".layers."),
    (".neck.0.", ".neck.conv1."),
    (".neck.1.", ".neck.layer_norm1."),
    (".neck.2.", ".neck.conv2."),
    (".neck.3.", ".neck.layer_norm2."),
)

# What TinyViT classified ImageNet with before it was an encoder, and an index that follows from the window's size.
_UNUSED = re.compile(r"^image_encoder\.((norm_)?head\.(weight|bias)$|.*\.attention_bias_idxs$)")


# --- reading and filling -------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> State:
    """Tensors of a `.safetensors` file, or of a `.pth`; nothing else in it is ever executed.

    Raises UserError naming the file where it is missing, damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or no checkpoint ({_first_line(error)}); fetch it again") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no checkpoint, or holds more than tensors, and was not opened; give a plain state dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no checkpoint ({_first_line(error)}); fetch it again") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict of tensors")
    state = state.get("model", state)  # as training scripts leave them
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def fill(network: nn.Module, state: State, path: Path | str) -> None:
    """Makes the tensors of `state` the parameters of `network`, which takes them over.

    Every tensor on either side is accounted for, or UserError says in one line which are not.
    """
    wanted = network.state_dict()
    wrong = [
        f"{kind}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in (
            ("missing", sorted(wanted.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - wanted.keys())),
            (
                "other shape",
                [
                    f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
                    for key in sorted(wanted.keys() & state.keys())
                    if state[key].shape != wanted[key].shape
                ],
            ),
        )
        if names
    ]
    if wrong:
        raise UserError(f"{path} does not fit the network ({'; '.join(wrong)}); give the checkpoint of this backbone")
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    network.load_state_dict(state, strict=True, assign=True)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- names ---------------------------------------------------------------------------------------------------------


def our_names(published: State) -> State:
    """Any published layout → ours; which one it is shows in the names.

    segment-anything's ViT (SAM, MedSAM), a TinyViT in the same manner (MobileSAM, LiteMedSAM), or transformers'
    `SamModel`. A name that is none of these stays as it is, and `fill` will say that it fits nowhere.
    """
    if any(key.startswith("vision_encoder.") for key in published):
        return _from_transformers(published)
    tiny = any(key.startswith("image_encoder.layers.") for key in published)
    ours: State = {}
    for key, tensor in published.items():
        if _UNUSED.match(key):
            continue
        name = _renamed(key, (_TINY_VIT if tiny else _VIT) if key.startswith("image_encoder.") else _DECODER)
        if not name.startswith("vision_encoder.") or ".attn.qkv." not in name:
            ours[name] = tensor
        elif tiny:
            biases = published.get(re.sub(r"qkv\.\w+$", "attention_biases", key))
            heads = len(biases) if biases is not None and biases.ndim else 0
            ours |= _split_by_head(name, tensor, heads)
        else:
            ours |= _split(name, tensor)
    return ours


def original_names(ours: State) -> State:
    """`our_names` backwards: what segment-anything calls a ViT's tensors, MobileSAM and LiteMedSAM a TinyViT's."""
    tiny = any(name.endswith(".attention_biases") for name in ours)
    return {_original_name(name, tiny): tensor for name, tensor in _fused(ours).items()}


def to_transformers(ours: State) -> State:
    """Our names of a ViT → those of transformers' `SamModel`, q, k and v fused again."""
    theirs = _fused(ours)
    shared = "shared_embedding.positional_embedding"
    theirs["shared_image_embedding.positional_embedding"] = theirs[f"prompt_encoder.{shared}"]
    return theirs


def samed_name(name: str) -> str:
    """What SAMed calls a trained tensor of a ViT, or a tensor of prompt encoder or mask decoder, that is `name` here.

    SAMed numbers its LoRA matrices A and B through the blocks, q before v: w_a_007 is v's A of the encoder's fourth
    block, sa_, cti_ and cit_ are the decoder's attentions, and fati_qa q's A of the last one. Raises KeyError for
    what its files do not hold.
    """
    if match := re.fullmatch(r"vision_encoder\.layers\.(\d+)\.attn\.qkv\.([qv])_proj\.lora_([AB])\.weight", name):
        block, part, matrix = match.groups()
        return f"w_{matrix.lower()}_{2 * int(block) + 'qv'.index(part):03d}"
    if match := re.fullmatch(r"mask_decoder\.transformer\.(.*)\.([qv])_proj\.lora_([AB])\.weight", name):
        place, part, matrix = match.groups()
        if place == "final_attn_token_to_image":
            return f"fati_{part}{matrix.lower()}"
        _, layer, attention = place.split(".")
        kind = {"self_attn": "sa", "cross_attn_token_to_image": "cti", "cross_attn_image_to_token": "cit"}[attention]
        return f"{kind}_{matrix.lower()}_{2 * int(layer) + 'qv'.index(part):03d}"
    if not name.startswith(("prompt_encoder.", "mask_decoder.")):
        raise KeyError(name)
    return _original_name(name, tiny=False)


def _original_name(name: str, tiny: bool) -> str:
    names = (_TINY_VIT if tiny else _VIT) if name.startswith("vision_encoder.") else _DECODER
    return _renamed(name, ((ours, theirs) for theirs, ours in reversed(names)))


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = re.sub(re.escape(old).replace(r"\#", r"(\d+)"), new.replace("#", r"\1"), name)
    return name


def _from_transformers(published: State) -> State:
    """`SamModel` holds its positional matrix under two names, of which a file may give either."""
    ours: State = {}
    for key, tensor in published.items():
        if ".attn.qkv." in key:
            ours |= _split(key, tensor)
        elif key.startswith("shared_image_embedding."):
            ours.setdefault(key.replace("shared_image_embedding", "prompt_encoder.shared_embedding"), tensor)
        else:
            ours[key] = tensor
    return ours


def _split(name: str, fused: Tensor) -> State:
    """A ViT's [q | k | v] (3 C, …) → three of (C, …) below the fused one's place."""
    if not fused.ndim or fused.shape[0] % 3:
        return {name: fused}  # `fill` will say that it fits nowhere
    parts = fused.unflatten(0, (3, -1))
    return {name.replace("qkv", f"qkv.{projection}"): parts[i].clone() for i, projection in enumerate(PROJECTIONS)}


def _split_by_head(name: str, fused: Tensor, heads: int) -> State:
    """A TinyViT's [head][q | k | v] (3 C, …) → three of (C, …) in place of the fused one."""
    if not heads or not fused.ndim or fused.shape[0] % (3 * heads):
        return {name: fused}
    parts = fused.unflatten(0, (heads, 3, -1))  # (heads, 3, C / heads, …)
    return {
        name.replace("qkv", projection): parts[:, i].flatten(0, 1).clone() for i, projection in enumerate(PROJECTIONS)
    }


def _fused(ours: State) -> State:
    """q, k and v of an encoder in one again: the inverse of `_split`, or of `_split_by_head` in a TinyViT."""
    fused: State = {}
    for name, tensor in ours.items():
        match = re.fullmatch(r"(vision_encoder\..*\.attn\.)(qkv\.)?([qkv])_proj\.(\w+)", name)
        if match is None:
            fused[name] = tensor
        elif match[3] == "q":
            place, vit, _, kind = match.groups()
            heads = 1 if vit else len(ours[f"{place}attention_biases"])
            parts = [ours[name.replace("q_proj", projection)].unflatten(0, (heads, -1)) for projection in PROJECTIONS]
            fused[f"{place}qkv.{kind}"] = torch.stack(parts, 1).flatten(0, 2)  # (heads, 3, C / heads, …) → (3 C, …)
    return fused


# --- another input size --------------------------------------------------------------------------------------------


def resize_positions(state: State, cells: int, published_cells: int, global_blocks: Collection[int]) -> State:
    """A ViT's positions, published for `published_cells`² cells, for `cells`²; as SAMed's `build_sam.py` does it.

    Absolute ones (1, h, w, C) are resized bilinearly, and so are the relative ones (2 h − 1, C / heads) of the blocks
    that attend globally; those of a window are of the window's size, which stays. A tensor that is not of the published
    size is left alone, for `fill` to complain about.
    """
    if cells == published_cells:
        return state
    relative = [f"vision_encoder.layers.{block}.attn.rel_pos_{axis}" for block in global_blocks for axis in "hw"]
    resized = dict(state)
    for name in ("vision_encoder.pos_embed", *relative):
        tensor = state.get(name)
        if tensor is None:
            continue
        if tensor.ndim == 4 and tensor.shape[1:3] == (published_cells, published_cells):
            planes = tensor.float().permute(0, 3, 1, 2)  # (1, C, h, w)
            planes = F.interpolate(planes, (cells, cells), mode="bilinear", align_corners=False)
            resized[name] = planes.permute(0, 2, 3, 1).contiguous()
        elif tensor.ndim == 2 and len(tensor) == 2 * published_cells - 1:
            lines = tensor.float().T[None]  # (1, C / heads, 2 h − 1)
            lines = F.interpolate(lines, 2 * cells - 1, mode="linear", align_corners=False)
            resized[name] = lines[0].T.contiguous()
    return resized
