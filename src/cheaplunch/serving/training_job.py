"""Fine-tuning in the background on what was submitted: a process of its own, so that the server goes on answering.

It is `cheaplunch finetune` with the settings of the run that the server was started with, and leaves a run beside that
one: RUN-1, RUN-2 and so on. Each starts from the backbone's weights anew and learns from everything that is labelled by
then, so that a label that was mended counts as it is now.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cheaplunch.config import RunConfig, override, save_config
from cheaplunch.data.cases import read_checked
from cheaplunch.data.dataset import Case, Dataset
from cheaplunch.data.formats import write_nifti
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Axis, to_slices
from cheaplunch.data.subset import take_classes
from cheaplunch.data.volume import NOWHERE, Volume, read_volume
from cheaplunch.errors import UserError
from cheaplunch.files import whole_folder, write_json
from cheaplunch.runs import RunFolder
from cheaplunch.serving.datastore import Datastore, Entry, file_name
from cheaplunch.serving.opened import Loaded

State = Literal["RUNNING", "DONE", "ERROR", "STOPPED"]

_STOPPING_S = 30  # a step and its checkpoint take less, as a rule
_SHOWN = 20  # lines


@dataclass(frozen=True)
class Wanted:
    """What a client may choose of a fine-tuning; the rest is the run's."""

    steps: int
    exemplars: int = 0
    """So many slices, chosen as `--strategy` says; 0: every labelled slice."""
    own_exemplars: bool = True
    """Also learn from the run's own exemplars, where their images are still there."""
    complete: bool = False
    """A slice on which nothing is labelled shows no class; otherwise nobody has decided that."""

    @classmethod
    def read(cls, said: Mapping[str, Any], default: Wanted) -> Wanted:
        """From a client's JSON, in which there may be more. UserError for a value of another kind."""
        values = {}
        for name, usual in vars(default).items():
            value = said.get(name, usual)
            if type(value) is not type(usual) or (isinstance(value, int) and value < 0):
                kind = "true or false" if isinstance(usual, bool) else "a whole number, not negative"
                raise UserError(f"{name} is {value!r}; it must be {kind}")
            values[name] = value
        return cls(**values)


@dataclass(eq=False)
class Task:
    """One fine-tuning."""

    run: RunFolder
    wanted: Wanted
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: State = "RUNNING"
    started_s: float = field(default_factory=time.time)
    ended_s: float | None = None
    said: list[str] = field(default_factory=list)
    """What happened, a line each, without places of files."""
    process: subprocess.Popen | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def record(self) -> dict[str, Any]:
        """The last line of its metrics; empty before the first step."""
        try:
            lines = self.run.metrics.read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        for line in reversed(lines[-2:]):  # the last may be half written
            try:
                return json.loads(line)
            except ValueError:
                continue
        return {}

    def lines(self) -> list[str]:
        """What happened, and how far it is."""
        record = self.record
        progress = [f"step {record['step']} of {self.wanted.steps}, loss {record['loss']:.4f}"] if record else []
        return [*self.said, *progress][-_SHOWN:]


