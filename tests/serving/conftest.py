"""What tests of the server share: a run of a tiny network with random weights."""

from pathlib import Path

import pytest

from cheaplunch.__main__ import main
from cheaplunch.runs import RunFolder
from cheaplunch.serving.opened import Loaded, load


@pytest.fixture(scope="session")
def run(tiny_dataset, tmp_path_factory) -> Path:
    """Of two steps, on the discs and blocks of `tiny_dataset`."""
    out = tmp_path_factory.mktemp("serving") / "run"
    words = ["finetune", "--data", tiny_dataset, "--out", out, "--backbone", "tiny-random", "--image-size", 64]
    words += ["--steps", 2, "--exemplars", 2, "--warmup-steps", 1, "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="session")
def loaded(run) -> Loaded:
    folder = RunFolder(run)
    return load(folder, folder.load_config())
