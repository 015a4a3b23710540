"""A run taken elsewhere: every format opened by the code that it is for, and compared with the run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from cheaplunch import export as room
from cheaplunch.__main__ import main
from cheaplunch.cli.use import EXPORT_FORMATS
from cheaplunch.config import build_config, override, save_config
from cheaplunch.errors import UserError
from cheaplunch.models import onnx_graphs
from cheaplunch.models.backbones import build_tiny_vit, load_backbone
from cheaplunch.models.portable import load_network, read_about, save_network
from cheaplunch.models.sam import IMAGENET
from cheaplunch.models.segmenter import Segmenter, load_segmenter
from cheaplunch.models.tiny_vit import TinyViTConfig
from cheaplunch.prediction import Predictor
from cheaplunch.prompts import Prompts
from cheaplunch.runs import RunFolder
from cheaplunch.training import finetune

DOCS = Path(__file__).parents[1] / "docs" / "export.md"
SECRETS = ("DOE", "JANE", "st-mary")
SIDE = 64


def _dataset(root: Path) -> Path:
    """Two volumes of one bright block, named after a patient, in a folder named after a hospital."""
    data = root / "st-mary" / "knees"
    rng = np.random.default_rng(0)
    for number in range(3):
        label = np.zeros((40, 32, 4), np.uint8)
        label[8 : 18 + number, 6:20, 1:3] = 1
        image = np.where(label > 0, 200, 60) + rng.normal(0, 5, label.shape)
        for folder, array, ending in (("imagesTr", image.astype(np.float32), "_0000"), ("labelsTr", label, "")):
            (data / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), data / folder / f"DOE_JANE_{number}{ending}.nii.gz")
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "the | block": 1}, "file_ending": ".nii.gz"}
    (data / "dataset.json").write_text(json.dumps(about))
    return data


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """(settings) → a finished, evaluated run of two steps, whose background and target are both far from nothing."""

    def make(**settings) -> RunFolder:
        root = tmp_path_factory.mktemp("st-mary")
        values = {"data": _dataset(root), "image_size": SIDE, "exemplars": 2, "synthetic": 8, "steps": 2}
        values |= {"warmup_steps": 1, "head_start": "fresh", "device": "cpu", "precision": "fp32"}
        run = finetune(build_config("cheap-lunch", values | settings), root / "run")
        line = ["evaluate", run.root, "--data", values["data"], "--out", root / "out.json", "--no-baseline"]
        assert main([str(word) for word in line]) == 0
        return run

    return make


@pytest.fixture(scope="module")
def vit_run(make_run) -> RunFolder:
    return make_run(backbone="tiny-random")


@pytest.fixture(scope="module")
def lite_run(make_run, weights) -> RunFolder:
    return make_run(weights=weights)


@pytest.fixture(scope="module")
def vit(vit_run) -> Segmenter:
    return load_segmenter(vit_run.load_config().model, vit_run.adapter)


@pytest.fixture(scope="module")
def lite(lite_run) -> Segmenter:
    return load_segmenter(lite_run.load_config().model, lite_run.adapter)


def images(count: int = 2, side: int = SIDE) -> torch.Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def points(prompts: int, count: int, side: int = SIDE, batch: int = 1) -> Prompts:
    """Mixed labels."""
    generator = torch.Generator().manual_seed(10 * prompts + count)
    places = torch.rand(batch, prompts, count, 2, generator=generator) * side
    return Prompts(places, torch.randint(0, 2, (batch, prompts, count), generator=generator))


BOXES = torch.tensor([[[4.0, 6, 40, 50], [0, 0, 63, 63], [20, 30, 22, 31]]])


@torch.no_grad()
def outputs(segmenter: Segmenter, image: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    """(B, P, 2, s, s), of which neither is near nothing, or no comparison would mean anything."""
    found = segmenter(image, prompts)
    assert found.shape[2] == 2
    assert (found.std(dim=(0, 1, 3, 4)) > 0.02).all()
    return found


def foreground(segmenter: Segmenter, image: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    found = outputs(segmenter, image, prompts)
    return found[:, :, 1] - found[:, :, 0]


def exported(run: RunFolder, format: str, folder: Path) -> Path:
    room.export(run, format, folder)
    return folder


def snippet(folder: Path, number: int = 0) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[number]


def without_torch(script: str, folder: Path, *words: object) -> None:
    """Runs a program in `folder` where there is no torch, and fails where it fails."""
    (folder / "program.py").write_text(f"import sys\nsys.modules['torch'] = None\n{script}")
    call = [sys.executable, "program.py", *map(str, words)]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr


# ---- one file


@pytest.mark.parametrize("name", ["vit", "lite"])
def test_the_file_is_the_whole_network(name, tmp_path, request):
    run, segmenter = request.getfixturevalue(f"{name}_run"), request.getfixturevalue(name)
    folder = exported(run, "safetensors", tmp_path / "out")
    loaded = load_network(folder / "model.safetensors")
    assert (loaded.head, loaded.image_size_px, loaded.training) == ("two", SIDE, False)
    prompts = points(3, 3, batch=2)
    shown = torch.tensor([[SIDE, 40], [30, SIDE]])
    with torch.no_grad():
        expected, found = (each(images(), prompts, shown) for each in (segmenter, loaded))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    about = read_about(folder / "model.safetensors")
    assert about["backbone"] == {"vit": "tiny-random", "lite": "lite-medsam"}[name]
    assert about["classes"] == ["the | block"]
    assert (about["exemplars"], about["exemplar_cases"]) == (2, 2)
    assert about["window"] == {"percentiles": [0.5, 99.5]}
    assert about["build"]["head"] == "two"


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_network(path)


@pytest.mark.parametrize("head", ["classes", "best"])
def test_what_cannot_be_exported_is_said(head, tmp_path):
    with pytest.raises(UserError, match="only those can be exported"):
        save_network(Segmenter(load_backbone("tiny-random", 64), head, 64), tmp_path / "x", {})
    changed = load_backbone("tiny-random", 64)
    changed.vision_encoder.layers[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="adapter"):
        save_network(Segmenter(changed, "two", 64), tmp_path / "x", {})
    assert not list(tmp_path.iterdir())


# ---- the hub


@torch.no_grad()
def test_transformers_opens_a_vit_by_itself(vit_run, vit, tmp_path, monkeypatch):
    from transformers import SamModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = exported(vit_run, "hub", tmp_path / "out")
    model = SamModel.from_pretrained(folder).eval()
    scope = {"pixel_values": (images() - vit.network.pixel_mean) / vit.network.pixel_std}
    prompts = points(2, 3, batch=2)
    scope |= {"points": prompts.points_xy, "labels": prompts.point_labels}
    monkeypatch.chdir(folder)
    exec(snippet(folder), scope)
    torch.testing.assert_close(scope["logits"], foreground(vit, images(), prompts), atol=1e-4, rtol=0)
    torch.testing.assert_close(load_network(folder / "model.safetensors")(images(), prompts), vit(images(), prompts))
    assert json.loads((folder / "config.json").read_text())["cheaplunch"]["classes"] == ["the | block"]
    assert model.config.prompt_encoder_config.image_size == SIDE


@torch.no_grad()
def test_transformers_prepares_images_as_we_do(vit_run, vit, tmp_path):
    from transformers import AutoImageProcessor

    folder = exported(vit_run, "hub", tmp_path / "out")
    image = np.random.default_rng(1).integers(0, 256, (SIDE, 48, 3), np.uint8)
    found = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ours = (torch.from_numpy(image).permute(2, 0, 1) / 255 - vit.network.pixel_mean) / vit.network.pixel_std
    torch.testing.assert_close(found[0, :, :, :48], ours, atol=1e-5, rtol=0)
    assert not found[0, :, :, 48:].any()


def test_the_hub_folder_of_a_tiny_vit(lite_run, lite, tmp_path):
    folder = exported(lite_run, "hub", tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    scope: dict = {}
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec(snippet(folder), scope)
    finally:
        os.chdir(here)
    with torch.no_grad():
        expected, found = (each(images(), points(2, 1, batch=2)) for each in (lite, scope["predictor"].segmenter))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", ["safetensors", "hub", "sam-pth"])
def test_nothing_of_a_patient_or_the_machine_is_in_it(format, vit_run, tmp_path):
    folder = exported(vit_run, format, tmp_path / "out")
    _require_clean(folder, vit_run)


def _require_clean(folder: Path, run: RunFolder) -> None:
    assert "DOE_JANE" in run.exemplars.read_text()  # it could have been
    for path in folder.iterdir():
        content = path.read_bytes()
        for secret in (*SECRETS, str(run.root), str(Path.home()) + "/", str(DOCS.parents[1]), "site-packages"):
            assert secret.encode() not in content, (path.name, secret)


def test_the_card_tells_what_is_known(vit_run, tmp_path):
    card = (exported(vit_run, "safetensors", tmp_path / "out") / "README.md").read_text()
    result = json.loads(next(vit_run.evaluations.glob("*/fine-tuned.json")).read_text())
    dice = result["classes"]["the | block"]["dice"]
    assert f"| the \\| block | {dice:.3f} |" in card
    for words in ("knees", "Protocol strict", "Oracle prompts", "TO BE FILLED IN"):
        assert words in card
    for words in ("not a medical device", "2 labelled slices of 2 cases", "| steps | 2 |", "license: other"):
        assert words in card
    assert "&#" not in card


# ---- the original packages (what opens the file stands in tests/models/test_originals.py)


def test_the_original_layout(vit_run, tmp_path):
    folder = exported(vit_run, "sam-pth", tmp_path / "out")
    state = torch.load(folder / "sam.pth", weights_only=True)
    assert state["image_encoder.blocks.0.attn.qkv.weight"].shape == (96, 32)
    assert "target - background" in (folder / "README.md").read_text()


# ---- ONNX


@pytest.fixture(scope="module")
def graphs(vit_run, tmp_path_factory) -> Path:
    return exported(vit_run, "onnx", tmp_path_factory.mktemp("onnx") / "out")


def session(path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def ask(decoder, embedding: torch.Tensor, places: torch.Tensor, labels: torch.Tensor, mask=None) -> torch.Tensor:
    s = decoder.get_inputs()[3].shape[-1]
    given = torch.zeros(1, places.shape[1], s, s) if mask is None else mask
    inputs = {"embedding": embedding, "points": places, "labels": labels.long(), "mask": given}
    inputs |= {"has_mask": torch.tensor([float(mask is not None)])}
    return torch.from_numpy(decoder.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def ended(prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """With the point of label -1 that ends a prompt without a box."""
    assert prompts.points_xy is not None and prompts.point_labels is not None
    return torch.nn.functional.pad(prompts.points_xy, (0, 0, 0, 1)), torch.nn.functional.pad(
        prompts.point_labels, (0, 1), value=-1
    )


def compare_graphs(folder: Path, segmenter: Segmenter) -> None:
    encoder, decoder = session(folder / "encoder.onnx"), session(folder / "decoder.onnx")
    for count in (1, 2, 3):
        with torch.no_grad():
            embeddings = segmenter.embed(images(count))
        [found] = encoder.run(None, {"image": images(count).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), embeddings, atol=1e-3, rtol=0)
    close = {"atol": 1e-3, "rtol": 0}
    s = 4 * embeddings.shape[-1]
    for prompts, count in ((1, 1), (1, 3), (3, 7), (4, 1)):
        asked = points(prompts, count)
        expected = foreground(segmenter, images(1), asked)
        torch.testing.assert_close(ask(decoder, embeddings[:1], *ended(asked)), expected, **close)
        shown = Prompts(asked.points_xy, asked.point_labels, masks=4 * torch.randn(1, prompts, s, s))
        with_mask = foreground(segmenter, images(1), shown)
        assert (with_mask - expected).abs().max() > 1e-2  # it matters
        torch.testing.assert_close(ask(decoder, embeddings[:1], *ended(asked), shown.masks), with_mask, **close)
    corners, kinds = BOXES.unflatten(-1, (2, 2)), torch.tensor([2, 3]).expand(1, 3, 2)
    expected = foreground(segmenter, images(1), Prompts(boxes_xyxy=BOXES))
    torch.testing.assert_close(ask(decoder, embeddings[:1], corners, kinds), expected, **close)
    asked = points(3, 2)
    both = Prompts(asked.points_xy, asked.point_labels, BOXES)
    places, labels = torch.cat([asked.points_xy, corners], 2), torch.cat([asked.point_labels, kinds], 2)
    found = ask(decoder, embeddings[:1], places, labels)
    torch.testing.assert_close(found, foreground(segmenter, images(1), both), **close)


def test_onnxruntime_says_what_torch_says(graphs, vit):
    compare_graphs(graphs, vit)


@pytest.mark.slow
def test_onnx_of_lite_medsam(lite_run, lite, tmp_path):
    compare_graphs(exported(lite_run, "onnx", tmp_path / "out"), lite)


@torch.no_grad()
def test_the_encoder_graph_of_a_tiny_vit(tmp_path):
    shape = TinyViTConfig(embed_dims=(8, 8, 8, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2))
    torch.manual_seed(0)
    network = build_tiny_vit(shape, IMAGENET, SIDE).eval().requires_grad_(False)  # the encoder as torch starts it
    network.vision_encoder.fold()
    path = tmp_path / "encoder.onnx"
    graph = onnx_graphs.Encoder(network)
    onnx_graphs._write(graph, {"image": images(2)}, {"image": {0: "images"}}, "embedding", path, {})
    for count in (1, 3):
        expected = network.encode(images(count))
        assert expected.std() > 0.1
        found = session(path).run(None, {"image": images(count).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=0)


def test_the_graphs_say_nothing_of_where_they_were_made(graphs, vit_run):
    _require_clean(graphs, vit_run)


def test_the_example_of_the_docs_runs_without_torch(graphs):
    [script] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    without_torch(f"{script}\nassert logits.shape == (1, 1, s, s) and np.isfinite(logits).all()", graphs)


@pytest.mark.parametrize("words", [["30,20,1", "5,40,0"], ["8,6,40,33"]])
def test_the_example_in_the_folder_makes_our_mask(graphs, vit, tmp_path, words):
    """From an image file of another size to a mask file: our own predictor's mask, but for pixels on the very edge."""
    plane = images(1)[0, :, :50, :]  # (3, 50, 64)
    pixels = (255 * torch.nn.functional.interpolate(plane[None], (75, 96), mode="bilinear")[0]).round()
    Image.fromarray(pixels.permute(1, 2, 0).numpy().astype(np.uint8)).save(tmp_path / "image.png")
    without_torch((graphs / "example.py").read_text(), graphs, tmp_path / "image.png", tmp_path / "mask.png", *words)
    found = np.asarray(Image.open(tmp_path / "mask.png")) > 0

    predictor = Predictor(vit)
    [embedded] = predictor.embed(pixels[None].numpy() / 255)
    if len(words) == 1:
        box = np.array([[[float(n) for n in words[0].split(",")]]])
        prompts = Prompts(boxes_xyxy=torch.from_numpy(embedded.frame.box_to_model(box)).float())
    else:
        rows = torch.tensor([[float(n) for n in word.split(",")] for word in words])
        places = embedded.frame.point_to_model(rows[None, None, :, :2])
        prompts = Prompts(places.float(), rows[None, None, :, 2].long())
    probability = predictor.probabilities(embedded, prompts)[0]
    assert found.shape == probability.shape == (75, 96)
    sure = np.abs(probability - 0.5) > 1e-3
    assert 0.05 < found.mean() < 0.95
    assert sure.mean() > 0.9
    assert np.array_equal(found[sure], (probability > 0.5)[sure])


