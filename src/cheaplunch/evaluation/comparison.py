"""Results in, table out: runs side by side, the papers' rows beside them where they belong.

What is not comparable never shares a column: a protocol (with its unit) is a block of its own, and within a block only
rows with the same prompts are held against each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np

from cheaplunch.errors import UserError
from cheaplunch.evaluation.evaluations import LENGTHS, METRICS, Run
from cheaplunch.evaluation.papers import MEAN, PaperRow, PaperTable, class_key, paper_tables
from cheaplunch.evaluation.statistics import paired
from cheaplunch.evaluation.tables import describe_prompts

CASES, P = "cases", "p"  # columns that are no metric


@dataclass(frozen=True)
class Column:
    """metric: of METRICS, or CASES or P; of: a class, or MEAN."""

    heading: str
    metric: str
    of: str = MEAN


@dataclass(frozen=True)
class Cell:
    """text: as shown; value: to sort and compare by, None where there is none.

    spread: standard deviation over the runs, or draws of prompts, that value is the mean of; interval: 95 %.
    """

    text: str = "–"
    value: float | None = None
    interval: tuple[float, float] | None = None
    best: bool = False
    spread: float | None = None


@dataclass(frozen=True)
class Row:
    """cells: one a column of the block; origin: "run here", or paper and table; notes: numbers of footnotes."""

    label: str
    cells: tuple[Cell, ...]
    origin: str
    published: bool = False
    notes: tuple[int, ...] = ()
    competes: bool = True  # for the best of its group


@dataclass(frozen=True)
class Group:
    """Rows whose prompts are the same, in words; oracle: these are drawn from the truth."""

    prompts: str
    oracle: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Block:
    """A table: rows of one protocol, unit and data set. key: short and its own, for headings of CSV."""

    key: str
    heading: str
    remarks: tuple[str, ...]
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Comparison:
    """footnotes: number 1 is the first."""

    title: str
    blocks: tuple[Block, ...]
    remarks: tuple[str, ...]
    footnotes: tuple[str, ...]


def compare(runs: Sequence[Run], metric: str = "dice", tables: Sequence[PaperTable] | None = None) -> Comparison:
    """The runs' table, with the papers' rows.

    metric: of METRICS, shown for each class and their mean, HD95's mean beside (Dice's beside HD95). tables: of the
    papers; None: those on the runs' data set, where the runs name it. A table's rows stand in the block of its
    protocol where its data set and classes are the runs' (a run that does not name its data set is taken at the
    caller's word), and in a block of their own otherwise.

    Raises UserError for an unknown metric and for runs on different data.
    """
    if metric not in METRICS:
        raise UserError(f"--metric {metric}: no such metric; choose one of {', '.join(METRICS)}")
    _check_same_data(runs)
    classes = runs[0].result["classes"]
    dataset = next((run.dataset for run in runs if run.dataset), None)
    if tables is None:
        tables = [t for t in paper_tables().values() if dataset and t.is_on(dataset) and t.has_classes(classes)]

    footnotes: list[str] = []
    blocks, joined = [], set()
    rules = list(dict.fromkeys(_rule(run, metric) for run in runs))
    for rule in rules:
        chosen = [run for run in runs if _rule(run, metric) == rule]
        beside = [table for table in tables if _belongs(table, chosen[0].result, dataset, metric)]
        joined |= {table.name for table in beside}
        blocks.append(_block(_rule_name(rule, rules), chosen, beside, metric, footnotes))
    for table in tables:
        if table.name not in joined:
            same_data = table.has_classes(classes) and (dataset is None or table.is_on(dataset))
            blocks.append(_published_block(table, same_data, footnotes))

    names = list(classes)
    title = " · ".join(["Comparison", *([dataset] if dataset else []), *(names if len(names) == 1 else [])])
    return Comparison(title, tuple(blocks), tuple(_remarks(blocks, metric)), tuple(footnotes))


def _check_same_data(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        said = f"{first.source} and {run.source} are of different data"
        if set(run.result["classes"]) != set(first.result["classes"]):
            ours, theirs = (", ".join(r.result["classes"]) for r in (first, run))
            raise UserError(f"{said}: classes {ours} against {theirs}; give each its own table")
        if run.dataset and first.dataset and run.dataset != first.dataset:
            raise UserError(f"{said}: {first.dataset} against {run.dataset}; give each its own table")
        if not run.case_ids & first.case_ids:
            raise UserError(f"{said}: they share no case; give each its own table")


def _rule(run: Run, metric: str) -> tuple[str, str, float | None]:
    """What rows of one block have in common: protocol, unit, tolerance of NSD."""
    tolerance = run.result.get("nsd_tolerance") if metric == "nsd" else None
    return run.result["protocol"], run.result["unit"], tolerance


def _rule_name(rule: tuple[str, str, float | None], rules: Sequence[tuple]) -> str:
    """The protocol, with what else tells it apart from others of `rules`."""
    protocol, unit, tolerance = rule
    if [other[0] for other in rules].count(protocol) == 1:
        return protocol
    return f"{protocol}, {unit}" if tolerance is None else f"{protocol}, NSD at {tolerance:g} {unit}"


def _belongs(table: PaperTable, result: Mapping[str, Any], dataset: str | None, metric: str) -> bool:
    """Whether the table's rows may share columns with the result's."""
    measures = {column.metric for column in table.columns}
    return (
        table.protocol == result["protocol"]
        and (dataset is None or table.is_on(dataset))
        and table.has_classes(result["classes"])
        and metric in measures
        and (not measures & LENGTHS or table.unit == result["unit"])
    )


def _block(name: str, runs: Sequence[Run], tables: Sequence[PaperTable], metric: str, footnotes: list[str]) -> Block:
    """Runs of one rule, called `name`, and the papers' rows that belong beside them."""
    result = runs[0].result
    classes = list(result["classes"])
    beside = "dice" if metric in LENGTHS else "hd95"
    columns = [
        Column("cases", CASES),
        Column(f"mean {_heading(metric, result)}", metric),
        Column("p", P),
        Column(f"mean {_heading(beside, result)}", beside),
        *(Column(class_, metric, class_) for class_ in classes if len(classes) > 1),
    ]
    grouped: dict[tuple[str, bool], list[Row]] = {}
    first: dict[tuple[str, bool], Run] = {}
    for run in runs:
        kind = _run_prompts(run.result)
        reference = first.setdefault(kind, run)
        cells = tuple(_run_cell(run, reference, column, metric) for column in columns)
        row = Row(run.name, cells, "run here")
        if count := run.result.get("runs"):
            row = replace(row, notes=_numbers([f"The mean of {count} runs, case by case."], footnotes))
        if run.case_ids != reference.case_ids:
            shared, of_all = len(run.case_ids & reference.case_ids), len(reference.case_ids)
            text = f"Shares {shared} of the {of_all} cases of {reference.name}, so its figures do not compete."
            row = replace(row, notes=(*row.notes, *_numbers([text], footnotes)), competes=False)
        grouped.setdefault(kind, []).append(row)
    for table in tables:
        for row in table.rows:
            published = _paper_row(table, row, columns, footnotes)
            published = replace(published, label=f"{_origin(table)}: {row.label}")
            grouped.setdefault(_paper_prompts(row), []).append(published)
    return _finished(Block(name, f"Protocol {name}", (), tuple(columns), ()), grouped)


