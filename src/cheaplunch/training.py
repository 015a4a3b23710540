"""The recipe, from top to bottom: exemplars → synthetic set → LoRA steps → adapter.

Every random choice for image b of step t is drawn from (seed, t, b) alone. So neither the order of work nor its split
among processes matters, a resumed run needs only the number of its step, and equal seeds give equal adapters.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cheaplunch import processes
from cheaplunch.checkpoints import Checkpoints, open_log, require_space, restore_tensors, trained_tensors
from cheaplunch.config import RunConfig, TrainingConfig, as_values, prompts_for, save_config
from cheaplunch.errors import Stopped, UserError
from cheaplunch.exemplars import write_exemplars
from cheaplunch.figures import batch_sheet, synthesis_sheet
from cheaplunch.files import clear_unfinished, write_json
from cheaplunch.learner import Learner, learning_rate, start_processes
from cheaplunch.material import Material, prepare, preview
from cheaplunch.models.lora import save_adapter
from cheaplunch.prediction import Predictor, segment_draws
from cheaplunch.prompting import read_prompting
from cheaplunch.runs import RunFolder, describe_environment
from cheaplunch.runtime import peak_memory_bytes
from cheaplunch.work import Work, draw_work

Progress = Callable[[int, int, dict[str, float]], None]
"""Told (steps done, of how many, {"loss", "images_per_s", …}) after each step."""


def finetune(
    config: RunConfig,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
    reading: Callable[[int, int], None] | None = None,
) -> RunFolder:
    """Fine-tunes as `config` says and leaves a run folder at `out`; `notes` go into its report.

    `reading` is told (cases read, of how many) before the first step.

    Under `accelerate launch` or `torchrun` every process calls it and the batch is shared among them. Raises UserError
    for input the user can mend, among it an `out` that already holds a run, and Stopped where a signal ended it early.
    """
    if config.model.tuning == "none":
        raise UserError(
            "--tuning none leaves nothing to train; `cheaplunch evaluate --method zero-shot` scores it as it is"
        )
    run = RunFolder(out)
    accelerator = start_processes(config, out)
    _check_vacant(run, resume)
    if resume and run.finished():
        _check_same(config, run, prepared=False)
        return run
    material = prepare(config, reading, run.texts)
    config = material.config
    learner = Learner(config, accelerator)
    require_space(out, learner.segmenter)
    accelerator.wait_for_everyone()  # all have looked whether the folder is vacant
    facts = {
        "dataset": material.dataset.name,
        "data_fingerprint": material.dataset.fingerprint(),
        "labels": dict(material.dataset.labels),
        "split": material.dataset.split_rule,
        "validation_cases": [case.id for case in material.validation],
        "backgrounds": len(material.pool.backgrounds),
        "backgrounds_filled": material.pool.backgrounds_filled,
        "trained_parameters": sum(p.numel() for p in learner.segmenter.parameters() if p.requires_grad),
        "processes": accelerator.num_processes,
        "notes": list(notes),
    }
    if accelerator.is_main_process:
        _claim(run, config, resume)
        if material.texts is not None:
            material.texts.save(run.texts)
        write_exemplars(run.exemplars, material.index, material.exemplars)
        synthesis_sheet(material.pool, preview(material), list(material.dataset.labels), run.preview)
        write_json(describe_environment(config, learner.device, learner.precision, facts), run.environment)
    started = time.perf_counter()
    material = replace(material, pool=material.pool.to(learner.device))
    train(learner, material, run, progress)
    if accelerator.is_main_process:
        facts["training_seconds"] = round(time.perf_counter() - started, 1)
        facts["peak_memory_bytes"] = peak_memory_bytes(learner.device)
        write_json(describe_environment(config, learner.device, learner.precision, facts), run.environment)
        save_adapter(learner.segmenter.network, run.adapter)  # pyright: ignore[reportArgumentType]
    accelerator.wait_for_everyone()
    return run


def train(learner: Learner, material: Material, run: RunFolder, progress: Progress | None = None) -> None:
    """The loop. Continues from the run's last checkpoint where there is one; leaves the segmenter trained."""
    config, accelerator = material.config.training, learner.accelerator
    checkpoints = Checkpoints(run.checkpoint)
    saved = checkpoints.newest() or {"step": 0, "best": None}
    first, best = int(saved["step"]), saved["best"]
    if first:
        learner.restore(saved, run.checkpoint)
    log = open_log(run.metrics, first) if accelerator.is_main_process else contextlib.nullcontext()
    if config.tracker != "none":
        named = {"name": run.root.name}
        kinds = {"wandb": {"dir": str(run.root), **named}, "trackio": named}
        accelerator.init_trackers("cheaplunch", config=_for_tracker(material.config), init_kwargs=kinds)

    started = time.perf_counter()
    with log as lines, asked_to_stop() as stop, _prefetched(material, first, accelerator) as works:
        for step, work in works:
            rate = learning_rate(step, config)
            loss = learner.step(work, rate)
            if not math.isfinite(loss):
                raise UserError(_not_finite(loss, step, work, run, config))

            done = step + 1
            record: dict[str, Any] = {
                "step": done,
                "loss": round(loss, 6),
                "learning_rate": rate,
                "images_per_s": round((done - first) * config.batch_size / (time.perf_counter() - started), 3),
                "memory_mb": round(peak_memory_bytes(learner.device) / 2**20),
            }
            if material.validation and (done % config.validate_every == 0 or done == config.steps):
                score = validate(learner, material)
                record["validation_dice"] = round(score, 6)
                if best is None or score > best["score"]:
                    best = {"step": done, "score": score, "trained": trained_tensors(learner.segmenter)}
            if lines is not None:
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                if progress is not None:
                    progress(done, config.steps, record)
            if config.tracker != "none":
                accelerator.log({name: value for name, value in record.items() if name != "step"}, step=done)

            leaving = _any(stop(), learner)
            if (leaving or done % config.checkpoint_every == 0) and done < config.steps:
                if accelerator.is_main_process:
                    checkpoints.save(done, learner.state() | {"best": best})
                if leaving:
                    raise Stopped(f"stopped after step {done}, which is saved; --resume with --out {run.root} goes on")
            if best is not None and config.patience and done - best["step"] >= config.patience * config.validate_every:
                break
    if best is not None:
        restore_tensors(learner.segmenter, best["trained"], run.checkpoint)
    for tracker in accelerator.trackers:  # not end_training(), which would part the processes for good
        tracker.finish()


