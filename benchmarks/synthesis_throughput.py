"""Pasted samples a second, of eight classes at 256 and 512 px: ours against Eq. 1 to 3 in plain NumPy and SciPy.

The other is what one writes first: for each organ `scipy.ndimage.affine_transform` of the whole image (order 1) and of
the class's mask (order 0), a Gaussian blur, intensities, and so onto the background. Both follow the same plans, which
say everything that is random; both have one thread; batches of each are timed in turn. Ours draws its plans in that
time, the other one is given them. Made-up exemplars: smooth noise, and eight ellipses of about the sizes of the organs
that Synapse labels, a fifth of the image in all.

Both must show the same: labels that differ only on pixels next to another label and there on few, images within 1/255
wherever the labels agree. Otherwise there is no result.
"""

from __future__ import annotations

import importlib.metadata
from functools import partial
from typing import Any

import common
import numpy as np
import torch
from scipy import ndimage

from cheaplunch import runtime
from cheaplunch.config import SynthesisConfig
from cheaplunch.synthesis import BLACK, Batch, Plan, Pool, Transforms, derive_seed, draw, synthesize

# Centre and semi-axes (row, column, height, width), shares of the side: liver, spleen, stomach, two kidneys, pancreas,
# aorta, gallbladder
ELLIPSES = (
    (0.42, 0.28, 0.20, 0.15),
    (0.50, 0.78, 0.10, 0.07),
    (0.32, 0.62, 0.09, 0.12),
    (0.62, 0.68, 0.06, 0.05),
    (0.62, 0.32, 0.06, 0.05),
    (0.46, 0.54, 0.03, 0.10),
    (0.58, 0.50, 0.03, 0.03),
    (0.30, 0.45, 0.04, 0.04),
)
EXEMPLARS, BACKGROUNDS = 9, 16
TOLERANCE = 1 / 255
FEW = 0.02  # of the pixels next to another label, those that may differ


