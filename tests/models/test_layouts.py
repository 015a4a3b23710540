"""Checkpoints: every tensor in its place under every published name, and nothing in a file executed."""

import dataclasses
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cheaplunch.errors import UserError
from cheaplunch.models import backbones
from cheaplunch.models.backbones import BACKBONES, ViTShape, build_vit, load_backbone
from cheaplunch.models.layouts import (
    original_names,
    our_names,
    read_checkpoint,
    resize_positions,
    samed_name,
    to_transformers,
)
from cheaplunch.models.sam import IMAGENET

DECODER = "mask_decoder.transformer.layers.0."


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- q, k and v


@pytest.fixture(scope="module")
def lite(weights):
    return read_checkpoint(weights)


def test_a_tiny_vit_fuses_head_by_head(weights, lite):
    network = load_backbone("lite-medsam", 256, weights)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    attention = network.vision_encoder.layers[1].blocks[0].attn
    # Stage 1 has 4 heads of 32 channels; rows of the fused weight run [head][q | k | v][32].
    fused = lite["image_encoder.layers.1.blocks.0.attn.qkv.weight"]  # (384, 128)
    assert torch.equal(attention.q_proj.weight[:32], fused[:32])
    assert torch.equal(attention.k_proj.weight[:32], fused[32:64])
    assert torch.equal(attention.v_proj.weight[:32], fused[64:96])
    assert torch.equal(attention.q_proj.weight[32:64], fused[96:128])


