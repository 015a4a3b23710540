"""What a run will cost, measured on a few of its own steps before it starts; nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from cheaplunch.checkpoints import require_space
from cheaplunch.config import RunConfig
from cheaplunch.learner import Learner, start_processes
from cheaplunch.material import prepare
from cheaplunch.runtime import peak_memory_bytes
from cheaplunch.training import validate
from cheaplunch.work import draw_work

WARM_STEPS, TIMED_STEPS = 2, 6


@dataclass(frozen=True)
class Plan:
    """Estimates for the whole run, on this machine as busy as it is now."""

    device: str
    precision: str
    image_size_px: int
    images_per_s: float
    seconds: float
    """From the start to the adapter: reading, every step, every look at the validation cases."""
    memory_bytes: int
    """The peak: of the process, or on a GPU of what torch takes there."""
    disk_bytes: int
    """What must be free; the finished run is smaller."""


def plan(config: RunConfig, out: Path) -> Plan:
    """Takes a few real steps and says what all of them would need. Raises UserError as `finetune` would."""
    started = time.perf_counter()
    accelerator = start_processes(config, out)
    material = prepare(config)
    learner = Learner(material.config, accelerator)
    disk = require_space(out, learner.segmenter)
    material = replace(material, pool=material.pool.to(learner.device))
    training = material.config.training
    share = range(training.batch_size // accelerator.num_processes)
    works = [draw_work(material, step, share).to(learner.device) for step in range(WARM_STEPS + TIMED_STEPS)]
    preparation = time.perf_counter() - started

    times = [_seconds(lambda work=work: learner.step(work, training.learning_rate)) for work in works]
    step = sum(times[WARM_STEPS:]) / TIMED_STEPS
    look = _seconds(lambda: validate(learner, material)) if material.validation else 0.0
    looks = training.steps // training.validate_every
    return Plan(
        device=str(learner.device),
        precision=learner.precision,
        image_size_px=material.config.model.image_size or 0,
        images_per_s=training.batch_size / step,
        seconds=preparation + sum(times[:WARM_STEPS]) + training.steps * step + looks * look,
        memory_bytes=peak_memory_bytes(learner.device),
        disk_bytes=disk,
    )


def _seconds(work) -> float:
    started = time.perf_counter()
    work()  # ends with a number of the loss: a GPU has finished by then
    return time.perf_counter() - started
