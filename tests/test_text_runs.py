"""A run that learns from texts, by the real command line: CLIP is needed once, and then no more."""

import hashlib
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from cheaplunch.__main__ import main
from cheaplunch.config import build_config, load_config
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.interactive import open_model
from cheaplunch.material import prepare
from cheaplunch.models.text import TextBank
from cheaplunch.prediction import segment_auto, segment_texts
from cheaplunch.prompts import Prompts
from cheaplunch.runs import RunFolder
from cheaplunch.training import finetune
from cheaplunch.work import draw_texts, draw_work

SMALL = {"backbone": "tiny-random", "image_size": 64, "exemplars": 2, "batch_size": 2, "device": "cpu"}
SMALL |= {"steps": 3, "warmup_steps": 0, "checkpoint_every": 2, "precision": "fp32", "training_prompts": "text"}


@pytest.fixture(scope="module")
def lost_clip(tiny_clip, tmp_path_factory) -> Path:
    """A CLIP that is there when the first run starts and then is not."""
    return shutil.copytree(tiny_clip, tmp_path_factory.mktemp("lost") / "clip")


@pytest.fixture(scope="module")
def settings(tiny_dataset, lost_clip) -> dict:
    return {**SMALL, "data": tiny_dataset, "clip": str(lost_clip)}


@pytest.fixture(scope="module")
def run(settings, lost_clip, tmp_path_factory) -> RunFolder:
    """Of the command line; its CLIP is gone."""
    out = tmp_path_factory.mktemp("run") / "run"
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["finetune", *flags, "--validation-cases", "1", "--validate-every", "3", "--out", str(out)]) == 0
    shutil.rmtree(lost_clip)
    return RunFolder(out)