def test_a_vit_fuses_one_after_the_other():
    fused = torch.arange(12.0)[:, None].expand(12, 4)
    for key in ("image_encoder.blocks.3.attn.qkv.weight", "vision_encoder.layers.3.attn.qkv.weight"):
        ours = our_names({key: fused})
        names = [f"vision_encoder.layers.3.attn.qkv.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
        assert list(ours) == names
        assert [tensor[0, 0] for tensor in ours.values()] == [0, 4, 8]
    back = to_transformers(ours | {"prompt_encoder.shared_embedding.positional_embedding": torch.ones(1)})
    assert torch.equal(back["vision_encoder.layers.3.attn.qkv.weight"], fused)


def test_what_tiny_vit_classified_with_is_left_behind():
    block = "layers.1.blocks.0."
    parts = ("norm_head.bias", "head.weight", f"{block}attn.attention_bias_idxs", f"{block}mlp.fc1.bias")
    ours = our_names({f"image_encoder.{part}": torch.ones(1) for part in parts})
    assert ours.keys() == {f"vision_encoder.{block}mlp.fc1.bias"}


# ---- every tensor


def test_samed_s_names_are_segment_anything_s_where_it_trains_in_full(vit):
    theirs = [name for name in vit if not name.startswith("image_encoder.")]
    assert [samed_name(name) for name in our_names({name: vit[name] for name in theirs})] == theirs


@pytest.mark.parametrize("published", ["vit", "lite"])
def test_names_and_tensors_come_back(published, request):
    theirs = request.getfixturevalue(published)
    back = original_names(our_names(theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())


@pytest.fixture(scope="module")
def vit(original, randomise):
    """segment-anything's tensors of a very small ViT."""
    with original("segment_anything.build_sam") as package:
        return randomise(package._build_sam(16, 2, 2, (1,)), 0).state_dict()


@pytest.fixture
def small(monkeypatch):
    """`small` is the backbone of those."""
    build = partial(build_vit, ViTShape(16, 2, 2, (1,)), IMAGENET)
    monkeypatch.setitem(BACKBONES, "small", dataclasses.replace(BACKBONES["sam-vit-b"], name="small", build=build))


def _without(key):
    return lambda state: state.pop(key)


def _renamed(key, new):
    return lambda state: state.update({new: state.pop(key)})


def _reshaped(key):
    return lambda state: state.update({key: state[key][:-1]})


IN_BOTH = [
    (_without(DECODER + "norm1.weight"), ["missing", "layers.0.layer_norm1.weight"]),
    (_renamed(DECODER + "norm1.weight", DECODER + "norm9.weight"), ["missing", "unexpected", "norm9"]),
    (lambda state: state.update(extra=torch.zeros(1)), ["unexpected", "extra"]),
    (_reshaped(DECODER + "norm1.weight"), ["other shape", "(255,) for (256,)"]),
]
TINY = "image_encoder.layers.1.blocks.0."
IN_LITE = [
    *IN_BOTH,
    (_without(TINY + "mlp.fc1.bias"), ["missing", "mlp.fc1.bias"]),
    (_without(TINY + "attn.qkv.weight"), ["missing", "attn.q_proj.weight"]),
    (_without(TINY + "attn.attention_biases"), ["missing", "attention_biases"]),
    (_without("image_encoder.patch_embed.seq.0.bn.running_var"), ["missing", "running_var"]),
    (_reshaped(TINY + "attn.qkv.weight"), ["qkv"]),
    (_reshaped(TINY + "attn.attention_biases"), ["attention_biases"]),
]
BLOCK = "image_encoder.blocks.1."
IN_VIT = [
    *IN_BOTH,
    (_without(BLOCK + "attn.qkv.bias"), ["missing", "layers.1.attn.qkv.q_proj.bias"]),
    (_renamed(BLOCK + "norm2.bias", BLOCK + "norm3.bias"), ["missing", "layer_norm2.bias", "layer_norm3.bias"]),
    (_reshaped(BLOCK + "attn.qkv.weight"), ["unexpected", "layers.1.attn.qkv.weight"]),
    (_reshaped(BLOCK + "attn.rel_pos_h"), ["other shape", "rel_pos_h", "(126, 8)"]),
    (_reshaped("image_encoder.blocks.0.attn.rel_pos_h"), ["other shape", "(26, 8) for (27, 8)"]),
    (_without("image_encoder.pos_embed"), ["missing", "pos_embed"]),
    (lambda state: state["image_encoder.pos_embed"].resize_(1, 63, 64, 16), ["other shape", "pos_embed"]),
    (_without("image_encoder.neck.3.bias"), ["missing", "neck.layer_norm2.bias"]),
]


def _load_changed(name, state, change, tmp_path, monkeypatch) -> str:
    state = dict(state)
    change(state)
    path = tmp_path / "mine.pth"
    path.touch()
    monkeypatch.setattr(backbones, "read_checkpoint", lambda _: state)
    with pytest.raises(UserError) as error:
        load_backbone(name, 64, path)
    assert str(path) in str(error.value)
    return one_line(error)


@pytest.mark.parametrize(("change", "said"), IN_LITE, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_tensor_of_lite_medsam_out_of_place_is_named(lite, tmp_path, change, said, monkeypatch):
    text = _load_changed("lite-medsam", lite, change, tmp_path, monkeypatch)
    assert all(words in text for words in said)


@pytest.mark.parametrize(("change", "said"), IN_VIT, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_tensor_of_a_vit_out_of_place_is_named(small, vit, tmp_path, change, said, monkeypatch):
    text = _load_changed("small", vit, change, tmp_path, monkeypatch)
    assert all(words in text for words in said)


def test_the_checkpoint_of_another_backbone(small, vit, tmp_path):
    torch.save(vit, tmp_path / "vit.pth")
    with pytest.raises(UserError, match="does not fit") as error:
        load_backbone("mobile-sam", 64, tmp_path / "vit.pth")
    assert len(one_line(error)) < 700  # hundreds of tensors, of which a few are named


def test_loading_leaves_the_callers_tensors_alone(lite, tmp_path, monkeypatch):
    before = {key: tensor.clone() for key, tensor in lite.items()}
    (tmp_path / "mine.pth").touch()
    monkeypatch.setattr(backbones, "read_checkpoint", lambda _: lite)
    load_backbone("lite-medsam", 64, tmp_path / "mine.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in lite.items())


# ---- another input size


def test_positions_are_resized_as_samed_does():
    """By its own lines of `build_sam.py`, which resize a relative position as a picture of one channel."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "vision_encoder.pos_embed": torch.randn(1, 64, 64, 8, generator=generator),
        "vision_encoder.layers.0.attn.rel_pos_h": torch.randn(27, 4, generator=generator),
        "vision_encoder.layers.1.attn.rel_pos_h": torch.randn(127, 4, generator=generator),
        "vision_encoder.layers.1.attn.rel_pos_w": torch.randn(127, 4, generator=generator),
        "vision_encoder.neck.conv1.weight": torch.randn(8, 8, 1, 1, generator=generator),
    }
    resized = resize_positions(state, 16, 64, [1])
    assert resized.keys() == state.keys()
    for name, tensor in state.items():
        if name.endswith("pos_embed"):
            planes = torch.nn.functional.interpolate(
                tensor.permute(0, 3, 1, 2), (16, 16), mode="bilinear", align_corners=False
            )
            torch.testing.assert_close(resized[name], planes.permute(0, 2, 3, 1))
        elif "layers.1" in name:
            picture = torch.nn.functional.interpolate(tensor[None, None], (31, 4), mode="bilinear", align_corners=False)
            torch.testing.assert_close(resized[name], picture[0, 0])
        else:
            assert resized[name] is tensor
    assert resize_positions(state, 64, 64, [1]) is state


# ---- the file


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_truncated_file(tmp_path, ending):
    state = {"a": torch.ones(100_000)}
    path = tmp_path / f"half{ending}"
    torch.save(state, path) if ending == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(UserError, match="damaged") as error:
        read_checkpoint(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("ending", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs"])
def test_something_else(tmp_path, content, ending):
    path = tmp_path / f"page{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert str(path) in one_line(error)


def test_tensors_may_lie_under_model_as_training_scripts_leave_them(tmp_path):
    path = tmp_path / "epoch.pth"
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, path)
    assert read_checkpoint(path).keys() == {"a"}
    torch.save([torch.ones(2)], path)
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(path)


class _Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", ["zip", "bare"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, wrap):
    path, sprung = tmp_path / "bad.pth", tmp_path / "sprung"
    if wrap == "zip":
        torch.save({"weight": torch.ones(1), "trap": _Trap(sprung)}, path)
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps({"trap": _Trap(sprung)}, protocol=2))
        pickle.loads(path.read_bytes())
    assert sprung.exists()  # the trap is a real one
    sprung.unlink()
    with pytest.raises(UserError, match="not opened") as error:
        load_backbone("sam-vit-b", 64, path)
    assert str(path) in one_line(error)
    assert not sprung.exists()
