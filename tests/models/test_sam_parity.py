"""SAM's ViTs and MobileSAM against the original packages, on the same random weights saved as the original's file."""

import dataclasses
from functools import partial

import pytest
import torch

from cheaplunch.models import backbones
from cheaplunch.models.backbones import BACKBONES, VIT_B, VIT_H, VIT_L, ViTShape, build_vit, load_backbone
from cheaplunch.models.sam import IMAGENET

CLOSE = {"atol": 1e-4, "rtol": 0}
NARROW = ViTShape(width=48, depth=2, heads=3, global_blocks=(1,))

# (B, P, K, 2) and so on, in px of a 1024 px input; two prompts on each of three images.
POINTS = torch.tensor(
    [
        [[[100.0, 200], [900, 30]], [[512, 512], [0, 0]]],
        [[[1023, 1023], [7, 400]], [[60, 900], [333, 333]]],
        [[[20, 20], [30, 30]], [[800, 100], [100, 800]]],
    ]
)
LABELS = torch.tensor([[[1, 0], [1, 1]], [[1, 0], [0, 1]], [[1, 1], [1, 0]]])
BOXES = torch.tensor(
    [
        [[50.0, 60, 700, 900], [0, 0, 1023, 1023]],
        [[10, 10, 30, 30], [400, 300, 600, 310]],
        [[5, 500, 1000, 600], [1, 2, 3, 4]],
    ]
)
MASKS = 4 * torch.randn(3, 2, 256, 256, generator=torch.Generator().manual_seed(3))
PROMPTS = {
    "points": {"points_xy": POINTS, "point_labels": LABELS},
    "boxes": {"boxes_xyxy": BOXES},
    "points and boxes": {"points_xy": POINTS, "point_labels": LABELS, "boxes_xyxy": BOXES},
    "masks": {"boxes_xyxy": BOXES, "masks": MASKS},
}


