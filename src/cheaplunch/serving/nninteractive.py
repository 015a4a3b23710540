"""The routes by which nnInteractive's plugins (of 3D Slicer, of Napari) use the server.

Written to what `nninteractive-client` 2.6.0 sends and reads. Its images are bare arrays and its objects have no class;
the address that a client is given says what is missing: `/nninteractive/CLASS/SPL`, the class that is clicked on and
where the array's axes run. docs/slicer.md tells users.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, FiniteFloat, Json
from starlette.exceptions import HTTPException

from cheaplunch import __version__
from cheaplunch.data.formats import write_nifti
from cheaplunch.errors import UserError
from cheaplunch.interactive import Mark
from cheaplunch.serving.opened import NotOpen, Opened, Served, on_voxels, slice_axis
from cheaplunch.serving.packed_arrays import pack, unpack

_SILENCE_S = 120.0  # after which a client is taken for gone; it sends a heartbeat in half of that
_MOST_PROMPTS = 10_000
_LONGEST = np.iinfo(np.int16).max  # axis of a NIfTI
_WORLD = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}  # axis and sign in RAS

# --- what is sent ----------------------------------------------------------------------------------------------------

Side = tuple[FiniteFloat, FiniteFloat]
Token = Annotated[str, Header(alias="X-Lease-Token")]


class Properties(BaseModel):
    spacing: list[Annotated[float, Field(gt=1e-4, lt=1e4)]] = Field(default=[1, 1, 1], min_length=2, max_length=3)
    """mm, of the array's last axes; of a picture two."""


class AboutImage(BaseModel):
    image_properties: Properties = Properties()


class Said(BaseModel):
    include_interaction: bool
    run_prediction: bool = True


class Point(Said):
    coordinates: tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class Box(Said):
    bbox_coords: tuple[Side, Side, Side]
    """Along each axis the first voxel and the one after the last."""


class Zoom(BaseModel):
    do_autozoom: bool


# --- who is there ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Lease:
    """One client, what it has sent and what it has been shown."""

    class_name: str
    towards: str
    image: Opened | None = None
    mask: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint8))
    """(X, Y, Z), as the client has it."""
    marks: list[Mark] = field(default_factory=list)
    shown: int = 0
    """How many of the marks the mask has heeded."""
    propagate: bool = True
    active_s: float = field(default_factory=time.monotonic)
    seen_s: float = field(default_factory=time.monotonic)
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def opened(self) -> Opened:
        if self.image is None:
            raise UserError("there is no image yet; send one first")
        return self.image

    def clear(self, shape: Sequence[int]) -> None:
        self.marks, self.shown, self.mask = [], 0, np.zeros(shape, np.uint8)


class Leases:
    """Clients by what nobody can guess. Only the event loop's thread uses it."""

    def __init__(self, served: Served):
        self._served = served
        self._held: dict[str, Lease] = {}

    def claim(self, class_name: str | None, towards: str) -> str:
        """UserError for a class or directions that are none; HTTPException 503 where all places are taken."""
        model = self._served.current.model
        if not model.prompted:
            raise UserError("the run takes no prompts, and nnInteractive sends nothing else; use the page")
        class_name = next(iter(model.labels)) if class_name is None else class_name
        if class_name not in model.labels:
            raise UserError(f"there is no class {class_name[:80]!r}; choose of: {', '.join(model.labels)}")
        if len(towards) != 3 or {_WORLD[letter][0] for letter in towards if letter in _WORLD} != {0, 1, 2}:
            raise UserError(
                f"where do the axes run? {towards[:80]!r} has to have one each of LR, PA and SI, as SPL has"
            )
        self._drop_expired()
        if len(self._held) >= self._served.limits.images:
            raise HTTPException(503, "all places are taken; try again")
        token = secrets.token_urlsafe(24)
        self._held[token] = Lease(class_name, towards)
        return token

    def find(self, token: str, active: bool = True) -> Lease:
        """HTTPException 410 where it is over: unused for long, its client gone, or its image closed for another."""
        self._drop_expired()
        lease = self._held.get(token)
        try:
            if lease is None:
                raise NotOpen
            if active and lease.image is not None:
                self._served.find(lease.image.id)
        except NotOpen:
            self.release(token)
            raise HTTPException(410, "this session is over; connect again") from None
        lease.seen_s = time.monotonic()
        lease.active_s = lease.seen_s if active else lease.active_s
        return lease

    @contextlib.asynccontextmanager
    async def use(self, token: str) -> AsyncIterator[Lease]:
        """As `find`, for one request after the other."""
        lease = self.find(token)
        async with lease.busy:
            yield lease

    def release(self, token: str) -> None:
        if (lease := self._held.pop(token, None)) is not None:
            self.close_image(lease)

    def close_image(self, lease: Lease) -> None:
        if lease.image is not None:
            with contextlib.suppress(NotOpen):
                self._served.close(lease.image.id)

    def left_s(self, lease: Lease) -> float:
        return max(0.0, lease.active_s + self._served.limits.idle_s - time.monotonic())

    def _drop_expired(self) -> None:
        silent_s = time.monotonic() - _SILENCE_S
        for token in [t for t, lease in self._held.items() if lease.seen_s < silent_s or not self.left_s(lease)]:
            self.release(token)


