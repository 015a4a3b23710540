"""What a server has: the model that answers, the images that are open, and bounds to both.

Whoever opens an image gets an id that nobody can guess, and with it alone the image. Images of `--data` are shared
beneath the ids, and so are their embeddings and answers: these follow from the image and the prompts alone.
"""

from __future__ import annotations

import functools
import math
import re
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from anyio import CapacityLimiter, to_thread

from cheaplunch.config import RunConfig
from cheaplunch.data.slices import slice_step_mm
from cheaplunch.data.volume import Grid, Volume, read_grid, read_volume, write_mask
from cheaplunch.errors import UserError
from cheaplunch.interactive import AnswerCache, EmbeddingCache, Mark, Model, OpenCase, open_model, quality_of
from cheaplunch.merging import slice_weights
from cheaplunch.models.backbones import get_backbone
from cheaplunch.predicting import Image, find_images
from cheaplunch.runs import RunFolder
from cheaplunch.serving.scratch import own_folder

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_BYTES_A_VOXEL = 8  # as it is and as the network sees it, float32 each
_QUEUE = 256  # questions that wait; more are turned away
_READERS = 2  # images read or packed at a time: each takes several times its size


class NotOpen(UserError):
    """An id under which nothing is open."""


class TooLarge(UserError):
    """An image beyond what the server takes."""


class Busy(UserError):
    """More is asked at a time than is worth queueing."""


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Loaded:
    """A run that is ready to answer, with what it says of itself."""

    run: RunFolder
    config: RunConfig
    model: Model

    @property
    def boxes_only(self) -> bool:
        """Whether the network knows no points."""
        network = self.config.model
        untaught = network.tuning == "none" and get_backbone(network.backbone).prompts == "boxes only"
        return untaught or network.training_prompts == "box"


def load(run: RunFolder, config: RunConfig) -> Loaded:
    """UserError as of `open_model`."""
    return Loaded(run, config, open_model(run, config))


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answered:
    """What was found, merged to one label map."""

    label: np.ndarray
    """(Z, Y, X) uint8 on the volume's array."""
    labels: dict[str, int]
    """Class → its number."""
    quality: dict[str, float | None]
    """As `predictions.jsonl` has it; empty for methods that take no prompts."""
    slice_axis: int
    """Along which of i, j, k slices were counted."""

    @property
    def voxels(self) -> dict[str, int]:
        return {name: int(np.count_nonzero(self.label == number)) for name, number in self.labels.items()}


class OpenImage:
    """A volume or picture in memory, cut into slices for the model that is asked."""

    def __init__(self, volume: Volume, embeddings: EmbeddingCache, answers: AnswerCache, folder: Path | None = None):
        """`folder` holds its files, and goes away when nobody has a use for the image any more."""
        self.volume = volume
        self._embeddings, self._answers = embeddings, answers
        self._lock = threading.Lock()
        self._made: tuple[Loaded, OpenCase] | None = None
        self._unprompted: tuple[Loaded, np.ndarray] | None = None
        self._unprompted_lock = threading.Lock()
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def bytes(self) -> int:
        return self.volume.array.size * _BYTES_A_VOXEL

    def case(self, loaded: Loaded) -> OpenCase:
        """The image as `loaded` sees it; another model's slices and embeddings are dropped for it."""
        with self._lock:
            if self._made is None or self._made[0] is not loaded:
                case = loaded.model.open_volume(self.volume, self._embeddings, self._answers)
                self._drop()
                self._made = loaded, case
            return self._made[1]

    def unprompted(self, loaded: Loaded) -> np.ndarray:
        """The label map of a model that takes no prompts; found once."""
        with self._unprompted_lock:
            if self._unprompted is None or self._unprompted[0] is not loaded:
                label = self.case(loaded).label_unprompted(list(loaded.model.labels.values()))
                self._unprompted = loaded, label
            return self._unprompted[1]

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._made is not None:
            self._made[1].close()
            self._made = None


@dataclass(eq=False)
class Opened:
    """An image as one user has it open."""

    id: str
    name: str
    image: OpenImage
    used_s: float = field(default_factory=time.monotonic)
    """When it was last asked for."""


