"""The verb compare: evaluations side by side, as a table and as a figure."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path

from cheaplunch.cli.flags import add_settings, config_of
from cheaplunch.errors import UserError


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


FIGURE_ROWS = 4


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
    config = config_of(options, "zero-shot")
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


def compare_flags(parser: ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="[NAME=]FILE.json", help="written by `cheaplunch evaluate`")
    parser.add_argument("--out", type=Path, required=True, metavar="TABLE", help="to write: .md, .csv, .tex or .html")
    parser.add_argument("--metric", default="dice", help="dice, hd95, iou, nsd or asd (default: %(default)s)")
    papers = parser.add_mutually_exclusive_group()
    papers.add_argument(
        "--papers",
        metavar="TABLE,...",
        help="cheap-lunch:1 to 6, msa:1 to 3 (default: those on the same data, where the results name it)",
    )
    papers.add_argument("--no-papers", action="store_true", help="without the papers' rows")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw slices side by side, from --masks")
    parser.add_argument("--masks", nargs="+", metavar="NAME=DIR", help="of `evaluate --save-masks DIR`: the columns")
    parser.add_argument("--slices", nargs="+", metavar="CASE:N", help="rows (default: the fullest of some test cases)")
    add_settings(parser, ["data", "axis", "window"], required=False)
