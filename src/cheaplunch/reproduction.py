"""A paper's table again: published rows → the experiments they are of → runs → figures beside the published ones.

`configs/PAPER/DATA.yaml` says which settings stand behind each published row. Rows of one experiment, in whichever
table, share its run, and with the same prompts its evaluation. A table on several data sets has each row once for each
of them. What lies where:

    OUT/runs/synapse-ours-18/                   the run of an experiment
    OUT/results/synapse-ours-18-furthest.json   its evaluation, as `evaluate` writes it, with the settings behind it
    OUT/cheap-lunch-2.md .csv .html             the table
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cheaplunch import processes
from cheaplunch.config import METHODS, RunConfig, as_values, build_config, settings
from cheaplunch.data.dataset import Dataset
from cheaplunch.errors import Stopped, UserError
from cheaplunch.evaluation.comparison import Block, Cell, Column, Comparison, Group, Row
from cheaplunch.evaluation.evaluations import LENGTHS, METRICS
from cheaplunch.evaluation.formats import FORMATS
from cheaplunch.evaluation.papers import MEAN, PaperRow, PaperTable, class_key, paper_tables, plain
from cheaplunch.evaluation.tables import describe_prompts
from cheaplunch.files import write_json, write_text
from cheaplunch.prompting import Prompting, read_prompting
from cheaplunch.runs import RunFolder, read_json

OF_THE_PLACE = frozenset({"data", "device", "weights"})  # may change from machine to machine
FORMATS_WRITTEN = (".md", ".csv", ".html")


# --- published rows and the settings behind them ---------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A published row with what was run for it."""

    table: PaperTable
    published: PaperRow
    name: str  # as `--rows` takes it, the table's own
    data: str  # short for the data set, and part of its name
    run: str  # what its run is called; experiments of one name on one data set are one
    classes: tuple[str, ...]  # of the data, which are the table's where that is on one data set alone
    settings: Mapping[str, Any]  # of `config`, with its method; where that is not offered, "why"

    @property
    def address(self) -> str:
        """As `finetune --config` takes it: cheap-lunch:2/ours-18."""
        return f"{self.table.name}/{self.name}"

    @property
    def result(self) -> str:
        """What its evaluation is called; rows for which it is the same are one row twice."""
        return f"{self.run}-{str(self.prompting).replace(':', '-')}"

    @property
    def method(self) -> str:
        return self.settings["method"]

    @property
    def offered(self) -> bool:
        return self.method in METHODS

    @property
    def why_not_offered(self) -> str:
        why = self.settings.get("why")
        return f"the method {self.method} is not offered" + (f": {why}" if why else " yet")

    @property
    def prompting(self) -> Prompting:
        """As published; where the paper does not say how its points are placed, those of the simulated user.

        Where it says nothing at all, one of them.
        """
        words = self.published.prompts.replace("points:", "clicks:")
        return read_prompting("clicks:1" if words == "unknown" else words)

    def is_named_by(self, dataset: Dataset) -> bool:
        return plain(self.data) in plain(dataset.name)

    def is_on(self, dataset: Dataset) -> bool:
        """Whether the classes are the data's: all of them, or some where its name is right too."""
        wanted, there = set(map(class_key, self.classes)), set(map(class_key, dataset.scored))
        return wanted == there or (wanted < there and self.is_named_by(dataset))

    def taking_classes(self, dataset: Dataset) -> Experiment:
        """With the classes as `dataset` calls them, where it has others too."""
        wanted = set(map(class_key, self.classes))
        names = [name for name in dataset.scored if class_key(name) in wanted]
        if len(names) == len(dataset.scored):
            return self
        return replace(self, settings={**self.settings, "classes": names})

    def config(self, given: Mapping[str, Any]) -> RunConfig:
        """The run, with `given` settings in place of its own; another number of steps scales the warm-up too.

        Where nothing is trained, what is given of training is left out; where the method is a network of its own,
        the backbone is.
        """
        if "backbone" in METHODS.get(self.method, {}):
            given = {name: value for name, value in given.items() if name not in ("backbone", "weights")}
        if METHODS.get(self.method, {}).get("tuning") == "none":
            of_training = {name for name, (group, _) in settings().items() if group in ("synthesis", "training")}
            given = {name: value for name, value in given.items() if name not in of_training - {"precision"}}
        merged = {**self.settings, **given}
        if "steps" in given and "warmup_steps" in self.settings and "warmup_steps" not in given:
            merged["warmup_steps"] = self.settings["warmup_steps"] * given["steps"] // self.settings["steps"]
        return build_config(merged.pop("method"), merged)


