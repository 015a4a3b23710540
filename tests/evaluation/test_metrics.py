"""Values by hand under a drawing, parity with MONAI and medpy's formula, and what cropping must not do."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from cheaplunch.evaluation.metrics import (
    dice,
    hd95,
    image_diagonal,
    iou,
    label_pairs,
    mask_pair,
    nsd,
    surface_distances,
)


def drawing(text: str) -> tuple[np.ndarray, np.ndarray]:
    """'p' prediction, 't' truth, 'b' both, '.' neither; one line a row → (prediction, truth)."""
    grid = np.array([line.split() for line in text.strip().splitlines()])
    return np.isin(grid, ["p", "b"]), np.isin(grid, ["t", "b"])


# --- by hand --------------------------------------------------------------------------------------


def test_two_single_pixels():
    prediction, truth = drawing("""
        . . . . . .
        . p . . . .
        . . . . t .
        . . . . . .
    """)
    pair = mask_pair(prediction, truth, spacing_mm=(4.0, 1.0))
    # One row and three columns apart: √(4² + 3²) = 5 mm. The image is 4 rows of 4 mm and 6 columns of 1 mm.
    assert (dice(pair), iou(pair)) == (0, 0)
    assert hd95(surface_distances(pair)) == 5
    assert hd95(surface_distances(pair), "pooled") == 5
    assert nsd(surface_distances(pair), 4.9) == 0
    assert nsd(surface_distances(pair), 5.0) == 1
    assert image_diagonal(pair) == math.sqrt(16**2 + 6**2)


def test_squares_shifted_by_one_column():
    prediction, truth = drawing("""
        p b b t
        p b b t
        p b b t
    """)
    pair = mask_pair(prediction, truth, spacing_mm=(1.0, 2.0))
    # 9 pixels each, 6 shared; each boundary is the square without its centre, 8 pixels. Of the prediction's,
    # the 3 in p are 2 mm from the truth's; (1, 2) is the truth's centre, 1 mm from its boundary at (0, 2);
    # the other 4 are boundary of both. The same back, mirrored.
    distances = surface_distances(pair)
    assert sorted(distances.pred_to_truth) == [0, 0, 0, 0, 1, 2, 2, 2]
    assert sorted(distances.truth_to_pred) == [0, 0, 0, 0, 1, 2, 2, 2]
    assert dice(pair) == 2 * 6 / 18
    assert iou(pair) == 6 / 12
    assert hd95(distances) == 2
    assert [nsd(distances, tolerance) for tolerance in (0, 1, 2)] == [8 / 16, 10 / 16, 1]


def test_trap_6_pooled_hides_what_max_directed_shows():
    prediction, truth = drawing("""
        b b b b b b b b b b b b b b b b b b b
        t . . . . . . . . . . . . . . . . . .
        t . . . . . . . . . . . . . . . . . .
    """)
    pair = mask_pair(prediction, truth, spacing_mm=(10.0, 10.0))
    # Prediction → truth: 19 zeros. Truth → prediction: 19 zeros, 10 and 20 mm. Directed back: rank 0.95 · 20
    # = 19 of the sorted 21, the 10. Pooled: rank 0.95 · 39 = 37.05 of the sorted 40: zeros end at rank 37, 10
    # at 38: 0.05 · 10.
    distances = surface_distances(pair)
    assert hd95(distances, "max-directed") == pytest.approx(10)
    assert hd95(distances, "pooled") == pytest.approx(0.5)


def test_cube_boundary_is_six_connected_and_the_image_border_is_outside():
    cube = np.ones((3, 3, 3), bool)
    centre = np.zeros_like(cube)
    centre[1, 1, 1] = True
    # 26 of 27 voxels are boundary: 6 faces at 1, 12 edges at √2, 8 corners at √3 from the centre.
    there = surface_distances(mask_pair(cube, centre, (1.0, 1.0, 1.0))).pred_to_truth
    assert sorted(there) == pytest.approx([1] * 6 + [math.sqrt(2)] * 12 + [math.sqrt(3)] * 8)


def test_a_distance_equal_to_the_tolerance_is_within_it_despite_rounding():
    prediction, truth = np.zeros((2, 1, 20), bool)
    prediction[0, 7], truth[0, 12] = True, True
    prediction[0, 0] = truth[0, 0] = True  # box from column 0: 12 · 0.4 − 7 · 0.4 is more than 2
    assert nsd(surface_distances(mask_pair(prediction, truth, (0.4, 0.4))), 2.0) == 1


# --- empties --------------------------------------------------------------------------------------

EMPTY, FULL = np.zeros((4, 5), bool), np.ones((4, 5), bool)


def test_both_empty_is_nan_throughout():
    pair = mask_pair(EMPTY, EMPTY, (1.0, 1.0))
    distances = surface_distances(pair)
    figures = [dice(pair), iou(pair), hd95(distances), hd95(distances, "pooled"), nsd(distances, 2)]
    assert all(math.isnan(figure) for figure in figures)


@pytest.mark.parametrize("masks", [(EMPTY, FULL), (FULL, EMPTY)], ids=["missed", "invented"])
def test_one_empty_has_no_overlap_and_no_distance(masks):
    pair = mask_pair(*masks, (1.0, 1.0))
    distances = surface_distances(pair)
    assert (dice(pair), iou(pair), nsd(distances, 2)) == (0, 0, 0)
    assert math.isnan(hd95(distances))
    assert math.isnan(hd95(distances, "pooled"))


# --- parity ---------------------------------------------------------------------------------------


def blobs(rng: np.random.Generator, shape: tuple[int, ...], threshold: float) -> np.ndarray:
    return ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) > threshold


def adversarial_pairs():
    rng = np.random.default_rng(7)
    for i, spacing in enumerate([(1.0, 1.0), (0.4, 3.7), (1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.5, 1.5, 9.0)]):
        shape = (40, 33) if len(spacing) == 2 else (12, 21, 17)
        one, corner, other = (np.zeros(shape, bool) for _ in range(3))
        one[tuple(n // 2 for n in shape)] = True
        corner[(0,) * len(shape)] = True
        other[(-1,) * len(shape)] = True
        band = np.zeros(shape, bool)
        band[2:5] = True  # touches every border but two
        a, b = blobs(rng, shape, 0.05), blobs(rng, shape, 0.12)  # many components, cut by the border
        close = ndimage.binary_dilation(a) & ~corner
        pairs = {"blobs": (a, b), "close": (a, close), "equal": (a, a), "one-vs-blobs": (one, b)}
        pairs |= {
            "corners": (corner, other),
            "band-vs-blobs": (band, a),
            "one-vs-all": (one, np.ones(shape, bool)),
        }
        for name, pair in pairs.items():
            yield pytest.param(*pair, spacing, id=f"{name}-{len(spacing)}d-{i}")


@pytest.mark.parametrize(("prediction", "truth", "spacing"), list(adversarial_pairs()))
def test_agrees_with_monai(prediction, truth, spacing):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    pred_1, truth_1 = (torch.from_numpy(mask[None, None]) for mask in (prediction, truth))
    tolerance_mm = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their_hd95 = monai.compute_hausdorff_distance(
            pred_1, truth_1, include_background=True, percentile=95, spacing=spacing
        ).item()
        their_nsd = monai.compute_surface_dice(
            pred_1, truth_1, [tolerance_mm], include_background=True, spacing=spacing
        ).item()
        their_dice = monai.compute_dice(pred_1, truth_1).item()
    pair = mask_pair(prediction, truth, spacing)
    distances = surface_distances(pair)
    # MONAI's figures are float32, so 1e-6 is of the value.
    assert hd95(distances) == pytest.approx(their_hd95, rel=1e-6, abs=1e-6)
    assert nsd(distances, tolerance_mm) == pytest.approx(their_nsd, abs=1e-6)
    assert dice(pair) == pytest.approx(their_dice, abs=1e-7)


def medpy_distances(result, reference, spacing):
    """medpy's `__surface_distances`, written from its formula: a distance transform over the whole image."""
    cross = ndimage.generate_binary_structure(result.ndim, 1)
    result_border = result ^ ndimage.binary_erosion(result, structure=cross)
    reference_border = reference ^ ndimage.binary_erosion(reference, structure=cross)
    return ndimage.distance_transform_edt(~reference_border, sampling=spacing)[result_border]


