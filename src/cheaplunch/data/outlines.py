"""Outlines → filled masks: ellipses, polygons, and lines drawn on photographs. Arrays are (H, W), rows first."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from cheaplunch.errors import UserError

_DRAWN = 20.0  # grey values of 255 between a photograph and a line drawn on it; JPEG alone changes less
_SPECK_PX = 20  # smaller differences are no part of a line
_MOST_CLOSING_PX = 8  # gaps in a drawn line are closed up to twice this
_LINE_PX = 3  # of a line's thickness at most count to what it encloses


def fill_ellipse(line: np.ndarray) -> np.ndarray:
    """(H, W) bool, the outline of an ellipse, whole or cut by the image's border → inside and line, bool.

    The ellipse is the least-squares conic through the line's pixels, in coordinates scaled to about 1.
    """
    rows, columns = np.nonzero(line)
    centre, scale = np.array([columns.mean(), rows.mean()]), max(line.shape) / 2
    x, y = (columns - centre[0]) / scale, (rows - centre[1]) / scale
    terms = np.stack([x * x, x * y, y * y, x, y], axis=1)
    a, b, c, d, e = np.linalg.lstsq(terms, np.ones(len(x)), rcond=None)[0]  # a x² + b x y + c y² + d x + e y = 1
    x, y = np.meshgrid(np.arange(line.shape[1]), np.arange(line.shape[0]))
    x, y = (x - centre[0]) / scale, (y - centre[1]) / scale
    return (a * x * x + b * x * y + c * y * y + d * x + e * y <= 1) | line


def read_polygons(path: Path, image: str) -> list[list[tuple[float, float]]]:
    """The regions that a DDTI file marks on one of its images, each a list of (x, y) in pixels.

    Raises UserError where the file is damaged.
    """
    try:
        marks = ElementTree.parse(path).getroot().iter("mark")
        texts = [m.findtext("svg") or "" for m in marks if (m.findtext("image") or "").strip() == image]
        regions = [region for text in texts if text.strip() for region in json.loads(text)]
        return [[(float(p["x"]), float(p["y"])) for p in region["points"]] for region in regions]
    except (ElementTree.ParseError, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} is cut off or damaged: mend it, or take the image that it marks away ({error})"
        ) from error


def fill_polygons(regions: list[list[tuple[float, float]]], height: int, width: int) -> np.ndarray:
    """(x, y) corners → (H, W) bool, the outlines included; fewer than three corners enclose nothing."""
    picture = Image.new("1", (width, height))
    draw = ImageDraw.Draw(picture)
    for points in regions:
        if len(points) > 2:
            draw.polygon(points, fill=1, outline=1)
    return np.asarray(picture)


def disc_and_cup(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(H, W), a drawing minus its photograph, with a small closed line inside a larger one → both filled, bool.

    The lines count to what they enclose. They may touch. None where there are no two, one inside the other.
    """
    lines = np.abs(difference) > _DRAWN
    pieces, sizes = _pieces(lines, np.ones((3, 3)))
    lines &= sizes[pieces] >= _SPECK_PX
    rows, columns = np.nonzero(lines)
    if not len(rows):
        return None
    # Only the surroundings matter: photographs are large, and the disc is small.
    margin = 2 * _MOST_CLOSING_PX
    part = tuple(slice(max(0, int(where.min()) - margin), int(where.max()) + margin + 1) for where in (rows, columns))
    lines = np.pad(lines[part], margin)
    for gap in range(_MOST_CLOSING_PX + 1):
        found = _nested(lines, gap)
        if found is not None:
            disc, cup = (np.zeros(difference.shape, bool) for _ in range(2))
            disc[part], cup[part] = (mask[margin:-margin, margin:-margin] for mask in found)
            return disc, cup
    return None


def _nested(lines: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What the outer and the inner of two lines enclose, gaps of up to 2 · `gap` pixels closed; None for fewer."""
    square = np.ones((3, 3))
    thick: np.ndarray = ndimage.binary_dilation(lines, square, iterations=gap) if gap else lines
    pieces, sizes = _pieces(np.asarray(ndimage.binary_fill_holes(thick)))
    if len(sizes) < 2:
        return None
    filled = pieces == np.argmax(sizes[1:]) + 1
    inside, sizes = _pieces(filled & ~thick)
    large = sizes[1:] >= _SPECK_PX
    if np.count_nonzero(large) < 2:
        return None
    # The cup is the part that lies deepest in the disc: the ring around it ends where the cup's line begins.
    depth = ndimage.maximum(ndimage.distance_transform_edt(filled), inside, np.arange(1, len(sizes)))
    cup = inside == int(np.argmax(np.where(large, depth, 0))) + 1
    disc: np.ndarray = filled
    if gap:
        disc = ndimage.binary_erosion(filled, square, iterations=gap)
        cup = ndimage.binary_dilation(cup, square, iterations=gap)
    return disc, ndimage.binary_dilation(cup, square, iterations=_LINE_PX, mask=lines | cup) & disc


def _pieces(mask: np.ndarray, structure: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) bool → its connected pieces numbered from 1, and the pixels of each, those of the background first."""
    pieces: np.ndarray = ndimage.label(mask, structure)[0]  # type: ignore[index]
    return pieces, np.bincount(pieces.ravel())
