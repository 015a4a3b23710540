"""Pretraining: the losses fall on images not learned from, the file is a `--weights`, and a stopped one goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cheaplunch.__main__ import main
from cheaplunch.config import build_config
from cheaplunch.data.layouts import open_dataset
from cheaplunch.errors import UserError
from cheaplunch.models.backbones import load_backbone
from cheaplunch.pretraining import Pretrainer, PretrainingFolder, pretrain, resolve, split_held_out


def blobs(root: Path, colours: bool) -> Path:
    """200 pictures without masks: a bright blob somewhere else in each; of one brightness, or a colour of its own."""
    root.mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 64
    for number in range(200):
        row, column = rng.uniform(0, 1, 2)
        light = rng.uniform(60, 220, 3) if colours else np.array(200)
        picture = (
            20 + light * np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * 0.25**2))[(...,) + (None,) * light.ndim]
        )
        Image.fromarray(picture.astype(np.uint8)).save(root / f"picture{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return blobs(tmp_path_factory.mktemp("pictures") / "grey", colours=False)


def run(data: Path, out: Path, objectives: dict[str, float] | None = None, resume=False, progress=None, **settings):
    values = {"backbone": "tiny-random", "image_size": 64, "steps": 4, "batch_size": 4, "precision": "fp32"}
    values |= {"data": data, "learning_rate": 1e-3, "device": "cpu"} | settings
    return pretrain(
        build_config("zero-shot", values), objectives or {"e-mix": 1.0, "shed": 1.0, "mae": 1.0}, out, resume, progress
    )


def about(folder: PretrainingFolder) -> dict:
    return json.loads(folder.about.read_text())


@pytest.fixture(scope="module")
def short(pictures, tmp_path_factory) -> PretrainingFolder:
    """Four steps of all three objectives, with weights of their own; read it, do not change it."""
    out = tmp_path_factory.mktemp("short") / "out"
    return run(pictures, out, {"e-mix": 1.0, "shed": 0.5, "mae": 2.0})


# ---- what it is for


@pytest.mark.parametrize(
    ("objective", "steps", "rate", "colours"),
    [
        # Slow: these end near a half, and another processor's last digits might tip them.
        pytest.param("e-mix", 400, 1e-3, True, marks=pytest.mark.slow),
        pytest.param("shed", 400, 2e-3, False, marks=pytest.mark.slow),
        ("mae", 150, 2e-3, False),
    ],
)
def test_the_loss_halves_on_images_not_learned_from(objective, steps, rate, colours, tmp_path):
    # Of blobs of one colour, e-Mix cannot tell those that are near each other, nor ShED black from black.
    data = blobs(tmp_path / "pictures", colours)
    folder = run(data, tmp_path / "out", {objective: 1.0}, steps=steps, batch_size=8, learning_rate=rate)
    said = about(folder)
    assert said["held_out"]["after"][objective] < said["held_out"]["before"][objective] / 2
    assert said["encoder_moved"] > 0.01


def test_the_encoder_moves_but_for_positions_and_the_rest_stays(short):
    before = load_backbone("tiny-random", 64).state_dict()
    after = load_backbone("tiny-random", 64, short.weights).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    positions = {name for name in before if "pos_embed" in name or "rel_pos" in name}
    assert same == positions | {name for name in before if not name.startswith("vision_encoder.")}
    moved = sum(float((after[name] - before[name]).square().sum()) for name in before.keys() - same) ** 0.5
    there = sum(float(before[name].square().sum()) for name in before.keys() - same) ** 0.5
    assert about(short)["encoder_moved"] == pytest.approx(moved / there, rel=1e-3)
    load_backbone("tiny-random", 128, short.weights)  # at any size of input


def test_lite_medsam_with_its_batch_norms_folded(tiny_dataset, weights, tmp_path):
    settings = {"backbone": "lite-medsam", "weights": weights, "image_size": 32, "steps": 1, "batch_size": 2}
    folder = run(tiny_dataset, tmp_path / "out", **settings)
    before = load_backbone("lite-medsam", 32, weights).state_dict()
    after = load_backbone("lite-medsam", 32, folder.weights).state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("vision_encoder."), name
    assert (tmp_path / "out").is_dir()
    load_backbone("lite-medsam", 32, tmp_path / "out")  # the folder is a --weights as well


def test_finetune_and_evaluate_take_the_file(short, tiny_dataset, tmp_path, capsys):
    model = ["--backbone", "tiny-random", "--weights", short.weights, "--image-size", 64, "--data", tiny_dataset]
    tuned = [*model, "--steps", 2, "--exemplars", 3, "--out", tmp_path / "run"]
    assert main([str(word) for word in ("finetune", *tuned)]) == 0
    assert (
        main(
            [
                str(w)
                for w in (
                    "evaluate",
                    tmp_path / "run",
                    "--no-baseline",
                    "--data",
                    tiny_dataset,
                    "--out",
                    tmp_path / "a.json",
                )
            ]
        )
        == 0
    )
    assert main([str(w) for w in ("evaluate", "--method", "zero-shot", *model, "--out", tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["backbone"] == "tiny-random"


# ---- what it says of itself


def test_the_folder_explains_itself(short, pictures):
    assert {path.name for path in short.root.iterdir()} == {"model.safetensors", "pretraining.json", "metrics.jsonl"}
    said = about(short)
    assert said["settings"]["objectives"] == {"e-mix": 1.0, "shed": 0.5, "mae": 2.0}
    assert said["data_fingerprint"] == open_dataset(pictures, labelled=False).fingerprint()
    assert said["held_out"]["slices"] == len(said["held_out"]["cases"]) == 20
    assert said["slices"] == 180
    assert said["held_out"]["before"].keys() == said["held_out"]["after"].keys() == {"e-mix", "shed", "mae"}
    assert said["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in short.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["e-mix"] + 0.5 * line["shed"] + 2 * line["mae"], abs=1e-5)


def test_patients_are_held_out_whole(tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    training, held_out = split_held_out(dataset, seed=0)
    assert {case.patient for case in training}.isdisjoint(case.patient for case in held_out)
    assert training and held_out
    assert {case.split for case in training + held_out} == {"train"}
    assert split_held_out(dataset, seed=0) == (training, held_out)


# ---- stopped, and gone on with


def test_resume_ends_in_the_same_bytes(short, pictures, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, steps, record):
        if done == 3:
            raise Killed

    weights, out = {"e-mix": 1.0, "shed": 0.5, "mae": 2.0}, tmp_path / "out"
    with pytest.raises(Killed):
        run(pictures, out, weights, progress=kill, checkpoint_every=2)
    assert not (out / "model.safetensors").exists()
    with pytest.raises(UserError, match="already holds a pretraining"):
        run(pictures, out, weights, checkpoint_every=2)
    with pytest.raises(UserError, match=r"--resume: learning_rate was 0\.001"):
        run(pictures, out, weights, resume=True, checkpoint_every=2, learning_rate=2e-3)
    folder = run(pictures, out, weights, resume=True, checkpoint_every=2)
    assert folder.weights.read_bytes() == short.weights.read_bytes()
    assert about(folder)["held_out"] == about(short)["held_out"]
    assert len(folder.metrics.read_text().splitlines()) == 4
    stamp = folder.weights.stat().st_mtime_ns
    run(pictures, out, weights, resume=True, checkpoint_every=2)  # finished: nothing is done again
    assert folder.weights.stat().st_mtime_ns == stamp


def test_a_loss_that_is_not_finite_moves_nothing(pictures):
    dataset = open_dataset(pictures, labelled=False)
    config = build_config("zero-shot", {"data": pictures, "backbone": "tiny-random", "image_size": 64, "device": "cpu"})
    learner = Pretrainer(resolve(config, dataset, dataset.cases), {"mae": 1.0})
    before = [parameter.clone() for parameter in learner.module.parameters()]
    learner.step(torch.full((2, 3, 64, 64), torch.nan), torch.full((2, 2), 64), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.module.parameters(), strict=True))


# ---- labels, and wrong input


def test_labels_are_not_read(tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "set")
    for path in (data / "labelsTr").iterdir():
        path.write_bytes(b"no label")
    said = about(run(data, tmp_path / "out", steps=1))
    assert said["slices"] + said["held_out"]["slices"] == 12  # two volumes of six slices; the third one tests


def said_of(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main(["pretrain", "--backbone", "tiny-random", "--steps", "1", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_wrong_input_is_one_line(pictures, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "--objective jigsaw is not known" in said_of(capsys, "--data", pictures, "--objective", "jigsaw", *out)
    assert "--batch-size 2 or more" in said_of(capsys, "--data", pictures, "--batch-size", 1, *out)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    assert f"--data {empty}" in said_of(capsys, "--data", empty, *out)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(pictures / "picture000.png", alone)
    assert "of 1 patient; pretraining needs two" in said_of(capsys, "--data", alone, *out)
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_named(pictures, tmp_path, capsys):
    data = shutil.copytree(pictures, tmp_path / "damaged")
    whole = (data / "picture007.png").read_bytes()
    (data / "picture007.png").write_bytes(whole[: len(whole) // 2])
    line = said_of(capsys, "--data", data, "--image-size", 64, "--out", tmp_path / "out")
    assert "picture007.png is cut off or damaged" in line
    assert not (tmp_path / "out" / "model.safetensors").exists()
