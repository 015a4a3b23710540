"""The real command line in processes of its own: several at once, killed, and without room on the disk."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file

from cheaplunch.models.lora import ADAPTER_FILE


@pytest.fixture(scope="module")
def flags(tiny_dataset, weights) -> list[str]:
    """Of a run of four small steps on the CPU."""
    numbers = {"image-size": 32, "exemplars": 2, "steps": 4, "batch-size": 2, "prompts-per-image": 2, "synthetic": 12}
    small = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    return ["--data", str(tiny_dataset), "--weights", str(weights), *small, "--precision", "fp32", "--device", "cpu"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def cheaplunch(*words, launcher=(), **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "cheaplunch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **options)


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """The run that one process makes without disturbance; read it, do not change it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = cheaplunch("finetune", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / ADAPTER_FILE)


# ---- several processes


@pytest.fixture(scope="module")
def together(flags, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("together") / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return out, cheaplunch("finetune", *flags, "--out", out, launcher=torchrun)


def test_two_processes_give_the_adapter_of_one(alone, together):
    out, done = together
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1  # one of them speaks
    one, two = adapter(alone), adapter(out)
    assert one.keys() == two.keys()
    # Gradients are summed in another order; where one is near zero AdamW's first steps follow its sign, so the
    # comparison is of the weights' movement as a whole.
    moved = np.concatenate([(two[name] - one[name]).ravel() for name in one])
    size = np.concatenate([one[name].ravel() for name in one])
    assert np.linalg.norm(moved) < 1e-3 * np.linalg.norm(size)
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (alone, out)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert json.loads((out / "environment.json").read_text())["processes"] == 2


def test_two_processes_score_as_one(alone, tiny_dataset, weights, tmp_path):
    words = ["evaluate", alone, "--data", tiny_dataset, "--weights", weights, "--device", "cpu", "--no-baseline"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = cheaplunch(*words, "--out", tmp_path / "one.json", "--save-masks", tmp_path / "one")
    two = cheaplunch(*words, "--out", tmp_path / "two.json", "--save-masks", tmp_path / "two", launcher=torchrun)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())
    for path in (tmp_path / "one").iterdir():
        masks = [np.asarray(nib.load(folder / path.name).dataobj) for folder in (tmp_path / "one", tmp_path / "two")]
        assert np.array_equal(*masks)


def test_a_batch_that_two_cannot_share(flags, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = cheaplunch("finetune", *flags, "--batch-size", 3, "--out", tmp_path / "run", launcher=torchrun)
    assert done.returncode
    assert "--batch-size 3 cannot be shared by 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- nothing is lost


def test_killed_and_resumed(flags, alone, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "cheaplunch", "finetune", *flags, "--checkpoint-every", "1", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and not list(out.glob("checkpoint/step-*.pt")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "adapter" / ADAPTER_FILE).exists()
    done = cheaplunch("finetune", *flags, "--checkpoint-every", 1, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert (out / "adapter" / ADAPTER_FILE).read_bytes() == (alone / "adapter" / ADAPTER_FILE).read_bytes()


def test_sigterm_ends_with_one_line_that_says_how_to_go_on(flags, alone, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "cheaplunch", "finetune", *flags, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    said = process.stderr.read()
    assert "which is saved; --resume" in said
    assert "Traceback" not in said
    assert cheaplunch("finetune", *flags, "--out", out, "--resume").returncode == 0
    assert (out / "adapter" / ADAPTER_FILE).read_bytes() == (alone / "adapter" / ADAPTER_FILE).read_bytes()


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(flags, alone, tmp_path):
    # The system refuses files above a size: a full disk at the same call, without filling one.
    out = tmp_path / "run"
    assert cheaplunch("finetune", *flags, "--checkpoint-every", 2, "--steps", 3, "--out", out).returncode == 0
    (out / "adapter" / ADAPTER_FILE).unlink()
    (before,) = (out / "checkpoint").iterdir()
    limit = before.stat().st_size // 2
    words = ["finetune", *flags, "--checkpoint-every", 1, "--out", tmp_path / "full"]
    done = cheaplunch(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2
    assert "the checkpoint of step 1 could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "full" / "checkpoint").iterdir())