@torch.no_grad()
def original_masks(sam, embeddings, points_xy=None, point_labels=None, boxes_xyxy=None, masks=None, multimask=False):
    """As `Sam.decode`, by the original's parts: one image at a time, as it wants them."""
    logits, quality = [], []
    for i in range(len(embeddings)):
        sparse, dense = sam.prompt_encoder(
            points=None if points_xy is None else (points_xy[i], point_labels[i]),
            boxes=None if boxes_xyxy is None else boxes_xyxy[i],
            masks=None if masks is None else masks[i][:, None],
        )
        low, iou = sam.mask_decoder(
            image_embeddings=embeddings[i : i + 1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        logits.append(low)
        quality.append(iou)
    return torch.stack(logits), torch.stack(quality)


def photographs(count: int, seed: int = 0) -> torch.Tensor:
    """(B, 3, 1024, 1024) in [0, 1]: smooth noise with some grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 16, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (1024, 1024), mode="bilinear")
    return 0.8 * smooth + 0.2 * torch.rand(count, 3, 1024, 1024, generator=generator)


@torch.no_grad()
def compare(theirs, ours, count: int, kinds: dict[str, bool]) -> None:
    """Both from the images on: embeddings, logits and predicted IoU, for each kind of prompt (→ multimask)."""
    images = photographs(count)
    expected = theirs.image_encoder(torch.stack([theirs.preprocess(255 * image) for image in images]))
    embeddings = ours.encode(images)
    assert embeddings.shape == expected.shape == (count, 256, 64, 64)
    assert expected.std() > 0.1  # or 1e-4 would mean nothing
    torch.testing.assert_close(embeddings, expected, **CLOSE)
    for kind, multimask in kinds.items():
        each = 2 if kind == "points" else 1  # prompts an image: a second of one kind will do, decoding is slow
        prompt = {name: tensor[:count, :each] for name, tensor in PROMPTS[kind].items()}
        expected_logits, expected_quality = original_masks(theirs, expected, **prompt, multimask=multimask)
        logits, quality = ours.decode(embeddings, **prompt, multimask=multimask)
        assert logits.shape == expected_logits.shape == (count, each, 3 if multimask else 1, 256, 256)
        assert expected_logits.std() > 0.1
        torch.testing.assert_close(logits, expected_logits, **CLOSE)
        torch.testing.assert_close(quality, expected_quality, **CLOSE)


@pytest.fixture(scope="module")
def original_vit(original, randomise):
    """(shape, seed) → segment-anything's network of that shape, random."""
    with original("segment_anything.build_sam") as package:

        def build(shape: ViTShape, seed: int = 0):
            network = package._build_sam(shape.width, shape.depth, shape.heads, shape.global_blocks)
            return randomise(network, seed)

        yield build


def narrow(monkeypatch) -> None:
    backbone = dataclasses.replace(BACKBONES["sam-vit-b"], name="narrow", build=partial(build_vit, NARROW, IMAGENET))
    monkeypatch.setitem(backbones.BACKBONES, "narrow", backbone)


@pytest.fixture(scope="module")
def narrow_vits(original_vit, tmp_path_factory):
    """The original and ours, on one file."""
    theirs = original_vit(NARROW)
    path = tmp_path_factory.mktemp("narrow") / "sam.pth"
    torch.save(theirs.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch)
        return theirs, load_backbone("narrow", 1024, path)


def test_a_narrow_vit(narrow_vits):
    compare(*narrow_vits, 3, {"points": True, "boxes": False, "masks": False})


def test_a_batch_of_one(narrow_vits):
    compare(*narrow_vits, 1, {"points and boxes": True})


@torch.no_grad()
def test_another_input_size(original_vit, tmp_path):
    """The original resizes relative positions as it goes, in code of its own; SAMed's way for the absolute ones."""
    theirs = original_vit(NARROW)
    torch.save(theirs.state_dict(), tmp_path / "sam.pth")
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch)
        ours = load_backbone("narrow", 256, tmp_path / "sam.pth")
    positions = theirs.image_encoder.pos_embed.permute(0, 3, 1, 2)
    positions = torch.nn.functional.interpolate(positions, (16, 16), mode="bilinear", align_corners=False)
    theirs.image_encoder.pos_embed = torch.nn.Parameter(positions.permute(0, 2, 3, 1))
    image = photographs(1)[..., :256, :256]
    pixels = (255 * image - theirs.pixel_mean) / theirs.pixel_std
    torch.testing.assert_close(ours.encode(image), theirs.image_encoder(pixels), **CLOSE)


@torch.no_grad()
def test_no_prompt_at_all(narrow_vits):
    """SAMed's way: the embedding of no mask and no point."""
    theirs, ours = narrow_vits
    embeddings = torch.randn(2, 256, 64, 64, generator=torch.Generator().manual_seed(1))
    expected, _ = original_masks(theirs, embeddings, multimask=True)
    torch.testing.assert_close(ours.decode(embeddings, multimask=True)[0], expected, **CLOSE)


@torch.no_grad()
def test_padding_comes_after_normalising(narrow_vits):
    """What lies beside an image in its square is 0 to the network, not black."""
    theirs, ours = narrow_vits
    image = photographs(1)[0, :, :700, :]  # (3, 700, 1024)
    expected = theirs.image_encoder(theirs.preprocess(255 * image)[None])
    square = torch.nn.functional.pad(image, (0, 0, 0, 324))[None]
    torch.testing.assert_close(ours.encode(square, torch.tensor([[1024, 700]])), expected, **CLOSE)
    assert (ours.encode(square) - expected).abs().max() > 1e-2  # and it matters


# ---- the real ones


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("sam-vit-b", VIT_B), ("sam-vit-l", VIT_L), ("sam-vit-h", VIT_H)])
def test_the_vits_as_published(original_vit, tmp_path, name, shape):
    theirs = original_vit(shape)
    path = tmp_path / "sam.pth"
    torch.save(theirs.state_dict(), path)
    ours = load_backbone(name, 1024, path)
    path.unlink()
    compare(theirs, ours, 1, dict.fromkeys(PROMPTS, True))


@pytest.mark.slow
def test_vit_b_of_medsam_takes_images_as_they_are(original_vit, tmp_path):
    theirs = original_vit(VIT_B)
    torch.save(theirs.state_dict(), tmp_path / "medsam_vit_b.pth")
    ours = load_backbone("medsam", 1024, tmp_path / "medsam_vit_b.pth")
    image = photographs(1)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(image), theirs.image_encoder(image), **CLOSE)


@pytest.mark.parametrize("package", ["mobile_sam.build_sam", pytest.param("kornia.models.sam", marks=pytest.mark.slow)])
def test_mobile_sam(original, randomise, tmp_path, package):
    with original(package) as module:
        built = module.build_sam_vit_t() if package.startswith("mobile") else module.Sam.from_name("mobile_sam")
        theirs = randomise(built, 0)
        if not hasattr(theirs, "preprocess"):  # kornia leaves it to the caller
            mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET.mean, IMAGENET.std))
            theirs.preprocess = lambda image: (image / 255 - mean) / std
        state = {name: tensor for name, tensor in theirs.state_dict().items()}
        torch.save(state, tmp_path / "mobile_sam.pt")
        ours = load_backbone("mobile-sam", 1024, tmp_path / "mobile_sam.pt")
        compare(theirs, ours, 1, {"points": True, "masks": False})