@cache
def experiments() -> Mapping[str, tuple[Experiment, ...]]:
    """Table → its rows, in its order."""
    found: dict[str, list[Experiment]] = {name: [] for name in paper_tables()}
    for paper in files("cheaplunch").joinpath("configs").iterdir():
        for file in sorted(paper.iterdir(), key=lambda file: file.name):
            said = yaml.safe_load(file.read_text(encoding="utf-8"))
            for number, rows in said["tables"].items():
                table = paper_tables()[f"{paper.name}:{number}"]
                published = {row.label: row for row in table.rows}
                for label, name in rows.items():
                    for data, classes in said.get("data", {Path(file.name).stem: table.classes}).items():
                        run, made_of = f"{data}-{name}", said["experiments"][name]
                        own = run if "data" in said else name  # a table on several data sets has the name for each
                        row = Experiment(table, published[label], own, data, run, tuple(classes), made_of)
                        found[table.name].append(row)
    return {
        name: tuple(sorted(rows, key=lambda row: row.table.rows.index(row.published))) for name, rows in found.items()
    }


def find_experiments(words: str, names: Sequence[str] | None = None) -> list[Experiment]:
    """The rows of the tables in "cheap-lunch:2,cheap-lunch:4", or those called `names`. UserError for what is not."""
    known, chosen = experiments(), []
    for table in dict.fromkeys(words.split(",")):
        if table not in known:
            raise UserError(f"reproduce {table}: there is no such table; choose of: {', '.join(known)}")
        chosen += known[table]
    for name in names or ():
        if name not in {row.name for row in chosen}:
            there = ", ".join(dict.fromkeys(row.name for row in chosen))
            raise UserError(f"--rows {name}: {words} has no such row; choose of: {there}")
    return [row for row in chosen if not names or row.name in names]


def published_settings(words: str) -> dict[str, Any] | None:
    """The settings behind "cheap-lunch:2/ours-18", method and all; None where the words are not of that form."""
    match = re.fullmatch(r"([\w-]+:\d+)/(.+)", words)
    return dict(find_experiments(match[1], [match[2]])[0].settings) if match else None


# --- jobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A row to be run here, or several of one result."""

    row: Experiment
    config: RunConfig
    run: RunFolder | None  # None: nothing is trained
    result: Path

    @property
    def protocols(self) -> tuple[str, ...]:
        """The paper's, for its table, and this project's own."""
        return tuple(dict.fromkeys((self.row.table.protocol, "strict")))

    @property
    def state(self) -> str:
        if self.result.is_file():
            return "done"
        if self.run is None or not self.run.config.is_file():
            return "to do"
        return "trained" if self.run.finished() else "begun"


def plan_jobs(rows: Sequence[Experiment], out: Path, given: Mapping[str, Any]) -> list[Job]:
    """What there is to do for the rows whose method is offered, with `given` settings in place of theirs."""
    jobs: dict[str, Job] = {}
    for row in rows:
        if row.offered and row.result not in jobs:
            config = row.config(given)
            run = None if config.model.tuning == "none" else RunFolder(out / "runs" / row.run)
            jobs[row.result] = Job(row, config, run, _result(out, row))
    return list(jobs.values())


