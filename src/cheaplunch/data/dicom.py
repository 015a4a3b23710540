"""DICOM: a series of slices in, a segmentation object (SEG) out and in.

A source is a folder that holds one image series (whatever the files are called, however deep they lie), one .dcm
file, or `FOLDER#UID`: the series of that SeriesInstanceUID among several. Of a file only the tags named here are
read, none of which says who the patient is; the reader's own error messages, which may quote any of them, are kept
back. Places are in DICOM's patient coordinates (mm; x towards left, y posterior, z superior): volume.py turns them.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonpath
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

import cheaplunch
from cheaplunch.data.headers import DEFLATE, HARMLESS, Header, Role, check_claim, reading
from cheaplunch.errors import UserError

SUFFIX = ".dcm"

_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "SeriesInstanceUID",
    "ReferencedSeriesSequence",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "SegmentationType",
    "SegmentSequence",
]
_NOT_IMAGES = ("SEG", "SR", "PR", "KO", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "DOC")
_PIXELS = {(8, 0): "u1", (8, 1): "i1", (16, 0): "u2", (16, 1): "i2", (32, 0): "u4", (32, 1): "i4"}  # bits, signed
_COPLANAR = 1e-3  # of unit vectors; exports round them to four digits or more
_TILT = 5e-3  # sideways shift over the length of the stack: a third of a degree
_PLACE_MM = 0.1  # positions are commonly rounded to this
_LONGEST_LABEL = 64  # characters, of the type LO
_OUR_NUMBER = "label number {}"  # beside each segment of ours, whose own number has to count from 1


@dataclass(frozen=True)
class Series:
    """The images of one series in slice order. Nothing in it names the patient; it can be pickled."""

    uid: str  # SeriesInstanceUID
    modality: str
    files: tuple[Path, ...] = field(repr=False)  # one a slice, along the normal; or one file of several frames
    frames: tuple[int, ...] = field(repr=False)  # of each slice, its number from 0 within its file
    shape: tuple[int, int, int]  # (i, j, k): columns, rows, slices
    dtype: str  # as stored
    spacing_mm: tuple[float, float, float] | None  # (i, j, k)
    affine: tuple[tuple[float, ...], ...] | None = field(repr=False)  # (4, 4), (i, j, k) → mm, patient coordinates
    flaw: str = ""  # why it is no volume: what is wrong and the way out

    @property
    def source(self) -> Path:
        """`FOLDER#UID` with the deepest folder that holds all its files."""
        folder = Path(commonpath([file.parent for file in self.files]))
        return Path(f"{folder}#{self.uid}")


@dataclass(frozen=True)
class Segmentation:
    """A SEG object: which series it is drawn on and what it segments."""

    path: Path
    series_uid: str  # of the images it refers to; '' where it does not say
    labels: tuple[str, ...]  # in the order of their segment numbers


@dataclass(frozen=True)
class _Plane:
    """One slice as its file has it."""

    path: Path
    frame: int
    modality: str
    size: tuple[int, int]  # columns, rows
    dtype: str
    flaw: str = ""
    position: tuple[float, ...] = ()  # of the first voxel's centre
    axes: tuple[float, ...] = ()  # unit vectors along a row and along a column
    spacing: tuple[float, ...] = ()  # between rows, between columns
    thickness: float = 1.0


# -------------------------------------------------------------------- finding


def find_series(folder: Path) -> list[Series]:
    """Every image series below a folder, in the order of their UIDs.

    Files that are not DICOM and objects that are no images (SEG, reports, presentation states, plans, doses) are
    passed over. A series that is no volume is listed with its flaw. UserError names a DICOM file that is damaged.
    """
    planes: dict[str, list[_Plane]] = defaultdict(list)
    for path, header in _headers(folder):
        if _is_image(header):
            planes[str(header.SeriesInstanceUID)] += _planes(path, header)
    return [_arrange(uid, planes[uid]) for uid in sorted(planes)]


def find_segmentations(folder: Path) -> list[Segmentation]:
    """Every SEG object below a folder, in the order of their paths."""
    found = []
    for path, header in _headers(folder):
        if header.get("Modality") == "SEG":
            with reading(path, private=True):
                uids = [str(r.SeriesInstanceUID) for r in header.get("ReferencedSeriesSequence", [])]
                labels = {int(s.SegmentNumber): str(s.SegmentLabel) for s in header.SegmentSequence}
            found.append(Segmentation(path, uids[0] if uids else "", tuple(labels[n] for n in sorted(labels))))
    return found


def names_series(source: Path) -> bool:
    """Whether a path is a folder or `FOLDER#UID`."""
    return source.is_dir() or _folder_and_uid(source) is not None


def open_series(source: Path) -> Series:
    """The series of a folder, of `FOLDER#UID` or of one file. UserError where that is none, several or flawed."""
    named = _folder_and_uid(source)
    if named:
        folder, uid = named
        found = [series for series in find_series(folder) if series.uid == uid]
        if not found:
            raise UserError(f"{source}: no image series of that SeriesInstanceUID below {folder}; look for its number")
    elif source.is_dir():
        found = find_series(source)
        if not found:
            raise UserError(f"{source} has no DICOM images: give the folder of one series")
        if len(found) > 1:
            listed = "; ".join(f"{s.uid} ({s.modality}, {s.shape[2]} slices)" for s in found)
            raise UserError(f"{source} has {len(found)} image series: choose one as {source}#UID out of {listed}")
    else:
        header = _header(source)
        if not _is_image(header):
            raise UserError(f"{source} is a DICOM object without an image: give the folder of a series")
        found = [_arrange(str(header.SeriesInstanceUID), _planes(source, header))]
    if found[0].flaw:
        raise UserError(f"{source} {found[0].flaw}")
    return found[0]


def is_segmentation(source: Path) -> bool:
    """Whether a path is a SEG object. UserError where it is a file that is missing or damaged."""
    return not names_series(source) and _header(source).get("Modality") == "SEG"


def _folder_and_uid(source: Path) -> tuple[Path, str] | None:
    named = re.fullmatch(r"(.*)#([0-9.]+)", source.name)
    if not named or source.exists():
        return None
    folder = source.parent / named[1]
    return (folder, named[2]) if folder.is_dir() else None


def _headers(folder: Path) -> Iterator[tuple[Path, Dataset]]:
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        with path.open("rb") as file:
            start = file.read(132)
        if start[128:] == b"DICM":
            yield path, _header(path)


def _header(path: Path) -> Dataset:
    with reading(path, private=True):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        if "SOPClassUID" not in header and "MediaStorageSOPClassUID" not in header.file_meta:
            raise UserError(f"{path} is cut off or damaged, copy it again (it does not say what it is)")
        for _ in (*header.file_meta, *header.iterall()):  # each value is looked at only now
            pass
        if "Image Storage" in _kind(header) and "SeriesInstanceUID" not in header:
            raise UserError(f"{path} is cut off or damaged, copy it again (it does not say which series it is of)")
        return header


def _is_image(header: Dataset) -> bool:
    """By its class too, so that an image cut off before its size counts as damaged and not as something else."""
    if "SeriesInstanceUID" not in header or header.get("Modality") in _NOT_IMAGES:
        return False
    return "Rows" in header or "Image Storage" in _kind(header)


def _kind(header: Dataset) -> str:
    """The name of its class, which also stands before all else in the file."""
    return UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID"))).name


def _planes(path: Path, header: Dataset) -> list[_Plane]:
    """The slices of one file. UserError where it is damaged; a flaw where it is whole but holds no slice."""
    with reading(path, private=True):
        frames = int(header.get("NumberOfFrames") or 1)
        dtype = _PIXELS[int(header.BitsAllocated), int(header.PixelRepresentation)]
        first = _Plane(path, 0, str(header.get("Modality", "")), (int(header.Columns), int(header.Rows)), dtype)
        _check_size(path, header, frames)
        per_frame = header.get("PerFrameFunctionalGroupsSequence")
        if int(header.get("SamplesPerPixel", 1)) != 1:
            return [replace(first, flaw="is in colour: export its pictures as PNG")]
        if per_frame is not None:
            if len(per_frame) != frames:
                raise UserError(f"{path} is cut off or damaged, copy it again (it describes {len(per_frame)} frames)")
            return [_placed(replace(first, frame=n), *_groups(header, own)) for n, own in enumerate(per_frame)]
        if frames > 1:
            return [replace(first, flaw=f"has {frames} frames without places (a film?): export single images")]
        if not {"ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"} <= set(header.dir()):
            return [replace(first, flaw="does not say where its slices lie: export its pictures as PNG")]
        return [_placed(first, header, header, header)]


def _groups(header: Dataset, own: Dataset) -> tuple[Dataset, Dataset, Dataset]:
    """Place, orientation and measures of one frame."""
    position = _group(header, own, "PlanePositionSequence")
    return position, _group(header, own, "PlaneOrientationSequence"), _group(header, own, "PixelMeasuresSequence")


def _group(header: Dataset, own: Dataset, name: str) -> Dataset:
    """A functional group of one frame: its own, or the one that all frames share."""
    return (own if name in own else header.SharedFunctionalGroupsSequence[0])[name][0]


def _placed(plane: _Plane, place: Dataset, turn: Dataset, measures: Dataset) -> _Plane:
    position, axes = np.array(place.ImagePositionPatient, float), np.array(turn.ImageOrientationPatient, float)
    spacing, thickness = np.array(measures.PixelSpacing, float), float(measures.get("SliceThickness") or 1)
    if (position.size, axes.size, spacing.size) != (3, 6, 2):
        return replace(plane, flaw="has no usable places (numbers are missing): export it again")
    if not np.isfinite([*position, *axes, *spacing, thickness]).all() or min(*spacing, thickness) <= 0:
        return replace(plane, flaw="has no usable places (zero or NaN spacing): export it again")
    rows, columns = axes.reshape(2, 3)
    if not np.allclose([rows @ rows, columns @ columns, rows @ columns], [1, 1, 0], atol=_COPLANAR):
        return replace(plane, flaw="has slice axes that are no perpendicular unit vectors: export it again")
    return replace(
        plane,
        position=tuple(position.tolist()),
        axes=tuple(axes.tolist()),
        spacing=tuple(spacing.tolist()),
        thickness=thickness,
    )


def _check_size(path: Path, header: Dataset, frames: int) -> None:
    """UserError where the header promises more pixels than the file can hold."""
    syntax = header.file_meta.TransferSyntaxUID
    bits = int(header.Rows) * int(header.Columns) * frames * int(header.get("SamplesPerPixel", 1))
    bits *= int(header.BitsAllocated)
    if bits <= 0:
        raise UserError(f"{path} is cut off or damaged, copy it again (its header promises no pixels)")
    packed = syntax.is_encapsulated or syntax.is_deflated
    check_claim(path, bits // 8, path.stat().st_size, DEFLATE if packed else 1, HARMLESS if packed else 0)


# -------------------------------------------------------------------- slices → volume


def _arrange(uid: str, planes: Sequence[_Plane]) -> Series:
    """Slices in the order of their places along the normal, and the affine; or the flaw that forbids both."""
    flaw, normal = next((p.flaw for p in planes if p.flaw), "") or _unlike(planes), np.zeros(3)
    if not flaw:
        normal = np.cross(planes[0].axes[:3], planes[0].axes[3:])
        planes = sorted(planes, key=lambda p: float(np.dot(p.position, normal)))
        flaw = _uneven(np.array([p.position for p in planes]), normal)
    first = planes[0]
    files = tuple(dict.fromkeys(p.path for p in planes))
    series = Series(
        uid,
        first.modality,
        files,
        tuple(p.frame for p in planes),
        (*first.size, len(planes)),
        first.dtype,
        None,
        None,
        flaw,
    )
    if flaw:
        return series
    step = normal * first.thickness
    if len(planes) > 1:
        step = np.subtract(planes[-1].position, first.position) / (len(planes) - 1)
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.axes[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.axes[3:]) * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, first.position
    spacing = (first.spacing[1], first.spacing[0], float(np.linalg.norm(step)))
    return replace(series, spacing_mm=spacing, affine=tuple(map(tuple, affine.tolist())))


def _unlike(planes: Sequence[_Plane]) -> str:
    """What keeps slices from being of one stack, whatever their places; '' where nothing does."""
    first = planes[0]
    if 1 < len({p.path for p in planes}) < len(planes):
        return "is spread over several multi-frame files: give one of them"
    if any(p.size != first.size or p.dtype != first.dtype for p in planes):
        return "has slices of different sizes or types (a scout among them?): keep those of one scan"
    if not all(np.allclose(p.axes, first.axes, atol=_COPLANAR) for p in planes):
        return "has slices of different orientations (a scout among them?): keep those of one scan"
    if not all(np.allclose(p.spacing, first.spacing, rtol=1e-3) for p in planes):
        return "has slices of different pixel spacings: keep those of one scan"
    return ""


def _uneven(positions: np.ndarray, normal: np.ndarray) -> str:
    """What is wrong with the places (N, 3) of slices, in their order along the normal; '' where nothing is."""
    if len(positions) == 1:
        return ""
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if (same := int((gaps < max(1e-3, 0.01 * usual)).sum())) > 0:
        return f"has {same} slices at the place of another (several phases, or copies): keep one of each"
    if (gaps > 1.5 * usual).any():
        after = int(np.argmax(gaps > 1.5 * usual))
        return f"lacks slices after the {after + 1}. of {len(positions)} in order: copy all of the series"
    regular = np.linspace(heights[0], heights[-1], len(heights))
    if np.abs(heights - regular).max() > max(0.01 * usual, min(_PLACE_MM, 0.25 * usual)):
        return f"has slices {gaps.min():.3g} to {gaps.max():.3g} mm apart: resample it evenly"
    sideways = positions - positions[0] - np.outer(heights - heights[0], normal)
    shift, length = float(np.linalg.norm(sideways, axis=1).max()), float(heights[-1] - heights[0])
    if shift > max(2 * _PLACE_MM, _TILT * length):
        return f"has slices that shift sideways by {shift:.3g} mm (a tilted gantry): resample it upright"
    return ""


def read_header(source: Path, role: Role) -> Header:
    series = open_series(source)
    return Header(series.shape, 1, np.dtype(series.dtype), np.array(series.affine), "LPS", series)


def read_voxels(source: Path, role: Role, header: Header) -> np.ndarray:
    """(i, j, k, 1) float32 on the scale of RescaleSlope and RescaleIntercept, each slice by its own.

    MONOCHROME1, where small numbers are bright, is inverted over the stored range.
    """
    series: Series = header.own
    columns, rows, slices = series.shape
    voxels = np.empty((slices, rows, columns), np.float32)
    frames = list(series.frames)
    if len(series.files) == 1:
        voxels[:] = _values(series.files[0], (rows, columns))[frames]
    else:
        for number, file in enumerate(series.files):
            voxels[number] = _values(file, (rows, columns))[0]
    return voxels.transpose(2, 1, 0)[..., None]


def _values(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """(F, *shape) float64: the frames of one file, rescaled."""
    with reading(path, private=True):
        data = pydicom.dcmread(path, specific_tags=[*_TAGS, "PixelData"])
        holders = [data]
        if "PerFrameFunctionalGroupsSequence" in data:
            name = "PixelValueTransformationSequence"
            shared = data.get("SharedFunctionalGroupsSequence") or [Dataset()]
            holders = [own if name in own else shared[0] for own in data.PerFrameFunctionalGroupsSequence]
            holders = [holder[name][0] if name in holder else data for holder in holders]
        slope = np.array([float(h.get("RescaleSlope", 1)) for h in holders])[:, None, None]
        intercept = np.array([float(h.get("RescaleIntercept", 0)) for h in holders])[:, None, None]
        syntax = data.file_meta.TransferSyntaxUID
        if not get_decoder(syntax).is_available:  # lossless JPEG, for which no free codec comes along
            raise UserError(f"{path} is packed as {syntax.name}: unpack it (gdcmconv --raw) or pip install python-gdcm")
        stored = data.pixel_array.reshape(len(holders), *shape)
        if data.get("PhotometricInterpretation") == "MONOCHROME1":
            highest = -1 if int(data.PixelRepresentation) else 2 ** int(data.BitsStored) - 1
            stored = highest - stored.astype(int)
        return stored * slope + intercept


# -------------------------------------------------------------------- segmentations


def write_segmentation(mask: np.ndarray, series: Series, names: Mapping[str, int], path: Path) -> None:
    """A DICOM SEG of (i, j, k) label numbers, which refers to the images of `series` slice by slice.

    BINARY; one segment, made by AUTOMATIC means, for each of `names` (name → label number) in the order of their
    numbers, whether or not the mask has it. By its nature it names the patient and the study it belongs to.
    """
    import highdicom as hd  # seconds to import, and only this needs it
    from pydicom.sr.codedict import codes

    order = sorted((number, name) for name, number in names.items() if number)
    segment_of = np.zeros(1 + max([int(mask.max(initial=0)), *(number for number, _ in order)]), np.uint16)
    segment_of[[number for number, _ in order]] = np.arange(1, len(order) + 1)
    if set(np.unique(mask).tolist()) - {0} - {number for number, _ in order}:
        raise ValueError("the mask has label numbers that `names` does not name")
    planes = np.empty((mask.shape[2], mask.shape[1], mask.shape[0]), np.uint16)
    of_files = len(series.files) > 1
    planes[np.arange(len(planes)) if of_files else list(series.frames)] = segment_of[mask].transpose(2, 1, 0)

    algorithm = hd.AlgorithmIdentificationSequence(
        name="cheaplunch", version=cheaplunch.__version__, family=codes.DCM.ArtificialIntelligence
    )
    segments = []
    for segment, (number, name) in enumerate(order, start=1):
        described = hd.seg.SegmentDescription(
            segment_number=segment,
            segment_label=name[:_LONGEST_LABEL],
            segmented_property_category=codes.SCT.Tissue,  # what a name means is not known here
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        described.SegmentDescription = _OUR_NUMBER.format(number)
        segments.append(described)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            segmentation = hd.seg.Segmentation(
                source_images=[pydicom.dcmread(file, stop_before_pixels=True) for file in series.files],
                pixel_array=planes,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=hd.UID(),
                series_number=100,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="cheaplunch",
                manufacturer_model_name="cheaplunch",
                software_versions=cheaplunch.__version__,
                device_serial_number="none",
                series_description="cheaplunch",
            )
            segmentation.save_as(path)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: the images lack what a DICOM SEG takes over from them (their frame of reference or study, "
            "for instance); write the mask as .nii.gz"
        ) from None


def read_segmentation(
    path: Path, shape: tuple[int, ...], affine: np.ndarray, names: Mapping[str, int] | None
) -> np.ndarray:
    """A SEG's label numbers, int32, on the grid of `shape` (i, j, k) and `affine` → mm, patient coordinates.

    Every frame goes where its own place says, so that frames may come in any order and empty ones may lack.
    A segment's number is the one `names` has for its label; without `names`, ours beside it, else its own.
    UserError where frames lie off the grid, segments overlap or `names` lacks one.
    """
    with reading(path, private=True):
        data = pydicom.dcmread(path, specific_tags=[*_TAGS, "PixelData"])
        if data.SegmentationType == "FRACTIONAL":
            raise UserError(f"{path} is a fractional SEG: export it as binary segments")
        size = (int(data.NumberOfFrames), int(data.Rows), int(data.Columns))
        _check_size(path, data, size[0])
        if len(data.PerFrameFunctionalGroupsSequence) != size[0]:
            raise UserError(f"{path} is cut off or damaged, copy it again (frames without places)")
        numbers = {int(s.SegmentNumber): _number(path, s, names) for s in data.SegmentSequence}
        blank = _Plane(path, 0, "SEG", (size[2], size[1]), "u1")
        label = np.zeros(shape, np.int32)
        for own, frame in zip(data.PerFrameFunctionalGroupsSequence, data.pixel_array.reshape(size), strict=True):
            here = np.nonzero(frame)  # rows, columns
            if not here[0].size:
                continue
            if data.SegmentationType == "LABELMAP":
                values = np.array([numbers[int(v)] for v in frame[here]], np.int32)
            else:
                identity = _group(data, own, "SegmentIdentificationSequence")
                values = np.full(here[0].shape, numbers[int(identity.ReferencedSegmentNumber)], np.int32)
            where = _indices(_placed(blank, *_groups(data, own)), here, shape, affine)
            if where is None:
                raise UserError(f"{path} lies off the image's voxels: export it on the image's grid")
            if ((label[where] != 0) & (label[where] != values)).any():
                raise UserError(f"{path} has segments that overlap: give each voxel to one of them")
            label[where] = values
    return label


def _number(path: Path, segment: Dataset, names: Mapping[str, int] | None) -> int:
    label = str(segment.SegmentLabel)
    if names is not None:
        numbers = {name[:_LONGEST_LABEL]: number for name, number in names.items()}
        if label not in numbers:
            raise UserError(f"{path} has a segment {label!r} that the data set does not name: add it to its labels")
        return numbers[label]
    ours = re.fullmatch(_OUR_NUMBER.format(r"(\d+)"), str(segment.get("SegmentDescription", "")))
    return int(ours[1]) if ours else int(segment.SegmentNumber)


def _indices(
    plane: _Plane, pixels: tuple[np.ndarray, ...], shape: tuple[int, ...], affine: np.ndarray
) -> tuple[np.ndarray, ...] | None:
    """Where pixels (rows, columns) of a slice lie in a grid, an index of it; None where one lies between or outside."""
    if plane.flaw:
        return None
    inverse = np.linalg.inv(affine)
    along = inverse[:3, :3] @ np.array(plane.axes).reshape(2, 3).T  # voxels a mm along a row, along a column
    along = along * np.array(plane.spacing)[::-1]  # a pixel
    start = inverse @ [*plane.position, 1]
    exact = start[:3, None] + along[:, :1] * pixels[1] + along[:, 1:] * pixels[0]  # (3, P)
    nearest = np.rint(exact).astype(int)
    off_mm = np.linalg.norm(affine[:3, :3] @ (exact - nearest), axis=0)
    limit = np.array(shape)[:, None]
    if off_mm.max() > 2 * _PLACE_MM or np.abs(exact - nearest).max() > 0.25:
        return None
    if not ((nearest >= 0) & (nearest < limit)).all():
        return None
    return tuple(nearest)
