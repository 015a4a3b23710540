"""What a run looks like: the synthetic sheet (paper's Fig. 1), a case's overlays, the training curves.

Pictures stand on a dark ground of their own, as on a lightbox, so that they suit a light page and a dark one;
curves have none and take the page's text colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import Case, Dataset
from cheaplunch.data.slices import Axis, Window, as_rgb, in_plane_spacing, to_slices
from cheaplunch.data.volume import read_label
from cheaplunch.errors import UserError
from cheaplunch.synthesis import Batch, Pool

# Okabe and Ito (2008), told apart by colour-blind eyes; their black, lost on our ground, gives way to a dark purple
# (a grey would be lost in the images).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#9E2F6B")
GROUND, INK = "#16181C", "#E6E6E6"

SHEET_ROWS = 4  # exemplars shown, so that the sheet fits a screen
TILE_IN, GAP_PX = 1.0, 3
PANEL_IN, PANEL_RATIO = 2.6, (0.5, 1.4)  # width, and height to width at the least and the most
DPI = 130
THUMBNAIL_PX, THUMBNAIL_BYTES = 288, 20_000  # the longest side, and what a page of sixty can carry of each
PRINT_PANEL_IN, PRINT_LINE_PT, PRINT_DPI = 1.5, 0.8, 300  # four columns make the width of a page's text

_PAGE_INK = "#010203"  # drawn by matplotlib, then replaced by the page's own text colour
_FINER = 2  # thumbnails are drawn at so many times their size, for smooth lines
_CURVE_INK = "#3B82C4"  # at least 3:1 on white and on near-black


def class_colours(count: int) -> np.ndarray:
    """(count, 3) RGB in [0, 1]; from the ninth class on the palette comes again, half way to white, and so on."""
    colours = np.array([to_rgb(PALETTE[k % len(PALETTE)]) for k in range(count)]).reshape(count, 3)
    paler = 0.5 ** (np.arange(count) // len(PALETTE))[:, None]
    return 1 - (1 - colours) * paler


def synthesis_sheet(pool: Pool, samples: Batch, names: Sequence[str], path: Path) -> None:
    """Writes a PNG as the paper's Fig. 1: exemplars in the first column, `samples` in the others, labels beneath.

    names: of the classes 1…K. At most SHEET_ROWS exemplars are shown, spread over the pool; a sample has its own
    exemplar, which is not always its row's.
    """
    rows = min(len(pool.images), len(samples.images), SHEET_ROWS)
    columns = math.ceil(len(samples.images) / rows)
    shown = np.linspace(0, len(pool.images) - 1, rows).round().astype(int).tolist()
    sources = Batch(pool.images[shown], pool.labels[shown], pool.sizes[shown])
    h, w = _occupied(sources.images, samples.images)
    palette = np.vstack([np.zeros(3), class_colours(pool.classes)])

    tile_h = TILE_IN * (h + GAP_PX) / (w + GAP_PX)  # in inches, as all that follows
    margin, heading = 0.12, 0.22
    width, height = (columns + 1) * TILE_IN + 3 * margin, 2 * rows * tile_h
    legend = _legend_height(names, width)
    figure = Figure((width, margin + heading + height + legend), facecolor=GROUND)
    for title, batch, left, count in (
        ("exemplars", sources, margin, 1),
        ("synthesized", samples, 2 * margin + TILE_IN, columns),
    ):
        box = (left / width, legend / figure.get_figheight(), count * TILE_IN / width, height / figure.get_figheight())
        axes = figure.add_axes(box)
        axes.imshow(_mosaic(batch, palette, rows, count, h, w), aspect="auto")
        axes.set_title(title, color=INK, fontsize=9, loc="left", pad=4)
        axes.axis("off")
    _legend(figure, names)
    path.write_bytes(_png(figure))


def batch_sheet(images: Tensor, targets: Tensor, path: Path) -> None:
    """Writes a PNG of a batch that went wrong: images (B, 3, S, S), with each of its targets (B, P, S, S) outlined.

    Values that are no numbers are drawn black, and their share stands above the image.
    """
    columns = min(len(images), 8)
    rows = math.ceil(len(images) / columns)
    figure = Figure((columns * PANEL_IN, rows * (PANEL_IN + 0.3)), facecolor=GROUND)
    colours = class_colours(targets.shape[1])
    for number, (image, masks) in enumerate(zip(images.cpu(), targets.cpu(), strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(image.nan_to_num(0, 0, 0).clamp(0, 1).permute(1, 2, 0).numpy())
        for mask, colour in zip(masks.numpy(), colours, strict=True):
            axes.contour(mask, [0.5], colors=[tuple(colour)], linewidths=1)
        broken = (~image.isfinite()).float().mean().item()
        axes.set_title(f"image {number}" + (f", {broken:.0%} not finite" if broken else ""), color=INK, fontsize=9)
        axes.axis("off")
    path.write_bytes(_png(figure))


def case_overlays(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    labels: Mapping[str, int],
    spacing: tuple[float, float] = (1.0, 1.0),
) -> bytes:
    """PNG of one slice, left to right: image, truth, prediction with the truth's outline dashed.

    image: (C, H, W) in [0, 1]; truth, prediction: (H, W) label numbers; labels: class name → number;
    spacing: (row, column), of which the ratio counts.
    """
    ratio = image.shape[-2] * spacing[0] / (image.shape[-1] * spacing[1])
    height = PANEL_IN * float(np.clip(ratio, *PANEL_RATIO))
    legend, heading = _legend_height(list(labels), 3 * PANEL_IN), 0.28
    figure = Figure((3 * PANEL_IN, heading + height + legend), facecolor=GROUND)
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        bottom=legend / figure.get_figheight(),
        top=1 - heading / figure.get_figheight(),
        wspace=0.02,
    )
    for axes, title, fill, outline in zip(
        panels, ("image", "truth", "prediction"), (None, truth, prediction), (None, None, truth), strict=True
    ):
        overlay(axes, image, labels, spacing, fill, outline)
        axes.set_title(title, color=INK, fontsize=9, pad=5)
    _legend(figure, list(labels))
    return _png(figure)


@dataclass(frozen=True, eq=False)
class SliceRow:
    """A slice in a side-by-side figure, with what each of its runs made of it.

    image: (C, H, W) in [0, 1]; truth, and each of predictions: (H, W) label numbers; spacing: (row, column), of which
    the ratio counts.
    """

    title: str
    image: np.ndarray
    truth: np.ndarray
    predictions: tuple[np.ndarray, ...]
    spacing: tuple[float, float] = (1.0, 1.0)


def slice_row(
    case: Case, dataset: Dataset, window: Window, axis: Axis, masks: Sequence[Path], number: int | None = None
) -> SliceRow:
    """A slice of a labelled case with its predicted `masks` (files); by default its `richest_slice`.

    Raises UserError for files that cannot be read or do not fit, and for a slice number that the case has not.
    """
    loaded = load_case(case, dataset, window, axis)
    truth: np.ndarray = loaded.label  # pyright: ignore[reportAssignmentType]
    predictions = [to_slices(read_label(mask, loaded.volume), axis) for mask in masks]
    n = richest_slice(truth) if number is None else number
    if n not in range(len(truth)):
        raise UserError(f"--slices {case.id}:{n}: the case has slices 0 to {len(truth) - 1} along --axis {axis}")
    spacing = in_plane_spacing(loaded.volume, axis)
    title = f"{case.id}, slice {n}" if len(truth) > 1 else case.id
    return SliceRow(title, loaded.image[n], truth[n], tuple(p[n] for p in predictions), spacing)


def richest_slice(truth: np.ndarray) -> int:
    """Of the slices of (N, H, W) with the most classes, the one with the largest area; chosen by truth alone."""
    return max(range(len(truth)), key=lambda n: ((np.unique(truth[n]) > 0).sum(), (truth[n] > 0).sum()))


def side_by_side(rows: Sequence[SliceRow], names: Sequence[str], labels: Mapping[str, int]) -> bytes:
    """PNG for print, as the papers' qualitative figures: a slice a row; image, truth and a column for each of `names`.

    The truth's outline is dashed in the columns of `names`. labels: class name → number.
    """
    columns = ("image", "truth", *names)
    margin, heading, gap = 0.2, 0.24, 0.04  # inches, as all that follows
    panel = PRINT_PANEL_IN - gap
    ratios = [row.image.shape[-2] * row.spacing[0] / (row.image.shape[-1] * row.spacing[1]) for row in rows]
    heights = [panel * float(np.clip(ratio, *PANEL_RATIO)) for ratio in ratios]
    width = margin + len(columns) * PRINT_PANEL_IN
    legend = _legend_height(list(labels), width) + 0.12
    height = heading + sum(heights) + gap * len(rows) + legend
    figure = Figure((width, height), facecolor="white")
    text = {"ha": "center", "fontsize": 6, "parse_math": False}
    top = height - heading
    for row, tall in zip(rows, heights, strict=True):
        bottom = top - tall
        figure.text(0.5 * margin / width, 0.5 * (top + bottom) / height, row.title, rotation=90, va="center", **text)
        for place, (column, fill) in enumerate(zip(columns, (None, row.truth, *row.predictions), strict=True)):
            left = margin + place * PRINT_PANEL_IN
            axes = figure.add_axes((left / width, bottom / height, panel / width, tall / height))
            overlay(axes, row.image, labels, row.spacing, fill, row.truth if place > 1 else None, PRINT_LINE_PT)
            if row is rows[0]:
                axes.set_title(column, fontsize=8, pad=3, parse_math=False)
        top = bottom - gap
    figure.text(0.5, (legend - 0.02) / height, "dashed: outline of the truth", va="top", **text)
    _legend(figure, list(labels), "black")
    return _png(figure, PRINT_DPI)


def overlay(
    axes: Axes,
    image: np.ndarray,
    labels: Mapping[str, int],
    spacing: tuple[float, float] = (1.0, 1.0),
    fill: np.ndarray | None = None,
    outline: np.ndarray | None = None,
    line_pt: float = 1.4,
) -> None:
    """Draws a slice, `fill` tinted in the classes' colours, and `outline` in white dashes.

    image: (C, H, W) in [0, 1]; fill, outline: (H, W) label numbers; labels: name → number; spacing: (row, column);
    line_pt: width of the lines around `fill`.
    """
    axes.imshow(np.moveaxis(as_rgb(image), 0, -1), aspect=spacing[0] / spacing[1], interpolation="nearest")
    for number, colour in zip(labels.values(), class_colours(len(labels)), strict=True):
        if fill is not None:
            mask = fill == number
            tint = np.dstack([np.full((*mask.shape, 3), colour), 0.35 * mask])  # (H, W, 4)
            axes.imshow(tint, aspect=spacing[0] / spacing[1], interpolation="nearest")
            _contour(axes, mask, colors=[colour], linewidths=line_pt)
        if outline is not None:
            _contour(axes, outline == number, colors="white", linewidths=0.57 * line_pt, linestyles="dashed")
    axes.axis("off")


def thumbnail(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    labels: Mapping[str, int],
    spacing: tuple[float, float] = (1.0, 1.0),
    prompts: Mapping[int, tuple[float, ...]] | None = None,
) -> bytes:
    """WEBP of what a slice shows of its structures: the prediction filled, the truth outlined, prompts in white.

    At most THUMBNAIL_PX on each side and THUMBNAIL_BYTES. Arguments as for `case_overlays`; prompts: label number →
    (x, y), or (x0, y0, x1, y1) with both corners inside, in px of the slice.
    """
    rows, columns = _surroundings((truth > 0) | (prediction > 0), spacing)
    image, truth, prediction = (array[..., rows, columns] for array in (image, truth, prediction))
    height, width = truth.shape
    scale = _FINER * THUMBNAIL_PX / max(height * spacing[0], width * spacing[1])
    size = max(_FINER, round(width * spacing[1] * scale)), max(_FINER, round(height * spacing[0] * scale))
    pixels = (255 * np.moveaxis(as_rgb(image), 0, -1)).round().astype(np.uint8)  # (H, W, 3)
    canvas = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    def enlarged(mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray((255 * mask).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)) > 127

    colours = dict(zip(labels.values(), 255 * class_colours(len(labels)), strict=True))
    for number, colour in colours.items():
        inside = enlarged(prediction == number)
        canvas[inside] = 0.6 * canvas[inside] + 0.4 * colour
    for number, colour in colours.items():
        inside = enlarged(truth == number)
        canvas[inside & ~ndimage.binary_erosion(inside, iterations=2 * _FINER)] = colour

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    step = np.array(size) / (width, height)
    for number, place in (prompts or {}).items():
        corners = np.reshape(place, (-1, 2)) - (columns.start, rows.start)
        if len(corners) == 1:  # of a point its pixel's centre
            x, y = (corners[0] + 0.5) * step
            for radius, fill in ((7, "black"), (6, "white"), (3.5, tuple(colours[number].astype(int)))):
                reach = radius * _FINER
                draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill)
        else:  # around the outer edges of a box's pixels, so that the truth's line stays to be seen
            (left, top), (right, bottom) = corners[0] * step, (corners[1] + 1) * step
            for reach, colour, line in ((3 * _FINER, "black", 3 * _FINER), (2.5 * _FINER, "white", 2 * _FINER)):
                box = (left - reach, top - reach, right + reach, bottom + reach)
                draw.rectangle(box, outline=colour, width=line)
    picture = picture.resize((size[0] // _FINER, size[1] // _FINER), Image.Resampling.BOX)
    for quality in (80, 55, 30, 5):  # the first is enough for all but noise
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=quality)
        if file.tell() <= THUMBNAIL_BYTES:
            break
    return file.getvalue()


def _surroundings(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns of a square around `mask` (H, W), a quarter wider and at least half of the image's longer side;
    within the image."""
    spans = [np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))]
    extents = [step * (span[-1] - span[0] + 1) for span, step in zip(spans, spacing, strict=True) if span.size]
    longer = max(length * step for length, step in zip(mask.shape, spacing, strict=True))
    side = max([0.5 * longer, *(1.25 * extent for extent in extents)])
    parts = []
    for span, length, step in zip(spans, mask.shape, spacing, strict=True):
        count = min(length, math.ceil(side / step))
        middle = (span[0] + span[-1] + 1) / 2 if span.size else length / 2
        start = int(np.clip(round(middle - count / 2), 0, length - count))
        parts.append(slice(start, start + count))
    return parts[0], parts[1]


