"""The Medical SAM Adapter's parts: where each stands, that it starts as SAM, what is trained, and its file."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

from cheaplunch.errors import UserError
from cheaplunch.models.adapters import BEHIND_FIRST_BLOCK, Adapter, AdapterSettings, add_adapters
from cheaplunch.models.backbones import BACKBONES
from cheaplunch.models.heads import make_two_outputs, trained_modules
from cheaplunch.models.lora import load_adapter, save_adapter
from cheaplunch.models.sam import Sam
from cheaplunch.models.tiny_vit import TinyViT, TinyViTConfig

MASK_HEAD = [
    "mask_decoder.upscale_conv1",
    "mask_decoder.upscale_layer_norm",
    "mask_decoder.upscale_conv2",
    "mask_decoder.output_hypernetworks_mlps.0",
]  # of the single mask
SIDE, WIDTH, DECODER = 32, 8, 32  # px of the input; channels of the bottleneck and of the decoder
IMAGES = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
CLICKS = {
    "points_xy": torch.tensor([[[[5.0, 6.0]], [[20.0, 25.0]]], [[[30.0, 3.0]], [[10.0, 10.0]]]]),  # (2, 2, 1, 2)
    "point_labels": torch.tensor([[[1], [0]], [[1], [1]]]),
}


def small_sam(kind: str, randomise) -> Sam:
    """A small SAM whose blocks have 8 × 8 cells: a ViT (one block in windows, one global), or a TinyViT."""
    shape = TinyViTConfig((8, 16, 16, 24), (1, 1, 2, 1), (1, 2, 2, 3), (3, 3, 4, 3), out_channels=DECODER)
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            global_attn_indexes=[1],
            window_size=3,
            output_channels=DECODER,
            num_pos_feats=DECODER // 2,
            image_size=SIDE,
            patch_size=4,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=DECODER, image_size=SIDE, patch_size=4),
        mask_decoder_config=SamMaskDecoderConfig(hidden_size=DECODER, mlp_dim=64, iou_head_hidden_dim=DECODER),
        attn_implementation="sdpa",
    )
    sam = Sam(config, TinyViT(shape) if kind == "tiny-vit" else None)
    parts = [sam.prompt_encoder, sam.mask_decoder, *([sam.vision_encoder] if kind == "vit" else [])]
    for part in parts:  # which are transformers', and without memory yet
        part.to_empty(device="cpu")
    randomise(sam, seed=2)
    if kind == "tiny-vit":
        sam.vision_encoder.fold()
    return sam.requires_grad_(False)


def adapted(sam: Sam, settings: AdapterSettings | None = None) -> Sam:
    sam = copy.deepcopy(sam)
    add_adapters(sam, settings or AdapterSettings(width=WIDTH), torch.Generator().manual_seed(3), MASK_HEAD)
    return sam


@torch.no_grad()
def moved(sam: Sam) -> Sam:
    """As if trained: every trained tensor is somewhere else."""
    sam, generator = copy.deepcopy(sam), torch.Generator().manual_seed(5)
    for parameter in sam.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return sam


@torch.no_grad()
def become_identity(adapter: Adapter, factor: float) -> None:
    """Makes its output `factor` times its input: relu(x) − relu(−x) is x. Its width is twice its channels."""
    eye = torch.eye(adapter.down.in_features)
    adapter.down.weight.copy_(torch.cat([eye, -eye]))
    adapter.down.bias.zero_()
    adapter.up.weight.copy_(factor * torch.cat([eye, -eye], dim=1))
    if adapter.prompt_down is not None:
        adapter.prompt_down.weight.zero_()


@pytest.fixture(scope="module", params=["vit", "tiny-vit"])
def plain(request, randomise):
    return small_sam(request.param, randomise)


@pytest.fixture(scope="module")
def vit(randomise):
    return small_sam("vit", randomise)


def first_encoder_blocks(sam: Sam):
    return sam.vision_encoder.layers[1].blocks if isinstance(sam.vision_encoder, TinyViT) else sam.vision_encoder.layers


# ---- the start


@torch.no_grad()
def test_the_first_forward_is_sams(plain):
    network = adapted(plain)
    embeddings = plain.encode(IMAGES)
    assert torch.equal(network.encode(IMAGES), embeddings)
    masks = torch.randn(2, 2, 32, 32)  # four times the embedding's 8 cells
    for prompts in (CLICKS, {"boxes_xyxy": torch.tensor([[[2.0, 3, 20, 25]]] * 2)}, {**CLICKS, "masks": masks}, {}):
        for found, expected in zip(
            network.decode(embeddings, **prompts), plain.decode(embeddings, **prompts), strict=True
        ):
            assert torch.equal(found, expected)


@torch.no_grad()
def test_every_adapter_has_a_say(plain):
    """Moving any one of them away from zero changes the masks."""
    network = adapted(plain)
    expected, _ = network.decode(network.encode(IMAGES), **CLICKS)
    adapters = {name: module for name, module in network.named_modules() if isinstance(module, Adapter)}
    blocks = 4 if isinstance(plain.vision_encoder, TinyViT) else 2
    assert len(adapters) == 2 * blocks + 3
    for name, adapter in adapters.items():
        adapter.up.weight.normal_(generator=torch.Generator().manual_seed(6))  # a constant would end at the next norm
        found, _ = network.decode(network.encode(IMAGES), **CLICKS)
        assert (found - expected).abs().max() > 1e-4, name
        adapter.up.weight.zero_()


def test_tiny_vits_first_stage_has_no_adapters(randomise):
    network = adapted(small_sam("tiny-vit", randomise))
    stages = {name.split(".")[2] for name, m in network.named_modules() if isinstance(m, Adapter) and "vision" in name}
    assert stages == {"1", "2", "3"}


# ---- where they stand: an adapter that gives a multiple of its input


@torch.no_grad()
def test_the_first_is_between_attention_and_residual(plain):
    """Where it takes all away that attention said, the block is one whose attention says nothing."""
    expected = first_encoder_blocks(copy.deepcopy(plain))[0]
    dim = expected.attn.proj.out_features
    block = first_encoder_blocks(adapted(plain, AdapterSettings(("encoder",), width=2 * dim)))[0]
    become_identity(block.after_attention, -1)
    x = torch.randn(2, 8, 8, dim)
    expected.attn.proj.weight.zero_()
    expected.attn.proj.bias.zero_()
    torch.testing.assert_close(block(x), expected(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_second_is_beside_the_mlp_times_s(plain):
    """Where it gives its input, the block gives s times what the MLP reads, its normed input, in addition."""
    dim = first_encoder_blocks(plain)[0].attn.proj.out_features
    block = first_encoder_blocks(adapted(plain, AdapterSettings(("encoder",), width=2 * dim, scale=0.25)))[0]
    expected = first_encoder_blocks(plain)[0]
    become_identity(block.beside_mlp, 1)
    read = []
    first_linear = expected.mlp.fc1 if isinstance(plain.vision_encoder, TinyViT) else expected.mlp.lin1
    hook = first_linear.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    x = torch.randn(2, 8, 8, dim)
    torch.testing.assert_close(block(x), expected(x) + 0.25 * read[0], atol=1e-5, rtol=0)
    hook.remove()


@pytest.fixture
def first_blocks(vit):
    """The decoder's first block as SAM's and as ours, its bottlenecks wide enough to be an identity; and its input."""
    settings = AdapterSettings(("decoder", "prompt"), width=2 * DECODER, scale=0.25)
    network = copy.deepcopy(vit)
    add_adapters(network, settings, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    tokens, image, places = (torch.randn(2, 1, n, DECODER, generator=generator) for n in (6, 64, 64))
    args = (tokens, image, tokens, places, None)
    return copy.deepcopy(vit.mask_decoder.transformer.layers[0]), network.mask_decoder.transformer.layers[0], args


@torch.no_grad()
def test_the_decoders_first_is_between_cross_attention_and_residual(first_blocks):
    theirs, ours, args = first_blocks
    become_identity(ours.after_cross_attention, -1)
    theirs.cross_attn_token_to_image.out_proj.weight.zero_()
    theirs.cross_attn_token_to_image.out_proj.bias.zero_()
    for found, expected in zip(ours(*args)[:2], theirs(*args)[:2], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_decoders_second_is_beside_the_mlp_times_s(first_blocks):
    theirs, ours, args = first_blocks
    become_identity(ours.beside_mlp, 1)
    mlp = theirs.mlp
    theirs.mlp = Sum(mlp, 0.25)
    for found, expected in zip(ours(*args)[:2], theirs(*args)[:2], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class Sum(nn.Module):
    def __init__(self, mlp: nn.Module, share: float):
        super().__init__()
        self.mlp, self.share = mlp, share

    def forward(self, x):
        return self.mlp(x) + self.share * x


@torch.no_grad()
def test_the_decoders_third_is_behind_the_residual_and_before_the_norm(first_blocks):
    """Where it takes away all that it is given, image tokens of attention alike, the norm's bias is left."""
    theirs, ours, args = first_blocks
    become_identity(ours.on_image, -1)
    queries, keys, _ = ours(*args)
    torch.testing.assert_close(keys, theirs.layer_norm4.bias.expand_as(keys), atol=1e-5, rtol=0)
    torch.testing.assert_close(queries, theirs(*args)[0])  # on the image's side alone


