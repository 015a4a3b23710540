"""The original packages beside ours, with stand-ins for the names that they take from packages we keep out."""

import contextlib
import importlib
import importlib.util
import sys
import types

import pytest
import torch


class DropPath(torch.nn.Module):
    """timm's, which the networks here use with rate 0 only."""

    def __init__(self, drop_prob=None):
        super().__init__()

    def forward(self, x):
        return x


STAND_INS = {
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {
        "DropPath": DropPath,
        "to_2tuple": lambda x: (x, x),
        "trunc_normal_": torch.nn.init.trunc_normal_,
    },
    "timm.models.registry": {"register_model": lambda function: function},
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": None, "box_area": None},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"resize": None, "to_pil_image": None},
    "kornia_rs": {"io": None},  # image files
}


@contextlib.contextmanager
def _original(name: str):
    with pytest.MonkeyPatch.context() as patch:
        for stand_in, names in STAND_INS.items():
            module = types.ModuleType(stand_in)
            module.__dict__.update(names)
            patch.setitem(sys.modules, stand_in, module)
        before = set(sys.modules)
        yield importlib.import_module(name)
        for loaded in set(sys.modules) - before:
            patch.delitem(sys.modules, loaded)


@pytest.fixture(scope="session")
def original():
    """Module name → that module of an original package, for as long as the context lasts; skips where it is absent."""

    def load(name: str):
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `pip install --no-deps --group originals`")
        return _original(name)

    return load


@torch.no_grad()
def _randomise(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif name.endswith("gaussian_matrix"):
            tensor.copy_(noise)
        elif tensor.ndim == 1:
            tensor.copy_(name.endswith("weight") + 0.1 * noise)
        elif "pos" in name or "bias" in name:
            tensor.copy_(0.3 * noise)  # positions: zero at first in the original, which would hide them
        else:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)
    return network.eval()


@pytest.fixture(scope="session")
def randomise():
    """(network, seed) → it, with every tensor drawn at random so that signals neither die out nor explode."""
    return _randomise
