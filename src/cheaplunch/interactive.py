"""A volume or picture open for prompts: what `predict`, the server and 3D Slicer share.

A `Model` is a run that is ready to answer, an `OpenCase` an image on which it is asked. Prompts go in and answers come
out as values: nothing of them is kept, so that to undo is to ask with fewer prompts. What is kept are embeddings.

Threads may share a `Model`, an `EmbeddingCache` and an `OpenCase`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cheaplunch import runtime
from cheaplunch.carrying import carry
from cheaplunch.config import RunConfig, asked_by_text
from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Axis, Places, Window, from_slices, slice_step_mm, to_slices
from cheaplunch.data.subset import take_classes
from cheaplunch.data.volume import Coordinates, Volume, read_volume, write_mask
from cheaplunch.errors import UserError
from cheaplunch.merging import Segmentation
from cheaplunch.models.segmenter import load_segmenter
from cheaplunch.models.text import TextBank
from cheaplunch.prediction import Embedded, Predictor, on_slice, segment_auto, segment_texts
from cheaplunch.prompts import Prompts
from cheaplunch.runs import RunFolder, read_json

CACHE_BYTES = 512 * 2**20  # 128 slices at LiteMedSAM's 256 px, or at a ViT's 1024 px

# --- what is asked and answered --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A click or a box as people give it."""

    class_name: str
    coordinates: Coordinates
    corners: tuple[tuple[float, ...], ...]
    """One place for a click; for a box two opposite voxels that belong to it."""
    positive: bool = True
    """Of a click: on the target, or off it."""
    source: str = field(default="a prompt", compare=False)
    """What messages call it."""


@dataclass(frozen=True)
class Click:
    """A pixel of a slice that is on a class, or off it."""

    number: int  # of the class in masks
    slice_number: int
    xy: tuple[float, float]  # px of the slice
    positive: bool = True


@dataclass(frozen=True)
class Box:
    """What of a slice a class lies in."""

    number: int  # of the class in masks
    slice_number: int
    xyxy: tuple[float, float, float, float]  # first and last px of the slice


Prompt = Click | Box


@dataclass(frozen=True, eq=False)
class Answer:
    """What the network says of one class on one slice."""

    probability: np.ndarray
    """(H, W) float32."""
    logits: Tensor
    """(s, s) as the network gave them, for it to go on from."""

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool."""
        return self.probability > 0.5

    @property
    def quality(self) -> float | None:
        """Mean probability inside the mask, 0.5 to 1; None where it is empty.

        Not the IoU that SAM predicts of itself: fine-tuning leaves that head as it was while the masks change.
        """
        inside = self.probability[self.mask]
        return float(inside.mean(dtype=np.float64)) if inside.size else None


Answers = dict[int, dict[int, Answer]]
"""Slice number → class number → what was found, each class on its own."""


def quality_of(answers: Answers, labels: Mapping[str, int]) -> dict[str, float | None]:
    """Of each class in `labels` the mean of `Answer.quality` over its slices, each by the pixels of its mask."""
    quality: dict[str, float | None] = {}
    for name, number in labels.items():
        inside = [(a.quality, a.mask.sum()) for classes in answers.values() if (a := classes.get(number)) is not None]
        inside = [(mean, px) for mean, px in inside if mean is not None]
        quality[name] = float(sum(m * px for m, px in inside) / sum(px for _, px in inside)) if inside else None
    return quality


# --- what is kept ----------------------------------------------------------------------------------------------------


class EmbeddingCache:
    """Embeddings of slices, those used longest ago out first; cases and threads may share one."""

    def __init__(self, limit_bytes: int = CACHE_BYTES):
        """At least one embedding is kept, however large."""
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Future[Embedded]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Embedded]) -> Embedded:
        """What is kept under `key`; made once, however many threads ask for it at a time."""
        with self._lock:
            future = self._kept.get(key)
            mine = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
        if mine:
            try:
                embedded = make()
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
                raise
            future.set_result(embedded)
            self._count(_bytes_of(embedded))
        return future.result()

    @property
    def bytes(self) -> int:
        """How much is kept."""
        return self._bytes

    def _count(self, more_bytes: int) -> None:
        with self._lock:
            self._bytes += more_bytes
            ready = [key for key, future in self._kept.items() if future.done()]  # the others are being waited for
            for key in ready[:-1]:
                if self._bytes <= self._limit_bytes:
                    return
                self._bytes -= _bytes_of(self._kept.pop(key).result())

    def drop(self, wanted: Callable[[Any], bool]) -> None:
        """Forgets what is ready under the keys for which `wanted` holds."""
        with self._lock:
            for key in [key for key, future in self._kept.items() if future.done() and wanted(key)]:
                self._bytes -= _bytes_of(self._kept.pop(key).result())


def _bytes_of(embedded: Embedded) -> int:
    return embedded.embedding.numel() * embedded.embedding.element_size()


class AnswerCache:
    """What the network has said, those answers used longest ago out first; cases and threads may share one.

    What is kept is a whole question and its answer: all classes that are asked of a slice together, since others beside
    them change the last digits.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, dict[int, Answer]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> dict[int, Answer] | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: Hashable, answers: dict[int, Answer]) -> None:
        with self._lock:
            self._bytes += _answer_bytes(answers) - _answer_bytes(self._kept.pop(key, {}))
            self._kept[key] = answers
            while self._bytes > self._limit_bytes:
                self._bytes -= _answer_bytes(self._kept.popitem(last=False)[1])


