"""This process among those that `accelerate launch` or `torchrun` started: alone without them.

torch and accelerate are imported where they are needed, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import PartialState


def rank() -> int:
    """Its number among all; 0 prints and writes."""
    return int(os.environ.get("RANK", "0"))


def on_this_machine() -> int:
    """How many of them share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(cpu: bool) -> PartialState:
    """The group they form; it talks over gloo on the CPU, over NCCL on GPUs. `cpu` counts at the first call only."""
    from accelerate import PartialState

    return PartialState(cpu=cpu)


def gather(items: list[Any], cpu: bool) -> list[Any]:
    """The lists of all processes as one, in the processes' order."""
    from accelerate.utils import gather_object

    return gather_object(items) if join(cpu).num_processes > 1 else items


@contextmanager
def shared_folder(cpu: bool) -> Iterator[Path]:
    """An empty folder, the same one for every process of a machine, that goes away with the block."""
    from accelerate.utils import broadcast_object_list

    group = join(cpu)
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        if group.num_processes > 1:
            broadcast_object_list(shared)
        yield Path(shared[0])
        group.wait_for_everyone()
