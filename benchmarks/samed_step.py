"""A training step of the two-output LoRA model on ViT-B: ours beside SAMed's own code, the same batch in one run.

SAMed   `LoRA_Sam` of the checkout given by `--samed` (github.com/hitachinsk/SAMed, the module with LoRA on encoder and
        decoder), one class, no prompt, AdamW, in fp32, as its `trainer.py` has it.
ours    `cheaplunch.learner.Learner` as `finetune` uses it, one click an image, in `--precision auto` and in fp32.

Both hold the same random encoder, take the same loss at a quarter of the input's side, and start with B = 0, so their
image embeddings must agree, or there is no result. glibc's setting cannot be taken back and a warmed-up allocator helps
who comes second, so each round is a process of its own that times SAMed first and ours after; a round's figure is the
median of its steps, the result the median of the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import originals
import torch
from common import arguments, fresh, made_up_batch, progress, seconds, spread, write

from cheaplunch import runtime
from cheaplunch.config import build_config
from cheaplunch.learner import Learner, Work, start_processes
from cheaplunch.losses import segmentation_loss
from cheaplunch.models.backbones import BACKBONES, VIT_B, build_vit, random_state
from cheaplunch.models.layouts import our_names, to_transformers
from cheaplunch.models.sam import AS_IS

TOLERANCE = 1e-3  # absolute, of the image embeddings, whose standard deviation is about 1
CE_WEIGHT, DICE_WEIGHT = 0.2, 0.8  # SAMed's


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--samed", type=Path, required=True, metavar="DIR", help="checkout of SAMed")
    parser.add_argument("--image-size", type=int, nargs="+", default=[256, 512], metavar="PX", help="one by one")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes for each size")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed in each process, after one to warm up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", action="store_true", help="be one of those processes")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options, options.image_size[0])))
        return
    shared = {key: getattr(options, key) for key in ("samed", "batch_size", "steps", "device")}
    plan = [size for _ in range(options.rounds) for size in options.image_size]
    rounds = [fresh(__file__, image_size=size, **shared) for size in progress(plan, "SAMed, then ours")]
    figures: dict[str, Any] = {}
    for size in options.image_size:
        mine = [found for found, asked in zip(rounds, plan, strict=True) if asked == size]
        times = {name: [found["seconds"][name] for found in mine] for name in mine[0]["seconds"]}
        ratios = {
            f"SAMed over {name}": spread([a / b for a, b in zip(times["SAMed"], values, strict=True)])
            for name, values in times.items()
            if name != "SAMed"
        }
        figures[f"{size} px"] = {
            "trained parameters": mine[0]["trained"],
            "precision": mine[0]["precision"],
            "seconds a step": {name: spread(values) for name, values in times.items()},
            **ratios,
        }
    write(options, figures)


def measure(options: Namespace, size: int) -> dict[str, Any]:
    """Seconds a step of each; SystemExit where they do not start from the same embeddings."""
    runtime.use_cores()
    device = torch.device(options.device)
    works = [work_of(options.batch_size, size, seed).to(device) for seed in range(1 + options.steps)]
    theirs = Samed(options.samed, size, options.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = save_as_ours(theirs.tensors, size, Path(folder))
        with torch.no_grad():
            expected = theirs.network.sam.image_encoder(works[0].images)
        found = {"SAMed": median_seconds(theirs.step, works)}
        runtime.keep_freed_memory()
        for precision in ("fp32", "auto"):
            ours = learner(options, size, weights, precision)
            if precision == "fp32":
                agree(expected, ours, works[0])
            step = partial(ours.step, rate=ours.config.learning_rate)
            found[f"ours, {precision}"] = median_seconds(step, works)
    return {
        "seconds": found,
        "precision": ours.precision,
        "trained": {"SAMed": trained(theirs.network), "ours": trained(ours.segmenter)},
    }


class Samed:
    """SAMed's network and a step of its trainer."""

    def __init__(self, checkout: Path, size: int, device: str):
        if not (checkout / "sam_lora_image_encoder_mask_decoder.py").is_file():
            raise SystemExit(f"--samed {checkout} is no checkout of SAMed")
        sys.path.insert(0, str(checkout))  # before segment_anything of the environment: SAMed brings its own
        registry = originals.load("segment_anything").sam_model_registry
        self.size = size
        sam, _ = registry["vit_b"](image_size=size, num_classes=1, pixel_mean=[0, 0, 0], pixel_std=[1, 1, 1])
        with torch.no_grad():  # positions are zero without a checkpoint, and would not tell whether they arrive
            for name, tensor in sam.image_encoder.state_dict().items():
                if "pos" in name:
                    tensor.normal_(std=0.1)
        self.tensors = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
        lora = originals.load("sam_lora_image_encoder_mask_decoder").LoRA_Sam(sam, 4)
        self.network = lora.to(device).train()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.005, weight_decay=0.1)

    def step(self, work: Work) -> float:
        outputs = self.network(work.images, False, self.size)["low_res_logits"]  # (B, 2, S / 4, S / 4)
        loss = segmentation_loss(outputs[:, None], work.targets, CE_WEIGHT, DICE_WEIGHT)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def work_of(batch: int, size: int, seed: int) -> Work:
    """One click and one mask an image; the masks at the logits' size, which is a quarter of the input's."""
    work = made_up_batch(batch, 1, size, seed)
    return dataclasses.replace(work, targets=work.targets[..., 2::4, 2::4])


def save_as_ours(tensors: dict[str, torch.Tensor], size: int, folder: Path) -> Path:
    """SAMed's encoder and prompt encoder with a decoder of SAM's four tokens, as a checkpoint for the row `samed`."""
    build = partial(build_vit, VIT_B, AS_IS)
    BACKBONES["samed"] = dataclasses.replace(BACKBONES["sam-vit-b"], name="samed", build=build)
    state = random_state(build(size))
    own = our_names(tensors)
    state |= {name: tensor for name, tensor in own.items() if name in state and tensor.shape == state[name].shape}
    torch.save(to_transformers(state), folder / "random.pth")
    return folder / "random.pth"


def learner(options: Namespace, size: int, weights: Path, precision: str) -> Learner:
    values = {"backbone": "samed", "weights": str(weights), "image_size": size, "batch_size": options.batch_size}
    values |= {"prompts_per_image": 1, "device": options.device, "precision": precision}
    values |= {"ce_weight": CE_WEIGHT, "dice_weight": DICE_WEIGHT}
    config = build_config("cheap-lunch", values)
    return Learner(config, start_processes(config, Path("runs")))


@torch.no_grad()
def agree(expected: torch.Tensor, ours: Learner, work: Work) -> None:
    worst = (ours.segmenter.embed(work.images) - expected).abs().max().item()
    if not worst < TOLERANCE:
        raise SystemExit(f"SAMed and ours do not start from the same embeddings: they differ by {worst}")


def trained(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def median_seconds(step: Callable[[Work], Any], works: list[Work]) -> float:
    """The steps end with their loss as a number, so that a GPU has done them."""
    return statistics.median([seconds(partial(step, work)) for work in works][1:])


if __name__ == "__main__":
    main()
