"""The recipe, from top to bottom: exemplars → synthetic set → LoRA steps → adapter.

Every random choice of step t is drawn from (seed, t) alone. So the order in which work is done does not
matter, a resumed run needs only the number of its step, and equal seeds give equal adapters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from cheaplunch.config import RunConfig, TrainingConfig, as_values, save_config
from cheaplunch.data.slices import as_rgb
from cheaplunch.errors import UserError
from cheaplunch.exemplars import write_exemplars
from cheaplunch.figures import synthesis_sheet
from cheaplunch.files import whole_or_nothing, write_json
from cheaplunch.losses import segmentation_loss
from cheaplunch.material import Material, prepare, preview
from cheaplunch.models.lora import save_adapter
from cheaplunch.models.segmenter import Segmenter, build_segmenter
from cheaplunch.prompts import training_points
from cheaplunch.runs import RunFolder, describe_environment
from cheaplunch.runtime import pick_device, pick_precision
from cheaplunch.synthesis import Batch, derive_seed, synthesize

Progress = Callable[[int, int, dict[str, float]], None]
"""Told (steps done, of how many, {"loss", "images_per_s", …}) after each step."""


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
