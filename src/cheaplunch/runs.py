"""A run's folder: what lies where in it, and what it says about how it came to be."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cheaplunch.config import RunConfig, load_config
from cheaplunch.errors import UserError

_PACKAGES = ("cheaplunch", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "nibabel")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run; `predict`, `evaluate` and `serve` need nothing else but the backbone's weights."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def exemplars(self) -> Path:
        return self.root / "exemplars.csv"

    @property
    def preview(self) -> Path:
        return self.root / "synthesis.png"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def texts(self) -> Path:
        """What it is asked with, where it has learned from texts."""
        return self.root / "texts"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def load_config(self) -> RunConfig:
        """The settings of this run; raises UserError where the folder is no run."""
        if not self.config.is_file():
            raise UserError(f"{self.root} is not a run: it has no config.yaml; give the --out of `cheaplunch finetune`")
        return load_config(self.config)

    def finished(self) -> bool:
        return (self.adapter / "adapter_model.safetensors").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run says; UserError where it is damaged, or not an object."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore the file, or have it written anew") from error
    if not isinstance(said, dict):
        raise UserError(f"{path} is damaged (no JSON object in it); restore the file, or have it written anew")
    return said


def describe_environment(
    config: RunConfig, device: torch.device, precision: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Versions, machine, seed and what the run found out about its data: enough to ask for the same again."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"system": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "seed": config.seed,
        **facts,
    }


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