def _published_block(table: PaperTable, same_data: bool, footnotes: list[str]) -> Block:
    """A paper's table on its own: other data than the runs', or another protocol."""
    columns = [Column(column.printed, column.metric, column.of) for column in table.columns]
    grouped: dict[tuple[str, bool], list[Row]] = {}
    for row in table.rows:
        grouped.setdefault(_paper_prompts(row), []).append(_paper_row(table, row, columns, footnotes))
    data = "the runs' data, under another protocol" if same_data else "other data than the runs'"
    remark = (
        f"As published, not run here. Data: {table.dataset}, {data}: not to be held against the rows of other tables."
    )
    heading = f"{_origin(table)}, protocol {table.protocol}"
    return _finished(Block(table.name, heading, (f"“{table.title}”", remark), tuple(columns), ()), grouped)


def _finished(block: Block, grouped: Mapping[tuple[str, bool], list[Row]]) -> Block:
    """The block with its groups, the best of each marked, less the columns that nobody has a figure for."""
    groups = [Group(words, oracle, _with_best(rows, block.columns)) for (words, oracle), rows in grouped.items()]
    kept = [
        place
        for place in range(len(block.columns))
        if any(row.cells[place].value is not None for group in groups for row in group.rows)
    ]

    def thin(row: Row) -> Row:
        return replace(row, cells=tuple(row.cells[place] for place in kept))

    return replace(
        block,
        columns=tuple(block.columns[place] for place in kept),
        groups=tuple(replace(group, rows=tuple(map(thin, group.rows))) for group in groups),
    )


def _with_best(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[Row, ...]:
    """Marks the best of each column of a metric, where at least two rows compete; equals are all the best."""
    cells = [list(row.cells) for row in rows]
    for place, column in enumerate(columns):
        values = {
            number: value
            for number, row in enumerate(rows)
            if row.competes and (value := row.cells[place].value) is not None
        }
        if column.metric not in METRICS or len(values) < 2:
            continue
        best = (min if column.metric in LENGTHS else max)(values.values())
        for number in (number for number, value in values.items() if value == best):
            cells[number][place] = replace(cells[number][place], best=True)
    return tuple(replace(row, cells=tuple(own)) for row, own in zip(rows, cells, strict=True))


def _run_cell(run: Run, reference: Run, column: Column, metric: str) -> Cell:
    result = run.result
    if column.metric == CASES:
        count = len(run.case_ids)
        return Cell(str(count), count)
    if column.metric == P:
        p = None if run is reference else _p_value(reference, run, metric)
        return Cell() if p is None else Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p)
    figures = result["mean"] if column.of == MEAN else result["classes"][column.of]
    value = figures.get(column.metric)
    if value is None:
        return Cell()
    if column.of != MEAN:
        return Cell(_digits(value, column.metric), value)
    bounds = (result.get("ci95") or {}).get(column.metric)
    spread = (result.get("spread") or {}).get(column.metric)
    text = _digits(value, column.metric) + ("" if spread is None else f" ± {_digits(spread, column.metric)}")
    return Cell(text, value, tuple(bounds) if bounds else None, spread=spread)


