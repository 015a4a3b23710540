"""Geometry and merging with a network that can be read, then the real one."""

import numpy as np
import pytest
import torch

from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.slices import Frame, as_rgb
from cheaplunch.merging import Segmentation, merge_classes, smooth_across, smooth_scores
from cheaplunch.prediction import Predictor, carry_click, segment_draws, segment_with_oracle
from cheaplunch.prompting import Prompting
from cheaplunch.prompts import Prompts, next_click, random_point


class LikeThePoint(torch.nn.Module):
    """Says of every pixel whether it has the grey step (0.1, 0.5, 0.9) of the one that the prompt points at.

    A pixel enlarged fourfold keeps at least (7/8)² of its own grey at the middle: enough for its step.
    """

    image_size_px = 64
    slab_slices = 1

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.encoded = 0

    def embed(self, images, shown_px=None):
        self.encoded += len(images)
        return ((images[:, :1] - 0.1) / 0.4).round()  # (B, 1, 64, 64): 0, 1 or 2

    def foreground(self, embeddings, prompts):
        if prompts.boxes_xyxy is not None:  # the box's middle
            corners = prompts.boxes_xyxy.unflatten(-1, (2, 2))
            points = corners.mean(dim=-2)
        else:
            points = prompts.points_xy[:, :, 0]
        x, y = points[0].round().long().unbind(-1)  # (P,)
        pointed = embeddings[0, 0, y, x][:, None, None]
        return torch.where(embeddings[0] == pointed, 9.0, -9.0)[None]  # (1, P, S, S)


class Bright(LikeThePoint):
    """As its parent, but a point on the dark ground finds nothing."""

    def foreground(self, embeddings, prompts):
        x, y = prompts.points_xy[0, :, 0].round().long().unbind(-1)
        dark = embeddings[0, 0, y, x] == 0  # (P,)
        return torch.where(dark[:, None, None], -9.0, super().foreground(embeddings, prompts)[0])[None]


def case_of(labels: np.ndarray) -> CaseSlices:
    """Slices whose grey says the label: 0.1, 0.5, 0.9 for 0, 1, 2."""
    grey = np.array([0.1, 0.5, 0.9], np.float32)[labels][:, None]
    return CaseSlices(grey, labels.astype(np.uint8), volume=None)


# ---- merging by hand


def test_the_likelier_class_wins_and_a_half_is_not_enough():
    probabilities = np.array(
        [
            [[0.9, 0.6, 0.5], [0.2, 0.51, 0.7]],  # class 4
            [[0.1, 0.8, 0.5], [0.4, 0.10, 0.7]],  # class 2
        ]
    )
    label = merge_classes(probabilities, [4, 2])
    assert label.tolist() == [[4, 2, 0], [0, 4, 4]]  # at the tie the one prompted first
    assert label.dtype == np.uint8


# ---- a whole case


@pytest.mark.parametrize("kind", ["furthest", "random", "box"])
@pytest.mark.parametrize("shape", [(16, 11), (9, 16)])
def test_a_case_comes_back_on_its_own_pixels(kind, shape):
    labels = np.zeros((7, *shape), int)
    labels[1, 2:6, 1:4] = 1
    labels[1, 6:9, 5:8] = 2
    labels[2, 0:3, 7:10] = 2
    labels[3:6, 4:8, 2:9] = 1
    predictor = Predictor(LikeThePoint())
    predicted = segment_with_oracle(predictor, case_of(labels), kind, np.random.default_rng(0))
    assert predicted.shape == labels.shape
    assert predicted.dtype == np.uint8
    np.testing.assert_array_equal(predicted, labels)
    assert predictor.segmenter.encoded == 5  # each slice with foreground once, and no other


def test_the_dataset_s_own_numbers_come_back():
    case = case_of(np.pad(np.array([[[1, 1, 0, 2, 2]]]), ((0, 0), (1, 1), (1, 1))))
    numbered = CaseSlices(case.image, np.array([0, 7, 205], np.uint8)[case.label], volume=None)
    predicted = segment_with_oracle(Predictor(LikeThePoint()), numbered, "furthest", np.random.default_rng(0))
    assert set(np.unique(predicted)) == {0, 7, 205}


def test_slices_without_foreground_stay_empty_whatever_the_network_would_say():
    class Everything(LikeThePoint):
        def foreground(self, embeddings, prompts):
            return torch.full((1, 1, 16, 16), 9.0)

    labels = np.zeros((4, 8, 8), int)
    labels[2, 3, 3] = 1
    predicted = segment_with_oracle(Predictor(Everything()), case_of(labels), "furthest", np.random.default_rng(0))
    assert (predicted[2] == 1).all()
    assert not predicted[[0, 1, 3]].any()


