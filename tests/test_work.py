"""What a step works on: boxes, clicks, empty slices and label maps, on a data set that can be read."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cheaplunch.config import build_config
from cheaplunch.learner import Learner, start_processes
from cheaplunch.material import prepare
from cheaplunch.models.segmenter import build_segmenter
from cheaplunch.prompts import Prompts, next_click, random_point, tight_box
from cheaplunch.runtime import autocast
from cheaplunch.work import ClickingUsers, draw_work

SMALL = {"backbone": "tiny-random", "image_size": 64, "exemplars": 2, "batch_size": 3, "device": "cpu"}
SMALL |= {"steps": 2, "warmup_steps": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def draw(tiny_dataset):
    """(method, step, settings) → the work of that step, all three images."""

    def make(method: str, step: int = 0, **changes):
        config = build_config(method, {**SMALL, "data": tiny_dataset, **changes})
        return draw_work(prepare(config), step, [0, 1, 2])

    return make


# ---- boxes


def test_boxes_are_tight_and_up_to_20_px_of_1024_too_wide_on_each_side(draw):
    grown = []
    for step in range(6):
        work = draw("medsam", step, image_size=128)  # 2.5 px
        assert work.prompts.points_xy is None
        assert work.prompts.boxes_xyxy.shape == (3, 4, 4)
        for targets, boxes in zip(work.targets.numpy(), work.prompts.boxes_xyxy.numpy(), strict=True):
            for target, box in zip(targets, boxes, strict=True):
                outward = (box - tight_box(target)) * [-1, -1, 1, 1]
                inside = (np.array(tight_box(target)) > [3, 3, 0, 0]) & (
                    np.array(tight_box(target)) < [128, 128, 124, 124]
                )
                grown += outward[inside].tolist()
                assert box.min() >= 0 and box.max() <= 127
    assert min(grown) >= -1e-4 and max(grown) <= 2.5 + 1e-4
    assert 1.0 < np.mean(grown) < 1.5  # evenly between the two
    assert torch.equal(work.prompts.boxes_xyxy, draw("medsam", 5, image_size=128).prompts.boxes_xyxy)


# ---- clicks


def test_the_number_of_clicks_is_drawn_for_each_step(draw):
    counts = {draw("cheap-lunch", step, training_prompts="clicks:3").prompts.clicks for step in range(12)}
    assert counts == {1, 2, 3}


def test_clicking_users_click_where_the_answer_is_wrong():
    """One image of two targets, against the same written out, with an answer that is right about the second."""
    targets = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    targets[0, 0, 2:9, 3:10] = targets[0, 1, 10:14, 10:15] = True
    asked = []

    def answer(prompts: Prompts) -> torch.Tensor:
        asked.append(prompts)
        found = targets.clone()
        found[0, 0, 2:6] = False  # four rows of the first are missed
        return torch.where(found, 3.0, -3.0)

    last = ClickingUsers(targets, (5,), clicks=3)(answer)
    rng = np.random.default_rng(5)
    first, second = (random_point(target, rng) for target in targets[0].numpy())
    missing = next_click(answer(last)[0, 0].numpy() > 0, targets[0, 0].numpy())
    assert missing is not None
    expected = [[(*first, 1), missing, missing], [(*second, 1)] * 3]  # nothing is wrong with the second: again
    found = torch.cat([last.points_xy, last.point_labels[..., None]], dim=-1)
    assert found.tolist() == [[[list(map(float, click)) for click in clicks] for clicks in expected]]
    assert [prompts.points_xy.shape[2] for prompts in asked[:2]] == [1, 2]
    assert asked[0].masks is None
    assert torch.equal(asked[1].masks, answer(last)) and torch.equal(last.masks, answer(last))
    alone = ClickingUsers(targets, (5,), clicks=1)(answer)
    assert alone.masks is None and torch.equal(alone.points_xy, last.points_xy[:, :, :1])


def test_the_last_answer_is_what_is_learned_from_and_trains_the_mask_prompt(draw):
    work = next(
        w for step in range(9) if (w := draw("cheap-lunch", step, training_prompts="clicks:3")).prompts.clicks == 2
    )
    config = build_config("cheap-lunch", {**SMALL, "training_prompts": "clicks:3", "head_start": "fresh"})
    for precision in ("fp32", "bf16"):  # autocast would keep weights cast while no gradient was taken
        segmenter = build_segmenter(config.model).train()
        with autocast(torch.device("cpu"), precision):
            outputs = segmenter(work.images, work.prompts, work.shown_px)
            with torch.no_grad():
                embeddings = segmenter.embed(work.images, work.shown_px)
                prompts = work.prompts(lambda asked, s=segmenter, e=embeddings: s.foreground(e, asked))
                expected = segmenter.decode(embeddings, prompts)
        if precision == "fp32":
            torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
        outputs.square().mean().backward()
        still = [n for n, p in segmenter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        # B is zero, so that A has no gradient yet; the embedding of "no mask" is of a first click.
        assert [name for name in still if ".lora_A." not in name and "no_mask_embed" not in name] == []
        kinds = {
            name.split("encoder.point_embed.")[1][0] for name in _trained(segmenter) if "encoder.point_embed." in name
        }
        assert kinds == {"0", "1"}  # points off the target and on it


def _trained(segmenter) -> list[str]:
    return [name for name, p in segmenter.named_parameters() if p.requires_grad]


# ---- without prompts


def test_label_maps_are_asked_for_and_empty_slices_are_among_them(draw):
    empty = shown = 0
    for step in range(8):
        work = draw("linear-probe", step, empty_share=0.5)
        assert work.prompts == Prompts()
        assert work.targets.shape == (3, 1, 64, 64)
        for image, label in zip(work.images, work.targets, strict=True):
            empty += not label.any()
            shown += bool(label.any())
            if not label.any():  # bright organs are nowhere on it
                assert image.mean() < 0.4
        assert set(work.targets.unique().tolist()) <= {0, 1, 2}
    assert 6 <= empty <= 18
    assert all(draw("linear-probe", step, empty_share=0.0).targets.flatten(1).any(dim=1).all() for step in range(3))


def test_filled_in_backgrounds_are_no_empty_slices(tiny_dataset):
    config = build_config("linear-probe", {**SMALL, "data": tiny_dataset, "empty_share": 1.0})
    material = prepare(config)
    filled = replace(material, pool=replace(material.pool, backgrounds_filled=True))
    assert not draw_work(material, 0, [0, 1, 2]).targets.any()
    assert draw_work(filled, 0, [0, 1, 2]).targets.flatten(1).any(dim=1).all()


# ---- networks that draw for themselves


def test_dropout_follows_from_the_step(tiny_dataset, tmp_path):
    config = build_config("segresnet", {**SMALL, "backbone": "segresnet", "image_size": 32, "data": tiny_dataset})
    material = prepare(config)
    losses = []
    for noise in (0, 7):
        learner = Learner(material.config, start_processes(material.config, tmp_path))
        losses.append([])
        for step in range(2):
            torch.rand(noise)  # the global generators play no part
            losses[-1].append(learner.step(draw_work(material, step, [0, 1, 2]), 1e-3))
    assert learner.draws
    assert losses[0] == losses[1]
