"""What a run looks like: the synthetic sheet (paper's Fig. 1), a case's overlays, the training curves.

Pictures stand on a dark ground of their own, as on a lightbox, so that they suit a light page and a dark one;
curves have none and take the page's text colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
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
from torch import Tensor

from cheaplunch.data.slices import as_rgb
from cheaplunch.synthesis import Batch, Pool

# Okabe and Ito (2008), told apart by colour-blind eyes; their black, lost on our ground, gives way to a dark purple
# (a grey would be lost in the images).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#9E2F6B")
GROUND, INK = "#16181C", "#E6E6E6"

SHEET_ROWS = 4  # exemplars shown, so that the sheet fits a screen
TILE_IN, GAP_PX = 1.0, 3
PANEL_IN, PANEL_RATIO = 2.6, (0.5, 1.4)  # width, and height to width at the least and the most
DPI = 130

_PAGE_INK = "#010203"  # drawn by matplotlib, then replaced by the page's own text colour
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


def overlay(
    axes: Axes,
    image: np.ndarray,
    labels: Mapping[str, int],
    spacing: tuple[float, float] = (1.0, 1.0),
    fill: np.ndarray | None = None,
    outline: np.ndarray | None = None,
) -> None:
    """Draws a slice, `fill` tinted in the classes' colours, and `outline` in white dashes.

    image: (C, H, W) in [0, 1]; fill, outline: (H, W) label numbers; labels: name → number; spacing: (row, column).
    """
    axes.imshow(np.moveaxis(as_rgb(image), 0, -1), aspect=spacing[0] / spacing[1], interpolation="nearest")
    for number, colour in zip(labels.values(), class_colours(len(labels)), strict=True):
        if fill is not None:
            mask = fill == number
            tint = np.dstack([np.full((*mask.shape, 3), colour), 0.35 * mask])  # (H, W, 4)
            axes.imshow(tint, aspect=spacing[0] / spacing[1], interpolation="nearest")
            _contour(axes, mask, colors=[colour], linewidths=1.4)
        if outline is not None:
            _contour(axes, outline == number, colors="white", linewidths=0.8, linestyles="dashed")
    axes.axis("off")


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


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """The classes' colours at the foot of the figure."""
    legend = figure.legend(
        [Patch(color=colour) for colour in class_colours(len(names))],
        names,
        loc="lower center",
        ncols=_legend_grid(names, figure.get_figwidth())[1],
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1,
        handleheight=1,
        borderpad=0.3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name is a "$"


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()