@pytest.mark.parametrize(("prediction", "truth", "spacing"), list(adversarial_pairs()))
def test_agrees_with_medpys_formula(prediction, truth, spacing):
    there, back = medpy_distances(prediction, truth, spacing), medpy_distances(truth, prediction, spacing)
    pair = mask_pair(prediction, truth, spacing)
    ours = surface_distances(pair)
    np.testing.assert_allclose(ours.pred_to_truth, there, atol=1e-9)
    np.testing.assert_allclose(ours.truth_to_pred, back, atol=1e-9)
    assert hd95(ours, "pooled") == pytest.approx(np.percentile(np.hstack((there, back)), 95), abs=1e-6)
    shared, total = (prediction & truth).sum(), prediction.sum() + truth.sum()
    assert dice(pair) == pytest.approx(2 * shared / total, abs=1e-9)
    assert iou(pair) == pytest.approx(shared / (total - shared), abs=1e-9)


# --- properties -----------------------------------------------------------------------------------

two_masks = hnp.array_shapes(min_dims=2, max_dims=3, max_side=6).flatmap(
    lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape))
)


def figures(prediction, truth):
    pair = mask_pair(prediction, truth, (2.0, 0.7, 1.1)[: truth.ndim])
    distances = surface_distances(pair)
    return [dice(pair), iou(pair), hd95(distances), hd95(distances, "pooled"), nsd(distances, 1.1)]