class TrainingJobs:
    """At most one fine-tuning at a time. Threads may share it."""

    def __init__(self, base: Loaded, datastore: Datastore, done: Callable[[RunFolder], None]):
        """`done` is called with a finished run, in a thread of its own."""
        self.base = base
        self.default = Wanted(base.config.training.steps)
        self._datastore = datastore
        self._done = done
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.last: Task | None = None

    @property
    def running(self) -> Task | None:
        task = self.last
        return task if task is not None and task.state == "RUNNING" else None

    def start(self, wanted: Wanted) -> Task:
        """UserError where one is running, or nothing is labelled."""
        with self._lock:
            if self.running is not None:
                raise UserError("a fine-tuning is running; wait for its end, or stop it")
            if not any(self._shows_something(entry) for entry in self._datastore.all()):
                raise UserError("nothing is labelled yet; submit a label first")
            task = self.last = Task(self._vacant(), wanted)
            self._thread = threading.Thread(target=self._work, args=(task,), daemon=True)
            self._thread.start()
            return task

    def stop(self) -> Task | None:
        """Ends the one that is running, and waits until it has ended."""
        task = self.running
        if task is not None:
            task.stopped.set()
            self._end(task)
        return task

    def _end(self, task: Task) -> None:
        thread = self._thread
        if task.process is not None:
            task.process.terminate()
        if thread is not None:
            thread.join(_STOPPING_S)
            if thread.is_alive() and task.process is not None:
                task.process.kill()
                thread.join()

    def _work(self, task: Task) -> None:
        try:
            if self._finetune(task):
                self._done(task.run)
                task.said.append("done; the new model answers now")
            task.state = "STOPPED" if task.stopped.is_set() else "DONE" if task.run.finished() else "ERROR"
        except Exception as error:  # it must not end in silence
            task.said.append(self._public(str(error) if isinstance(error, UserError) else repr(error)))
            task.state = "ERROR"
        finally:
            task.ended_s = time.time()

    def _finetune(self, task: Task) -> bool:
        """Whether it came to its end."""
        folder = self._material(task.run.root)
        said = write_training_data(folder, self._datastore, self.base, task.wanted)
        task.said += [self._public(line) for line in said]
        settings = folder / "settings.yaml"
        save_config(settings_for(self.base.config, folder, task.wanted), settings)
        words = [sys.executable, "-m", "cheaplunch", "finetune", "--config", settings, "--out", task.run.root]
        with (folder / "output.txt").open("w+", encoding="utf-8", errors="replace") as output:
            if task.stopped.is_set():
                return False
            task.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            if task.stopped.is_set():  # between the two
                task.process.terminate()
            status = task.process.wait()
            if status:
                output.seek(0)
                task.said += [self._public(line) for line in output.read().splitlines() if line.strip()][-5:]
        return status == 0

    def _vacant(self) -> RunFolder:
        """A run that neither is there nor was begun."""
        root, number = self.base.run.root.resolve(), 1
        while (beside := root.with_name(f"{root.name}-{number}")).exists() or self._material(beside).exists():
            number += 1
        return RunFolder(beside)

    def _material(self, run: Path) -> Path:
        return self._datastore.folder / "training" / run.name

    def _shows_something(self, entry: Entry) -> bool:
        return self._datastore.is_submitted(entry) and any(self._datastore.record(entry)["voxels"].values())

    def _public(self, line: str) -> str:
        """Without the places of files."""
        run, data = self.base.run.root, self.base.config.data.data
        for folder in (self._datastore.folder, run.resolve().parent, run.parent, data.parent):
            if folder != Path():
                line = line.replace(f"{folder}/", "")
        return line


def settings_for(config: RunConfig, data: Path, wanted: Wanted) -> RunConfig:
    """The run's settings, but for what it learns from and how long; no case is held out of the few there are."""
    strategy = "auto" if config.data.strategy == "all" else config.data.strategy
    every = {"exemplars": wanted.exemplars, "strategy": strategy} if wanted.exemplars else {"strategy": "all"}
    learned_from = {"data": data, "exemplar_file": None, "exemplar_percent": None, "classes": None}
    without = {"synthetic_set": None, "validation_cases": 0, "patience": 0, "tracker": "none"}
    shorter = min(1.0, wanted.steps / config.training.steps)
    warmup = round(config.training.warmup_steps * shorter)
    return override(config, {**learned_from, **every, **without, "steps": wanted.steps, "warmup_steps": warmup})


# --- what it learns from ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """What a run learned from."""

    dataset: Dataset
    slices: dict[str, set[int]]
    """Case → its exemplars."""

    @property
    def cases(self) -> dict[tuple[Path, ...], Case]:
        """By their images."""
        return {_key(case.images): case for case in self.dataset.cases if case.id in self.slices}

    def label(self, case: Case, axis: Axis, ignore: int) -> tuple[Volume, np.ndarray]:
        """With the slices undecided that show a class and were no exemplars."""
        volume, label = read_checked(case, self.dataset, axis)
        if label is None:
            raise UserError(f"{case.images[0]} has no label any more; restore the file")
        if self.dataset.ignore is not None:
            label = np.where(label == self.dataset.ignore, np.int32(ignore), label)
        slices = to_slices(label, axis)
        others = set(np.flatnonzero(slices.any(axis=(1, 2))).tolist()) - self.slices[case.id]
        slices[sorted(others)] = ignore
        return volume, label


