"""Verbs that put a run to use: predict, serve, export."""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from cheaplunch.cli.flags import add_settings, given_settings
from cheaplunch.cli.screen import console, progress, say
from cheaplunch.config import override
from cheaplunch.errors import Stopped, UserError


def predict(options: Namespace) -> int:
    """Segment images by a run: a mask for each on its own grid, from clicks and boxes in a file."""
    from cheaplunch import predicting, runtime
    from cheaplunch.runs import RunFolder

    run = RunFolder(options.run)
    config = override(run.load_config(), given_settings(options))
    runtime.keep_freed_memory()
    runtime.use_cores()
    names = ("out", "prompts", "format", "propagate", "overwrite")
    request = predicting.Request(tuple(options.inputs), **{name: getattr(options, name) for name in names})
    try:
        with progress("predicting") as tell:
            outcome = predicting.predict(run, config, request, tell)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the masks in {options.out} are whole, and the same command goes on") from None
    print(outcome.summary(options.out))
    for failure in outcome.failed:
        say(failure, 1)
    return 1 if outcome.failed else 0


def predict_flags(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `cheaplunch finetune`")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="images, or folders of images or DICOM")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the masks")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="clicks and boxes: FILE.json, FILE.mrk.json of 3D Slicer, or a folder with one for each image "
        "(docs/predict.md); text: each class by its name, or FILE.json of texts, for networks that learned from texts; "
        "auto: none, for methods that need none",
    )
    formats = ("same", "nii.gz", "nrrd", "seg")
    parser.add_argument("--format", choices=formats, default="same", help="of the masks (default: %(default)s)")
    parser.add_argument(
        "--propagate",
        action=BooleanOptionalAction,
        default=True,
        help="carry what is found on prompted slices to those around (default: yes)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write masks that are there already once more")
    add_settings(parser, ["weights", "clip", "device", "precision", "smooth_mm"])


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
            loaded = opened.load(run, override(run.load_config(), given_settings(options)))
            served = opened.Served(loaded, options.images, limits)
        labels = options.labels or run.root.resolve().with_name(f"{run.root.resolve().name}-labels")
        app = build_app(served, access, labels)
        if (flaw := server.flaw()) is not None:
            say(flaw, 0)
        if options.images is not None:
            print(f"images of {options.images}: {len(served.cases)}")
        if served.unreadable:
            print(f"and {len(served.unreadable)} that cannot be read; `cheaplunch inspect` says why")
        if not is_loopback(access.host):
            print("what is sent is not encrypted, and whoever has this address has the server:")
        print(f"{run.root} ({', '.join(loaded.model.labels)}): {server.address(listening, access)}", flush=True)
        server.run(app, listening)


def serve_flags(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="finished run folder of `cheaplunch finetune`")
    parser.add_argument(
        "--data", dest="images", type=Path, metavar="DIR", help="images that the page lists: a folder, as of `predict`"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets others in, who need the token (default: %(default)s: this machine)",
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: %(default)s)")
    parser.add_argument(
        "--token", help="that users have to know (default: one is made where others can reach the server)"
    )
    parser.add_argument(
        "--allow-origin",
        nargs="+",
        default=(),
        metavar="URL",
        help="other pages that may use it, and names it has behind a proxy: https://viewer.example.org (default: none)",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="DIR", help="where labels that viewers submit are kept (default: RUN-labels)"
    )
    for flag, count, what in (
        ("--max-upload-mb", 1024, "MiB that may be sent at a time"),
        ("--max-open", 64, "images open at a time, before the one unused longest is closed"),
        ("--memory-mb", 4096, "MiB for all open images; 1152 more at most are embeddings and answers"),
    ):
        parser.add_argument(flag, type=int, default=count, metavar="N", help=f"{what} (default: %(default)s)")
    add_settings(parser, ["weights", "device", "precision", "smooth_mm"])


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


EXPORT_FORMATS = ("safetensors", "onnx", "hub", "sam-pth")  # of export.FORMATS, which is slow to import


def export_flags(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="finished run folder of `cheaplunch finetune`")
    parser.add_argument("--format", required=True, choices=EXPORT_FORMATS, help="what to write (docs/export.md)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    add_settings(parser, ["weights"])
