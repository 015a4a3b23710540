"""The standard networks that papers compare with, by name: one table of how each is built and after whom.

They start at random, know no prompts and say all classes at once. All but TransUNet are MONAI's, in 2-D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from cheaplunch.errors import UserError
from cheaplunch.models.transunet import TransUNet


@dataclass(frozen=True)
class Baseline:
    """One network: how to build it, and whose it is."""

    name: str
    build: Callable[[int, int], nn.Module]
    """Outputs, side of the input in px → the network."""
    multiple_px: int
    """Sides that it takes are multiples of this; other images are padded (`Padded`)."""
    source: str
    """The paper."""
    settings: str
    """Whose they are, and what is otherwise than there, for reports."""


def build_baseline(name: str, classes: int, image_size_px: int) -> nn.Module:
    """The network `name` for images (B, 3, S, S) in [0, 1] → logits (B, classes + 1, S, S), background first.

    S is `image_size_px`, a multiple of 8 and at least 32. The weights are drawn from torch's global generator. No
    network has batch norms (`_without_batch_statistics`): an image's logits are its own in training too, a batch may
    be a single image, and the parameters are all there is to save.

    Raises UserError where the name is unknown, the size is not possible, or MONAI is not installed.
    """
    if name not in BASELINES:
        raise UserError(f"--method {name} is not a standard network; choose one of: {', '.join(BASELINES)}")
    if image_size_px < 32 or image_size_px % 8:
        raise UserError(f"--image-size {image_size_px}: {name} takes multiples of 8, at least 32; for example 224")
    baseline = BASELINES[name]
    side = _padded_side(image_size_px, baseline.multiple_px)
    try:
        network = baseline.build(classes + 1, side)
    except ImportError as error:
        raise UserError(
            f"--method {name} needs MONAI, which cannot be imported ({error}); `pip install cheaplunch[networks]`"
        ) from error
    _without_batch_statistics(network)
    return network if side == image_size_px else Padded(network, side - image_size_px)


class Padded(nn.Module):
    """A network that takes only some sizes, with black to the right and below; its logits are cropped again."""

    def __init__(self, network: nn.Module, margin_px: int):
        super().__init__()
        self.network = network
        self.margin_px = margin_px

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, O, S, S)."""
        height, width = images.shape[2:]
        return self.network(F.pad(images, (0, self.margin_px, 0, self.margin_px)))[:, :, :height, :width]


def _padded_side(image_size_px: int, multiple_px: int) -> int:
    """The next multiple, of two at least: a coarsest grid of one cell would leave instance norm nothing to measure."""
    return max(2, -(-image_size_px // multiple_px)) * multiple_px


def _without_batch_statistics(network: nn.Module) -> None:
    """Instance norms in the place of batch norms, with as many parameters.

    Few exemplars mean small batches, whose statistics are noise; and their running means are no parameters, so an
    adapter that holds the trained tensors would not hold them.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.InstanceNorm2d(child.num_features, eps=child.eps, affine=True))


# --- how they are built ----------------------------------------------------------------------------------------------


def _monai() -> ModuleType:
    """MONAI's networks. Some of them miss einops only once they run; so it is asked for here."""
    import_module("einops")
    return import_module("monai.networks.nets")


def _unet(outputs: int, side_px: int) -> nn.Module:
    return _monai().BasicUNet(spatial_dims=2, in_channels=3, out_channels=outputs)


def _attention_unet(outputs: int, side_px: int) -> nn.Module:
    return _monai().AttentionUnet(
        spatial_dims=2, in_channels=3, out_channels=outputs, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2)
    )


def _unetr(outputs: int, side_px: int) -> nn.Module:
    network = _monai().UNETR(spatial_dims=2, in_channels=3, out_channels=outputs, img_size=side_px)
    for block in network.vit.blocks:  # MONAI's layers hold parts of a cross-attention that is never asked for
        block.norm_cross_attn = block.cross_attn = nn.Identity()
    return network


def _swin_unetr(outputs: int, side_px: int) -> nn.Module:
    return _monai().SwinUNETR(spatial_dims=2, in_channels=3, out_channels=outputs, feature_size=48)


def _segresnet(outputs: int, side_px: int) -> nn.Module:
    return _monai().SegResNet(spatial_dims=2, in_channels=3, out_channels=outputs, init_filters=32, dropout_prob=0.2)


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
            build=TransUNet,
            multiple_px=16,
            source="Chen et al. 2021 (arXiv:2102.04306)",
            settings="the paper's R50-ViT-B_16, from random weights; instance norms for the decoder's batch norms",
        ),
    )
}
