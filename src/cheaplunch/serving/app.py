"""The routes of the page and of scripts (docs/serve.md), put together with those of other viewers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import nibabel as nib
import numpy as np
import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from matplotlib.colors import to_hex
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from cheaplunch import __version__
from cheaplunch.data.volume import NOWHERE, Volume
from cheaplunch.errors import UserError
from cheaplunch.figures import class_colours
from cheaplunch.interactive import Mark
from cheaplunch.serving import monailabel, nninteractive, uploads
from cheaplunch.serving.access import Access, Guard, refuse
from cheaplunch.serving.opened import (
    Busy,
    Loaded,
    NotOpen,
    Opened,
    Served,
    TooLarge,
    on_voxels,
    slice_axis,
    steadied_slices,
)

STATIC = Path(__file__).parent / "static"
_STATUS: dict[type[UserError], int] = {NotOpen: 404, TooLarge: 413, Busy: 503}
_EXPIRY_S = 60  # between two looks at what is unused
_SUFFIX = {"nii.gz": ".nii.gz", "nrrd": ".nrrd", "dcm": ".dcm"}


def build_app(served: Served, access: Access, labels: Path) -> FastAPI:
    """The server; what is open is closed when it ends. `labels` is where labels that are submitted are kept."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_expire(served))
        yield
        task.cancel()
        served.close_all()

    app = FastAPI(
        title="cheaplunch",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.include_router(router(served))
    app.include_router(monailabel.router(served, labels, access.token))
    app.include_router(nninteractive.router(served))
    app.mount("/static", StaticFiles(directory=STATIC))
    app.add_api_route("/", lambda: FileResponse(STATIC / "index.html"), include_in_schema=False)
    app.add_middleware(Guard, access=access, upload_bytes=served.limits.upload_bytes)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Content-Disposition"],
        )

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return refuse(served.public(str(error)), _STATUS.get(type(error), 400))

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(_first_flaw(error.errors()), 422)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return refuse(str(error.detail), error.status_code)

    @app.exception_handler(MemoryError)
    @app.exception_handler(torch.OutOfMemoryError)
    async def full(_: Request, error: Exception) -> JSONResponse:
        return refuse("there is not enough memory for this; close other images", 503)

    return app


async def _expire(served: Served) -> None:
    while True:
        await asyncio.sleep(_EXPIRY_S)
        served.close_idle()


# --- what is asked ---------------------------------------------------------------------------------------------------

Voxel = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
"""(i, j, k) of image.nii.gz; of pictures (x, y, page)."""


class Point(BaseModel):
    """A click."""

    model_config = ConfigDict(extra="forbid")
    class_name: str = Field(alias="class")
    kind: Literal["point"]
    voxel: Voxel
    positive: bool = True


class Rectangle(BaseModel):
    """A box by two opposite voxels that belong to it."""

    model_config = ConfigDict(extra="forbid")
    class_name: str = Field(alias="class")
    kind: Literal["box"]
    voxel: tuple[Voxel, Voxel]


class Prompted(BaseModel):
    """All prompts on an image, and whether what they find is carried on: not, to the end, or so many slices."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[Annotated[Point | Rectangle, Field(discriminator="kind")]] = Field(max_length=10_000)
    propagate: bool | Annotated[int, Field(ge=1)] | None = None

    @property
    def marks(self) -> list[Mark]:
        return [
            Mark(said.class_name, "voxel", (said.voxel,), said.positive, f"prompt {number}")
            if isinstance(said, Point)
            else Mark(said.class_name, "voxel", said.voxel, source=f"prompt {number}")
            for number, said in enumerate(self.prompts, start=1)
        ]


class Question(Prompted):
    slices: list[int] | None = Field(None, max_length=10_000)
    """Voxel indices along the image's slice axis, where the whole is not wanted."""


class Wanted(Prompted):
    format: Literal["nii.gz", "nrrd", "dcm", "same"] = "nii.gz"


class CaseToOpen(BaseModel):
    model_config = ConfigDict(extra="forbid")
    case: str


# --- routes ----------------------------------------------------------------------------------------------------------


