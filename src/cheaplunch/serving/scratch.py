"""A folder for what a server is sent: patients' images, which nothing may leave lying about."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_PREFIX = "cheaplunch-serve-"
_LOCK = ".lock"  # held for as long as the folder has a server


class _Held:
    """A lock that ends with the process, however it ends."""

    def __init__(self, folder: Path):
        """BlockingIOError where somebody else holds it."""
        self.file = (folder / _LOCK).open("a")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self.file.close()
            raise


def own_folder() -> tuple[Path, Callable[[], None]]:
    """A new folder for its owner alone, and what removes it.

    Folders of servers that were killed are removed first.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or one whose server is running
            if left.stat().st_uid == os.getuid():
                _remove(left, _Held(left))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    held = _Held(folder)
    return folder, lambda: _remove(folder, held)


def _remove(folder: Path, held: _Held) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    held.file.close()
