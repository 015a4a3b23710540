"""The depth branch: the block's own attention across slices, at one place and nowhere else; and slabs of slices."""

import copy
from functools import lru_cache

import pytest
import torch
from transformers import SamConfig, SamVisionConfig

from cheaplunch.models.adapters import AdapterSettings, add_adapters
from cheaplunch.models.depth import (
    DepthBranch,
    Slab,
    cut_slabs,
    embed_slice,
    encode_slabs,
    slab_showing,
    slabs_a_slice,
)
from cheaplunch.models.sam import IMAGENET, Sam
from cheaplunch.models.tiny_vit import TinyViT, TinyViTConfig

SIDE, CELLS = 32, 8
SETTINGS = AdapterSettings(("encoder", "depth"), width=8)
VOLUMES = torch.rand(2, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))  # two slabs of three slices


@pytest.fixture(scope="module", params=["vit", "tiny-vit"])
def plain(request, randomise):
    """A SAM of whose encoder some blocks are windowed, with windows that reach beyond the image, and one is global."""
    vision = SamVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        global_attn_indexes=[1],
        window_size=3,
        output_channels=256,
        image_size=SIDE,
        patch_size=4,
    )
    shape = TinyViTConfig((8, 16, 16, 24), (1, 1, 2, 1), (1, 2, 2, 3), (3, 3, 8, 3))
    config = SamConfig(vision_config=vision, attn_implementation="sdpa")
    sam = Sam(config, TinyViT(shape) if request.param == "tiny-vit" else None, IMAGENET)
    if request.param == "vit":
        sam.vision_encoder.to_empty(device="cpu")
    randomise(sam.vision_encoder, seed=2)
    if request.param == "tiny-vit":
        sam.vision_encoder.fold()
    return sam


@pytest.fixture(scope="module")
def start(plain):
    return with_adapters(plain)


@pytest.fixture(scope="module")
def trained(start):
    return as_if_trained(start)


def with_adapters(plain: Sam, settings: AdapterSettings = SETTINGS) -> Sam:
    sam = copy.deepcopy(plain)
    add_adapters(sam, settings, torch.Generator().manual_seed(3))
    return sam


@torch.no_grad()
def as_if_trained(sam: Sam) -> Sam:
    sam, generator = copy.deepcopy(sam), torch.Generator().manual_seed(4)
    for parameter in sam.vision_encoder.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sam


def blocks_of(sam: Sam) -> list:
    encoder = sam.vision_encoder
    return [b for stage in encoder.layers[1:] for b in stage.blocks] if isinstance(encoder, TinyViT) else encoder.layers


def branches_of(sam: Sam) -> list[DepthBranch]:
    return [module for module in sam.modules() if isinstance(module, DepthBranch)]


def differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(…, C) → (…) bool: where they are not the same but for rounding."""
    return (a - b).abs().amax(dim=-1) > 1e-4


# ---- the start, and slabs of one slice


@torch.no_grad()
def test_slabs_start_as_sam(plain, start):
    assert len(branches_of(start)) == len(blocks_of(start))
    expected = plain.encode(VOLUMES.flatten(0, 1))
    assert torch.equal(encode_slabs(start, VOLUMES), expected.view(2, 3, 256, CELLS, CELLS))
    shown_px = torch.tensor([[[32, 20]] * 3, [[16, 32]] * 3])
    expected = plain.encode(VOLUMES.flatten(0, 1), shown_px.flatten(0, 1))
    assert torch.equal(encode_slabs(start, VOLUMES, shown_px).flatten(0, 1), expected)


@torch.no_grad()
def test_a_slab_of_one_slice_equals_the_2_d_model(plain, trained):
    """Which is the same network without the branch: its adapters are trained, and so are the gates left out."""
    flat = with_adapters(plain, AdapterSettings(("encoder",), width=8))
    found = dict(trained.named_parameters())
    for name, parameter in flat.named_parameters():
        parameter.copy_(found[name])
    slices = VOLUMES.flatten(0, 1)
    expected = flat.encode(slices)
    assert (expected - plain.encode(slices)).abs().max() > 0.1
    assert torch.equal(encode_slabs(trained, slices[:, None])[:, 0], expected)
    assert torch.equal(trained.encode(slices), expected)
    assert torch.equal(encode_slabs(flat, VOLUMES).flatten(0, 1), expected)  # and without the branch slabs are slices


@torch.no_grad()
def test_a_batch_of_images_after_slabs_is_no_slab(trained):
    images = VOLUMES[0]
    before = trained.encode(images)
    assert (encode_slabs(trained, VOLUMES)[0] - before).abs().max() > 0.1
    assert torch.equal(trained.encode(images), before)


# ---- what it computes


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1])
def test_it_is_the_blocks_own_attention_on_transposed_tokens(plain, number):
    """The whole module, run on columns of D tokens each as if they were images, with no offset between places."""
    attention = copy.deepcopy(blocks_of(plain)[number].attn)
    volumes, slices, dim = 2, 5, attention.proj.out_features
    x = torch.randn(volumes * slices, 4, 7, dim)
    columns = x.view(volumes, slices, 4 * 7, dim).transpose(1, 2).flatten(0, 1)  # (V · N, D, C)
    branch = DepthBranch(dim, Slab())
    branch.slab.slices = slices
    branch.gate.fill_(1)
    found = branch(torch.zeros_like(x), attention, x)
    if isinstance(plain.vision_encoder, TinyViT):
        attention.attention_biases.zero_()
        attention.offset = attention.offset[:slices, :slices]
        expected = attention(columns)
    else:
        attention.window = 0
        attention.rel_pos_h.data = torch.zeros(2 * slices - 1, dim // attention.heads)
        attention.rel_pos_w.data = torch.zeros(1, dim // attention.heads)
        expected, _ = attention(columns[:, :, None])  # an image of D rows and one column
    expected = expected.view(volumes, 4 * 7, slices, dim).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_permuted_slices_give_permuted_embeddings(trained):
    order = torch.tensor([2, 0, 1])
    expected = encode_slabs(trained, VOLUMES)
    torch.testing.assert_close(encode_slabs(trained, VOLUMES[:, order]), expected[:, order], atol=1e-4, rtol=0)
    found = encode_slabs(trained, torch.stack([VOLUMES[0], VOLUMES[1, order]]))
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)  # slabs know nothing of one another


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1])  # in windows, and in one over the whole image
def test_a_changed_token_changes_other_slices_at_its_place_alone(trained, number):
    """Its own slice it changes in its window; a version that mixes windows with slices changes other places."""
    block = copy.deepcopy(blocks_of(trained)[number])
    if isinstance(
        trained.vision_encoder, TinyViT
    ):  # its convolution, which comes after, would spread everything by a cell
        block.local_conv = torch.nn.Identity()
    block.depth.slab.slices = 3
    dim, window = block.attn.proj.out_features, (3, 8)[number]
    row, column = 4, 7
    x = torch.randn(2 * 3, 8, 8, dim)  # two slabs
    changed = x.clone()
    changed[1, row, column] += torch.randn(dim)
    where = differs(block(changed), block(x))  # (6, 8, 8)
    place = torch.zeros(8, 8, dtype=torch.bool)
    place[row, column] = True
    assert torch.equal(where[0], place) and torch.equal(where[2], place)
    assert not where[3:].any()
    its_window = torch.zeros(8, 8, dtype=torch.bool)
    its_window[row // window * window :, column // window * window :][:window, :window] = True
    assert torch.equal(where[1], its_window)


# ---- training


def test_gradients_open_the_gates(start):
    network = copy.deepcopy(start)
    encode_slabs(network, VOLUMES).square().mean().backward()
    assert all(branch.gate.grad.abs().sum() > 0 for branch in branches_of(network))


def test_checkpointing_computes_slabs_again_as_slabs(trained):
    found = []
    for checkpointing in (False, True):
        network = copy.deepcopy(trained).train()
        if checkpointing:
            network.checkpoint_encoder()
        encode_slabs(network, VOLUMES).square().mean().backward()
        found.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert any(name.endswith("depth.gate") for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


# ---- volumes


@pytest.mark.parametrize(
    ("count", "depth", "overlap", "expected"),
    [
        (7, 3, 1, [(0, 3), (2, 5), (4, 7)]),
        (8, 3, 1, [(0, 3), (2, 5), (4, 7), (5, 8)]),  # the last is moved back
        (6, 3, 0, [(0, 3), (3, 6)]),
        (3, 3, 2, [(0, 3)]),
        (2, 5, 2, [(0, 2)]),
        (3, 1, 0, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_a_volume_is_cut_into_slabs_that_overlap(count, depth, overlap, expected):
    assert [(slab.start, slab.stop) for slab in cut_slabs(count, depth, overlap)] == expected


@pytest.mark.parametrize(("depth", "overlap"), [(3, 3), (1, 1), (2, -1)])
def test_slabs_cannot_overlap_by_all_of_themselves(depth, overlap):
    with pytest.raises(ValueError, match="cannot overlap"):
        cut_slabs(9, depth, overlap)


def embeddings_of(count, depth, overlap, encode) -> list[torch.Tensor]:
    kept = lru_cache(slabs_a_slice(depth, overlap))(encode)
    return [embed_slice(number, count, depth, overlap, kept) for number in range(count)]


def test_what_slabs_say_of_a_slice_is_weighed_by_its_place_in_them():
    """Slabs 0–3 and 2–5 of six slices: slice 2 is next to an end of the first (2) and at one of the second (1)."""
    said = embeddings_of(6, 4, 2, lambda slab: torch.full((4, 1, 1, 1), float(slab.start)))  # 0, then 2
    expected = [0, 0, (2 * 0 + 1 * 2) / 3, (1 * 0 + 2 * 2) / 3, 2, 2]
    assert [float(embedding) for embedding in said] == pytest.approx(expected)


def test_three_slabs_can_share_a_slice():
    """Slabs of 3 in steps of 1 over five slices; slice 2 is at an end, in the middle, and at an end."""
    said = embeddings_of(5, 3, 2, lambda slab: torch.full((3, 1, 1, 1), float(slab.start)))
    expected = [0, (2 * 0 + 1) / 3, (1 * 0 + 2 * 1 + 1 * 2) / 4, (1 * 1 + 2 * 2) / 3, 2]
    assert [float(embedding) for embedding in said] == pytest.approx(expected)


def test_slabs_are_encoded_as_they_are_needed_and_in_order_each_once():
    encoded = []
    embed_slice(3, 12, 5, 2, lambda slab: encoded.append(slab) or torch.zeros(5, 1, 1, 1))
    assert encoded == [range(0, 5), range(3, 8)]
    for count, depth, overlap in ((12, 5, 2), (13, 5, 2), (14, 5, 4), (9, 4, 3), (7, 3, 1), (5, 1, 0)):
        encoded.clear()
        embeddings_of(count, depth, overlap, lambda slab, d=depth: encoded.append(slab) or torch.zeros(d, 1, 1, 1))
        assert encoded == cut_slabs(count, depth, overlap)


def test_a_slice_is_at_its_place_in_a_slab_unless_the_volume_ends_before():
    assert slab_showing(4, 9, 5, 2) == range(2, 7)
    assert slab_showing(4, 9, 5, 0) == range(4, 9)
    assert slab_showing(4, 9, 4, 3) == range(1, 5)
    assert slab_showing(1, 9, 5, 2) == slab_showing(0, 9, 5, 4) == range(0, 5)
    assert slab_showing(8, 9, 5, 2) == slab_showing(5, 9, 5, 0) == range(4, 9)
    assert slab_showing(1, 2, 5, 2) == range(0, 2)  # all there are
    assert slab_showing(3, 9, 1, 0) == range(3, 4)


@torch.no_grad()
def test_a_volume_in_slabs_of_one_slice_is_the_2_d_model(trained):
    slices = VOLUMES.flatten(0, 1)

    def encode(slab: range) -> torch.Tensor:
        return encode_slabs(trained, slices[None, slab.start : slab.stop])[0]

    in_slices = torch.stack(embeddings_of(6, 1, 0, encode))
    torch.testing.assert_close(in_slices, trained.encode(slices), atol=1e-5, rtol=0)  # in a batch of another size
    in_slabs = torch.stack(embeddings_of(6, 4, 2, encode))
    assert (in_slabs - in_slices).abs().amax(dim=(1, 2, 3)).min() > 1e-2
