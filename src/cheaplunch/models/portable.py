"""A network as one file: its tensors, and in the file's metadata how to build it. Loading it needs nothing else.

The file is safetensors. A ViT's tensors have the names that transformers gives them, a TinyViT's have ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from cheaplunch.errors import UserError
from cheaplunch.models.layouts import fill, our_names, read_checkpoint, to_transformers
from cheaplunch.models.sam import PixelNorm, Sam
from cheaplunch.models.segmenter import Segmenter
from cheaplunch.models.tiny_vit import TinyViT, TinyViTConfig

KEY = "cheaplunch"
"""Of the metadata: JSON with `build` (how to build the network) and whatever else was said about it."""

_PUBLISHER_ONLY = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def sam_of(segmenter: Segmenter) -> Sam:
    """The network of a prompted, merged segmenter. Raises UserError for one that is not SAM's as published.

    That is what this file, and other tools, know how to build.
    """
    network = segmenter.network
    if not isinstance(network, Sam) or segmenter.head not in ("single", "two"):
        raise UserError("this run's network is not a prompted SAM, and only those can be exported so far")
    if added := sorted(network.state_dict().keys() ^ _build(_recipe(segmenter)).state_dict().keys()):
        raise UserError(f"this run's network differs from SAM as published and cannot be exported: {added[0]}")
    return network


def save_network(segmenter: Segmenter, path: Path, about: Mapping[str, Any]) -> None:
    """Writes the network and what there is to say `about` it, in plain types. Raises UserError as `sam_of`."""
    network = sam_of(segmenter)
    state = network.state_dict()
    if isinstance(network.vision_encoder, SamVisionEncoder):
        state = to_transformers(state)
        del state["prompt_encoder.shared_embedding.positional_embedding"]  # one tensor of two names: one is written
    said = {"build": _recipe(segmenter), **about}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        path,
        metadata={"format": "pt", KEY: json.dumps(said)},
    )


def read_about(path: Path) -> dict[str, Any]:
    """What `save_network` wrote about the network. Raises UserError where the file is missing, damaged or another's."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[KEY])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); export it again") from error
    except KeyError as error:
        raise UserError(f"{path} does not say how to build its network; give a file of `cheaplunch export`") from error


def load_network(path: Path) -> Segmenter:
    """The segmenter that `save_network` wrote, merged, frozen and in eval mode: the same logits as before."""
    recipe = read_about(path)["build"]
    network = _build(recipe)
    fill(network, our_names(read_checkpoint(path)), path)
    return Segmenter(network.eval().requires_grad_(False), recipe["head"], recipe["image_size_px"]).eval()


def _recipe(segmenter: Segmenter) -> dict[str, Any]:
    """How to build the network again, in plain types."""
    network: Any = segmenter.network
    encoder = network.vision_encoder
    return {
        "head": segmenter.head,
        "image_size_px": segmenter.image_size_px,
        "pixels": asdict(network.norm),
        "tiny_vit": asdict(encoder.config) if isinstance(encoder, TinyViT) else None,
        "sam": _without(network.config.to_dict(), _PUBLISHER_ONLY),
    }


def _build(recipe: Mapping[str, Any]) -> Sam:
    """The network, not yet filled."""
    config = SamConfig.from_dict(dict(recipe["sam"]), attn_implementation="sdpa")
    norm = PixelNorm(**{name: tuple(values) for name, values in recipe["pixels"].items()})
    if recipe["tiny_vit"] is None:
        return Sam(config, norm=norm)
    shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe["tiny_vit"].items()}
    return Sam(config, TinyViT(TinyViTConfig(**shape)).fold(), norm)


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Nested dicts less some keys, which say where a publisher's file came from and not what the network is."""
    return {k: _without(v, names) if isinstance(v, dict) else v for k, v in values.items() if k not in names}
