"""The command line, end to end, on the real weights; and what it says to wrong input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cheaplunch.__main__ import main
from cheaplunch.data.layouts import open_dataset

SHARED = Path(__file__).parents[2] / "shared" / "data"


def small(data: Path, out: Path, *more: object) -> list[str]:
    """A finetune of seconds."""
    words = ["finetune", "--data", data, "--out", out, "--exemplars", 3, "--image-size", 64, "--steps", 4]
    return [str(word) for word in (*words, "--batch-size", 2, "--prompts-per-image", 2, *more)]


@pytest.fixture(scope="module")
def run(tiny_dataset, weights, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(small(tiny_dataset, out)) == 0
    return out


def test_a_run_explains_itself(run):
    written = {path.name for path in run.iterdir()}
    assert written >= {
        "config.yaml",
        "exemplars.csv",
        "synthesis.png",
        "metrics.jsonl",
        "adapter",
        "environment.json",
        "report.html",
    }
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_moved_elsewhere_evaluates_with_the_untuned_weights_beside(run, tiny_dataset, tmp_path, capsys):
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(run, moved)
    results, masks = tmp_path / "results.json", tmp_path / "masks"
    line = ["evaluate", moved, "--data", tiny_dataset, "--out", results, "--save-masks", masks]
    assert main([str(word) for word in line]) == 0
    told = capsys.readouterr().out
    assert "oracle prompts" in told
    assert "zero-shot" in told

    found = json.loads(results.read_text())
    assert found["oracle_prompts"] is True
    assert found["protocol"] == "strict"
    assert found["n_cases"] == 1
    assert set(found["classes"]) == {"disc", "block"}
    assert 0 <= found["mean"]["dice"] <= 1
    assert {path.name for path in (moved / "evaluations" / "furthest-strict").iterdir()} >= {
        "fine-tuned.json",
        "zero-shot.json",
        "cases.json",
    }

    # The score is of the mask as written, on the image's own grid.
    (written,) = masks.glob("*.nii.gz")
    image = nib.load(tiny_dataset / "imagesTr" / written.name.replace(".nii.gz", "_0000.nii.gz"))
    mask = nib.load(written)
    assert mask.shape == image.shape
    assert np.array_equal(mask.affine, image.affine)
    predicted = np.asarray(mask.dataobj)
    truth = np.asarray(nib.load(tiny_dataset / "labelsTr" / written.name).dataobj)
    overlap = ((predicted == 1) & (truth == 1)).sum()
    assert found["classes"]["disc"]["dice"] == pytest.approx(
        2 * overlap / ((predicted == 1).sum() + (truth == 1).sum())
    )


def test_zero_shot_with_boxes_under_the_papers_protocol(tiny_dataset, weights, tmp_path):
    results = tmp_path / "results.json"
    line = ["evaluate", "--method", "zero-shot", "--backbone", "lite-medsam", "--prompts", "box", "--protocol", "paper"]
    assert main([*line, "--data", str(tiny_dataset), "--out", str(results)]) == 0
    found = json.loads(results.read_text())
    assert found["method"] == "zero-shot"
    assert found["prompts"] == "box"
    assert found["unit"] == "px"
    assert found["mean"]["dice"] > 0.8  # tight boxes around a disc and a block; a point would give about 0


def test_pick_and_its_file_as_exemplars(tiny_dataset, weights, tmp_path):
    csv, run = tmp_path / "pick.csv", tmp_path / "run"
    assert main(["pick", "--data", str(tiny_dataset), "--exemplars", "2", "--out", str(csv)]) == 0
    assert len(csv.read_text().splitlines()) == 3
    assert main(small(tiny_dataset, run, "--exemplar-file", csv)) == 0
    assert (run / "exemplars.csv").read_text() == csv.read_text()


def test_synthesize_writes_a_folder_that_finetune_reads(tiny_dataset, weights, tmp_path):
    out = tmp_path / "set"
    words = ["synthesize", "--data", tiny_dataset, "--exemplars", 2, "--count", 6, "--image-size", 64, "--out", out]
    assert main([str(word) for word in words]) == 0
    assert (out / "preview.png").stat().st_size > 1000
    assert main(small(out, tmp_path / "run")) == 0


def test_settings_from_yaml_and_flags_above_them(tiny_dataset, weights, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("steps: 9\nlora-rank: 2\n")
    assert main(small(tiny_dataset, tmp_path / "run", "--config", settings)) == 0
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "steps: 4\n" in written
    assert "lora_rank: 2\n" in written


# ---- wrong input: one line that names the file or flag, status 2, nothing left behind


@pytest.fixture
def broken(tiny_dataset, tmp_path) -> Path:
    return shutil.copytree(tiny_dataset, tmp_path / "broken")


def said(capsys, words: list[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def rewrite(path: Path, change) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj).copy()), image.affine), path)


def test_missing_label(broken, tmp_path, capsys):
    (broken / "labelsTr" / "case_1.nii.gz").unlink()
    assert "labelsTr/case_1.nii.gz is missing" in said(capsys, small(broken, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_label_of_another_shape(broken, tmp_path, capsys):
    label = open_dataset(broken).split("train")[0].label.paths[0]
    rewrite(label, lambda voxels: voxels[:-1])
    assert f"labelsTr/{label.name}" in said(capsys, small(broken, tmp_path / "run"))


def test_nan_voxels(broken, tmp_path, capsys):
    def poison(image):
        image[0, 0, 0] = np.nan
        return image

    (image,) = open_dataset(broken).split("train")[0].images
    rewrite(image, poison)
    assert f"imagesTr/{image.name}" in said(capsys, small(broken, tmp_path / "run"))


def test_class_absent_from_every_exemplar(broken, tmp_path, capsys):
    for path in (broken / "labelsTr").iterdir():
        rewrite(path, lambda label: np.where(label == 2, 0, label).astype(np.uint8))
    line = said(capsys, small(broken, tmp_path / "run"))
    assert "--exemplars 3: no exemplar shows block" in line
    assert not (tmp_path / "run").exists()


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in said(capsys, small(tmp_path / "empty", tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["finetune", "--no-such-flag", "3", "--data", ".", "--out", "run"], "--no-such-flag"),
        (["finetune", "--exemplars", "many", "--data", ".", "--out", "run"], "--exemplars"),
        (["finetune", "--out", "run"], "--data"),
        (["finetune", "--data", "nowhere", "--out", "run"], "nowhere"),
        (["finetune", "--data", ".", "--out", "run", "--method", "magic"], "--method magic"),
        (["finetune", "--data", ".", "--out", "run", "--backbone", "resnet"], "not one image"),
        (["evaluate", "--data", ".", "--out", "x.json"], "RUN"),
        (["evaluate", "nowhere", "--data", ".", "--out", "x.json"], "nowhere"),
        (["evaluate", "nowhere", "--data", ".", "--out", "x.json", "--prompts", "guess"], "--prompts"),
        (["weights", "sam-unknown"], "sam-unknown"),
        (["finetune", "--data", ".", "--out", "something/run"], "--out something/run: something is a file"),
        (["evaluate", "x", "--data", ".", "--out", "something/deep/x.json"], "something is a file, not a folder"),
        (["evaluate", "x", "--data", ".", "--out", "x.json", "--save-masks", "something"], "--save-masks something is"),
        (["synthesize", "--data", ".", "--out", "something"], "--out something is a file"),
        (["dance"], "dance"),
    ],
)
def test_wrong_flags(words, naming, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert naming in said(capsys, words)
    assert {path.name for path in tmp_path.iterdir()} == {"something"}


def test_a_run_is_never_overwritten(run, tiny_dataset, capsys):
    before = (run / "config.yaml").read_bytes()
    assert "already holds a run" in said(capsys, small(tiny_dataset, run, "--seed", 5))
    assert (run / "config.yaml").read_bytes() == before


def test_the_installed_command_answers(tmp_path):
    command = [sys.executable, "-m", "cheaplunch", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "finetune" in answer.stdout
    wrong = subprocess.run([*command[:-1], "finetune"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1


# ---- real images


@pytest.mark.real
def test_main_job_on_real_hippocampus(weights, tmp_path):
    """Few steps on three exemplars already leave zero-shot far behind; two test volumes keep it short."""
    source = SHARED / "hippocampus"
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    data, run, results = tmp_path / "data", tmp_path / "run", tmp_path / "results.json"
    for folder, count in (("imagesTr", 6), ("labelsTr", 6), ("imagesTs", 2), ("labelsTs", 2)):
        (data / folder).mkdir(parents=True)
        for path in sorted((source / folder).iterdir())[:count]:
            shutil.copy(path, data / folder)
    shutil.copy(source / "dataset.json", data)
    words = ["finetune", "--method", "cheap-lunch", "--data", data, "--out", run, "--exemplars", 5]
    assert main([str(word) for word in (*words, "--steps", 120, "--warmup-steps", 12)]) == 0
    assert main([str(word) for word in ("evaluate", run, "--data", data, "--out", results)]) == 0
    tuned = json.loads(results.read_text())["mean"]["dice"]
    untuned = json.loads((run / "evaluations" / "furthest-strict" / "zero-shot.json").read_text())["mean"]["dice"]
    assert untuned < 0.1
    assert tuned > untuned + 0.4
