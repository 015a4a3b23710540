"""Each backbone beside its original: parameters, arithmetic, and time of an image and of a prompt, by input size.

Both hold the same random weights and work on the same image in fp32, with torch's threads and memory as they come;
before they are timed, embeddings and logits must agree, or there is no result. Times are taken in turn.
GFLOP count a multiplication and an addition as two, of matrix products and convolutions alone, padding included.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import originals
import torch
from common import alternate, arguments, progress, seconds, spread, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cheaplunch import runtime
from cheaplunch.models.backbones import BACKBONES, load_backbone
from cheaplunch.models.sam import Sam

TOLERANCE = 1e-3
NAMES = [name for name in BACKBONES if name != "tiny-random"]


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--backbones", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], metavar="PX")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    options = parser.parse_args()
    runtime.use_cores()
    plan = [(name, size) for name in options.backbones for size in sizes_of(name, options)]
    found: dict[str, dict[str, Any]] = {name: {"parameters": parameters(name)} for name in options.backbones}
    for name, size in progress(plan, "backbone by backbone"):
        found[name][f"{size} px"] = {**gigaflop(name, size), **times(name, size, options.rounds)}
    write(options, found)


def sizes_of(name: str, options: Namespace) -> list[int]:
    """LiteMedSAM's patches are single pixels: beyond its own 256 px it costs what no one would pay."""
    return [size for size in options.sizes if name != "lite-medsam" or size <= BACKBONES[name].image_size_px]


def parameters(name: str) -> dict[str, int]:
    network = BACKBONES[name].build(BACKBONES[name].training_size_px)
    parts = {"encoder": network.vision_encoder, "prompt encoder": network.prompt_encoder}
    parts["decoder"] = network.mask_decoder
    return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}


@torch.no_grad()
def gigaflop(name: str, size: int) -> dict[str, float]:
    """Of the encoder for one image and of the decoder for one point on it; what they compute does not matter."""
    network = BACKBONES[name].build(size).requires_grad_(False)
    encoder = network.vision_encoder.to("meta").eval()  # nothing is computed at all
    network.prompt_encoder.to_empty(device="cpu")
    network.mask_decoder.to_empty(device="cpu")
    cells = network.prompt_encoder.image_embedding_size
    embedding, click = torch.ones(1, 256, *cells), (torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1))
    work = {
        "encoder, GFLOP": lambda: encoder(torch.empty(1, 3, size, size, device="meta")),
        "decoder, GFLOP": lambda: network.decode(embedding, *click),
    }
    found = {}
    for part, compute in work.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
            compute()
        found[part] = round(counter.get_total_flops() / 1e9, 2)
    return found


@torch.inference_mode()
def times(name: str, size: int, rounds: int) -> dict[str, Any]:
    """Beside the original; without it where it is written for its one size, as the TinyViTs are."""
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    point = torch.tensor([size / 3, size / 2])
    click = (point[None, None, None], torch.ones(1, 1, 1))
    theirs = original(name, size if name in originals.VITS else BACKBONES[name].image_size_px)
    ours = as_ours(name, size, theirs)
    embedding = ours.encode(image)
    if name not in originals.VITS and size != BACKBONES[name].image_size_px:
        encoding = [seconds(lambda: ours.encode(image)) for _ in range(rounds)]
        decoding = [seconds(lambda: ours.decode(embedding, *click)) for _ in range(rounds)]
        return {"encoder": {"ours, ms": in_ms(encoding)}, "decoder, one point": {"ours, ms": in_ms(decoding)}}

    # Normalising is a thousandth of the work and is done outside of the original's encoder.
    pixels = (image - ours.pixel_mean) / ours.pixel_std
    expected = theirs.image_encoder(pixels)
    agree(name, size, expected, embedding)
    agree(name, size, originals.decode(theirs, expected, point), ours.decode(embedding, *click)[0])
    encoding = alternate(lambda: theirs.image_encoder(pixels), lambda: ours.encode(image), rounds)
    decoding = alternate(
        lambda: originals.decode(theirs, expected, point), lambda: ours.decode(embedding, *click), rounds
    )
    return {"encoder": figures(encoding), "decoder, one point": figures(decoding)}


def original(name: str, size: int) -> Any:
    """With every tensor random, positions too, so that agreement means something."""
    network = originals.build(name, size)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not key.endswith(("gaussian_matrix", "running_var")):
            scale = 0.1 if tensor.ndim < 2 or "pos" in key else tensor[0].numel() ** -0.5
            base = float(tensor.ndim == 1 and key.endswith("weight"))
            tensor.copy_(base + scale * torch.randn(tensor.shape, generator=generator))
    return network.train().eval()  # MobileSAM's attention keeps its biases from the last change of mode


def as_ours(name: str, size: int, theirs: torch.nn.Module) -> Sam:
    """The tensors of `theirs` in our network, by the way that a checkpoint takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save(theirs.state_dict(), path)
        return load_backbone(name, size, path)


def agree(name: str, size: int, expected: torch.Tensor, found: torch.Tensor) -> None:
    worst = (found.reshape(expected.shape) - expected).abs().max().item()
    if not worst < TOLERANCE:
        raise SystemExit(f"{name} at {size} px computes something else than its original: they differ by {worst}")


def figures(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    theirs, ours = zip(*pairs, strict=True)
    return {
        "original, ms": in_ms(theirs),
        "ours, ms": in_ms(ours),
        "original over ours": spread([a / b for a, b in pairs]),
    }


def in_ms(times: Sequence[float]) -> dict[str, Any]:
    return spread([1000 * value for value in times])


if __name__ == "__main__":
    main()
