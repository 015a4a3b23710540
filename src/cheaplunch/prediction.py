"""Predictor: embed a slice once, prompt it many times; and a whole volume from prompts drawn from its truth."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cheaplunch.carrying import carry
from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.slices import Frame, as_rgb
from cheaplunch.errors import UserError
from cheaplunch.merging import CERTAIN, Found, Segmentation, merge_classes, smooth_scores
from cheaplunch.models.depth import embed_slice, slabs_a_slice
from cheaplunch.models.segmenter import Segmenter
from cheaplunch.prompting import Prompting, PromptKind
from cheaplunch.prompts import Prompts, SimulatedUser, furthest_point, jitter_point, oracle_prompts
from cheaplunch.runtime import Precision, autocast

ENCODED_AT_ONCE = 4  # slices; more would not be faster on a CPU
REPORTED_CLICKS = (1, 3, 5, 10)


@dataclass(frozen=True, eq=False)
class Embedded:
    """A slice that is ready for prompts; or those of a slab, one after another (`Predictor.embed_slab`)."""

    embedding: Tensor
    """(1, 256, h, w); of a slab (D, 256, h, w)."""
    frame: Frame
    """Its place in the network's input."""


class Predictor:
    """A segmenter with the image ↔ network geometry around it. Predictions never need gradients or a label."""

    def __init__(
        self,
        segmenter: Segmenter,
        precision: Precision = "fp32",
        smooth_mm: float = 0.0,
        texts: Mapping[int, Tensor] | None = None,
    ):
        """`smooth_mm`: how far an organ's slices steady each other (`smooth_across`).

        `texts`: of a network that is asked by texts, class number → (E,) of what asks for it where nothing is said.
        """
        self.segmenter = segmenter.eval()
        self.texts = texts
        self.smooth_mm = smooth_mm
        self.device = next(segmenter.parameters()).device
        self._precision: Precision = precision
        # Depth branches are told of a slab before it comes (`models.depth.Slab`): threads take turns.
        self._turn = threading.Lock() if segmenter.slab_slices > 1 else contextlib.nullcontext()

    @torch.inference_mode()
    def embed(self, images: np.ndarray) -> list[Embedded]:
        """Slices of one shape, (N, C, H, W) float32 in [0, 1], each on its own → N embeddings."""
        embedded = []
        for start in range(0, len(images), ENCODED_AT_ONCE):
            batch, shown = self._framed(images[start : start + ENCODED_AT_ONCE])
            with self._turn, autocast(self.device, self._precision):
                embeddings = self.segmenter.embed(batch, shown)
            embedded += [Embedded(embedding[None].float(), self._frame(images)) for embedding in embeddings]
        return embedded

    def embed_each(self, images: np.ndarray, numbers: Sequence[int]) -> Iterator[Embedded]:
        """Slices `numbers` of a volume (N, C, H, W), one by one; each has seen those around it if the network can."""
        if self.segmenter.slab_slices > 1:
            yield from map(self.open(images), numbers)
            return
        for start in range(0, len(numbers), ENCODED_AT_ONCE):
            yield from self.embed(images[list(numbers[start : start + ENCODED_AT_ONCE])])

    def open(self, images: np.ndarray, places: int = 1) -> Callable[[int], Embedded]:
        """As `embed_each`, but of any number that is asked for.

        Neighbours are had the cheapest one after another, or by turns at so many `places` of the volume.
        """
        depth = self.segmenter.slab_slices
        keep = lru_cache(places * slabs_a_slice(depth, depth // 2))
        kept = keep(lambda slab: self.embed_slab(images[slab.start : slab.stop]))
        return lambda number: self.embed_slice(images, number, kept)

    def embed_slice(self, images: np.ndarray, number: int, slab_of: Callable[[range], Embedded]) -> Embedded:
        """Slice `number` of a volume (N, C, H, W), from its slabs, which overlap by half and which `slab_of` embeds."""
        depth = self.segmenter.slab_slices
        embedding = embed_slice(number, len(images), depth, depth // 2, lambda slab: slab_of(slab).embedding)
        return Embedded(embedding[None], self._frame(images))

    @torch.inference_mode()
    def embed_slab(self, images: np.ndarray) -> Embedded:
        """D slices of a volume that follow one another, (D, C, H, W), as they see one another: (D, 256, h, w)."""
        if len(images) == 1:
            return self.embed(images)[0]
        batch, shown = self._framed(images)
        with self._turn, autocast(self.device, self._precision):
            [embeddings] = self.segmenter.embed_slabs(batch[None], shown[:1])
        return Embedded(embeddings.float(), self._frame(images))

    def _frame(self, images: np.ndarray) -> Frame:
        height, width = images.shape[-2:]
        return Frame(height, width, self.segmenter.image_size_px)

    def _framed(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Slices (B, C, H, W) in the network's square, (B, 3, S, S), and their width and height there (B, 2)."""
        frame = self._frame(images)
        batch = as_rgb(frame.to_model(torch.from_numpy(images)))
        return batch.to(self.device), torch.tensor([frame.resized[::-1]] * len(batch), device=self.device)

    @torch.inference_mode()
    def probabilities(self, embedded: Embedded, prompts: Prompts) -> np.ndarray:
        """P prompts on one slice → (P, H, W) probability of each target, on the slice's own pixels."""
        return on_slice(embedded, self.logits(embedded, prompts))

    @torch.inference_mode()
    def logits(self, embedded: Embedded, prompts: Prompts) -> Tensor:
        """P prompts on one slice → (P, s, s) as the network gives them, and takes them back as `Prompts.masks`."""
        with autocast(self.device, self._precision):
            return self.segmenter.foreground(embedded.embedding, prompts.to(self.device))[0]

    @torch.inference_mode()
    def classes(self, embedded: Embedded) -> Tensor:
        """Logits (K + 1, s, s) of the background and of every class, by a network without prompts."""
        with autocast(self.device, self._precision):
            return self.segmenter.classes(embedded.embedding)[0]


def on_slice(embedded: Embedded, logits: Tensor) -> np.ndarray:
    """(P, s, s) logits on the network's square → (P, H, W) probabilities on the slice's own pixels."""
    return embedded.frame.from_model(logits).sigmoid().cpu().numpy()


def segment_with_oracle(
    predictor: Predictor,
    case: CaseSlices,
    kind: PromptKind,
    rng: np.random.Generator,
    box_margin_px: float = 0.0,
) -> np.ndarray:
    """Label map (N, H, W) of a labelled case from one draw of prompts: `segment_draws`, in short."""
    [drawn] = segment_draws(predictor, case, Prompting(kind, box_margin_px=box_margin_px), [rng])
    return drawn.label


def segment_draws(
    predictor: Predictor,
    case: CaseSlices,
    prompting: Prompting,
    rngs: Sequence[np.random.Generator],
    keep: Sequence[int] = (),
    numbers: Sequence[int] = (),
    texts: Sequence[Mapping[int, Tensor]] = (),
) -> list[Segmentation]:
    """A labelled case, prompted from its truth once with each of `rngs`; probabilities of the classes `keep` are kept.

    The prompts also tell which classes a slice has: slices without any stay empty, and are not looked at. So do
    results say. With one-click they tell it of the volume alone (`carry_click`). With auto there are none, and
    `numbers` are what the network's classes are called (`segment_auto`). With text there is one of `texts` for each
    draw (`segment_texts`).
    """
    if prompting.kind == "auto":
        return [segment_auto(predictor, case, numbers, keep)] * len(rngs)
    if prompting.kind == "text":
        return segment_texts(predictor, case, texts, keep)
    truth = _truth(case)
    if prompting.kind == "one-click":
        return [carry_click(predictor, case, rng, prompting.point_jitter_px, keep) for rng in rngs]
    drawn: list[dict[int, Found]] = [{clicks: {} for clicks in reported_clicks(prompting)} for _ in rngs]
    shown = [number for number in range(len(truth)) if truth[number].any()]
    for number, embedded in zip(shown, predictor.embed_each(case.image, shown), strict=True):
        classes = _classes(truth[number])
        masks = truth[number] == np.array(classes)[:, None, None]  # (P, H, W)
        decided = np.ones(masks.shape[1:], bool) if case.ignore is None else ~case.ignore[number]  # (H, W)
        for found, rng in zip(drawn, rngs, strict=True):
            if prompting.kind == "clicks":
                answers = _answer_clicks(predictor, embedded, masks, decided, prompting, rng)
            else:
                answers = {1: _answer_once(predictor, embedded, masks, prompting, rng)}
            for clicks, probabilities in answers.items():
                found[clicks][number] = dict(zip(classes, probabilities, strict=True))
    return [Segmentation.of(found, truth.shape, keep, case.step_mm, predictor.smooth_mm) for found in drawn]


def segment_auto(
    predictor: Predictor, case: CaseSlices, numbers: Sequence[int], keep: Sequence[int] = ()
) -> Segmentation:
    """Every slice of a case, labelled or not, by a network of classes, whose outputs 1…K are called `numbers`.

    A pixel is what is likeliest there, the background among it. Slices of a volume steady each other as they do where
    they are prompted: the logarithms of probabilities are averaged. A network that is asked by texts is asked for each
    of the `numbers` by the predictor's text of it. Raises UserError for a single slice where the network needs several.
    """
    if predictor.texts is not None:
        return segment_texts(predictor, case, [{k: predictor.texts[k] for k in numbers}], keep)[0]
    if predictor.segmenter.needs_volumes and len(case.image) == 1:
        raise UserError(f"{case.volume.grid.path} has one slice, and this network sees volumes; take a 2-D one")
    (count, _, height, width), outputs = case.image.shape, (0, *numbers)
    frame, shape = Frame(height, width, predictor.segmenter.image_size_px), (count, height, width)
    label, probabilities = np.zeros(shape, np.uint8), np.zeros((len(keep), *shape), np.float16)
    scores = smooth_scores(_scores(predictor, case.image), case.step_mm, predictor.smooth_mm)
    for number, score in enumerate(scores):
        likely = frame.from_model(torch.from_numpy(score)).softmax(dim=0).numpy()  # (K + 1, H, W)
        label[number] = np.array(outputs, np.uint8)[likely.argmax(axis=0)]
        for place, k in enumerate(keep):
            if k in numbers:
                probabilities[place, number] = likely[outputs.index(k)]
    return Segmentation({1: label}, probabilities)


def _scores(predictor: Predictor, images: np.ndarray) -> Iterator[np.ndarray]:
    """Slices (N, C, H, W) → of each the logarithms of its outputs' probabilities, (K + 1, s, s)."""
    for embedded in predictor.embed_each(images, range(len(images))):
        yield predictor.classes(embedded).log_softmax(dim=0).cpu().numpy()


def segment_texts(
    predictor: Predictor, case: CaseSlices, texts: Sequence[Mapping[int, Tensor]], keep: Sequence[int] = ()
) -> list[Segmentation]:
    """Every slice of a case, labelled or not, asked by each of D `texts`, which are class number → embedding (E,).

    All have the same classes. Every class is asked for on every slice, whether it is there or not. Where two claim a
    pixel the likelier has it; slices of a volume steady each other's logits, as where they are pointed at.
    """
    numbers, (count, _, height, width) = list(texts[0]), case.image.shape
    prompts = Prompts(texts=torch.stack([own[k] for own in texts for k in numbers])[None])  # (1, D · K, E)
    frame, shape = Frame(height, width, predictor.segmenter.image_size_px), (count, height, width)
    labels = np.zeros((len(texts), *shape), np.uint8)
    probabilities = np.zeros((len(texts), len(keep), *shape), np.float16)
    logits = (
        predictor.logits(embedded, prompts).clamp(-MOST_SURE, MOST_SURE).cpu().numpy()  # (D · K, s, s)
        for embedded in predictor.embed_each(case.image, range(count))
    )
    for number, steadied in enumerate(smooth_scores(logits, case.step_mm, predictor.smooth_mm)):
        found = frame.from_model(torch.from_numpy(steadied)).sigmoid().numpy()  # (D · K, H, W)
        for draw, own in enumerate(found.reshape(len(texts), len(numbers), height, width)):
            labels[draw, number] = merge_classes(own, numbers)
            for place, k in enumerate(keep):
                if k in numbers:
                    probabilities[draw, place, number] = own[numbers.index(k)]
    return [Segmentation({1: label}, kept) for label, kept in zip(labels, probabilities, strict=True)]


MOST_SURE = math.log((1 - CERTAIN) / CERTAIN)  # a logit, either way, so that one slice does not outvote its neighbours


def reported_clicks(prompting: Prompting) -> list[int]:
    """After how many clicks a result is looked at; the last is the result that counts. [1] for all but clicks."""
    return [clicks for clicks in REPORTED_CLICKS if clicks < prompting.clicks] + [prompting.clicks]


def _answer_once(
    predictor: Predictor, embedded: Embedded, masks: np.ndarray, prompting: Prompting, rng: np.random.Generator
) -> np.ndarray:
    """(P, H, W) probability of each of the targets `masks`, from one point or box each."""
    px = (prompting.box_margin_px, prompting.point_jitter_px, prompting.box_jitter_px)
    return predictor.probabilities(embedded, oracle_prompts(prompting.kind, masks, embedded.frame, rng, *px))


def _answer_clicks(
    predictor: Predictor,
    embedded: Embedded,
    masks: np.ndarray,
    decided: np.ndarray,
    prompting: Prompting,
    rng: np.random.Generator,
) -> dict[int, np.ndarray]:
    """Clicks given → (P, H, W) probability of each of the targets `masks`, in ascending order.

    The simulated user and the network in turn; after the first click the network also sees its last logits, unless
    `prompting` says otherwise. The user does not see what is predicted where nothing is `decided` (H, W).
    """
    user = SimulatedUser(masks, rng, prompting.point_jitter_px)
    probabilities = np.zeros(masks.shape, np.float32)
    last, answers, reported = None, {}, reported_clicks(prompting)
    for clicks in range(1, prompting.clicks + 1):
        before = user.unfinished
        if clicks > 1:
            user.look((probabilities > 0.5) & decided)
        if user.unfinished:
            shown = None
            if last is not None and prompting.mask_prompt:
                shown = last[[before.index(target) for target in user.unfinished]]
            # Those unfinished have as many clicks each: a padding point would take part in the attention.
            last = predictor.logits(embedded, user.prompts(embedded.frame, shown))  # (U, s, s)
            probabilities[user.unfinished] = on_slice(embedded, last)
        if clicks in reported:
            answers[clicks] = probabilities.copy()
    return answers


def carry_click(
    predictor: Predictor,
    case: CaseSlices,
    rng: np.random.Generator,
    jitter_px: float = 0.0,
    keep: Sequence[int] = (),
) -> Segmentation:
    """A case from one point a class: of the truth, which classes the volume has and one pixel of each.

    The user clicks on the slice with the class's largest area (the first of equals), furthest from its boundary; from
    there `carry` goes to both sides. Every slice is embedded once.
    """
    truth = _truth(case)
    classes = _classes(truth)
    home = {k: int((truth == k).sum(axis=(1, 2)).argmax()) for k in classes}  # class → slice of its click
    first, last = min(home.values(), default=0), max(home.values(), default=0)
    embedded_between: dict[int, Embedded] = {}  # what classes come to from both sides
    embed = predictor.open(case.image, places=2 * len(set(home.values())))

    def ask(number: int, points: dict[int, tuple[float, float]]) -> dict[int, np.ndarray]:
        """Class → its probability (H, W) on slice `number`, from a point on it."""
        embedded = embedded_between.get(number) or embed(number)
        if first <= number <= last:
            embedded_between[number] = embedded
        points_xy = torch.tensor([list(points.values())], dtype=torch.float64)  # (1, P, 2)
        prompts = Prompts.of_points(embedded.frame.point_to_model(points_xy).float())
        return dict(zip(points, predictor.probabilities(embedded, prompts), strict=True))

    clicks = {
        k: jitter_point(furthest_point(truth[number] == k), truth.shape[1:], jitter_px, rng)
        for k, number in home.items()
    }
    seeds = {n: ask(n, {k: clicks[k] for k in classes if home[k] == n}) for n in sorted(set(home.values()))}
    found = carry(seeds, len(truth), ask, lambda probability: probability)
    return Segmentation.of({1: found}, truth.shape, keep, case.step_mm, predictor.smooth_mm)


def _truth(case: CaseSlices) -> np.ndarray:
    if case.label is None:
        raise ValueError("prompts are drawn from the truth: the case needs a label")
    return case.label


def _classes(truth: np.ndarray) -> list[int]:
    """The numbers in a label map, in ascending order, without background."""
    return [int(value) for value in np.unique(truth) if value]