def _answer_bytes(answers: dict[int, Answer]) -> int:
    return sum(a.probability.nbytes + a.logits.numel() * a.logits.element_size() for a in answers.values())


# --- an image and a run ----------------------------------------------------------------------------------------------


class OpenCase:
    """A volume or picture, windowed and cut into slices, which are embedded as they are needed."""

    def __init__(
        self,
        predictor: Predictor,
        volume: Volume,
        window: Window,
        axis: Axis = "axial",
        cache: EmbeddingCache | None = None,
        answers: AnswerCache | None = None,
    ):
        """With `answers` the network is not asked the same twice: all prompts come at every click, most as before.

        UserError where a picture is to be cut along another axis than its own."""
        if volume.spacing_mm is None and axis != "axial":
            raise UserError(f"{volume.grid.path} is a picture, and the run has learned from {axis} slices of volumes")
        self.predictor = predictor
        self.volume = volume
        self.axis: Axis = axis
        self.places = Places(volume.grid, axis)
        self.images = np.ascontiguousarray(to_slices(window(volume.array), axis))
        """(N, C, H, W) in [0, 1], as the network is to see them."""
        self._step_mm = slice_step_mm(volume, axis)
        self._cache = EmbeddingCache() if cache is None else cache
        self._answers = answers
        self._own = object()  # tells its slices from other cases' in the caches

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, H, W) of its slices."""
        count, _, height, width = self.images.shape
        return count, height, width

    def close(self) -> None:
        """Takes its embeddings out of a cache that others use too."""
        self._cache.drop(lambda key: key[0] is self._own)

    def place(self, mark: Mark, labels: Mapping[str, int]) -> Prompt:
        """A mark on its slice. UserError names the mark whose class is unknown, or which lies off the image."""
        if mark.class_name not in labels:
            raise UserError(f"{mark.source}: there is no class {mark.class_name!r}; choose of: {', '.join(labels)}")
        if len(mark.corners[0]) == 2 and self.shape[0] > 1:
            raise UserError(f"{mark.source} has two numbers, and the image has {self.shape[0]} slices; add the third")
        corners = [self.places.on_slices(corner, mark.coordinates) for corner in mark.corners]
        count, height, width = self.shape
        for (x, y, z), given in zip(corners, mark.corners, strict=True):
            if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5 and -0.5 <= z < count - 0.5):
                grid = self.volume.grid
                raise UserError(
                    f"{mark.source}: {mark.coordinates} {list(given)} lies outside of {grid.path.name}, which has "
                    f"{' × '.join(map(str, grid.shape))} {'px' if grid.affine is None else 'voxels'}"
                )
        numbers = sorted({math.floor(z + 0.5) for _, _, z in corners})
        if len(numbers) > 1:
            raise UserError(
                f"{mark.source}: the box goes from slice {numbers[0]} to {numbers[-1]} ({self.axis}); "
                "give both corners on one slice"
            )
        number, [slice_number] = labels[mark.class_name], numbers
        xs, ys = sorted(x for x, _, _ in corners), sorted(y for _, y, _ in corners)
        if len(corners) == 1:
            return Click(number, slice_number, (xs[0], ys[0]), mark.positive)
        return Box(number, slice_number, (xs[0], ys[0], xs[1], ys[1]))

    def segment(self, prompts: Iterable[Prompt], before: Answers | None = None) -> Answers:
        """Each prompted class on each slice it is prompted on, from all its clicks and its box there.

        Where `before` has an answer for it, the network goes on from that; few networks have learned to
        (docs/prompts.md). A class with nothing but negative clicks on a slice has nothing they could take away from,
        and no answer; `propagate` heeds them. UserError for a prompt off the image.
        """
        answers: Answers = {}
        for number, asked in sorted(self._gather(prompts).items()):
            wanted = {k: said for k, said in sorted(asked.items()) if said.box or any(said.positive)}
            if wanted:
                last = {k: answer.logits for k, answer in (before or {}).get(number, {}).items()}
                answers[number] = self._ask(number, wanted, last)
        return answers

    def propagate(self, prompts: Iterable[Prompt], answers: Answers, reach: int | None = None) -> Answers:
        """`answers` of `segment`, carried to the slices around as `carry` has it, at most `reach` slices far.

        Negative clicks on a slice that is reached are given along with the point that is carried to it.
        """
        asked = self._gather(prompts)

        def ask(number: int, points: Mapping[int, tuple[float, float]]) -> dict[int, Answer]:
            off = {k: said.clicks for k, said in asked.get(number, {}).items()}
            return self._ask(
                number, {k: _Asked([Click(k, number, point), *off.get(k, [])]) for k, point in points.items()}, {}
            )

        return carry(answers, self.shape[0], ask, lambda answer: answer.probability, reach)

    def label(self, answers: Answers) -> np.ndarray:
        """One label map (Z, Y, X) uint8 on the volume's array: classes merged, slices steadied as in evaluation."""
        found = {number: {k: a.probability for k, a in classes.items()} for number, classes in answers.items()}
        merged = Segmentation.of({1: found}, self.shape, (), self._step_mm, self.predictor.smooth_mm)
        return from_slices(merged.label, self.axis)

    def label_unprompted(self, numbers: Sequence[int], texts: Mapping[int, Tensor] | None = None) -> np.ndarray:
        """As `label`, by a network that takes no prompts and whose outputs are the classes `numbers`.

        A network that is asked by texts is asked by its own, or by `texts`, which are class number → embedding (E,).
        """
        case = CaseSlices(self.images, None, self.volume, step_mm=self._step_mm)
        if texts is not None:
            return from_slices(segment_texts(self.predictor, case, [texts])[0].label, self.axis)
        return from_slices(segment_auto(self.predictor, case, numbers).label, self.axis)

    def write(self, label: np.ndarray, path: Path, names: Mapping[str, int]) -> None:
        """A label map of `label` on the exact grid of the image's file, in the format of `path`'s ending."""
        write_mask(label, self.volume, path, names)

    def embedded(self, number: int) -> Embedded:
        """A slice ready for prompts, from what is in the cache, or embedded now."""

        def slab_of(slab: range) -> Embedded:  # alone: what else is embedded must not change the last digits
            images = self.images[slab.start : slab.stop]
            return self._cache.get((self._own, slab), lambda: self.predictor.embed_slab(images))

        return self.predictor.embed_slice(self.images, number, slab_of)

    def _gather(self, prompts: Iterable[Prompt]) -> dict[int, dict[int, _Asked]]:
        """Slice number → class → all that is said of it there."""
        gathered: dict[int, dict[int, _Asked]] = {}
        count, height, width = self.shape
        for prompt in prompts:
            xs, ys = (
                (prompt.xy[:1], prompt.xy[1:]) if isinstance(prompt, Click) else (prompt.xyxy[::2], prompt.xyxy[1::2])
            )
            inside = all(-0.5 <= x < width - 0.5 for x in xs) and all(-0.5 <= y < height - 0.5 for y in ys)
            if not (0 <= prompt.slice_number < count and inside):
                raise UserError(f"{prompt} lies outside of {count} slices of {width} × {height} px")
            said = gathered.setdefault(prompt.slice_number, {}).setdefault(prompt.number, _Asked())
            if isinstance(prompt, Click):
                said.clicks.append(prompt)
            elif said.box is None:
                said.box = prompt
            else:
                raise UserError(f"slice {prompt.slice_number} has two boxes of class {prompt.number}; leave one")
        return gathered

    def _ask(self, number: int, asked: Mapping[int, _Asked], last: Mapping[int, Tensor]) -> dict[int, Answer]:
        """Class → answer, in the order of `asked`: from what is kept, or found now."""
        if self._answers is None or last:
            return self._find(number, asked, last)
        question = (self._own, number, tuple((k, tuple(said.clicks), said.box) for k, said in asked.items()))
        known = self._answers.get(question)
        if known is None:
            known = self._find(number, asked, last)
            self._answers.keep(question, known)
        return known

    def _find(self, number: int, asked: Mapping[int, _Asked], last: Mapping[int, Tensor]) -> dict[int, Answer]:
        """As `_ask`, from the network; those asked in one way share one pass of the decoder."""
        embedded = self.embedded(number)
        alike: dict[Hashable, list[int]] = {}  # a padding point would take part in the attention
        for k, said in asked.items():
            alike.setdefault((len(said.clicks), said.box is None, k in last), []).append(k)
        answers: dict[int, Answer] = {}
        for (_, _, goes_on), classes in alike.items():  # pyright: ignore[reportGeneralTypeIssues]
            prompts = _prompts([asked[k] for k in classes], embedded, [last[k] for k in classes] if goes_on else None)
            logits = self.predictor.logits(embedded, prompts)  # (P, s, s)
            for k, probability, own in zip(classes, on_slice(embedded, logits), logits, strict=True):
                answers[k] = Answer(probability, own)
        return {k: answers[k] for k in asked}


