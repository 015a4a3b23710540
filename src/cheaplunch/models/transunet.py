"""TransUNet: a ResNet-50 and a ViT-B/16 behind it as the encoder, a U-Net's decoder in front of three skips.

Chen et al., "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation" (arXiv:2102.04306), in the
variant of its tables: R50-ViT-B_16 with the cascaded upsampler (CUP), at stride 16. The ResNet is the one of the ViT
paper's hybrid (Dosovitskiy et al. 2021): group norms, weight-standardised convolutions (Qiao et al.,
arXiv:1903.10520), no fourth stage. It computes what the published code does, its uneven pooling included.

The paper starts from weights of ImageNet-21k; no package brings them, so this starts at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


@dataclass(frozen=True)
class TransUNetConfig:
    """Widths and depths; the defaults are R50-ViT-B_16."""

    width: int = 64
    """Channels of the stem, a multiple of 32; the stages have 4, 8 and 16 times as many."""
    units: tuple[int, int, int] = (3, 4, 9)
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    expansion: int = 4
    dropout: float = 0.1
    """After the positions and after both layers of each MLP; attention has none."""
    decoder: tuple[int, int, int, int, int] = (512, 256, 128, 64, 16)
    """Channels of the decoder's input, and after each of its four doublings."""


class StdConv2d(nn.Conv2d):
    """A convolution without bias whose filters have mean 0 and variance 1 each."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (variance + 1e-5).sqrt(), None)


class Bottleneck(nn.Module):
    """Narrow, 3 × 3, widen, add: (B, C, H, W) → (B, C', ⌈H / stride⌉, ⌈W / stride⌉), narrow to C' / 4."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        middle = outputs // 4
        self.conv1 = StdConv2d(inputs, middle, 1)
        self.norm1 = nn.GroupNorm(GROUPS, middle, eps=1e-6)
        self.conv2 = StdConv2d(middle, middle, 3, stride)
        self.norm2 = nn.GroupNorm(GROUPS, middle, eps=1e-6)
        self.conv3 = StdConv2d(middle, outputs, 1)
        self.norm3 = nn.GroupNorm(GROUPS, outputs, eps=1e-6)
        self.shortcut = nn.Identity()
        if inputs != outputs:  # the first of a stage; normalised channel by channel
            self.shortcut = nn.Sequential(StdConv2d(inputs, outputs, 1, stride), nn.GroupNorm(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.shortcut(x) + self.norm3(self.conv3(y)))


class ResNet(nn.Module):
    """Images (B, 3, S, S) → (B, 16 C, S / 16, S / 16), and the skips at S / 8, S / 4 and S / 2; C is the width."""

    def __init__(self, width: int, units: tuple[int, int, int]):
        super().__init__()
        self.stem = nn.Sequential(StdConv2d(3, width, 7, 2), nn.GroupNorm(GROUPS, width, eps=1e-6), nn.ReLU())
        self.quarter = _stage(width, 4 * width, units[0], stride=1)
        self.eighth = _stage(4 * width, 8 * width, units[1], stride=2)
        self.sixteenth = _stage(8 * width, 16 * width, units[2], stride=2)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        half = self.stem(images)  # (B, C, S / 2, S / 2)
        # As published, the pooling is not padded and loses a row and a column, which the skip gets back as zeros.
        quarter = self.quarter(F.max_pool2d(half, 3, 2))  # (B, 4 C, S / 4 − 1, S / 4 − 1)
        eighth = self.eighth(quarter)  # (B, 8 C, S / 8, S / 8)
        return self.sixteenth(eighth), (eighth, F.pad(quarter, (0, 1, 0, 1)), half)


def _stage(inputs: int, outputs: int, units: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Bottleneck(inputs, outputs, stride), *(Bottleneck(outputs, outputs) for _ in range(1, units)))


class Layer(nn.Module):
    """A pre-norm transformer layer, (B, N, C) → same."""

    def __init__(self, dim: int, heads: int, expansion: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, expansion * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(expansion * dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, C / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Cells (B, C, h, h) → (B, hidden, h, h): a token a cell, learned positions, all attend to all."""

    def __init__(self, inputs: int, cells: int, config: TransUNetConfig):
        super().__init__()
        self.embed = nn.Conv2d(inputs, config.hidden, 1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, cells * cells, config.hidden))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.Sequential(
            *(Layer(config.hidden, config.heads, config.expansion, config.dropout) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.hidden, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = self.dropout(x.flatten(2).transpose(1, 2) + self.positions)  # (B, h h, hidden)
        return self.norm(self.layers(tokens)).transpose(1, 2).unflatten(2, x.shape[2:])


class UpBlock(nn.Module):
    """Twice the size, the skip beside it, two convolutions: (B, C, H, W) → (B, C', 2 H, 2 W)."""

    def __init__(self, inputs: int, skip: int, outputs: int):
        super().__init__()
        self.conv1 = _conv_norm_relu(inputs + skip, outputs)
        self.conv2 = _conv_norm_relu(outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class TransUNet(nn.Module):
    """Images (B, 3, S, S) in [0, 1] → logits (B, outputs, S, S); S is fixed, and a multiple of 16.

    The decoder has batch norms, as published: in training an S of 16 and a batch of 1 is one value a channel, which
    PyTorch refuses.
    """

    def __init__(self, outputs: int, image_size_px: int = 224, config: TransUNetConfig | None = None):
        super().__init__()
        if image_size_px % 16:
            raise ValueError(f"image_size_px is {image_size_px}; it must be a multiple of 16")
        config = config or TransUNetConfig()
        width, channels = config.width, config.decoder
        self.resnet = ResNet(width, config.units)
        self.vit = ViT(16 * width, image_size_px // 16, config)
        self.widen = _conv_norm_relu(config.hidden, channels[0])
        skips = (8 * width, 4 * width, width, 0)
        self.decoder = nn.ModuleList(UpBlock(channels[i], skips[i], channels[i + 1]) for i in range(4))
        self.head = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = self.resnet(images)  # (B, 16 C, S / 16, S / 16)
        x = self.widen(self.vit(x))
        for block, skip in zip(self.decoder, (*skips, None), strict=True):
            x = block(x, skip)  # S / 8, S / 4, S / 2, S
        return self.head(x)
