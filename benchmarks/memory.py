"""Peak memory of a short fine-tuning run by the size of its synthetic set: it must be flat.

Each run is `cheaplunch finetune` in a process of its own; its peak is the largest resident set that the system counted
when it ended. The sizes are taken in turn for several rounds; "largest over smallest" is within a round. With the
defaults the steps draw 80 samples, nearly all of the smallest set: what a stored or indexed set would cost lies before
the first step.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import CHEAPLUNCH, DATA, arguments, progress, spread, write


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="nnU-Net raw folder")
    parser.add_argument("--synthetic", type=int, nargs="+", default=[100, 1000, 10000], metavar="M", help="set sizes")
    parser.add_argument("--steps", type=int, default=20, metavar="N")
    parser.add_argument("--image-size", type=int, default=64, metavar="PX")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    options = parser.parse_args()
    flags = {"data": options.data, "steps": options.steps, "image-size": options.image_size}
    plan = [size for _ in range(options.rounds) for size in options.synthetic]
    peaks = [peak_mb({**flags, "synthetic": size}) for size in progress(plan, "short runs")]
    count = len(options.synthetic)
    rounds = [peaks[start : start + count] for start in range(0, len(peaks), count)]
    result = {
        "peak, MiB": {
            f"{size} samples": spread(list(found))
            for size, found in zip(options.synthetic, zip(*rounds, strict=True), strict=True)
        },
        "largest over smallest": spread([max(found) / min(found) for found in rounds]),
    }
    write(options, result)


def peak_mb(flags: dict[str, Any]) -> float:
    """The peak of one run, in MiB."""
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        words += ["--out", f"{folder}/run"]
        run = subprocess.Popen([*CHEAPLUNCH, "finetune", *words], stdout=said, stderr=said)
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if run.returncode:
            raise SystemExit(f"finetune ended with {run.returncode}:\n{said.read()}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
