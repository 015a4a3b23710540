"""Verbs that go the whole way, from images to figures: demo, reproduce."""

from __future__ import annotations

import shutil
import typing
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from cheaplunch import processes
from cheaplunch.cli.flags import add_settings, given_settings
from cheaplunch.cli.score import assess_model, evaluate_run
from cheaplunch.cli.screen import console, say
from cheaplunch.cli.train import train_run
from cheaplunch.config import build_config
from cheaplunch.errors import UserError

if typing.TYPE_CHECKING:
    from cheaplunch.runs import RunFolder


def demo(options: Namespace) -> None:
    """The whole way on real MRI and weights that come with packages: label eight slices, train, compare."""
    from cheaplunch.data.demo import write_demo_dataset
    from cheaplunch.evaluation.tables import format_table
    from cheaplunch.scoring import Assessment

    out: Path = options.out
    if (out / "config.yaml").exists():
        shutil.rmtree(out)  # a demo is made to be run again
    data = out.parent / f"{out.name}-data"
    if not (data / "dataset.json").exists():
        with console.status("writing the demo images: MNI152 T1 template, Harvard–Oxford structures"):
            write_demo_dataset(data)
    config = build_config("cheap-lunch", DEMO_SETTINGS | {"data": data, "seed": options.seed})
    run = train_run(config, out, notes=DEMO_NOTES)
    results = evaluate_run(run, Assessment(data))["strict"]
    print(format_table(results))
    gain = results["fine-tuned"]["mean"]["dice"] - results["zero-shot"]["mean"]["dice"]
    print(f"\nmean Dice, fine-tuned over zero-shot, one point: {gain:+.2f}")
    print(f"report: {run.report}")
    print("next, with your own labelled images (an nnU-Net raw folder):")
    print("  cheaplunch finetune --method cheap-lunch --data DIR --exemplars 9 --out RUN")


DEMO_SETTINGS: dict[str, Any] = {"exemplars": 8, "steps": 500, "image_size": 168}


DEMO_NOTES = [
    "Demonstration on one template brain (MNI152, an average of 152 people) with labels from a probability atlas: "
    "training and test slices are of the same brain, at least 6 mm apart. It shows that the tool works, not how well "
    "it does on patients."
]


def demo_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder to make (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")


def reproduce(options: Namespace) -> int:
    """Run a paper's table again, row by row, and put what comes out beside what was published."""
    from cheaplunch import reproduction
    from cheaplunch.data.layouts import open_dataset
    from cheaplunch.runtime import pick_device
    from cheaplunch.scoring import Assessment

    rows, given = reproduction.find_experiments(options.tables, options.rows), given_settings(options)
    if "weights" in given and "backbone" not in given:
        raise UserError("--weights: the rows have several backbones; `cheaplunch weights NAME --from PATH` for each")
    if options.list:
        print(reproduction.listing(rows, options.out, given))
        return 0
    if options.data is None or options.out is None:
        raise UserError(f"--{'out' if options.data else 'data'} is missing; or --list what there is to run")
    if options.out.is_file():
        raise UserError(f"--out {options.out} is a file; give a folder")
    dataset = open_dataset(options.data)
    rows, fingerprint = reproduction.rows_on(rows, dataset), dataset.fingerprint()
    jobs = reproduction.plan_jobs(rows, options.out, given)
    reproduction.check_earlier(jobs, fingerprint)

    def train(job: reproduction.Job, run: RunFolder) -> None:
        train_run(job.config, run.root, resume=run.config.is_file())

    def score(job: reproduction.Job) -> dict[str, dict]:
        assessment = Assessment(options.data, job.row.prompting, job.protocols, seed=job.config.seed)
        if job.run is None:
            with processes.shared_folder(pick_device(job.config.device).type == "cpu") as scratch:
                return assess_model(job.config, None, assessment, scratch / "masks", job.row.name)
        results = evaluate_run(job.run, assessment, baseline=False, given=given)
        return {protocol: named["fine-tuned"] for protocol, named in results.items()}

    for row in rows:
        if not row.offered:
            print(f"{row.address}: left out, {row.why_not_offered}")
    failed = reproduction.run_jobs(jobs, fingerprint, train, score, print)
    for path in reproduction.write_tables(rows, options.out, failed):
        print(f"table: {path}")
    if failed:
        return say(f"{len(failed)} of {len(jobs)} rows failed, as said above; the same command tries them again", 1)
    return 0


def reproduce_flags(parser: ArgumentParser) -> None:
    parser.add_argument("tables", metavar="TABLE,...", help="cheap-lunch:1 to 6, msa:1 to 3; several with commas")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these, named as --list does")
    parser.add_argument("--list", action="store_true", help="say which rows there are, with what settings, and stop")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for runs, results and tables; goes on in it")
    smaller = ["backbone", "weights", "image_size", "synthetic", "steps", "warmup_steps", "batch_size", "accumulate"]
    smaller += ["gradient_checkpointing", "compile", "precision", "checkpoint_every", "device", "seed"]
    add_settings(parser, ["data", *smaller], required=False)