def test_a_case_without_foreground():
    predicted = segment_with_oracle(
        Predictor(LikeThePoint()), case_of(np.zeros((2, 8, 8), int)), "box", np.random.default_rng(0)
    )
    assert not predicted.any()


def test_without_truth_there_is_no_oracle():
    case = CaseSlices(np.zeros((1, 1, 8, 8), np.float32), None, volume=None)
    with pytest.raises(ValueError, match="label"):
        segment_with_oracle(Predictor(LikeThePoint()), case, "box", np.random.default_rng(0))


def test_draws_share_the_embeddings_and_keep_probabilities_of_each_class():
    labels = np.zeros((6, 12, 12), int)
    labels[1:5, 1:5, 1:5] = 1
    labels[2, 6:11, 6:11] = 2
    predictor = Predictor(LikeThePoint())
    seeds = [np.random.default_rng(seed) for seed in (4, 5)]
    drawn = segment_draws(predictor, case_of(labels), Prompting("random"), seeds, keep=[2, 1])
    assert predictor.segmenter.encoded == 4
    for segmentation in drawn:
        assert list(segmentation.labels) == [1]
        np.testing.assert_array_equal(segmentation.label, labels)
        assert segmentation.probabilities.dtype == np.float16
        np.testing.assert_array_equal(segmentation.probabilities > 0.5, [labels == 2, labels == 1])


def test_undecided_pixels_are_no_error_to_click_on():
    class Memory(LikeThePoint):
        """Finds all that is bright, and remembers how many points each question had."""

        def foreground(self, embeddings, prompts):
            asked.append(prompts.points_xy.shape[2])
            return torch.where(embeddings > 0, 9.0, -9.0)

    labels = np.zeros((1, 12, 12), int)
    labels[0, 1:5, 1:5], labels[0, 6:10, 6:10] = 1, 2
    for ignore, expected in ((labels == 2, [1]), (None, [1, 2, 3])):
        asked: list[int] = []
        case = CaseSlices(case_of(labels).image, (labels == 1).astype(np.uint8), volume=None, ignore=ignore)
        segment_draws(Predictor(Memory()), case, Prompting("clicks", clicks=3), [np.random.default_rng(0)])
        assert asked == expected


# ---- one click a volume


def two_balls() -> np.ndarray:
    """(16, 24, 24): class 1 of radius 3 about slice 5, class 2 of radius 4 about slice 8, without their tips."""
    z, y, x = np.mgrid[:16, :24, :24]
    first = ((z - 5) ** 2 + (y - 6) ** 2 + (x - 7) ** 2 <= 9.5) & (abs(z - 5) < 3)
    second = ((z - 8) ** 2 + (y - 15) ** 2 + (x - 14) ** 2 <= 16.5) & (abs(z - 8) < 4)
    return np.where(first, 1, np.where(second, 2, 0))


def test_one_click_finds_a_ball_on_every_slice_and_ends_with_it():
    labels = two_balls()
    predictor = Predictor(Bright())
    found = carry_click(predictor, case_of(labels), np.random.default_rng(0), keep=[1, 2])
    np.testing.assert_array_equal(found.label, labels)
    np.testing.assert_array_equal(found.probabilities > 0.5, [labels == 1, labels == 2])
    # The balls lie on slices 3 to 11; 2 and 12 are asked and found empty, and nothing beyond. Each slice once.
    assert predictor.segmenter.encoded == 11


def test_one_click_uses_no_more_truth_than_its_slices():
    labels = two_balls()
    case = case_of(labels)
    only_there = np.zeros_like(labels)
    for number, home in ((1, 5), (2, 8)):  # where each is largest
        only_there[home][labels[home] == number] = number
    forgetful = CaseSlices(case.image, only_there.astype(np.uint8), volume=None)
    found = carry_click(Predictor(Bright()), forgetful, np.random.default_rng(0))
    np.testing.assert_array_equal(found.label, labels)


def test_one_click_does_not_jump_a_gap_nor_go_on_from_a_speck():
    labels = np.zeros((10, 16, 16), int)
    labels[1, 2:12, 2:12] = labels[3, 2:12, 2:12] = labels[4, 2:12, 2:12] = 1  # slice 2 is empty; 3 is home
    labels[5, 2:12, 5:10] = 1  # ever smaller, each at least 0.4 of the one before
    labels[6, 4:9, 5:10] = 1
    labels[7, 5:7, 5:10] = 1
    labels[8, 5:7, 5:7] = labels[9, 5:7, 5:7] = 1  # 4 pixels, less than 5 % of home's 101
    labels[3, 1, 2] = 1
    found = carry_click(Predictor(Bright()), case_of(labels), np.random.default_rng(0))
    expected = labels.copy()
    expected[[1, 9]] = 0
    np.testing.assert_array_equal(found.label, expected)


