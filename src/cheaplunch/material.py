"""What a run learns from: the exemplars and the slices without organs, loaded into the network's square."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cheaplunch.config import RunConfig, SynthesisConfig, asked_by_text, slab_slices
from cheaplunch.data.cases import CaseSlices, load_case
from cheaplunch.data.index import Progress, SliceIndex, in_order, index_slices
from cheaplunch.data.layouts import Case, Dataset, open_dataset
from cheaplunch.data.slices import Axis, Frame, Window, default_window
from cheaplunch.data.subset import take_classes
from cheaplunch.errors import UserError
from cheaplunch.exemplars import (
    SliceKey,
    background_slices,
    count_of_percent,
    pick_exemplars,
    read_exemplars,
    require_every_class,
    write_exemplars,
)
from cheaplunch.losses import UNLABELLED
from cheaplunch.methods import VOLUMETRIC
from cheaplunch.models.depth import slab_showing
from cheaplunch.models.segmenter import training_size_px
from cheaplunch.models.text import TextBank
from cheaplunch.runtime import pick_device
from cheaplunch.sample_sets import StoredSamples, open_samples, write_samples
from cheaplunch.synthesis import (
    Batch,
    Pool,
    derive_seed,
    draw,
    draw_empty,
    fill_foreground,
    left_right_pairs,
    move_labels,
    render,
    synthesize,
)
from cheaplunch.texts import read_phrasings

MAX_BACKGROUNDS = 64  # drawn at random where there are more: enough variety, bounded memory
SMALL_IMAGE_PX = 96  # up to here the backbone's input is halved: enlarging further adds cost, not detail


@dataclass(frozen=True, eq=False)
class Slabs:
    """The slices around those that are learned from, for a network that sees several at once."""

    depth: int
    """D, slices in a slab."""
    anywhere: bool
    """Whether the slice that is learned from has any place in its slab, drawn for each sample, or the middle."""
    exemplars: list[SliceKey]
    backgrounds: list[SliceKey]
    counts: Mapping[str, int]
    """Slices of each case."""
    slices: Tensor
    """(M, C, S, S), as exemplars are."""
    labels: Tensor
    """(M, S, S) uint8: those of exemplars, 0 of slices without organs, and UNLABELLED of all others."""
    rows: Mapping[SliceKey, int]
    """Where in `slices` and `labels` each is."""

    def samples(
        self, pool: Pool, indices: Sequence[int], config: SynthesisConfig, seed: int
    ) -> tuple[Batch, list[int]]:
        """Samples as `synthesize` makes them, but as slabs, and the place in each of the exemplar that was drawn.

        Images (B, D · C, S, S), labels (B, D, S, S). All slices of a slab are made by the same draws.
        """
        made = [self._sample(pool, index, config, seed) for index in indices]
        parts = ([getattr(sample, name) for sample, _ in made] for name in ("images", "labels", "sizes"))
        return Batch(*map(torch.cat, parts)), [place for _, place in made]

    def _sample(self, pool: Pool, index: int, config: SynthesisConfig, seed: int) -> tuple[Batch, int]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "sample", index))
        plan = draw(pool, config, generator)
        slab, labels, place = self._around(self.exemplars[plan.exemplar], generator)
        own = slice(plan.exemplar, plan.exemplar + 1)
        alone = replace(pool, labels=pool.labels[own], sizes=pool.sizes[own])
        plan, images = replace(plan, exemplar=0), slab.to(pool.labels.device).split(1)
        parts = [render(replace(alone, images=image), [plan], config) for image in images]
        moved = move_labels(labels.to(pool.labels.device), plan.ground)
        if not moved[place].any():  # its organs left the image: `render` kept it, and so all others, unmoved
            moved = labels.to(moved)
        moved[(labels == UNLABELLED).all(dim=(1, 2))] = UNLABELLED  # what comes in at the edges is known of no slice
        image = torch.cat([part.images for part in parts], dim=1)
        return Batch(image, moved[None], parts[place].sizes), place

    def empty(
        self, pool: Pool, config: SynthesisConfig, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """A slice without organs among those around it, which may have some, as `draw_empty` transforms one.

        → (D · C, S, S), labels (D, S, S) of it and others without organs, its width and height (2,), and its place.
        """
        number = int(torch.randint(len(self.backgrounds), (1,), generator=generator))
        slab, labels, place = self._around(self.backgrounds[number], generator)
        alone = replace(pool, background_sizes=pool.background_sizes[number : number + 1])
        images = slab.to(pool.labels.device).split(1)
        parts = [draw_empty(replace(alone, backgrounds=i), config, generator.clone_state())[0] for i in images]
        shows = (labels != 0).flatten(1).any(dim=1)
        labels = torch.where(shows[:, None, None], UNLABELLED, labels)  # those of organs would have to be moved
        return torch.cat(parts), labels, alone.background_sizes[0], place

    def _around(self, key: SliceKey, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """A slab (D, C, S, S) that shows the slice, its labels (D, S, S), and the slice's place there.

        A short volume's last slice is repeated.
        """
        place = int(torch.randint(self.depth, (1,), generator=generator)) if self.anywhere else self.depth // 2
        numbers = slab_showing(key.slice_number, self.counts[key.case_id], self.depth, place)
        rows = [self.rows[SliceKey(key.case_id, number)] for number in numbers]
        rows += rows[-1:] * (self.depth - len(rows))
        return self.slices[rows], self.labels[rows], numbers.index(key.slice_number)


@dataclass(frozen=True)
class Material:
    """Everything that training draws from, and what was learned about the data on the way."""

    config: RunConfig  # resolved: window, image size and names of classes filled in
    dataset: Dataset
    index: SliceIndex
    exemplars: list[SliceKey]
    pool: Pool
    validation: list[Case]  # training cases that take no part in training
    stored: StoredSamples | None = None  # the set, where it is taken from the disk
    slabs: Slabs | None = None  # for a network that sees several slices at once
    texts: TextBank | None = None  # for a network that is asked by texts

    def samples(self, indices: Sequence[int]) -> Batch:
        """Samples of the set by number: made as they are needed, or read where the set is on the disk."""
        if self.stored is not None:
            return self.stored.load(indices)
        return synthesize(self.pool, indices, self.config.synthesis, self.config.seed)

    def load(self, case: Case) -> CaseSlices:
        """A case as the network is to see it."""
        return load_case(case, self.dataset, pick_window(self.config, self.dataset), self.config.data.axis)


def split_validation(config: RunConfig, dataset: Dataset) -> tuple[list[Case], list[Case]]:
    """The training cases that train and the `validation_cases` that choose the best step; by patient, from the seed.

    Patients are drawn at random until they have enough cases; none is on both sides. A patient whom
    `exemplar_file` names trains. Raises UserError where nothing would be left to train on.
    """
    cases, wanted = dataset.split("train"), config.training.validation_cases
    named = _cases_named(config.data.exemplar_file)
    bound = {case.patient for case in cases if case.id in named}
    patients = sorted({case.patient for case in cases} - bound)
    rng = np.random.default_rng(derive_seed(config.seed, "validation"))
    held: set[str] = set()
    for patient in rng.permutation(patients).tolist():
        if sum(case.patient in held for case in cases) >= wanted:
            break
        held.add(patient)
    training = [case for case in cases if case.patient not in held]
    validation = [case for case in cases if case.patient in held]
    if len(validation) < wanted or not training:
        raise UserError(
            f"--validation-cases {wanted}: of {len(cases)} training cases that leaves none to train on; ask for fewer"
        )
    return training, validation


def _cases_named(file: Path | None) -> set[str]:
    """Cases of the CSV, wherever they are; `read_exemplars` complains about the rest."""
    if file is None or not file.is_file():
        return set()
    with file.open(newline="", encoding="utf-8-sig") as lines:
        return {row.get("case") or "" for row in csv.DictReader(lines)}


def choose_exemplars(config: RunConfig, progress: Progress | None = None) -> tuple[Dataset, SliceIndex, list[SliceKey]]:
    """Indexes every training case, which checks it too, and picks the exemplars or reads the user's list of them."""
    dataset = take_classes(open_dataset(config.data.data), config.data.classes)
    training, _ = split_validation(config, dataset)
    index = index_slices(dataset, training, config.data.axis, progress)
    file, percent = config.data.exemplar_file, config.data.exemplar_percent
    count = config.data.exemplars if percent is None else count_of_percent(index, percent)
    if file is not None:
        exemplars = read_exemplars(file, index)
    else:
        rng = np.random.default_rng(derive_seed(config.seed, "exemplars"))
        volumes = {case.id: case.patient for case in training}
        exemplars = pick_exemplars(index, count, config.data.strategy, rng, volumes)
    named = f"--exemplars {count}" if percent is None else f"--exemplar-percent {percent}"
    require_every_class(index, exemplars, f"--exemplar-file {file}" if file else named)
    return dataset, index, exemplars


