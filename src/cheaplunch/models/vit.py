"""SAM's ViT: transformers' encoder with the attention of its blocks computed at less cost, to the same numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder


def with_own_attention(encoder: SamVisionEncoder) -> SamVisionEncoder:
    """Puts an `Attention`, still to be filled, in the place of every block's; it cuts the windows itself."""
    layer: Any
    for layer in encoder.layers:
        layer.attn = Attention(layer.attn, layer.window_size)
        layer.window_size = 0
    return encoder


class SplitProjection(nn.Module):
    """A fused projection to [q | k | v] as three, for LoRA on q and v alone."""

    def __init__(self, fused: nn.Linear):
        super().__init__()
        width, bias = fused.in_features, fused.bias is not None
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, width, bias)
        self.v_proj = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, C) → q, k and v, (…, C) each."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Attention(nn.Module):
    """Attention with decomposed relative positions (MViTv2, eq. 4) over the image or in windows: (B, H, W, C) → same.

    Two things are computed otherwise than by SAM and transformers, to the same numbers.

    SAM fills windows that reach beyond the image with zeros and works on those as on any token: at 256 px, 16 × 16
    cells in windows of 14, they are two thirds of all. Here the image's own tokens are all that is projected and asks.
    What lies beyond is one key of which each has the same: the bias as key and value, and as its weight the sum over
    the rows and columns beyond, which factors since a row's and a column's offset are added (`_beyond`).

    The offsets are not written out as an N × N matrix: q·k + h[y_q, y_k] + w[x_q, x_k] is one product of longer
    vectors, [q | h | w] · [k | one-hot y_k | one-hot x_k].
    """

    def __init__(self, theirs: SamVisionAttention, window: int):
        """`theirs` gives the shapes and the tensors' names; `window` in cells, 0 for the whole image."""
        super().__init__()
        self.heads = theirs.num_attention_heads
        self.window = window
        self.qkv = SplitProjection(theirs.qkv)
        self.proj = theirs.proj
        self.rel_pos_h = theirs.rel_pos_h  # (2 S - 1, D), S the cells along a side of the window
        self.rel_pos_w = theirs.rel_pos_w

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        height, width, channels = hidden_states.shape[1:]
        window = (self.window or height, self.window or width)
        _, k_beyond, v_beyond = self.qkv(hidden_states.new_zeros(1, channels))  # a token outside the image
        blocks = zip(*(_blocks(t, window) for t in self.qkv(hidden_states)), strict=True)  # rows of q, k and v
        beyond = k_beyond, v_beyond
        mixed = [[self._attend(q, k, v, beyond, window) for q, k, v in zip(*row, strict=True)] for row in blocks]
        return self.proj(torch.cat([torch.cat(row, dim=2) for row in mixed], dim=1)), None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, beyond: tuple[Tensor, Tensor], window: tuple[int, int]
    ) -> Tensor:
        """Within windows that show equally many rows and columns r × c of the image: (B, H', W', C) → the same."""
        size = (q.shape[1], q.shape[2])
        shown = min(window[0], size[0]), min(window[1], size[1])
        q, k, v = (_windows(t, shown).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        by_row = _by_distance(self.rel_pos_h, window[0])[: shown[0]]  # (r, rows, D)
        by_column = _by_distance(self.rel_pos_w, window[1])[: shown[1]]  # (c, columns, D)
        cells = q.unflatten(2, shown)  # (W, heads, r, c, D)
        along_y = torch.einsum("nhyxd,ykd->nhyxk", cells, by_row).flatten(2, 3)  # (W, heads, N, rows)
        along_x = torch.einsum("nhyxd,xkd->nhyxk", cells, by_column).flatten(2, 3)  # (W, heads, N, columns)
        q = q * q.shape[-1] ** -0.5
        asks = [q, along_y[..., : shown[0]], along_x[..., : shown[1]]]
        answers = [k, _places(shown, k).expand(*k.shape[:2], -1, -1)]
        if shown == window:
            q, k = torch.cat(asks, dim=-1), torch.cat(answers, dim=-1)
        else:
            k_beyond, v_beyond = (t.view(1, self.heads, 1, -1) for t in beyond)
            weight = (q * k_beyond).sum(-1, keepdim=True) + _beyond(along_y, along_x, shown)
            q = torch.cat([*asks, weight.to(q.dtype)], dim=-1)  # one more place, which only the key beyond has
            k = F.pad(torch.cat(answers, dim=-1), (0, 1, 0, 1))
            k[..., -1, -1] = 1
            v = torch.cat([v, v_beyond.to(v.dtype).expand(len(v), -1, -1, -1)], dim=2)
        if q.is_cuda or not torch.is_grad_enabled():
            mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:  # on a CPU the fused one is slower backward than the plain product
            mixed = (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        return _image(mixed.transpose(1, 2).flatten(2), shown, size)


def _blocks(x: Tensor, window: tuple[int, int]) -> list[tuple[Tensor, ...]]:
    """(B, H, W, C) cut below and beside its whole windows: rows of blocks that each hold windows of one shape."""
    lengths = [[n for n in (length // w * w, length % w) if n] for length, w in zip(x.shape[1:3], window, strict=True)]
    return [row.split(lengths[1], dim=2) for row in x.split(lengths[0], dim=1)]


def _windows(x: Tensor, shown: tuple[int, int]) -> Tensor:
    """(B, H, W, C) → (B · windows, r · c, C), row by row; H and W are multiples of r and c."""
    x = x.unflatten(2, (-1, shown[1])).unflatten(1, (-1, shown[0]))  # (B, down, r, across, c, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _image(windows: Tensor, shown: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of `_windows`: → (B, H, W, C)."""
    down, across = size[0] // shown[0], size[1] // shown[1]
    x = windows.unflatten(1, shown).unflatten(0, (-1, down, across))  # (B, down, across, r, c, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _by_distance(table: Tensor, cells: int) -> Tensor:
    """(2 S - 1, D), by offset from -(S - 1) on → (S, S, D), from each cell to each."""
    here = torch.arange(cells, device=table.device)
    return table[here[:, None] - here[None, :] + cells - 1]


def _places(shown: tuple[int, int], like: Tensor) -> Tensor:
    """(N, r + c): a one at each cell's row and one at its column."""
    rows, columns = (torch.eye(n, device=like.device, dtype=like.dtype) for n in shown)
    return torch.cat([rows.repeat_interleave(shown[1], 0), columns.repeat(shown[0], 1)], dim=-1)


def _beyond(along_y: Tensor, along_x: Tensor, shown: tuple[int, int]) -> Tensor:
    """log Σ exp(h + w) over a window's cells beyond the image: (…, N, rows) and (…, N, columns) → (…, N, 1).

    They are the rows beyond with every column, and the rows within with the columns beyond.
    """
    within_y, beyond_y = along_y.split([shown[0], along_y.shape[-1] - shown[0]], dim=-1)
    beyond_x = along_x[..., shown[1] :]
    below = _log_sum(beyond_y) + _log_sum(along_x)
    beside = _log_sum(within_y) + _log_sum(beyond_x)
    return torch.logaddexp(below, beside)


def _log_sum(x: Tensor) -> Tensor:
    """log Σ exp over the last axis, kept; -inf over none."""
    return x.float().logsumexp(dim=-1, keepdim=True)