def rows_on(rows: Sequence[Experiment], dataset: Dataset) -> list[Experiment]:
    """Those of `rows` that are on `dataset`, taking the table's classes of it, and those that are not offered.

    Raises UserError where `dataset` is not that of a table, or of the rows of it, and where it may be several.
    """
    kept: list[Experiment] = []
    for table in dict.fromkeys(row.table.name for row in rows):
        known = {row.data: row for row in experiments()[table] if row.offered}
        fitting = {data for data, row in known.items() if row.is_on(dataset)}
        here = {data for data in fitting if known[data].is_named_by(dataset)} or fitting
        if not here:
            on = "; ".join(_described(row) for row in known.values())
            raise UserError(
                f"--data {dataset.root} has the classes {', '.join(dataset.scored)}, but {table} is on {on}; "
                f"give {'that data set' if len(known) == 1 else 'one of these'}"
            )
        asked = [row for row in rows if row.table.name == table]
        found = [row for row in asked if row.data in here or not row.offered]
        places = {row.data for row in found if row.offered}
        if not places and any(row.offered for row in asked):
            theirs = ", ".join(dict.fromkeys(row.data for row in asked if row.offered))
            raise UserError(
                f"--rows: those of {table} are on {theirs}, but --data {dataset.root} is {' or '.join(sorted(here))}; "
                "give other rows, or the data set that they are on"
            )
        if len(places) > 1:
            example = next(row.name for row in found if row.offered)
            raise UserError(
                f"--data {dataset.root} may be {' or '.join(sorted(places))}, which its name ({dataset.name}) does not "
                f"tell; choose the rows of one of them, as in --rows {example}"
            )
        kept += [row.taking_classes(dataset) for row in found]
    return kept


def _described(row: Experiment) -> str:
    """A row's data in words, as in "Synapse: aorta, liver"."""
    alone = row.classes == row.table.classes
    return f"{row.table.dataset if alone else row.data}: {', '.join(row.classes)}"


def check_earlier(jobs: Sequence[Job], fingerprint: str) -> None:
    """Raises UserError where what already lies there was made with other settings or of other data."""
    for job in jobs:
        wanted = as_values(job.config)
        if job.result.is_file():
            before = json.loads(job.result.read_text(encoding="utf-8"))
            _check_same(job.result, before["settings"], wanted, before["data_fingerprint"] == fingerprint)
        if job.run is not None and job.run.config.is_file():
            # A run's own settings are resolved: what was left open has a value there.
            resolved = {name: value for name, value in wanted.items() if value is not None}
            if job.config.data.strategy == "all":
                del resolved["exemplars"]
            same = True
            if job.run.environment.is_file():
                same = read_json(job.run.environment).get("data_fingerprint") == fingerprint
            _check_same(job.run.root, as_values(job.run.load_config()), resolved, same)