@dataclass(frozen=True)
class Limits:
    """How much a server takes on."""

    upload_bytes: int = 2**30
    """Of one request."""
    images: int = 64
    """Open at a time; the one that was unused the longest is closed for another."""
    image_bytes: int = 4 * 2**30
    """Of all that are open, in memory."""
    cache_bytes: int = 2**30
    """Of embeddings, those of 256 slices at LiteMedSAM's 256 px."""
    answer_bytes: int = 2**27
    """Of answers that are kept, so that a further click costs only itself."""
    idle_s: float = 3600
    """Images unused for so long are closed."""
    workers: int = 2
    """Questions that are computed at a time."""

    def __post_init__(self):
        for flag, value in (
            ("max-upload-mb", self.upload_bytes),
            ("max-open", self.images),
            ("memory-mb", self.image_bytes),
        ):
            if value < 1:
                raise UserError(f"--{flag} has to be 1 or more")


class Served:
    """The model and what is open on it. Threads may share it."""

    def __init__(self, loaded: Loaded, data: Path | None = None, limits: Limits | None = None):
        """UserError where `data` has no images. `unreadable` says of each image there that cannot be read why."""
        self.limits = limits or Limits()
        self.data = data
        self._scratch, remove = own_folder()
        self._cleared = weakref.finalize(self, remove)  # also where the process ends without `close_all`
        images, self.unreadable = (
            ([], []) if data is None else find_images([data], loaded.model.channels, self._scratch)
        )
        self.cases: dict[str, Image] = {image.name: image for image in images}
        self._loaded = loaded
        self._caches = EmbeddingCache(self.limits.cache_bytes), AnswerCache(self.limits.answer_bytes)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Opened] = OrderedDict()  # in the order of their last use
        self._shared: weakref.WeakValueDictionary[str, OpenImage] = weakref.WeakValueDictionary()
        self._asking, self._reading = CapacityLimiter(self.limits.workers), CapacityLimiter(_READERS)

    # the model

    @property
    def current(self) -> Loaded:
        """The model of now; a question keeps the one that it began with."""
        return self._loaded

    def swap(self, loaded: Loaded) -> None:
        """Another model answers from now on; open images stay open."""
        self._loaded = loaded

    # what is open

    def open_case(self, case_id: str) -> Opened:
        """An image of `data`. UserError where there is none of that id, or it cannot be read."""
        if case_id not in self.cases:
            raise NotOpen(f"there is no case {case_id[:80]!r}; ask for one that is listed")
        image = self._shared.get(case_id)
        if image is None:
            read = OpenImage(self._read(self.cases[case_id].sources), *self._caches)
            image = self._shared.setdefault(case_id, read)
        return self._add(case_id, image)

    def open_files(self, sources: Sequence[Path], name: str, folder: Path | None = None) -> Opened:
        """An image from files, one source a channel; `folder`, if it is given, is removed once the image is closed.

        UserError where they are damaged or not of the kind the run learned from, TooLarge.
        """
        try:
            image = OpenImage(self._read(sources), *self._caches, folder)
        except BaseException:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return self._add(name, image)

    def find(self, open_id: str) -> Opened:
        """NotOpen where it is closed, or never was open."""
        with self._lock:
            opened = self._open.get(open_id)
            if opened is None:
                raise NotOpen("this image is no longer open; open it again")
            opened.used_s = time.monotonic()
            self._open.move_to_end(open_id)
            return opened

    def close(self, open_id: str) -> None:
        """NotOpen where it is closed already."""
        self.find(open_id)
        with self._lock:
            self._close(open_id)

    def close_idle(self) -> None:
        """Closes what was not used for long."""
        with self._lock:
            before_s = time.monotonic() - self.limits.idle_s
            for open_id in [opened.id for opened in self._open.values() if opened.used_s < before_s]:
                self._close(open_id)

    def close_all(self) -> None:
        """Removes every file that it has written."""
        with self._lock:
            for open_id in list(self._open):
                self._close(open_id)
        self._cleared()

    def new_folder(self) -> Path:
        """For files of one upload; it can be read by this user alone."""
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def public(self, message: str) -> str:
        """A message without the places of files."""
        message = re.sub(rf"{re.escape(str(self._scratch))}/[^/\s]+/?", "", message)
        return message if self.data is None else message.replace(f"{self.data}/", "")

    def _read(self, sources: Sequence[Path]) -> Volume:
        needed = math.prod(read_grid(sources).array_shape) * _BYTES_A_VOXEL
        if needed > self.limits.image_bytes:
            needed_mib, all_mib = needed / 2**20, self.limits.image_bytes / 2**20
            raise TooLarge(
                f"the image takes {needed_mib:.0f} MiB of memory, and this server has {all_mib:.0f} for all; "
                "cut it up, or start the server with more --memory-mb"
            )
        return read_volume(sources)

    def _add(self, name: str, image: OpenImage) -> Opened:
        image.case(self.current)  # that it is of the kind the run learned from
        opened = Opened(secrets.token_urlsafe(24), name, image)
        with self._lock:
            self._open[opened.id] = opened
            while len(self._open) > self.limits.images or self.open_bytes > self.limits.image_bytes:
                self._close(next(iter(self._open)))
        return opened

    @property
    def open_bytes(self) -> int:
        return sum(image.bytes for image in {opened.image for opened in self._open.values()})

    def _close(self, open_id: str) -> None:
        image = self._open.pop(open_id).image
        if all(opened.image is not image for opened in self._open.values()):
            image.close()

    # what is asked

    def segment(
        self,
        opened: Opened,
        marks: Sequence[Mark],
        propagate: bool | int = False,
        voxel_slices: Collection[int] | None = None,
    ) -> Answered:
        """What `predict` finds with the same prompts, voxel for voxel.

        `propagate` may say how many slices far. With `voxel_slices`, indices along the `slice_axis` of the image, only
        these slices of the label map are right, and no more is computed than they depend on. UserError for a mark that
        is nowhere.
        """
        loaded, image = self.current, opened.image
        case, labels = image.case(loaded), dict(loaded.model.labels)
        if not loaded.model.prompted:
            return Answered(image.unprompted(loaded), labels, {}, slice_axis(case))
        prompts = [case.place(mark, labels) for mark in marks]
        wanted = range(case.shape[0])
        if voxel_slices is not None:
            reach = steadied_slices(case)
            own = [slice_of_voxel(case, index) for index in voxel_slices]
            wanted = {near for number in own for near in range(number - reach, number + reach + 1)}
        answers = case.segment([p for p in prompts if propagate or p.slice_number in wanted])
        if propagate:
            answers = case.propagate(prompts, answers, None if propagate is True else propagate)
        answers = {number: answer for number, answer in answers.items() if number in wanted}
        return Answered(case.label(answers), labels, quality_of(answers, labels), slice_axis(case))

    def mask(self, opened: Opened, marks: Sequence[Mark], propagate: bool | int, suffix: str) -> bytes:
        """The file that `predict` would write, of one of `Grid.mask_suffixes`. UserError for any other."""
        grid = opened.image.volume.grid
        if suffix not in grid.mask_suffixes:
            raise UserError(f"{suffix} cannot hold a mask of this image; choose of: {', '.join(grid.mask_suffixes)}")
        answered = self.segment(opened, marks, propagate)
        folder = self.new_folder()
        try:
            path = folder / f"mask{suffix}"
            write_mask(answered.label, opened.image.volume, path, answered.labels)
            return path.read_bytes()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # where it is done

    async def compute(
        self, function: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
    ) -> Result:
        """Runs what asks the network in a worker thread, no more of them at a time than `limits` says. Busy."""
        if self._asking.statistics().tasks_waiting >= _QUEUE:
            raise Busy("the server has too much to do at the moment; try again")
        return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=self._asking)

    async def read(
        self, function: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
    ) -> Result:
        """Runs what reads, checks or packs files in a worker thread."""
        return await to_thread.run_sync(functools.partial(function, *arguments, **named), limiter=self._reading)


