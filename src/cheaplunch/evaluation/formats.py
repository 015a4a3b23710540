"""A comparison as text: Markdown, CSV, LaTeX, HTML. One function each; all show the same cells."""

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from cheaplunch.errors import UserError
from cheaplunch.evaluation.comparison import Block, Cell, Comparison, Row
from cheaplunch.evaluation.evaluations import METRICS
from cheaplunch.evaluation.papers import MEAN
from cheaplunch.pages import render


def markdown(comparison: Comparison) -> str:
    """GitHub's Markdown: a table for each kind of prompts, footnotes at the end."""
    parts = [f"# {_md(comparison.title)}"]
    for block in comparison.blocks:
        parts.append(f"## {_md(block.heading)}")
        parts += [_md(remark) for remark in block.remarks]
        for group in block.groups:
            heading = _md_line(["", *(_md(column.heading) for column in block.columns)])
            rows = [_md_line([_md_label(row), *map(_md_cell, row.cells)]) for row in group.rows]
            rule = "| --- |" + " ---: |" * len(block.columns)
            parts += [f"**{_md(_capital(group.prompts))}**", "\n".join([heading, rule, *rows])]
    parts += ["\n".join(f"- {_md(remark)}" for remark in comparison.remarks)] if comparison.remarks else []
    notes = [f"<sup>{number}</sup> {_md(note)}" for number, note in enumerate(comparison.footnotes, start=1)]
    return "\n\n".join([*parts, *notes]) + "\n"


def csv_text(comparison: Comparison) -> str:
    """One rectangular table, a line a row; every block has columns of its own, which end in its key in brackets.

    Figures are not rounded, Dice and IoU in 0..1 the published ones too; an empty field is undefined.
    """
    fixed = ["row", "origin", "prompts", "oracle_prompts", "notes"]
    columns = [column for block in comparison.blocks for column in _csv_columns(block)]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*fixed, *(heading for heading, _, _ in columns)], restval="", lineterminator="\n")
    writer.writeheader()
    for block in comparison.blocks:
        for group in block.groups:
            for row in group.rows:
                notes = " ".join(comparison.footnotes[number - 1] for number in row.notes)
                said = (row.label, row.origin, group.prompts, "true" if group.oracle else "false", notes)
                figures = {heading: _csv_field(row.cells[place], what) for heading, place, what in _csv_columns(block)}
                writer.writerow(dict(zip(fixed, said, strict=True)) | figures)
    return file.getvalue()


def latex(comparison: Comparison) -> str:
    r"""A `table` as wide as the text for each block, with booktabs; prompts head their rows, footnotes come last."""
    parts = [rf"% {_tex(comparison.title)}; needs \usepackage{{booktabs}}"]
    for block in comparison.blocks:
        width = len(block.columns) + 1
        lines = [
            r"\begin{table}[htbp]",
            r"\centering\small",
            rf"\caption{{{_tex(' '.join([f'{block.heading}.', *block.remarks]))}}}",
            rf"\begin{{tabular*}}{{\linewidth}}{{@{{\extracolsep{{\fill}}}}l{'r' * len(block.columns)}}}",
            r"\toprule",
            _tex_line(["", *(_tex(column.heading) for column in block.columns)]),
        ]
        for group in block.groups:
            words = rf"\textit{{{_tex(_capital(group.prompts))}}}"
            lines += [r"\midrule", _tex_line([rf"\multicolumn{{{width}}}{{p{{\linewidth}}}}{{{words}}}"])]
            lines += [_tex_line([_tex_label(row), *map(_tex_cell, row.cells)]) for row in group.rows]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular*}", r"\end{table}"]))
    notes = [
        *map(_tex, comparison.remarks),
        *(rf"\textsuperscript{{{n}}}{_tex(note)}" for n, note in enumerate(comparison.footnotes, start=1)),
    ]
    parts.append("\n".join([r"{\footnotesize\noindent", *(rf"{note}\par" for note in notes), "}"]))
    return "\n\n".join(parts) + "\n"


def html(comparison: Comparison) -> str:
    """One page that needs nothing but itself; its tables sort by any column, within rows of the same prompts."""
    return render("compare.html.j2", {"capital": _capital}, comparison=comparison)


FORMATS: Mapping[str, Callable[[Comparison], str]] = {".md": markdown, ".csv": csv_text, ".tex": latex, ".html": html}


def find_format(out: Path) -> Callable[[Comparison], str]:
    """The format that a file's ending names. Raises UserError for another ending."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out} has an unknown ending; give one of {', '.join(FORMATS)}")
    return FORMATS[out.suffix.lower()]


def _interval(cell: Cell) -> str:
    return f" [{cell.interval[0]:.3f}, {cell.interval[1]:.3f}]" if cell.interval else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -------------------------------------------------------------------- Markdown


def _md(text: str) -> str:
    text = re.sub(r"([\\`*|<]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return " ".join(text.split())


def _md_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md_label(row: Row) -> str:
    notes = ",".join(map(str, row.notes))
    return f"{_md(row.label)} <sup>{notes}</sup>" if notes else _md(row.label)


def _md_cell(cell: Cell) -> str:
    text = _md(cell.text)
    return (f"**{text}**" if cell.best else text) + _interval(cell)


# -------------------------------------------------------------------- CSV


def _csv_columns(block: Block) -> list[tuple[str, int, str]]:
    """(heading, place among the block's columns, what of its cells: value, spread, low or high of the interval)."""
    columns: list[tuple[str, int, str]] = []
    for place, column in enumerate(block.columns):
        metric = "" if column.of == MEAN or column.heading.endswith(METRICS[column.metric]) else METRICS[column.metric]
        columns.append((f"{f'{column.heading} {metric}'.rstrip()} [{block.key}]", place, "value"))
        cells = [row.cells[place] for group in block.groups for row in group.rows]
        more = ["spread"] if any(cell.spread is not None for cell in cells) else []
        more += ["low", "high"] if any(cell.interval for cell in cells) else []
        columns += [(f"{column.heading} {what} [{block.key}]", place, what) for what in more]
    return columns


def _csv_field(cell: Cell, what: str) -> str:
    low, high = cell.interval or (None, None)
    value = {"value": cell.value, "spread": cell.spread, "low": low, "high": high}[what]
    return "" if value is None else repr(value)


# -------------------------------------------------------------------- LaTeX

_TEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "·": r"\textperiodcentered{}",
    "“": "``",
    "”": "''",
    "|": r"\textbar{}",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def _tex_line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex_label(row: Row) -> str:
    notes = ",".join(map(str, row.notes))
    return _tex(row.label) + (rf"\textsuperscript{{{notes}}}" if notes else "")


def _tex_cell(cell: Cell) -> str:
    text = _tex(cell.text)
    return (rf"\textbf{{{text}}}" if cell.best else text) + _tex(_interval(cell))