@settings(max_examples=60, deadline=None)
@given(two_masks, st.integers(1, 4), st.integers(0, 4))
def test_background_around_the_masks_changes_nothing(masks, before, after):
    padded = [np.pad(mask, (before, after)) for mask in masks]
    np.testing.assert_array_equal(figures(*masks), figures(*padded))


@settings(max_examples=60, deadline=None)
@given(two_masks)
def test_swapping_prediction_and_truth_changes_nothing(masks):
    np.testing.assert_array_equal(figures(*masks), figures(*masks[::-1]))


# --- label maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64, ">i2"])
def test_label_pairs_are_the_masks_of_each_class(dtype):
    prediction = np.array([[1, 1, 0, 0], [0, 3, 3, 9]], dtype)
    truth = np.array([[1, 0, 0, 0], [0, 0, 3, 3]], dtype)
    pairs = label_pairs(prediction, truth, {"liver": 1, "absent": 2, "kidney": 3}, (1.0, 1.0))
    assert {name: pair.prediction.tolist() for name, pair in pairs.items()} == {
        "liver": [[True, True]],
        "absent": [],
        "kidney": [[True, True, False]],
    }
    assert pairs["kidney"].truth.tolist() == [[False, True, True]]
    assert [pair.image_shape for pair in pairs.values()] == [(2, 4)] * 3


LABELS = np.zeros((3, 4), np.uint8)


@pytest.mark.parametrize(
    ("prediction", "truth", "labels", "spacing", "says"),
    [
        (LABELS, LABELS.T, {"a": 1}, (1.0, 1.0), "differ in shape"),
        (LABELS.astype(float), LABELS, {"a": 1}, (1.0, 1.0), "holds integers"),
        (LABELS[0], LABELS[0], {"a": 1}, (1.0,), "two or three axes"),
        (LABELS, LABELS, {"a": 1}, (1.0, 1.0, 1.0), "spacing"),
        (LABELS, LABELS, {"a": 1}, (1.0, 0.0), "spacing"),
        (LABELS, LABELS, {"a": 1}, (1.0, math.nan), "spacing"),
        (LABELS, LABELS, {"background": 0}, (1.0, 1.0), "count from 1"),
    ],
)
def test_bad_input_is_refused(prediction, truth, labels, spacing, says):
    with pytest.raises(ValueError, match=says):
        label_pairs(prediction, truth, labels, spacing)


def test_unknown_definition_is_refused():
    with pytest.raises(ValueError, match="definition"):
        hd95(surface_distances(mask_pair(FULL, FULL, (1.0, 1.0))), "mean")