@dataclass
class _Asked:
    """What is said of one class on one slice."""

    clicks: list[Click] = field(default_factory=list)
    box: Box | None = None

    @property
    def positive(self) -> list[bool]:
        return [click.positive for click in self.clicks]


def _prompts(asked: Sequence[_Asked], embedded: Embedded, last: Sequence[Tensor] | None) -> Prompts:
    """P classes of one slice, all asked in the same way, in px of the network's input."""
    points_xy = point_labels = boxes_xyxy = None
    if asked[0].clicks:
        points = torch.tensor([[click.xy for click in said.clicks] for said in asked], dtype=torch.float64)  # (P, K, 2)
        points_xy = embedded.frame.point_to_model(points).float()[None]
        point_labels = torch.tensor([said.positive for said in asked]).long()[None]  # (1, P, K)
    if asked[0].box is not None:
        boxes = np.array([said.box.xyxy for said in asked if said.box])[None]  # (1, P, 4)
        boxes_xyxy = torch.from_numpy(embedded.frame.box_to_model(boxes)).float()
    return Prompts(points_xy, point_labels, boxes_xyxy, None if last is None else torch.stack([*last])[None])


@dataclass(frozen=True, eq=False)
class Model:
    """A run that is ready to answer."""

    predictor: Predictor
    labels: Mapping[str, int]
    """Class → its number in masks."""
    window: Window
    axis: Axis
    channels: int | None
    """That an image must have; None where the run does not say."""
    prompted: bool = True
    """Whether it takes clicks and boxes; otherwise it finds its classes by itself (`OpenCase.label_unprompted`)."""
    texts: TextBank | None = None
    """Of a network that is asked by texts."""

    def open(self, images: Sequence[Path], cache: EmbeddingCache | None = None) -> OpenCase:
        """An image, one source a channel. UserError where it is damaged, or not of the kind the run learned from."""
        return self.open_volume(read_volume(images), cache)

    def open_volume(
        self, volume: Volume, cache: EmbeddingCache | None = None, answers: AnswerCache | None = None
    ) -> OpenCase:
        """As `open`, of one that is read already."""
        if self.channels not in (None, volume.grid.channels):
            raise UserError(
                f"{volume.grid.path} has {volume.grid.channels} channels and the run learned from {self.channels}; "
                "give the same ones, each as a file of its own (NAME_0000, NAME_0001, …) or all in one"
            )
        return OpenCase(self.predictor, volume, self.window, self.axis, cache, answers)


