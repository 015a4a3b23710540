"""The recipe, from top to bottom: exemplars → synthetic set → LoRA steps → adapter.

Every random choice of step t is drawn from (seed, t) alone. So the order in which work is done does not
matter, a resumed run needs only the number of its step, and equal seeds give equal adapters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cheaplunch.config import RunConfig, TrainingConfig, as_values, save_config
from cheaplunch.data.layouts import Dataset, open_dataset
from cheaplunch.data.slices import (
    CaseSlices,
    Frame,
    SliceIndex,
    Window,
    as_rgb,
    default_window,
    index_slices,
    load_case,
)
from cheaplunch.errors import UserError
from cheaplunch.exemplars import (
    SliceKey,
    background_slices,
    pick_exemplars,
    read_exemplars,
    require_every_class,
    write_exemplars,
)
from cheaplunch.figures import synthesis_sheet
from cheaplunch.files import whole_or_nothing, write_json
from cheaplunch.losses import segmentation_loss
from cheaplunch.models.backbones import get_backbone
from cheaplunch.models.lora import save_adapter
from cheaplunch.models.segmenter import Segmenter, build_segmenter
from cheaplunch.prompts import training_points
from cheaplunch.runs import RunFolder, describe_environment
from cheaplunch.runtime import pick_device, pick_precision
from cheaplunch.synthesis import Batch, Pool, derive_seed, fill_foreground, synthesize

MAX_BACKGROUNDS = 64  # drawn at random where there are more: enough variety, bounded memory
SMALL_IMAGE_PX = 96  # up to here the backbone's input is halved: enlarging further adds cost, not detail

Progress = Callable[[int, int, dict[str, float]], None]
"""Told (steps done, of how many, {"loss", "images_per_s", …}) after each step."""


@dataclass(frozen=True)
class Material:
    """Everything that training draws from, and what was learned about the data on the way."""

    config: RunConfig  # resolved: window and image size filled in
    dataset: Dataset
    index: SliceIndex
    exemplars: list[SliceKey]
    pool: Pool


def finetune(
    config: RunConfig, out: Path, resume: bool = False, progress: Progress | None = None, notes: Sequence[str] = ()
) -> RunFolder:
    """Fine-tunes as `config` says and leaves a run folder at `out`; `notes` go into its report.

    Raises UserError for input the user can mend, among it an `out` that already holds a run.
    """
    if config.model.tuning == "none":
        raise UserError(
            "--tuning none leaves nothing to train; `cheaplunch evaluate --method zero-shot` scores it as it is"
        )
    run = RunFolder(out)
    _check_vacant(run, resume)
    if resume and run.finished():
        return run
    device = pick_device(config.device)
    precision = pick_precision(config.training.precision, device)
    material = prepare(config)
    config = material.config
    segmenter = build_segmenter(config.model, config.seed).to(device)
    _claim(run, config, resume)
    write_exemplars(run.exemplars, material.index, material.exemplars)
    synthesis_sheet(material.pool, preview(material), list(material.dataset.labels), run.preview)
    facts = {
        "dataset": material.dataset.name,
        "data_fingerprint": material.dataset.fingerprint(),
        "split": material.dataset.split_rule,
        "backgrounds": len(material.pool.backgrounds),
        "backgrounds_filled": material.pool.backgrounds_filled,
        "trained_parameters": sum(p.numel() for p in segmenter.parameters() if p.requires_grad),
        "notes": list(notes),
    }
    write_json(describe_environment(config, device, precision, facts), run.environment)
    started = time.perf_counter()
    train(segmenter, material, run, precision, progress)
    save_adapter(segmenter.network, run.adapter)  # pyright: ignore[reportArgumentType]
    facts["training_seconds"] = round(time.perf_counter() - started, 1)
    write_json(describe_environment(config, device, precision, facts), run.environment)
    return run


def choose_exemplars(config: RunConfig) -> tuple[Dataset, SliceIndex, list[SliceKey]]:
    """Reads and checks every training case, and picks the exemplars or reads the user's list of them."""
    dataset = open_dataset(config.data.data)
    index = index_slices(dataset, dataset.split("train"), config.data.axis)
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
    return Material(resolved, dataset, index, exemplars, pool)


def pick_window(config: RunConfig, dataset: Dataset) -> Window:
    window = config.data.window
    return Window(*window) if window is not None else default_window(dataset)


def preview(material: Material, count: int = 20) -> Batch:
    """The first pasted samples of the set, for the preview sheet."""
    pasted = replace(material.config.synthesis, real_share=0.0)
    return synthesize(material.pool, list(range(count)), pasted, material.config.seed)


