"""From a click to the mask, once a slice is embedded: milliseconds on the CPU, and what share of them is the network.

LiteMedSAM on slices of `--side` px, as the network takes them and larger. A click is `OpenCase.segment` up to the mask
on the slice's own pixels: one class with its first click, with five clicks, and four classes with a click each, which
share a pass of the decoder. The network's share is what the decoder takes for the same prompts, timed in turn. A
fine-tuned network is merged into this one and takes as long. The image is made up: the time does not depend on it.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, arguments, progress, seconds, spread, write

from cheaplunch import runtime
from cheaplunch.config import ModelConfig
from cheaplunch.data.slices import Window
from cheaplunch.data.volume import Grid, Volume
from cheaplunch.interactive import Click, OpenCase
from cheaplunch.models.segmenter import build_segmenter
from cheaplunch.prediction import Predictor
from cheaplunch.prompts import Prompts

ASKED = {"first click": (1, 1), "five clicks": (1, 5), "four classes": (4, 1)}  # classes, clicks each


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--image-size", type=int, default=256, metavar="PX", help="of the network's input")
    parser.add_argument("--side", type=int, nargs="+", default=[256, 512], metavar="PX", help="of the slices")
    parser.add_argument("--clicks", type=int, default=50, metavar="N", help="timed of each kind")
    options = parser.parse_args()
    runtime.keep_freed_memory()
    runtime.use_cores()
    predictor = Predictor(build_segmenter(ModelConfig(image_size=options.image_size, tuning="none")))
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {}
    for side in options.side:
        case = open_noise(predictor, side, rng)
        embedding_s = seconds(lambda case=case: case.embedded(0))
        kinds = {}
        for name, (classes, clicks) in ASKED.items():
            pairs = []
            for _ in progress(range(options.clicks + 1), f"{side} px, {name}"):
                prompts = [
                    Click(k, 0, tuple(rng.uniform(0, side - 1, 2))) for k in range(classes) for _ in range(clicks)
                ]
                pairs += alternate(lambda: click(case, prompts), lambda: decode(case, prompts, classes), 1)  # noqa: B023
            kinds[name] = summary(pairs[1:])  # the first one warms up
        result[f"{side} px"] = {"embedding_ms": round(1000 * embedding_s), **kinds}
    write(options, result)


def open_noise(predictor: Predictor, side: int, rng: np.random.Generator) -> OpenCase:
    array = rng.uniform(size=(1, 1, side, side)).astype(np.float32)
    return OpenCase(predictor, Volume(array, None, Grid(Path("made-up.png"), (side, side))), Window(0, 1))


def click(case: OpenCase, prompts: list[Click]) -> None:
    for answer in case.segment(prompts)[0].values():
        assert answer.mask.shape == case.shape[1:]


@torch.inference_mode()
def decode(case: OpenCase, prompts: list[Click], classes: int) -> None:
    """What the network does for `click`, and nothing else."""
    embedded = case.embedded(0)
    points = torch.tensor([prompt.xy for prompt in prompts]).reshape(1, classes, -1, 2).float()
    case.predictor.segmenter.foreground(embedded.embedding, Prompts(points, torch.ones(points.shape[:3]).long()))


def summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    whole, network = (spread([1000 * pair[place] for pair in pairs]) for place in (0, 1))
    for figures in (whole, network):
        del figures["all"]
    share = statistics.median(network / whole for whole, network in pairs)
    return {"click_ms": whole, "network_ms": network, "network_share": round(share, 3)}


if __name__ == "__main__":
    main()
