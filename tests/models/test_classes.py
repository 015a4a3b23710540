"""Networks without prompts: every class at once, from SAM's decoder as SAMed's or from one linear layer."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.models.sam.modeling_sam import SamMaskDecoder

from cheaplunch.config import ModelConfig
from cheaplunch.errors import UserError
from cheaplunch.models.backbones import BACKBONES, load_backbone
from cheaplunch.models.heads import make_class_outputs
from cheaplunch.models.layouts import our_names, samed_name
from cheaplunch.models.lora import ADAPTER_FILE, adapter_state, save_adapter
from cheaplunch.models.samed import read_samed, write_samed
from cheaplunch.models.segmenter import build_segmenter, load_segmenter

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def config(**changes) -> ModelConfig:
    values = {"backbone": "tiny-random", "head": "classes", "class_names": ("a", "b", "c"), "training_prompts": "none"}
    return ModelConfig(**values | changes)


SAMED_S, SAMED = config(), config(decoder_tuning="full")
LINEAR = config(tuning="linear")
FULL = config(tuning="full", decoder_tuning="full")


def trained(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def answers(segmenter):
    return segmenter.classes(segmenter.embed(IMAGES))  # (2, 4, 16, 16)


@torch.no_grad()
def disturbed(segmenter):
    """As if trained: every trained tensor is moved a little."""
    generator = torch.Generator().manual_seed(5)
    for parameter in segmenter.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return segmenter.eval()


# ---- the outputs


@torch.no_grad()
def test_the_decoder_gives_all_tokens_as_transformers_gives_each():
    network = load_backbone("tiny-random", 64)
    kept = {name: tensor.clone() for name, tensor in network.mask_decoder.state_dict().items()}
    torch.manual_seed(0)
    make_class_outputs(network, 3)
    theirs = SamMaskDecoder(network.mask_decoder.config)
    theirs.load_state_dict(network.mask_decoder.state_dict())
    embeddings = network.encode(IMAGES)
    sparse, dense = network.prompt_encoder(None, None, None, None)
    given = (embeddings, network.positions().repeat(2, 1, 1, 1), sparse, dense)
    ours, quality = network.mask_decoder(*given)
    assert ours.shape == (2, 1, 4, 16, 16)
    for multimask, tokens in ((False, slice(0, 1)), (True, slice(1, 4))):
        masks, iou = theirs(*given, multimask_output=multimask)
        torch.testing.assert_close(ours[:, :, tokens], masks)
        torch.testing.assert_close(quality[:, :, tokens], iou)
    # What is not made for classes is SAM's still.
    for name, tensor in network.mask_decoder.state_dict().items():
        of_classes = name.startswith(("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head"))
        assert of_classes or torch.equal(tensor, kept[name])


@torch.no_grad()
def test_the_linear_probe_is_one_convolution_upsampled():
    segmenter = disturbed(build_segmenter(LINEAR))
    probe, embeddings = segmenter.network.mask_decoder.outputs, segmenter.embed(IMAGES)
    coarse = torch.einsum("kc,bchw->bkhw", probe.weight[:, :, 0, 0], embeddings) + probe.bias[:, None, None]
    torch.testing.assert_close(answers(segmenter), F.interpolate(coarse, (16, 16), mode="bilinear"))


# ---- what is trained


@pytest.mark.parametrize(("decoder", "count"), [("lora", 1_645_909), ("full", 4_913_621)], ids=["samed-s", "samed"])
def test_vit_b_with_eight_classes_trains_what_samed_s_code_trains(decoder, count, monkeypatch):
    """paper-facts: measured on their code. On the real module, without its memory."""
    build = BACKBONES["sam-vit-b"].build
    monkeypatch.setattr("cheaplunch.models.segmenter.load_backbone", lambda name, size, weights: build(size))
    with torch.device("meta"):
        names = tuple(f"organ {k}" for k in range(8))
        segmenter = build_segmenter(config(backbone="sam-vit-b", class_names=names, decoder_tuning=decoder))
    assert trained(segmenter) == count
    assert sum(p.numel() for n, p in segmenter.named_parameters() if "vision_encoder" in n and "lora" in n) == 147_456


def test_a_probe_trains_its_layer_and_a_full_network_its_encoder():
    assert trained(build_segmenter(LINEAR)) == 4 * (64 + 1)
    full = build_segmenter(FULL)
    assert all(p.requires_grad for p in full.network.vision_encoder.parameters())
    assert not full.network.prompt_encoder.shared_embedding.positional_embedding.requires_grad


def test_the_decoder_alone_leaves_the_encoder_alone():
    segmenter = build_segmenter(ModelConfig(backbone="tiny-random", tuning="decoder", decoder_tuning="full"))
    names = {name for name, p in segmenter.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in names} == {"prompt_encoder", "mask_decoder"}
    assert any("transformer" in name for name in names)


# ---- the adapter's file, with LoRA and without


@pytest.mark.parametrize("model", [SAMED_S, SAMED, LINEAR, FULL], ids=["samed-s", "samed", "linear", "full"])
def test_what_was_trained_comes_back_and_no_more_is_saved(model, tmp_path):
    segmenter = disturbed(build_segmenter(model))
    save_adapter(segmenter.network, tmp_path)
    assert sum(tensor.numel() for tensor in load_file(tmp_path / ADAPTER_FILE).values()) == trained(segmenter)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] in ("LORA", None)
    back = load_segmenter(model, tmp_path)
    torch.testing.assert_close(answers(back), answers(segmenter), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="does not fit"):
        load_segmenter(config(tuning=model.tuning, class_names=("a", "b")), tmp_path)


# ---- SAMed's own files


@pytest.mark.parametrize("model", [SAMED_S, SAMED], ids=["samed-s", "samed"])
def test_a_checkpoint_of_samed_loads_and_saves_back_to_the_same_tensors(model, tmp_path):
    segmenter = disturbed(build_segmenter(model))
    write_samed(segmenter, tmp_path / "first.pth")
    state = torch.load(tmp_path / "first.pth", weights_only=True)
    # Their names, from their `save_lora_parameters`; two blocks, q and v of each.
    numbered = {f"w_{matrix}_{i:03d}" for matrix in "ab" for i in range(4)}
    if model is SAMED_S:
        kinds = ("sa", "cti", "cit")
        numbered |= {f"{kind}_{matrix}_{i:03d}" for kind in kinds for matrix in "ab" for i in range(4)}
        numbered |= {f"fati_{part}{matrix}" for part in "qv" for matrix in "ab"}
    assert {name for name in state if not name.startswith(("prompt_encoder.", "mask_decoder."))} == numbered
    assert {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"} < state.keys()
    assert ("mask_decoder.transformer.layers.1.norm4.weight" in state) == (model is SAMED)
    second = adapter_state(segmenter.network)["base_model.model.vision_encoder.layers.1.attn.qkv.v_proj.lora_A.weight"]
    assert torch.equal(state["w_a_003"], second)

    other = build_segmenter(model, seed=3).eval()
    assert not torch.equal(answers(other), answers(segmenter))
    read_samed(other, tmp_path / "first.pth")
    assert torch.equal(answers(other), answers(segmenter))
    write_samed(other, tmp_path / "second.pth")
    again = torch.load(tmp_path / "second.pth", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_names_of_prompt_encoder_and_decoder_go_to_segment_anything_s_and_back():
    network = load_backbone("tiny-random", 64)
    names = [name for name in network.state_dict() if not name.startswith("vision_encoder.")]
    theirs = {samed_name(name): torch.zeros(1) for name in names}
    assert {"mask_decoder.output_hypernetworks_mlps.3.layers.2.bias", "prompt_encoder.mask_downscaling.4.bias"} < set(
        theirs
    )
    assert list(our_names(theirs)) == names


def _without(state):
    del state["w_b_002"]


def _more(state):
    state["w_a_004"] = state["w_a_003"]


def _other_shape(state):
    state["mask_decoder.mask_tokens.weight"] = state["mask_decoder.mask_tokens.weight"][:-1]


def _other_backbone(state):
    state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] += 1


@pytest.mark.parametrize(
    ("change", "said"),
    [(_without, "w_b_002"), (_more, "w_a_004"), (_other_shape, "mask_tokens"), (_other_backbone, "--backbone")],
)
def test_a_tensor_of_samed_out_of_place_is_named(change, said, tmp_path):
    segmenter = build_segmenter(SAMED_S)
    write_samed(segmenter, tmp_path / "good.pth")
    state = torch.load(tmp_path / "good.pth", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "bad.pth")
    before = copy.deepcopy(adapter_state(segmenter.network))
    with pytest.raises(UserError, match=said) as error:
        read_samed(segmenter, tmp_path / "bad.pth")
    assert str(tmp_path / "bad.pth") in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(segmenter.network).items())
    with pytest.raises(UserError, match="--method samed"):
        read_samed(build_segmenter(LINEAR), tmp_path / "good.pth")


# ---- SAM's three masks


@torch.no_grad()
def test_the_best_mask_is_the_one_with_the_highest_predicted_iou():
    from cheaplunch.prompts import Prompts

    network = load_backbone("tiny-random", 64)
    single, best = (
        build_segmenter(ModelConfig(backbone="tiny-random", tuning="none", mask=m)) for m in ("single", "best")
    )
    clicks = Prompts.of_points(torch.tensor([[[5.0, 6], [40, 50]], [[60, 3], [20, 20]]]))
    embeddings = single.embed(IMAGES)
    masks, quality = network.decode(embeddings, clicks.points_xy, clicks.point_labels, multimask=True)
    found = best.foreground(embeddings, clicks)
    assert found.shape == (2, 2, 16, 16)
    for image in range(2):
        for prompt in range(2):
            assert torch.equal(found[image, prompt], masks[image, prompt, quality[image, prompt].argmax()])
    first, _ = network.decode(embeddings, clicks.points_xy, clicks.point_labels)
    assert torch.equal(single.foreground(embeddings, clicks), first[:, :, 0])
    assert not torch.allclose(found, first[:, :, 0])
