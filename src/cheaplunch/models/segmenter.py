"""The whole network on one screen: images → embeddings → (with prompts) → masks."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from cheaplunch.config import ModelConfig
from cheaplunch.models.backbones import get_backbone, load_backbone
from cheaplunch.models.heads import Head, foreground_logit, make_two_outputs, trained_modules
from cheaplunch.models.lora import DECODER_QV, DECODER_TRANSFORMER, ENCODER_QV, add_lora, load_adapter, merge
from cheaplunch.models.sam import Sam
from cheaplunch.prompts import Prompts


class Segmenter(nn.Module):
    """A SAM network, adapted or not, that says one foreground logit per prompt.

    `network` is a `Sam` or peft's wrapper of one.
    """

    def __init__(self, network: Sam | PeftModel, head: Head, image_size_px: int):
        super().__init__()
        self.network = network
        self.head: Head = head
        self.image_size_px = image_size_px

    def embed(self, images: Tensor, shown_px: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) in [0, 1] → (B, 256, S / stride, S / stride).

        `shown_px` (B, 2) is each image's width and height in its square; see `Sam.encode` for what it does to padding.
        """
        return self.network.encode(images, shown_px)

    def decode(self, embeddings: Tensor, prompts: Prompts) -> Tensor:
        """B embeddings and P prompts on each → (B, P, O, H, W) outputs in float32; O is 1 or 2.

        H and W are four times the embedding's. The batch stays B: every image has its own P prompts.
        """
        masks, _ = self.network.decode(
            embeddings,
            prompts.points_xy,
            prompts.point_labels,
            prompts.boxes_xyxy,
            prompts.masks,
            multimask=self.head == "two",
        )
        return masks[:, :, :2].float()

    def forward(self, images: Tensor, prompts: Prompts, shown_px: Tensor | None = None) -> Tensor:
        return self.decode(self.embed(images, shown_px), prompts)

    def foreground(self, embeddings: Tensor, prompts: Prompts) -> Tensor:
        """As `decode`, but the target's logit alone: (B, P, H, W)."""
        return foreground_logit(self.decode(embeddings, prompts))


def build_segmenter(config: ModelConfig, seed: int = 0) -> Segmenter:
    """The network of `config`, its LoRA layers and head at their start, drawn from `seed`."""
    size = config.image_size or get_backbone(config.backbone).image_size_px
    network = load_backbone(config.backbone, size, config.weights)
    if config.tuning == "none":
        return Segmenter(network, "single", size).eval()
    with torch.random.fork_rng(devices=[]):  # peft and torch.nn draw from the global generator
        torch.manual_seed(seed)
        make_two_outputs(network, config.head_start)
        targets = (ENCODER_QV, DECODER_QV) if config.decoder_tuning == "lora" else (ENCODER_QV,)
        whole = [DECODER_TRANSFORMER] if config.decoder_tuning == "full" else []
        adapted = add_lora(network, config.lora_rank, targets, [*trained_modules("two"), *whole])
    return Segmenter(adapted, "two", size)


def load_segmenter(config: ModelConfig, adapter: Path) -> Segmenter:
    """A fine-tuned network, ready to predict: plain, with the adapter merged into it."""
    segmenter = build_segmenter(config)
    load_adapter(segmenter.network, adapter)  # pyright: ignore[reportArgumentType]
    plain = merge(segmenter.network)  # pyright: ignore[reportArgumentType]
    return Segmenter(plain, segmenter.head, segmenter.image_size_px).eval()
