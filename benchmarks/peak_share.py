"""The share of the machine's matrix-product peak that a training step reaches, and where the rest of its time goes.

peak     the fastest of `torch.matmul` on square matrices of several sizes, in the step's precision.
step     `cheaplunch.learner.Learner.step` as `finetune` takes it, in fp32 or bf16, whichever is faster here. Only
         operations that are executed count: multiplications and additions of matrix products, convolutions and
         attention, forward and backward, without the gradients that frozen weights never get. The counter is first
         tried on cases worked by hand.
plain    the forward pass of the encoder as published, in channels-last memory and the same precision, without
         gradients and before glibc is told to keep freed memory.

Peak and step are timed in turn, and so are peak and plain forward; a share is the median over such pairs. The profile
is of steps of their own, after the timed ones: each operation's own time, in groups.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, arguments, console, made_up_batch, published_network, seconds, spread, write
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cheaplunch import runtime
from cheaplunch.config import build_config
from cheaplunch.learner import Learner, Work, start_processes

# Part of an operation's name → its group; the first that fits counts.
GROUPS = {
    "attention softmax": ("softmax",),
    "fused attention": ("scaled_dot_product", "flash_attention"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear"),
    "convolutions": ("conv",),
    "gelu": ("gelu",),
    "norms": ("norm",),
    "copies and layout": ("copy", "clone", "contiguous", "pad", "cat", "repeat", "stack", "index", "fill", "zero"),
    "optimiser": ("adam", "Optimizer"),
    "elementwise": ("aten::add", "aten::mul", "aten::sub", "aten::div", "aten::neg", "aten::sum", "aten::mean"),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--image-size", type=int, default=256, metavar="PX")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N")
    parser.add_argument("--prompts", type=int, default=1, metavar="P", help="on each image (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of peak and step")
    parser.add_argument("--matmul", type=int, nargs="+", default=[1024, 2048, 4096], metavar="N", help="sizes tried")
    options = parser.parse_args()
    check_counter()
    runtime.use_cores()
    work = made_up_batch(options.batch_size, options.prompts, options.image_size, seed=0)

    with console.status("peaks of both precisions"):
        peaks = {name: fastest_matmul(dtype, options.matmul) for name, dtype in PRECISIONS.items()}
    with console.status("which precision steps faster"):
        times = {}
        for precision in PRECISIONS:
            step = stepper(options, work, precision)
            times[precision] = min(seconds(step) for _ in range(2))
        precision = min(times, key=times.__getitem__)
    size = peaks[precision]["size"]
    peak = Matmul(PRECISIONS[precision], size)

    with console.status("plain forward"):
        plain = plain_forward(work, precision, options.image_size)
        plain_shares = shares(peak, plain, count(plain), options.rounds)
    runtime.keep_freed_memory()
    with console.status("training step"):
        step = stepper(options, work, precision)
        step_flop = count(step)
        step_shares = shares(peak, step, step_flop, options.rounds)
    with console.status("profile"):
        groups, largest = where_time_goes(step)

    ours, reference = statistics.median(step_shares), statistics.median(plain_shares)
    result = {
        "precision": precision,
        "peak, GFLOP/s": {name: round(found["flop_per_s"] / 1e9, 1) for name, found in peaks.items()},
        "seconds a step, while choosing": {name: round(value, 3) for name, value in times.items()},
        "GFLOP a step, executed": round(step_flop / 1e9, 1),
        "share of peak, training step": spread(step_shares),
        "share of peak, plain encoder forward": spread(plain_shares),
        "step over plain forward": round(ours / reference, 3),
        "share of the step's time": groups,
        "largest operations": largest,
    }
    write(options, result)


# --- what is timed ---------------------------------------------------------------------------------------------------


class Matmul:
    """One square product, repeated until it is long enough to time."""

    def __init__(self, dtype: torch.dtype, size: int):
        self.size = size
        self.a, self.b = (torch.randn(size, size).to(dtype) for _ in range(2))
        self.repeats = 1
        self()
        self.repeats = max(1, round(0.3 / seconds(self)))

    @property
    def flop(self) -> int:
        return 2 * self.size**3 * self.repeats

    def __call__(self) -> None:
        for _ in range(self.repeats):
            torch.matmul(self.a, self.b)


def fastest_matmul(dtype: torch.dtype, sizes: list[int]) -> dict[str, Any]:
    found = []
    for size in sizes:
        product = Matmul(dtype, size)
        found.append({"flop_per_s": product.flop / min(seconds(product) for _ in range(3)), "size": size})
    return max(found, key=lambda one: one["flop_per_s"])


def stepper(options: Any, work: Work, precision: str) -> Callable[[], float]:
    """A training step that is warm."""
    config = build_config(
        "cheap-lunch",
        {
            "image_size": options.image_size,
            "batch_size": options.batch_size,
            "prompts_per_image": options.prompts,
            "precision": precision,
            "device": "cpu",
        },
    )
    learner = Learner(config, start_processes(config, Path("runs")))

    def step() -> float:
        return learner.step(work, config.training.learning_rate)

    step()
    return step


def plain_forward(work: Work, precision: str, image_size_px: int) -> Callable[[], torch.Tensor]:
    encoder = published_network(image_size_px).vision_encoder.to(memory_format=torch.channels_last)
    images = work.images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        with runtime.autocast(torch.device("cpu"), precision):
            return encoder(images)

    forward()
    return forward


def shares(peak: Matmul, timed: Callable[[], Any], flop: int, rounds: int) -> list[float]:
    pairs = alternate(peak, timed, rounds)
    return [(flop / mine) / (peak.flop / reference) for reference, mine in pairs]


# --- what is executed ------------------------------------------------------------------------------------------------


def count(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention that `run` executes."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {cpu_attention: attention_flop, attention_backward_op(): attention_backward_flop}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def attention_flop(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward_flop(grad, query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def attention_backward_op() -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def check_counter() -> None:
    """The counter on cases worked by hand; SystemExit where it is wrong. 2 operations a multiplication and addition."""
    x = torch.randn(2, 8, 6, 6, requires_grad=True)  # (B, C, H, W)
    one, grouped, wide = torch.randn(4, 8, 1, 1), torch.randn(8, 1, 3, 3), torch.randn(8, 4, 2, 2, requires_grad=True)
    matrix = torch.randn(5, 7, requires_grad=True)
    frozen, trained = torch.randn(7, 3), torch.randn(7, 3, requires_grad=True)
    bias, batch, other = torch.randn(3), torch.randn(2, 5, 7), torch.randn(2, 7, 3)
    q, k = (torch.randn(1, 2, length, 4, requires_grad=True) for length in (5, 7))
    by_hand: dict[str, tuple[Callable[[], torch.Tensor], int, int]] = {  # what, forward, forward and backward
        "mm": (lambda: matrix @ frozen, 2 * 5 * 7 * 3, 2 * 2 * 5 * 7 * 3),
        "mm, weights trained too": (lambda: matrix @ trained, 2 * 5 * 7 * 3, 3 * 2 * 5 * 7 * 3),
        "addmm": (lambda: torch.addmm(bias, matrix, frozen), 2 * 5 * 7 * 3, 2 * 2 * 5 * 7 * 3),
        "bmm": (lambda: batch * matrix.sum() @ other, 2 * 2 * 5 * 7 * 3, 2 * 2 * 2 * 5 * 7 * 3),
        "baddbmm": (
            lambda: torch.baddbmm(bias, batch * matrix.sum(), other),
            2 * 2 * 5 * 7 * 3,
            2 * 2 * 2 * 5 * 7 * 3,
        ),
        "1 x 1 convolution": (lambda: F.conv2d(x, one), 2 * 2 * 36 * 8 * 4, 2 * 2 * 2 * 36 * 8 * 4),
        "depthwise convolution": (
            lambda: F.conv2d(x, grouped, padding=1, groups=8),
            2 * 2 * 36 * 8 * 9,
            2 * 2 * 2 * 36 * 8 * 9,
        ),
        "transposed convolution, trained": (
            lambda: F.conv_transpose2d(x, wide, stride=2),
            2 * 2 * 36 * 8 * 4 * 4,
            3 * 2 * 2 * 36 * 8 * 4 * 4,
        ),
        # two products forward; backward computes the scores again, then four products
        "attention": (lambda: F.scaled_dot_product_attention(q, k, k), 2 * 2 * 2 * 5 * 7 * 4, 7 * 2 * 2 * 5 * 7 * 4),
    }
    for name, (run, forward, both) in by_hand.items():
        found = count(run), count(lambda run=run: run().sum().backward())
        if found != (forward, both):
            raise SystemExit(f"the counter says {found} for {name}, by hand it is {(forward, both)}")


# --- where the time goes ---------------------------------------------------------------------------------------------


def where_time_goes(step: Callable[[], Any], steps: int = 2) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the step's time by group of operations, and the largest single operations."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(own.values())
    groups: Counter[str] = Counter()
    for name, time in own.items():
        fits = (group for group, parts in GROUPS.items() if any(part in name for part in parts))
        groups[next(fits, "rest")] += time
    ordered = sorted(own.items(), key=lambda item: -item[1])[:15]
    return (
        {group: round(time / total, 4) for group, time in groups.most_common()},
        {name: round(time / total, 4) for name, time in ordered},
    )


if __name__ == "__main__":
    main()
