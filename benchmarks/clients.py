"""Many people clicking at once on one server: errors, wrong masks, memory, and how long each waits.

`cheaplunch serve RUN --data DIR` runs as users start it, and `--clients` people click for `--seconds` as fast as they
are answered: each on a slice of their own, a click more at each question, another class now and then, from the start
again after `--clicks`. Every mask is held against what `interactive.OpenCase` says in this process, to the pixel.
The clients run on the same machine, and take their share of it. Embedding the slices is timed apart, before the clock
starts; answers that are asked for again are remembered by the server, and `repeated` says how many were.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import subprocess
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from common import CHEAPLUNCH, arguments, progress, write

from cheaplunch import runtime
from cheaplunch.interactive import Mark, open_model
from cheaplunch.predicting import Image, find_images
from cheaplunch.runs import RunFolder

MIB = 2**20


@dataclass(frozen=True)
class Person:
    """What one of them does."""

    case: str
    slice: int
    """Voxel index along the volume's last axis."""
    prompts: list[dict[str, Any]]
    """Clicks, in their order."""
    wanted: list[str]
    """After each click the sha256 of the slice's label map."""


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="of clicks on axial slices")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="volumes whose files run from foot to head"
    )
    parser.add_argument("--clients", type=int, default=50, metavar="N")
    parser.add_argument("--seconds", type=float, default=60, metavar="S")
    parser.add_argument("--clicks", type=int, default=24, metavar="N", help="of each, before starting again")
    parser.add_argument("--cases", type=int, default=4, metavar="N", help="images they share")
    options = parser.parse_args()
    runtime.keep_freed_memory()
    runtime.use_cores()
    people = rehearse(options)
    words = [*CHEAPLUNCH, "serve", options.run, "--data", options.data, "--port", 0]
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
            result = asyncio.run(click_away(people, address, server.pid, options.seconds))
        finally:
            server.terminate()
    write(options, result)


def rehearse(options: Any) -> list[Person]:
    """Everybody's clicks, and the right answers to them, by one thread in this process."""
    run = RunFolder(options.run)
    model = open_model(run, run.load_config())
    with tempfile.TemporaryDirectory() as elsewhere:
        images: list[Image] = find_images([options.data], model.channels, Path(elsewhere))[0][: options.cases]
    cases = [model.open(image.sources) for image in images]
    rng, people = np.random.default_rng(0), []
    for number in progress(range(options.clients), "rehearsing"):
        image, case = images[number % len(images)], cases[number % len(images)]
        width, height, count = case.volume.grid.shape
        k = int(rng.integers(count // 4, count - count // 4))
        prompts, marks, wanted = [], [], []
        for click in range(options.clicks):
            i, j = int(rng.integers(width)), int(rng.integers(height))
            name = list(model.labels)[int(rng.integers(len(model.labels)))]
            positive = click == 0 or bool(rng.random() < 0.8)
            prompts.append({"class": name, "kind": "point", "voxel": [i, j, k], "positive": positive})
            marks.append(Mark(name, "voxel", ((i, j, k),), positive))
            label = case.label(case.segment([case.place(mark, model.labels) for mark in marks]))
            wanted.append(digest(label_on_voxels(label, case.volume.grid.voxels_from_array)[..., k]))
        people.append(Person(image.name, k, prompts, wanted))
    return people


def label_on_voxels(label: np.ndarray, voxels_from_array: np.ndarray) -> np.ndarray:
    """(Z, Y, X) → (I, J, K), voxel by voxel through the affine: not as the server does it."""
    places = np.argwhere(np.ones(label.shape, bool))[:, ::-1]  # (x, y, z)
    i, j, k = np.rint(places @ voxels_from_array[:3, :3].T + voxels_from_array[:3, 3]).astype(int).T
    voxels = np.zeros((i.max() + 1, j.max() + 1, k.max() + 1), np.uint8)
    voxels[i, j, k] = label.ravel()
    return voxels


def digest(label: np.ndarray) -> str:
    return hashlib.sha256(label.astype(np.uint8).tobytes(order="F")).hexdigest()


async def click_away(people: list[Person], address: str, pid: int, seconds: float) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=len(people))
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        opened = [(await client.post("/api/open", json={"case": person.case})).json()["open"] for person in people]
        process, started = psutil.Process(pid), time.perf_counter()
        await asyncio.gather(*(ask(client, i, p, 1) for i, p in zip(opened, people, strict=True)))
        embedding_s, started = time.perf_counter() - started, time.perf_counter()
        memory: list[float] = []
        watching = asyncio.create_task(watch(process, memory))
        told = await asyncio.gather(
            *(one_person(client, i, p, started + seconds) for i, p in zip(opened, people, strict=True))
        )
        took_s = time.perf_counter() - started
        watching.cancel()
    waits = 1000 * np.array([wait for person in told for wait in person["waits"]])
    third = max(1, len(memory) // 3)
    return {
        "questions": len(waits),
        "errors": sum(person["errors"] for person in told),
        "wrong_masks": sum(person["wrong"] for person in told),
        "repeated": sum(max(0, len(p["waits"]) - len(q.prompts)) for p, q in zip(told, people, strict=True)),
        "a_second": round(len(waits) / took_s, 1),
        "latency_ms": {
            "median": round(float(np.median(waits)), 1),
            "p95": round(float(np.percentile(waits, 95)), 1),
            "p99": round(float(np.percentile(waits, 99)), 1),
            "highest": round(float(waits.max()), 1),
        },
        "embedding_s": round(embedding_s, 1),
        "server_memory_mib": {
            "first third": round(float(np.median(memory[:third]))),
            "last third": round(float(np.median(memory[-third:]))),
            "highest": round(max(memory)),
            "every 5 s": [round(value) for value in memory[::5]],
        },
    }


async def one_person(client: httpx.AsyncClient, open_id: str, person: Person, until: float) -> dict[str, Any]:
    waits: list[float] = []
    errors = wrong = clicks = 0
    while time.perf_counter() < until:
        clicks = clicks % len(person.prompts) + 1
        started = time.perf_counter()
        found = await ask(client, open_id, person, clicks)
        waits.append(time.perf_counter() - started)
        errors += found is None
        wrong += found is not None and found != person.wanted[clicks - 1]
    return {"waits": waits, "errors": errors, "wrong": wrong}


async def ask(client: httpx.AsyncClient, open_id: str, person: Person, clicks: int) -> str | None:
    """The sha256 of what is answered; None for an error."""
    question = {"prompts": person.prompts[:clicks], "slices": [person.slice]}
    try:
        answer = await client.post(f"/api/open/{open_id}/segment", json=question)
        [part] = answer.raise_for_status().json()["parts"]
    except httpx.HTTPError:
        return None
    return hashlib.sha256(zlib.decompress(base64.b64decode(part["mask"]))).hexdigest()


async def watch(process: psutil.Process, memory: list[float]) -> None:
    while True:
        memory.append(process.memory_info().rss / MIB)
        await asyncio.sleep(1)


if __name__ == "__main__":
    main()
