"""The three losses by hand, and that each objective shows the encoder what it says it does."""

import math

import pytest
import torch
from torch import Tensor, nn

from cheaplunch.errors import UserError
from cheaplunch.models.backbones import build_tiny_vit, load_backbone, random_state
from cheaplunch.models.layouts import fill
from cheaplunch.models.objectives import (
    OBJECTIVES,
    detection_loss,
    draw_units,
    encode_changed,
    mix_loss,
    read_objectives,
    reconstruction_loss,
    shown_units,
    shuffled,
    take_units,
)
from cheaplunch.models.sam import AS_IS, Sam
from cheaplunch.models.tiny_vit import TinyViTConfig


@pytest.fixture(scope="module")
def vit() -> Sam:
    return load_backbone("tiny-random", 64)


@pytest.fixture(scope="module")
def tiny_vit(randomise) -> Sam:
    shape = TinyViTConfig(embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    network = build_tiny_vit(shape, AS_IS, 64)
    rest = nn.ModuleDict({"prompt_encoder": network.prompt_encoder, "mask_decoder": network.mask_decoder})
    encoder = randomise(network.vision_encoder, 0).state_dict()
    fill(network, random_state(rest) | {f"vision_encoder.{name}": t for name, t in encoder.items()}, "random")
    network.vision_encoder.fold()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


WHOLE = torch.full((4, 2), 64)


# ---- worked by hand


def test_mae_is_the_squared_error_on_hidden_units_normalised_by_each():
    # Two by two units of 2 × 2 px. Unit 0 holds 0, 0, 1, 1 in each of three colours: mean ½ and, of twelve values,
    # variance 12 · ¼ / 11 = 3/11, so that it becomes ±√(11/12). Unit 3 is flat and becomes 0. Units 1 and 2 are shown.
    images = torch.full((1, 3, 4, 4), 0.5)
    images[..., 0, :2], images[..., 1, :2] = 0.0, 1.0
    predicted = torch.full((1, 3, 4, 4), 9.0)  # wrong where nobody asks
    predicted[..., :2, :2] = 0.0
    predicted[..., 2:, 2:] = -0.5
    hidden = torch.tensor([[True, False, False, True]])
    loss = reconstruction_loss(predicted, images, hidden, unit_px=2)
    assert loss == pytest.approx((11 / 12 + 0.25) / 2, rel=1e-4)


def test_shed_is_the_cross_entropy_of_exchanged_or_not_where_something_is_shown():
    # The odds are 3 : 1 for exchanged, 1 : 1 and 1 : 3; the last unit is padding.
    logits = torch.tensor([[math.log(3), 0.0, -math.log(3), 50.0]])
    moved = torch.tensor([[True, False, True, False]])
    shown = torch.tensor([[True, True, True, False]])
    by_hand = (-math.log(3 / 4) - math.log(1 / 2) - math.log(1 / 4)) / 3
    assert detection_loss(logits, moved, shown) == pytest.approx(by_hand)


def test_e_mix_weighs_the_cross_entropies_of_both_images_in_the_mixture():
    # Images along x and y (lengths do not count). The first mixture, 0.7 of image 0, lies on x: cosines 1 and 0, logits
    # 5 and 0; the second, 0.6 of image 1, in the middle: both are as likely.
    plain = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    mixed = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    sum_ = math.exp(5) + 1
    first = -0.7 * math.log(math.exp(5) / sum_) - 0.3 * math.log(1 / sum_)
    loss = mix_loss(mixed, plain, torch.tensor([0.7, 0.6]), torch.tensor([1, 0]))
    assert loss == pytest.approx((first + math.log(2)) / 2)


# ---- units


def test_units_that_show_something_and_how_many_of_them_are_drawn(generator):
    shown = shown_units(torch.tensor([[64, 40], [16, 64]]), side=64, unit_px=16)  # (width, height)
    assert shown.view(2, 4, 4)[0].tolist() == [[True] * 4] * 3 + [[False] * 4]
    assert shown.view(2, 4, 4)[1].tolist() == [[True, False, False, False]] * 4
    first, second = draw_units(shown, 0.75, generator)
    assert len(set(first.tolist())) == 9 and shown[0, first].all()
    assert len(second) == 3 and shown[1, second].all()


def test_what_is_exchanged_moves_whole_units_and_none_stays(generator):
    shown = torch.ones(3, 16, dtype=torch.bool)
    source = shuffled(shown, 0.15, generator)
    stays = source == torch.arange(16)
    assert stays.sum(1).tolist() == [13, 13, 13]  # ⌈0.15 · 16⌉ = 3 moved
    assert all(sorted(row) == list(range(16)) for row in source.tolist())

    embeddings = torch.arange(3 * 64.0).view(3, 8, 8, 1)  # units of 2 × 2 embeddings
    moved = take_units(embeddings, source)
    place = int((~stays[0]).nonzero()[0])
    (to_row, to_column), (row, column) = divmod(place, 4), divmod(int(source[0, place]), 4)
    assert torch.equal(
        moved[0, 2 * to_row : 2 * to_row + 2, 2 * to_column : 2 * to_column + 2],
        embeddings[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2],
    )
    assert torch.equal(take_units(embeddings, torch.arange(16).repeat(3, 1)), embeddings)


# ---- what the encoder is shown


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_the_encoder_goes_on_from_what_its_embeddings_became(kind, images, request):
    network = request.getfixturevalue(kind)
    plain = network.encode(images, WHOLE)
    assert torch.equal(encode_changed(network, images, WHOLE, lambda embeddings: embeddings), plain)
    other = encode_changed(network, images, WHOLE, lambda embeddings: embeddings.flip(0))
    torch.testing.assert_close(other, plain.flip(0))
    assert torch.equal(network.encode(images, WHOLE), plain)  # and nothing is left behind


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_mae_never_shows_what_it_hides(kind, images, request):
    network, draws = request.getfixturevalue(kind), torch.Generator
    objective = OBJECTIVES["mae"](network, 16, draws().manual_seed(0))
    seen = []
    hook = network.vision_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    drawn = draw_units(torch.ones(4, 16, dtype=torch.bool), 0.75, draws().manual_seed(3))
    others = images.clone()
    for image, units in zip(others, drawn, strict=True):
        for row, column in (divmod(int(unit), 4) for unit in units):
            image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = torch.rand(3, 16, 16)
    for batch in (images, others):
        objective(network, batch, WHOLE, draws().manual_seed(3))
    hook.remove()
    first, second = (getattr(output, "last_hidden_state", output) for output in seen)
    assert not torch.equal(images, others)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_is_finite_repeats_its_draws_and_reaches_the_first_layer(name, kind, images, request):
    network, draws = request.getfixturevalue(kind), torch.Generator
    objective = OBJECTIVES[name](network, 16, draws().manual_seed(0))
    first = next(network.vision_encoder.patch_embed.parameters()).requires_grad_()
    sizes = torch.tensor([[64, 64], [64, 40], [30, 64], [64, 64]])
    try:
        losses = [objective(network, images, sizes, draws().manual_seed(seed)) for seed in (1, 1, 2)]
        losses[0].backward()
        assert first.grad is not None and first.grad.abs().sum() > 0
    finally:
        first.grad = None
        first.requires_grad_(False)
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses)
    assert losses[0] == losses[1] != losses[2]
    assert all(parameter.grad is not None for parameter in objective.parameters())


# ---- words


def test_objectives_by_name_and_weight():
    assert read_objectives("e-mix,shed,mae") == {"e-mix": 1.0, "shed": 1.0, "mae": 1.0}
    assert read_objectives("mae:2, shed:0.5") == {"mae": 2.0, "shed": 0.5}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mea", "--objective mea is not known; choose from: e-mix, shed, mae"),
        ("", "is not known"),
        ("mae,mae", "names mae twice"),
        ("mae:x", "--objective mae:x: the weight must be a number above 0"),
        ("shed:0", "above 0"),
        ("shed:nan", "above 0"),
    ],
)
def test_words_that_are_no_objectives(words, said):
    with pytest.raises(UserError, match=said):
        read_objectives(words)