# ---- the command line


def test_the_command_line(vit_run, tmp_path, capsys):
    assert tuple(room.FORMATS) == EXPORT_FORMATS
    line = ["export", str(vit_run.root), "--format", "safetensors", "--out", str(tmp_path / "out")]
    assert main(line) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert main(line) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_one_line(vit_run, tmp_path, capsys):
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(vit_run.config.read_text())
    assert main(["export", str(unfinished), "--format", "onnx", "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "not a finished run" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "other", [{"head": "classes", "training_prompts": "none"}, {"tuning": "adapter"}], ids=["classes", "adapter"]
)
def test_a_run_that_has_no_export_yet_is_named(other, vit_run, tmp_path):
    foreign = RunFolder(Path(shutil.copytree(vit_run.root, tmp_path / "run")))
    save_config(override(vit_run.load_config(), other), foreign.config)
    for format in room.FORMATS:
        with pytest.raises(UserError, match=f"{foreign.root} is of --method"):
            room.export(foreign, format, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_error_leaves_nothing_behind(vit_run, tmp_path, monkeypatch):
    def fail(merged, folder, tell):
        (folder / "half").write_text("of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(room.FORMATS, "hub", fail)
    with pytest.raises(UserError, match="No space left"):
        room.export(vit_run, "hub", tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())
