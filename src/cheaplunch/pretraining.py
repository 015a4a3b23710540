"""Pretraining of an image encoder on images without labels: all training slices → another file for `--weights`.

Every random choice of step t is drawn from (seed, t) alone, so that a resumed run needs only the number of its step.
What the losses are stands in `models/objectives.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cheaplunch.checkpoints import Checkpoints, open_log, require_space, restore_tensors, trained_tensors
from cheaplunch.config import RunConfig, as_values
from cheaplunch.data.cases import load_case
from cheaplunch.data.index import in_order
from cheaplunch.data.layouts import Case, Dataset, open_dataset
from cheaplunch.data.slices import Frame, as_rgb
from cheaplunch.data.volume import read_grid
from cheaplunch.errors import Stopped, UserError
from cheaplunch.files import clear_unfinished, whole_or_nothing, write_json
from cheaplunch.learner import build_optimizer, learning_rate
from cheaplunch.material import SMALL_IMAGE_PX, pick_window
from cheaplunch.models.backbones import get_backbone, load_backbone
from cheaplunch.models.objectives import OBJECTIVES
from cheaplunch.models.originals import to_original
from cheaplunch.models.sam import Sam
from cheaplunch.models.weights import sha256
from cheaplunch.runs import describe_environment
from cheaplunch.runtime import Precision, autocast, peak_memory_bytes, pick_device, pick_precision
from cheaplunch.synthesis import derive_seed
from cheaplunch.training import Progress, asked_to_stop

WARMUP = 0.05  # share of the steps in which the learning rate rises
HELD_OUT_SHARE = 0.1  # of the patients
HELD_OUT_SLICES = 64  # of theirs that are looked at, before and after
BLANK = 0.02  # standard deviation of a slice's values in [0, 1], up to which it shows nothing

SETTINGS = (
    "data",
    "axis",
    "window",
    "backbone",
    "weights",
    "image_size",
    "steps",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "checkpoint_every",
    "seed",
)
"""Those of `config` that a pretraining has, for its JSON; another one of them is another pretraining."""

# They stay as published: MAE trains none (its are sines), and so what is written fits any size of input.
POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")


@dataclass(frozen=True)
class PretrainingFolder:
    """What lies where; `weights` is called so that the folder itself can be given as `--weights` too."""

    root: Path

    @property
    def weights(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def about(self) -> Path:
        return self.root / "pretraining.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"


def pretrain(
    config: RunConfig,
    objectives: Mapping[str, float],
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    reading: Callable[[int, int], None] | None = None,
) -> PretrainingFolder:
    """Pretrains the encoder of `config.model.backbone` with `objectives` (name → weight) and leaves a folder at `out`.

    Prompt encoder and mask decoder stay as they were. `reading` is told (cases read, of how many) before the first
    step. Raises UserError for input the user can mend, and Stopped where a signal ended it early.
    """
    folder = PretrainingFolder(out)
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder")
    if folder.about.exists() and not resume:
        raise UserError(f"--out {out} already holds a pretraining; give another folder, or --resume to continue it")
    if "e-mix" in objectives and config.training.batch_size < 2:
        raise UserError("--objective e-mix tells the images of a batch from each other; give --batch-size 2 or more")
    dataset = open_dataset(config.data.data, labelled=False)
    training, held_out = split_held_out(dataset, config.seed)
    config = resolve(config, dataset, training + held_out)
    settings = {name: as_values(config)[name] for name in SETTINGS} | {"objectives": dict(objectives)}
    if folder.about.exists():
        _check_same(settings, folder)
        clear_unfinished(out)
        if folder.weights.exists():
            return folder
    learner = Pretrainer(config, objectives)
    require_space(out, learner.module)
    out.mkdir(parents=True, exist_ok=True)
    with read_slices(training + held_out, dataset, config, out, reading) as slices:
        seen, unseen = slices.of(training), slices.of(held_out)
        if min(len(seen), len(unseen)) < 2:
            raise UserError(f"--data {config.data.data}: too few slices that show something; give more images")
        unseen = unseen[np.linspace(0, len(unseen) - 1, min(HELD_OUT_SLICES, len(unseen))).round().astype(int)]
        facts: dict[str, Any] = {
            "settings": settings,
            "dataset": dataset.name,
            "data_fingerprint": dataset.fingerprint(),
            "slices": len(seen),
            "held_out": {"cases": [case.id for case in held_out], "slices": len(unseen)},
        }
        write_json(facts, folder.about)
        started = time.perf_counter()
        before = train(learner, slices, seen, unseen, folder, progress)
        facts["held_out"] |= {"before": before, "after": learner.held_out(slices, unseen)}
    facts |= {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(learner.device),
    }
    facts["encoder_moved"] = save_weights(learner, folder.weights)
    facts["sha256"] = sha256(folder.weights)
    write_json(describe_environment(config, learner.device, learner.precision, facts), folder.about)
    shutil.rmtree(folder.checkpoint, ignore_errors=True)
    return folder


def summary(folder: PretrainingFolder) -> str:
    """A line an objective: its loss on held-out images, before and after."""
    held_out = json.loads(folder.about.read_text(encoding="utf-8"))["held_out"]
    after = held_out["after"]
    return "\n".join(f"{name}: {loss:.3f} → {after[name]:.3f} held out" for name, loss in held_out["before"].items())


class Pretrainer:
    """An encoder with the objectives' heads, and what moves them."""

    def __init__(self, config: RunConfig, objectives: Mapping[str, float]):
        """`config` is resolved."""
        self.config, self.objectives, self.device = config, objectives, pick_device(config.device)
        self.precision: Precision = pick_precision(config.training.precision, self.device)
        self.network = _load(config, config.model.image_size or 0)
        for name, parameter in self.network.vision_encoder.named_parameters():
            parameter.requires_grad_(not name.endswith(POSITIONS))
        unit_px = get_backbone(config.model.backbone).multiple_px
        heads = {}
        for name in objectives:
            generator = torch.Generator().manual_seed(derive_seed(config.seed, "head", name))
            heads[name] = OBJECTIVES[name](self.network, unit_px, generator)
        # The network stays in eval mode. TinyViT's batch norms are folded into its convolutions as it is.
        self.heads = nn.ModuleDict(heads)
        self.module = nn.ModuleList([self.network, self.heads]).to(self.device)
        self.optimizer = build_optimizer(self.module, config.training)

    def step(self, images: Tensor, shown_px: Tensor, step: int) -> dict[str, float]:
        """One step on a batch (B, 3, S, S); the losses before it, by name. Where one is not finite nothing moves."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.training)
        losses = {}
        for name, weight in self.objectives.items():
            loss = self._loss(name, images, shown_px, derive_seed(self.config.seed, "step", step, name))
            (weight * loss).backward()
            losses[name] = float(loss.detach())
        if all(map(math.isfinite, losses.values())):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    @torch.no_grad()
    def held_out(self, slices: Slices, numbers: np.ndarray) -> dict[str, float]:
        """Each objective's mean loss on slices, in batches of the training's size; the draws are the same each time.

        Slices of one batch are far apart in the list, so that e-Mix has not to tell neighbours from each other.
        """
        size = min(self.config.training.batch_size, len(numbers))
        count = len(numbers) // size
        losses: dict[str, list[float]] = {name: [] for name in self.objectives}
        for batch in range(count):
            images, shown_px = slices.batch(numbers[batch::count][:size], self.device)
            for name, found in losses.items():
                found.append(float(self._loss(name, images, shown_px, derive_seed(self.config.seed, batch, name))))
        return {name: round(float(np.mean(found)), 6) for name, found in losses.items()}

    def _loss(self, name: str, images: Tensor, shown_px: Tensor, seed: int) -> Tensor:
        with autocast(self.device, self.precision):
            return self.heads[name](self.network, images, shown_px, torch.Generator().manual_seed(seed))

    def state(self) -> dict[str, Any]:
        return {"trained": trained_tensors(self.module), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any], source: Path) -> None:
        restore_tensors(self.module, state["trained"], source)
        self.optimizer.load_state_dict(state["optimizer"])


def train(
    learner: Pretrainer,
    slices: Slices,
    seen: np.ndarray,
    unseen: np.ndarray,
    folder: PretrainingFolder,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The loop, from the last checkpoint where there is one. Returns the losses on `unseen` slices before the first."""
    config, seed = learner.config.training, learner.config.seed
    checkpoints = Checkpoints(folder.checkpoint)
    saved = checkpoints.newest()
    if saved is None:
        first, before = 0, learner.held_out(slices, unseen)
    else:
        first, before = int(saved["step"]), saved["before"]
        learner.restore(saved, folder.checkpoint)
    started = time.perf_counter()
    with open_log(folder.metrics, first) as log, asked_to_stop() as stop:
        for step in range(first, config.steps):
            rng = np.random.default_rng(derive_seed(seed, "slices", step))
            drawn = rng.choice(seen, config.batch_size, replace=len(seen) < config.batch_size)
            losses = learner.step(*slices.batch(drawn, learner.device), step)
            total = sum(learner.objectives[name] * loss for name, loss in losses.items())
            if not math.isfinite(total):
                raise UserError(
                    f"--learning-rate {config.learning_rate}: the loss is {total} at step {step + 1}; try a tenth of it"
                )
            done = step + 1
            record = {
                "step": done,
                "loss": round(total, 6),
                **{name: round(loss, 6) for name, loss in losses.items()},
                "learning_rate": learning_rate(step, config),
                "images_per_s": round((done - first) * config.batch_size / (time.perf_counter() - started), 3),
                "memory_mb": round(peak_memory_bytes(learner.device) / 2**20),
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            if progress is not None:
                progress(done, config.steps, record)
            if (stop() or done % config.checkpoint_every == 0) and done < config.steps:
                checkpoints.save(done, learner.state() | {"before": before})
                if stop():
                    raise Stopped(
                        f"stopped after step {done}, which is saved; --resume with --out {folder.root} goes on"
                    )
    return before


# --- what is learned from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """Every slice that shows something, in the network's square."""

    stored: np.ndarray  # (N, C, S, S) float16 in [0, 1], of one to three channels
    shown_px: Tensor  # (N, 2): width and height of each in its square
    cases: tuple[str, ...]  # whose they are

    def of(self, cases: Sequence[Case]) -> np.ndarray:
        """The numbers of the slices of some cases."""
        ids = {case.id for case in cases}
        return np.array([number for number, id_ in enumerate(self.cases) if id_ in ids], dtype=int)

    def batch(self, numbers: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) in [0, 1] and their widths and heights (B, 2)."""
        images = torch.from_numpy(self.stored[numbers]).to(device).float()
        return as_rgb(images), self.shown_px[torch.from_numpy(numbers)].to(device)


def split_held_out(dataset: Dataset, seed: int) -> tuple[list[Case], list[Case]]:
    """The training cases that train, and those of a tenth of the patients, one at least, that only show the loss.

    Raises UserError where there is one patient alone.
    """
    cases = dataset.split("train")
    patients = sorted({case.patient for case in cases})
    if len(patients) < 2:
        raise UserError(
            f"--data {dataset.root} has training images of {len(patients)} patient{'s' * (len(patients) != 1)}; "
            "pretraining needs two, one of whom it only looks at"
        )
    rng = np.random.default_rng(derive_seed(seed, "held-out"))
    held = set(rng.choice(patients, max(1, round(HELD_OUT_SHARE * len(patients))), replace=False).tolist())
    return [case for case in cases if case.patient not in held], [case for case in cases if case.patient in held]


def resolve(config: RunConfig, dataset: Dataset, cases: Sequence[Case]) -> RunConfig:
    """With window, image size and the steps of the warm-up filled in. Reads the headers of the images."""
    window, backbone = pick_window(config, dataset), get_backbone(config.model.backbone)
    size = config.model.image_size
    if size is None:
        across = {"axial": slice(2, 4), "coronal": slice(1, 4, 2), "sagittal": slice(1, 3)}[config.data.axis]
        longest = max(max(read_grid(case.images).array_shape[across]) for case in cases)
        size = backbone.training_size_px // (2 if longest <= SMALL_IMAGE_PX else 1)
    fixed = None if window.low is None or window.high is None else (window.low, window.high)
    training = replace(config.training, warmup_steps=round(WARMUP * config.training.steps))
    data, model = replace(config.data, window=fixed), replace(config.model, image_size=size)
    return replace(config, data=data, model=model, training=training)


@contextlib.contextmanager
def read_slices(
    cases: Sequence[Case],
    dataset: Dataset,
    config: RunConfig,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Slices]:
    """All slices of the cases, kept in a nameless file in `folder` that goes away with the block or the process.

    Labels are not read. Raises UserError for a damaged image, or where the file does not fit on the disk.
    """
    window, size = pick_window(config, dataset), config.model.image_size or 0

    def load(case: Case) -> tuple[Tensor, tuple[int, int]]:
        image = load_case(replace(case, label=None), dataset, window, config.data.axis).image  # (N, C, H, W)
        image = torch.from_numpy(image[image.std(axis=(1, 2, 3)) > BLANK, :3])
        frame = Frame(image.shape[-2], image.shape[-1], size)
        height, width = frame.resized
        return frame.to_model(image).half(), (width, height)

    shown_px, owners, channels = [], [], 1
    with tempfile.TemporaryFile(dir=folder) as file:
        for done, (case, (images, width_height)) in enumerate(zip(cases, in_order(load, cases), strict=True), 1):
            try:
                file.write(images.numpy().tobytes())
                file.flush()
            except OSError as error:
                raise UserError(f"--out {folder}: the slices do not fit on its disk ({error.strerror})") from error
            shown_px += [width_height] * len(images)
            owners += [case.id] * len(images)
            channels = images.shape[1]
            if progress is not None:
                progress(done, len(cases))
        shape = (len(owners), channels, size, size)
        stored = np.memmap(file, np.float16, "r", shape=shape) if owners else np.empty(shape, np.float16)
        yield Slices(stored, torch.tensor(shown_px), tuple(owners))


# --- what comes out --------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_weights(learner: Pretrainer, path: Path) -> float:
    """Writes the whole network, its encoder's trained tensors in the place of the published ones, for any input size.

    The names are those of the original packages. Returns how far the encoder moved: the norm of the change over the
    norm of what was there.
    """
    backbone, model = get_backbone(learner.config.model.backbone), learner.config.model
    drawn = backbone.source is None and model.weights is None  # at random, for this size alone
    published = _load(learner.config, model.image_size or 0 if drawn else backbone.image_size_px)
    tensors = dict(published.named_parameters())
    moved = there = 0.0
    for name, tensor in learner.network.named_parameters():
        if tensor.requires_grad:
            moved += float((tensor.cpu() - tensors[name]).square().sum())
            there += float(tensors[name].square().sum())
            tensors[name].copy_(tensor)
    with whole_or_nothing(path) as unfinished:
        save_file(to_original(published, "single"), unfinished, metadata={"format": "pt"})
    return round(math.sqrt(moved / there), 6)


def _load(config: RunConfig, image_size_px: int) -> Sam:
    return load_backbone(config.model.backbone, image_size_px, config.model.weights)


def _check_same(settings: Mapping[str, Any], folder: PretrainingFolder) -> None:
    """Raises UserError for a setting that is another than the folder's, but for where the data lies."""
    try:
        before = json.loads(folder.about.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.about} is damaged; start anew in another --out") from error
    for name, value in json.loads(json.dumps(settings)).items():
        if name != "data" and before.get(name) != value:
            raise UserError(
                f"--resume: {name} was {before.get(name)} in {folder.root}; give the same settings or a new --out"
            )