# --- images and masks ------------------------------------------------------------------------------------------------


def open_array(served: Served, folder: Path, towards: str, spacing_mm: Sequence[float]) -> Opened:
    """The packed array (C, X, Y, Z) in `folder`, as an image whose voxels (i, j, k) are (x, y, z)."""
    packed = folder / "packed"
    array = unpack(packed.read_bytes(), axes=4, limit_bytes=served.limits.image_bytes)
    packed.unlink()
    if max(array.shape) > _LONGEST:
        raise UserError(f"the image has {max(array.shape)} voxels along an axis; at most {_LONGEST} are taken")
    affine = np.diag([0.0, 0, 0, 1])
    for axis, (letter, step_mm) in enumerate(zip(towards, [1.0, *spacing_mm][-3:], strict=True)):
        world, sign = _WORLD[letter]
        affine[world, axis] = sign * step_mm
    voxels = np.moveaxis(array, 0, -1).astype(np.float32)
    write_nifti(voxels[..., 0] if len(array) == 1 else voxels, affine, None, folder / "image.nii")
    return served.open_files((folder / "image.nii",), "image", folder)


def mark_box(class_name: str, box: Box, shape: Sequence[int]) -> Mark:
    """Its first and last voxels, kept in the image."""
    sides = [
        [float(min(max(round(end), 0), length - 1)) for end in (low, high - 1)]
        for (low, high), length in zip(box.bbox_coords, shape, strict=True)
    ]
    first, last = zip(*sides, strict=True)
    return Mark(class_name, "voxel", (first, last), source="the box")


def find_mask(served: Served, lease: Lease, marks: Sequence[Mark]) -> np.ndarray:
    """(X, Y, Z) uint8, what `predict` finds. Of several boxes on a slice the last one counts."""
    across = slice_axis(lease.opened.image.case(served.current))
    boxes = {mark.corners[0][across]: mark for mark in marks if len(mark.corners) == 2}
    asked = [mark for mark in marks if len(mark.corners) == 1 or boxes[mark.corners[0][across]] is mark]
    answered = served.segment(lease.opened, asked, lease.propagate)
    found = answered.label == answered.labels[lease.class_name]
    return on_voxels(found, lease.opened.image.volume.grid).astype(np.uint8)


