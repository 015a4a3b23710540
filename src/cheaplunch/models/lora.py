"""Low-rank adaptation (Hu et al. 2021; Cheap Lunch §2.2) with peft, and the adapter's file.

A projection W (C_out × C_in) becomes W + B·A with A (r × C_in) Kaiming-uniform and B (C_out × r) zero,
so that the first forward equals the base model. For TinyViT's third stage, C = 160 and r = 4: A is
4 × 160, B is 160 × 4, and 1,280 numbers move a matrix of 25,600. As in SAMed there is no α / r
scaling, which peft expresses as α = r.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cheaplunch.checkpoints import restore_tensors, trained_tensors
from cheaplunch.errors import UserError
from cheaplunch.files import whole_or_nothing, write_json
from cheaplunch.models.sam import Sam

Net = TypeVar("Net", bound=nn.Module)

ADAPTER_FILE = "adapter_model.safetensors"

ENCODER_QV = r"vision_encoder\..*\.(q_proj|v_proj)"
DECODER_TRANSFORMER = "mask_decoder.transformer"
DECODER_QV = r"mask_decoder\.transformer\..*\.(q_proj|v_proj)"


def add_lora(
    network: Sam, rank: int, targets: Sequence[str] = (ENCODER_QV, DECODER_QV), trained: Sequence[str] = ()
) -> PeftModel:
    """Freezes `network` and puts LoRA of `rank` on every Linear that a pattern of `targets` matches.

    `trained` names modules that are trained in full and saved with the adapter.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules="|".join(f"({pattern})" for pattern in targets),
        modules_to_save=list(trained) or None,
    )
    adapted = get_peft_model(network, config)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            # peft would turn bf16 activations into float32 only for autocast to turn them back: two copies a layer.
            module.cast_input_dtype_enabled = False
    return adapted  # pyright: ignore[reportReturnType]


def train_in_full(network: Net, trained: Sequence[str]) -> Net:
    """Freezes `network` but for the modules that `trained` names, which are trained as they are, without LoRA."""
    network.requires_grad_(False)
    for name in trained:
        network.get_submodule(name).requires_grad_(True)
    return network


def merge(adapted: PeftModel | Net) -> Sam | Net:
    """One plain network that computes the same: W + B·A in W's place. `adapted` is used up.

    One without LoRA is that already. `sam.as_sam_model` makes transformers' own of it, where the encoder is a ViT.
    """
    if not isinstance(adapted, PeftModel):
        return adapted
    return adapted.merge_and_unload()  # pyright: ignore[reportReturnType, reportCallIssue]


def save_adapter(adapted: nn.Module, folder: Path) -> None:
    """Writes the trained tensors and nothing else: `adapter_config.json`, and last `adapter_model.safetensors`.

    With LoRA it is an adapter as peft writes it. Without, the tensors replace those of the network by their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(adapted)
    if isinstance(adapted, PeftModel):
        adapted.peft_config["default"].save_pretrained(str(folder))
    else:
        about = {"peft_type": None, "tensors": len(state), "numbers": sum(tensor.numel() for tensor in state.values())}
        write_json(about, folder / "adapter_config.json")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with whole_or_nothing(folder / ADAPTER_FILE) as unfinished:
        unfinished.write_bytes(save(state, metadata={"format": "pt"}))  # save_file would hide it from other users


def adapter_state(adapted: nn.Module) -> dict[str, Tensor]:
    """What is trained, by the names that its file has."""
    return get_peft_model_state_dict(adapted) if isinstance(adapted, PeftModel) else trained_tensors(adapted)


def load_adapter(adapted: nn.Module, folder: Path) -> None:
    """Fills an adapted network from `folder`.

    peft lets missing and extra tensors pass in silence, which can lose most of an adapter; so the two
    sets of names and shapes are compared here.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise UserError(
            f"{path} is missing; is {folder.parent} a finished run? (`cheaplunch finetune --resume` ends it)"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); train again or restore the file") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_state(adapted).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != found:
        differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise UserError(
            f"{path} does not fit this backbone and head: {len(differing)} tensors differ, first {differing[0]}"
        )
    if not isinstance(adapted, PeftModel):
        restore_tensors(adapted, state, path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(adapted, state)
