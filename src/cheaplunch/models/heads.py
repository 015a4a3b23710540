"""What the mask decoder gives out: SAM's one mask, background and target (Cheap Lunch §2.2), or all classes (SAMed)."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamMaskDecoder

from cheaplunch.models.sam import Sam

Head = Literal["single", "best", "two", "classes"]
"""SAM's mask 0, the best of its other three, background and target of each prompt, or background and every class."""

# Where the two outputs sit among SAM's four mask tokens, and which old token each place takes over.
# `multimask_output=True` returns tokens 1 to 3, so background and target must be among them.
SPARE, BACKGROUND, TARGET = 0, 1, 2
_OLD_TOKEN = (3, 1, 0, 2)


@torch.no_grad()
def make_two_outputs(network: Sam, start: Literal["pretrained", "fresh"] = "pretrained") -> None:
    """Rearranges the decoder's tokens in place so that outputs 1 and 2 are background and target.

    The four tokens attend to one another, so none may go (dropping any ruins the pretraining); their
    order carries no meaning, so they may be permuted. With `pretrained`, the target takes SAM's single-mask
    token and the background's last layer is zero: softmax over (0, t) is sigmoid(t), and training
    starts exactly at the zero-shot model. With `fresh`, both outputs start at random as SAMed's do.
    """
    decoder: Any = network.mask_decoder
    order = list(_OLD_TOKEN)
    decoder.mask_tokens.weight.copy_(decoder.mask_tokens.weight[order].clone())
    decoder.output_hypernetworks_mlps = torch.nn.ModuleList(decoder.output_hypernetworks_mlps[i] for i in order)
    quality = decoder.iou_prediction_head.proj_out
    quality.weight.copy_(quality.weight[order].clone())
    quality.bias.copy_(quality.bias[order].clone())
    for token in (BACKGROUND, TARGET):
        mlp: Any = decoder.output_hypernetworks_mlps[token]
        if start == "fresh":
            for layer in (mlp.proj_in, *mlp.layers, mlp.proj_out):
                layer.reset_parameters()
            torch.nn.init.normal_(decoder.mask_tokens.weight[token])
        elif token == BACKGROUND:
            mlp.proj_out.weight.zero_()
            mlp.proj_out.bias.zero_()


class ClassDecoder(SamMaskDecoder):
    """SAM's mask decoder with a token a class and one for the background, all of which are outputs, and no prompts.

    transformers' own gives either token 0 or the others. SAMed's gives all, token 0 being the background.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_embeddings: Tensor,
        image_positional_embeddings: Tensor,
        sparse_prompt_embeddings: None,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 256, h, w) and the embedding of "no mask" → logits (B, 1, K + 1, 4 h, 4 w), IoU (B, 1, K + 1).

        The other two are there for the sake of SAM's interface.
        """
        batch, _, height, width = image_embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (K + 2, 256)
        answers, seen = self.transformer(
            point_embeddings=tokens.expand(batch, 1, -1, -1),
            image_embeddings=image_embeddings + dense_prompt_embeddings,
            image_positional_embeddings=image_positional_embeddings,
            attention_similarity=None,
            target_embedding=None,
        )  # (B, 1, K + 2, 256), (B, 1, h · w, 256)
        seen = seen.transpose(2, 3).reshape(batch, -1, height, width)
        features = self.activation(self.upscale_layer_norm(self.upscale_conv1(seen)))
        features = self.activation(self.upscale_conv2(features))  # (B, 32, 4 h, 4 w)
        kernels = [mlp(answers[:, 0, 1 + k]) for k, mlp in enumerate(self.output_hypernetworks_mlps)]  # (B, 32) each
        masks = torch.einsum("bkc,bchw->bkhw", torch.stack(kernels, dim=1), features)
        return masks[:, None], self.iou_prediction_head(answers[:, :, 0])


