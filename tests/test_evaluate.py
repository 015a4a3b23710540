"""`cheaplunch evaluate` on the command line: its flags, what it writes, and what it says to a wrong one."""

import json
from pathlib import Path

import pytest

from cheaplunch.__main__ import main
from cheaplunch.config import build_config, save_config


@pytest.fixture(scope="module")
def zero_shot_words(tiny_dataset, weights) -> list[str]:
    return ["--method", "zero-shot", "--image-size", "64", "--data", str(tiny_dataset)]


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


def test_protocols_each_get_a_file_and_masks_come_back_in(zero_shot_words, tiny_dataset, tmp_path, capsys):
    out, masks = tmp_path / "box.json", tmp_path / "masks"
    words = ["--prompts", "box", "--protocol", "strict,paper", "--save-masks", masks, "--out", out]
    assert evaluate(*zero_shot_words, *words) == 0
    told = capsys.readouterr().out
    assert told.index("protocol strict") < told.index("protocol paper")
    ours = json.loads(out.read_text())
    assert ours["protocol"] == "strict"
    assert json.loads((tmp_path / "box.paper.json").read_text())["protocol"] == "paper"

    again = tmp_path / "again.json"
    words = ["--predictions", masks, "--label", "nnU-Net", "--data", tiny_dataset, "--out", again]
    assert evaluate(*words) == 0
    theirs = json.loads(again.read_text())
    assert theirs["cases"] == ours["cases"]
    assert (theirs["method"], theirs["prompts"], theirs["oracle_prompts"]) == ("nnU-Net", "auto", False)
    assert "no prompts" in capsys.readouterr().out
    assert evaluate(*words, "--prompts", "box") == 0
    assert json.loads(again.read_text())["oracle_prompts"] is True


def test_one_click_from_the_command_line(zero_shot_words, tmp_path, capsys):
    assert evaluate(*zero_shot_words, "--prompts", "one-click", "--out", tmp_path / "one.json") == 0
    found = json.loads((tmp_path / "one.json").read_text())
    assert (found["prompts"], found["oracle_prompts"]) == ("one-click", True)
    assert "one point a class and volume" in capsys.readouterr().out


def test_clicks_leave_a_curve_in_the_run(tiny_dataset, weights, tmp_path):
    run = tmp_path / "run"
    words = ["finetune", "--data", tiny_dataset, "--out", run, "--exemplars", 2, "--image-size", 64, "--steps", 2]
    assert main([str(word) for word in words]) == 0
    assert evaluate(run, "--data", tiny_dataset, "--prompts", "clicks:3", "--out", tmp_path / "clicks.json") == 0
    kept = run / "evaluations" / "clicks-3-strict"
    tuned = json.loads((kept / "fine-tuned.json").read_text())
    assert tuned == json.loads((tmp_path / "clicks.json").read_text())
    assert list(tuned["by_clicks"]) == ["1", "3"]
    assert list(json.loads((kept / "zero-shot.json").read_text())["by_clicks"]) == ["1", "3"]
    assert (kept / "clicks.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_not_finished_is_no_matter_of_minutes(tmp_path, capsys):
    save_config(build_config("cheap-lunch", {"data": tmp_path}), tmp_path / "run" / "config.yaml")
    assert evaluate(tmp_path / "run", "--data", tmp_path, "--out", tmp_path / "r.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'run'} is not finished" in line


# ---- words


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        ("--method zero-shot --prompts text", "--prompts text: the network has learned no texts"),
        ("--method zero-shot --prompts auto", "--prompts auto: the network has to be prompted"),
        ("RUN --prompts auto", "RUN is not a run"),
        ("RUN --prompts clicks", "clicks:N"),
        ("RUN --prompts furthest --draws 5", "--draws 5"),
        ("RUN --prompts random --draws 0", "--draws is 0"),
        ("RUN --prompts box --point-jitter 2", "--point-jitter"),
        ("RUN --prompts random --box-jitter 2", "--box-jitter"),
        ("RUN --prompts random --point-jitter -1", "--point-jitter is -1"),
        ("RUN --prompts one-click --box-margin 2", "--box-margin"),
        ("RUN --prompts random --no-mask-prompt", "--no-mask-prompt"),
        ("RUN --protocol strict,loose", "--protocol loose"),
        ("RUN --label mine", "--label"),
        ("--method magic", "--method magic is not known"),
        ("--method samed", "--method samed has to be trained first"),
        ("RUN --predictions masks", "one of"),
        ("--predictions masks --image-size 64", "--image-size"),
        ("--predictions masks --save-masks more", "--save-masks"),
        ("--predictions masks --prompts random --draws 2", "--draws"),
        ("--predictions masks", "--predictions masks: no such folder"),
    ],
)
def test_wrong_words(words, naming, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate(*words.split(), "--data", ".", "--out", "results.json") == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert naming in line
    assert not captured.out
    assert not list(Path(tmp_path).iterdir())
