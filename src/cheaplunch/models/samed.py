"""Checkpoints of SAMed (Zhang and Liu 2023, arXiv:2304.13785) into our network, and ours into its files.

One of theirs holds the LoRA matrices, the prompt encoder and the mask decoder: whole for SAMed, without its
transformer for SAMed_s.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from cheaplunch.errors import UserError
from cheaplunch.files import whole_or_nothing
from cheaplunch.models.layouts import read_checkpoint, samed_name
from cheaplunch.models.lora import adapter_state
from cheaplunch.models.segmenter import Segmenter

_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"  # theirs to save, ours to leave in the backbone


def read_samed(segmenter: Segmenter, path: Path) -> None:
    """Fills a network that `build_segmenter` made for samed or samed-s, on the same backbone, with their checkpoint.

    Raises UserError where a tensor is missing, unexpected, or of another shape, naming the first.
    """
    network = _adapted(segmenter)
    found = read_checkpoint(path)
    wanted = {samed_name(_plain(name)): (name, tensor) for name, tensor in adapter_state(network).items()}
    positions = samed_name(_POSITIONS)
    shapes = {theirs: tensor.shape for theirs, (_, tensor) in wanted.items()}
    shapes[positions] = _positions(network).shape
    differing = [name for name in sorted(shapes.keys() | found.keys()) if _shape(found, name) != shapes.get(name)]
    if differing:
        raise UserError(
            f"{path} does not fit this method, backbone and number of classes: {len(differing)} tensors differ, "
            f"first {differing[0]}"
        )
    if not torch.allclose(found[positions], _positions(network).cpu()):
        raise UserError(f"{path} was trained on another backbone: its {positions} is another; give that --backbone")
    set_peft_model_state_dict(network, {name: found[theirs] for theirs, (name, _) in wanted.items()})


def write_samed(segmenter: Segmenter, path: Path) -> None:
    """Writes what `read_samed` reads, and SAMed's own `load_lora_parameters`: a `.pth` of tensors."""
    network = _adapted(segmenter)
    state = {samed_name(_plain(name)): tensor for name, tensor in adapter_state(network).items()}
    state[samed_name(_POSITIONS)] = _positions(network)
    with whole_or_nothing(path) as unfinished:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, unfinished)


def _adapted(segmenter: Segmenter) -> PeftModel:
    network = segmenter.network
    if not isinstance(network, PeftModel) or not hasattr(network.vision_encoder, "pos_embed"):
        raise UserError("SAMed's files hold LoRA of a ViT: build the network with --method samed on a sam-vit backbone")
    return network


def _positions(network: PeftModel) -> Tensor:
    return network.get_submodule("base_model.model").state_dict()[_POSITIONS]


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _shape(state: dict[str, Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