def make_class_outputs(network: Sam, classes: int) -> None:
    """Gives the network, in place, an output a class beside the background's.

    As in SAMed, mask tokens, hypernetworks and the IoU head start at random and the rest stays pretrained.
    """
    old: Any = network.mask_decoder
    config = copy.deepcopy(old.config)
    config.num_multimask_outputs = classes  # beside token 0
    new = ClassDecoder(config)
    for part in ("iou_token", "transformer", "upscale_conv1", "upscale_layer_norm", "upscale_conv2"):
        setattr(new, part, getattr(old, part))
    _replace_decoder(network, new)


class LinearProbe(nn.Module):
    """In place of the mask decoder: one 1 × 1 convolution of the embedding, upsampled as the decoder would."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.outputs = nn.Conv2d(width, outputs, 1)

    def forward(self, image_embeddings: Tensor, **_: object) -> tuple[Tensor, None]:
        """(B, 256, h, w) → logits (B, 1, K + 1, 4 h, 4 w), and no predicted IoU."""
        return F.interpolate(self.outputs(image_embeddings), scale_factor=4, mode="bilinear")[:, None], None


def make_linear_probe(network: Sam, classes: int) -> None:
    """Puts a linear layer with an output a class, and one for the background, in the mask decoder's place."""
    _replace_decoder(network, LinearProbe(network.mask_decoder.hidden_size, classes + 1))


def _replace_decoder(network: Any, decoder: nn.Module) -> None:
    network.mask_decoder = decoder.eval().requires_grad_(False)


def trained_modules(head: Head, training_prompts: str = "point", classes: int = 0) -> list[str]:
    """Names, below the network, of the modules trained in full beside the LoRA layers.

    As SAMed_s: everything of the decoder but its transformer, and the prompt encoder's embeddings. Of a prompted
    network, what no loss reaches stays as it was: the spare tokens' networks, the IoU head, and of the prompt encoder
    what `training_prompts` (point, box, clicks or text) do not use. Of a prompt-free one all is trained, reached or
    not, so that it is SAMed's.
    """
    decoder = ["iou_token", "mask_tokens", "upscale_conv1", "upscale_layer_norm", "upscale_conv2"]
    decoder += ["iou_prediction_head"] if head == "classes" else []
    outputs = range(classes + 1) if head == "classes" else (BACKGROUND, TARGET)
    decoder += [f"output_hypernetworks_mlps.{token}" for token in outputs]
    prompts = [*_PROMPT_MODULES[training_prompts], "no_mask_embed"]
    texts = ["text_projection"] if training_prompts == "text" else []
    return [*(f"prompt_encoder.{name}" for name in prompts), *(f"mask_decoder.{name}" for name in decoder), *texts]


_PROMPT_MODULES = {
    "point": ("point_embed.1", "not_a_point_embed"),
    "box": ("point_embed.2", "point_embed.3"),
    "clicks": ("point_embed.0", "point_embed.1", "not_a_point_embed", "mask_embed"),
    "text": (),
    "none": (*(f"point_embed.{kind}" for kind in range(4)), "not_a_point_embed", "mask_embed"),
}
"""Kind of prompts → what of the prompt encoder they use: points off and on the target, the corners of boxes, a pad."""


def foreground_logit(outputs: Tensor) -> Tensor:
    """(…, O, H, W) outputs → (…, H, W) logit of the target; its sigmoid is the softmax over two outputs."""
    return outputs[..., 0, :, :] if outputs.shape[-3] == 1 else outputs[..., 1, :, :] - outputs[..., 0, :, :]


def best_mask(logits: Tensor, quality: Tensor) -> Tensor:
    """(B, P, O, H, W) masks and their predicted IoU (B, P, O) → the best of each prompt (B, P, 1, H, W)."""
    best = quality.argmax(dim=2)[:, :, None, None, None]  # (B, P, 1, 1, 1)
    return logits.take_along_dim(best, dim=2)
