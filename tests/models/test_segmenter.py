"""LoRA and the two outputs: where training starts, what is trained, and that an adapter comes back whole."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from cheaplunch.errors import UserError
from cheaplunch.models.heads import BACKGROUND, TARGET
from cheaplunch.models.lora import ADAPTER_FILE, load_adapter, save_adapter
from cheaplunch.prompts import Prompts

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
BOXES = torch.tensor(
    [[[5.0, 6, 40, 50], [20, 20, 60, 30]], [[0, 0, 63, 63], [1, 30, 20, 50]], [[30, 2, 50, 60], [9, 9, 12, 12]]]
)  # (3, 2, 4)
POINTS = torch.tensor([[[[5.0, 6]], [[40, 50]]], [[[20, 20]], [[60, 30]]], [[[9, 9]], [[12, 12]]]])  # (3, 2, 1, 2)
BY_BOX = Prompts(boxes_xyxy=BOXES)
BY_POINT = Prompts(points_xy=POINTS, point_labels=torch.ones(3, 2, 1, dtype=torch.long))


@torch.no_grad()
def foreground(segmenter, prompts=BY_POINT, images=IMAGES):
    return segmenter.foreground(segmenter.embed(images), prompts)


@torch.no_grad()
def disturb(segmenter, seed=5):
    """As if trained: every trained tensor is moved a little."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in segmenter.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return segmenter


@pytest.fixture(scope="module")
def fresh(build):
    """At its start; copy before changing."""
    return build(seed=0)


@pytest.fixture(scope="module")
def trained(fresh):
    return disturb(copy.deepcopy(fresh))


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(trained.network, folder)
    return folder


# ---- the start


@pytest.mark.parametrize("prompts", [BY_BOX, BY_POINT], ids=["boxes", "points"])
def test_training_starts_at_zero_shot(zero_shot, fresh, prompts):
    with torch.no_grad():
        assert torch.equal(fresh.embed(IMAGES), zero_shot.embed(IMAGES))  # B is zero
        outputs = fresh(IMAGES, prompts)
    assert outputs.shape == (3, 2, 2, 64, 64)
    assert (outputs[:, :, 0] == 0).all()  # the background
    torch.testing.assert_close(outputs[:, :, 1], foreground(zero_shot, prompts), atol=1e-4, rtol=0)


def test_a_fresh_head_starts_elsewhere_but_keeps_the_encoder(build, zero_shot):
    other = build(head_start="fresh")
    with torch.no_grad():
        assert torch.equal(other.embed(IMAGES), zero_shot.embed(IMAGES))
    assert (foreground(other) - foreground(zero_shot)).abs().mean() > 1


def test_lora_is_on_q_and_v_of_encoder_and_decoder_and_nowhere_else(fresh):
    a = {name: p for name, p in fresh.named_parameters() if ".lora_A." in name}
    b = {name: p for name, p in fresh.named_parameters() if ".lora_B." in name}
    # Encoder: 2 + 6 + 2 blocks; decoder: 2 layers of 3 attentions and a last one; q and v of each.
    assert len(a) == len(b) == 2 * 10 + 2 * (2 * 3 + 1)
    assert sum("vision_encoder" in name for name in a) == 20
    assert {name.split(".lora_A")[0].rsplit(".", 1)[1] for name in a} == {"q_proj", "v_proj"}
    assert all(p.shape[0] == 4 and p.std() > 0 for p in a.values())
    assert all(p.shape[1] == 4 and (p == 0).all() for p in b.values())
    third = next(p for name, p in a.items() if "vision_encoder.layers.2.blocks.0.attn.q_proj" in name)
    assert third.shape == (4, 160)
    assert third.abs().max() <= 1 / 160**0.5 + 1e-6  # Kaiming-uniform with a = √5


def test_only_lora_and_the_small_modules_are_trained(fresh):
    names = [n for n, p in fresh.named_parameters() if p.requires_grad and ".lora_" not in n]
    parts = {n.split("base_model.model.")[1].replace(".modules_to_save.default", "").rsplit(".", 1)[0] for n in names}
    mlps = {p for p in parts if "hypernetworks" in p}
    assert {p.split("mlps.")[1].split(".")[0] for p in mlps} == {str(BACKGROUND), str(TARGET)}
    assert parts - mlps == {
        "prompt_encoder.point_embed.1",  # points on the target; no loss reaches the other three kinds
        *("prompt_encoder.not_a_point_embed", "prompt_encoder.no_mask_embed"),
        *("mask_decoder.iou_token", "mask_decoder.mask_tokens"),
        *(f"mask_decoder.{part}" for part in ("upscale_conv1", "upscale_layer_norm", "upscale_conv2")),
    }


def test_msa_s_prompt_embeddings_are_trained_where_it_is_said(build):
    trained = [
        {
            name
            for name, p in build(tuning="adapter", training_prompts="clicks:3", **more).named_parameters()
            if p.requires_grad
        }
        for more in ({}, {"adapter_prompts": True})
    ]
    embeddings = {name.removeprefix("network.prompt_encoder.") for name in trained[1] - trained[0]}
    # Points off the target and on it, and the mask of the answer before; not the corners of boxes.
    assert {name for name in embeddings if not name.startswith("mask_embed.")} == {
        "point_embed.0.weight",
        "point_embed.1.weight",
        "not_a_point_embed.weight",
        "no_mask_embed.weight",
    }
    assert any(name.startswith("mask_embed.") for name in embeddings)
    assert trained[0] < trained[1]
    assert not any("prompt_encoder" in name for name in trained[0])


