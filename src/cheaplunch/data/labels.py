"""Mask files → one label map on the image's grid, whatever way they were saved.

A rule is a small frozen dataclass that is called with the files and the image they belong to. It can be pickled and
compared, so that it may travel to a worker and into a cache's key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cheaplunch.data import outlines
from cheaplunch.data.dicom import Series
from cheaplunch.data.formats import PICTURE_SUFFIXES, READERS
from cheaplunch.data.names import natural_order
from cheaplunch.data.volume import Grid, Volume, read_label, read_volume, suffix_of, to_lps
from cheaplunch.errors import UserError

FOREGROUND = "foreground"  # the class of masks that say only yes or no

_MASKS_LOOKED_AT = 24  # spread evenly over a folder, to learn what values its masks hold
_LEVEL_TOLERANCE = 20  # grey values; CHAOS gives its levels as ranges of 13 to 25
_MOST_CLASSES = 40  # a mask of more different values is a photograph, or probabilities


class Rule(Protocol):
    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        """The label map, (Z, Y, X) int32, voxel by voxel on `like.array[c]`. UserError names the file at fault."""
        ...


@dataclass(frozen=True)
class Numbers:
    """One file of label numbers; `remap` gives stored values others, all at once."""

    remap: tuple[tuple[int, int], ...] = ()

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        stored = _one_channel(paths[0], like)
        label = stored.copy() if self.remap else stored
        for value, number in self.remap:
            label[stored == value] = number
        return label


@dataclass(frozen=True)
class Levels:
    """One file of grey levels that stand for label numbers, a little off where it was saved or drawn carelessly."""

    levels: tuple[tuple[int, int], ...]  # (grey, number)

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        return self.numbers(_one_channel(paths[0], like), paths[0])

    def numbers(self, grey: np.ndarray, path: Path) -> np.ndarray:
        """Grey → int32, each the number of the level nearest to it; UserError where none is near."""
        off = np.abs(grey[..., None] - np.array([level for level, _ in self.levels]))  # (…, levels)
        if (strange := off.min(axis=-1) > _LEVEL_TOLERANCE).any():
            raise UserError(
                f"{path} has the grey {int(grey[strange][0])}, which is near none of "
                f"{', '.join(str(level) for level, _ in self.levels)}: is it the owners' file?"
            )
        return np.array([number for _, number in self.levels], np.int32)[off.argmin(axis=-1)]


@dataclass(frozen=True)
class Threshold:
    """One file, foreground where it is brighter than `above`: what JPEG leaves of 0 and 255."""

    above: int = 127

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        return (_one_channel(paths[0], like) > self.above).astype(np.int32)


@dataclass(frozen=True)
class Masks:
    """A file for each class, or several; `numbers` run along with the paths.

    Where two classes overlap one pixel would have two, so that is an error, but where the user gave the order of the
    classes (`stacked`): then a later one lies on top.
    """

    numbers: tuple[int, ...]
    stacked: bool = False

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        label = np.zeros(like.array.shape[1:], np.int32)
        for number, path in sorted(zip(self.numbers, paths, strict=True)):
            mask = _foreground(path, like)
            other = mask & (label != 0) & (label != number)
            if other.any() and not self.stacked:
                below = paths[self.numbers.index(int(label[other][0]))]
                raise UserError(
                    f"{path} and {below} overlap on {np.count_nonzero(other)} pixels, and a pixel has one class: "
                    "list the classes in classes.csv (name), the ones that lie on top last"
                )
            label[mask] = number
        return label


@dataclass(frozen=True)
class Colours:
    """One picture in which each class has a colour; black is background where the palette does not name it."""

    palette: tuple[tuple[tuple[int, int, int], int], ...]  # ((r, g, b), number), 0…255

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        (path,) = paths
        codes = _codes(_pixels(path, like))
        label = np.zeros(codes.shape, np.int32)
        known = codes == 0
        for (red, green, blue), number in self.palette:
            here = codes == (red << 16 | green << 8 | blue)
            label[here] = number
            known |= here
        if not known.all():
            strange, count = Counter(codes[~known].tolist()).most_common(1)[0]
            colour = (strange >> 16, strange >> 8 & 255, strange & 255)
            way_out = (
                "JPEG changes colours, save it as PNG"
                if suffix_of(path) in (".jpg", ".jpeg")
                else "add it to the palette or paint it over"
            )
            raise UserError(f"{path} has the colour {colour} on {count} pixels, which no class has: {way_out}")
        return label


@dataclass(frozen=True)
class Ellipse:
    """One picture of an ellipse's outline, which may leave the image: the inside and the line itself are 1."""

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        line = _foreground(paths[0], like)[0]
        if np.count_nonzero(line) < 6:
            raise UserError(f"{paths[0]} has no outline of an ellipse: draw it in white on black")
        return outlines.fill_ellipse(line)[None].astype(np.int32)


