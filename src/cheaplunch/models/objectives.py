"""What an image encoder can learn from images without labels: e-Mix, ShED and masked autoencoding (docs/pretrain.md).

The Medical SAM Adapter (Wu et al., arXiv:2304.12620, §2.3) names these three and no numbers. e-Mix and ShED follow DABS
(Tamkin et al. 2021, arXiv:2111.12062), MAE follows SAM, which took it from He et al. (CVPR 2022). Each is a small
module whose parameters, a head or a mask token, are thrown away afterwards.

An input embedding is what comes out of the encoder's patch embedding, before positions are added. The smallest piece
that an objective moves or hides is a unit: a square of `unit_px` pixels, one embedding of SAM's ViTs, several of a
TinyViT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cheaplunch.errors import UserError
from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import TinyViT

MASKED = 0.75  # share of the units that MAE hides (He et al.)
SHUFFLED = 0.15  # share of the embeddings that ShED exchanges; this and the next two as in the code of DABS's authors
TEMPERATURE = 0.2  # of e-Mix
VECTOR = 128  # length of the vectors that e-Mix compares


class Objective(nn.Module):
    """Images (B, 3, S, S) in [0, 1], of which the first `shown_px` (B, 2) columns and rows are the image → a loss."""

    def __init__(self, network: Sam, unit_px: int, generator: torch.Generator):
        """The network gives the shapes and is not kept; `generator` draws the head's weights."""
        super().__init__()
        self.unit_px = unit_px
        prompts: Any = network.config.prompt_encoder_config
        self.channels: int = prompts.hidden_size  # of the encoder's output

    def forward(self, network: Sam, images: Tensor, shown_px: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar in float32. `generator` (on the CPU) draws what is mixed, exchanged or hidden."""
        raise NotImplementedError


class EmbeddingMix(Objective):
    """e-Mix: the vector of a mixture of two images' embeddings is near both images' vectors, in proportion.

    λ is uniform in [½, 1] (Beta(1, 1), and the larger of λ and 1 − λ). The other image's share takes no gradient.
    """

    def __init__(self, network: Sam, unit_px: int, generator: torch.Generator):
        super().__init__(network, unit_px, generator)
        self.head = nn.Sequential(nn.LayerNorm(self.channels), _linear(self.channels, VECTOR, generator))

    def forward(self, network: Sam, images: Tensor, shown_px: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(len(images), generator=generator)
        share = torch.maximum(drawn, 1 - drawn).to(images.device)  # (B,)
        partner = torch.randperm(len(images), generator=generator).to(images.device)

        def with_mixtures(embeddings: Tensor) -> Tensor:
            weight = share[:, None, None, None].to(embeddings.dtype)
            return torch.cat([embeddings, weight * embeddings + (1 - weight) * embeddings[partner].detach()])

        found = encode_changed(network, images, shown_px, with_mixtures)  # (2 B, C, h, w)
        plain, mixed = self.head(found.mean(dim=(2, 3))).chunk(2)  # (B, 128) each
        return mix_loss(mixed, plain, share, partner)


def mix_loss(mixed: Tensor, plain: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """Of each mixture, which images of the batch are in it: λ · CE(its own) + (1 − λ) · CE(its partner's), the mean.

    Vectors (B, V) of mixtures and of images, λ (B,), partners (B,). Logits are cosines over the temperature. Knowing
    nothing costs ln B; λ itself costs its entropy, which no encoder can save: ½ on average over λ in [½, 1].
    """
    mixed, plain = F.normalize(mixed.float(), dim=1), F.normalize(plain.float(), dim=1)
    logits = mixed @ plain.T / TEMPERATURE  # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    ours, theirs = (F.cross_entropy(logits, target, reduction="none") for target in (own, partner))
    return (share * ours + (1 - share) * theirs).mean()


class ShuffledEmbeddings(Objective):
    """ShED: of some exchanged embeddings of an image, a linear layer on the encoder's output says which they are."""

    def __init__(self, network: Sam, unit_px: int, generator: torch.Generator):
        super().__init__(network, unit_px, generator)
        self.head = _linear(self.channels, 1, generator)

    def forward(self, network: Sam, images: Tensor, shown_px: Tensor, generator: torch.Generator) -> Tensor:
        shown = shown_units(shown_px.cpu(), images.shape[-1], self.unit_px)  # (B, N)
        source = shuffled(shown, SHUFFLED, generator)  # (B, N)
        found = encode_changed(network, images, shown_px, lambda embeddings: take_units(embeddings, source))
        units = F.adaptive_avg_pool2d(found, math.isqrt(source.shape[1]))  # (B, C, side, side)
        logits = self.head(units.flatten(2).transpose(1, 2)).squeeze(-1)  # (B, N)
        moved = source != torch.arange(source.shape[1])
        return detection_loss(logits, moved.to(images.device), shown.to(images.device))


def detection_loss(logits: Tensor, moved: Tensor, shown: Tensor) -> Tensor:
    """Cross-entropy of two classes, exchanged and not, as one logit: (B, N) each, the mean over units that are shown.

    Knowing nothing costs ln 2; knowing how many are exchanged, 15 %, costs 0.42.
    """
    return F.binary_cross_entropy_with_logits(logits.float()[shown], moved.float()[shown])


class MaskedAutoencoder(Objective):
    """MAE: three quarters of the image are hidden, and a linear layer on the encoder's output says what was there.

    Not as in the paper: its encoder leaves hidden patches out, and a small transformer puts tokens in their place and
    decodes. Windows and convolutions need the whole grid; so the token is put in before the encoder, which leaves a
    linear layer to the decoder, as in SimMIM (Xie et al., CVPR 2022). A ViT gets it in the place of input embeddings, a
    TinyViT, whose first convolutions may see past the edges of a unit, as a colour in the image.
    """

    def __init__(self, network: Sam, unit_px: int, generator: torch.Generator):
        super().__init__(network, unit_px, generator)
        encoder: Any = network.vision_encoder
        self.in_pixels = isinstance(encoder, TinyViT)
        self.cell_px = encoder.config.stride if self.in_pixels else encoder.config.patch_size
        width = 3 if self.in_pixels else encoder.config.hidden_size
        token = torch.full((width,), 0.5) if self.in_pixels else 0.02 * torch.randn(width, generator=generator)
        self.token = nn.Parameter(token)
        self.head = _linear(self.channels, 3 * self.cell_px**2, generator)

    def forward(self, network: Sam, images: Tensor, shown_px: Tensor, generator: torch.Generator) -> Tensor:
        shown = shown_units(shown_px.cpu(), images.shape[-1], self.unit_px)  # (B, N)
        hidden = torch.zeros_like(shown)
        for row, units in zip(hidden, draw_units(shown, MASKED, generator), strict=True):
            row[units] = True
        hidden = hidden.to(images.device)
        if self.in_pixels:
            found = network.encode(self._hide(images.permute(0, 2, 3, 1), hidden).permute(0, 3, 1, 2), shown_px)
        else:
            found = encode_changed(network, images, shown_px, lambda embeddings: self._hide(embeddings, hidden))
        pixels = self.head(found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, 3 cell², h, w)
        return reconstruction_loss(F.pixel_shuffle(pixels, self.cell_px), images, hidden, self.unit_px)

    def _hide(self, values: Tensor, hidden: Tensor) -> Tensor:
        """(B, H, W, C) with the token wherever a unit (B, N) is hidden."""
        side = math.isqrt(hidden.shape[1])
        place = hidden.view(-1, side, side).repeat_interleave(values.shape[1] // side, 1)
        place = place.repeat_interleave(values.shape[2] // side, 2)  # (B, H, W)
        return torch.where(place[..., None], self.token.to(values.dtype), values)


def reconstruction_loss(predicted: Tensor, images: Tensor, hidden: Tensor, unit_px: int) -> Tensor:
    """Mean squared error on hidden units alone, each normalised by its own pixels' mean and deviation.

    (B, 3, S, S) both, hidden (B, N). Grey everywhere costs 1, less where units are flat: those are 0 all over.
    """
    wanted = _pixels_of_units(images.float(), unit_px)  # (B, N, 3 unit²)
    wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (_pixels_of_units(predicted.float(), unit_px) - wanted).square().mean(-1)  # (B, N)
    return error[hidden].mean()


OBJECTIVES: dict[str, type[Objective]] = {"e-mix": EmbeddingMix, "shed": ShuffledEmbeddings, "mae": MaskedAutoencoder}


def read_objectives(words: str) -> dict[str, float]:
    """`e-mix,shed:0.5` → name and weight; UserError where a name is not known or a weight is not above 0."""
    weights: dict[str, float] = {}
    for word in words.split(","):
        name, colon, number = word.strip().partition(":")
        if name not in OBJECTIVES:
            raise UserError(f"--objective {name or repr(words)} is not known; choose from: {', '.join(OBJECTIVES)}")
        if name in weights:
            raise UserError(f"--objective {words} names {name} twice; once is enough")
        try:
            weights[name] = float(number) if colon else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise UserError(f"--objective {word.strip()}: the weight must be a number above 0, as in {name}:0.5")
    return weights


# --- units and embeddings --------------------------------------------------------------------------------------------


def encode_changed(network: Sam, images: Tensor, shown_px: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor:
    """As `network.encode`, but the encoder goes on from what `change` makes of its input embeddings (B, H, W, C)."""
    encoder: Any = network.vision_encoder
    tiny = isinstance(encoder, TinyViT)  # whose patch embedding is of convolutions, and leaves (B, C, H, W)

    def changed(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return change(output.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if tiny else change(output)

    hook = (encoder.patch_embed["seq"] if tiny else encoder.patch_embed).register_forward_hook(changed)
    try:
        return network.encode(images, shown_px)
    finally:
        hook.remove()


def shown_units(shown_px: Tensor, side: int, unit_px: int) -> Tensor:
    """Widths and heights (B, 2) → (B, N) bool, row by row: the units that show any of the image, not padding alone."""
    starts = torch.arange(0, side, unit_px, device=shown_px.device)
    columns, rows = (starts < length[:, None] for length in shown_px.unbind(1))  # (B, side / unit) each
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def draw_units(shown: Tensor, share: float, generator: torch.Generator) -> list[Tensor]:
    """For each image the numbers of a share of its shown units (B, N), rounded up, two at least, in random order."""
    drawn = []
    for row in shown:
        units = row.nonzero()[:, 0]
        order = torch.randperm(len(units), generator=generator)
        drawn.append(units[order[: max(2, math.ceil(share * len(units)))]])
    return drawn


def shuffled(shown: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(B, N): where the embedding at each unit comes from. Those that are exchanged pass one on; none stays."""
    source = torch.arange(shown.shape[1]).repeat(len(shown), 1)
    for row, units in zip(source, draw_units(shown, share, generator), strict=True):
        row[units] = units.roll(1)
    return source


def take_units(embeddings: Tensor, source: Tensor) -> Tensor:
    """(B, H, W, C), each unit of it taken from the place that `source` (B, N) names: the same shape."""
    side = math.isqrt(source.shape[1])
    units = embeddings.unflatten(2, (side, -1)).unflatten(1, (side, -1))  # (B, side, u, side, u, C)
    units = units.transpose(2, 3).flatten(1, 2)  # (B, N, u, u, C)
    source = source.to(embeddings.device)
    moved = units[torch.arange(len(units), device=source.device)[:, None], source]
    return moved.unflatten(1, (side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _pixels_of_units(images: Tensor, unit_px: int) -> Tensor:
    """(B, C, S, S) → (B, N, C · unit²)."""
    return F.pixel_unshuffle(images, unit_px).flatten(2).transpose(1, 2)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # draws nothing of its own
    nn.init.normal_(layer.weight, std=0.02, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