def test_train_mode_computes_the_same(fresh):
    before = foreground(fresh)
    other = copy.deepcopy(fresh).train()
    assert torch.equal(foreground(other), before)
    assert torch.equal(foreground(other.eval()), before)  # nor does a forward in it leave a trace


def test_seeds_draw_the_start(build, fresh):
    def first(segmenter):
        return next(p for n, p in segmenter.named_parameters() if ".lora_A." in n)

    torch.rand(3)
    assert torch.equal(first(build(seed=0)), first(fresh))
    assert not torch.equal(first(build(seed=1)), first(fresh))


def test_every_tensor_a_point_reaches_gets_a_gradient(trained):
    segmenter = copy.deepcopy(trained).train()
    segmenter(IMAGES[:1], Prompts(POINTS[:1], BY_POINT.point_labels[:1])).square().mean().backward()
    still = [n for n, p in segmenter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all(".point_embed." in name and ".point_embed.1." not in name for name in still)


# ---- batches


@pytest.mark.parametrize("kind", ["boxes", "points"])
def test_a_batch_is_its_images_and_prompts_one_by_one(trained, kind):
    prompts = BY_BOX if kind == "boxes" else BY_POINT
    together = foreground(trained, prompts)  # (3, 2, 64, 64)
    for i in range(3):
        for p in range(2):
            one = Prompts(*(None if t is None else t[i : i + 1, p : p + 1] for t in vars(prompts).values()))
            alone = foreground(trained, one, IMAGES[i : i + 1])
            torch.testing.assert_close(alone[0, 0], together[i, p], atol=1e-4, rtol=1e-5)
    flat = together.flatten(0, 1).flatten(1)
    assert (torch.cdist(flat, flat) + 10 * torch.eye(6)).min() > 1  # no two alike: none was mistaken for another


# ---- the adapter's file


def test_an_adapter_comes_back_bit_for_bit(build, trained, adapter):
    other = build(seed=1)
    assert not torch.equal(foreground(other), foreground(trained))
    load_adapter(other.network, adapter)
    for prompts in (BY_POINT, BY_BOX):
        assert torch.equal(foreground(other, prompts), foreground(trained, prompts))


def test_the_file_holds_the_trained_tensors_only(trained, adapter):
    state = load_file(adapter / ADAPTER_FILE)
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert sum(t.numel() for t in state.values()) == count
    assert (adapter / ADAPTER_FILE).stat().st_size < 4.2 * count + 50_000
    assert (adapter / "adapter_config.json").is_file()


def test_merged_equals_unmerged(trained):
    expected = foreground(trained)
    merged = copy.deepcopy(trained)
    merged.network = merged.network.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(foreground(merged), expected, atol=1e-4, rtol=1e-5)


def test_an_update_is_b_times_a_without_scaling(trained, zero_shot):
    layer = trained.network.vision_encoder.layers[2].blocks[0].attn.v_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (4, 160), (160, 4)
    merged = copy.deepcopy(trained).network.merge_and_unload().vision_encoder.layers[2].blocks[0].attn.v_proj.weight
    base = zero_shot.network.vision_encoder.layers[2].blocks[0].attn.v_proj.weight
    torch.testing.assert_close(merged - base, b @ a, atol=1e-6, rtol=0)


def _drop(state, name):
    del state[name]


def _add(state, name):
    state["surplus"] = state[name].clone()


def _rename(state, name):
    state[name + "x"] = state.pop(name)


def _reshape(state, name):
    state[name] = state[name][:-1].contiguous()


@pytest.mark.parametrize("change", [_drop, _add, _rename, _reshape])
@pytest.mark.parametrize("which", ["vision_encoder.layers.2.blocks.3.attn.v_proj.lora_A", "mask_decoder.mask_tokens"])
def test_a_tensor_out_of_place_in_an_adapter(fresh, adapter, tmp_path, change, which):
    state = load_file(adapter / ADAPTER_FILE)
    change(state, next(name for name in state if which in name))
    save_file(state, tmp_path / ADAPTER_FILE)
    before = {name: p.clone() for name, p in fresh.named_parameters() if p.requires_grad}
    with pytest.raises(UserError, match="does not fit") as error:
        load_adapter(fresh.network, tmp_path)
    assert str(tmp_path / ADAPTER_FILE) in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in fresh.named_parameters() if p.requires_grad)


def test_an_adapter_of_another_rank(build, adapter):
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(build(lora_rank=2).network, adapter)


def test_an_adapter_that_is_missing_or_damaged(fresh, adapter, tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_adapter(fresh.network, tmp_path)
    (tmp_path / ADAPTER_FILE).write_bytes((adapter / ADAPTER_FILE).read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged") as error:
        load_adapter(fresh.network, tmp_path)
    assert "\n" not in str(error.value)
