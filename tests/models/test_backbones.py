"""The table: every row can be built, sized, and gets its weights from where it says."""

import json
import re

import pytest
import torch
from transformers import SamModel

from cheaplunch.config import ModelConfig, settings
from cheaplunch.errors import UserError
from cheaplunch.material import SMALL_IMAGE_PX
from cheaplunch.models.backbones import ALIASES, BACKBONES, fetch_weights, find_weights, get_backbone, load_backbone
from cheaplunch.models.layouts import fill, read_checkpoint
from cheaplunch.models.sam import AS_IS, IMAGENET, as_sam_model
from cheaplunch.models.segmenter import build_segmenter
from cheaplunch.prompts import Prompts

# Those of segment-anything's networks, and the positional matrix of 2 × 128, which is a buffer there.
PARAMETERS = {
    "sam-vit-b": 93_735_728,
    "sam-vit-l": 312_343_088,
    "sam-vit-h": 641_090_864,
    "medsam-vit-b": 93_735_728,
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES.keys())
def test_every_row_can_be_built_at_its_sizes(backbone):
    for size in (backbone.image_size_px, backbone.training_size_px, backbone.training_size_px // 2):
        assert size % backbone.multiple_px == 0
        network = backbone.build(size)
        cells = size // (4 if backbone.name == "lite-medsam" else 16)
        assert network.prompt_encoder.image_embedding_size == (cells, cells)
        assert network.prompt_encoder.input_image_size == size
    assert backbone.image_size_px > SMALL_IMAGE_PX or backbone.name == "tiny-random"
    assert network.norm == (AS_IS if "med" in backbone.name else IMAGENET)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_vits_have_their_published_size(name, count):
    assert sum(p.numel() for p in BACKBONES[name].build(1024).parameters()) == count


@pytest.mark.parametrize("size", [32, 64, 128, 512])
@torch.no_grad()
def test_a_vit_takes_any_multiple_of_16(size):
    network = load_backbone("tiny-random", size)
    embedding = network.encode(torch.rand(1, 3, size, size))
    assert embedding.shape == (1, 64, size // 16, size // 16)
    logits, _ = network.decode(embedding, boxes_xyxy=torch.tensor([[[1.0, 1, size - 1, size - 1]]]))
    assert logits.shape == (1, 1, 1, size // 4, size // 4)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("name", "size"), [("tiny-random", 40), ("tiny-random", 16), ("sam-vit-b", 250)])
def test_a_size_that_is_not_possible(name, size):
    with pytest.raises(UserError, match=f"--image-size {size}: {name} takes multiples of 16") as error:
        load_backbone(name, size)
    assert "\n" not in str(error.value)


def test_random_weights_are_always_the_same():
    one, other = (load_backbone("tiny-random", 64).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for action in (fetch_weights, lambda name: find_weights(get_backbone(name))):
        with pytest.raises(UserError, match="drawn at random"):
            action("tiny-random")


def test_help_names_the_whole_table():
    """config.py stands below the table and cannot read it."""
    help = settings()["backbone"][1].metadata["help"]
    assert all(re.search(rf"\b{name}\b", help) for name in BACKBONES)
    sizes = settings()["image_size"][1].metadata["help"]
    said_of = {
        "lite-medsam": "224 for lite-medsam",
        "mobile-sam": "448 for mobile-sam",
        "sam-vit-b": "512 for the ViTs",
    }
    for name, said in said_of.items():
        assert said in sizes
        assert said.startswith(str(BACKBONES[name].training_size_px))


def test_a_short_name():
    assert get_backbone("medsam") is BACKBONES["medsam-vit-b"]
    assert all(name in BACKBONES for name in ALIASES.values())


def test_an_unknown_backbone():
    with pytest.raises(UserError, match=r"--backbone sam-vit-z .*lite-medsam.*hub id"):
        load_backbone("sam-vit-z", 256)


# ---- a transformers folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A SamModel as someone else would have saved it."""
    path = tmp_path_factory.mktemp("theirs") / "sam"
    as_sam_model(load_backbone("tiny-random", 64)).save_pretrained(path)
    return path


@torch.no_grad()
def test_a_folder_is_a_backbone(folder):
    theirs = SamModel.from_pretrained(folder).eval()
    ours = load_backbone(str(folder), 64)
    images = torch.rand(2, 3, 64, 64)
    normalised = (images - ours.pixel_mean) / ours.pixel_std
    points, labels = torch.tensor([[[[5.0, 6]]], [[[40, 30]]]]), torch.ones(2, 1, 1)
    expected = theirs(normalised, input_points=points, input_labels=labels, multimask_output=True)
    logits, quality = ours.decode(ours.encode(images), points, labels, multimask=True)
    torch.testing.assert_close(logits, expected.pred_masks, atol=1e-5, rtol=0)
    torch.testing.assert_close(quality, expected.iou_scores, atol=1e-5, rtol=0)


def test_a_folder_trains_at_another_size(folder):
    segmenter = build_segmenter(ModelConfig(backbone=str(folder), image_size=32))
    assert segmenter(torch.rand(1, 3, 32, 32), Prompts.of_points(torch.rand(1, 2, 2))).shape == (1, 2, 2, 8, 8)


def test_a_folder_says_how_it_normalises(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for pixels, mean in (({"do_normalize": False}, 0), ({"image_mean": [0.5] * 3, "image_std": [0.1] * 3}, 0.5)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
        assert load_backbone(str(tmp_path), 64).norm.mean == (mean,) * 3


def test_its_weights_serve_another_name_too(folder):
    assert find_weights(BACKBONES["sam-vit-b"], folder) == folder / "model.safetensors"
    with pytest.raises(UserError, match="does not fit"):
        load_backbone("sam-vit-b", 64, folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "cannot be read"), ('{"model_type": "bert"}', "is a bert"), ("{}", "cannot be read"), ("[]", "cannot be")],
)
def test_a_folder_that_is_no_sam(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*{said}") as error:
        load_backbone(str(tmp_path), 64)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"put a model\.safetensors"):
        load_backbone(str(tmp_path), 64)


@torch.no_grad()
def test_a_vit_comes_back_from_transformers_layout_bit_for_bit(folder):
    network = BACKBONES["tiny-random"].build(64)
    fill(network, BACKBONES["tiny-random"].rename(read_checkpoint(folder / "model.safetensors")), folder)
    for name, tensor in load_backbone("tiny-random", 64).state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)


def test_a_tiny_vit_is_no_transformers_model():
    with pytest.raises(UserError, match="TinyViT"):
        as_sam_model(BACKBONES["mobile-sam"].build(64))