def listing(rows: Sequence[Experiment], out: Path | None, given: Mapping[str, Any]) -> str:
    """The rows as plain text: their settings, with `given` ones in their place, and what of them lies in `out`."""
    jobs = {job.row.result: job for job in plan_jobs(rows, out or Path(), given)}
    lines: list[tuple[str, ...]] = [
        ("row", "published as", "method", "backbone", "exemplars", "steps", "batch", "prompts", "state")
    ]
    for row in rows:
        about = (row.address, row.published.label, row.method)
        job = jobs.get(row.result)
        if job is None:
            lines.append((*about, *("–",) * 4, str(row.prompting), row.why_not_offered))
            continue
        config = job.config
        trained = ("–", "–", "–")
        if job.run is not None:
            exemplars = "all" if config.data.strategy == "all" else str(config.data.exemplars)
            trained = (exemplars, str(config.training.steps), str(config.training.batch_size))
        lines.append((*about, config.model.backbone, *trained, str(row.prompting), job.state if out else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def run_jobs(
    jobs: Sequence[Job],
    fingerprint: str,
    train: Callable[[Job, RunFolder], object],
    score: Callable[[Job], dict[str, dict]],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Trains and scores one job after the other; name of a result → why there is none.

    What is done is left alone, what was begun goes on, and a row that fails does not keep the others: `say` tells.
    `score` gives protocol → evaluation. Raises Stopped where the user or the system ended it.
    """
    failed = {}
    for number, job in enumerate(jobs, start=1):
        where = f"[{number}/{len(jobs)}] {job.row.address}"
        if job.state == "done":
            say(f"{where}: done before")
            continue
        try:
            if job.run is not None and not job.run.finished():
                on = "going on with the training" if job.state == "begun" else "training"
                say(f"{where}: {on}, {job.config.training.steps} steps in all")
                train(job, job.run)
            say(f"{where}: evaluating, {describe_prompts(str(job.row.prompting), job.row.prompting.from_truth)}")
            _keep(job, score(job), fingerprint)
        except (Stopped, KeyboardInterrupt) as stopped:
            raise Stopped(f"stopped in {job.row.address}; the same command goes on") from stopped
        except Exception as error:  # text, not the exception: it would hold on to the memory that ran out
            failed[job.row.result] = _why(error, job)
            say(f"{where}: failed: {failed[job.row.result]}")
    return failed


def _keep(job: Job, scored: Mapping[str, dict], fingerprint: str) -> None:
    """FILE.json for the paper's protocol, which says that the row is done, and FILE.strict.json."""
    if processes.rank():
        return
    about = {"data_fingerprint": fingerprint, "settings": as_values(job.config)}
    first, *others = job.protocols
    for protocol in others:
        write_json(scored[protocol] | about, job.result.with_suffix(f".{protocol}.json"))
    write_json(scored[first] | about, job.result)
    _traceback_file(job).unlink(missing_ok=True)


def _why(error: Exception, job: Job) -> str:
    """One line; of what is not the user's to mend, the traceback is kept beside the row's result."""
    if isinstance(error, UserError):
        return str(error)
    write_text(traceback.format_exc(), _traceback_file(job))
    return f"{' '.join(f'{type(error).__name__}: {error}'.split())} ({_traceback_file(job)} shows where)"


def _traceback_file(job: Job) -> Path:
    return job.result.with_suffix(".failed.txt")


def _check_same(path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any], same_data: bool) -> None:
    if not same_data:
        raise UserError(f"{path} was made of other data; give that --data, or another --out")
    for name, value in wanted.items():
        if name not in OF_THE_PLACE and name in before and before[name] != value:
            flag = name.replace("_", "-")
            raise UserError(f"{path} was made with --{flag} {before[name]}, not {value}; give that, or another --out")


def _result(out: Path, row: Experiment) -> Path:
    return out / "results" / f"{row.result}.json"


# --- the table -------------------------------------------------------------------------------------------------------

Place = tuple[str, frozenset[str] | str]  # (metric, key of a class, or MEAN)


def write_tables(rows: Sequence[Experiment], out: Path, failed: Mapping[str, str]) -> list[Path]:
    """The tables of `rows`, whole, with the figures of every row that was run into `out`, now or before."""
    written = []
    for table in dict.fromkeys(row.table.name for row in rows):
        results = {
            row.name: json.loads(_result(out, row).read_text(encoding="utf-8"))
            for row in experiments()[table]
            if _result(out, row).is_file()
        }
        comparison = beside_published(experiments()[table], results, failed)
        for ending in FORMATS_WRITTEN:
            path = out / f"{table.replace(':', '-')}{ending}"
            write_text(FORMATS[ending](comparison), path)
            written.append(path)
    return written


def beside_published(
    rows: Sequence[Experiment], results: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]
) -> Comparison:
    """The rows of one table, each with its figures here, as published, and here less published; Dice in 0..1.

    Here on each data set where the table is on several; classes that it has no columns for get some of their own.
    results: name of a row → its evaluation; failed: name of a result → why there is none. What is wrong in the paper,
    and what was done otherwise here, are footnotes.
    """
    table = rows[0].table
    more = {of: None for row in rows if row.name in results for of in row.classes if of not in table.classes}
    columns = (
        *(Column(column.printed, column.metric, column.of) for column in table.columns),
        *(Column(f"{of.capitalize()} {METRICS[metric]}", metric, of) for of in more for metric in ("dice", "iou")),
    )
    several = len({row.data for row in rows if row.offered}) > 1
    footnotes: list[str] = []

    def numbers(texts: Sequence[str]) -> tuple[int, ...]:
        footnotes.extend(text for text in texts if text not in footnotes)
        return tuple(sorted(footnotes.index(text) + 1 for text in texts))

    grouped: dict[tuple[str, bool], list[Row]] = {}
    for label in dict.fromkeys(row.published.label for row in rows):
        of_label = [row for row in rows if row.published.label == label]
        printed = table.figures(of_label[0].published)
        published = {(metric, _key(of)): float(value) for (metric, of), value in printed.items()}
        lines = grouped.setdefault(_prompts(of_label[0]), [])
        differences = []
        for row in (row for row in of_label if row.name in results):
            result, on = results[row.name], f", {row.data}" if several else ""
            here, changes = _figures(result), numbers(_changes(row, result["settings"]))
            lines.append(Row(f"{label}: here{on}", _cells(columns, here, result), "run here", False, changes, False))
            less = {place: value - published[place] for place, value in here.items() if place in published}
            cells = _cells(columns, less)
            differences.append(Row(f"{label}: here − paper{on}", cells, "difference", False, (), False))
        cells = tuple(
            Cell() if (value := printed.get((c.metric, c.of))) is None else Cell(str(value), float(value))
            for c in columns
        )
        said = [*of_label[0].published.notes, *_why_not(of_label, results, failed)]
        lines.append(Row(f"{label}: paper", cells, "as published", True, numbers(said), False))
        lines += differences

    data = dict.fromkeys(f"{result['dataset']}, {result['n_cases']} test cases" for result in results.values())
    remarks = (
        f"“{table.title}”",
        f"Protocol {table.protocol}: {table.protocol_note}.",
        *table.notes,
        f"The paper's data: {table.dataset}. Here: {'; '.join(data) or 'nothing was run'}.",
    )
    groups = tuple(Group(words, oracle, tuple(lines)) for (words, oracle), lines in grouped.items())
    heading = f"{table.paper}, Table {table.number}"
    block = Block(table.name, f"Protocol {table.protocol}", remarks, columns, groups)
    return Comparison(f"{heading}, run again", (block,), _GENERAL, tuple(footnotes))


_GENERAL = (
    "In brackets: 95 % interval over patients.",
    "Oracle prompts are drawn from the truth and also tell which classes a slice shows: such rows are not automatic "
    "results.",
)


def _figures(result: Mapping[str, Any]) -> dict[Place, float]:
    """What an evaluation found, less what is undefined."""
    rows = {MEAN: result["mean"], **{class_key(name): figures for name, figures in result["classes"].items()}}
    return {
        (metric, of): value
        for of, figures in rows.items()
        for metric, value in figures.items()
        if metric in METRICS and value is not None
    }


def _cells(
    columns: Sequence[Column], figures: Mapping[Place, float], result: Mapping[str, Any] | None = None
) -> tuple[Cell, ...]:
    """A cell a column; of differences, which have a sign, where no `result` has an interval to show."""
    cells = []
    for column in columns:
        value = figures.get((column.metric, _key(column.of)))
        if value is None:
            cells.append(Cell())
            continue
        sign, digits = "" if result else "+", 2 if column.metric in LENGTHS else 4
        whole = column.of == MEAN or (result and len(result["classes"]) == 1)
        bounds = result["ci95"].get(column.metric) if result and whole else None
        cells.append(Cell(f"{value:{sign}.{digits}f}", value, tuple(bounds) if bounds else None))
    return tuple(cells)


def _key(of: str) -> frozenset[str] | str:
    return of if of == MEAN else class_key(of)


def _prompts(row: Experiment) -> tuple[str, bool]:
    return describe_prompts(str(row.prompting), row.prompting.from_truth), row.prompting.from_truth


def _why_not(rows: Sequence[Experiment], results: Mapping[str, Any], failed: Mapping[str, str]) -> list[str]:
    """Of one published row: why it failed on some data set, or why there is nothing of it at all."""
    failures = [f"Failed here: {failed[row.result]}" for row in rows if row.result in failed]
    if failures or any(row.name in results for row in rows):
        return failures
    return ["Not run here."] if rows[0].offered else [f"Not run here: {rows[0].why_not_offered}."]


def _changes(row: Experiment, made: Mapping[str, Any]) -> list[str]:
    """Which settings a run was made with that are not its experiment's, as one sentence or none.

    The classes are the table's (`rows_on`), which some data has others beside.
    """
    meant = as_values(row.config({}))
    changes = [
        f"{name.replace('_', '-')} {made[name]} in place of {'the default' if value is None else value}"
        for name, value in meant.items()
        if name not in OF_THE_PLACE | {"classes"} and name in made and made[name] != value
    ]
    return [f"Run with {', '.join(changes)}."] if changes else []
