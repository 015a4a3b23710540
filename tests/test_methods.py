"""Every row of METHODS from the command line: two steps, a report, an evaluation with its own prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from cheaplunch.__main__ import main
from cheaplunch.config import METHODS, build_config, check_prompting, load_config, prompts_for
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Window
from cheaplunch.errors import UserError
from cheaplunch.models.lora import ADAPTER_FILE
from cheaplunch.models.segmenter import load_segmenter
from cheaplunch.prediction import Predictor, segment_auto
from cheaplunch.prompting import Prompting, read_prompting
from cheaplunch.runs import RunFolder
from cheaplunch.training import finetune

TRAINED = [name for name in METHODS if name != "zero-shot"]
FREE = [name for name in TRAINED if METHODS[name].get("head") == "classes"]
PLAIN = [name for name in TRAINED if "backbone" in METHODS[name]]


def words(data: Path, method: str, **changes) -> list[str]:
    """Of two small steps."""
    values = {"data": data, "method": method, "image_size": 32 if method in PLAIN else 64, "exemplars": 2}
    values |= {"steps": 2, "warmup_steps": 1, "batch_size": 2, "device": "cpu", "precision": "fp32"}
    values |= {} if method in PLAIN else {"backbone": "tiny-random"}
    return [str(w) for name, value in (values | changes).items() for w in (f"--{name.replace('_', '-')}", value)]


def run_and_score(data: Path, method: str, out: Path, **changes) -> tuple[RunFolder, dict]:
    assert main(["finetune", *words(data, method, **changes), "--out", str(out / "run")]) == 0
    assert main(["evaluate", str(out / "run"), "--data", str(data), "--out", str(out / "results.json")]) == 0
    return RunFolder(out / "run"), json.loads((out / "results.json").read_text())


def check_run(run: RunFolder, result: dict, method: str) -> None:
    config = run.load_config()
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()
    environment = json.loads(run.environment.read_text())
    assert environment["labels"] == {"disc": 1, "block": 2}
    saved = load_file(run.adapter / ADAPTER_FILE)
    assert sum(tensor.numel() for tensor in saved.values()) == environment["trained_parameters"]
    assert (result["method"], result["backbone"]) == (method, config.model.backbone)
    assert result["oracle_prompts"] == (config.model.head != "classes")
    assert result["prompts"] == prompts_for(config.model)
    assert result["mean"]["dice"] is not None and 0 <= result["mean"]["dice"] <= 1
    assert result["n_cases"] == 1
    assert run.report.is_file()


# 19 to 106 million parameters, or what `unet-3d` shows already
HEAVY = ("transunet", "unetr", "swin-unetr", "attention-unet-3d", "unetr-3d", "swin-unetr-3d", "segresnet-3d")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m in HEAVY)) for m in TRAINED])
def test_every_method_trains_and_is_scored_with_its_own_prompts(method, tiny_dataset, tmp_path):
    run, result = run_and_score(tiny_dataset, method, tmp_path)
    check_run(run, result, method)
    assert (run.load_config().model.class_names == ("disc", "block")) == (method in FREE)
    assert result["present_classes_only"] == (method not in FREE)


# ---- asked as they can be


def test_a_network_is_not_asked_what_it_cannot_answer(tiny_dataset, tmp_path, capsys):
    for method, asked, said in (
        ("samed", "furthest", "--prompts furthest: the network takes no prompts"),
        ("cheap-lunch", "auto", "--prompts auto: the network has to be prompted"),
    ):
        assert main(["finetune", *words(tiny_dataset, method), "--out", str(tmp_path / method)]) == 0
        flags = ["--data", str(tiny_dataset), "--prompts", asked, "--out", str(tmp_path / "r.json")]
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / method), *flags]) == 2
        assert said in capsys.readouterr().err
    zero_shot = ["--method", "zero-shot", "--backbone", "tiny-random", "--image-size", "64"]
    assert main(["evaluate", *zero_shot, *flags]) == 2
    assert "--prompts auto" in capsys.readouterr().err


def test_what_a_method_was_made_for():
    kinds = {name: prompts_for(build_config(name, {}).model) for name in METHODS}
    assert {kinds[name] for name in FREE} == {"auto"}
    assert kinds["medsam"] == "box"
    assert kinds["cheap-lunch"] == kinds["zero-shot"] == "furthest"
    clicks = build_config("cheap-lunch", {"training_prompts": "clicks:7"}).model
    assert read_prompting(prompts_for(clicks)) == Prompting("clicks", 7)
    for kind in ("furthest", "random", "box", "clicks:3", "one-click"):
        check_prompting(clicks, read_prompting(kind))


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("cheap-lunch", {"head": "classes"}, "--head classes goes with --training-prompts none"),
        ("samed", {"training_prompts": "box"}, "--head classes goes with --training-prompts none"),
        (
            "cheap-lunch",
            {"training_prompts": "none"},
            "--head two goes with --training-prompts point, box, clicks:N or text",
        ),
        ("cheap-lunch", {"training_prompts": "clicks"}, "--training-prompts clicks is not known"),
        ("cheap-lunch", {"training_prompts": "clicks:0"}, "--training-prompts clicks:0 is not known"),
        ("cheap-lunch", {"training_prompts": "box:2"}, "--training-prompts box:2 is not known"),
        ("cheap-lunch", {"tuning": "linear"}, "--tuning linear takes no prompts"),
        ("cheap-lunch", {"mask": "best"}, "--mask best is of SAM as it is"),
        ("cheap-lunch", {"empty_share": 0.1}, "--empty-share"),
        ("samed", {"training_prompts": "text"}, "--head classes goes with --training-prompts none"),
        ("cheap-lunch", {"training_prompts": "text:2"}, "--training-prompts text:2 is not known"),
        ("samed", {"empty_share": 1.1}, "--empty-share is 1.1"),
        ("unet", {"backbone": "lite-medsam"}, "--backbone lite-medsam: --method unet is a network of its own"),
        ("unet-3d", {"depth": 1}, "--depth is 1; unet-3d sees several slices at once: --method unet sees one"),
        ("unet-3d", {"real_share": 0.5}, "--backbone unet-3d learns from exemplars .*; give --real-share 1"),
        ("unet-3d", {"synthetic_set": "set"}, "--backbone unet-3d learns from exemplars .*; leave out --synthetic-set"),
    ],
)
def test_settings_that_do_not_go_together(method, values, said):
    with pytest.raises(UserError, match=said):
        build_config(method, values)


def test_a_plain_network_has_nothing_else_to_be_trained(tiny_dataset, tmp_path):
    for changes in ({"tuning": "lora"}, {"weights": tmp_path / "w.pth"}):
        values = {"data": tiny_dataset, "image_size": 32, "exemplars": 2} | changes
        with pytest.raises(UserError, match="--backbone unet has no pretrained weights"):
            finetune(build_config("unet", values), tmp_path / "run")


# ---- without prompts


def small(data: Path, method: str, **changes):
    values = {"data": data, "backbone": "tiny-random", "image_size": 64, "exemplars": 2, "steps": 2, "batch_size": 2}
    values |= {"warmup_steps": 1, "device": "cpu", "precision": "fp32"}
    return build_config(method, values | changes)


def test_every_slice_is_answered_also_of_a_case_without_a_label(tiny_dataset, tmp_path):
    run = finetune(small(tiny_dataset, "samed"), tmp_path / "run")
    dataset = open_dataset(tiny_dataset)
    case = load_case(dataset.split("test")[0], dataset, Window())
    segmenter = load_segmenter(run.load_config().model, run.adapter)
    unlabelled = type(case)(case.image, None, case.volume)
    found = segment_auto(Predictor(segmenter), unlabelled, [7, 200], keep=[200, 7])
    assert found.label.shape == (6, 32, 32)
    assert set(np.unique(found.label)) <= {0, 7, 200}
    # By hand, one slice: the softmax over all outputs, brought to the slice's pixels; the likeliest wins.
    image = torch.from_numpy(case.image[2:3]).expand(-1, 3, -1, -1)
    with torch.no_grad():
        logits = segmenter.classes(segmenter.embed(F.interpolate(image, (64, 64), mode="bilinear")))  # (1, 3, 16, 16)
    likely = F.interpolate(logits, (32, 32), mode="bilinear").softmax(dim=1)[0].numpy()
    np.testing.assert_allclose(found.probabilities[:, 2], likely[[2, 1]], atol=2e-3)  # float16
    assert (found.label[2] == np.array([0, 7, 200])[likely.argmax(axis=0)]).mean() > 0.99
    assert len(np.unique(likely.argmax(axis=0))) > 1


def test_data_with_other_classes_is_refused(tiny_dataset, tmp_path, capsys):
    import shutil

    assert main(["finetune", *words(tiny_dataset, "linear-probe"), "--out", str(tmp_path / "run")]) == 0
    other = shutil.copytree(tiny_dataset, tmp_path / "other")
    about = other / "dataset.json"
    about.write_text(about.read_text().replace('"disc"', '"ring"'))
    words_ = ["evaluate", str(tmp_path / "run"), "--data", str(other), "--out", str(tmp_path / "r.json")]
    assert main(words_) == 2
    assert "has the classes ring, block, but the network answers with disc, block" in capsys.readouterr().err


def test_classes_are_known_by_their_names_not_their_numbers(tiny_dataset, tmp_path):
    """The same data with its labels numbered the other way round scores the same."""
    import shutil

    import nibabel as nib

    run, result = run_and_score(tiny_dataset, "unet", tmp_path / "a", steps=20)
    other = shutil.copytree(tiny_dataset, tmp_path / "other")
    about = json.loads((other / "dataset.json").read_text())
    about["labels"] = {"background": 0, "block": 1, "disc": 2}
    (other / "dataset.json").write_text(json.dumps(about))
    for path in (other / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.array([0, 2, 1], np.uint8)[np.asarray(image.dataobj)], image.affine), path)
    assert main(["evaluate", str(run.root), "--data", str(other), "--out", str(tmp_path / "r.json")]) == 0
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["mean"]["dice"] == result["mean"]["dice"] > 0
    assert again["classes"] == result["classes"]


# ---- a new one, as CONTRIBUTING says


def test_the_worked_example_of_contributing(tiny_dataset, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    row = text.split("```python\n", 1)[1].split("```", 1)[0]
    added: dict = {}
    exec(f"added.update({{{row}}})", {"added": added})
    [name] = added
    monkeypatch.setitem(METHODS, name, added[name])
    run, result = run_and_score(tiny_dataset, name, tmp_path)
    check_run(run, result, name)
    made = load_config(run.config)
    said = yaml.safe_load(run.config.read_text())
    assert made.method == said["method"] == name
    assert all(said[setting] == value for setting, value in added[name].items())
