"""Predictor: embed a slice once, prompt it many times; and a whole volume from prompts drawn on its slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cheaplunch.config import PromptKind
from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.slices import Frame, as_rgb
from cheaplunch.models.segmenter import Segmenter
from cheaplunch.prompts import Prompts, oracle_prompts
from cheaplunch.runtime import Precision, autocast

ENCODED_AT_ONCE = 4  # slices; more would not be faster on a CPU


@dataclass(frozen=True, eq=False)
class Embedded:
    """A slice that is ready for prompts."""

    embedding: Tensor
    """(1, 256, h, w)."""
    frame: Frame
    """Its place in the network's input."""


class Predictor:
    """A segmenter with the image ↔ network geometry around it. Predictions never need gradients or a label."""

    def __init__(self, segmenter: Segmenter, precision: Precision = "fp32"):
        self.segmenter = segmenter.eval()
        self.device = next(segmenter.parameters()).device
        self._precision: Precision = precision

    @torch.inference_mode()
    def embed(self, images: np.ndarray) -> list[Embedded]:
        """Slices of one shape, (N, C, H, W) float32 in [0, 1] → N embeddings."""
        height, width = images.shape[-2:]
        frame = Frame(height, width, self.segmenter.image_size_px)
        embedded = []
        for start in range(0, len(images), ENCODED_AT_ONCE):
            batch = as_rgb(frame.to_model(torch.from_numpy(images[start : start + ENCODED_AT_ONCE])))
            shown = torch.tensor([frame.resized[::-1]] * len(batch), device=self.device)
            with autocast(self.device, self._precision):
                embeddings = self.segmenter.embed(batch.to(self.device), shown)
            embedded += [Embedded(embedding[None].float(), frame) for embedding in embeddings]
        return embedded

    @torch.inference_mode()
    def probabilities(self, embedded: Embedded, prompts: Prompts) -> np.ndarray:
        """P prompts on one slice → (P, H, W) probability of each target, on the slice's own pixels."""
        with autocast(self.device, self._precision):
            logits = self.segmenter.foreground(embedded.embedding, prompts.to(self.device))
        return embedded.frame.from_model(logits[0]).sigmoid().cpu().numpy()


def merge_classes(probabilities: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """(P, H, W) of classes `numbers` → one label map (H, W): the likelier class where two overlap, 0 up to a half."""
    best = probabilities.argmax(axis=0)
    label = np.asarray(numbers, dtype=np.uint8)[best]
    return np.where(probabilities.max(axis=0) > 0.5, label, 0).astype(np.uint8)


def segment_with_oracle(
    predictor: Predictor,
    case: CaseSlices,
    kind: PromptKind,
    rng: np.random.Generator,
    box_margin_px: float = 0.0,
) -> np.ndarray:
    """Label map (N, H, W) of a labelled case, each class of each slice prompted from the truth.

    The prompts also tell which classes a slice has: slices without any stay empty. So do results say.
    """
    truth = case.label
    if truth is None:
        raise ValueError("prompts are drawn from the truth: the case needs a label")
    prediction = np.zeros(truth.shape, np.uint8)
    shown = [number for number in range(len(truth)) if truth[number].any()]
    for start in range(0, len(shown), ENCODED_AT_ONCE):
        chunk = shown[start : start + ENCODED_AT_ONCE]
        for number, embedded in zip(chunk, predictor.embed(case.image[chunk]), strict=True):
            classes = [int(value) for value in np.unique(truth[number]) if value]
            masks = truth[number] == np.array(classes)[:, None, None]  # (P, H, W)
            prompts = oracle_prompts(kind, masks, embedded.frame, rng, box_margin_px)
            prediction[number] = merge_classes(predictor.probabilities(embedded, prompts), classes)
    return prediction
