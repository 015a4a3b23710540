"""What one step works on: images, what is asked of each, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cheaplunch.augmentation import augment
from cheaplunch.config import RunConfig, training_prompting
from cheaplunch.data.slices import as_rgb
from cheaplunch.material import Material
from cheaplunch.methods import VOLUMETRIC
from cheaplunch.models.text import TextBank
from cheaplunch.prompts import Prompts, SimulatedUser, jitter_box, tight_box, training_points
from cheaplunch.synthesis import Batch, derive_seed, draw_empty
from cheaplunch.texts import Phrasings

Item = TypeVar("Item")

UNION_SHARE, ABSENT_SHARE = 0.25, 0.5  # of the texts that an image is asked with (MSA: not stated)
BOX_JITTER = 20 / 1024  # of the side: MedSAM's training boxes are up to so much too wide, on each side


@dataclass(frozen=True, eq=False)
class Work:
    """What one process does in one step: B images with P prompts each, or none."""

    images: Tensor
    """(B, 3, S, S) in [0, 1]."""
    targets: Tensor
    """(B, P, S, S) bool: the mask that each prompt asks for. Without prompts the label map (B, 1, S, S) of 0…K, or of
    networks of volumes those of all the slab's slices (B, D, S, S), some of which are UNLABELLED."""
    prompts: Prompts | ClickingUsers
    shown_px: Tensor
    """Width and height (B, 2) that each image fills of its square."""
    seed: int = 0
    """Of what the network itself draws: dropout."""
    slabs: Tensor | None = None
    """(B, D, 3, S, S): the images, each among the slices around it, for a network that sees several at once."""
    places: Tensor | None = None
    """Of slabs, which slice of each the image is (B,); None where the network answers on all of them."""

    @property
    def seen(self) -> Tensor:
        """What the network is given: images, or slabs."""
        return self.images if self.slabs is None else self.slabs

    def parts(self, count: int) -> Iterator[Work]:
        """The same in `count` equal parts of its images."""
        size = len(self.images) // count
        for start in range(0, len(self.images), size):
            some = slice(start, start + size)
            pictures = self.images[some], self.targets[some]
            slabs, places = (None if t is None else t[some] for t in (self.slabs, self.places))
            yield Work(*pictures, self.prompts[some], self.shown_px[some], self.seed + start, slabs, places)

    def to(self, device: torch.device) -> Work:
        images, targets, shown_px = (_send(t, device) for t in (self.images, self.targets, self.shown_px))
        slabs, places = (None if t is None else _send(t, device) for t in (self.slabs, self.places))
        return Work(images, targets, self.prompts.to(device), shown_px, self.seed, slabs, places)


@dataclass(frozen=True, eq=False)
class ClickingUsers:
    """A simulated user an image, the same as in evaluation, in the place of prompts that are known beforehand.

    Each clicks on every target of its image, looks at what the network answers, and clicks again, `clicks` times in
    all. Calling it with a function that answers gives the prompts of the last time: all clicks, and the logits of the
    answer before. A target that was found exactly gets its last click once more, so that all have as many.
    """

    targets: Tensor
    """(B, P, S, S) bool."""
    seeds: tuple[int, ...]
    """Of each image's user."""
    clicks: int

    def __getitem__(self, images: slice) -> ClickingUsers:
        return replace(self, targets=self.targets[images], seeds=self.seeds[images])

    def to(self, device: torch.device) -> ClickingUsers:
        return replace(self, targets=self.targets.to(device))

    def __call__(self, answer: Callable[[Prompts], Tensor]) -> Prompts:
        """`answer` gives the logits (B, P, s, s) that the network answers prompts with."""
        pairs = zip(self.targets.cpu().numpy(), self.seeds, strict=True)
        users = [SimulatedUser(targets, np.random.default_rng(seed)) for targets, seed in pairs]
        last = None
        for given in range(1, self.clicks):
            last = answer(self._asked(users, given, last))
            seen = F.interpolate(last.float(), self.targets.shape[-2:], mode="bilinear") > 0  # (B, P, S, S)
            for user, masks in zip(users, seen.cpu().numpy(), strict=True):
                user.look(masks)
        return self._asked(users, self.clicks, last)

    def _asked(self, users: Sequence[SimulatedUser], count: int, masks: Tensor | None) -> Prompts:
        """`count` clicks on every target, (B, P, count), in px of the network's input, with the masks before."""
        clicks = [[(own + own[-1:] * count)[:count] for own in user.clicks] for user in users]
        placed = torch.tensor(clicks, dtype=torch.float32, device=self.targets.device)  # (B, P, count, 3)
        return Prompts(placed[..., :2], placed[..., 2].long(), masks=masks)


