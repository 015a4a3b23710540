"""A network as two ONNX graphs: an image once, prompts as often as wanted. They run without torch.

What goes in and comes out, for `onnxruntime`:

    encoder.onnx   image (B, 3, S, S) float32 in [0, 1]              → embedding (B, 256, h, w)
    decoder.onnx   embedding (1, 256, h, w)
                   points (1, P, K, 2) float32, (x, y) in px of the S × S input
                   labels (1, P, K) int64: 1 on the target, 0 off it, 2 and 3 a box's first and last corner, -1 none
                   mask (1, P, 4 h, 4 w) float32, the logits that were given before
                   has_mask (1,) float32: 1, or 0 where there is none, whatever `mask` holds
                                                                     → logits (1, P, 4 h, 4 w) of the target

B, P and K are free. SAM ends a prompt without a box in one point that is none, label -1, as it does in training: the
caller gives it, wherever it is. Padding of the image has the colour `padding`, which the network takes for zero.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionEncoder

from cheaplunch.errors import UserError
from cheaplunch.models.heads import foreground_logit
from cheaplunch.models.portable import sam_of
from cheaplunch.models.sam import AS_IS, Sam, as_sam_model
from cheaplunch.models.segmenter import Segmenter
from cheaplunch.prompts import Prompts

OPSET = 18
TOLERANCE = 1e-3
"""How far a graph's logits may be from torch's."""
_INTO_ONE_FILE_BYTES = 1_500_000_000  # protobuf ends at 2 GB; above, the weights lie in a file beside the graph


class Encoder(nn.Module):
    """Image → embedding."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Sam):
        super().__init__()
        self.norm = network.norm
        self.register_buffer("mean", network.pixel_mean)
        self.register_buffer("std", network.pixel_std)
        vit = isinstance(network.vision_encoder, SamVisionEncoder)
        # Our own attention asks for the batch's length as a number, which fixes it in the graph.
        self.encoder: nn.Module = as_sam_model(network).vision_encoder if vit else network.vision_encoder

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, h, w)."""
        if self.norm != AS_IS:
            image = (image - self.mean) / self.std
        embedding = self.encoder(image)
        return embedding if isinstance(embedding, Tensor) else embedding.last_hidden_state


class Decoder(nn.Module):
    """Embedding and prompts → logits of the target. What transformers' prompt encoder does, for every kind at once."""

    kinds: Tensor
    no_mask: Tensor
    positions: Tensor

    def __init__(self, network: Sam, multimask: bool, image_size_px: int):
        super().__init__()
        encoder: Any = network.prompt_encoder
        self.multimask = multimask
        self.image_size_px = image_size_px
        self.fourier = encoder.shared_embedding
        self.mask_embed = encoder.mask_embed
        self.decoder = network.mask_decoder
        kinds = [encoder.not_a_point_embed.weight, *(kind.weight for kind in encoder.point_embed)]
        self.register_buffer("kinds", torch.cat(kinds))  # (5, 256), by label + 1
        self.register_buffer("no_mask", encoder.no_mask_embed.weight[:, :, None, None])  # (1, 256, 1, 1)
        self.register_buffer("positions", network.positions())

    def forward(self, embedding: Tensor, points: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor) -> Tensor:
        """As the file's head says; every prompt is taken as an image of its own, so that each may have a mask."""
        count = points.shape[1]
        places = self.fourier((points + 0.5) / self.image_size_px)  # (1, P, K, 256)
        places = torch.where(labels[..., None] == -1, 0.0, places)
        dense = torch.where(has_mask > 0, self.mask_embed(mask.transpose(0, 1)), self.no_mask)  # (P, 256, h, w)
        outputs, _ = self.decoder(
            image_embeddings=embedding.expand(count, -1, -1, -1),
            image_positional_embeddings=self.positions.expand(count, -1, -1, -1),
            sparse_prompt_embeddings=(places + self.kinds[labels + 1]).transpose(0, 1),  # (P, 1, K, 256)
            dense_prompt_embeddings=dense,
            multimask_output=self.multimask,
        )  # (P, 1, O, 4 h, 4 w)
        return foreground_logit(outputs[:, :, :2]).transpose(0, 1)


def export_onnx(segmenter: Segmenter, encoder: Path, decoder: Path, about: dict[str, Any]) -> None:
    """Writes both graphs, with `about` as metadata, and runs each beside torch.

    Raises UserError where a package is missing, RuntimeError where the graphs' logits are not the network's.
    """
    require_packages()
    network = sam_of(segmenter)
    side = segmenter.image_size_px
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, side, side, generator=generator)
    said = about | {"image_size_px": side, "padding": network.norm.mean, "opset": OPSET}
    with torch.no_grad():
        embeddings = segmenter.embed(images)
        prompts = _example(4 * embeddings.shape[-1], side, generator)
        _write(Encoder(network), {"image": images}, {"image": {0: "images"}}, "embedding", encoder, said)
        free = {1: "prompts", 2: "points"}
        axes = {"embedding": {}, "points": free, "labels": free, "mask": {1: "prompts"}, "has_mask": {}}
        graph = Decoder(network, segmenter.head == "two", side)
        _write(graph, {"embedding": embeddings[:1], **prompts}, axes, "logits", decoder, said)
        answer = Prompts(prompts["points"][:, :, :2], prompts["labels"][:, :, :2], masks=prompts["mask"])
        expected = segmenter.foreground(embeddings[:1], answer).numpy()
    found = _run(decoder, {"embedding": _run(encoder, {"image": images[:1].numpy()}), **_arrays(prompts)})
    if (off := float(np.abs(found - expected).max())) > TOLERANCE:
        raise RuntimeError(f"the ONNX graphs' logits are {off:.2g} away from the network's; more than {TOLERANCE:g}")


def require_packages() -> None:
    """Raises UserError where one of the packages that the extra `export` brings is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}; run `pip install 'cheaplunch[export]'`") from error


def _example(mask_side: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Three prompts of two points and their end, with a mask each."""
    points = torch.rand(1, 3, 3, 2, generator=generator) * side
    return {
        "points": points,
        "labels": torch.tensor([[[1, 0, -1], [1, 1, -1], [0, 1, -1]]]),
        "mask": torch.randn(1, 3, mask_side, mask_side, generator=generator),
        "has_mask": torch.ones(1),
    }


def _write(
    graph: nn.Module,
    inputs: dict[str, Tensor],
    axes: dict[str, dict[int, str]],
    output: str,
    path: Path,
    about: dict[str, Any],
) -> None:
    """One graph into one file (and `path`.data where it is too large), without a word of the machine it was made on."""
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # of names that torch itself deprecates, and of torchvision, which is not here
        program: Any = torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple(axes.values()),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model
    for part in (model.graph, *model.functions.values()):  # each node says from which file and line it comes
        part.metadata_props.clear()
        part.doc_string = None
        for node in part.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    program.save(path, external_data=size > _INTO_ONE_FILE_BYTES)


def _run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


class _quiet:
    """For as long as the block lasts, a logger says errors alone."""

    def __init__(self, name: str):
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.before = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.before)