def say(ran: bool, before: np.ndarray | None = None, after: np.ndarray | None = None) -> Response:
    """Whether the network was asked, and what changed: a box, and the mask in it."""
    box, packed = None, b""
    if before is not None and after is not None and (changed := before != after).any():
        along = [np.flatnonzero(changed.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        box = [[int(places[0]), int(places[-1]) + 1] for places in along]
        packed = pack(after[tuple(slice(*side) for side in box)])
    about = json.dumps({"ran_prediction": ran, "bbox": box})
    return Response(packed, media_type="application/octet-stream", headers={"X-Meta": about})


# --- routes ----------------------------------------------------------------------------------------------------------


def router(served: Served) -> APIRouter:
    """Under /nninteractive, and the same with a class and with directions."""
    api, routes, leases = APIRouter(), APIRouter(), Leases(served)
    if importlib.util.find_spec("blosc2") is None:

        @api.api_route("/nninteractive/{path:path}", methods=["GET", "POST"])
        def missing() -> None:
            raise HTTPException(501, "nnInteractive's arrays need Blosc2: pip install 'cheaplunch[nninteractive]'")

        return api

    async def show(lease: Lease, marks: list[Mark]) -> Response:
        """Asks with `marks`, and keeps them where that goes well."""

        def ask() -> tuple[np.ndarray, Response]:
            mask = find_mask(served, lease, marks)
            return mask, say(True, lease.mask, mask)

        lease.mask, answer = await served.compute(ask)
        lease.marks, lease.shown = marks, len(marks)
        return answer

    async def add(lease: Lease, mark: Mark, run_prediction: bool) -> Response:
        if len(lease.marks) >= _MOST_PROMPTS:
            raise UserError(f"there are {_MOST_PROMPTS} prompts already; reset them")
        case, labels = lease.opened.image.case(served.current), served.current.model.labels
        case.place(mark, labels)  # now, so that one that lies nowhere is not kept for later
        if run_prediction:
            return await show(lease, [*lease.marks, mark])
        lease.marks.append(mark)
        return say(False)

    # who is there

    @routes.get("/healthz")
    def health() -> dict[str, bool]:
        return {"ok": True}

    @routes.post("/claim")
    async def claim(name: str | None = None, towards: str = "SPL") -> dict[str, Any]:
        token, idle_s = leases.claim(name, towards), served.limits.idle_s
        return {"lease_token": token, "idle_timeout_seconds": idle_s, "liveness_timeout_seconds": _SILENCE_S}

    @routes.get("/capabilities")
    def capabilities() -> dict[str, Any]:
        return {
            "supported_interactions": {"points": not served.current.boxes_only, "bbox2d": True},
            "supports_initial_label": False,
            "supports_zero_shot_label_refinement": False,
            "supports_undo": True,
            "inference_session_version": f"cheaplunch {__version__}",
            # Of nnInteractive's own network; clients read them all the same.
            "channel_mapping": {},
            "num_interaction_channels": 0,
            "preferred_scribble_thickness": [2, 2, 2],
            "interaction_decay": None,
        }

    @routes.post("/heartbeat")
    @routes.get("/lease_status")
    async def left(token: Token = "") -> dict[str, float]:
        left_s = leases.left_s(leases.find(token, active=False))
        return {"remaining_seconds": left_s, "idle_timeout_seconds": served.limits.idle_s}

    @routes.post("/release")
    async def release(token: Token = "") -> None:
        leases.release(token)

    # the image, and the mask that the client keeps

    @routes.post("/set_image")
    async def set_image(
        request: Request, about: Annotated[Json[AboutImage], Header(alias="X-Meta")], token: Token = ""
    ) -> dict[str, Any]:
        async with leases.use(token) as lease:
            folder, spacing_mm = served.new_folder(), about.image_properties.spacing
            try:
                with (folder / "packed").open("wb") as file:
                    async for part in request.stream():
                        file.write(part)
                opened = await served.read(open_array, served, folder, lease.towards, spacing_mm)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            leases.close_image(lease)
            lease.image, grid = opened, opened.image.volume.grid
            lease.clear(grid.shape)
            return {"original_image_shape": [grid.channels, *grid.shape]}

    @routes.post("/set_target_buffer")
    async def empty_mask(token: Token = "") -> None:
        async with leases.use(token) as lease:
            lease.mask = np.zeros_like(lease.mask)

    @routes.post("/reset_interactions")
    async def reset(token: Token = "") -> None:
        async with leases.use(token) as lease:
            lease.clear(lease.mask.shape)

    # prompts

    @routes.post("/set_do_autozoom")
    async def set_reach(zoom: Zoom, token: Token = "") -> None:
        async with leases.use(token) as lease:
            lease.propagate = zoom.do_autozoom

    @routes.post("/add_point_interaction")
    async def add_point(point: Point, token: Token = "") -> Response:
        async with leases.use(token) as lease:
            mark = Mark(lease.class_name, "voxel", (point.coordinates,), point.include_interaction, "the point")
            return await add(lease, mark, point.run_prediction)

    @routes.post("/add_bbox_interaction")
    async def add_box(box: Box, token: Token = "") -> Response:
        async with leases.use(token) as lease:
            if not box.include_interaction:
                raise UserError("a box cannot take away; place negative points")
            return await add(lease, mark_box(lease.class_name, box, lease.mask.shape), box.run_prediction)

    @routes.post("/add_scribble_interaction")
    @routes.post("/add_lasso_interaction")
    @routes.post("/add_initial_seg_interaction")
    def not_taken() -> None:
        raise UserError("scribbles, lassos and masks to start from are not taken; place points and boxes")

    @routes.post("/predict")
    async def predict(token: Token = "") -> Response:
        async with leases.use(token) as lease:
            return say(False) if lease.shown == len(lease.marks) else await show(lease, lease.marks)

    @routes.post("/undo")
    async def undo(token: Token = "") -> Response:
        async with leases.use(token) as lease:
            if not lease.marks:
                return say(False)
            if lease.shown == len(lease.marks):
                return await show(lease, lease.marks[:-1])
            lease.marks.pop()  # what nothing was asked of
            return say(True)

    for base in ("", "/{name}", "/{name}/{towards}"):
        api.include_router(routes, prefix=f"/nninteractive{base}")
    return api
