"""The papers' nine tables, as published: data of `papers.yaml`, cell by cell, with what is wrong in them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from cheaplunch.errors import UserError

MEAN = "mean"  # in place of a class: over the classes


@dataclass(frozen=True)
class PaperColumn:
    """printed: the heading; metric: as in `evaluate`'s JSON; of: a class, or MEAN."""

    printed: str
    metric: str
    of: str


@dataclass(frozen=True)
class PaperRow:
    """prompts: as of `evaluate --prompts`, "unknown" where not stated; cells: one a column, as printed."""

    method: str
    setting: str
    prompts: str
    cells: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.method}, {self.setting}" if self.setting not in ("", "-") else self.method

    @property
    def oracle_prompts(self) -> bool:
        return self.prompts not in ("auto", "unknown")


@dataclass(frozen=True)
class PaperTable:
    """One published table; "Ours" is its paper's method."""

    name: str  # as of `--papers`: cheap-lunch:2
    paper: str
    number: int
    title: str
    dataset: str
    dataset_names: tuple[str, ...]
    classes: tuple[str, ...]
    protocol: str
    protocol_note: str
    unit: str  # of HD95; "" where the paper has none
    percent: bool
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]

    def figures(self, row: PaperRow) -> dict[tuple[str, str], Decimal]:
        """(metric, class or MEAN) → value with the digits printed, Dice and IoU in 0..1; empty cells are left out."""
        return {
            (column.metric, column.of): Decimal(cell).scaleb(-2 if self.percent and column.metric != "hd95" else 0)
            for column, cell in zip(self.columns, row.cells, strict=True)
            if cell != "-"
        }

    def is_on(self, dataset: str) -> bool:
        """Whether a data set of that name is the table's."""
        return plain(re.sub(r"^(dataset|task)_?\d+_", "", dataset.lower())) in map(plain, self.dataset_names)

    def has_classes(self, names: Mapping[str, Any]) -> bool:
        """Whether `names` are the table's classes, whatever their order and spelling."""
        return {class_key(name) for name in names} == {class_key(name) for name in self.classes}


@cache
def paper_tables() -> Mapping[str, PaperTable]:
    """Name → table, in the papers' order."""
    text = files("cheaplunch.evaluation").joinpath("papers.yaml").read_text(encoding="utf-8")
    papers = yaml.load(text, Loader=yaml.BaseLoader)  # our own file; makes text only, with the digits printed
    tables = [
        _table(name, number, about, table)
        for name, about in papers.items()
        for number, table in about["tables"].items()
    ]
    return MappingProxyType({table.name: table for table in tables})


def find_tables(words: str) -> list[PaperTable]:
    """The tables named in "cheap-lunch:2,msa:1". Raises UserError for one that there is not."""
    known = paper_tables()
    names = [word.strip() for word in words.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--papers {name}: no such table; choose of cheap-lunch:1 to 6 and msa:1 to 3")
    return [known[name] for name in dict.fromkeys(names)]


_SYNONYMS = {
    "gall bladder": "gallbladder",
    "postcava": "inferior vena cava",
    "ivc": "inferior vena cava",
    "oesophagus": "esophagus",
    "arota": "aorta",  # AMOS spells it so
    "tumour": "tumor",
    "brain tumor": "tumor",
    "thyroid nodule": "nodule",
    "optic disc": "disc",
    "optic cup": "cup",
}
_TOKENS = {"l": "left", "r": "right", "veins": "vein"}
_FILLERS = {"and", "gland", "glands", "whole"}


def class_key(name: str) -> frozenset[str]:
    """What stays of a class name whatever its spelling: kidney_left, Kidney(L) and left kidney are one."""
    text = " ".join(re.findall(r"[a-z0-9]+", name.lower()))
    for other, usual in _SYNONYMS.items():
        text = re.sub(rf"\b{other}\b", usual, text)
    return frozenset(_TOKENS.get(word, word) for word in text.split() if word not in _FILLERS)


def _table(paper: str, number: str, about: Mapping[str, Any], table: Mapping[str, Any]) -> PaperTable:
    columns = tuple(PaperColumn(printed, *what.split(" ", 1)) for printed, what in table["columns"].items())
    classes = tuple(dict.fromkeys(c.of for c in columns if c.of != MEAN)) or (table["target"],)
    notes = table.get("notes", [])
    means = {c.printed: place for place, c in enumerate(columns) if c.of == MEAN and c.metric == "dice"}
    rows = []
    for method, setting, prompts, *cells in table["rows"]:
        row = PaperRow(method, setting, prompts, tuple(cells), ())
        said = [note["text"] for note in notes if row.label in note.get("rows", [])]
        if (slip := table.get("slips", {}).get(row.label)) is not None:
            [(printed, place)] = means.items()
            said.insert(0, f"{printed} is printed as {cells[place]}, but the mean of its row is {slip}.")
        rows.append(PaperRow(method, setting, prompts, tuple(cells), tuple(said)))
    return PaperTable(
        name=f"{paper}:{number}",
        paper=about["short"],
        number=int(number),
        title=table["title"],
        dataset=table["dataset"],
        dataset_names=(table["dataset"], *table.get("also", [])),
        classes=classes,
        protocol=about["protocol"],
        protocol_note=about["protocol_note"],
        unit=about["unit"],
        percent=table.get("percent") == "true",
        columns=columns,
        rows=tuple(rows),
        notes=tuple(note["text"] for note in notes if "rows" not in note),
    )


def plain(name: str) -> str:
    """What stays of a data set's name whatever its spelling."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