def said(capsys, *words: object) -> str:
    """The one line that a command which fails says."""
    assert main([str(word) for word in words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cheaplunch:")]
    return line


def test_the_run_says_what_it_learned_and_what_was_held_out(run):
    config = load_config(run.config)
    assert (config.model.text_width, config.training.empty_share) == (24, 0.2)
    texts = json.loads((run.texts / "texts.json").read_text())
    assert texts["training"]["disc"][0] == "optic disc" and texts["training"]["block"][0] == "block"
    assert texts["held_out"]["block"] == ["please show me the block", "where is the block in this picture"]
    assert json.loads(run.metrics.read_text().splitlines()[-1])["validation_dice"] >= 0


def test_evaluation_asks_with_what_was_held_out_and_says_so(run, tiny_dataset, tmp_path, capsys):
    out, masks = tmp_path / "result.json", tmp_path / "masks"
    words = ["evaluate", run.root, "--data", tiny_dataset, "--out", out, "--save-masks", masks, "--draws", 2]
    assert main([str(word) for word in words]) == 0
    result = json.loads(out.read_text())
    assert (result["prompts"], result["oracle_prompts"], result["present_classes_only"]) == ("text", False, False)
    assert result["texts"]["block"] == ["please show me the block", "where is the block in this picture"]
    assert result["texts_held_out"] == {"disc": True, "block": True}
    assert len(result["draws"]) == 2
    assert "--draws 3: disc has 2 texts" in said(capsys, *words[:-1], 3)
    assert "give --prompts text" in said(capsys, *words[:-2], "--prompts", "furthest")


def test_masks_by_name_and_by_text_without_clip(run, tiny_dataset, tmp_path, capsys):
    image = tiny_dataset / "imagesTr" / "case_1_0000.nii.gz"

    def masks(out: str, *prompts: object) -> np.ndarray:
        words = ["predict", run.root, image, "--out", tmp_path / out, *prompts]
        assert main([str(word) for word in words]) == 0
        return np.asarray(nib.load(tmp_path / out / "case_1.nii.gz").dataobj)

    def texts(content) -> Path:
        (tmp_path / "texts.json").write_text(json.dumps(content))
        return tmp_path / "texts.json"

    by_name = masks("names", "--prompts", "text")
    assert np.array_equal(by_name, masks("default"))
    names = [{"class": "disc", "text": "optic disc"}, {"class": "block", "text": "block"}]
    assert np.array_equal(by_name, masks("same", "--prompts", texts(names)))
    swapped = [{"class": "disc", "text": "block"}, {"class": "block", "text": "optic disc"}]
    other = masks("swapped", "--prompts", texts({"case_1": swapped}))
    assert np.array_equal(other == 1, by_name == 2) and np.array_equal(other == 2, by_name == 1)
    one = masks("one", "--prompts", texts(names[:1]))
    assert set(np.unique(one)) <= {0, 1} and one.sum() >= (by_name == 1).sum()

    ask = ["predict", run.root, image, "--out", tmp_path / "wrong", "--prompts"]
    line = said(capsys, *ask, texts([{"class": "disc", "text": "a bright ball"}]))
    assert "'a bright ball' is none of those that" in line and "'optic disc'" in line and "--clip" in line
    assert "entry 1: the run is asked by texts" in said(capsys, *ask, texts([{"class": "disc", "voxel": [1, 2, 3]}]))
    assert "has a text for this image already" in said(capsys, *ask, texts([names[0], names[0]]))
    assert "--prompts auto" in said(capsys, *ask, "auto")


def test_an_unknown_text_is_embedded_where_clip_is_at_hand(run, tiny_dataset, tiny_clip, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps([{"class": "disc", "text": "a bright ball"}]))
    words = ["predict", run.root, tiny_dataset / "imagesTr", "--out", tmp_path / "out", "--clip", tiny_clip]
    assert main([str(word) for word in (*words, "--prompts", tmp_path / "texts.json")]) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3  # a list alone is for every image


def test_an_open_case_is_asked_by_the_names(run, tiny_dataset):
    model = open_model(run, run.load_config())
    assert not model.prompted and model.texts is not None
    case = model.open([tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"])
    asked = model.texts.ask({1: "optic disc", 2: "block"})
    assert np.array_equal(case.label_unprompted([1, 2]), case.label_unprompted([], asked))


def test_every_slice_is_asked_for_every_class_and_the_likelier_has_a_pixel(run, tiny_dataset):
    model, dataset = open_model(run, run.load_config()), open_dataset(tiny_dataset)
    case = load_case(dataset.cases[0], dataset, model.window)
    assert model.texts is not None and model.predictor.texts is not None
    both = [model.texts.ask({2: "block", 1: text}) for text in ("optic disc", "please show me the optic disc")]
    model.predictor.smooth_mm = 0.0
    found = segment_texts(model.predictor, case, both, keep=[1, 2])
    for one, texts in zip(found, both, strict=True):
        for number, embedded in enumerate(model.predictor.embed(case.image)):
            prompts = Prompts(texts=torch.stack([texts[1], texts[2]])[None])
            alone = model.predictor.probabilities(embedded, prompts)  # (2, H, W)
            np.testing.assert_allclose(one.probabilities[:, number], alone, atol=2e-3)
            expected = np.where(alone.max(axis=0) > 0.5, 1 + alone.argmax(axis=0), 0)
            assert (one.label[number] == expected).mean() > 0.999
    assert not np.array_equal(found[0].probabilities, found[1].probabilities)
    by_name = segment_auto(model.predictor, case, [1, 2], keep=[1, 2])
    np.testing.assert_allclose(by_name.probabilities, found[0].probabilities, atol=2e-3)


# ---- training


def test_a_resumed_run_is_the_undisturbed_one_and_needs_no_clip(settings, tiny_clip, tmp_path):
    clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    config = build_config("msa", {**settings, "clip": str(clip), "checkpoint_every": 1})
    whole = finetune(config, tmp_path / "whole")

    def cut(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "cut", progress=cut)
    shutil.rmtree(clip)
    resumed = finetune(config, tmp_path / "cut", resume=True)
    file = "adapter_model.safetensors"
    hashes = {hashlib.sha256((one.adapter / file).read_bytes()).digest() for one in (whole, resumed)}
    assert len(hashes) == 1


def test_a_step_asks_for_classes_that_are_there_that_are_not_and_for_several(tiny_dataset, tiny_clip):
    config = build_config("cheap-lunch", {**SMALL, "data": tiny_dataset, "clip": str(tiny_clip), "empty_share": 0.4})
    material = prepare(config)
    bank = material.texts
    assert isinstance(bank, TextBank) and material.config.model.text_width == bank.width == 24
    phrasings, empty = bank.phrasings, 0
    known = {text: name for name, texts in phrasings.training.items() for text in texts}
    unions = {union.text: union.classes for union in phrasings.unions}
    rows = {text: bank.vectors([text])[0] for text in [*known, *unions]}
    names, kinds = ["disc", "block"], []
    for step in range(12):
        work = draw_work(material, step, [0, 1])
        assert work.prompts.texts.shape == (2, 4, 24) and work.targets.shape == (2, 4, 64, 64)
        shown = work.targets.any(dim=1)  # (B, S, S)
        empty += int((~shown.flatten(1).any(dim=1)).sum())
        for vectors, targets in zip(work.prompts.texts, work.targets, strict=True):
            for vector, target in zip(vectors, targets, strict=True):
                text = next(text for text, row in rows.items() if torch.equal(row, vector))
                kinds.append((text in unions, bool(target.any())))
    assert {kind for kind in kinds} == {(a, b) for a in (True, False) for b in (True, False)}
    assert 0.1 < np.mean([union for union, _ in kinds]) < 0.45
    assert 2 <= empty <= 20
    assert torch.equal(draw_work(material, 5, [1]).prompts.texts[0], draw_work(material, 5, [0, 1]).prompts.texts[1])
    # Worked by hand: a corner of disc, one of block; then nothing; then only block.
    both = torch.tensor([[1, 0], [0, 2]], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for label in (both, torch.zeros_like(both), both * (both == 2)):
        for text, mask in draw_texts(label, 40, phrasings, generator):
            classes = unions.get(text) or (known[text],)
            expected = sum((label == 1 + names.index(name)).long() for name in classes) > 0
            assert torch.equal(mask, expected)
    absent = [mask for _, mask in draw_texts(both * (both == 2), 200, phrasings, generator) if not mask.any()]
    assert 55 < len(absent) < 95  # half of the three quarters that are of one class


def test_what_a_network_without_texts_says(tiny_dataset, tmp_path, capsys):
    words = ["finetune", "--data", tiny_dataset, "--out", tmp_path / "run", "--exemplars", 2]
    assert "--text-file does nothing" in said(capsys, *words, "--text-file", tmp_path / "no.yaml")
    missing = said(capsys, *words, "--training-prompts", "text", "--clip", tmp_path / "no-clip")
    assert "--clip" in missing and "no such folder" in missing
    assert not (tmp_path / "run").exists()
