"""Texts as prompts: CLIP's text tower, the embeddings that a run keeps, and the projection, on a tiny CLIP."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cheaplunch.config import ModelConfig
from cheaplunch.errors import UserError
from cheaplunch.models.lora import save_adapter
from cheaplunch.models.segmenter import Segmenter, build_segmenter, load_segmenter
from cheaplunch.models.text import TOKENS, TextBank, TextProjection, TextTower
from cheaplunch.prompts import Prompts
from cheaplunch.texts import read_phrasings


@pytest.fixture(scope="module")
def bank(tiny_clip) -> TextBank:
    phrasings = read_phrasings(["disc", "block"], None, np.random.default_rng(0))
    return TextBank.embedded(phrasings, str(tiny_clip))


def build(seed: int = 0, **settings) -> Segmenter:
    values = {"backbone": "tiny-random", "image_size": 64, "training_prompts": "text", "text_width": 24}
    return build_segmenter(ModelConfig(**{**values, **settings}), seed).eval()


# ---- CLIP


def test_embeddings_are_clip_s_own_whatever_they_are_embedded_with(tiny_clip):
    model, tokenizer = CLIPTextModelWithProjection.from_pretrained(tiny_clip), CLIPTokenizer.from_pretrained(tiny_clip)
    texts = ["a", "the optic disc", "a longer text, of other letters"]
    found = TextTower(str(tiny_clip))(texts)
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).text_embeds for text in texts]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_folder_that_is_no_clip_is_named(tiny_clip, tmp_path):
    def said(name) -> str:
        with pytest.raises(UserError, match="--clip") as raised:
            TextTower(str(name))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no such folder, nor a hub id" in said(tmp_path / "missing")
    assert "cannot be had" in said(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(tiny_clip, other)
    (other / "vocab.json").unlink()
    (other / "merges.txt").unlink()
    assert "its tokenizer knows" in said(other)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hf download nobody/no-clip --local-dir DIR. elsewhere .* --clip DIR$"):
        TextTower("nobody/no-clip")


def test_a_text_too_long_is_refused_and_not_cut(tiny_clip):
    with pytest.raises(UserError, match="is 152 tokens long, and CLIP reads 128"):
        TextTower(str(tiny_clip))(["x" * 150])


# ---- what a run keeps


def test_what_the_network_is_given_is_centred_and_of_length_one(bank):
    trained = [text for texts in bank.phrasings.training.values() for text in texts]
    vectors = bank.vectors(trained)
    assert vectors.shape == (len(trained), bank.width) == (len(trained), 24)
    torch.testing.assert_close(vectors.mean(dim=0), torch.zeros(24), atol=1e-5, rtol=0)
    assert vectors.square().sum(dim=1).mean().item() == pytest.approx(1, abs=1e-4)


def test_kept_texts_need_no_clip(bank, tmp_path):
    bank.save(tmp_path)
    said = json.loads((tmp_path / "texts.json").read_text())
    assert said["held_out"]["disc"] and said["texts"] == bank.phrasings.all
    kept = TextBank.load(tmp_path, "/nowhere")
    assert kept.phrasings == bank.phrasings
    assert torch.equal(kept.vectors(bank.phrasings.all), bank.vectors(bank.phrasings.all))
    with pytest.raises(
        UserError, match=r"'a new one' is none of those that .*texts.json keeps: 'optic disc', .*--clip"
    ):
        kept.vectors(["optic disc", "a new one"])
    (tmp_path / "embeddings.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged"):
        TextBank.load(tmp_path, "/nowhere")


def test_other_texts_are_embedded_by_the_same_clip_alone(bank, tiny_clip, tmp_path):
    bank.save(tmp_path / "texts")
    found = TextBank.load(tmp_path / "texts", str(tiny_clip)).vectors(["a new one", "optic disc"])
    assert torch.equal(found[1], bank.vectors(["optic disc"])[0]) and found[0].abs().sum() > 0
    other = tmp_path / "other"
    shutil.copytree(tiny_clip, other)
    model = CLIPTextModelWithProjection.from_pretrained(other)
    model.text_projection.weight.data.mul_(1.5)
    model.save_pretrained(other)
    with pytest.raises(UserError, match="is another CLIP than"):
        TextBank.load(tmp_path / "texts", str(other)).vectors(["a new one"])


# ---- the network


def test_the_projection_starts_alike_for_all_texts_and_as_large_as_sam_s_own_embeddings():
    projection = TextProjection(512, 256, torch.Generator().manual_seed(0))
    tokens = projection(torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(1)))
    assert tokens.shape == (3, 5, TOKENS, 256)
    assert tokens[0, 0].std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(tokens, tokens[:1, :1].expand_as(tokens))


@pytest.mark.parametrize("tuning", ["lora", "adapter", "decoder", "full"])
def test_the_text_decides_and_only_its_projection_is_trained_of_the_prompts(tuning, bank, tmp_path):
    segmenter = build(tuning=tuning)
    trained = {name.split("base_model.model.")[-1] for name, p in segmenter.named_parameters() if p.requires_grad}
    assert any("text_projection" in name for name in trained)
    assert not any("point_embed" in name or "mask_embed." in name.replace("no_mask_embed", "") for name in trained)
    texts = bank.vectors(["optic disc", "block"])[None].expand(2, -1, -1)  # (B, P, E)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, weight in segmenter.named_parameters():
        if "text_projection" in name and weight.ndim == 2:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))  # as if learned
    outputs = segmenter(images, Prompts(texts=texts))
    assert outputs.shape == (2, 2, 2, 16, 16)
    assert not torch.allclose(outputs[:, 0], outputs[:, 1])
    alone = segmenter(images[1:], Prompts(texts=texts[1:, 1:]))
    torch.testing.assert_close(alone[0, 0], outputs[1, 1], atol=1e-5, rtol=1e-4)
    segmenter(images, Prompts(texts=texts)).square().mean().backward()
    gradients = {name: p.grad for name, p in segmenter.named_parameters() if "text_projection" in name}
    assert all(g is not None and g.abs().sum() > 0 for n, g in gradients.items() if "original_module" not in n)

    save_adapter(segmenter.network, tmp_path / "adapter")
    config = ModelConfig(backbone="tiny-random", image_size=64, training_prompts="text", text_width=24, tuning=tuning)
    loaded = load_segmenter(config, tmp_path / "adapter")
    torch.testing.assert_close(loaded(images, Prompts(texts=texts)), outputs, atol=1e-4, rtol=1e-4)


def test_texts_and_places_may_stand_together(bank):
    network = build(tuning="decoder").network
    embeddings, texts = torch.randn(1, 64, 4, 4), bank.vectors(["optic disc", "block"])[None]
    points, labels = torch.tensor([[[[5.0, 9.0]], [[40.0, 30.0]]]]), torch.ones(1, 2, 1, dtype=torch.long)
    masks = torch.randn(1, 2, 16, 16)
    both, _ = network.decode(embeddings, points, labels, None, masks, texts, multimask=True)
    for p in range(2):
        one, _ = network.decode(
            embeddings,
            points[:, p : p + 1],
            labels[:, p : p + 1],
            None,
            masks[:, p : p + 1],
            texts[:, p : p + 1],
            multimask=True,
        )
        torch.testing.assert_close(one[:, 0], both[:, p], atol=1e-5, rtol=1e-4)
    without, _ = network.decode(embeddings, points, labels, None, masks, multimask=True)
    assert not torch.allclose(without, both)
