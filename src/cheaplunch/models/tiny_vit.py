"""TinyViT as the image encoder of LiteMedSAM and MobileSAM, without torchvision or timm.

Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", ECCV 2022
(arXiv:2207.10666), in the variant of MobileSAM (arXiv:2306.14289): the third merging keeps its
resolution, and a neck brings the features to SAM's 256 channels. LiteMedSAM embeds single pixels
(stride 1) and so reads images of 256 px where MobileSAM (stride 4) reads 1024.

Two things differ from the published code without changing what is computed: features stay
(B, H, W, C) between blocks, which is the memory order that both the convolutions and the matrix
products want; and q, k, v are three projections, which is where LoRA attaches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class TinyViTConfig:
    """Widths and depths of the four stages; the defaults are LiteMedSAM's, and `patch_stride=4` is MobileSAM's."""

    embed_dims: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    num_heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    window_sizes: tuple[int, int, int, int] = (7, 7, 14, 7)
    expansion: int = 4
    out_channels: int = 256
    patch_stride: int = 1
    """Input pixels per side of one patch: 1, or 4 by two convolutions that halve."""

    @property
    def stride(self) -> int:
        """Input pixels per side of one cell of the embedding: stages 1 and 2 halve, stage 3 does not."""
        return 4 * self.patch_stride


class ConvNorm(nn.Module):
    """Convolution and batch norm, (B, C, H, W) → (B, C', H', W').

    The norm never sees another batch: `fold` absorbs its running statistics into the convolution
    once the weights are loaded, so there is nothing that `train()` could disturb.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs)

    @torch.no_grad()
    def fold(self) -> None:
        norm = self.bn
        if not isinstance(norm, nn.BatchNorm2d):
            return
        assert norm.running_var is not None and norm.running_mean is not None
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        # A new tensor, for the loaded one may still be someone else's.
        self.c.weight = nn.Parameter(self.c.weight * gain[:, None, None, None])
        self.c.bias = nn.Parameter(norm.bias - norm.running_mean * gain)
        self.bn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class MBConv(nn.Module):
    """Inverted bottleneck: widen, depthwise 3 × 3, narrow, add. (B, C, H, W) → same."""

    def __init__(self, dim: int, expansion: int):
        super().__init__()
        hidden = dim * expansion
        self.conv1 = ConvNorm(dim, hidden, 1)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.conv1(x))
        hidden = F.gelu(self.conv2(hidden))
        return F.gelu(x + self.conv3(hidden))


class PatchMerging(nn.Module):
    """(B, C, H, W) → (B, C', H / stride, W / stride)."""

    def __init__(self, dim: int, out_dim: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim, 1)
        self.conv2 = ConvNorm(out_dim, out_dim, 3, stride=stride, groups=out_dim)
        self.conv3 = ConvNorm(out_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Attention among the `window`² tokens of one window, (W, N, C) → same, with a learned bias per offset."""

    offset: Tensor

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        # One bias per head and absolute offset (|Δrow|, |Δcol|), in row-major order of first meeting.
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        row, col = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        offset = (row.flatten()[:, None] - row.flatten()).abs() * window
        offset = offset + (col.flatten()[:, None] - col.flatten()).abs()
        self.register_buffer("offset", offset, persistent=False)  # (N, N)

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens, dim = x.shape
        x = self.norm(x)
        q, k, v = (
            project(x).view(windows, tokens, self.num_heads, -1).transpose(1, 2)  # (W, heads, N, C / heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = self.attention_biases[:, self.offset].to(q.dtype)  # (heads, N, N)
        # Written out: PyTorch's fused kernel is slower on a CPU at these sizes, its backward by four to ten times.
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(dim=-1)  # (W, heads, N, N)
        x = weights @ v
        return self.proj(x.transpose(1, 2).reshape(windows, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, expansion: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim * expansion)
        self.fc2 = nn.Linear(dim * expansion, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Window attention, depthwise convolution, MLP. (B, H, W, C) → same."""

    def __init__(self, dim: int, num_heads: int, window: int, expansion: int):
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, num_heads, window)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)
        self.mlp = Mlp(dim, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        size = self.window
        # As published, padding takes part in attention: zeros that the norm turns into its bias.
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        rows, cols = x.shape[1] // size, x.shape[2] // size
        x = x.view(batch, rows, size, cols, size, dim).transpose(2, 3)  # (B, rows, cols, size, size, C)
        x = self.attn(x.reshape(-1, size * size, dim))
        x = x.view(batch, rows, cols, size, size, dim).transpose(2, 3)
        return x.reshape(batch, rows * size, cols * size, dim)[:, :height, :width]


class ConvStage(nn.Module):
    """(B, C, H, W) → (B, H / 2, W / 2, C')."""

    def __init__(self, dim: int, out_dim: int, depth: int, expansion: int):
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(dim, expansion) for _ in range(depth))
        self.downsample = PatchMerging(dim, out_dim, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x).permute(0, 2, 3, 1)


class AttentionStage(nn.Module):
    """(B, H, W, C) → (B, H / stride, W / stride, C'), or the same shape for the last stage."""

    def __init__(self, blocks: list[TinyViTBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        if self.downsample is None:
            return x
        return self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """Images (B, 3, S, S) → SAM image embeddings (B, 256, S / stride, S / stride).

    S is 256 (LiteMedSAM, stride 4) or 1024 (MobileSAM, stride 16) as published; any multiple of the stride works,
    since positions enter only as offsets within a window (and the padding of the last windows is as published).
    """

    def __init__(self, config: TinyViTConfig | None = None):
        super().__init__()
        config = config or TinyViTConfig()
        self.config = config
        dims = config.embed_dims
        if config.patch_stride not in (1, 4):
            raise ValueError(f"patch_stride is {config.patch_stride}; it is 1 or 4")
        kernel, stride = (1, 1) if config.patch_stride == 1 else (3, 2)
        first = ConvNorm(3, dims[0] // 2, kernel, stride)
        second = ConvNorm(dims[0] // 2, dims[0], kernel, stride)
        self.patch_embed = nn.ModuleDict({"seq": nn.Sequential(first, nn.GELU(), second)})
        self.layers = nn.ModuleList([ConvStage(dims[0], dims[1], config.depths[0], config.expansion)])
        for stage in (1, 2, 3):
            blocks = [
                TinyViTBlock(dims[stage], config.num_heads[stage], config.window_sizes[stage], config.expansion)
                for _ in range(config.depths[stage])
            ]
            merge = PatchMerging(dims[stage], dims[stage + 1], stride=(2, 1)[stage - 1]) if stage < 3 else None
            self.layers.append(AttentionStage(blocks, merge))
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], config.out_channels, 1, bias=False),
            LayerNorm2d(config.out_channels, eps=1e-6),
            nn.Conv2d(config.out_channels, config.out_channels, 3, padding=1, bias=False),
            LayerNorm2d(config.out_channels, eps=1e-6),
        )

    def gradient_checkpointing_enable(self) -> None:
        """Keeps each attention block's input only and computes the block again for its gradients."""
        for layer in self.layers:
            if isinstance(layer, AttentionStage):
                layer.checkpointing = True

    def fold(self) -> TinyViT:
        """Absorb every batch norm into its convolution; call once, after the weights are loaded."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["seq"](images.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            x = layer(x)  # (B, H, W, C)
        return self.neck(x.permute(0, 3, 1, 2))
