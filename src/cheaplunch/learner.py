"""The network in training, with everything that moves it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from cheaplunch.checkpoints import restore_tensors, trained_tensors
from cheaplunch.config import ModelConfig, RunConfig, TrainingConfig, asked_by_text, slab_slices, training_prompting
from cheaplunch.errors import UserError
from cheaplunch.losses import class_loss, segmentation_loss
from cheaplunch.models.segmenter import Segmenter, build_segmenter
from cheaplunch.runtime import Precision, autocast, pick_device, pick_precision
from cheaplunch.work import Work

POWER = 0.9  # of SAMed's decay


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
        self.loss_of = _loss_of(config.model)
        self.draws = any(
            getattr(module, "p", 0) for module in self.segmenter.modules() if "Drop" in type(module).__name__
        )
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
                with self._drawing(part.seed), autocast(self.device, self.precision):
                    outputs = self.parallel(part.seen, part.prompts, part.shown_px, part.places)  # (B, P, O, S, S)
                loss = self.loss_of(outputs, part.targets, self.config.ce_weight, self.config.dice_weight)
                loss = loss / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        mean = float(self.accelerator.reduce(total, "mean"))  # pyright: ignore[reportArgumentType]
        if total.isfinite() and mean == mean:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    @contextlib.contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        """What the network itself draws follows from the step, as all else does."""
        if not self.draws:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield

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


def _loss_of(model: ModelConfig) -> Callable[..., torch.Tensor]:
    """(outputs, targets, λ1, λ2) → a scalar."""
    if model.head == "classes":
        return class_loss
    return partial(segmentation_loss, together=asked_by_text(model))


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
    """Linear warm-up, then exponential decay to `final_lr` of the top at the last step (§3.3).

    Or as SAMed's (1 − t/T)^0.9, of which the last step is where it has fallen to `final_lr`: 0.235 is 160 of 200
    epochs.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    if config.decay == "polynomial":
        return config.learning_rate * (1 - share * (1 - config.final_lr ** (1 / POWER))) ** POWER
    return config.learning_rate * config.final_lr**share


def start_processes(config: RunConfig, out: Path) -> Accelerator:
    """This process's place among those that `accelerate launch` or `torchrun` started; alone without them."""
    tracker = config.training.tracker
    if tracker != "none" and importlib.util.find_spec(tracker) is None:  # accelerate would warn and go on without
        raise UserError(f"--tracker {tracker} is not installed here; `pip install cheaplunch[{tracker}]`")
    accelerator = Accelerator(
        cpu=pick_device(config.device).type == "cpu",
        log_with=None if tracker == "none" else tracker,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=_leaves_some(config))],
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / tracker)),
    )
    shares = accelerator.num_processes * config.training.accumulate
    if config.training.batch_size % shares:
        raise UserError(
            f"--batch-size {config.training.batch_size} cannot be shared by {accelerator.num_processes} processes in "
            f"{config.training.accumulate} parts each; give a multiple of {shares}"
        )
    return accelerator


def _leaves_some(config: RunConfig) -> bool:
    """Whether a step may leave a trained tensor without gradient.

    SAMed's, those of a second click, and a depth branch where there are only pictures.
    """
    model = config.model
    return model.head == "classes" or training_prompting(model)[0] == "clicks" or slab_slices(model) > 1