# --- the image's own voxels ------------------------------------------------------------------------------------------


def steadied_slices(case: OpenCase) -> int:
    """How many slices away an answer still counts, where slices of a volume steady each other."""
    return max(slice_weights(slice_step_mm(case.volume, case.axis), case.predictor.smooth_mm))


def on_voxels(array: np.ndarray, grid: Grid) -> np.ndarray:
    """(Z, Y, X) of a volume's array → (I, J, K), the voxels of its file, a view; of pictures (X, Y, page)."""
    turn = grid.voxels_from_array[:3, :3]  # of each row one number, 1 or −1, is not 0
    sources = np.abs(turn).argmax(axis=1)
    flips = tuple(slice(None, None, int(turn[i, source])) for i, source in enumerate(sources))
    return array.transpose(2, 1, 0).transpose(sources)[flips]


def slice_axis(case: OpenCase) -> int:
    """Along which of i, j, k slices are counted."""
    return int(np.abs(case.places.affine("voxel")[:3, 2]).argmax())


def slice_of_voxel(case: OpenCase, index: int) -> int:
    """The number of the slice whose voxels have `index` along `slice_axis`. UserError where there is none."""
    voxel = [0, 0, 0]
    voxel[slice_axis(case)] = index
    number = round(case.places.on_slices(voxel, "voxel")[2])
    if not 0 <= number < case.shape[0]:
        raise UserError(f"slices: there is no slice {index} of {case.shape[0]}")
    return number