# ---- the prompt


@torch.no_grad()
@pytest.mark.parametrize("prompted", [True, False])
def test_the_prompt_reaches_the_decoders_first_adapter_past_attention(vit, prompted):
    """Attention is made to say the same whatever the prompt: only the adapter's own way to the prompt is left."""
    parts = ("decoder", "prompt") if prompted else ("decoder",)
    network = moved(adapted(vit, AdapterSettings(parts, WIDTH)))
    block = network.mask_decoder.transformer.layers[0]
    block.cross_attn_token_to_image.out_proj.weight.zero_()
    given = []
    block.after_cross_attention.register_forward_hook(lambda module, args, output: given.append(output))
    embeddings = network.encode(IMAGES)
    network.decode(embeddings, **CLICKS)
    network.decode(embeddings, CLICKS["points_xy"] + 7, CLICKS["point_labels"])
    change = (given[1] - given[0]).abs().amax(dim=(0, 1, 3))  # of each token: IoU, four masks, point, padding
    assert len(change) == 7
    assert (change > 1e-4).all() if prompted else (change == 0).all()


@torch.no_grad()
def test_the_prompts_down_projection_comes_before_the_relu():
    adapter = Adapter(2, 3, torch.Generator().manual_seed(0), prompted=True)
    x, prompt = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    adapter.down.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))  # → 1, −2, −1
    adapter.prompt_down.weight.copy_(torch.tensor([[-1.0, 0], [0, 1], [0, 0]]))  # → −3, 5, 0
    adapter.up.weight.copy_(torch.tensor([[1.0, 10, 100], [0, 2, 0]]))  # relu(−2, 3, −1) is 0, 3, 0
    assert adapter(x, prompt).tolist() == [30.0, 6.0]