def own_exemplars(run: RunFolder, config: RunConfig, classes: Mapping[str, int]) -> Own:
    """UserError where the images are no longer what they were."""
    dataset = take_classes(open_dataset(config.data.data), config.data.classes)
    if dataset.labels != classes:
        raise UserError(f"the classes of {config.data.data} are no longer the run's")
    slices: dict[str, set[int]] = defaultdict(set)
    with run.exemplars.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            slices[row["case"]].add(int(row["slice"]))
    if missing := slices.keys() - {case.id for case in dataset.cases}:
        raise UserError(f"{config.data.data} has no case {min(missing)} any more")
    return Own(dataset, dict(slices))


def write_training_data(folder: Path, datastore: Datastore, base: Loaded, wanted: Wanted) -> list[str]:
    """An nnU-Net raw folder of what was submitted, and of the run's own exemplars; says what is in it, a line each.

    Slices on which nobody decided are labelled `ignore`, which training leaves out: those of a submitted volume on
    which nothing is labelled (unless it is `complete`), and those of the run's own volumes that show a class and were
    not its exemplars. A submitted slice takes the place of the run's own. The volumes are written anew, in one
    orientation.
    """
    axis, classes = base.config.data.axis, datastore.classes
    ignore = min(set(range(1, 256)) - set(classes.values()))
    submitted = {_key(entry.sources): entry for entry in datastore.all() if datastore.is_submitted(entry)}
    own, notes = None, []
    if wanted.own_exemplars:
        try:
            own = own_exemplars(base.run, base.config, classes)
            notes = [f"exemplars of {base.run.root.name}: {sum(map(len, own.slices.values()))}"]
        except (UserError, OSError) as error:
            notes = [f"without the exemplars of {base.run.root.name}: {error}"]
    cases = {} if own is None else own.cases
    count = channels = 0
    with whole_folder(folder) as unfinished:
        for key in dict.fromkeys([*cases, *submitted]):
            entry, case = submitted.get(key), cases.get(key)
            if own is not None and case is not None:
                volume, label = own.label(case, axis, ignore)
            else:
                volume = read_volume(key)
                label = np.full(volume.array.shape[1:], 0 if wanted.complete else ignore, np.int32)
            if entry is not None:
                theirs = to_slices(datastore.label(entry, "final", volume), axis)
                shown = theirs.any(axis=(1, 2))
                to_slices(label, axis)[shown] = theirs[shown]
                count += int(shown.sum())
            name = entry.name if entry is not None else f"own-{file_name(case.id if case else '')}"
            _write(volume, label, unfinished, "Tr", name)
            if not channels:
                # With no test image some of these would be held out as such: one stands in for it.
                _write(volume, None, unfinished, "Ts", "stand-in")
                channels = len(volume.array)
        about = {
            "channel_names": {str(channel): f"channel {channel}" for channel in range(channels)},
            "labels": {"background": 0, **classes, "ignore": ignore},
            "file_ending": ".nii",
        }
        write_json(about, unfinished / "dataset.json")
    return [f"submitted: {count} labelled slices of {len(submitted)} volumes", *notes]


def _write(volume: Volume, label: np.ndarray | None, folder: Path, side: str, name: str) -> None:
    """A case as nnU-Net has it, its axes towards left, posterior and superior."""
    affine = NOWHERE if volume.grid.affine is None else volume.grid.affine @ volume.grid.voxels_from_array
    for channel, array in enumerate(volume.array):  # (Z, Y, X)
        path = folder / f"images{side}" / f"{name}_{channel:04d}.nii"
        path.parent.mkdir(exist_ok=True)
        write_nifti(array.transpose(2, 1, 0), affine, None, path)
    if label is not None:
        path = folder / f"labels{side}" / f"{name}.nii"
        path.parent.mkdir(exist_ok=True)
        write_nifti(label.astype(np.uint8).transpose(2, 1, 0), affine, None, path)


def _key(sources: Sequence[Path]) -> tuple[Path, ...]:
    """Tells an image from others, by whatever way its files were come to."""
    return tuple(source.resolve() for source in sources)