def telling_slice(truth: np.ndarray, prediction: np.ndarray) -> int:
    """The slice of (N, H, W) with the largest true area; of a truth without any, with the largest predicted."""
    return int(((truth if truth.any() else prediction) > 0).sum(axis=(1, 2)).argmax())


def training_curves(records: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Curve's name → inline SVG, of the lines of a run's metrics.jsonl; a step logged twice counts as logged last."""
    last = {record["step"]: record for record in records}
    steps = np.array(sorted(last))
    return {
        title: _curve(steps, np.array([last[step][key] for step in steps]), title)
        for title, key in (("loss", "loss"), ("learning rate", "learning_rate"))
    }


def clicks_curve(curves: Mapping[str, Mapping[str, float | None]]) -> bytes:
    """PNG of the mean Dice against the clicks of a simulated user, a line for each of `curves`: name → clicks → Dice.

    An undefined Dice leaves a gap.
    """
    figure = Figure((4.6, 3.0), facecolor=GROUND, layout="constrained")
    axes = figure.subplots(subplot_kw={"facecolor": GROUND})
    for (name, curve), colour in zip(curves.items(), class_colours(len(curves)), strict=True):
        clicks = [int(count) for count in curve]
        dice = [np.nan if value is None else value for value in curve.values()]
        axes.plot(clicks, dice, color=tuple(colour), marker="o", markersize=4, linewidth=1.8, label=name)
        axes.set_xticks(clicks)
    axes.set_ylim(0, 1)
    axes.set_xlabel("clicks a class and slice", color=INK, fontsize=9)
    axes.set_ylabel("mean Dice", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.15)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _png(figure)


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of `values` (N,), centred; at the ends over what there is."""
    window = np.ones(2 * (len(values) // 20) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _curve(steps: np.ndarray, values: np.ndarray, title: str) -> str:
    figure = Figure((4.6, 2.7), facecolor="none", layout="constrained")
    axes = figure.subplots(subplot_kw={"facecolor": "none"})
    if title == "loss":
        axes.plot(steps, values, color=_CURVE_INK, alpha=0.5, linewidth=0.8)
        values = smooth(values)
    axes.plot(steps, values, color=_CURVE_INK, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", color=_PAGE_INK, fontsize=11)
    axes.set_xlabel("step", color=_PAGE_INK)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
    axes.yaxis.get_offset_text().set_color(_PAGE_INK)
    axes.tick_params(colors=_PAGE_INK)
    axes.grid(color=_PAGE_INK, alpha=0.15)
    axes.spines[:].set_visible(False)
    # A salt for the ids inside, so that equal runs give equal pages.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        canvas, file = FigureCanvasSVG(figure), io.StringIO()
        canvas.print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_PAGE_INK, "currentColor")
    label = f"{title} over {steps[-1]} steps, from {values[0]:.3g} to {values[-1]:.3g}"
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _occupied(*batches: Tensor) -> tuple[int, int]:
    """(h, w) from the upper left that holds all that is not padding, of images (…, C, S, S)."""
    seen = torch.cat(batches).amax(dim=(0, 1)) > 0  # (S, S)
    if not seen.any():
        return seen.shape[0], seen.shape[1]
    rows, columns = seen.nonzero().T
    return int(rows.max()) + 1, int(columns.max()) + 1


def _mosaic(batch: Batch, palette: np.ndarray, rows: int, columns: int, h: int, w: int) -> np.ndarray:
    """B images over their labels, row by row: (2 · rows · (h + gap), columns · (w + gap), 3) in [0, 1]."""
    images = as_rgb(batch.images[..., :h, :w]).clamp(0, 1).movedim(-3, -1).numpy()  # (B, h, w, 3)
    tiles = np.stack([images, palette[batch.labels[..., :h, :w].numpy()]], axis=1)  # (B, 2, h, w, 3)
    canvas = np.full((rows * columns, 2, h + GAP_PX, w + GAP_PX, 3), to_rgb(GROUND), np.float32)
    canvas[: len(tiles), :, :h, :w] = tiles
    canvas = canvas.reshape(rows, columns, 2, h + GAP_PX, w + GAP_PX, 3).transpose(0, 2, 3, 1, 4, 5)
    return canvas.reshape(2 * rows * (h + GAP_PX), columns * (w + GAP_PX), 3)


def _contour(axes: Axes, mask: np.ndarray, **style) -> None:
    """Outline of (H, W) bool, closed where it touches the border; nothing for an empty mask."""
    if mask.any():
        h, w = mask.shape
        axes.contour(np.arange(-1, w + 1), np.arange(-1, h + 1), np.pad(mask, 1), levels=[0.5], **style)
        axes.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))


def _legend_grid(names: Sequence[str], width_in: float) -> tuple[int, int]:
    """(rows, columns) in which a legend of `names` fits."""
    columns = max(1, min(len(names), int(width_in / (0.08 * max(map(len, names)) + 0.35))))
    return math.ceil(len(names) / columns), columns


def _legend_height(names: Sequence[str], width_in: float) -> float:
    return 0.17 * _legend_grid(names, width_in)[0] + 0.15


def _legend(figure: Figure, names: Sequence[str], ink: str = INK) -> None:
    """The classes' colours at the foot of the figure."""
    legend = figure.legend(
        [Patch(color=colour) for colour in class_colours(len(names))],
        names,
        loc="lower center",
        ncols=_legend_grid(names, figure.get_figwidth())[1],
        frameon=False,
        fontsize=8,
        labelcolor=ink,
        handlelength=1,
        handleheight=1,
        borderpad=0.3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name is a "$"


def _png(figure: Figure, dpi: int = DPI) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()
