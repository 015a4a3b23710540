"""The whole network on one screen: images → embeddings → (with prompts, or without) → masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from cheaplunch.config import ModelConfig, slab_slices, training_prompting
from cheaplunch.errors import UserError
from cheaplunch.methods import VOLUMETRIC
from cheaplunch.models.adapters import AdapterSettings, add_adapters
from cheaplunch.models.backbones import get_backbone, load_backbone
from cheaplunch.models.baselines import BASELINES, build_baseline
from cheaplunch.models.depth import encode_slabs
from cheaplunch.models.heads import (
    Head,
    best_mask,
    foreground_logit,
    make_class_outputs,
    make_linear_probe,
    make_two_outputs,
    trained_modules,
)
from cheaplunch.models.lora import (
    DECODER_QV,
    DECODER_TRANSFORMER,
    ENCODER_QV,
    add_lora,
    load_adapter,
    merge,
    train_in_full,
)
from cheaplunch.models.sam import AS_IS, Sam
from cheaplunch.models.text import TextProjection
from cheaplunch.prompts import Prompts

Asking = Callable[[Callable[[Prompts], Tensor]], Prompts]
"""Is given what answers prompts with logits (B, P, H, W), asks it as often as it likes, and gives the last prompts."""


class Segmenter(nn.Module):
    """A network, adapted or not, that says one foreground logit per prompt, or without prompts one of each class.

    `network` is a `Sam`, peft's wrapper of one, or a `PlainNetwork`, of which a `VolumeNetwork` is one.
    """

    def __init__(self, network: Sam | PeftModel | PlainNetwork, head: Head, image_size_px: int, slab_slices: int = 1):
        """`slab_slices`: how many slices of a volume it was made to see at once; 1 where it sees them one by one."""
        super().__init__()
        self.network = network
        self.head: Head = head
        self.image_size_px = image_size_px
        self.slab_slices = slab_slices

    def embed(self, images: Tensor, shown_px: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) in [0, 1] → (B, 256, S / stride, S / stride).

        Of slabs (B, D, 3, S, S) it is the slices at `places` (B,) that are embedded, as ones that have seen the others;
        without places all of them, one after another (B · D, …).
        `shown_px` (B, 2) is each image's width and height in its square; see `Sam.encode` for what it does to padding.
        """
        if places is not None:
            return self.embed_slabs(images, shown_px)[torch.arange(len(places), device=places.device), places]
        if images.ndim == 5:
            return self.embed_slabs(images, shown_px).flatten(0, 1)
        return self.network.encode(images, shown_px)

    def embed_slabs(self, slabs: Tensor, shown_px: Tensor | None = None) -> Tensor:
        """As `embed`, but of every slice: (B, D, 3, S, S) → (B, D, 256, S / stride, S / stride).

        The slices of a slab are of one volume, one after another, and have one width and height.
        """
        if shown_px is not None:
            shown_px = shown_px[:, None].expand(-1, slabs.shape[1], -1)  # (B, D, 2)
        network: Any = self.network
        if isinstance(network, VolumeNetwork):
            return network.encode_slabs(slabs)
        return encode_slabs(network, slabs, shown_px)

    @property
    def needs_volumes(self) -> bool:
        """Whether it can say nothing of a single slice."""
        return isinstance(self.network, VolumeNetwork)

    def decode(self, embeddings: Tensor, prompts: Prompts) -> Tensor:
        """B embeddings and P prompts on each → (B, P, O, H, W) outputs in float32; O is 1 or 2.

        H and W are four times the embedding's. The batch stays B: every image has its own P prompts. A network of
        classes takes empty `Prompts()` and gives (B, 1, K + 1, H, W), the background first.
        """
        masks, quality = self.network.decode(
            embeddings,
            prompts.points_xy,
            prompts.point_labels,
            prompts.boxes_xyxy,
            prompts.masks,
            prompts.texts,
            multimask=self.head != "single",
        )
        if self.head == "two":
            masks = masks[:, :, :2]
        elif self.head == "best":
            masks = best_mask(masks, quality)
        return masks.float()

    def forward(
        self,
        images: Tensor,
        prompts: Prompts | Asking,
        shown_px: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """`embed` and `decode`. `prompts` may also be a user who looks at answers before the one that counts."""
        embeddings = self.embed(images, shown_px, places)
        if not isinstance(prompts, Prompts):
            with torch.no_grad():
                prompts = prompts(lambda asked: self.foreground(embeddings, asked))
            torch.clear_autocast_cache()  # it keeps weights that were cast where no gradient is taken
        return self.decode(embeddings, prompts)

    def foreground(self, embeddings: Tensor, prompts: Prompts) -> Tensor:
        """As `decode`, but the target's logit alone: (B, P, H, W)."""
        return foreground_logit(self.decode(embeddings, prompts))

    def classes(self, embeddings: Tensor) -> Tensor:
        """Logits of the background and of every class (B, K + 1, H, W), of a network of classes."""
        return self.decode(embeddings, Prompts())[:, 0]


class PlainNetwork(nn.Module):
    """A network without prompts and pretraining, with SAM's interface: its embedding is its answer."""

    def __init__(self, body: nn.Module):
        """`body`: (B, 3, S, S) in [0, 1] → logits (B, K + 1, S, S)."""
        super().__init__()
        self.body = body

    def encode(self, images: Tensor, shown_px: Tensor | None = None) -> Tensor:
        return self.body(images)

    def decode(self, embeddings: Tensor, *prompts: Tensor | None, multimask: bool = True) -> tuple[Tensor, Any]:
        """(B, K + 1, S, S) → (B, 1, K + 1, S, S), and no predicted IoU."""
        return embeddings[:, None], None

    @property
    def vision_encoder(self) -> nn.Module:
        """What `--compile` compiles."""
        return self.body

    def checkpoint_encoder(self) -> None:
        raise UserError("--gradient-checkpointing is for SAM's encoders; --accumulate saves memory here")


class VolumeNetwork(PlainNetwork):
    """The same of a network that sees volumes, in slabs of slices; `body`: (B, 3, D, S, S) → (B, K + 1, D, S, S)."""

    def encode(self, images: Tensor, shown_px: Tensor | None = None) -> Tensor:
        raise ValueError("a network of volumes takes slabs of slices, not single ones")

    def encode_slabs(self, slabs: Tensor) -> Tensor:
        """(B, D, 3, S, S) in [0, 1] → (B, D, K + 1, S, S)."""
        return self.body(slabs.movedim(1, 2)).movedim(2, 1)


def training_size_px(backbone: str) -> int:
    """Side of the input to train at where nothing is said: the plain networks take what LiteMedSAM does."""
    return get_backbone("lite-medsam" if backbone in BASELINES else backbone).training_size_px


def build_segmenter(config: ModelConfig, seed: int = 0) -> Segmenter:
    """The network of `config`, with what is to be trained at its start, drawn from `seed`."""
    if config.backbone in BASELINES:
        return _build_plain(config, seed)
    size = config.image_size or get_backbone(config.backbone).image_size_px
    network = load_backbone(config.backbone, size, config.weights)
    if config.pixels == "as-they-are":
        network.norm = AS_IS
    if config.tuning == "none":
        return Segmenter(network, config.mask, size).eval()
    with torch.random.fork_rng(devices=[]):  # peft and torch.nn draw from the global generator
        torch.manual_seed(seed)
        return Segmenter(_adapt(network, config), config.head, size, slab_slices(config))


def _build_plain(config: ModelConfig, seed: int) -> Segmenter:
    if (config.head, config.tuning) != ("classes", "full") or config.weights is not None:
        raise UserError(
            f"--backbone {config.backbone} has no pretrained weights: it is trained in full, without prompts; "
            f"give --method {config.backbone} alone"
        )
    size, slices = config.image_size or training_size_px(config.backbone), slab_slices(config)
    with torch.random.fork_rng(devices=[]):  # torch.nn draws from the global generator
        torch.manual_seed(seed)
        body = build_baseline(config.backbone, len(config.class_names or ()), size, slices)
    kind = VolumeNetwork if config.backbone in VOLUMETRIC else PlainNetwork
    return Segmenter(kind(body), "classes", size, slices)


def _adapt(network: Sam, config: ModelConfig) -> Sam | PeftModel:
    """Gives the network its outputs, freezes it, and opens to training what `config` says."""
    classes = len(config.class_names or ())
    if config.tuning == "linear":
        make_linear_probe(network, classes)
        return train_in_full(network, ["mask_decoder"])
    if config.head == "classes":
        make_class_outputs(network, classes)
    else:
        make_two_outputs(network, config.head_start)
    kind, _ = training_prompting(config)
    if kind == "text":
        width = network.prompt_encoder.hidden_size
        network.text_projection = TextProjection(config.text_width or 0, width, torch.default_generator)
    whole = trained_modules(config.head, kind, classes)
    if config.tuning == "adapter":
        settings = AdapterSettings(config.adapter_parts, config.adapter_width, config.adapter_scale)
        head = [name for name in whole if not name.startswith("prompt_encoder.")]
        add_adapters(network, settings, torch.default_generator, whole if config.adapter_prompts else head)
        return network
    if config.tuning == "full":
        whole.append("vision_encoder")
    if config.decoder_tuning == "full":
        whole.append(DECODER_TRANSFORMER)
    targets = [ENCODER_QV] if config.tuning == "lora" else []
    if config.decoder_tuning == "lora":
        targets.append(DECODER_QV)
    return add_lora(network, config.lora_rank, targets, whole) if targets else train_in_full(network, whole)


def load_segmenter(config: ModelConfig, adapter: Path) -> Segmenter:
    """A fine-tuned network, ready to predict: plain, with the adapter merged into it."""
    segmenter = build_segmenter(config)
    load_adapter(segmenter.network, adapter)
    plain = merge(segmenter.network)
    return Segmenter(plain, segmenter.head, segmenter.image_size_px, segmenter.slab_slices).eval()