# ---- what is trained


def count(module: nn.Module, *words: str) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and all(word in n for word in words))


def bottleneck(dim: int) -> int:
    return dim * 64 + 64 + 64 * dim + dim


def test_parameters_of_vit_b_by_hand():
    network = BACKBONES["sam-vit-b"].build(512)
    add_adapters(network, AdapterSettings(), torch.Generator(), MASK_HEAD)
    assert count(network, "vision_encoder", "after_attention") == 12 * bottleneck(768) == 1_189_632
    assert count(network, "vision_encoder", "beside_mlp") == 12 * bottleneck(768)
    assert count(network, "vision_encoder", "depth.gate") == 12 * 768
    assert count(network, "transformer.layers.0") == 3 * bottleneck(256) + 256 * 64 == 115_648
    cross = 3 * (256 * 128 + 128) + 128 * 256 + 256
    mlp = 256 * 2048 + 2048 + 2048 * 256 + 256
    assert count(network, "transformer.layers.1") == 4 * (256 * 256 + 256) + 2 * cross + mlp + 4 * 2 * 256
    head = 256 * 64 * 4 + 64 + 2 * 64 + 64 * 32 * 4 + 32 + 2 * (256 * 256 + 256) + 256 * 32 + 32
    behind = 1_579_520 + cross + 2 * 256 + head
    assert count(network) == 2 * 1_189_632 + 9_216 + 115_648 + behind == 4_429_632


def test_parameters_of_lite_medsam_by_hand():
    """Two blocks of 128 channels, six of 160, two of 320."""
    network = BACKBONES["lite-medsam"].build(256)
    add_adapters(network, AdapterSettings(), torch.Generator())
    adapters = 2 * (2 * bottleneck(128) + 6 * bottleneck(160) + 2 * bottleneck(320))
    gates = 2 * 128 + 6 * 160 + 2 * 320
    assert count(network, "vision_encoder") == adapters + gates == 480_128 + 1_856


