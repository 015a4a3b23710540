"""Time and peak memory of indexing a dataset by its number of volumes, read the first time and taken from the cache.

Each run is in a process of its own, on gzipped int16 volumes of made-up voxels. Seconds are those of opening the folder
and indexing it, memory is the largest resident set meanwhile above that before: imports are left out of both. Time must
grow with the number of volumes, memory must not. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from common import arguments, progress, spread, write

from cheaplunch.data.index import index_slices
from cheaplunch.data.layouts import open_dataset


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--volumes", type=int, nargs="+", default=[10, 100, 1000], metavar="N", help="set sizes")
    parser.add_argument("--shape", type=int, nargs=3, default=[64, 64, 32], metavar="VOX", help="of each volume")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="each with an empty cache at first")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker)))
        return
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in options.volumes:
            data = Path(folder) / str(count)
            make(data, count, tuple(options.shape))
            runs = [index_twice(data) for _ in progress(range(options.rounds), f"{count} volumes")]
            first, second = zip(*runs, strict=True)
            result[f"{count} volumes"] = {
                name: {what: spread([run[what] for run in found]) for what in ("seconds", "memory, MiB")}
                for name, found in (("first run", first), ("second run", second))
            }
    write(options, result)


def make(root: Path, count: int, shape: tuple[int, ...]) -> None:
    """An nnU-Net raw folder of noise with a block of each of two classes, all of it for training but two."""
    random = np.random.default_rng(0)
    affine = np.diag([-1.0, -1, 3, 1])
    for number in range(count):
        label = np.zeros(shape, np.uint8)
        low = random.integers(0, [side // 2 for side in shape], (2, 3))
        for value, (i, j, k) in enumerate(low, start=1):
            label[i : i + shape[0] // 3, j : j + shape[1] // 3, k : k + shape[2] // 3] = value
        image = (random.normal(100, 20, shape) + 50 * label).astype(np.int16)
        side = "Ts" if number < 2 else "Tr"
        for folder, array, ending in (("images", image, "_0000"), ("labels", label, "")):
            path = root / f"{folder}{side}" / f"case_{number:04d}{ending}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))


def index_twice(data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same command with an empty cache, then with the one it left."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--worker", str(data)]
        environment = os.environ | {"CHEAPLUNCH_CACHE": cache}
        first, second = (
            json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
            for _ in range(2)
        )
    return first, second


def measure(data: Path) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = resident_mb("VmRSS"), time.perf_counter()
    dataset = open_dataset(data)
    index_slices(dataset, dataset.cases)
    return {"seconds": time.perf_counter() - started, "memory, MiB": resident_mb("VmHWM") - before}


def resident_mb(what: str) -> float:
    """VmRSS, the resident set, or VmHWM, the largest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    main()
