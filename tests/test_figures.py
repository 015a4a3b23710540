"""Pictures hold what they say: exemplars in the first column, the truth's outline, the slice that tells most."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cheaplunch import figures
from cheaplunch.synthesis import Batch, Pool


def pixels(png) -> np.ndarray:
    """(H, W, 3) uint8 of a file or of bytes."""
    source = io.BytesIO(png) if isinstance(png, bytes) else png
    return np.asarray(Image.open(source).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_has_exemplars_in_the_first_column_and_labels_beneath(tmp_path, channels):
    labels = torch.full((4, 16, 16), 2, dtype=torch.uint8)
    size = torch.tensor([[16, 16]])
    pool = Pool(torch.full((1, channels, 16, 16), 0.8), labels[:1], torch.zeros(1, channels, 16, 16), size, size, 2)
    samples = Batch(torch.full((4, channels, 16, 16), 0.4), torch.ones_like(labels), torch.full((4, 2), 16))
    figures.synthesis_sheet(pool, samples, ["liver", "_a $spleen$"], tmp_path / "sheet.png")

    sheet = pixels(tmp_path / "sheet.png")
    width = sheet.shape[1]
    inch = figures.DPI
    assert abs(width - (5 + 0.36) * inch) < 2  # five columns of one inch and three margins
    left, right = int(0.6 * inch), int(3 * inch)  # inside the exemplar's tile, and the samples'
    image_row, label_row = int((0.34 + 0.4) * inch), int((0.34 + 1.4) * inch)
    orange, blue = (figures.class_colours(2) * 255).round()
    assert np.allclose(sheet[image_row, left], 0.8 * 255, atol=2)
    assert np.allclose(sheet[image_row, right], 0.4 * 255, atol=2)
    assert np.allclose(sheet[label_row, left], blue, atol=2)
    assert np.allclose(sheet[label_row, right], orange, atol=2)


def test_sheet_leaves_padding_out():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 1:5, 2:3] = 0.5
    assert figures._occupied(image, torch.zeros(2, 1, 8, 8)) == (5, 3)
    assert figures._occupied(torch.zeros(1, 1, 8, 8)) == (8, 8)


def test_overlay_tints_by_class_and_only_where_the_label_is():
    image, label = np.full((1, 20, 20), 0.5, np.float32), np.zeros((20, 20), np.uint8)
    label[:, 10:] = 7  # reaches the border
    panels = pixels(figures.case_overlays(image, label, np.zeros_like(label), {"liver": 3, "spleen": 7}))
    row = panels[panels.shape[0] // 2]
    third = len(row) // 3
    tint = (0.65 * 0.5 + 0.35 * figures.class_colours(2)[1]) * 255
    for x in (third // 2, third + third // 4, 2 * third + third // 4, 2 * third + 3 * third // 4):
        assert np.allclose(row[x], 127.5, atol=2)  # the bare image, and the empty prediction
    assert np.allclose(row[third + 3 * third // 4], tint, atol=2)


def test_telling_slice_is_the_one_with_most_truth_or_else_most_prediction():
    truth, prediction = np.zeros((2, 3, 4, 4), np.uint8)
    prediction[0] = 1
    assert figures.telling_slice(truth, prediction) == 0
    truth[1, 0], truth[2, :2] = 5, 1  # four pixels, eight
    assert figures.telling_slice(truth, prediction) == 2


def test_richest_slice_has_the_most_classes_and_then_the_most_of_them():
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[0] = 1
    truth[1, 0, :2] = truth[2, 0, :3] = truth[3, 0, :2] = 1
    truth[1, 1, 0] = truth[2, 1, 0] = 2
    assert figures.richest_slice(truth) == 2
    assert figures.richest_slice(np.zeros_like(truth)) == 0


def test_running_mean_of_a_constant_is_that_constant_to_the_ends():
    assert np.allclose(figures.smooth(np.full(100, 3.0)), 3.0)
    spike = figures.smooth(np.eye(1, 60, 30)[0])  # window 2 · 3 + 1
    assert np.allclose(spike[27:34], 1 / 7)
    assert not spike[:27].any()
    assert not spike[34:].any()


def test_curves_take_the_last_word_on_a_step_and_the_pages_ink():
    records = [{"step": step, "loss": loss, "learning_rate": 1e-3} for step, loss in ((1, 9.0), (2, 1.0), (1, 2.0))]
    curves = figures.training_curves(records)
    assert list(curves) == ["loss", "learning rate"]
    assert 'aria-label="loss over 2 steps, from 2 to 1"' in curves["loss"]
    assert "currentColor" in curves["loss"]
    assert "nan" not in curves["loss"].lower()
    assert curves == figures.training_curves(records)


def test_more_classes_than_colours_still_differ():
    assert len(np.unique(figures.class_colours(24).round(3), axis=0)) == 24
