"""What each ablation switches off, and that it is off: the decoder, the set, each transform, all classes but some."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cheaplunch.__main__ import main
from cheaplunch.config import ModelConfig, RunConfig, SynthesisConfig, build_config, load_config
from cheaplunch.data.cases import load_case
from cheaplunch.data.dataset import Case, Dataset
from cheaplunch.data.labels import LabelFiles, Levels
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Window
from cheaplunch.data.subset import Without, take_classes
from cheaplunch.errors import UserError
from cheaplunch.exemplars import background_slices
from cheaplunch.material import prepare, preview
from cheaplunch.models.backbones import load_backbone
from cheaplunch.models.heads import make_two_outputs
from cheaplunch.models.lora import ADAPTER_FILE
from cheaplunch.models.segmenter import build_segmenter, load_segmenter
from cheaplunch.synthesis import Pool, synthesize
from cheaplunch.training import finetune

SMALL = {"backbone": "tiny-random", "image_size": 64, "device": "cpu", "precision": "fp32"}
SMALL |= {"exemplars": 3, "steps": 2, "warmup_steps": 0, "batch_size": 2}


def small(data: Path, **changes) -> RunConfig:
    return build_config("cheap-lunch", SMALL | {"data": data} | changes)


# ---- the decoder


def test_what_is_trained_of_the_decoder_s_transformer():
    """tiny-random: q and v of 7 attentions in the decoder, each from and to 64 numbers or half as many."""

    def counts(**changes) -> tuple[int, int]:
        segmenter = build_segmenter(ModelConfig(backbone="tiny-random", image_size=64, **changes))
        trained = {name: p.numel() for name, p in segmenter.named_parameters() if p.requires_grad}
        in_it = sum(count for name, count in trained.items() if "mask_decoder.transformer" in name)
        return in_it, sum(trained.values()) - in_it

    transformer = load_backbone("tiny-random", 64).mask_decoder.transformer
    every = sum(p.numel() for p in transformer.parameters())
    # 2 self-attentions map 64 → 64, the 5 across map 64 → 32; A is r × 64, B is r × 64 or r × 32; q and v.
    lora, rest = counts()
    assert lora == 2 * 4 * (2 * (64 + 64) + 5 * (64 + 32))
    assert counts(decoder_tuning="frozen") == (0, rest)
    assert counts(decoder_tuning="full") == (every, rest)
    assert counts(lora_rank=8)[0] == 2 * lora


@pytest.mark.parametrize("way", ["lora", "frozen", "full"])
def test_what_moves_and_that_it_comes_back(way, tiny_dataset, tmp_path):
    run = finetune(small(tiny_dataset, decoder_tuning=way), tmp_path / "run")
    saved = load_file(run.adapter / ADAPTER_FILE)
    inside = {name for name in saved if "mask_decoder.transformer" in name}
    assert {"lora": 28, "frozen": 0}.get(way, len(inside)) == len(inside)
    assert all("lora_" in name for name in inside) == (way != "full")

    base = load_backbone("tiny-random", 64)
    make_two_outputs(base)
    before = dict(base.named_parameters())
    after = dict(load_segmenter(run.load_config().model, run.adapter).network.named_parameters())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    transformer = {name for name in before if name.startswith("mask_decoder.transformer.")}
    touched = {
        "frozen": set(),
        "lora": {name for name in transformer if name.endswith(("q_proj.weight", "v_proj.weight"))},
        "full": {name for name in transformer if not name.endswith("k_proj.bias")},  # which softmax does not see
    }
    assert moved & transformer == touched[way] or (way == "full" and moved & transformer >= touched[way])
    assert {name for name in moved if name.startswith("vision_encoder.")} == {
        f"vision_encoder.layers.{block}.attn.qkv.{part}_proj.weight" for block in (0, 1) for part in "qv"
    }


# ---- the set


def test_without_synthesis_from_the_command_line(tiny_dataset, tmp_path):
    words = ["finetune", "--no-synthesis", "--data", tiny_dataset, "--out", tmp_path / "run"]
    words += [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main([str(word) for word in words]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").synthesis.real_share == 1


OFF = SynthesisConfig(
    real_share=0, drop=0, rotation_deg=0, scale=0, shift=0, flip=0, blur_px=0, intensity=0, synthetic=20
)


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Three exemplars with an L and a triangle, which no flip leaves as they were, and two backgrounds, all noise."""
    noise = torch.Generator().manual_seed(8)
    labels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for n in range(3):
        labels[n, 4 : 16 + n, 5:8] = 1
        labels[n, 13 + n : 16 + n, 5:14] = 1
        labels[n, 17:29, 17:29] = 2 * torch.ones(12, 12).tril().byte()
    images, backgrounds = (0.2 + 0.7 * torch.rand(count, 1, 32, 32, generator=noise) for count in (3, 2))
    return Pool(images, labels, backgrounds, torch.full((3, 2), 32), torch.full((2, 2), 32), 2)


def test_with_every_transform_off_organs_are_pasted_where_they_were(pool):
    batch = synthesize(pool, list(range(20)), OFF, seed=1)
    for image, label in zip(batch.images, batch.labels, strict=True):
        [exemplar] = {n for n, own in enumerate(pool.labels) if torch.equal(own, label)}
        organ = label > 0
        torch.testing.assert_close(image[:, organ], pool.images[exemplar][:, organ], atol=2e-3, rtol=0)
        behind = [(image - background)[:, ~organ].abs().max() for background in pool.backgrounds]
        assert min(behind) < 1e-4