def test_gradients_reach_all_that_is_trained_and_nothing_else(plain):
    network = moved(adapted(plain, AdapterSettings(("encoder", "decoder", "prompt"), WIDTH))).train()
    masks, _ = network.decode(network.encode(IMAGES), **CLICKS)
    masks.square().mean().backward()
    reached = {n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    adapters = {
        f"{n}.{p}" for n, m in network.named_modules() if isinstance(m, Adapter) for p, _ in m.named_parameters()
    }
    whole = tuple(f"{name}." for name in (*BEHIND_FIRST_BLOCK, *MASK_HEAD))
    assert reached == adapters | {name for name, _ in network.named_parameters() if name.startswith(whole)}


def test_at_the_start_gradients_reach_every_up_projection(plain):
    network = adapted(plain, AdapterSettings(("encoder", "decoder", "prompt"), WIDTH))
    masks, _ = network.decode(network.encode(IMAGES), **CLICKS)
    masks.square().mean().backward()
    ups = [m.up.weight.grad for m in network.modules() if isinstance(m, Adapter)]
    assert all(grad.abs().sum() > 0 for grad in ups)


def test_parts_can_be_left_out(vit):
    def places(*parts):
        modules = adapted(vit, AdapterSettings(parts)).named_modules()
        return {name.rpartition("layers.")[2] for name, module in modules if isinstance(module, Adapter)}

    assert places() == set()
    assert places("encoder") == {f"{block}.{place}" for block in "01" for place in ("after_attention", "beside_mlp")}
    assert places("decoder") == {"0.after_cross_attention", "0.beside_mlp", "0.on_image"}
    for part, base in (("prompt", "decoder"), ("depth", "encoder")):
        with pytest.raises(UserError, match=f"{part} without {base}"):
            AdapterSettings((part,))
    with pytest.raises(UserError, match="neck is not known; choose from: encoder, decoder, prompt, depth"):
        AdapterSettings(("encoder", "neck"))


def test_checkpointing_computes_the_same_gradients(plain):
    found = []
    for checkpointing in (False, True):
        network = moved(adapted(plain)).train()
        if checkpointing:
            network.checkpoint_encoder()
        runs = []
        first_encoder_blocks(network)[0].after_attention.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        network.encode(IMAGES).square().mean().backward()
        assert len(runs) == 1 + checkpointing
        found.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 2 * 2 * 4
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_train_mode_computes_the_same(plain):
    network = moved(adapted(plain))
    with torch.no_grad():
        expected = network.encode(IMAGES)
        assert torch.equal(network.train().encode(IMAGES), expected)


# ---- with two outputs, and the file


@torch.no_grad()
def test_two_outputs_start_at_zero_shot(plain):
    """Cheap Lunch's head on it: the target's logit less the background's is SAM's own."""
    network = copy.deepcopy(plain)
    make_two_outputs(network)
    add_adapters(network, AdapterSettings(), torch.Generator().manual_seed(3), trained_modules("two"))
    embeddings = plain.encode(IMAGES)
    expected, _ = plain.decode(embeddings, **CLICKS)
    found, _ = network.decode(network.encode(IMAGES), **CLICKS, multimask=True)
    torch.testing.assert_close((found[:, :, 1] - found[:, :, 0])[:, :, None], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_what_was_trained_comes_back_bit_for_bit(plain, tmp_path):
    trained = moved(adapted(plain))
    save_adapter(trained, tmp_path)
    names = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
    other = copy.deepcopy(plain)
    add_adapters(other, AdapterSettings(width=WIDTH), torch.Generator().manual_seed(99), MASK_HEAD)
    load_adapter(other, tmp_path)
    embeddings = trained.encode(IMAGES)
    assert torch.equal(other.encode(IMAGES), embeddings)
    assert torch.equal(other.decode(embeddings, **CLICKS)[0], trained.decode(embeddings, **CLICKS)[0])


def test_a_file_of_other_parts_is_refused(vit, tmp_path):
    save_adapter(adapted(vit), tmp_path)
    with pytest.raises(UserError, match=r"tensors differ, first vision_encoder\.layers\.0\.depth\.gate"):
        load_adapter(adapted(vit, AdapterSettings(("encoder", "decoder", "prompt"), WIDTH)), tmp_path)
