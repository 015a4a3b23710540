"""Our attention against transformers', on the same tensors: values, gradients, and what it saves."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from cheaplunch.models.vit import Attention, with_own_attention


def _pair(cells: int, window: int, seed: int = 0) -> tuple[SamVisionEncoder, SamVisionEncoder]:
    """The same two blocks, one in windows and one over the image: theirs, and ours."""
    config = SamVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        global_attn_indexes=[1],
        window_size=window,
        image_size=16 * cells,
        output_channels=8,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    theirs = SamVisionEncoder(config).eval()
    for parameter in theirs.parameters():  # positions start as zeros, and norms as ones
        torch.nn.init.normal_(parameter, std=0.3)
    ours = with_own_attention(copy.deepcopy(theirs))
    for their_layer, our_layer in zip(theirs.layers, ours.layers, strict=True):
        qkv, split = their_layer.attn.qkv, our_layer.attn.qkv
        for part, weight, bias in zip("qkv", qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            linear = getattr(split, f"{part}_proj")
            linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
    return theirs, ours


@pytest.mark.parametrize(
    ("cells", "window"),
    [
        (6, 3),  # whole windows
        (7, 3),  # a row and a column over
        (4, 14),  # one window larger than the image
        (16, 14),  # SAM at 256 px: two over
        (5, 4),
    ],
)
def test_the_same_numbers_and_gradients_as_transformers(cells, window):
    theirs, ours = _pair(cells, window)
    images = torch.randn(2, 3, 16 * cells, 16 * cells)
    expected, found = theirs(images).last_hidden_state, ours(images).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # another kernel
        torch.testing.assert_close(ours(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)

    way = torch.randn_like(expected)
    for output in (expected, found):
        (output * way).sum().backward()
    for their_layer, our_layer in zip(theirs.layers, ours.layers, strict=True):
        for part, grad in zip("qkv", their_layer.attn.qkv.weight.grad.chunk(3), strict=True):
            ours_ = getattr(our_layer.attn.qkv, f"{part}_proj").weight.grad
            torch.testing.assert_close(ours_, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())
        for name in ("rel_pos_h", "rel_pos_w"):
            expected_grad = getattr(their_layer.attn, name).grad
            found_grad = getattr(our_layer.attn, name).grad
            torch.testing.assert_close(
                found_grad, expected_grad, rtol=1e-4, atol=1e-4 * expected_grad.abs().max().item()
            )


def test_cells_beyond_the_image_cost_nothing():
    """One window of 14 × 14 that shows 4 × 4 cells: 16 tokens are projected, and the one beyond; not 196."""
    theirs, ours = _pair(4, 14)
    x = torch.randn(1, 4, 4, 24)
    attention: Attention = ours.layers[0].attn
    with FlopCounterMode(display=False) as count, torch.no_grad():
        attention.qkv(x)
        attention.proj(x)
    projected = count.get_total_flops()
    with FlopCounterMode(display=False) as count, torch.no_grad():
        attention(x)
    assert projected == 4 * 2 * 16 * 24 * 24
    assert count.get_total_flops() < 2 * projected
    with FlopCounterMode(display=False) as count, torch.no_grad():
        theirs.layers[0](x)
    assert count.get_total_flops() > 4 * 2 * 196 * 24 * 24