def test_without_synthesis_and_transforms_the_exemplars_as_they_are(pool):
    batch = synthesize(pool, list(range(20)), replace(OFF, real_share=1), seed=1)
    found = [int(torch.stack([(image - own).abs().max() for own in pool.images]).argmin()) for image in batch.images]
    assert set(found) == set(range(len(pool.images)))
    for image, label, n in zip(batch.images, batch.labels, found, strict=True):
        torch.testing.assert_close(image, pool.images[n], atol=1e-4, rtol=0)
        assert torch.equal(label, pool.labels[n])


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"rotation_deg": 30}, True),
        ({"scale": 0.4}, True),
        ({"shift": 0.1}, True),
        ({"flip": 1.0}, True),
        ({"drop": 0.7}, True),
        ({"blur_px": 3}, False),
        ({"intensity": 0.5}, False),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_each_transform_alone_does_its_part(pool, change, moves):
    still = synthesize(pool, list(range(8)), OFF, seed=2)
    alone = synthesize(pool, list(range(8)), replace(OFF, **change), seed=2)
    assert torch.equal(still.labels, alone.labels) != moves
    assert not torch.allclose(still.images, alone.images, atol=1e-2)


def test_the_preview_shows_what_is_learned_from(tiny_dataset):
    material = prepare(small(tiny_dataset, real_share=1.0, rotation_deg=0, scale=0, shift=0, blur_px=0, intensity=0))
    shown = preview(material, 5)
    assert all(any(torch.equal(label, own) for own in material.pool.labels) for label in shown.labels)
    material = prepare(small(tiny_dataset, real_share=0.5))
    pasted = synthesize(material.pool, list(range(5)), SynthesisConfig(real_share=0.0), 0)
    assert torch.equal(preview(material, 5).images, pasted.images)


# ---- some of the classes


def test_one_class_is_trained_and_scored(tiny_dataset, tmp_path):
    words = ["finetune", "--classes", "disc", "--data", tiny_dataset, "--out", tmp_path / "run"]
    words += [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main([str(word) for word in words]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").data.classes == ("disc",)
    with (tmp_path / "run" / "exemplars.csv").open() as file:
        assert next(csv.reader(file)) == ["case", "slice", "disc_px"]

    out, masks = tmp_path / "run.json", tmp_path / "masks"
    words = ["evaluate", tmp_path / "run", "--data", tiny_dataset, "--save-masks", masks, "--out", out]
    assert main([str(word) for word in words]) == 0
    assert list(json.loads(out.read_text())["classes"]) == ["disc"]
    [mask] = masks.glob("*.nii.gz")
    assert set(np.unique(np.asarray(nib.load(mask).dataobj))) <= {0, 1}

    words = ["evaluate", "--method", "zero-shot", "--backbone", "tiny-random", "--classes", "block", "--out", out]
    assert main([str(word) for word in (*words, "--data", tiny_dataset)]) == 0
    assert list(json.loads(out.read_text())["classes"]) == ["block"]


def test_the_others_become_background(tiny_dataset):
    whole = open_dataset(tiny_dataset)
    disc = take_classes(whole, ["disc"])
    assert (disc.labels, whole.labels) == ({"disc": 1}, {"disc": 1, "block": 2})
    for before, after in zip(whole.cases, disc.cases, strict=True):
        truth, thin = (load_case(c, d, Window(0, 255)).label for c, d in ((before, whole), (after, disc)))
        assert np.array_equal(thin, np.where(truth == 2, 0, truth))
    # Slices with the block alone have nothing to be trained: they are backgrounds now.
    free = {
        name: background_slices(prepare(small(tiny_dataset, classes=only)).index)
        for name, only in (("all", None), ("disc", ("disc",)))
    }
    assert {key.slice_number for key in free["all"]} == {0, 5}
    assert {key.slice_number for key in free["disc"]} == {0, 4, 5}
    assert take_classes(whole, None) is whole
    assert take_classes(whole, ["block", "disc"]).cases == whole.cases


def test_regions_keep_the_labels_they_are_made_of(tmp_path):
    case = Case("a", (tmp_path / "a.png",), LabelFiles((tmp_path / "m.png",), Levels(((0, 2), (128, 1)))), "train", "a")
    disc_and_cup = Dataset(
        tmp_path, "eyes", {"rim": 1, "cup": 2}, ("grey",), (case,), "", regions={"disc": (1, 2), "cup": (2,)}
    )
    disc = take_classes(disc_and_cup, ["disc"])
    assert (dict(disc.regions), disc.labels) == ({"disc": (1, 2)}, {"rim": 1, "cup": 2})
    assert disc.cases == (case,)
    cup = take_classes(disc_and_cup, ["cup"])
    assert (dict(cup.regions), cup.labels) == ({"cup": (2,)}, {"cup": 2})
    assert cup.cases[0].label == LabelFiles(case.label.paths, Without(case.label.rule, (1,)))
    with pytest.raises(UserError, match=r"--classes rim: .*choose of: disc, cup"):
        take_classes(disc_and_cup, ["rim"])


def test_classes_that_are_none(tiny_dataset, tmp_path):
    assert build_config("cheap-lunch", {"classes": "disc"}).data.classes == ("disc",)  # as a line of YAML may be
    for wrong, said in (((), "--classes names none"), ([1], "--classes is"), (3, "--classes is 3")):
        with pytest.raises(UserError, match=said):
            build_config("cheap-lunch", {"classes": wrong})
    with pytest.raises(UserError, match="--classes liver: .*choose of: disc, block"):
        finetune(small(tiny_dataset, classes=["liver"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