def open_model(run: RunFolder, config: RunConfig) -> Model:
    """The network of a run with what goes around it; `config` is the run's, with what the user wants otherwise.

    UserError where the run is not finished, or does not say what its classes are.
    """
    if not run.finished():
        raise UserError(f"{run.root} is not finished; `cheaplunch finetune --resume` ends its training")
    labels, channels = _classes_and_channels(run, config)
    device = runtime.pick_device(config.device)
    precision = runtime.pick_precision(config.training.precision, device)
    segmenter = load_segmenter(config.model, run.adapter).to(device)
    window = Window() if config.data.window is None else Window(*config.data.window)
    bank = TextBank.load(run.texts, config.model.clip) if asked_by_text(config.model) else None
    predictor = Predictor(segmenter, precision, config.model.smooth_mm, bank.ask_names(labels) if bank else None)
    prompted = config.model.head != "classes" and bank is None
    return Model(predictor, labels, window, config.data.axis, channels, prompted, bank)


def _classes_and_channels(run: RunFolder, config: RunConfig) -> tuple[dict[str, int], int | None]:
    """As the run says, else as the images that it learned from do."""
    said = read_json(run.environment) if run.environment.is_file() else {}
    labels, channels = said.get("labels"), said.get("channels")
    numbered = labels is None or (isinstance(labels, dict) and all(isinstance(k, int) for k in labels.values()))
    if not numbered or not isinstance(channels, int | None):
        raise UserError(f"{run.environment} is damaged (labels or channels); restore the file, or train anew")
    try:
        if labels is None or channels is None:
            dataset = take_classes(open_dataset(config.data.data), config.data.classes)
            labels, channels = dataset.labels, len(dataset.channel_names)
    except UserError:
        if labels is None:
            raise UserError(
                f"{run.environment} does not name the classes, and the images are no longer at {config.data.data}; "
                "put them back there, or train anew"
            ) from None
    return dict(labels), channels