def _p_value(a: Run, b: Run, metric: str) -> float | None:
    """Of the cases and classes that both have a figure for; None where there is none."""

    def defined(run: Run) -> set[tuple[str, str]]:
        return {(row["id"], row["class"]) for row in run.result["cases"] if row.get(metric) is not None}

    shared = defined(a) & defined(b)
    if not shared:
        return None
    first, second = (
        {**run.result, "cases": [row for row in run.result["cases"] if (row["id"], row["class"]) in shared]}
        for run in (a, b)
    )
    rng = np.random.default_rng(0)  # for the interval of the difference, which is not shown
    return paired(first, second, rng, metric=metric, names=(a.source, b.source)).p


def _paper_row(table: PaperTable, row: PaperRow, columns: Sequence[Column], footnotes: list[str]) -> Row:
    figures = {(metric, _key(of)): value for (metric, of), value in table.figures(row).items()}
    cells = []
    for column in columns:
        value: Decimal | None = figures.get((column.metric, _key(column.of)))
        cells.append(Cell() if value is None else Cell(str(value), float(value)))
    origin = _origin(table)
    source = (
        f"{origin}, on {table.dataset}, protocol {table.protocol}: as published, not run here; {table.protocol_note}."
    )
    notes = [" ".join([source, *table.notes]), *(f"{origin}: {note}" for note in row.notes)]
    return Row(row.label, tuple(cells), f"{origin}, as published", True, _numbers(notes, footnotes))


def _key(of: str) -> frozenset[str] | str:
    return of if of == MEAN else class_key(of)


def _origin(table: PaperTable) -> str:
    return f"{table.paper}, Table {table.number}"


def _run_prompts(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The prompts in words, with the margins and jitters in px that the file tells, and whether from the truth."""
    oracle = bool(result.get("oracle_prompts"))
    px = [f"{name[:-3].replace('_', ' ')} {value:g} px" for name, value in result.items() if name.endswith("_px")]
    return ", ".join([describe_prompts(result["prompts"], oracle), *px]), oracle


def _paper_prompts(row: PaperRow) -> tuple[str, bool]:
    if row.prompts == "unknown":
        return "prompts not stated", False
    kind, _, count = row.prompts.partition(":")
    if kind == "points":
        return f"oracle prompts: {count} {'point' if count == '1' else 'points'}, how placed is not stated", True
    return describe_prompts(row.prompts, row.oracle_prompts), row.oracle_prompts


def _numbers(texts: Iterable[str], footnotes: list[str]) -> tuple[int, ...]:
    """The footnotes' numbers, from 1; a new text is added to them."""
    numbers = []
    for text in texts:
        if text not in footnotes:
            footnotes.append(text)
        numbers.append(footnotes.index(text) + 1)
    return tuple(sorted(numbers))


def _heading(metric: str, result: Mapping[str, Any]) -> str:
    name, unit = METRICS[metric], result["unit"]
    if metric == "nsd":
        return f"{name} at {result['nsd_tolerance']:g} {unit}"
    return f"{name} ({unit})" if metric in LENGTHS else name


def _digits(value: float, metric: str) -> str:
    return f"{value:.1f}" if metric in LENGTHS else f"{value:.3f}"


def _remarks(blocks: Sequence[Block], metric: str) -> list[str]:
    """What to know to read the tables; only what occurs in them."""
    rows = [row for block in blocks for group in block.groups for row in group.rows]
    cells = [cell for row in rows for cell in row.cells]
    remarks = []
    if any(column.of != MEAN for block in blocks for column in block.columns):
        remarks.append(f"Columns of classes are {METRICS[metric]} where their table does not say otherwise.")
    if any(cell.best for cell in cells):
        remarks.append("Bold: the best of the rows with the same prompts in the same table.")
    if any(cell.spread is not None for cell in cells):
        remarks.append("±: standard deviation over the runs, or the draws of prompts, that a figure is the mean of.")
    if any(cell.interval for cell in cells):
        remarks.append("In brackets: 95 % interval over patients.")
    if any(column.metric == P for block in blocks for column in block.columns):
        remarks.append(
            f"p: paired Wilcoxon signed-rank test of {METRICS[metric]} over patients, against the first row with "
            "the same prompts; not corrected for their number."
        )
    if any(group.oracle for block in blocks for group in block.groups):
        remarks.append(
            "Oracle prompts are drawn from the truth and may also tell which classes a slice shows: such rows are not "
            "automatic results."
        )
    return remarks