@dataclass(frozen=True)
class Polygons:
    """DDTI: an XML file a patient; each <mark> has the number of an image, which ends the picture's name, and in its
    <svg> a JSON list of regions with "points". The inside of each region is 1."""

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        height, width = like.array.shape[-2:]
        regions = outlines.read_polygons(paths[0], like.grid.path.stem.rpartition("_")[2])
        return outlines.fill_polygons(regions, height, width)[None].astype(np.int32)


@dataclass(frozen=True)
class Drawings:
    """RIGA: copies of the photograph on which each expert drew the disc's and the cup's outline.

    A pixel is cup (2) or disc (1) where more than half of the experts have it inside; a drawing in which no two
    outlines are found does not count, and the photograph is `like`'s own.
    """

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        photograph = _grey(like.array)  # (H, W)
        found = [outlines.disc_and_cup(_grey(_pixels(path, like)) - photograph) for path in paths]
        pairs = [pair for pair in found if pair is not None]
        if not pairs:
            raise UserError(f"{paths[0]} shows no outlines of disc and cup: take the image away, or its drawings")
        disc, cup = (np.mean(masks, axis=0) > 0.5 for masks in zip(*pairs, strict=True))
        return (disc.astype(np.int32) + (disc & cup))[None]


@dataclass(frozen=True)
class SlicePictures:
    """CHAOS: a picture for each slice of a DICOM series, its rows and columns as the slice has them.

    They belong to the slice of the same file name, or else are in the order of the slices' file names.
    """

    levels: Levels

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        grid = like.grid
        if not isinstance(grid.header, Series):
            raise UserError(f"{grid.path} is no DICOM series: pictures like {paths[0].name} go with its slices")
        slices = [file.stem for file in grid.header.files]  # along k
        pictures = {path.stem: path for path in paths}
        if not set(slices) <= pictures.keys():
            if len(slices) != len(paths):
                raise UserError(
                    f"{paths[0].parent} has {len(paths)} pictures for the {len(slices)} slices of {grid.path}"
                )
            by_name = sorted(slices, key=natural_order)
            pictures = dict(zip(by_name, sorted(paths, key=lambda path: natural_order(path.name)), strict=True))
        planes = [self._plane(pictures[name], grid) for name in slices]
        return np.ascontiguousarray(to_lps(np.stack(planes, axis=-1), grid))  # (i, j, k) as the file has it

    def _plane(self, path: Path, grid: Grid) -> np.ndarray:
        """(i, j): columns first, as the series' own axes run."""
        reader = READERS[suffix_of(path)]
        header = reader.header(path, "label")
        if header.shape != grid.shape[1::-1]:
            raise UserError(f"{path} has shape {header.shape} but its slices have {grid.shape[1::-1]}: copy it again")
        grey = reader.voxels(path, "label", header)[..., 0].astype(np.int32)  # (H, W)
        return self.levels.numbers(grey, path).T


@dataclass(frozen=True)
class Segments:
    """DICOM SEG objects: each segment by its label's number."""

    names: tuple[tuple[str, int], ...]

    def __call__(self, paths: tuple[Path, ...], like: Volume) -> np.ndarray:
        label = np.zeros(like.array.shape[1:], np.int32)
        for path in paths:
            own = read_label(path, like, dict(self.names))
            if (both := np.count_nonzero((label != 0) & (own != 0))) > 0:
                raise UserError(
                    f"{path} overlaps {paths[0].name} on {both} voxels, and a voxel has one class: keep one"
                )
            label[own != 0] = own[own != 0]
        return label


