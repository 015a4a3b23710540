"""What a person at the terminal sees while a verb works: progress, and a line on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cheaplunch import processes

console = Console(stderr=True)


@contextlib.contextmanager
def progress(what: str, figures: str = "") -> Iterator[Callable[..., None]]:
    """A bar with time left, on stderr; the function given tells it (done, of how many, figures)."""
    columns = [
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    if figures:
        columns.append(TextColumn(figures))
    # A bar for what only prepares goes away, and is not for a log file: what follows it stands alone.
    passing = what == "reading"
    quiet = bool(processes.rank()) or (passing and not console.is_terminal)
    bar = Progress(*columns, console=console, disable=quiet, transient=passing)
    task = bar.add_task(what, total=None, loss=float("nan"), images_per_s=0.0, memory_mb=0)

    def tell(done: int, total: int, record: dict[str, Any] | None = None) -> None:
        if not bar.live.is_started:  # not before there is progress, so that an error stands alone
            bar.start()
        shown = {name: value for name, value in (record or {}).items() if name in {"loss", "images_per_s", "memory_mb"}}
        bar.update(task, completed=done, total=total, **shown)
        if done == total:  # so that another bar may follow
            bar.stop()

    try:
        yield tell
    finally:
        bar.stop()


def say(message: str, status: int) -> int:
    sys.stderr.write(f"cheaplunch: {' '.join(message.split())}\n")
    return status