def prepare(config: RunConfig, progress: Progress | None = None, texts: Path | None = None) -> Material:
    """Chooses the exemplars and backgrounds and loads them into the network's frame; `progress` is the index's.

    `texts` is where a run may have kept its texts already.
    """
    dataset, index, exemplars = choose_exemplars(config, progress)
    bank = _open_texts(config, dataset, texts) if asked_by_text(config.model) else None
    cases = {case.id: case for case in dataset.split("train")}
    free = organless = background_slices(index)
    if len(free) > MAX_BACKGROUNDS:
        rng = np.random.default_rng(derive_seed(config.seed, "backgrounds"))
        free = [free[i] for i in sorted(rng.choice(len(free), MAX_BACKGROUNDS, replace=False))]

    window = pick_window(config, dataset)
    counts = Counter(area.case_id for area in index.slices)
    around = _around([*exemplars, *(free if config.training.empty_share else [])], counts, config)
    wanted = dict.fromkeys([*exemplars, *free, *around])
    slices = _load_slices(list(wanted), cases, dataset, window, config.data.axis)
    size = config.model.image_size or _image_size(config, [image for image, _ in slices.values()])
    numbers = list(dataset.labels.values())
    images, labels, sizes = _in_frame(exemplars, slices, size, numbers)
    # Beyond the body a volume can have slices that show nothing: no background to learn from.
    free = [key for key in free if _shows_something(slices[key][0])]
    if free:
        backgrounds, _, background_sizes = _in_frame(free, slices, size, numbers)
    else:
        backgrounds, background_sizes = fill_foreground(images, labels, sizes), sizes
    sided = config.data.axis != "sagittal"  # left and right are in the plane
    paired = left_right_pairs(list(dataset.labels)) if sided else ()
    pool = Pool(images, labels, backgrounds, sizes, background_sizes, len(numbers), not free, paired)
    fixed = None if window.low is None or window.high is None else (window.low, window.high)
    data = replace(config.data, window=fixed, exemplars=len(exemplars))
    names = tuple(dataset.labels) if config.model.head == "classes" else None
    model = replace(config.model, image_size=size, class_names=names, text_width=bank.width if bank else None)
    resolved = replace(config, data=data, model=model)
    material = Material(resolved, dataset, index, exemplars, pool, split_validation(config, dataset)[1], texts=bank)
    if config.synthesis.synthetic_set is not None:
        material = replace(material, stored=_open_set(material))
    if not around:
        return material
    known = dict(zip(exemplars, labels, strict=True)) | dict.fromkeys(organless, torch.zeros_like(labels[0]))
    nobody = torch.full_like(labels[0], UNLABELLED)
    slabs = Slabs(
        depth=slab_slices(config.model),
        anywhere=config.model.backbone in VOLUMETRIC,
        exemplars=exemplars,
        backgrounds=free,
        counts=counts,
        slices=_images_in_frame(around, slices, size),
        labels=torch.stack([known.get(key, nobody) for key in around]),
        rows={key: row for row, key in enumerate(around)},
    )
    return replace(material, slabs=slabs)


