"""What an inspection found, for a reader: a table in the terminal, and one page with a picture of every case.

Neither names a patient: patients are counted, and cases go by the names of their files.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from scipy.ndimage import binary_erosion

from cheaplunch.data.cases import load_case
from cheaplunch.data.dataset import Case, Dataset, Split
from cheaplunch.data.index import PERCENTILES, CaseRecord, Progress, in_order
from cheaplunch.data.inspection import KINDS, Finding, Inspection, Kind, in_words
from cheaplunch.data.slices import Window, as_rgb, default_window, in_plane_spacing
from cheaplunch.errors import UserError
from cheaplunch.figures import class_colours
from cheaplunch.files import write_text
from cheaplunch.pages import render

PICTURE_PX, LINE_PX = 320, 3  # longest side of a case's picture, and the outlines on it
SHOWN = 8  # findings of one kind before the rest are counted (terminal) or folded away (page)


# --- in numbers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassRow:
    """One class over the cases that show it."""

    name: str
    number: int
    cases: dict[Split, int]
    slices: int
    sizes: tuple[float, ...]  # of each case that shows it, in `unit`
    unit: str  # "ml", or "px" where the files have no spacing

    @property
    def size(self) -> str:
        return _spread(self.sizes)


def class_rows(inspection: Inspection) -> list[ClassRow]:
    pairs = [pair for pair in zip(inspection.dataset.cases, inspection.records, strict=True) if pair[1].labelled]
    in_ml = bool(pairs) and all(record.spacing_mm is not None for _, record in pairs)
    rows = []
    for k, (name, number) in enumerate(inspection.dataset.labels.items()):
        shows = [(case, record, record.total_px[k]) for case, record in pairs if record.total_px[k]]
        cases: dict[Split, int] = {side: sum(c.split == side for c, *_ in shows) for side in ("train", "test")}
        sizes = [px * float(np.prod(r.spacing_mm)) / 1000 if in_ml else float(px) for _, r, px in shows]  # type: ignore
        slices = sum(bool(areas[k]) for _, record, _ in shows for areas in record.area_px)
        rows.append(ClassRow(name, number, cases, slices, tuple(sizes), "ml" if in_ml else "px"))
    return rows


def facts(inspection: Inspection) -> list[tuple[str, str]]:
    """(what, its value) about the folder as a whole."""
    dataset, records = inspection.dataset, inspection.records
    images = [record for record in records if record.shape_vox is not None]
    unlabelled = sum(case.label is None for case in dataset.cases)
    rows = [
        ("recognised", f"{dataset.layout}: {dataset.why}"),
        ("cases", _by_side(dataset) + (f", {unlabelled} of them unlabelled" if unlabelled else "")),
        ("patients", _by_side(dataset, patients=True)),
        ("split", dataset.split_rule),
        *(("left out", in_words(sentence, dataset)) for sentence in dataset.left_out),
        ("slices", str(sum(record.shape_vox[0] for record in images if record.shape_vox))),
    ]
    if images:
        axes = "×".join("zyx")
        rows.append((f"size, {axes}", " × ".join(_range(side) for side in zip(*_shapes(images), strict=True)) + " px"))
        spacings = [record.spacing_mm for record in images if record.spacing_mm is not None]
        if spacings:
            sides = " × ".join(_range(side) for side in zip(*spacings, strict=True))
            rows.append((f"spacing, {axes}", f"{sides} mm{_without(len(images) - len(spacings))}"))
        else:
            rows.append(("spacing", "the files have none; lengths are in px"))
        axes_of = Counter(record.orientation for record in images if record.orientation)
        if axes_of:
            rows.append(("orientation", ", ".join(f"{axes} ({count})" for axes, count in axes_of.most_common())))
    return rows


def intensity_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """Per channel: name, lowest, the median over the cases of each of PERCENTILES, highest, mean, sd."""
    rows = []
    for number, name in enumerate(inspection.dataset.channel_names):
        found = [record.channels[number] for record in inspection.records if len(record.channels) > number]
        if not found:
            continue
        middle = np.median([channel.percentiles for channel in found], axis=0)
        mean, std = (np.median([getattr(channel, what) for channel in found]) for what in ("mean", "std"))
        low, high = min(c.minimum for c in found), max(c.maximum for c in found)
        rows.append((name, *(_short(value) for value in (low, *middle, high, mean, std))))
    return rows


INTENSITY_COLUMNS = ("channel", "lowest", *(f"{p} %" for p in PERCENTILES), "highest", "mean", "sd")


def _by_side(dataset: Dataset, patients: bool = False) -> str:
    count = {
        side: len({case.patient for case in dataset.split(side)} if patients else dataset.split(side))
        for side in ("train", "test")
    }
    whole = len({case.patient for case in dataset.cases}) if patients else len(dataset.cases)
    return f"{whole}: {count['train']} train, {count['test']} test"


def _shapes(records: Sequence[CaseRecord]) -> list[tuple[int, int, int]]:
    return [record.shape_vox for record in records if record.shape_vox is not None]


def _without(count: int) -> str:
    return f"; {count} without" if count else ""


def _range(values: Sequence[float]) -> str:
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low}–{high}"


def _spread(values: Sequence[float]) -> str:
    """Median, and between what they lie."""
    if not values:
        return "—"
    return f"{_short(float(np.median(values)))}" + (f" ({_range(values)})" if len(values) > 1 else "")


def _short(value: float) -> str:
    """Three digits, and all that stand before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- in the terminal -------------------------------------------------------------------------------------------------


