"""TransUNet, narrow: its parts against worked values and PyTorch's own; at full width, its published size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cheaplunch.models.transunet import Layer, ResNet, StdConv2d, TransUNet, TransUNetConfig, ViT

NARROW = TransUNetConfig(width=32, units=(1, 2, 1), hidden=48, layers=2, heads=4, decoder=(64, 32, 16, 16, 8))


def _narrow(size: int = 32, seed: int = 0) -> TransUNet:
    torch.manual_seed(seed)
    return TransUNet(3, size, NARROW)


def test_its_published_size():
    """The parameters of R50-ViT-B_16 for nine outputs at 224 px, added up by hand."""

    def unit(inputs, outputs):
        middle = outputs // 4
        convolutions = inputs * middle + 9 * middle**2 + middle * outputs
        shortcut = inputs * outputs + 2 * outputs if inputs != outputs else 0
        return convolutions + 2 * (middle + middle + outputs) + shortcut

    def conv_norm(inputs, outputs):
        return 9 * inputs * outputs + 2 * outputs

    stem = 7 * 7 * 3 * 64 + 2 * 64
    stages = sum(unit(c, d) + more * unit(d, d) for c, d, more in ((64, 256, 2), (256, 512, 3), (512, 1024, 8)))
    layer = 4 * 768**2 + 4 * 768 + 2 * 4 * 768**2 + (4 + 1) * 768 + 2 * 2 * 768
    vit = 1024 * 768 + 768 + 14 * 14 * 768 + 12 * layer + 2 * 768
    decoder = conv_norm(768, 512)
    for inputs, outputs in ((512 + 512, 256), (256 + 256, 128), (128 + 64, 64), (64, 16)):
        decoder += conv_norm(inputs, outputs) + conv_norm(outputs, outputs)
    head = 9 * 16 * 9 + 9
    assert stem + stages + vit + decoder + head == 105_277_081  # as the authors' code has it

    with torch.device("meta"):
        network = TransUNet(9, 224)
    assert sum(p.numel() for p in network.parameters()) == 105_277_081
    assert network(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 9, 224, 224)


def test_a_standardised_convolution_by_hand():
    """Weights 1 and 3 have mean 2 and variance 1, so they count as −1 and 1."""
    convolution = StdConv2d(2, 1, 1)
    convolution.weight.data = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    image = torch.tensor([2.0, 5.0]).view(1, 2, 1, 1)
    assert convolution(image).item() == pytest.approx(3, abs=1e-4)


@torch.no_grad()
def test_the_skips():
    """At a half, a quarter and an eighth; the pooling leaves the quarter short of a row and a column."""
    torch.manual_seed(0)
    x, (eighth, quarter, half) = ResNet(32, (1, 2, 1))(torch.rand(2, 3, 48, 48))
    assert x.shape == (2, 512, 3, 3)
    assert eighth.shape == (2, 256, 6, 6)
    assert quarter.shape == (2, 128, 12, 12)
    assert half.shape == (2, 32, 24, 24)
    assert not quarter[:, :, -1].any() and not quarter[:, :, :, -1].any()
    assert quarter[:, :, :-1, :-1].flatten(0, 1).any(0).all()


def test_a_layer_is_pytorchs_own():
    torch.manual_seed(0)
    ours = Layer(24, heads=3, expansion=4, dropout=0.1).eval()
    theirs = nn.TransformerEncoderLayer(24, 3, 96, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
                                        norm_first=True).eval()  # fmt: skip
    theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.self_attn.out_proj.weight, theirs.self_attn.out_proj.bias = ours.proj.weight, ours.proj.bias
    theirs.linear1, theirs.linear2, theirs.norm1, theirs.norm2 = ours.mlp[0], ours.mlp[3], ours.norm1, ours.norm2
    tokens = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


@pytest.mark.parametrize("size", [16, 48, 112])
@torch.no_grad()
def test_any_multiple_of_16(size):
    logits = _narrow(size).eval()(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 3, size, size)
    assert logits.isfinite().all()


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="40; it must be a multiple of 16"):
        TransUNet(3, 40, NARROW)


@torch.no_grad()
def test_every_skip_is_used(randomise):
    """The logits change with each skip on its own."""
    network, images = randomise(_narrow(), seed=0), torch.rand(1, 3, 32, 32)
    logits = network(images)
    for block in network.decoder[:3]:
        with block.register_forward_pre_hook(lambda _, args: (args[0], args[1].flip(-1))):
            assert (network(images) - logits).abs().max() > 0.01


@torch.no_grad()
def test_a_cell_sees_all_others_and_where_they_lie():
    """Only the positions tell left from right: without them a mirrored image has mirrored features."""
    torch.manual_seed(0)
    vit, cells = ViT(8, 3, NARROW).eval(), torch.randn(1, 8, 3, 3)
    other = cells.clone()
    other[:, :, 0, 0] += 1
    assert (vit(other) - vit(cells)).abs().amax(1).min() > 1e-4  # every cell's features
    vit.positions.normal_()
    assert (vit(cells.flip(-1)) - vit(cells).flip(-1)).abs().max() > 0.1
    vit.positions.zero_()
    torch.testing.assert_close(vit(cells.flip(-1)), vit(cells).flip(-1))


def test_it_learns_an_image():
    """A bright box, within thirty steps."""
    labels = torch.zeros(1, 48, 48, dtype=torch.long)
    labels[:, 8:30, 12:40] = 1
    images = (0.2 + 0.4 * labels[:, None]).expand(1, 3, 48, 48)
    network = _narrow(48)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    assert (network(images).argmax(1) == labels).float().mean() > 0.98
