"""Values by hand under a drawing, parity with medpy, MONAI and surface-distance, and what cropping must not do."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from cheaplunch.evaluation.metrics import (
    asd,
    dice,
    element_distances,
    hd95,
    image_diagonal,
    iou,
    label_pairs,
    mask_pair,
    nsd,
    surface_distances,
    volume_error,
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
    assert asd(distances) == 14 / 16
    assert volume_error(pair) == 0


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


def test_volume_error_has_the_sign_of_the_prediction():
    prediction, truth = drawing("""
        b b b p
        b p p p
    """)
    assert volume_error(mask_pair(prediction, truth, (1.0, 1.0))) == (8 - 4) / 4
    assert volume_error(mask_pair(truth, prediction, (1.0, 1.0))) == (4 - 8) / 8


def test_elements_of_one_pixel_beside_a_pixel():
    prediction, truth = drawing("""
        p t
    """)
    # Around a pixel four cells hold one corner each: lines of √(3² + 4²) / 2 = 2.5 mm. Two of four are shared; the
    # other two lie one pixel, 4 mm, off the nearest.
    distances = element_distances(mask_pair(prediction, truth, (3.0, 4.0)))
    assert distances.pred_sizes is not None
    assert distances.pred_sizes.tolist() == [2.5] * 4
    assert sorted(distances.pred_to_truth) == [0, 0, 4, 4]
    assert asd(distances) == 2
    assert nsd(distances, 3.9) == 0.5
    assert hd95(distances, "surface") == 4


def test_elements_of_a_block_have_its_surface():
    # 4 × 5 × 6 voxels of 1 × 2 × 3 mm. The mesh cuts edges and corners off: a face has (n − 1)(m − 1) whole cells, an
    # edge n − 1 slanted ones that join the middles of two sides, a corner is a triangle.
    block = mask_pair(np.ones((4, 5, 6), bool), np.ones((4, 5, 6), bool), (1.0, 2.0, 3.0))
    faces = 2 * (3 * 4 * 2 + 3 * 5 * 3 + 4 * 5 * 6)
    edges = 4 * (3 * math.hypot(2, 3) / 2 + 4 * 2 * math.hypot(1, 3) / 2 + 5 * 3 * math.hypot(1, 2) / 2)
    corners = 8 * math.sqrt(2**2 + 3**2 + 6**2) / 8
    sizes = element_distances(block).pred_sizes
    assert sizes is not None
    assert sizes.sum() == pytest.approx(faces + edges + corners)


# --- empties --------------------------------------------------------------------------------------

EMPTY, FULL = np.zeros((4, 5), bool), np.ones((4, 5), bool)


@pytest.mark.parametrize("measure", [surface_distances, element_distances])
def test_both_empty_is_nan_throughout(measure):
    pair = mask_pair(EMPTY, EMPTY, (1.0, 1.0))
    distances = measure(pair)
    figures = [dice(pair), iou(pair), volume_error(pair), hd95(distances), hd95(distances, "pooled")]
    assert all(math.isnan(figure) for figure in [*figures, asd(distances), nsd(distances, 2)])


@pytest.mark.parametrize("measure", [surface_distances, element_distances])
@pytest.mark.parametrize("masks", [(EMPTY, FULL), (FULL, EMPTY)], ids=["missed", "invented"])
def test_one_empty_has_no_overlap_and_no_distance(masks, measure):
    pair = mask_pair(*masks, (1.0, 1.0))
    distances = measure(pair)
    assert (dice(pair), iou(pair), nsd(distances, 2)) == (0, 0, 0)
    assert math.isnan(asd(distances))
    assert math.isnan(hd95(distances))
    assert math.isnan(hd95(distances, "pooled"))


def test_a_missed_volume_is_all_missing_and_an_invented_one_has_no_share():
    assert volume_error(mask_pair(EMPTY, FULL, (1.0, 1.0))) == -1
    assert math.isnan(volume_error(mask_pair(FULL, EMPTY, (1.0, 1.0))))


# --- parity ---------------------------------------------------------------------------------------

TOLERANCE_MM = 2.0


def blobs(rng: np.random.Generator, shape: tuple[int, ...], threshold: float) -> np.ndarray:
    """Smooth noise above a threshold: many components, cut by the border."""
    return ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) > threshold


def pairs_of(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    one, corner, other, band = (np.zeros(shape, bool) for _ in range(4))
    one[tuple(n // 2 for n in shape)] = True
    corner[(0,) * len(shape)] = True
    other[(-1,) * len(shape)] = True
    band[2:5] = True  # touches every border but two
    a, b, few = blobs(rng, shape, 0.05), blobs(rng, shape, 0.12), blobs(rng, shape, 0.4)
    dots, dense = rng.random((2, *shape)) < np.array([0.03, 0.6]).reshape(2, *[1] * len(shape))
    return {
        "blobs": (a, b),
        "few-vs-blobs": (few, a),
        "close": (a, ndimage.binary_dilation(a) & ~corner),
        "smaller": (ndimage.binary_erosion(a), a),
        "equal": (a, a),
        "one-vs-blobs": (one, b),
        "one-vs-all": (one, np.ones(shape, bool)),
        "corners": (corner, other),
        "band-vs-blobs": (band, a),
        "dots": (dots, np.roll(dots, 1, axis=0)),
        "noise": (dots, dense),
        "missed": (np.zeros(shape, bool), a),
        "invented": (a, np.zeros(shape, bool)),
        "nothing": (np.zeros(shape, bool), np.zeros(shape, bool)),
        "whole": (np.ones(shape, bool), dense),
    }


SPACINGS_MM = [
    *[(1.0, 1.0), (0.4, 3.7), (5.0, 0.7), (2.0, 2.0), (0.31, 0.29)],
    *[(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.5, 1.5, 9.0), (3.0, 3.0, 2.0), (0.9, 1.1, 1.3)],
]
SHAPES = {2: [(40, 33), (17, 60)], 3: [(12, 21, 17), (7, 9, 26)]}
PARITY = [
    pytest.param(np.random.default_rng([number, *shape]), shape, spacing, id=f"{spacing}-{shape}")
    for number, spacing in enumerate(SPACINGS_MM)
    for shape in SHAPES[len(spacing)]
]
# fifteen pairs of masks in each of twenty: 300


def each_pair(rng, shape, spacing):
    for name, (prediction, truth) in pairs_of(rng, shape).items():
        yield name, prediction, truth, mask_pair(prediction, truth, spacing)


@pytest.mark.parametrize(("rng", "shape", "spacing"), PARITY)
def test_agrees_with_medpy(rng, shape, spacing):
    medpy = pytest.importorskip("medpy.metric.binary")
    for name, prediction, truth, pair in each_pair(rng, shape, spacing):
        distances = surface_distances(pair)
        if not (prediction.any() and truth.any()):  # it refuses distances from nothing
            assert math.isnan(hd95(distances, "pooled")) and math.isnan(asd(distances)), name
            continue
        figures = [dice(pair), iou(pair), volume_error(pair)]
        theirs = [medpy.dc(prediction, truth), medpy.jc(prediction, truth), medpy.ravd(prediction, truth)]
        assert figures == pytest.approx(theirs, abs=1e-9), name
        lengths = [hd95(distances, "pooled"), asd(distances)]
        assert lengths == pytest.approx(
            [medpy.hd95(prediction, truth, spacing), medpy.assd(prediction, truth, spacing)], abs=1e-6
        ), name


@pytest.mark.parametrize(("rng", "shape", "spacing"), PARITY)
def test_agrees_with_monai(rng, shape, spacing):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    for name, prediction, truth, pair in each_pair(rng, shape, spacing):
        masks = [torch.from_numpy(mask[None, None]) for mask in (prediction, truth)]
        setting = {"include_background": True, "spacing": spacing}
        distances = surface_distances(pair)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            overlaps = [
                monai.compute_dice(*masks, ignore_empty=True).item(),
                monai.compute_surface_dice(*masks, [TOLERANCE_MM], **setting).item(),
            ]
            whole = monai.compute_hausdorff_distance(*masks, percentile=95, **setting).item()
            average = monai.compute_average_surface_distance(*masks, symmetric=True, **setting).item()
            edges = (mask[0, 0] for mask in masks)
            _, found, _ = monai.utils.get_edge_surface_distance(*edges, spacing=list(spacing), symmetric=True)
        if truth.any():  # MONAI says nan where there is no truth, we where there is neither
            assert [dice(pair), nsd(distances, TOLERANCE_MM)] == pytest.approx(overlaps, abs=1e-6), name
        if prediction.any() and truth.any():
            # MONAI interpolates percentiles in float32, off by up to 1e-5; in float64 its own distances give ours.
            exact = max(np.percentile(directed.double().numpy(), 95) for directed in found)
            assert [hd95(distances), asd(distances)] == pytest.approx([exact, average], rel=1e-6, abs=1e-6), name
            assert hd95(distances) == pytest.approx(whole, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(("rng", "shape", "spacing"), PARITY)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_surface_distance(rng, shape, spacing):
    theirs = pytest.importorskip("surface_distance.metrics")
    for name, prediction, truth, pair in each_pair(rng, shape, spacing):
        if not (prediction.any() and truth.any()):  # it asks for np.Inf, which numpy 2 has not
            continue
        ours, found = element_distances(pair), theirs.compute_surface_distances(truth, prediction, spacing)
        assert ours.pred_sizes is not None and ours.truth_sizes is not None
        averages = theirs.compute_average_surface_distance(found)
        weights = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
        assert (ours.truth_sizes.sum(), ours.pred_sizes.sum()) == pytest.approx(weights, rel=1e-9), name
        figures = [hd95(ours, "surface"), nsd(ours, TOLERANCE_MM), asd(ours), dice(pair)]
        assert figures == pytest.approx(
            [
                theirs.compute_robust_hausdorff(found, 95),
                theirs.compute_surface_dice_at_tolerance(found, TOLERANCE_MM),
                np.average(averages, weights=weights),
                theirs.compute_dice_coefficient(truth, prediction),
            ],
            abs=1e-6,
        ), name


@pytest.mark.parametrize("spacing", [(0.7, 1.9), (0.7, 1.9, 2.3)])
def test_every_cell_has_surface_distances_size(spacing):
    """All masks of 2 × 2 (× 2) voxels: every way in which inside and outside can meet in a cell."""
    theirs = pytest.importorskip("surface_distance.lookup_tables")
    axes = len(spacing)
    table = {
        2: theirs.create_table_neighbour_code_to_contour_length,
        3: theirs.create_table_neighbour_code_to_surface_area,
    }
    kernel = {2: theirs.ENCODE_NEIGHBOURHOOD_2D_KERNEL, 3: theirs.ENCODE_NEIGHBOURHOOD_3D_KERNEL}[axes]
    expected = table[axes](np.array(spacing))
    for code in range(2**2**axes - 1):
        mask = code & kernel > 0
        # The 3 × 3 (× 3) cells of the mask: the middle one is `code`, the others see only one face, edge or corner.
        padded = np.pad(mask, 1)
        cells = np.lib.stride_tricks.sliding_window_view(padded, (2,) * axes).reshape(-1, *mask.shape)
        around = (cells * kernel).reshape(len(cells), -1).sum(axis=1)
        sizes = element_distances(mask_pair(mask, mask, spacing)).pred_sizes
        assert sizes is not None
        assert sizes.sum() == pytest.approx(expected[around].sum(), rel=1e-9), code


# --- properties -----------------------------------------------------------------------------------

two_masks = hnp.array_shapes(min_dims=2, max_dims=3, max_side=6).flatmap(
    lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape))
)


def figures(prediction, truth):
    pair = mask_pair(prediction, truth, (2.0, 0.7, 1.1)[: truth.ndim])
    distances = surface_distances(pair)
    elements = element_distances(pair)
    overlaps = [dice(pair), iou(pair), nsd(distances, 1.1), nsd(elements, 1.1)]
    return [*overlaps, hd95(distances), hd95(distances, "pooled"), hd95(elements, "surface"), asd(distances)]


@settings(max_examples=60, deadline=None)
@given(two_masks, st.integers(1, 4), st.integers(0, 4))
def test_background_around_the_masks_changes_nothing(masks, before, after):
    padded = [np.pad(mask, (before, after)) for mask in masks]
    np.testing.assert_array_equal(figures(*masks), figures(*padded))


@settings(max_examples=60, deadline=None)
@given(two_masks)
def test_swapping_prediction_and_truth_changes_nothing(masks):
    # Sums over a surface are taken in another order.
    np.testing.assert_allclose(figures(*masks), figures(*masks[::-1]), rtol=1e-12)


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


def test_a_region_joins_labels():
    prediction = np.array([[1, 3, 0, 2]], np.uint8)
    truth = np.array([[0, 1, 3, 2]], np.uint8)
    regions = {"whole": (1, 2, 3), "core": (1, 3), "nowhere": (4, 5)}
    pairs = label_pairs(prediction, truth, regions, (1.0, 1.0))
    assert dice(pairs["whole"]) == 2 * 2 / 6
    assert pairs["core"].prediction.tolist() == [[True, True, False]]
    assert pairs["core"].truth.tolist() == [[False, True, True]]
    assert pairs["nowhere"].truth.size == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_ignored_voxels_are_in_neither_mask(dtype):
    prediction = np.array([[1, 1, 1, 0]], dtype)
    truth = np.array([[1, 255 if dtype != np.uint8 else 9, 0, 1]], dtype)
    ignore = int(truth[0, 1])
    pair = label_pairs(prediction, truth, {"a": 1}, (1.0, 1.0), ignore=ignore)["a"]
    assert pair.prediction.tolist() == [[True, False, True, False]]
    assert pair.truth.tolist() == [[True, False, False, True]]
    with pytest.raises(ValueError, match="ignored"):
        label_pairs(prediction, truth, {"a": (1, ignore)}, (1.0, 1.0), ignore=ignore)


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
        (LABELS, LABELS, {"background too": (0, 1)}, (1.0, 1.0), "count from 1"),
        (LABELS, LABELS, {"empty region": ()}, (1.0, 1.0), "count from 1"),
    ],
)
def test_bad_input_is_refused(prediction, truth, labels, spacing, says):
    with pytest.raises(ValueError, match=says):
        label_pairs(prediction, truth, labels, spacing)


def test_unknown_definition_is_refused():
    distances = surface_distances(mask_pair(FULL, FULL, (1.0, 1.0)))
    with pytest.raises(ValueError, match="definition"):
        hd95(distances, "mean")
    with pytest.raises(ValueError, match="element_distances"):
        hd95(distances, "surface")
