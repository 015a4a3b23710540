"""The routes by which clients of MONAI Label (3D Slicer's extension, the `monailabel` package) use the server.

Written to what these clients call and read (monailabel 0.8.5, its client and its 3D Slicer plugin); what they are told
is in monailabel_answers.py. docs/slicer.md tells users.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from fastapi import APIRouter, Body, File, Form, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from cheaplunch.config import override
from cheaplunch.errors import UserError
from cheaplunch.runs import RunFolder
from cheaplunch.serving import uploads
from cheaplunch.serving.datastore import Datastore, Tag
from cheaplunch.serving.monailabel_answers import (
    Found,
    Images,
    Json,
    about_datastore,
    about_server,
    about_task,
    download,
    find,
    mask_file,
    model_name,
    multipart,
)
from cheaplunch.serving.opened import NotOpen, Opened, Served, load
from cheaplunch.serving.strategies import STRATEGIES, next_image
from cheaplunch.serving.training_job import TrainingJobs, Wanted

Output = Literal["all", "image", "json", "dicom_seg"]
Params = Annotated[str, Form()]
Upload = Annotated[UploadFile, File()]
Said = Annotated[Json | None, Body()]


def router(served: Served, labels: Path, token: str | None) -> APIRouter:
    """`labels` is where what clients send is kept (datastore.py); `token` is what the server asks for, if it does.

    UserError where `labels` cannot be used.
    """
    datastore = Datastore(served.cases, served.data, labels, served.current.model.labels)
    images, rng = Images(served, datastore), np.random.default_rng()

    def take_over(run: RunFolder) -> None:
        """The new run answers, computed where the old one was."""
        here = served.current.config
        config = override(run.load_config(), {"device": here.device, "weights": here.model.weights})
        served.swap(load(run, config))

    jobs = TrainingJobs(served.current, datastore, take_over)
    name = model_name(jobs)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await served.read(jobs.stop)

    api = APIRouter(lifespan=lifespan)

    async def received(file: UploadFile, use: Callable[[Path], Any]) -> Any:
        """`use` of one uploaded file, which then goes away."""

        def run() -> Any:
            folder = served.new_folder()
            try:
                stored = uploads.store([_sent(file)], folder, served.limits.image_bytes)
                with uploads.called_as(stored.given, folder):
                    return use(stored.sources[0])
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        return await served.read(run)

    def checked_tag(tag: str) -> Tag:
        if tag not in ("final", "original"):
            raise NotOpen(f"there are no labels {tag!r}; labels are final or original")
        return tag

    # what there is

    @api.get("/info/")
    def info() -> Json:
        return about_server(served, datastore, jobs)

    @api.get("/logs/")
    def logs() -> PlainTextResponse:
        return PlainTextResponse("\n".join(jobs.last.lines() if jobs.last else ["nothing was trained yet"]) + "\n")

    # who may come in: 3D Slicer asks for a name and a password, and the password is the token

    @api.get("/auth/")
    def auth() -> Json:
        return {"enabled": token is not None}

    @api.post("/auth/token")
    def log_in(password: Annotated[str, Form()]) -> Json:
        if token is None or not hmac.compare_digest(password.encode(), token.encode()):
            raise HTTPException(401, "the password is the token that the server printed when it was started")
        return {"access_token": token, "token_type": "Bearer"}

    @api.get("/auth/token/valid")
    def logged_in() -> Json:
        return {}

    # images of a client's own, for as long as it works on them

    @api.put("/session/")
    async def open_session(files: Annotated[list[UploadFile], File()]) -> Json:
        opened = await served.read(uploads.open_upload, served, [_sent(file) for file in files])
        return {"session_id": opened.id, "session_info": about_session(opened)}

    def about_session(opened: Opened) -> Json:
        return {"name": opened.id, "image": opened.name, "expiry": round(served.limits.idle_s), "meta": {}}

    @api.get("/session/{session_id}")
    def session(session_id: str) -> Json:
        return about_session(served.find(session_id))

    @api.delete("/session/{session_id}")
    def close_session(session_id: str) -> Json:
        about = about_session(served.find(session_id))
        served.close(session_id)
        return about

    # masks

    @api.post("/infer/{model}")
    async def infer(
        model: str,
        image: str = "",
        session_id: str = "",
        params: Params = "{}",
        file: Annotated[UploadFile | None, File()] = None,
        output: Output = "all",
    ) -> Response:
        if model != name:
            raise NotOpen(f"there is no model {model!r}; the model is {name}")
        said = _read_json(params, "params")
        if output == "dicom_seg":
            said["result_extension"] = ".dcm"

        def answer(opened: Opened) -> Found:
            return find(served, opened, said)

        if file is not None:
            opened = await served.read(uploads.open_upload, served, [_sent(file)])
            try:
                found = await served.compute(answer, opened)
            finally:
                served.close(opened.id)
        elif session_id:
            found = await served.compute(answer, served.find(session_id))
        elif image:
            opened = await served.read(images.opened, datastore.find(image))
            found = await served.compute(answer, opened)
        else:
            raise UserError("which image? Send image=ID, session_id=ID or a file")
        if output == "json":
            return JSONResponse(found.said)
        if output == "all":
            return multipart(found.said, found.content, found.name)
        return download(found.content, found.name)

    # images and labels that are kept

    @api.get("/datastore/")
    def stored(output: Literal["stats", "all", "train"] = "stats") -> Any:
        if output == "all":
            return about_datastore(datastore, images)
        if output == "train":
            ids = [entry.id for entry in datastore.all() if datastore.is_submitted(entry)]
            return [{"image": id_, "label": id_} for id_ in ids]
        return datastore.statistics()

    @api.put("/datastore/")
    @api.put("/datastore/image")
    async def bring(image: str, file: Upload) -> Json:
        entry = await received(file, lambda source: datastore.add(image, source))
        return {"image": entry.id}

    @api.get("/datastore/image")
    @api.head("/datastore/image")
    async def image_file(image: str) -> Response:
        return download(*await served.read(images.file, datastore.find(image)))

    @api.get("/datastore/image/info")
    def image_info(image: str) -> Json:
        return images.about(datastore.find(image))

    @api.put("/datastore/label")
    async def submit(image: str, label: Upload, params: Params = "{}", tag: str = "final") -> Json:
        if tag not in ("", "final"):
            raise UserError(f"tag is {tag!r}; what is submitted is final")
        entry, said = datastore.find(image), _read_json(params, "params")
        record = await received(label, lambda source: datastore.submit(entry, source, said))
        return {"image": entry.id, "label": entry.id, "voxels": record["voxels"]}

    @api.get("/datastore/label")
    async def label_file(label: str, tag: str = "final") -> Response:
        entry, of = datastore.find(label), checked_tag(tag)

        def run() -> bytes:
            volume = entry.read()
            places = datastore.in_places(datastore.label(entry, of, volume))
            return mask_file(served, volume, places, ".nii.gz", datastore.places)

        return download(await served.read(run), f"{entry.name}.nii.gz")

    @api.delete("/datastore/label")
    def withdraw(id: str, tag: str = "final") -> Json:
        if checked_tag(tag) != "final":
            raise UserError("only what was submitted here can be taken back: tag final")
        datastore.withdraw(datastore.find(id))
        return {}

    @api.get("/datastore/label/info")
    def label_info(label: str, tag: str = "final") -> Json:
        entry = datastore.find(label)
        return datastore.record(entry) if checked_tag(tag) == "final" else {}

    # what to label next

    @api.post("/activelearning/{strategy}")
    async def sample(strategy: str, params: Said = None) -> Json:
        if strategy not in STRATEGIES:
            raise NotOpen(f"there is no strategy {strategy!r}; choose of: {', '.join(STRATEGIES)}")
        entry = await served.compute(next_image, STRATEGIES[strategy], served, datastore, rng)
        return {} if entry is None else images.about(entry)

    # learning from it

    @api.post("/train/")
    @api.post("/train/{model}")
    async def train(model: str | None = None, params: Said = None) -> Json:
        if model not in (None, name):
            raise NotOpen(f"there is no model {model!r}; the model is {name}")
        said = params or {}
        wanted = Wanted.read(said if model else said.get(name) or {}, jobs.default)
        task = await served.read(jobs.start, wanted)
        return about_task(task, name) if model else {name: {"result": about_task(task, name), "detail": None}}

    @api.get("/train/")
    def training(check_if_running: bool = False) -> Json:
        task = jobs.running if check_if_running else jobs.last
        if task is None:
            raise HTTPException(404, "nothing is training" if check_if_running else "nothing was trained yet")
        return about_task(task, name)

    @api.delete("/train/")
    async def stop() -> Json | None:
        task = await served.read(jobs.stop)
        return None if task is None else about_task(task, name)

    return api


def _sent(file: UploadFile) -> tuple[str, BinaryIO]:
    """As `uploads` takes them."""
    return file.filename or "", file.file


def _read_json(text: str, name: str) -> Json:
    """A form's field; UserError where it is no JSON object."""
    try:
        said = json.loads(text or "{}")
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise UserError(f"{name} is not a JSON object")
    return said