def summary(inspection: Inspection) -> RenderableType:
    """The whole inspection for a terminal of any width."""
    dataset = inspection.dataset
    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim", no_wrap=True)
    about.add_column(overflow="fold")
    for what, value in facts(inspection):
        about.add_row(what, Text(value))
    parts: list[RenderableType] = [Text(dataset.name, style="bold"), Padding(about, (0, 0, 1, 2))]

    rows = class_rows(inspection)
    unit = rows[0].unit if rows else ""
    classes = _table("class", "label", "train", "test", "slices", f"{unit} a case, median (range)")
    for row in rows:
        cells = (row.number, row.cases["train"], row.cases["test"], row.slices, row.size)
        classes.add_row(Text(row.name), *map(str, cells))
    intensities = _table(*INTENSITY_COLUMNS)
    for name, *cells in intensity_rows(inspection):
        intensities.add_row(Text(name), *cells)
    parts += [Padding(table, (0, 0, 1, 2)) for table in (classes, intensities) if table.row_count]
    return Group(*parts, *_said(inspection.findings))


def _table(first: str, *rest: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _said(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    if not findings:
        yield Text("nothing suspicious found", style="green")
        return
    yield Text(f"{_count(len(findings), 'finding')}", style="bold")
    for kind, found in by_kind(findings):
        yield Text(f"{'✗' if kind.stops else '!'} {kind.title}: {len(found)}", style="red" if kind.stops else "yellow")
        for finding in found[:SHOWN]:
            yield Padding(Text(finding.text, overflow="fold"), (0, 0, 0, 4))
        if len(found) > SHOWN:
            yield Padding(Text(f"and {len(found) - SHOWN} more: --out FILE.html lists all"), (0, 0, 0, 4))
        yield Padding(Text(f"→ {kind.advice}", style="dim"), (0, 0, 0, 4))


def by_kind(findings: Sequence[Finding]) -> list[tuple[Kind, list[Finding]]]:
    """Findings come sorted by kind."""
    return [(KINDS[name], list(found)) for name, found in groupby(findings, lambda finding: finding.kind)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- as a page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseCard:
    """A case as the page shows it."""

    case: Case
    record: CaseRecord
    picture: str | None  # data URI; None where the image cannot be read
    slice_number: int  # of the picture, along the axial axis
    shows: tuple[str, ...]  # classes on it
    volumes: tuple[tuple[str, int], ...]  # class, px in the whole case
    suspicions: tuple[str, ...]  # titles of what was found about it


def write_page(inspection: Inspection, path: Path, progress: Progress | None = None) -> None:
    """Writes one self-contained HTML file; every case is read once more, for its picture."""
    dataset = inspection.dataset
    window = _window(dataset)
    pairs = list(zip(dataset.cases, inspection.records, strict=True))
    cards = []
    for card in in_order(lambda pair: _card(pair[0], pair[1], inspection, window), pairs):
        cards.append(card)
        if progress:
            progress(len(cards), len(pairs))
    filters = {"short": _short, "sides": lambda values: " × ".join(map(_short, values))}
    colours = [to_hex(colour) for colour in class_colours(len(dataset.labels))]
    page = render(
        "inspect.html.j2",
        filters,
        dataset=dataset,
        facts=facts(inspection),
        classes=class_rows(inspection),
        colours=dict(zip(dataset.labels, colours, strict=True)),
        intensities=intensity_rows(inspection),
        intensity_columns=INTENSITY_COLUMNS,
        kinds=by_kind(inspection.findings),
        cards=cards,
        shown=SHOWN,
    )
    write_text(page, path)


def _card(case: Case, record: CaseRecord, inspection: Inspection, window: Window) -> CaseCard:
    dataset = inspection.dataset
    areas = np.array(record.area_px).reshape(len(record.area_px), len(dataset.labels))  # (N, K)
    number = _telling_slice(areas) if len(areas) else (record.shape_vox or (0,))[0] // 2
    try:  # a label that does not fit is said among the findings; the image can be shown all the same
        loaded = load_case(case if record.problem is None else replace(case, label=None), dataset, window)
        label = None if loaded.label is None else loaded.label[number]
        picture = _data_uri(
            slice_picture(loaded.image[number], label, dataset.labels, in_plane_spacing(loaded.volume, "axial"))
        )
    except UserError:
        picture = None
    found = [KINDS[finding.kind].title for finding in inspection.findings if case.id in finding.cases]
    return CaseCard(
        case,
        record,
        picture,
        number,
        shows=tuple(name for name, px in zip(dataset.labels, areas[number], strict=True) if px) if len(areas) else (),
        volumes=tuple(zip(dataset.labels, areas.sum(axis=0).tolist(), strict=True)),
        suspicions=tuple(dict.fromkeys(found)),
    )


def _telling_slice(areas: np.ndarray) -> int:
    """Of (N, K) px the slice with the most classes, of those the one where they are largest beside their own most.

    Where no slice shows any, the middle one.
    """
    if not areas.any():
        return len(areas) // 2
    merit = (areas > 0).sum(axis=1) + (areas / np.maximum(areas.max(axis=0), 1)).mean(axis=1)
    return int(np.argmax(merit))


def _window(dataset: Dataset) -> Window:
    try:
        return default_window(dataset)
    except UserError:  # goes by the first image, which may be the damaged one
        return Window()


def slice_picture(
    image: np.ndarray, label: np.ndarray | None, labels: Mapping[str, int], spacing: tuple[float, float]
) -> Image.Image:
    """A slice in its true proportions, PICTURE_PX at its longest side, with the classes' outlines over it.

    image: (C, H, W) in [0, 1]; label: (H, W) label numbers; labels: name → number; spacing: (row, column).
    """
    height, width = image.shape[-2] * spacing[0], image.shape[-1] * spacing[1]
    scale = PICTURE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = (255 * np.moveaxis(as_rgb(image), 0, -1)).round().astype(np.uint8)  # (H, W, 3)
    canvas = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    if label is not None:
        for number, colour in zip(labels.values(), class_colours(len(labels)), strict=True):
            if not (mask := label == number).any():
                continue
            smooth = Image.fromarray((255 * mask).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
            inside = np.asarray(smooth) > 127
            kernel = np.asarray(binary_erosion(inside, iterations=LINE_PX), bool)
            canvas[inside & ~kernel] = 255 * colour
    return Image.fromarray(canvas)


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