def test_one_click_ends_where_masks_hardly_overlap():
    labels = np.zeros((5, 12, 14), int)
    labels[0, 2:10, 2:10] = 1  # home
    labels[1:3, 2:9, 2:9] = 1
    labels[3, 2:9, 5:13] = labels[4, 2:9, 5:12] = 1  # holds the middle of the mask before, but 28 of 77 pixels: 0.36
    found = carry_click(Predictor(Bright()), case_of(labels), np.random.default_rng(0))
    np.testing.assert_array_equal(found.label[:3], labels[:3])
    assert not found.label[3:].any()
    labels[3] = labels[4]  # 28 of 70: 0.4
    found = carry_click(Predictor(Bright()), case_of(labels), np.random.default_rng(0))
    np.testing.assert_array_equal(found.label, labels)


def test_one_click_settles_overlaps_by_probability():
    class Greedy(LikeThePoint):
        """Class 2's points get all that is bright, with less confidence."""

        def foreground(self, embeddings, prompts):
            x, y = prompts.points_xy[0, :, 0].round().long().unbind(-1)
            second = (embeddings[0, 0, y, x] == 2)[:, None, None]
            return torch.where(second, (embeddings[0] > 0) * 2.0 - 1.0, super().foreground(embeddings, prompts)[0])[
                None
            ]

    labels = np.zeros((1, 12, 12), int)
    labels[0, 2:5, 2:5], labels[0, 6:11, 6:11] = 1, 2
    found = carry_click(Predictor(Greedy()), case_of(labels), np.random.default_rng(0), keep=[2])
    np.testing.assert_array_equal(found.label, labels)
    np.testing.assert_array_equal(found.probabilities[0] > 0.5, labels > 0)  # class 2 on its own


def test_one_click_on_a_case_without_foreground():
    found = carry_click(Predictor(Bright()), case_of(np.zeros((2, 8, 8), int)), np.random.default_rng(0))
    assert not found.label.any()


# ---- the real network


def test_embedding_once_and_prompting_often_is_the_direct_way(zero_shot):
    rng = np.random.default_rng(0)
    images = rng.random((5, 1, 24, 40), dtype=np.float32)  # more than are encoded at once
    boxes = torch.tensor([[[4.0, 3, 50, 30], [20, 10, 60, 36]]])  # (1, 2, 4)
    predictor, frame = Predictor(zero_shot), Frame(24, 40, 64)
    embedded = predictor.embed(images)
    assert len(embedded) == 5
    assert embedded[0].frame == frame
    first = predictor.probabilities(embedded[4], Prompts(boxes_xyxy=boxes))
    predictor.probabilities(embedded[0], Prompts(boxes_xyxy=boxes[:, :1]))
    assert np.array_equal(predictor.probabilities(embedded[4], Prompts(boxes_xyxy=boxes)), first)  # nothing is kept
    with torch.no_grad():
        direct = zero_shot(as_rgb(frame.to_model(torch.from_numpy(images[4:]))), Prompts(boxes_xyxy=boxes))
    expected = frame.from_model(direct[0, :, 0]).sigmoid().numpy()
    assert first.shape == (2, 24, 40)
    np.testing.assert_allclose(first, expected, atol=1e-4)
    assert first.max() > 0.5 > first.min()


def test_bf16_is_near(zero_shot):
    image = np.zeros((1, 1, 32, 32), np.float32)
    image[0, 0, 8:20, 10:24] = 0.8
    box = Prompts(boxes_xyxy=torch.tensor([[[20.0, 16, 47, 39]]]))
    exact, rough = (Predictor(zero_shot, precision) for precision in ("fp32", "bf16"))
    a, b = (p.probabilities(p.embed(image)[0], box) for p in (exact, rough))
    assert b.dtype == np.float32
    assert ((a > 0.5) == (b > 0.5)).mean() > 0.97