def router(served: Served) -> APIRouter:
    """What the page uses, under /api."""
    api = APIRouter(prefix="/api")

    @api.get("/model")
    def model() -> dict[str, Any]:
        return _about(served)

    @api.get("/cases")
    def cases() -> dict[str, Any]:
        return {"cases": [{"id": case_id, "name": image.name} for case_id, image in served.cases.items()]}

    @api.post("/open")
    async def open_image(request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with request.form(max_files=uploads.MOST_FILES, max_fields=10) as form:
                sent = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                files = [(file.filename or "", file.file) for file in sent]
                opened = await served.read(uploads.open_upload, served, files)
        else:
            try:
                wanted = CaseToOpen.model_validate_json(await request.body())
            except ValueError:
                raise UserError(
                    'send {"case": ID} as JSON, or files as multipart/form-data in the field "files"'
                ) from None
            opened = await served.read(served.open_case, wanted.case)
        return _description(served.current, opened)

    @api.get("/open/{open_id}/image.nii.gz")
    async def image(open_id: str) -> Response:
        packed = await served.read(viewer_file, served.find(open_id).image.volume)
        return Response(packed, media_type="application/gzip")

    @api.post("/open/{open_id}/segment")
    async def segment(open_id: str, question: Question) -> JSONResponse:
        return await served.compute(_answer, served, served.find(open_id), question)

    @api.post("/open/{open_id}/save")
    async def save(open_id: str, wanted: Wanted) -> Response:
        opened = served.find(open_id)
        suffix = _SUFFIX.get(wanted.format) or own_suffix(opened)
        mask = await served.compute(served.mask, opened, wanted.marks, wanted.propagate or False, suffix)
        name = quote(f"{opened.name.split('/')[-1]}{suffix}", safe="")
        return Response(
            mask,
            media_type="application/octet-stream",
            headers={"Content-Disposition": f"attachment; filename*=UTF-8''{name}"},
        )

    @api.delete("/open/{open_id}")
    def close(open_id: str) -> dict[str, Any]:
        served.close(open_id)
        return {}

    return api


def _about(served: Served) -> dict[str, Any]:
    loaded = served.current
    model, of_network = loaded.model, loaded.config.model
    colours = [to_hex(colour) for colour in class_colours(len(model.labels))]
    return {
        "method": loaded.config.method,
        "backbone": of_network.backbone,
        "classes": [
            {"name": name, "number": number, "color": colour}
            for (name, number), colour in zip(model.labels.items(), colours, strict=True)
        ],
        "prompted": model.prompted,
        "boxes_only": loaded.boxes_only,
        "axis": model.axis,
        "channels": model.channels,
        "cases": served.data is not None,
        "limits": {"upload_bytes": served.limits.upload_bytes},
        "version": __version__,
    }


def _description(loaded: Loaded, opened: Opened) -> dict[str, Any]:
    volume, case = opened.image.volume, opened.image.case(loaded)
    count, height, width = case.shape
    return {
        "open": opened.id,
        "name": opened.name,
        "slices": count,
        "height": height,
        "width": width,
        "axis": case.axis,
        "slice_axis": slice_axis(case),
        "reach": steadied_slices(case),
        "shape": list(on_voxels(volume.array[0], volume.grid).shape),
        "unit": volume.unit,
        "channels": len(volume.array),
        "formats": [name for name, suffix in _SUFFIX.items() if suffix in volume.grid.mask_suffixes] + ["same"],
    }


def _answer(served: Served, opened: Opened, question: Question) -> JSONResponse:
    answered = served.segment(opened, question.marks, question.propagate or False, question.slices)
    volume = opened.image.volume
    voxels = on_voxels(answered.label, volume.grid)
    if question.slices is not None:
        axis = answered.slice_axis
        parts = [{"slice": index, "axis": axis, **_packed(voxels.take(index, axis))} for index in question.slices]
        return JSONResponse({"parts": parts})
    counts = answered.voxels
    classes = {name: {"quality": answered.quality.get(name), "voxels": counts[name]} for name in counts}
    return JSONResponse({"classes": classes, **_packed(voxels)})


def _packed(label: np.ndarray) -> dict[str, Any]:
    """A label map for JSON: its first axis runs fastest."""
    return {
        "shape": list(label.shape),
        "mask": base64.b64encode(zlib.compress(label.astype(np.uint8).tobytes(order="F"), 1)).decode(),
    }


def own_suffix(opened: Opened) -> str:
    """The ending of a mask as the image has it; a NIfTI's mask is packed."""
    suffix = opened.image.volume.grid.mask_suffix
    return ".nii.gz" if suffix == ".nii" else suffix


def viewer_file(volume: Volume) -> bytes:
    """A .nii.gz on the image's own voxels: its first channel, or its colours; pictures have a place of 1 mm a pixel."""
    colours = volume.grid.dtype == np.uint8 and len(volume.array) == 3
    channels = [on_voxels(channel, volume.grid) for channel in (volume.array if colours else volume.array[:1])]
    if max(channels[0].shape) > np.iinfo(np.int16).max:
        raise UserError("the image is too long for the viewer; cut it up")
    if colours:
        voxels = np.empty(channels[0].shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
        for name, channel in zip("RGB", channels, strict=True):
            voxels[name] = channel
    else:
        [voxels] = channels
        if (kind := _integers(volume)) is not None:
            voxels = voxels.astype(kind)
    affine = NOWHERE if volume.grid.affine is None else volume.grid.affine
    return gzip.compress(nib.Nifti1Image(voxels, affine).to_bytes(), 1)


def _integers(volume: Volume) -> np.dtype | None:
    """A type of two bytes at most that holds the first channel as it is; None where that needs fractions."""
    low, high = volume.array[0].min(), volume.array[0].max()
    for kind in (np.uint8, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind) if np.array_equal(volume.array[0], volume.array[0].astype(kind)) else None
    return None


def _first_flaw(errors: Any) -> str:
    """The first of what pydantic found, as 'prompts.0.voxel: Field required'; what was sent is not quoted."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "point", "box"))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