def _open_texts(config: RunConfig, dataset: Dataset, kept: Path | None) -> TextBank:
    """The texts that the run keeps, or those of its classes, embedded now."""
    if kept is not None and TextBank.kept(kept):
        return TextBank.load(kept, config.model.clip)
    rng = np.random.default_rng(derive_seed(config.seed, "texts"))
    return TextBank.embedded(read_phrasings(list(dataset.labels), config.model.text_file, rng), config.model.clip)


def write_set(material: Material, folder: Path, count: int, progress: Callable[[int, int], None] | None = None) -> None:
    """The first `count` samples as a folder of pictures that `--synthetic-set` takes, and their exemplars as CSV."""
    config = material.config
    folder.mkdir(parents=True, exist_ok=True)
    write_exemplars(folder / "exemplars.csv", material.index, material.exemplars)
    pool, names = material.pool.to(pick_device(config.device)), list(material.dataset.labels)
    write_samples(folder, pool, count, config.synthesis, config.seed, names, _origin(material), progress)


def _origin(material: Material) -> dict[str, Any]:
    """What the samples follow from, but for the seed of their draws, in JSON's types."""
    config = material.config
    settings = {"axis": config.data.axis, "window": config.data.window, "image_size": config.model.image_size}
    settings |= asdict(replace(config.synthesis, synthetic_set=None))
    del settings["synthetic"], settings["synthetic_set"]
    origin = {
        "data": material.dataset.fingerprint(),
        "classes": list(material.dataset.labels),
        "exemplars": [[key.case_id, key.slice_number] for key in material.exemplars],
        "settings": settings,
    }
    return json.loads(json.dumps(origin))


