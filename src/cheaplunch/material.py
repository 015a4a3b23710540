"""What a run learns from: the exemplars and the slices without organs, loaded into the network's square."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cheaplunch.config import RunConfig
from cheaplunch.data.cases import CaseSlices, load_case
from cheaplunch.data.index import SliceIndex, index_slices
from cheaplunch.data.layouts import Case, Dataset, open_dataset
from cheaplunch.data.slices import Frame, Window, default_window
from cheaplunch.errors import UserError
from cheaplunch.exemplars import SliceKey, background_slices, pick_exemplars, read_exemplars, require_every_class
from cheaplunch.models.backbones import get_backbone
from cheaplunch.synthesis import Batch, Pool, derive_seed, fill_foreground, synthesize

MAX_BACKGROUNDS = 64  # drawn at random where there are more: enough variety, bounded memory
SMALL_IMAGE_PX = 96  # up to here the backbone's input is halved: enlarging further adds cost, not detail


@dataclass(frozen=True)
class Material:
    """Everything that training draws from, and what was learned about the data on the way."""

    config: RunConfig  # resolved: window and image size filled in
    dataset: Dataset
    index: SliceIndex
    exemplars: list[SliceKey]
    pool: Pool
    validation: list[Case]  # training cases that take no part in training

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


def choose_exemplars(config: RunConfig) -> tuple[Dataset, SliceIndex, list[SliceKey]]:
    """Reads and checks every training case, and picks the exemplars or reads the user's list of them."""
    dataset = open_dataset(config.data.data)
    training, _ = split_validation(config, dataset)
    index = index_slices(dataset, training, config.data.axis)
    file, count = config.data.exemplar_file, config.data.exemplars
    if file is not None:
        exemplars = read_exemplars(file, index)
    else:
        rng = np.random.default_rng(derive_seed(config.seed, "exemplars"))
        exemplars = pick_exemplars(index, count, config.data.strategy, rng)
    require_every_class(index, exemplars, f"--exemplar-file {file}" if file else f"--exemplars {count}")
    return dataset, index, exemplars


def prepare(config: RunConfig) -> Material:
    """Chooses the exemplars and backgrounds and loads them into the network's frame."""
    dataset, index, exemplars = choose_exemplars(config)
    cases = {case.id: case for case in dataset.split("train")}
    free = background_slices(index)
    if len(free) > MAX_BACKGROUNDS:
        rng = np.random.default_rng(derive_seed(config.seed, "backgrounds"))
        free = [free[i] for i in sorted(rng.choice(len(free), MAX_BACKGROUNDS, replace=False))]

    window = pick_window(config, dataset)
    loaded: dict[str, CaseSlices] = {}
    for key in (*exemplars, *free):
        if key.case_id not in loaded:
            loaded[key.case_id] = load_case(cases[key.case_id], dataset, window, config.data.axis)
    size = config.model.image_size or _image_size(config, loaded.values())
    numbers = list(dataset.labels.values())
    images, labels, sizes = _in_frame(exemplars, loaded, size, numbers)
    # Beyond the body a volume can have slices that show nothing: no background to learn from.
    free = [key for key in free if _shows_something(loaded[key.case_id].image[key.slice_number])]
    if free:
        backgrounds, _, background_sizes = _in_frame(free, loaded, size, numbers)
    else:
        backgrounds, background_sizes = fill_foreground(images, labels, sizes), sizes
    pool = Pool(images, labels, backgrounds, sizes, background_sizes, len(numbers), backgrounds_filled=not free)
    fixed = None if window.low is None or window.high is None else (window.low, window.high)
    resolved = replace(config, data=replace(config.data, window=fixed), model=replace(config.model, image_size=size))
    return Material(resolved, dataset, index, exemplars, pool, split_validation(config, dataset)[1])


def pick_window(config: RunConfig, dataset: Dataset) -> Window:
    window = config.data.window
    return Window(*window) if window is not None else default_window(dataset)


def preview(material: Material, count: int = 20) -> Batch:
    """The first pasted samples of the set, for the preview sheet."""
    pasted = replace(material.config.synthesis, real_share=0.0)
    return synthesize(material.pool, list(range(count)), pasted, material.config.seed)


def _shows_something(image: np.ndarray) -> bool:
    """(C, H, W) in [0, 1]: more than a twentieth of it brighter than a twentieth of the window."""
    return bool((image > 0.05).any(axis=0).mean() > 0.05)


def _image_size(config: RunConfig, cases: Iterable[CaseSlices]) -> int:
    """What the backbone trains at: half of it where every image is small."""
    full = get_backbone(config.model.backbone).training_size_px
    longest = max(max(case.image.shape[-2:]) for case in cases)
    return full // 2 if longest <= SMALL_IMAGE_PX else full


def _in_frame(
    keys: list[SliceKey], loaded: dict[str, CaseSlices], size: int, numbers: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Slices in the network's square (N, C, size, size), labels (N, size, size) as class 1…K, and width and height."""
    images, labels, sizes = [], [], []
    for key in keys:
        case = loaded[key.case_id]
        image, label = case.image[key.slice_number], case.label[key.slice_number]  # type: ignore[index]
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