def draw_work(material: Material, step: int, offsets: Sequence[int]) -> Work:
    """Images number `offsets` of the batch of `step`, with what each prompt asks for and where it points."""
    config, seed = material.config, material.config.seed
    number = [(step * config.training.batch_size + offset) % config.synthesis.synthetic for offset in offsets]
    if material.slabs is None:
        batch, places = material.samples(number), [0] * len(number)
    else:
        batch, places = material.slabs.samples(material.pool, number, config.synthesis, seed)
    _put_empty(material, batch, places, step, offsets)
    if config.training.augmentation == "samed":
        batch = augment(batch, [_generator(seed, "augmentation", step, offset) for offset in offsets])
    drawn = derive_seed(seed, "network", step, *offsets)
    depth = 1 if material.slabs is None else material.slabs.depth
    seen = as_rgb(batch.images.unflatten(1, (depth, -1)))  # (B, D, 3, S, S)
    each = torch.arange(len(places)), torch.tensor(places)
    images = seen[each]
    if config.model.backbone in VOLUMETRIC:
        return Work(images, batch.labels, Prompts(), batch.sizes, drawn, seen)
    around = (None, None)
    if material.slabs is not None:
        around, batch = (seen, each[1]), replace(batch, labels=batch.labels[each])
    if config.model.head == "classes":
        return Work(images, batch.labels[:, None], Prompts(), batch.sizes, drawn, *around)
    if material.texts is not None:
        masks, prompts = _ask_by_text(material.texts, batch.labels.cpu(), material, step, offsets)
        return Work(images, masks, prompts, batch.sizes, drawn, *around)
    targets, points = [], []
    for label, offset in zip(batch.labels.cpu(), offsets, strict=True):
        generator = _generator(seed, "prompts", step, offset)
        targets.append(draw_targets(label, config.training.prompts_per_image, material.pool.classes, generator))
        points.append(training_points(targets[-1], generator, config.training.furthest_share))
    masks = torch.stack(targets)  # (B, P, S, S)
    prompts = _prompts(config, masks, torch.stack(points), batch.sizes, step, offsets)
    return Work(images, masks, prompts, batch.sizes, drawn, *around)


def _prompts(
    config: RunConfig, masks: Tensor, points: Tensor, sizes: Tensor, step: int, offsets: Sequence[int]
) -> Prompts | ClickingUsers:
    """As `training_prompts` says, on the targets (B, P, S, S) of images of such widths and heights (B, 2)."""
    kind, most = training_prompting(config.model)
    if kind == "point":
        return Prompts.of_points(points)
    seeds = tuple(derive_seed(config.seed, kind, step, offset) for offset in offsets)
    if kind == "clicks":
        count = 1 + derive_seed(config.seed, "click count", step) % most  # equal for all of the batch
        return ClickingUsers(masks, seeds, count)
    boxes = []
    for targets, (width, height), seed in zip(masks.numpy(), sizes.tolist(), seeds, strict=True):
        rng, jitter_px = np.random.default_rng(seed), BOX_JITTER * masks.shape[-1]
        boxes.append([jitter_box(tight_box(target), (height, width), jitter_px, rng) for target in targets])
    return Prompts(boxes_xyxy=torch.tensor(boxes, dtype=torch.float32))