def _open_set(material: Material) -> StoredSamples:
    """The set that the run names; UserError unless it is one that this run's own settings could have made."""
    config = material.config
    if config.synthesis.synthetic_set is None:
        raise ValueError("the run names no set")
    stored = open_samples(config.synthesis.synthetic_set)
    named, here, there = f"--synthetic-set {stored.folder}", _origin(material), stored.origin
    if (there["data"], there["classes"]) != (here["data"], here["classes"]):
        raise UserError(f"{named} was made from other images or classes than --data {config.data.data}; make it anew")
    if there["exemplars"] != here["exemplars"]:
        raise UserError(f"{named} shows other exemplars; add --exemplar-file {stored.folder / 'exemplars.csv'}")
    for name, value in here["settings"].items():
        if (made_with := there["settings"].get(name)) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{named} was made with {flag} {made_with}, and {flag} is {value} here; make them equal")
    if config.synthesis.synthetic > len(stored.sizes):
        raise UserError(
            f"--synthetic {config.synthesis.synthetic}: {stored.folder} holds {len(stored.sizes)} samples; "
            f"give --synthetic {len(stored.sizes)} or fewer"
        )
    return stored


def pick_window(config: RunConfig, dataset: Dataset) -> Window:
    window = config.data.window
    return Window(*window) if window is not None else default_window(dataset)


def preview(material: Material, count: int = 20) -> Batch:
    """The first pasted samples of the set, or whole exemplars where none is pasted, for the preview sheet."""
    config = material.config.synthesis
    if material.stored is not None:
        return material.stored.load(range(min(count, config.synthetic)))
    pasted = replace(config, real_share=0.0) if config.real_share < 1 else config
    return synthesize(material.pool, list(range(count)), pasted, material.config.seed)


def _shows_something(image: np.ndarray) -> bool:
    """(C, H, W) in [0, 1]: more than a twentieth of it brighter than a twentieth of the window."""
    return bool((image > 0.05).any(axis=0).mean() > 0.05)