def train(
    segmenter: Segmenter, material: Material, run: RunFolder, precision: str, progress: Progress | None = None
) -> None:
    """The loop. Continues from the run's checkpoint where there is one; leaves `segmenter` trained."""
    config = material.config.training
    accelerator = Accelerator(
        cpu=next(segmenter.parameters()).device.type == "cpu",
    )
    device = accelerator.device
    optimizer = build_optimizer(segmenter, config)
    segmenter, optimizer = accelerator.prepare(segmenter, optimizer)
    first = load_checkpoint(run.checkpoint, segmenter, optimizer)

    segmenter.train()
    if first:  # what was done after the checkpoint is done again
        lines = run.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        run.metrics.write_text("".join(lines[:first]), encoding="utf-8")
    with run.metrics.open("a" if first else "w", encoding="utf-8") as log:
        started = time.perf_counter()
        for step, batch in _prefetched(material, first):
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator = torch.Generator().manual_seed(derive_seed(material.config.seed, "prompts", step))
            targets = draw_targets(batch.labels, config.prompts_per_image, material.pool.classes, generator)
            prompts = training_points(targets, generator, config.furthest_share).to(device)

            # Not accelerate's autocast: its state is one a process, and a second run may want another precision.
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                outputs = segmenter(as_rgb(batch.images).to(device), prompts)  # (B, P, 2, S, S)
            loss = segmentation_loss(outputs, targets.to(device), config.ce_weight, config.dice_weight)
            if not torch.isfinite(loss):
                raise UserError(
                    f"--learning-rate {config.learning_rate}: the loss is {loss.item()} at step {step}; "
                    "try a tenth of it, or --precision fp32"
                )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            speed = (done - first) * config.batch_size / (time.perf_counter() - started)
            record = {
                "step": done,
                "loss": round(loss.item(), 6),
                "learning_rate": rate,
                "images_per_s": round(speed, 3),
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            if progress is not None:
                progress(done, config.steps, record)
            if done % config.checkpoint_every == 0 and done < config.steps:
                save_checkpoint(run.checkpoint, segmenter, optimizer, done)


def build_optimizer(segmenter: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained; biases and norms, which have one axis, do not decay."""
    trained = [p for p in segmenter.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then exponential decay to `final_lr` of the top at the last step (§3.3)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.learning_rate * config.final_lr**share


def draw_targets(labels: Tensor, count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Which mask each prompt asks for: labels (B, S, S) → (B, count, S, S) bool.

    The paper draws one class a sample (§2.2). Here the classes of a slice are drawn without repetition, and again
    from the start where `count` exceeds them, so that one pass of the encoder serves them all.
    """
    targets = []
    for label in labels:
        present = torch.tensor([k for k in range(1, classes + 1) if (label == k).any()], dtype=label.dtype)
        drawn: list[Tensor] = []
        while sum(map(len, drawn)) < count:
            drawn.append(present[torch.randperm(len(present), generator=generator)])
        chosen = torch.cat(drawn)[:count]
        targets.append(label[None] == chosen[:, None, None])
    return torch.stack(targets)


def save_checkpoint(folder: Path, segmenter: Segmenter, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What `--resume` needs: the step, the trained tensors and the optimiser's state; whole or not at all."""
    trained = {name: p.detach().cpu() for name, p in segmenter.named_parameters() if p.requires_grad}
    with whole_or_nothing(folder / "state.pt") as unfinished:
        torch.save({"step": step, "trained": trained, "optimizer": optimizer.state_dict()}, unfinished)


def load_checkpoint(folder: Path, segmenter: Segmenter, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `save_checkpoint` wrote; the number of steps done, 0 where there is no checkpoint."""
    path = folder / "state.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    trained = {name: p for name, p in segmenter.named_parameters() if p.requires_grad}
    if trained.keys() != state["trained"].keys():
        raise UserError(f"{path} is of another model; start anew in another --out")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _check_vacant(run: RunFolder, resume: bool) -> None:
    if run.root.exists() and not run.root.is_dir():
        raise UserError(f"--out {run.root} is a file; give a folder")
    if run.config.exists() and not resume:
        raise UserError(f"--out {run.root} already holds a run; give another folder, or --resume to continue it")


def _claim(run: RunFolder, config: RunConfig, resume: bool) -> None:
    """Makes the run's folder ours, or says why it is not to be had."""
    if resume:
        before = as_values(run.load_config())
        differing = [name for name, value in as_values(config).items() if before[name] != value and name != "data"]
        if differing:
            name = differing[0]
            raise UserError(f"--resume: {name} was {before[name]} in {run.root}; give the same settings or a new --out")
        return
    run.root.mkdir(parents=True, exist_ok=True)
    save_config(config, run.config)


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


def _prefetched(material: Material, first: int) -> Iterator[tuple[int, Batch]]:
    """Batches from step `first` on, each made on a second thread while the one before it trains."""
    config = material.config
    size, total = config.training.batch_size, config.synthesis.synthetic

    def make(step: int) -> Batch:
        indices = [(step * size + offset) % total for offset in range(size)]
        return synthesize(material.pool, indices, config.synthesis, config.seed)

    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(make, first)
        for step in range(first, config.training.steps):
            batch = upcoming.result()
            if step + 1 < config.training.steps:
                upcoming = worker.submit(make, step + 1)
            yield step, batch
