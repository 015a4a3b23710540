"""The depth branch of the Medical SAM Adapter (Wu et al., arXiv:2304.12620, §2.2), and volumes in slabs of slices.

A slab is D slices of a volume that follow one another, N tokens each. In the space branch a block attends as ever: D
times among N tokens, in windows or over the whole image. In the depth branch the same attention, its weights shared,
runs over the transposed tokens: N times among the D that lie at one place. The result is transposed back and added.

docs/msa.md says what was decided where the paper is silent: the gate, a slab of one slice, positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import WindowAttention
from cheaplunch.models.vit import Attention


class Slab:
    """How many images that follow one another in an encoder's batch are one slab: 1 unless a batch is announced.

    All branches of an encoder share one. It holds until the next batch comes, not only until this one is through: a
    block that is computed again for its gradients must find what it found before.
    """

    def __init__(self) -> None:
        self.slices = 1
        self._announced = 1

    def announce(self, slices: int) -> None:
        """The encoder's next batch is slabs of so many slices, one slab after the other."""
        self._announced = slices

    def begin(self, encoder: nn.Module, images: object) -> None:
        """The encoder's forward pre-hook: a batch comes."""
        self.slices, self._announced = self._announced, 1


class DepthBranch(nn.Module):
    """A block's attention once more, across the slices of a slab, and added through a gate for each channel.

    The gate starts at zero: the network starts as SAM. A slab of one slice has no depth to attend over, and the branch
    is left out.
    """

    def __init__(self, dim: int, slab: Slab):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))
        self.slab = slab

    def forward(self, space: Tensor, attention: Attention | WindowAttention, x: Tensor) -> Tensor:
        """What a block's `attention` made of its tokens `x`, with depth added; both are (V · D, H, W, C)."""
        return space if self.slab.slices == 1 else space + self.gate * self._across(attention, x)

    def _across(self, attention: Attention | WindowAttention, x: Tensor) -> Tensor:
        """(V · D, H, W, C) → the same: attention among the D tokens at one place.

        Positions take no part: they are offsets within an image, and between slices there are none. So the order of
        slices makes no difference, nor does their distance; and what pads the last windows is not looked at.
        """
        q, k, v = (
            t.unflatten(0, (-1, self.slab.slices)).unflatten(-1, (_heads(attention), -1)).movedim(1, -2)
            for t in _project(attention, x)
        )  # (V, D, H, W, heads · c) → (V, H, W, heads, D, c)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)  # (V, H, W, heads, D, D)
        mixed = (weights @ v).movedim(-2, 1)  # (V, D, H, W, heads, c)
        return attention.proj(mixed.flatten(-2).flatten(0, 1))


def _heads(attention: Attention | WindowAttention) -> int:
    return attention.num_heads if isinstance(attention, WindowAttention) else attention.heads


def _project(attention: Attention | WindowAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(…, C) → q, k and v, (…, C) each; TinyViT's attention norms its tokens itself."""
    if isinstance(attention, WindowAttention):
        x = attention.norm(x)
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    return attention.qkv(x)


def encode_slabs(network: Sam, slabs: Tensor, shown_px: Tensor | None = None) -> Tensor:
    """V slabs of D slices, (V, D, 3, S, S) in [0, 1] → (V, D, 256, S / stride, S / stride).

    `shown_px` (V, D, 2): as in `Sam.encode`, which this is for a network without depth branches.
    """
    count, slices = slabs.shape[:2]
    branch = next((m for m in network.vision_encoder.modules() if isinstance(m, DepthBranch)), None)
    if branch is not None:
        branch.slab.announce(slices)
    embeddings = network.encode(slabs.flatten(0, 1), None if shown_px is None else shown_px.flatten(0, 1))
    return embeddings.unflatten(0, (count, slices))


def cut_slabs(count: int, depth: int, overlap: int) -> list[range]:
    """The slabs of `depth` slices that cover slices 0 to `count` − 1, each `overlap` or more slices into the last.

    The last slab ends with the volume. Where there are fewer slices than `depth`, they are one slab.
    """
    if not 0 <= overlap < depth:
        raise ValueError(f"slabs of {depth} slices cannot overlap by {overlap}")
    last = max(count - depth, 0)
    starts = [*range(0, last, depth - overlap), last]
    return [range(start, min(start + depth, count)) for start in starts]


def slab_showing(number: int, count: int, depth: int, place: int) -> range:
    """The slab of `depth` slices that has slice `number` of `count` at its `place`, counted from 0, or near it.

    At an end of the volume it is the first or last slab. Where there are fewer slices than `depth`, it is all of them.
    """
    first = min(max(number - place, 0), max(count - depth, 0))
    return range(first, min(first + depth, count))


def embed_slice(number: int, count: int, depth: int, overlap: int, encode: Callable[[range], Tensor]) -> Tensor:
    """The embedding (256, h, w) of slice `number` of a volume's `count`, from slabs that overlap (`cut_slabs`).

    `encode` gives those of a slab's slices, (slices, 256, h, w), and had better remember the last `slabs_a_slice`. A
    slice in several slabs gets the mean of what they say, each weighing the more the further the slice is from the
    slab's ends: 1 at an end, 2 next to it.
    """
    slabs = [slab for slab in cut_slabs(count, depth, overlap) if number in slab]
    said = [encode(slab)[number - slab.start] for slab in slabs]
    if len(said) == 1:
        return said[0]
    weights = [1 + min(number - slab.start, slab.stop - 1 - number) for slab in slabs]
    return torch.stack([embedding * weight for embedding, weight in zip(said, weights, strict=True)]).sum(0) / sum(
        weights
    )


def slabs_a_slice(depth: int, overlap: int) -> int:
    """The most slabs that a slice is in; one more than in the midst of a volume, whose last slab is moved back."""
    return -(-depth // (depth - overlap)) + 1