Slices = dict[SliceKey, tuple[np.ndarray, np.ndarray]]  # (C, H, W) float32 in [0, 1], (H, W) label numbers


def _load_slices(keys: list[SliceKey], cases: dict[str, Case], dataset: Dataset, window: Window, axis: Axis) -> Slices:
    """Reads every case that is needed once, a few at a time, and keeps of it the slices that are."""
    wanted: dict[str, list[SliceKey]] = {}
    for key in keys:
        wanted.setdefault(key.case_id, []).append(key)

    def load(id_: str) -> Slices:
        case = load_case(cases[id_], dataset, window, axis)
        if case.label is None:
            raise ValueError(f"{id_} has no label")  # the index takes labelled cases only
        return {key: (case.image[key.slice_number].copy(), case.label[key.slice_number].copy()) for key in wanted[id_]}

    slices: Slices = {}
    for found in in_order(load, list(wanted)):
        slices |= found
    return slices


def _image_size(config: RunConfig, images: Iterable[np.ndarray]) -> int:
    """What the backbone trains at: half of it where every image (C, H, W) is small."""
    full = training_size_px(config.model.backbone)
    longest = max(max(image.shape[-2:]) for image in images)
    return full // 2 if longest <= SMALL_IMAGE_PX else full


def _around(keys: list[SliceKey], counts: Mapping[str, int], config: RunConfig) -> list[SliceKey]:
    """All that slabs with any of these slices can show; nothing where the network sees one slice at a time.

    Nor of pictures where the network is SAM: they have no depth, and it does without.
    """
    depth, network = slab_slices(config.model), config.model.backbone
    if depth == 1:
        return []
    places = [0, depth - 1] if network in VOLUMETRIC else [depth // 2]
    shown: dict[SliceKey, None] = {}
    if network in VOLUMETRIC:
        for case_id, count in counts.items():
            if count == 1:
                flat = network.removesuffix("-3d")
                raise UserError(f"--method {network} sees volumes, and {case_id} has one slice; give --method {flat}")
    elif all(counts[key.case_id] == 1 for key in keys):
        return []
    for case_id, number in ((key.case_id, key.slice_number) for key in keys):
        count = counts[case_id]
        if count < depth and network not in VOLUMETRIC:
            raise UserError(
                f"--depth {depth}: {case_id} has {count} slices in all; give --depth {count - 1 + count % 2}, or other "
                "exemplars (--exemplar-file)"
            )
        ends = [slab_showing(number, count, depth, place) for place in places]
        shown |= dict.fromkeys(SliceKey(case_id, beside) for beside in range(ends[-1].start, ends[0].stop))
    return list(shown)


def _images_in_frame(keys: list[SliceKey], slices: Slices, size: int) -> Tensor:
    """(M, C, size, size): as `_in_frame`, without the labels."""
    images = [slices[key][0] for key in keys]
    return torch.stack([Frame(i.shape[-2], i.shape[-1], size).to_model(torch.from_numpy(i)) for i in images])


def _in_frame(keys: list[SliceKey], slices: Slices, size: int, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Slices in the network's square (N, C, size, size), labels (N, size, size) as class 1…K, and width and height."""
    images, labels, sizes = [], [], []
    for key in keys:
        image, label = slices[key]
        height, width = image.shape[-2:]
        frame = Frame(height, width, size)
        classes = np.zeros(256, np.uint8)
        classes[numbers] = np.arange(1, len(numbers) + 1)
        images.append(frame.to_model(torch.from_numpy(image)))
        labels.append(frame.label_to_model(torch.from_numpy(classes[label])))
        if label.any() and not labels[-1].any():
            raise UserError(
                f"--image-size {size}: the foreground of slice {key.slice_number} of {key.case_id} is lost at it; "
                "give a larger one, or other exemplars"
            )
        sizes.append(torch.tensor(frame.resized[::-1]))
    return torch.stack(images), torch.stack(labels), torch.stack(sizes)