def validate(learner: Learner, material: Material) -> float:
    """Mean over classes and validation cases of the volume's Dice, asked as `prompts_for` says: as a rule one furthest
    point a class and slice.

    A class that is in neither mask is left out; the processes share the cases.
    """
    predictor = Predictor(learner.segmenter, learner.precision, material.config.model.smooth_mm)
    prompting, labels = read_prompting(prompts_for(material.config.model)), material.dataset.labels
    # By the classes' names: what is held out is for tests.
    texts = [material.texts.ask_names(labels)] if material.texts else []
    scores = []
    group = learner.accelerator
    for case in material.validation[group.process_index :: group.num_processes]:
        truth = material.load(case)
        rngs = [np.random.default_rng(0)]
        [drawn] = segment_draws(predictor, truth, prompting, rngs, numbers=list(labels.values()), texts=texts)
        for number in material.dataset.labels.values():
            a, b = drawn.label == number, truth.label == number
            if total := int(a.sum() + b.sum()):
                scores.append((number, 2 * int((a & b).sum()) / total))
    scores = processes.gather(scores, learner.device.type == "cpu")
    by_class = [[score for k, score in scores if k == number] for number in material.dataset.labels.values()]
    return float(np.mean([np.mean(values) for values in by_class if values]))


# --- around the steps ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM or Ctrl-C came; a second one ends the process as it always does."""
    came = threading.Event()
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        came.set()
        for kind, handler in before.items():
            signal.signal(kind, handler)

    if threading.current_thread() is threading.main_thread():
        before |= {kind: signal.signal(kind, note) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came.is_set
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _prefetched(material: Material, first: int, accelerator: Accelerator) -> Iterator[Iterator[tuple[int, Work]]]:
    """This process's share of each step from `first` on, made on a second thread while the one before it trains."""
    config = material.config.training
    share = config.batch_size // accelerator.num_processes
    offsets = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    def make(step: int) -> Work:
        return draw_work(material, step, offsets).to(accelerator.device)

    def works(worker: ThreadPoolExecutor) -> Iterator[tuple[int, Work]]:
        upcoming = worker.submit(make, first)
        for step in range(first, config.steps):
            work = upcoming.result()
            if step + 1 < config.steps:
                upcoming = worker.submit(make, step + 1)
            yield step, work

    with ThreadPoolExecutor(1) as worker:
        yield works(worker)


def _any(mine: bool, learner: Learner) -> bool:
    """Whether it holds in any of the processes: they leave as one, after the same step."""
    return bool(learner.accelerator.reduce(torch.tensor(float(mine), device=learner.device)))


_FOUND = ("window", "image_size", "class_names", "text_width")  # settings that the data, or CLIP, may tell


def _check_same(config: RunConfig, run: RunFolder, prepared: bool = True) -> None:
    """Raises UserError for a setting that is another than the run's; before `prepare` not for what it finds out."""
    before, asked = as_values(run.load_config()), as_values(config)
    unknown = set() if prepared else {name for name in _FOUND if asked[name] is None}
    counted = asked["strategy"] == "all" or asked["exemplar_percent"] or asked["exemplar_file"]
    unknown |= {"exemplars"} if counted and not prepared else set()
    for name, value in asked.items():
        if before[name] != value and name not in unknown | {"data"}:
            raise UserError(f"--resume: {name} was {before[name]} in {run.root}; give the same settings or a new --out")


def _not_finite(loss: float, step: int, work: Work, run: RunFolder, config: TrainingConfig) -> str:
    """Saves the images of the step for the user to look at, and says what to do."""
    picture = run.root / f"failed-step-{step + 1:06d}.png"
    batch_sheet(work.images, work.targets > 0, picture)
    return (
        f"--learning-rate {config.learning_rate}: the loss is {loss} at step {step + 1}, whose images are in "
        f"{picture}; try a tenth of the rate, or --precision fp32"
    )


def _for_tracker(config: RunConfig) -> dict[str, Any]:
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in as_values(config).items()}


def _check_vacant(run: RunFolder, resume: bool) -> None:
    if run.root.exists() and not run.root.is_dir():
        raise UserError(f"--out {run.root} is a file; give a folder")
    if run.config.exists() and not resume:
        raise UserError(f"--out {run.root} already holds a run; give another folder, or --resume to continue it")


def _claim(run: RunFolder, config: RunConfig, resume: bool) -> None:
    """Makes the run's folder ours, or says why it is not to be had."""
    if resume:
        clear_unfinished(run.root)
        _check_same(config, run)
        return
    run.root.mkdir(parents=True, exist_ok=True)
    save_config(config, run.config)
