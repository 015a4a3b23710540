"""Seconds for the HD95 of eight classes of one volume: ours from label maps, medpy class by class, MONAI on one-hot.

The truth is eight ellipsoids in 150 × 512 × 512 voxels, semi-axes 20 to 72 voxels in plane and 0.6 of that across it;
the prediction is the truth moved by three voxels along a row. Each run times the three in turn, on one thread. What
MONAI is given is one-hot already; making it is not in its time. Values must agree: ours pooled with medpy, max-directed
with MONAI.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import common
import numpy as np
import torch
from medpy.metric.binary import hd95 as medpy_hd95
from monai.metrics.hausdorff_distance import compute_hausdorff_distance

from cheaplunch.evaluation.metrics import hd95, label_pairs, surface_distances

SHAPE = (150, 512, 512)
SPACING_MM = (3.0, 0.8, 0.8)
ROWS = ((72, 57, 42, 27), (65, 50, 35, 20))  # semi-axes in plane, in voxels
LABELS = {f"class {number}": number for number in range(1, 9)}
SHIFT_VOX = 3


def ellipsoids() -> np.ndarray:
    """(D, H, W) uint8, numbers 1 to 8, none touching another."""
    volume = np.zeros(SHAPE, np.uint8)
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    number = 0
    for row, semi_axes in enumerate(ROWS):
        left = 10
        for semi_axis in semi_axes:
            number += 1
            centre = (75, 128 + 256 * row, left + semi_axis)
            left += 2 * semi_axis + 10
            across = ((y - centre[1]) ** 2 + (x - centre[2]) ** 2) / semi_axis**2
            volume[across + (z - centre[0]) ** 2 / (0.6 * semi_axis) ** 2 <= 1] = number
    return volume


def ours(prediction: np.ndarray, truth: np.ndarray) -> dict[str, list[float]]:
    pairs = label_pairs(prediction, truth, LABELS, SPACING_MM).values()
    distances = [surface_distances(pair) for pair in pairs]
    return {definition: [hd95(d, definition) for d in distances] for definition in ("pooled", "max-directed")}


def of_medpy(prediction: np.ndarray, truth: np.ndarray) -> list[float]:
    return [float(medpy_hd95(prediction == n, truth == n, voxelspacing=SPACING_MM)) for n in LABELS.values()]


def of_monai(prediction: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """prediction, truth: (1, 8, D, H, W) one-hot."""
    found = compute_hausdorff_distance(prediction, truth, include_background=True, percentile=95, spacing=SPACING_MM)
    return found[0].tolist()


def one_hot(volume: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(volume == number) for number in LABELS.values()])[None]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    parser = common.arguments(__file__, __doc__)
    parser.add_argument("--runs", type=int, default=3, help="of all three (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    truth = ellipsoids()
    prediction = np.roll(truth, SHIFT_VOX, axis=2)
    hot = one_hot(prediction), one_hot(truth)
    tools: Mapping[str, Callable[[], Any]] = {
        "cheaplunch": lambda: ours(prediction, truth),
        "MONAI": lambda: of_monai(*hot),
        "medpy": lambda: of_medpy(prediction, truth),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    values: dict[str, Any] = {}
    for name in common.progress(list(tools) * options.runs, "HD95"):
        took, values[name] = timed(tools[name])
        seconds[name].append(took)

    apart = {
        "medpy": np.subtract(values["cheaplunch"]["pooled"], values["medpy"]),
        "MONAI": np.subtract(values["cheaplunch"]["max-directed"], values["MONAI"]),
    }
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["cheaplunch"], strict=True)] for name in apart}
    result = {
        "shape": SHAPE,
        "spacing_mm": SPACING_MM,
        "medpy": importlib.metadata.version("medpy"),
        "seconds": {name: common.spread(some) for name, some in seconds.items()},
        "times_faster_than": {name: common.spread(some) for name, some in ratios.items()},
        "largest_difference_mm": {name: float(np.abs(some).max()) for name, some in apart.items()},
        "hd95_mm": values["cheaplunch"],
    }
    common.write(options, result)
    for name, some in ratios.items():
        common.console.print(f"{statistics.median(some):.1f} × faster than {name}")


if __name__ == "__main__":
    main()