@pytest.mark.parametrize(("tuning", "mask_prompt"), [("none", True), ("lora", True), ("none", False)])
def test_clicks_are_one_user_and_the_network_in_turn(build, tuning, mask_prompt):
    """Two targets, four clicks, against the same written out; with one output and with two."""
    image = np.full((1, 1, 32, 40), 0.2, np.float32)
    image[0, 0, 4:14, 5:17], image[0, 0, 18:30, 20:36] = 0.8, 0.6
    label = np.zeros((1, 32, 40), np.uint8)
    label[0, 4:14, 5:17], label[0, 18:30, 20:36] = 3, 5
    predictor = Predictor(build(tuning=tuning))
    case = CaseSlices(image, label, volume=None)
    prompting = Prompting("clicks", clicks=4, mask_prompt=mask_prompt)
    [drawn] = segment_draws(predictor, case, prompting, [np.random.default_rng(1)], [3, 5])
    assert list(drawn.labels) == [1, 3, 4]

    [embedded], rng = predictor.embed(image), np.random.default_rng(1)
    targets = label == np.array([3, 5])[:, None, None]
    clicks = [[(*random_point(target, rng), 1)] for target in targets]
    before, probabilities = [None, None], np.zeros((4, 2, 32, 40), np.float32)
    for given in range(4):
        for k in range(2):  # one at a time, so that no prompt can lean on its neighbour
            xy = torch.tensor([[[click[:2] for click in clicks[k]]]])
            points, signs = embedded.frame.point_to_model(xy), torch.tensor([[[click[2] for click in clicks[k]]]])
            prompts = Prompts(points, signs, masks=before[k] if mask_prompt else None)
            with torch.no_grad():
                before[k] = predictor.segmenter.foreground(embedded.embedding, prompts)  # (1, 1, 64, 64)
            probabilities[given, k] = embedded.frame.from_model(before[k])[0, 0].sigmoid().numpy()
            clicks[k].append(next_click(probabilities[given, k] > 0.5, targets[k]))
    for given in (1, 3, 4):
        np.testing.assert_array_equal(drawn.labels[given][0], merge_classes(probabilities[given - 1], [3, 5]))
    np.testing.assert_allclose(drawn.probabilities[:, 0], probabilities[-1], atol=2e-3)  # float16
    assert not np.allclose(probabilities[0], probabilities[-1], atol=0.01)


def test_two_outputs_start_at_one_with_mask_prompts_too(build, zero_shot):
    embedding = zero_shot.embed(torch.rand(1, 3, 64, 64))
    prompts = Prompts(
        torch.tensor([[[[20.0, 30.0], [40.0, 12.0]]]]), torch.tensor([[[1, 0]]]), masks=4 * torch.randn(1, 1, 64, 64)
    )
    with torch.no_grad():
        one, two = zero_shot.foreground(embedding, prompts), build().foreground(embedding, prompts)
        blind = zero_shot.foreground(embedding, Prompts(prompts.points_xy, prompts.point_labels))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert (one - blind).abs().max() > 0.1  # the mask was heard


def test_slices_steady_each_other_within_three_standard_deviations():
    def logit(p):
        return np.log(p / (1 - p))

    one = {number: {7: np.full((1, 1), p)} for number, p in {0: 0.9, 1: 0.2, 2: 0.9, 9: 0.2}.items()}
    smoothed = dict(smooth_across(one, step_mm=1.0, smooth_mm=0.5))  # reaches one slice: exp(-2) = 0.135
    w = np.exp(-2)
    expected = (logit(0.2) + 2 * w * logit(0.9)) / (1 + 2 * w)
    assert logit(smoothed[1][7].item()) == pytest.approx(expected)
    assert logit(smoothed[0][7].item()) == pytest.approx((logit(0.9) + w * logit(0.2)) / (1 + w))
    assert smoothed[9][7].item() == pytest.approx(0.2)  # nobody near
    for step_mm, smooth_mm in ((2.0, 0.5), (None, 0.5), (1.0, 0.0)):  # too far, a picture, switched off
        assert dict(smooth_across(one, step_mm, smooth_mm)) == one


def test_only_slices_on_which_the_class_was_prompted_steady_it():
    found = {0: {1: np.array([[0.9]])}, 1: {2: np.array([[0.6]])}, 2: {1: np.array([[0.9]]), 2: np.array([[0.6]])}}
    smoothed = dict(smooth_across(found, 1.0, 0.4))
    assert smoothed[1].keys() == {2} and smoothed[1][2].item() == pytest.approx(0.6)
    assert smoothed[0].keys() == {1}
    label = Segmentation.of({1: found}, (3, 1, 1), keep=[1], step_mm=1.0, smooth_mm=0.4)
    assert label.label.ravel().tolist() == [1, 2, 1] and label.probabilities.shape == (1, 3, 1, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("step_mm", [0.4, 1.0, 9.0, None])
def test_all_slices_are_steadied_with_as_few_in_memory_as_are_averaged(count, step_mm):
    scores = np.log(np.random.default_rng(0).dirichlet(np.ones(3), (count, 2)).transpose(0, 2, 1))  # (N, 3, 2)
    alive = []

    def slices():
        for score in scores:
            alive.append(score)
            yield score

    reach = int(1.5 / step_mm) if step_mm and step_mm <= 1.5 else 0
    for number, steadied in enumerate(smooth_scores(slices(), step_mm, smooth_mm=0.5)):
        assert len(alive) == min(count, number + reach + 1)
        near = range(max(0, number - reach), min(count, number + reach + 1))
        weights = [np.exp(-0.5 * ((n - number) * (step_mm or 0) / 0.5) ** 2) for n in near]
        expected = np.average(np.maximum(scores[list(near)], np.log(1e-4)), axis=0, weights=weights)
        np.testing.assert_allclose(steadied, expected)
    assert number == count - 1
