"""The standard networks, each as it is built for a run: sizes, outputs, gradients, and nothing kept of a batch."""

import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cheaplunch.errors import UserError
from cheaplunch.methods import VOLUMETRIC
from cheaplunch.models.baselines import BASELINES, Padded, build_baseline

FLAT = [name for name in BASELINES if name not in VOLUMETRIC]
MONAIS = [name for name in FLAT if name != "transunet"]
SIZE = 40  # a multiple of 8 and of nothing more: all are padded, but for SegResNet
LARGE = ("unetr-3d", "swin-unetr-3d")

# For nine outputs at 224 px, as MONAI builds them, batch norms and all; UNETR less its 12 unused norms of 2 × 768.
PARAMETERS = {
    "unet": 1_979_273,
    "attention-unet": 1_987_841,
    "unetr": 87_681_401 - 12 * 2 * 768,
    "swin-unetr": 25_139_667,
    "segresnet": 6_299_337,
    "transunet": 105_277_081,
    "unet-3d": 5_751_369,
    "attention-unet-3d": 5_910_113,
    "unetr-3d": 99_079_385 - 12 * 2 * 768,
    "swin-unetr-3d": 62_190_507,
    "segresnet-3d": 18_797_961,
}


@pytest.fixture(scope="module", params=FLAT)
def network(request):
    torch.manual_seed(0)
    return build_baseline(request.param, 2, SIZE)


@pytest.fixture
def without_dropout(network):
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.eval()
    return network


@torch.no_grad()
def test_an_images_logits_are_its_own_in_training_too(without_dropout):
    images = torch.rand(2, 3, SIZE, SIZE)
    logits = without_dropout(images)
    assert logits.shape == (2, 3, SIZE, SIZE)
    assert (logits[0] - logits[1]).abs().max() > 0.01
    torch.testing.assert_close(without_dropout(images.flip(0)), logits.flip(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(without_dropout(images[:1]), logits[:1], rtol=0, atol=1e-4)


def test_every_parameter_learns(without_dropout):
    without_dropout.zero_grad()
    logits = without_dropout(torch.rand(1, 3, SIZE, SIZE))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in without_dropout.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith("bias"), name  # a bias before a norm does nothing
    assert not any(buffer.is_floating_point() for buffer in without_dropout.buffers())  # none to save


@pytest.mark.parametrize("network", MONAIS, indirect=True)
def test_it_learns_an_image(without_dropout):
    """Two boxes, one brighter than the other, within twenty steps; TransUNet's are long, so it is narrow in its own."""
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    labels[:, 5:20, 8:22] = 1
    labels[:, 24:36, 10:34] = 2
    images = (0.2 + 0.3 * labels[:, None]).expand(1, 3, SIZE, SIZE)
    optimizer = torch.optim.SGD(without_dropout.parameters(), lr=0.1, momentum=0.9)
    right = []
    while len(right) < 20 and max(right, default=0) < 0.98:
        logits = without_dropout(images)
        right.append((logits.argmax(1) == labels).float().mean().item())
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert right[0] < 0.9 and right[-1] >= 0.98, right


@pytest.mark.parametrize("name", FLAT)
def test_sizes_and_parameters(name):
    for size in (32, 112, 224):
        # Shapes alone; MONAI's Swin computes with tensors while it is built.
        with nullcontext() if name == "swin-unetr" else torch.device("meta"):
            network = build_baseline(name, 8, size).to("meta")
        assert network(torch.empty(1, 3, size, size, device="meta")).shape == (1, 9, size, size)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@torch.no_grad()
def test_padding_is_black_and_cropped_again():
    """A convolution sees zeros beyond its image anyway, so a margin of them changes nothing."""
    convolution, images = nn.Conv2d(3, 2, 3, padding=1), torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(Padded(convolution, (8, 8))(images), convolution(images))


# ---- in 3-D


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in VOLUMETRIC])
def test_a_volume_is_answered_slice_by_slice_and_every_parameter_learns(name):
    torch.manual_seed(0)
    network = build_baseline(name, 2, 32, 5).eval()
    for depth in (5, 2):  # a short volume is one slab
        logits = network(torch.rand(2, 3, depth, 32, 32))
        assert logits.shape == (2, 3, depth, 32, 32)
        (logits[:, :, 1] * torch.randn_like(logits[:, :, 1])).sum().backward()
    for label, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), label
        assert parameter.grad.any() or label.endswith("bias"), label
    assert not any(buffer.is_floating_point() for buffer in network.buffers())


@pytest.mark.parametrize("name", VOLUMETRIC)
def test_sizes_and_parameters_in_3d(name):
    with nullcontext() if name == "swin-unetr-3d" else torch.device("meta"):
        network = build_baseline(name, 8, 224, VOLUMETRIC[name]).to("meta")
    assert network(torch.empty(1, 3, 16, 224, 224, device="meta")).shape == (1, 9, 16, 224, 224)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@torch.no_grad()
def test_a_slices_logits_follow_from_those_around_it_and_a_missing_slice_is_the_last_once_more():
    torch.manual_seed(0)
    network, slabs = build_baseline("unet-3d", 2, 32, 16).eval(), torch.rand(2, 3, 16, 32, 32)
    whole = network(slabs)
    changed = slabs.clone()
    changed[0, :, 4] = 0
    found = network(changed)
    assert (found[0, :, 6] - whole[0, :, 6]).abs().max() > 1e-3
    torch.testing.assert_close(found[1], whole[1])
    slabs[:, :, 10:] = slabs[:, :, 9:10]
    torch.testing.assert_close(network(slabs[:, :, :10]), network(slabs)[:, :, :10])


@pytest.mark.parametrize("missing", ["monai.networks.nets", "einops"])
@pytest.mark.parametrize("name", MONAIS)
def test_without_monai(name, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"--method {name} needs MONAI.*`pip install cheaplunch\[networks\]`") as error:
        build_baseline(name, 2, 64)
    assert "\n" not in str(error.value)


def test_transunet_needs_no_monai(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with torch.device("meta"):
        build_baseline("transunet", 2, 64)


@pytest.mark.parametrize("size", [24, 100])
def test_a_size_that_is_not_possible(size):
    with pytest.raises(UserError, match=f"--image-size {size}: unet takes multiples of 8"):
        build_baseline("unet", 2, size)


def test_a_name_that_is_not_known():
    with pytest.raises(UserError, match="--method vnet is not a standard network; choose one of: unet, "):
        build_baseline("vnet", 2, 64)