def _ask_by_text(
    bank: TextBank, labels: Tensor, material: Material, step: int, offsets: Sequence[int]
) -> tuple[Tensor, Prompts]:
    """Targets (B, P, S, S) on images with such labels (B, S, S), and the texts that ask for them."""
    count, masks, texts = material.config.training.prompts_per_image, [], list[str]()
    for label, offset in zip(labels, offsets, strict=True):
        asked = draw_texts(label, count, bank.phrasings, _generator(material.config.seed, "prompts", step, offset))
        masks.append(torch.stack([mask for _, mask in asked]))
        texts += [text for text, _ in asked]
    return torch.stack(masks), Prompts(texts=bank.vectors(texts).unflatten(0, (len(labels), count)))


def draw_texts(label: Tensor, count: int, phrasings: Phrasings, generator: torch.Generator) -> list[tuple[str, Tensor]]:
    """What an image with such a label (S, S) is asked: `count` texts, each with the mask (S, S) bool that it asks for.

    A text says nothing of whether its class is there, and so the network has to learn what to do where it is not. Of
    the texts UNION_SHARE are of several classes, whose union is the target; of the others ABSENT_SHARE are of classes
    that the image does not show, and the rest of those that it does, each in turn in an order drawn at random.
    """
    names = list(phrasings.training)
    shown = [k for k in range(1, len(names) + 1) if (label == k).any()]
    turns = {True: _in_turn(shown, generator), False: _in_turn(_others(len(names), shown), generator)}
    asked = []
    for several, absent in torch.rand(count, 2, generator=generator).tolist():
        if phrasings.unions and several < UNION_SHARE:
            union = _any_of(phrasings.unions, generator)
            wanted = [1 + names.index(name) for name in union.classes]
            asked.append((union.text, torch.isin(label, torch.tensor(wanted, dtype=label.dtype))))
            continue
        k = next(turns[False], None) if absent < ABSENT_SHARE or not shown else None
        k = next(turns[True]) if k is None else k
        asked.append((_any_of(phrasings.training[names[k - 1]], generator), label == k))
    return asked


def _others(count: int, shown: Sequence[int]) -> list[int]:
    return [k for k in range(1, count + 1) if k not in shown]


def _in_turn(classes: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """Without end, in an order of its own each time around; nothing where there are none."""
    while classes:
        yield from (classes[place] for place in torch.randperm(len(classes), generator=generator).tolist())


def _any_of(items: Sequence[Item], generator: torch.Generator) -> Item:
    return items[int(torch.randint(len(items), (1,), generator=generator))]


def draw_targets(label: Tensor, count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Which mask each prompt asks for: label (S, S) → (count, S, S) bool.

    The paper draws one class a sample (§2.2). Here the classes of a slice are drawn without repetition, and again
    from the start where `count` exceeds them, so that one pass of the encoder serves them all.
    """
    present = torch.tensor([k for k in range(1, classes + 1) if (label == k).any()], dtype=label.dtype)
    drawn: list[Tensor] = []
    while sum(map(len, drawn)) < count:
        drawn.append(present[torch.randperm(len(present), generator=generator)])
    return label[None] == torch.cat(drawn)[:count, None, None]


def _put_empty(material: Material, batch: Batch, places: list[int], step: int, offsets: Sequence[int]) -> None:
    """Puts slices without organs in the place of `empty_share` of the batch's images.

    Filled-in exemplars, where no slice is free of organs, are none.
    """
    share, synthesis = material.config.training.empty_share, material.config.synthesis
    if not share or material.pool.backgrounds_filled:
        return
    for n, offset in enumerate(offsets):
        generator = _generator(material.config.seed, "empty", step, offset)
        if torch.rand(1, generator=generator).item() < share:
            if material.slabs is None:
                (image, size), label = draw_empty(material.pool, synthesis, generator), 0
            else:
                image, label, size, places[n] = material.slabs.empty(material.pool, synthesis, generator)
            batch.images[n], batch.labels[n], batch.sizes[n] = image, label, size


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, so that the copy runs beside the computation."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
