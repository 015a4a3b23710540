"""Verbs that train: pretrain, finetune."""

from __future__ import annotations

import typing
from argparse import ArgumentParser, Namespace
from pathlib import Path

from cheaplunch import processes
from cheaplunch.cli.flags import add_settings, config_of, given_settings
from cheaplunch.cli.screen import console, progress
from cheaplunch.config import METHODS, RunConfig, build_config, settings
from cheaplunch.errors import UserError

if typing.TYPE_CHECKING:
    from cheaplunch.runs import RunFolder

FIGURES = "loss {task.fields[loss]:.3f} · {task.fields[images_per_s]:.1f} images/s · {task.fields[memory_mb]:.0f} MB"


def pretrain(options: Namespace) -> None:
    """Pretrain a backbone's encoder on images without labels and write weights for --weights (docs/pretrain.md)."""
    from cheaplunch import runtime
    from cheaplunch.models.objectives import read_objectives
    from cheaplunch.pretraining import pretrain, summary

    config, objectives = build_config("zero-shot", given_settings(options)), read_objectives(options.objective)
    runtime.keep_freed_memory()
    runtime.use_cores()
    with progress("reading") as read, progress("pretraining", FIGURES) as tell:
        folder = pretrain(config, objectives, options.out, options.resume, tell, read)
    print(summary(folder))
    print(f"weights: {folder.weights}")
    chosen = f"--backbone {config.model.backbone} --weights {folder.weights}"
    print(f"next: cheaplunch finetune {chosen} --data DIR --out RUN")


def pretrain_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with images; labels are not read"
    )
    parser.add_argument(
        "--objective",
        default="e-mix,shed,mae",
        metavar="NAME[:WEIGHT],...",
        help="what is learned: any of e-mix, shed, mae, equally or as in e-mix:1,shed:0.5 (default: %(default)s)",
    )
    add_settings(parser, ["axis", "window", "backbone", "weights", "image_size"])
    for flag, kind, default, what in (
        ("--steps", int, 1000, "optimiser steps"),
        ("--batch-size", int, 8, "slices a step"),
        ("--learning-rate", float, 1e-4, "of AdamW, at its top"),
        ("--weight-decay", float, 0.05, "of AdamW, on everything but biases and norms"),
    ):
        metavar = "N" if kind is int else "X"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{what} (default: %(default)s)")
    add_settings(parser, ["checkpoint_every", "seed", "device"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--resume", action="store_true", help="continue DIR from its last checkpoint")


def finetune(options: Namespace) -> None:
    """Fine-tune on a few exemplars and leave a run folder."""
    if options.method == "zero-shot":
        raise UserError("--method zero-shot trains nothing; use `cheaplunch evaluate --method zero-shot`")
    config = config_of(options, options.method)
    if options.dry_run:
        print(_plan(config, options.out))
        return
    run = train_run(config, options.out, resume=options.resume)
    print(f"run: {run.root}\nreport: {run.report}")
    print(f"next: cheaplunch evaluate {run.root} --data {config.data.data} --out {run.root / 'results.json'}")


def train_run(config: RunConfig, out: Path, resume: bool = False, notes: list[str] | None = None) -> RunFolder:
    from cheaplunch import runtime
    from cheaplunch.report import write_report
    from cheaplunch.training import finetune

    runtime.keep_freed_memory()
    runtime.use_cores()
    with progress("reading") as read, progress("fine-tuning", FIGURES) as tell:
        run = finetune(config, out, resume, tell, notes or [], read)
    if not processes.rank():
        write_report(run)
    return run


def _plan(config: RunConfig, out: Path) -> str:
    from cheaplunch import runtime
    from cheaplunch.planning import plan

    runtime.keep_freed_memory()
    threads = runtime.use_cores()
    with console.status("measuring a few steps"):
        cost = plan(config, out)
    where = f"{cost.device}, {threads} threads" if cost.device == "cpu" else cost.device
    minutes, seconds = divmod(round(cost.seconds), 60)
    return "\n".join(
        [
            f"steps    {config.training.steps} of {config.training.batch_size} images at {cost.image_size_px} px",
            f"where    {where}, {cost.precision}: {cost.images_per_s:.2f} images/s",
            f"time     {minutes} min {seconds:02} s, evaluation not included",
            f"memory   {cost.memory_bytes / 2**30:.2f} GiB",
            f"disk     {cost.disk_bytes / 2**20:.0f} MiB to be free in {out}",
            "nothing was written; leave --dry-run out to start",
        ]
    )


def finetune_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--method", default="cheap-lunch", help=f"one of: {', '.join(METHODS)} (default: %(default)s)")
    add_settings(parser, [name for name in settings() if name not in ("class_names", "text_width")], required=False)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to make")
    parser.add_argument(
        "--no-synthesis",
        dest="real_share",
        action="store_const",
        const=1.0,
        help="learn from the exemplars alone: nothing is pasted (as --real-share 1); 0 switches a transform off",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="settings from a file, or of a published row (cheap-lunch:2/ours-18); flags override them",
    )
    parser.add_argument("--resume", action="store_true", help="continue RUN from its last checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="measure a few steps, say time, memory and disk, and stop"
    )
