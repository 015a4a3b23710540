"""Geometry and merging with a network that can be read, then the real one."""

import numpy as np
import pytest
import torch

from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.slices import Frame, as_rgb
from cheaplunch.prediction import Predictor, merge_classes, segment_with_oracle
from cheaplunch.prompts import Prompts


class LikeThePoint(torch.nn.Module):
    """Says of every pixel whether it has the grey step (0.1, 0.5, 0.9) of the one that the prompt points at.

    A pixel enlarged fourfold keeps at least (7/8)² of its own grey at the middle: enough for its step.
    """

    image_size_px = 64

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
