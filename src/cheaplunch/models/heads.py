"""What the mask decoder gives out: SAM's one mask, or background and target as in Cheap Lunch §2.2."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from cheaplunch.models.sam import Sam

Head = Literal["single", "two"]

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


def trained_modules(head: Head) -> list[str]:
    """Names, below the network, of the modules trained in full beside the LoRA layers.

    As SAMed_s: everything of the decoder but its transformer, and the prompt encoder's embeddings. What no loss
    reaches stays as it was: the spare tokens' networks, the IoU head, the embeddings of boxes and of points off the
    target, the mask prompt's convolutions.
    """
    outputs = (BACKGROUND, TARGET) if head == "two" else (0,)
    return [
        "prompt_encoder.point_embed.1",
        "prompt_encoder.not_a_point_embed",
        "prompt_encoder.no_mask_embed",
        "mask_decoder.iou_token",
        "mask_decoder.mask_tokens",
        "mask_decoder.upscale_conv1",
        "mask_decoder.upscale_layer_norm",
        "mask_decoder.upscale_conv2",
        *(f"mask_decoder.output_hypernetworks_mlps.{token}" for token in outputs),
    ]


def foreground_logit(outputs: Tensor) -> Tensor:
    """(…, O, H, W) outputs → (…, H, W) logit of the target; its sigmoid is the softmax over two outputs."""
    return outputs[..., 0, :, :] if outputs.shape[-3] == 1 else outputs[..., 1, :, :] - outputs[..., 0, :, :]