def made_up_pool(side: int, seed: int) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(EXEMPLARS + BACKGROUNDS, 1, 24, 24, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    ticks = (torch.arange(side) + 0.5) / side
    labels = torch.zeros(EXEMPLARS, side, side, dtype=torch.uint8)
    for label in labels:
        for number, (row, column, height, width) in enumerate(ELLIPSES, start=1):
            moved_row, moved_column = torch.tensor([row, column]) + 0.02 * torch.randn(2, generator=generator)
            inside = ((ticks[:, None] - moved_row) / height) ** 2 + ((ticks - moved_column) / width) ** 2 <= 1
            label[inside] = number
    sizes = torch.full((EXEMPLARS + BACKGROUNDS, 2), side)
    parts = (images[:EXEMPLARS], labels, images[EXEMPLARS:], sizes[:EXEMPLARS], sizes[EXEMPLARS:])
    return Pool(*parts, classes=len(ELLIPSES))


# --- Eq. 1–3 with NumPy and SciPy ------------------------------------------------------------------------------------


def plain(images: np.ndarray, labels: np.ndarray, backgrounds: np.ndarray, plan: Plan, reach: int) -> tuple[Any, Any]:
    """One sample (S, S) and its label, from images (N, S, S), labels (N, S, S) and backgrounds (M, S, S)."""
    if plan.organs is None:
        raise ValueError("a pasted sample has organs")
    merged = np.zeros_like(images[0])
    label = np.zeros_like(labels[0])
    for number in plan.order:
        transforms = plan.organs[number - 1 : number]
        region = move(labels[plan.exemplar] == number, transforms, order=0)
        organ = np.maximum(change(images[plan.exemplar], transforms, reach), np.float32(BLACK))
        merged[region] = organ[region]
        label[region] = number
    return np.where(merged > 0, merged, change(backgrounds[plan.background], plan.ground, reach)), label


def change(image: np.ndarray, transforms: Transforms, reach: int) -> np.ndarray:
    """T of a whole image (S, S)."""
    moved = move(image, transforms, order=1)
    deviation_px = float(transforms.blur_px)
    if deviation_px:
        moved = ndimage.gaussian_filter(moved, deviation_px, mode="nearest", radius=reach)
    gamma, gain, bias = transforms.tones[:, 0].numpy()
    return np.where(moved > 0, np.clip(gain * np.clip(moved, 0, 1) ** gamma + bias, 0, 1), moved)


def move(image: np.ndarray, transforms: Transforms, order: int) -> np.ndarray:
    """affine_grid's matrix, in (x, y) from −1 to 1, as SciPy's, in (row, column) of pixel centres."""
    matrix = transforms.matrices[0].double().numpy()[::-1]
    linear = matrix[:, 1::-1]
    middle = (image.shape[0] - 1) / 2
    offset = middle - linear @ [middle, middle] + matrix[:, 2] * image.shape[0] / 2
    return ndimage.affine_transform(image, linear, offset, order=order, mode="grid-constant")


# --- agreement and time ----------------------------------------------------------------------------------------------


def apart(batch: Batch, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How far two sets of samples differ; RuntimeError where it is too far to be the same."""
    ours, our_labels = batch.images[:, 0].numpy(), batch.labels.numpy()
    near = (1, 3, 3)
    edges = ndimage.maximum_filter(labels, near) != ndimage.minimum_filter(labels, near)
    differ = our_labels != labels
    difference = np.abs(ours - images)[~differ]
    found = {
        "labels_that_differ": float(differ.mean()),
        "of_border_pixels": float(differ[edges].mean()),
        "elsewhere": float(differ[~edges].mean()),
        "largest_difference_of_images": float(difference.max()),
    }
    if found["elsewhere"] or found["of_border_pixels"] > FEW or found["largest_difference_of_images"] > TOLERANCE:
        raise RuntimeError(f"the two do not show the same: {found}")
    return found


def measure(side: int, options: Any) -> dict[str, Any]:
    pool = made_up_pool(side, options.seed)
    config = SynthesisConfig(real_share=0.0)
    reach = round(3 * config.blur_px)
    arrays = pool.images[:, 0].numpy(), pool.labels.numpy(), pool.backgrounds[:, 0].numpy()

    def drawn(indices: range) -> list[Plan]:
        """What `synthesize` draws for these samples."""
        seeds = [derive_seed(options.seed, "sample", index) for index in indices]
        return [draw(pool, config, torch.Generator().manual_seed(seed)) for seed in seeds]

    def ours(indices: range) -> Batch:
        return synthesize(pool, indices, config, options.seed)

    def theirs(plans: list[Plan]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [plain(*arrays, plan, reach) for plan in plans]

    first = range(options.samples)
    images, labels = zip(*theirs(drawn(first)), strict=True)
    agreement = apart(ours(first), np.stack(images), np.stack(labels))
    pairs = []
    for turn in common.progress(range(options.rounds), f"{side} px"):
        indices = range(turn * options.samples, (turn + 1) * options.samples)
        pairs += common.alternate(partial(ours, indices), partial(theirs, drawn(indices)), rounds=1)
    return {
        "images_per_s": common.spread([options.samples / pair[0] for pair in pairs]),
        "images_per_s_plain": common.spread([options.samples / pair[1] for pair in pairs]),
        "times_faster": common.spread([pair[1] / pair[0] for pair in pairs]),
        "agreement": agreement,
    }


def main() -> None:
    parser = common.arguments(__file__, __doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], metavar="PX", help="of the square images")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="in a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="batches of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runtime.keep_freed_memory()  # as training does; for both
    result = {f"{side} px": measure(side, options) for side in options.sides}
    common.write(options, {"classes": len(ELLIPSES), "scipy": importlib.metadata.version("scipy"), **result})
    for side, found in result.items():
        common.console.print(f"{side}: {found['times_faster']['median']:.1f} × faster")


if __name__ == "__main__":
    main()
