"""Training images a second: ours over a plain loop, the same model, batch and process.

ours   `cheaplunch.learner.Learner` as `finetune` uses it: batch norms folded, channels-last memory, bf16 where
       `--precision auto` says so, peft's cast off, fused AdamW, and glibc told to keep freed memory.
plain  fp32 over the network as published: batch norms as they are, contiguous (B, C, H, W) memory, peft's LoRA with
       its defaults, AdamW with its defaults, glibc as it comes.

Both train the same tensors (LoRA of rank 4 on q and v, the decoder's outputs) on images that already lie in memory;
q, k and v are three projections in both, because LoRA on q and v needs that. glibc's setting cannot be taken back, so
each round is a process of its own that times plain first and ours after; a round's figure is the median of its steps,
the result the median of the rounds' ratios. Before it is timed, each takes a gradient in fp32: loss and gradients
must agree, or there is no result.
"""

from __future__ import annotations

import json
import statistics
from argparse import Namespace
from pathlib import Path

import torch
from common import arguments, fresh, made_up_batch, progress, published_network, seconds, spread, write
from peft import LoraConfig, get_peft_model

from cheaplunch import runtime
from cheaplunch.config import RunConfig, build_config
from cheaplunch.learner import Learner, Work, start_processes
from cheaplunch.losses import segmentation_loss
from cheaplunch.models.heads import make_two_outputs, trained_modules
from cheaplunch.models.lora import DECODER_QV, ENCODER_QV
from cheaplunch.models.segmenter import Segmenter

TOLERANCE = 1e-3  # relative, of the first loss and of the norm of the gradients


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--image-size", type=int, default=256, metavar="PX")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4], metavar="P", help="on each image; one by one")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="processes for each number of prompts")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed in each process, after two to warm up")
    parser.add_argument("--worker", action="store_true", help="be one of those processes")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options, options.prompts[0])))
        return
    shared = {"image_size": options.image_size, "batch_size": options.batch_size, "steps": options.steps}
    plan = [prompts for _ in range(options.rounds) for prompts in options.prompts]
    rounds = [fresh(__file__, prompts=prompts, **shared) for prompts in progress(plan, "plain, then ours")]
    figures = {}
    for prompts in options.prompts:
        mine = [found for found, asked in zip(rounds, plan, strict=True) if asked == prompts]
        figures[f"{prompts} prompts an image"] = {
            "ours over plain": spread([found["ours"] / found["plain"] for found in mine]),
            "images a second, ours": spread([found["ours"] for found in mine]),
            "images a second, plain": spread([found["plain"] for found in mine]),
        }
    agreement = {key: rounds[0][key] for key in ("precision", "first_loss", "gradient_norm")}
    write(options, {**agreement, "figures": figures})


def measure(options: Namespace, prompts: int) -> dict:
    """Images a second of both; SystemExit where they do not compute the same."""
    runtime.use_cores()
    size, batch = options.image_size, options.batch_size
    works = [made_up_batch(batch, prompts, size, seed) for seed in range(2 + options.steps)]
    config = build_config(
        "cheap-lunch",
        {"image_size": size, "batch_size": batch, "prompts_per_image": prompts, "device": "cpu"},
    )
    plain = Plain(config)
    check = {"plain": first_gradient(plain.segmenter, works[0], config)}
    speed = {"plain": images_per_s(plain.step, works)}

    runtime.keep_freed_memory()
    ours = Learner(config, start_processes(config, Path("runs")))
    check["ours"] = first_gradient(ours.segmenter, works[0], config)
    for what, (a, b) in zip(("loss", "norm of the gradients"), zip(*check.values(), strict=True), strict=True):
        if abs(a - b) > TOLERANCE * abs(a):
            raise SystemExit(f"plain and ours compute different things: {what} {a} and {b}")
    speed["ours"] = images_per_s(lambda work: ours.step(work, config.training.learning_rate), works)
    loss, norm = ({name: pair[i] for name, pair in check.items()} for i in (0, 1))
    return {**speed, "precision": ours.precision, "first_loss": loss, "gradient_norm": norm}


class Plain:
    """The loop one would write first."""

    def __init__(self, config: RunConfig):
        self.config = config
        network = published_network(config.model.image_size or 256)
        torch.manual_seed(config.seed)
        make_two_outputs(network)
        lora = LoraConfig(
            r=config.model.lora_rank,
            lora_alpha=config.model.lora_rank,
            target_modules=f"({ENCODER_QV})|({DECODER_QV})",
            modules_to_save=trained_modules("two"),
        )
        self.segmenter = Segmenter(get_peft_model(network, lora), "two", config.model.image_size or 256)
        trained = [p for p in self.segmenter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.training.learning_rate)

    def step(self, work: Work) -> float:
        loss = loss_of(self.segmenter, work, self.config)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def loss_of(segmenter: Segmenter, work: Work, config: RunConfig) -> torch.Tensor:
    outputs = segmenter(work.images, work.prompts)  # (B, P, 2, S, S)
    return segmentation_loss(outputs, work.targets, config.training.ce_weight, config.training.dice_weight)


def first_gradient(segmenter: Segmenter, work: Work, config: RunConfig) -> tuple[float, float]:
    """Loss and norm of the trained tensors' gradients in fp32; leaves nothing behind."""
    loss = loss_of(segmenter, work, config)
    loss.backward()
    gradients = [p.grad for p in segmenter.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    segmenter.zero_grad()
    return loss.item(), norm.item()


def images_per_s(step, works: list[Work]) -> float:
    times = [seconds(lambda work=work: step(work)) for work in works]
    return len(works[0].images) / statistics.median(times[2:])


if __name__ == "__main__":
    main()
