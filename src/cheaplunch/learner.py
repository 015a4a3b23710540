"""One optimiser step: what it works on, and the network with everything that moves it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from cheaplunch.checkpoints import restore_tensors, trained_tensors
from cheaplunch.config import RunConfig, TrainingConfig
from cheaplunch.data.slices import as_rgb
from cheaplunch.errors import UserError
from cheaplunch.losses import segmentation_loss
from cheaplunch.material import Material
from cheaplunch.models.segmenter import Segmenter, build_segmenter
from cheaplunch.prompts import Prompts, training_points
from cheaplunch.runtime import Precision, autocast, pick_device, pick_precision
from cheaplunch.synthesis import derive_seed


@dataclass(frozen=True, eq=False)
class Work:
    """What one process does in one step: B images with P prompts each."""

    images: Tensor
    """(B, 3, S, S) in [0, 1]."""
    targets: Tensor
    """(B, P, S, S) bool: the mask that each prompt asks for."""
    prompts: Prompts
    shown_px: Tensor
    """Width and height (B, 2) that each image fills of its square."""

    def parts(self, count: int) -> Iterator[Work]:
        """The same in `count` equal parts of its images."""
        size = len(self.images) // count
        for start in range(0, len(self.images), size):
            some = slice(start, start + size)
            yield Work(self.images[some], self.targets[some], self.prompts[some], self.shown_px[some])

    def to(self, device: torch.device) -> Work:
        images, targets, shown_px = (_send(t, device) for t in (self.images, self.targets, self.shown_px))
        return Work(images, targets, self.prompts.to(device), shown_px)


def draw_work(material: Material, step: int, offsets: Sequence[int]) -> Work:
    """Images number `offsets` of the batch of `step`, with what each prompt asks for and where it points."""
    config, seed = material.config, material.config.seed
    number = [(step * config.training.batch_size + offset) % config.synthesis.synthetic for offset in offsets]
    batch = material.samples(number)
    targets, points = [], []
    for label, offset in zip(batch.labels.cpu(), offsets, strict=True):
        generator = torch.Generator().manual_seed(derive_seed(seed, "prompts", step, offset))
        targets.append(draw_targets(label, config.training.prompts_per_image, material.pool.classes, generator))
        points.append(training_points(targets[-1], generator, config.training.furthest_share))
    return Work(as_rgb(batch.images), torch.stack(targets), Prompts.of_points(torch.stack(points)), batch.sizes)


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


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, so that the copy runs beside the computation."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Learner:
    """A segmenter in training, in this process and in step with the others."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        """`config` is resolved (`material.prepare`)."""
        self.config = config.training
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.precision: Precision = pick_precision(self.config.precision, self.device)
        self.segmenter: Segmenter = build_segmenter(config.model, config.seed).to(self.device)
        network: Any = self.segmenter.network
        if self.config.gradient_checkpointing:
            network.checkpoint_encoder()
        if self.config.compile:
            network.vision_encoder.compile()
        self.optimizer = build_optimizer(self.segmenter, self.config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.parallel = accelerator.prepare_model(self.segmenter)

    def step(self, work: Work, rate: float) -> float:
        """Takes one step at learning rate `rate` and returns the loss of the whole batch before it.

        A loss that is not finite is returned without a step.
        """
        self.segmenter.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        parts = list(work.parts(self.config.accumulate))
        for part in parts:
            # The processes' gradients are averaged once, with the last part.
            last = part is parts[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.parallel):
                # Not accelerate's autocast: its state is one a process, and a second run may want another precision.
                with autocast(self.device, self.precision):
                    outputs = self.parallel(part.images, part.prompts, part.shown_px)  # (B, P, 2, S, S)
                loss = segmentation_loss(outputs, part.targets, self.config.ce_weight, self.config.dice_weight)
                loss = loss / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        mean = float(self.accelerator.reduce(total, "mean"))  # pyright: ignore[reportArgumentType]
        if total.isfinite() and mean == mean:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, but for the number of the step."""
        return {
            "trained": trained_tensors(self.segmenter),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Puts `state` back; raises UserError naming `source` where it is of another model."""
        restore_tensors(self.segmenter, state["trained"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def build_optimizer(segmenter: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained; biases and norms, which have one axis, do not decay."""
    trained = [p for p in segmenter.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        fused=True,  # hundreds of small tensors: one call instead of thousands
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then exponential decay to `final_lr` of the top at the last step (§3.3)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.learning_rate * config.final_lr**share


def start_processes(config: RunConfig, out: Path) -> Accelerator:
    """This process's place among those that `accelerate launch` or `torchrun` started; alone without them."""
    tracker = config.training.tracker
    if tracker != "none" and importlib.util.find_spec(tracker) is None:  # accelerate would warn and go on without
        raise UserError(f"--tracker {tracker} is not installed here; `pip install cheaplunch[{tracker}]`")
    accelerator = Accelerator(
        cpu=pick_device(config.device).type == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / tracker)),
    )
    shares = accelerator.num_processes * config.training.accumulate
    if config.training.batch_size % shares:
        raise UserError(
            f"--batch-size {config.training.batch_size} cannot be shared by {accelerator.num_processes} processes in "
            f"{config.training.accumulate} parts each; give a multiple of {shares}"
        )
    return accelerator
