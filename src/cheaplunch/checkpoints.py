"""What `--resume` goes on from: checkpoints that are whole or not there, the last two of them.

Every random choice of a step is drawn from (seed, step), so a checkpoint is the step, the trained tensors and what
the optimiser and the choice of the best step remember; the place in the data and the learning rate follow.
"""

from __future__ import annotations

import math
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from cheaplunch.errors import UserError
from cheaplunch.files import whole_or_nothing, write_text

KEPT = 2  # the newest could be damaged by a failing disk; the one before it is the way back

State = dict[str, Any]


class Checkpoints:
    """`step-000100.pt` and the like in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, step: int, state: State) -> None:
        """Writes the state after `step` steps and drops all but the last `KEPT`.

        Raises UserError where it does not fit; then the earlier ones stand as they were.
        """
        try:
            with whole_or_nothing(self.folder / f"step-{step:06d}.pt") as unfinished:
                torch.save(state | {"step": step}, unfinished)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where a write fails
            raise UserError(
                f"--out {self.folder.parent}: the checkpoint of step {step} could not be written ({error}); "
                "the one before it stands: make room and go on with --resume"
            ) from error
        for old in self._files()[:-KEPT]:
            old.unlink()

    def newest(self) -> State | None:
        """The last state that can be read, or None where there is none.

        Raises UserError where there are checkpoints but all of them are damaged.
        """
        files = self._files()
        for path in reversed(files):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile):
                continue
        if files:
            raise UserError(f"{files[-1]} and all others beside it are damaged; start anew in another --out")
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name: copies in memory, that later steps leave alone."""
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_tensors(module: nn.Module, trained: dict[str, Tensor], source: Path) -> None:
    """Puts `trained_tensors` back; raises UserError naming `source` where they are of another model."""
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in trained.items()}:
        raise UserError(f"{source} is of another model; start anew in another --out")
    for name, parameter in own.items():
        parameter.copy_(trained[name])


def require_space(folder: Path, module: nn.Module) -> int:
    """Bytes that a run will write; raises UserError where the disk of `folder` has less.

    A checkpoint holds each trained tensor three times (AdamW's two moments beside it); one more than is kept lies
    there while it is written. The best step's tensors and the adapter are two more, the pictures some MB.
    """
    trained = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    needed = trained * (3 * (KEPT + 1) + 2) + 32 * 2**20
    home = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise UserError(
            f"--out {folder}: the run will write {math.ceil(needed / 2**20)} MB and its disk has {free // 2**20} MB "
            "free; make room or give a folder on another disk"
        )
    return needed


def open_log(path: Path, steps: int) -> TextIO:
    """metrics.jsonl, open to go on after `steps` lines: what was done after the checkpoint is done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if steps else []
    write_text("".join(lines), path)
    return path.open("a", encoding="utf-8")
