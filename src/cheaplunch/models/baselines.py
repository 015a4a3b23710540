"""The standard networks that papers compare with, by name: one table of how each is built and after whom.

They start at random, know no prompts and say all classes at once. All but TransUNet are MONAI's, in 2-D, and as NAME-3d
in 3-D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cheaplunch.errors import UserError
from cheaplunch.methods import VOLUMETRIC
from cheaplunch.models.transunet import TransUNet


@dataclass(frozen=True)
class Baseline:
    """One network: how to build it, and whose it is."""

    name: str
    build: Callable[[int, tuple[int, ...]], nn.Module]
    """Outputs, shape of the input (S, S) or (D, S, S) → the network."""
    multiple_px: int
    """Sides that it takes, and slices of a volume, are multiples of this; other images are padded (`Padded`)."""
    source: str
    """The paper."""
    settings: str
    """Whose they are, and what is otherwise than there, for reports."""


def build_baseline(name: str, classes: int, image_size_px: int, slices: int = 1) -> nn.Module:
    """The network `name` for images (B, 3, S, S) in [0, 1] → logits (B, classes + 1, S, S), background first.

    S is `image_size_px`, a multiple of 8 and at least 32. A NAME-3d takes slabs of up to `slices` slices of a volume,
    (B, 3, D, S, S) → (B, classes + 1, D, S, S). The weights are drawn from torch's global generator. No network has
    batch norms (`_without_batch_statistics`): an image's logits are its own in training too, a batch may be a single
    image, and the parameters are all there is to save.

    Raises UserError where the name is unknown, the size is not possible, or MONAI is not installed.
    """
    if name not in BASELINES:
        raise UserError(f"--method {name} is not a standard network; choose one of: {', '.join(BASELINES)}")
    if image_size_px < 32 or image_size_px % 8:
        raise UserError(f"--image-size {image_size_px}: {name} takes multiples of 8, at least 32; for example 224")
    baseline = BASELINES[name]
    cells = [-(-length // baseline.multiple_px) for length in (slices, image_size_px)]  # of the coarsest grid
    side = max(2, cells[1]) * baseline.multiple_px  # instance norm must have more than one cell to measure
    shape = (cells[0] * baseline.multiple_px, side, side) if name in VOLUMETRIC else (side, side)
    try:
        network = baseline.build(classes + 1, shape)
    except ImportError as error:
        raise UserError(
            f"--method {name} needs MONAI, which cannot be imported ({error}); `pip install cheaplunch[networks]`"
        ) from error
    _without_batch_statistics(network)
    return network if shape == (image_size_px, image_size_px) else Padded(network, shape)


class Padded(nn.Module):
    """A network that takes one size only, with what is missing to it; its logits are cropped again.

    To the right and below that is black, and behind a slab's last slice that slice, as often as it takes.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]):
        """`shape`: (S, S) or (D, S, S), what the network takes."""
        super().__init__()
        self.network = network
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, O, S, S), or (B, 3, D, S, S) → (B, O, D, S, S)."""
        *depth, height, width = images.shape[2:]
        padded = F.pad(images, (0, self.shape[-1] - width, 0, self.shape[-2] - height))
        if depth:
            padded = torch.cat([padded, padded[:, :, -1:].expand(-1, -1, self.shape[0] - depth[0], -1, -1)], dim=2)
        return self.network(padded)[..., *map(slice, depth), :height, :width]


def _without_batch_statistics(network: nn.Module) -> None:
    """Instance norms in the place of batch norms, with as many parameters.

    Few exemplars mean small batches, whose statistics are noise; and their running means are no parameters, so an
    adapter that holds the trained tensors would not hold them.
    """
    for module in network.modules():
        for name, child in module.named_children():
            norm = {nn.BatchNorm2d: nn.InstanceNorm2d, nn.BatchNorm3d: nn.InstanceNorm3d}.get(type(child))
            if norm is not None:
                setattr(module, name, norm(child.num_features, eps=child.eps, affine=True))


# --- how they are built ----------------------------------------------------------------------------------------------


def _monai() -> ModuleType:
    """MONAI's networks. Some of them miss einops only once they run; so it is asked for here."""
    import_module("einops")
    return import_module("monai.networks.nets")


def _unet(outputs: int, shape: tuple[int, ...]) -> nn.Module:
    return _monai().BasicUNet(spatial_dims=len(shape), in_channels=3, out_channels=outputs)


def _attention_unet(outputs: int, shape: tuple[int, ...]) -> nn.Module:
    return _monai().AttentionUnet(
        spatial_dims=len(shape),
        in_channels=3,
        out_channels=outputs,
        channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2),
    )


def _unetr(outputs: int, shape: tuple[int, ...]) -> nn.Module:
    network = _monai().UNETR(spatial_dims=len(shape), in_channels=3, out_channels=outputs, img_size=shape)
    for block in network.vit.blocks:  # MONAI's layers hold parts of a cross-attention that is never asked for
        block.norm_cross_attn = block.cross_attn = nn.Identity()
    return network


def _swin_unetr(outputs: int, shape: tuple[int, ...]) -> nn.Module:
    return _monai().SwinUNETR(spatial_dims=len(shape), in_channels=3, out_channels=outputs, feature_size=48)


def _segresnet(outputs: int, shape: tuple[int, ...]) -> nn.Module:
    return _monai().SegResNet(
        spatial_dims=len(shape), in_channels=3, out_channels=outputs, init_filters=32, dropout_prob=0.2
    )


def _transunet(outputs: int, shape: tuple[int, ...]) -> nn.Module:
    return TransUNet(outputs, shape[-1])


# --- the table -------------------------------------------------------------------------------------------------------

BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            name="unet",
            build=_unet,
            multiple_px=16,
            source="Falk et al. 2019 (doi:10.1038/s41592-018-0261-2)",
            settings="MONAI's BasicUNet as it comes: 32 to 256 channels for the paper's 64 to 1024, and instance norms",
        ),
        Baseline(
            name="attention-unet",
            build=_attention_unet,
            multiple_px=16,
            source="Oktay et al. 2018 (arXiv:1804.03999)",
            settings="its authors': 16 to 256 channels; instance norms for batch norms",
        ),
        Baseline(
            name="unetr",
            build=_unetr,
            multiple_px=16,
            source="Hatamizadeh et al. 2022 (arXiv:2103.10504)",
            settings="the paper's: ViT-B/16 and 16 channels",
        ),
        Baseline(
            name="swin-unetr",
            build=_swin_unetr,
            multiple_px=32,
            source="Hatamizadeh et al. 2022 (arXiv:2201.01266)",
            settings="the paper's: 48 channels",
        ),
        Baseline(
            name="segresnet",
            build=_segresnet,
            multiple_px=8,
            source="Myronenko 2018 (arXiv:1810.11654)",
            settings="the paper's: 32 channels, dropout 0.2; without its autoencoder",
        ),
        Baseline(
            name="transunet",
            build=_transunet,
            multiple_px=16,
            source="Chen et al. 2021 (arXiv:2102.04306)",
            settings="the paper's R50-ViT-B_16, from random weights; instance norms for the decoder's batch norms",
        ),
    )
}
BASELINES |= {name: replace(BASELINES[name.removesuffix("-3d")], name=name) for name in VOLUMETRIC}