@dataclass(frozen=True)
class LabelFiles:
    """The files that say what is where on one image, and how to read them."""

    paths: tuple[Path, ...]  # at least one
    rule: Rule = Numbers()

    def read(self, like: Volume) -> np.ndarray:
        """The label map, (Z, Y, X) int32, voxel by voxel on `like.array[c]`. UserError names the file at fault."""
        return self.rule(self.paths, like)


def label_map(path: Path) -> LabelFiles:
    """One file that holds the dataset's label numbers as they are."""
    return LabelFiles((path,))


def guess_rule(paths: Sequence[Path]) -> tuple[dict[str, int], Rule]:
    """What masks without any names mean, from the values of some of them: class name → number, and the rule.

    0 and 255, or one other value beside 0, are background and foreground. Several values are classes that go by
    their numbers. Raises UserError where they are photographs, or colours.
    """
    some = paths[:: max(1, -(-len(paths) // _MASKS_LOOKED_AT))]
    if any(suffix_of(path) in (".jpg", ".jpeg") for path in some):
        return {FOREGROUND: 1}, Threshold()
    values: set[int] = set()
    for path in some:
        own = _values(path)
        if len(own) > _MOST_CLASSES:
            raise UserError(
                f"{path} has {len(own)} different values, so it is no mask: save label numbers, or 0 and 255"
            )
        values |= own
    values -= {0}
    if len(values) > 1:
        too_large = [value for value in values if not 0 < value <= 255]
        if too_large:
            raise UserError(f"{paths[0].parent}: masks hold the values {too_large}; label numbers run from 0 to 255")
        return {f"label_{value}": value for value in sorted(values)}, Numbers()
    if values <= {1}:
        return {FOREGROUND: 1}, Numbers()
    return {FOREGROUND: 1}, Numbers(((values.pop(), 1),))


# --- reading ---------------------------------------------------------------------------------------------------------


def _foreground(path: Path, like: Volume) -> np.ndarray:
    """(Z, Y, X) bool: what is not 0, or brighter than half in a JPEG."""
    return _one_channel(path, like) > (127 if suffix_of(path) in (".jpg", ".jpeg") else 0)


def _one_channel(path: Path, like: Volume) -> np.ndarray:
    """(Z, Y, X) int32 of a file of label numbers; a grey picture may have been saved as a colour one."""
    if not _is_colour(path):
        return read_label(path, like)
    pixels = _pixels(path, like)
    if (pixels != pixels[:1]).any():
        raise UserError(f"{path} is coloured: name the colours in palette.json, or save label numbers")
    return pixels[0].astype(np.int32)


def _pixels(path: Path, like: Volume) -> np.ndarray:
    """(3, Z, Y, X) float32 of a picture on the image's grid; grey is repeated."""
    picture = read_volume((path,))
    if picture.array.shape[1:] != like.array.shape[1:]:
        sizes = " but ".join(" × ".join(map(str, v.array.shape[:0:-1][:2])) for v in (picture, like))
        raise UserError(f"{path} has {sizes} pixels has {like.grid.path.name}: export it again on the image's grid")
    return picture.array if len(picture.array) == 3 else np.repeat(picture.array[:1], 3, axis=0)


def _codes(pixels: np.ndarray) -> np.ndarray:
    """(3, Z, Y, X) in 0…255 → (Z, Y, X), one number a colour."""
    red, green, blue = pixels.astype(np.int64)
    return red << 16 | green << 8 | blue


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(C, 1, H, W) → (H, W): the mean of the channels."""
    return pixels[:, 0].mean(axis=0)


def _is_colour(path: Path) -> bool:
    suffix = suffix_of(path)
    return suffix in PICTURE_SUFFIXES and READERS[suffix].header(path, "label").channels > 1


def _values(path: Path) -> set[int]:
    """The values of a mask without the image it belongs to."""
    reader = READERS[suffix_of(path)]
    voxels = reader.voxels(path, "label", reader.header(path, "label"))  # file axes + (C,)
    if (voxels != voxels[..., :1]).any():
        raise UserError(f"{path} is coloured: name the colours in palette.json, or save label numbers")
    values = np.unique(voxels[..., 0])
    if (values != np.rint(values)).any():
        raise UserError(f"{path} has values that are not integers: save label numbers, or 0 and 255")
    return set(values.astype(int).tolist())
