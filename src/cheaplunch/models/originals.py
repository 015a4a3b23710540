"""Our network as the original packages hold it, so that their code opens it.

segment-anything's for a ViT; MobileSAM's and LiteMedSAM's for a TinyViT, which are alike. Names are ours to the last.
"""

from __future__ import annotations

import torch

from cheaplunch.models.heads import BACKGROUND, TARGET, Head
from cheaplunch.models.layouts import State, original_names
from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import TinyViT

_NORM_EPS = 1e-5  # of the batch norms in a TinyViT
_IMAGENET_CLASSES = 1000

MASK_TOKENS = {"two": (TARGET, BACKGROUND, 0, 3), "single": (0, 1, 2, 3)}
"""Head → which of our tokens stands in each place of SAM's four. The target takes that of SAM's single mask.

Tokens carry no order: all that follows from moving them is which output comes when.
"""


def to_original(network: Sam, head: Head) -> State:
    """A merged network → the state dict that the original's own code loads, tensors shared where they are the same.

    With two outputs, `multimask_output=False` is then the target's logit, the first mask of `multimask_output=True`
    the background's, and what we predict from is their difference. No file of this layout can hold that difference as
    one mask: each is a small MLP of its own token's state, and after the decoder's last self-attention no token's
    state knows of another's.
    """
    state = _reordered(network.state_dict(), MASK_TOKENS[head])
    if isinstance(network.vision_encoder, TinyViT):
        state = _with_norms(state)
        if network.vision_encoder.config.patch_stride == 4:
            state |= _classifier(network.vision_encoder.config.embed_dims[-1])
    return {name: tensor.detach().cpu().contiguous() for name, tensor in original_names(state).items()}


def _reordered(state: State, order: tuple[int, ...]) -> State:
    """The decoder's four mask tokens, with what belongs to each, in another order."""
    hypernetworks = "mask_decoder.output_hypernetworks_mlps."
    moved = {}
    for name, tensor in state.items():
        if name.startswith(hypernetworks):
            token, _, rest = name.removeprefix(hypernetworks).partition(".")
            moved[f"{hypernetworks}{order.index(int(token))}.{rest}"] = tensor
        elif name == "mask_decoder.mask_tokens.weight" or ".iou_prediction_head.proj_out." in name:
            moved[name] = tensor[list(order)]
        else:
            moved[name] = tensor
    return moved


def _with_norms(state: State) -> State:
    """A TinyViT with the batch norms that its convolutions have absorbed, now adding the bias and nothing else."""
    full: State = {}
    for name, tensor in state.items():
        if not name.endswith(".c.bias"):
            full[name] = tensor
            continue
        norm = f"{name.removesuffix('c.bias')}bn."
        gain = torch.full_like(tensor, (1 + _NORM_EPS) ** 0.5)  # over the root of variance + eps: 1
        full |= {f"{norm}weight": gain, f"{norm}bias": tensor}
        full |= {f"{norm}running_mean": torch.zeros_like(tensor), f"{norm}running_var": torch.ones_like(tensor)}
        full[f"{norm}num_batches_tracked"] = torch.tensor(0)
    return full


def _classifier(width: int) -> State:
    """Zeros for the ImageNet classifier that MobileSAM's code builds, loads and never calls."""
    shapes = {"norm_head.weight": (width,), "norm_head.bias": (width,)}
    shapes |= {"head.weight": (_IMAGENET_CLASSES, width), "head.bias": (_IMAGENET_CLASSES,)}
    return {f"vision_encoder.{name}": torch.zeros(shape) for name, shape in shapes.items()}
