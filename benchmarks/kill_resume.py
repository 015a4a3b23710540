"""`kill -9` at random moments of `cheaplunch finetune`: is the resumed run's adapter the undisturbed one's, bit by bit?

One run is left alone: its adapter's sha256 is the reference, its length says where kills may fall. Then every kill
has a run of its own: it is killed, resumed as a user would (--resume where there is a run, a plain start where the
kill came before there was one), and at its end its adapter is compared. The moments are drawn from a seed, one in
each equal part of the run's length; every fourth kill waits from its moment on for a checkpoint that is being written
and strikes then. Where --resume refuses what the kill left behind, that is written down with what it said, and the
run starts anew.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import CHEAPLUNCH, DATA, arguments, progress, write

from cheaplunch.runs import RunFolder

AIMED = 4  # every so many kills wait for a checkpoint in the making


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="nnU-Net raw folder")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--checkpoint-every", type=int, default=2, metavar="N")
    parser.add_argument("--image-size", type=int, default=64, metavar="PX")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        undisturbed = RunFolder(Path(folder) / "undisturbed")
        finish(options, undisturbed)
        length = time.perf_counter() - started
        reference = sha256(undisturbed)
        rng = random.Random(options.seed)
        moments = [(number + rng.random()) / options.kills * length for number in range(options.kills)]
        kills = []
        for number, moment in enumerate(progress(moments, "kill and resume")):
            run = RunFolder(Path(folder) / f"killed-{number}")
            kills.append(kill_and_resume(options, run, moment, aimed=number % AIMED == AIMED - 1))
            kills[-1]["equal"] = sha256(run) == reference
            shutil.rmtree(run.root)
    result = {
        "equal": sum(kill["equal"] for kill in kills),
        "kills": len([kill for kill in kills if kill["killed"]]),
        "while a checkpoint was written": sum(kill["half_written_checkpoint"] for kill in kills),
        "before there was a run": sum(not kill["run_existed"] for kill in kills),
        "resume refused": sum(kill["refused"] is not None for kill in kills),
        "seconds undisturbed": round(length, 1),
        "sha256 undisturbed": reference,
        "each": kills,
    }
    write(options, result)


def kill_and_resume(options: Namespace, run: RunFolder, moment: float, aimed: bool) -> dict[str, Any]:
    """Kills one run at `moment` seconds, or `aimed` at the next checkpoint after it, and sees it to its end."""
    process = start(options, run)
    deadline = time.perf_counter() + moment
    while process.poll() is None and (
        time.perf_counter() < deadline or (aimed and not half_written(run) and not run.finished())
    ):
        time.sleep(0.0005 if aimed else 0.005)
    process.send_signal(signal.SIGKILL)  # to one that has ended it is not sent
    process.communicate()
    kill = {
        "at_s": round(moment, 2),
        "aimed": aimed,
        "killed": process.returncode == -signal.SIGKILL,
        "run_existed": run.config.exists(),
        "step": len(run.metrics.read_text().splitlines()) if run.metrics.exists() else 0,
        "checkpoint": newest_checkpoint(run),
        "half_written_checkpoint": half_written(run),
        "adapter_was_there": run.finished(),
        "refused": None,
    }
    if not kill["run_existed"]:
        finish(options, run)
    elif refusal := finish(options, run, resume=True):
        kill["refused"] = refusal
        shutil.rmtree(run.root)
        finish(options, run)
    return kill


def start(options: Namespace, run: RunFolder, resume: bool = False) -> subprocess.Popen:
    flags = ["--data", options.data, "--steps", options.steps, "--image-size", options.image_size]
    flags += ["--batch-size", options.batch_size, "--checkpoint-every", options.checkpoint_every, "--out", run.root]
    words = [*CHEAPLUNCH, "finetune", *map(str, flags), *(["--resume"] if resume else [])]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(options: Namespace, run: RunFolder, resume: bool = False) -> str | None:
    """Runs to the end; what it says where it refuses to resume."""
    process = start(options, run, resume)
    _, said = process.communicate()
    if process.returncode == 2 and resume:
        return said.strip().replace(str(run.root), "RUN")
    if process.returncode:
        raise SystemExit(f"finetune ended with {process.returncode}:\n{said}")
    return None


def half_written(run: RunFolder) -> bool:
    return any(run.checkpoint.glob(".step-*"))


def newest_checkpoint(run: RunFolder) -> int | None:
    return max((int(path.stem.removeprefix("step-")) for path in run.checkpoint.glob("step-*.pt")), default=None)


def sha256(run: RunFolder) -> str:
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
