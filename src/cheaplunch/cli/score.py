"""The verb evaluate, and scoring as other verbs do it."""

from __future__ import annotations

import shutil
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cheaplunch import processes
from cheaplunch.cli.flags import add_settings, config_of, given_settings
from cheaplunch.cli.screen import progress
from cheaplunch.config import (
    ModelConfig,
    RunConfig,
    asked_by_text,
    build_config,
    check_prompting,
    override,
    prompts_for,
)
from cheaplunch.errors import UserError
from cheaplunch.prompting import FROM_TRUTH, read_prompting

if typing.TYPE_CHECKING:
    from cheaplunch.runs import RunFolder
    from cheaplunch.scoring import Assessment


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
        results = evaluate_run(run, assessment, options.save_masks, options.baseline, given_settings(options))
        _write_results({protocol: named["fine-tuned"] for protocol, named in results.items()}, options.out)
        _show_results(results, options.out)
        print(f"report: {run.report}")
        return
    if options.predictions is not None:
        from cheaplunch.scoring import assess_predictions

        name = options.label or "predictions"
        with progress(f"scoring {name}") as tell:
            scored = assess_predictions(options.predictions, name, assessment, tell)
    elif options.method == "zero-shot":
        name, config = "zero-shot", config_of(options, "zero-shot")
        with processes.shared_folder(pick_device(config.device).type == "cpu") as scratch:
            scored = assess_model(config, None, assessment, options.save_masks or scratch / "masks", name)
    else:
        build_config(options.method, {})  # for an unknown one says so
        raise UserError(
            f"--method {options.method} has to be trained first: `cheaplunch finetune`, then evaluate its RUN"
        )
    _write_results(scored, options.out)
    _show_results({protocol: {name: result} for protocol, result in scored.items()}, options.out)


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


def evaluate_run(
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
            scored["zero-shot"] = assess_model(
                zero_shot_of(config), None, assessment, scratch / "zero-shot", "zero-shot"
            )
        written = masks or scratch / "masks"
        scored["fine-tuned"] = assess_model(config, run, assessment, written, "fine-tuned")
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


def assess_model(
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
    with progress(f"evaluating {name}") as tell:
        return assess(segmenter, config, assessment, precision, masks, tell, texts)


def _result_paths(protocols: Iterable[str], out: Path) -> dict[str, Path]:
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


def evaluate_flags(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder of `cheaplunch finetune`")
    parser.add_argument("--method", help="zero-shot, in place of RUN: the weights as they are")
    parser.add_argument(
        "--predictions", type=Path, metavar="DIR", help="masks of another tool, named as the test cases, to be scored"
    )
    parser.add_argument("--label", metavar="NAME", help="that tool's name in the results (default: predictions)")
    add_settings(parser, ["data", *OF_MODELS])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="JSON to write")
    parser.add_argument(
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
        parser.add_argument(flag, type=float, default=0.0, metavar="PX", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--no-mask-prompt",
        action="store_true",
        help="under clicks:N do not show the network its last answer, for networks that never learned from one",
    )
    parser.add_argument(
        "--draws", type=int, default=1, metavar="K", help="of random prompts, for a mean and its spread"
    )
    parser.add_argument(
        "--protocol",
        default="strict",
        metavar="NAME,...",
        help="strict, paper, msa, nnunet, brats, or several with commas: the first is written to FILE.json, each other "
        "to FILE.NAME.json (default: %(default)s)",
    )
    parser.add_argument(
        "--nsd-tolerance", type=float, default=2.0, help="mm, voxels under paper (default: %(default)s)"
    )
    parser.add_argument("--save-masks", type=Path, metavar="DIR", help="keep the predicted masks here")
    parser.add_argument(
        "--no-baseline", dest="baseline", action="store_false", help="do not score the untuned weights too"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of random prompts and the bootstrap (default: %(default)s)"
    )
