from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from PIL import Image

from cheaplunch.data.cases import load_case
from cheaplunch.data.index import index_slices
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import (
    Frame,
    Places,
    Window,
    as_rgb,
    default_window,
    from_slices,
    in_plane_spacing,
    to_slices,
)
from cheaplunch.data.volume import Grid, read_volume, to_lps
from cheaplunch.errors import UserError

AXES = ("axial", "coronal", "sagittal")

# ---- intensities


def test_fixed_window():
    array = np.array([-200, -160, 40, 240, 900], np.float32).reshape(1, 1, 1, 5)
    np.testing.assert_allclose(Window(-160, 240)(array).ravel(), [0, 0, 0.5, 1, 1])


def test_percentiles_leave_out_the_air_and_take_each_channel_by_itself():
    tissue = np.arange(1, 102, dtype=np.float32)  # percentiles p are 1 + p
    channel = np.concatenate([np.zeros(99, np.float32), tissue]).reshape(1, 1, 200)
    out = Window(percentiles=(10, 60))(np.stack([channel, 10 * channel]))
    np.testing.assert_allclose(out[0, 0, 0, 99 + 35], (36 - 11) / 50)  # limits 11 and 61
    np.testing.assert_allclose(out[1], out[0], rtol=1e-5)
    assert out[0, 0, 0, 0] == 0 and out.max() == 1 and out.dtype == np.float32


def test_percentiles_keep_a_few_zeros():
    channel = np.arange(101, dtype=np.float32).reshape(1, 1, 1, 101)  # 1 in 101 is zero: under 1 %
    np.testing.assert_allclose(Window(percentiles=(0, 50))(channel).ravel()[:51], np.arange(51) / 50)


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_channel_becomes_zero(value):
    assert not Window()(np.full((1, 2, 2, 2), value, np.float32)).any()


def test_default_windows(folder, edit_json):
    assert default_window(open_dataset(folder)) == Window()
    edit_json(channel_names={"0": "CT"})
    assert default_window(open_dataset(folder)) == Window(-160, 240)


def test_as_rgb():
    image = np.arange(4)[:, None, None] * np.ones((4, 2, 2))
    for channels, expected in ((1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 2]), (4, [0, 1, 2])):
        assert as_rgb(image[:channels])[:, 0, 0].tolist() == expected
        assert as_rgb(torch.from_numpy(image[None, :channels]))[0, :, 0, 0].tolist() == expected


# ---- axes


@pytest.mark.parametrize("axis", AXES)
def test_slices_go_back(axis):
    array = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(from_slices(to_slices(array, axis), axis), array)
    np.testing.assert_array_equal(to_slices(array[None], axis)[:, 0], to_slices(array, axis))


def test_superior_is_on_top_and_spacing_follows(tmp_path, save_nifti):
    array = np.zeros((2, 3, 4))  # (Z, Y, X)
    array[1] = 1  # the upper slice
    assert to_slices(array, "coronal").shape == (3, 2, 4) and to_slices(array, "sagittal").shape == (4, 2, 3)
    assert (to_slices(array, "coronal")[:, 0] == 1).all() and (to_slices(array, "sagittal")[:, 0] == 1).all()

    path = save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 3, 2), np.float32), np.diag([1, 2, 3, 1]))
    volume = read_volume([path])  # x 1, y 2, z 3 mm
    assert [in_plane_spacing(volume, axis) for axis in AXES] == [(2, 1), (3, 1), (3, 2)]


# ---- places


def oblique(degrees: float = 20) -> np.ndarray:
    """RAS affine of 0.7 × 0.8 × 3 mm, turned about all three axes."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([0.7, 0.8, 3.0]), (31.5, -42.25, 110)
    return affine


SHAPE = (4, 3, 5)
AFFINES = {
    "RAS": np.diag([1.0, 2, 3, 1]),
    "LPS": np.array([[-0.7, 0, 0, 50], [0, -0.7, 0, 60], [0, 0, 4, -9], [0, 0, 0, 1.0]]),
    "PSR": np.array([[0, 0, 2, 5], [-1.5, 0, 0, 6], [0, 1.2, 0, 7], [0, 0, 0, 1.0]]),
    "oblique": oblique(),
    "oblique, flipped": oblique() @ np.diag([-1.0, 1, -1, 1]),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("named", AFFINES)
def test_pixels_of_slices_are_where_the_file_has_them(named, axis):
    affine = AFFINES[named]
    places = Places(Grid(Path("made up"), SHAPE, affine), axis)
    # A file whose voxels say their own (i, j, k), cut as every image is cut.
    said = np.stack([to_slices(to_lps(index, places.grid), axis) for index in np.indices(SHAPE)], -1)  # (N, H, W, 3)
    for number, row, column in np.ndindex(said.shape[:3]):
        voxel = said[number, row, column]
        np.testing.assert_allclose(places.off_slices(column, row, number, "voxel"), voxel, atol=1e-9)
        ras = apply_affine(affine, voxel)
        np.testing.assert_allclose(places.off_slices(column, row, number, "world_ras"), ras, atol=1e-9)
        for coordinates, place in (("voxel", voxel), ("world_ras", ras), ("world_lps", ras * (-1, -1, 1))):
            found = places.on_slices(place, coordinates)
            np.testing.assert_allclose(found, (column, row, number), atol=1e-9)
            np.testing.assert_allclose(places.off_slices(*found, coordinates), place, atol=1e-9)


def test_a_picture_has_columns_and_rows_and_no_patient():
    places = Places(Grid(Path("made up"), (7, 9)))
    assert places.on_slices((5, 2), "voxel") == (5, 2, 0)
    with pytest.raises(UserError, match="give its voxels"):
        places.on_slices((5, 2, 0), "world_lps")


# ---- the square


def test_frame_by_hand():
    frame = Frame(height=2, width=4, size=8)  # twice as large, the lower half is padding
    assert frame.resized == (4, 8)
    points = frame.point_to_model(np.array([[0, 0], [3, 1], [-0.5, -0.5], [3.5, 1.5]]))
    np.testing.assert_allclose(points, [[0.5, 0.5], [6.5, 2.5], [-0.5, -0.5], [7.5, 3.5]])
    assert Frame(540, 800, 256).resized == (173, 256)  # 172.8
    assert Frame(1, 1000, 256).resized == (1, 256)


def test_image_to_model_by_hand():
    image = torch.tensor([[[0.0, 2.0], [4.0, 6.0]]])  # (1, 2, 2)
    shrunk = Frame(2, 2, 1).to_model(image)
    assert shrunk.tolist() == [[[3.0]]]
    padded = Frame(1, 2, 2).to_model(image[:, :1])
    assert padded.tolist() == [[[0.0, 2.0], [0.0, 0.0]]]
    grown = Frame(1, 2, 4).to_model(image[:, :1])
    assert grown[0, 0].tolist() == [0.0, 0.5, 1.5, 2.0] and not grown[0, 2:].any()
    assert Frame(2, 2, 4).to_model(image[None].expand(3, 1, 2, 2)).shape == (3, 1, 4, 4)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_labels_survive_the_way_there_and_back(factor):
    label = torch.randint(0, 5, (6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frame = Frame(6, 8, 8 * factor)
    square = frame.label_to_model(label)
    assert square.dtype == torch.uint8 and square.shape == (8 * factor,) * 2
    assert not square[6 * factor :].any()
    for number in range(5):
        logits = (square == number).float() * 2 - 1
        assert ((frame.from_model(logits) > 0) == (label == number)).all()


@pytest.mark.parametrize("s", [64, 256])
def test_from_model_is_the_same_at_any_resolution(s):
    """A ramp over the square, x + 10 y in the square's share, read at the slice's pixel centres."""
    frame = Frame(540, 800, 256)
    centres = (torch.arange(s) + 0.5) / s
    logits = centres[None, :] + 10 * centres[:, None]
    out = frame.from_model(logits.expand(2, 3, s, s))
    assert out.shape == (2, 3, 540, 800)
    expected = (100 + 0.5) / 800 + 10 * ((200 + 0.5) / 540 * 173 / 256)
    assert out[1, 2, 200, 100].item() == pytest.approx(expected, abs=1e-4)


def test_padding_does_not_bleed_in():
    frame = Frame(2, 4, 4)
    logits = torch.full((4, 4), -100.0)
    logits[:2] = 1
    assert (frame.from_model(logits) == 1).all()
    assert (Frame(8, 16, 4).from_model(logits) == 1).all()


sides = st.integers(1, 900)


@settings(deadline=None)  # the first call warms torch up
@given(sides, sides, st.sampled_from([128, 256, 1024]), st.floats(0, 1), st.floats(0, 1))
def test_points_go_there_and_back(height, width, size, x, y):
    frame = Frame(height, width, size)
    point = np.array([x * (width - 1), y * (height - 1)])
    there = frame.point_to_model(point)
    h, w = frame.resized
    assert -0.5 <= there[0] <= w - 0.5 and -0.5 <= there[1] <= h - 0.5
    np.testing.assert_allclose(frame.point_from_model(there), point, atol=1e-9)
    torch.testing.assert_close(
        frame.point_to_model(torch.from_numpy(point)), torch.from_numpy(there), atol=1e-3, rtol=1e-5
    )


@settings(deadline=None)  # the first call warms torch up
@given(st.integers(2, 60), st.integers(2, 60), st.sampled_from([64, 128]), st.data())
def test_a_point_stays_on_its_pixel(height, width, size, data):
    """The pixel a point marks is the pixel the resized image shows under the moved point."""
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    label = torch.zeros(height, width, dtype=torch.int64)
    label[row, column] = 1
    frame = Frame(height, width, size)
    x, y = frame.point_to_model(np.array([column, row])).round().astype(int)
    assert frame.label_to_model(label)[y, x] == 1


# ---- cases


def test_index_counts_by_hand(folder):
    seen = []
    dataset = open_dataset(folder)
    cases = sorted(dataset.cases, key=lambda c: c.id)
    index = index_slices(dataset, cases, progress=lambda *done: seen.append(done))
    assert index.labels == ("one", "two") and seen == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(index.area_px, [[1, 0], [0, 2]] * 3)
    places = [(s.case_id, s.slice_number) for s in index.slices[:3]]
    assert places == [("case_1", 0), ("case_1", 1), ("case_10", 0)]
    # Both labels lie at j = 0, the most posterior of a RAS file: the last coronal slice.
    coronal = index_slices(dataset, cases[:1], axis="coronal")
    np.testing.assert_array_equal(coronal.area_px, [[0, 0], [0, 0], [1, 2]])


def test_load_case(folder):
    dataset = open_dataset(folder)
    case = load_case(dataset.cases[0], dataset, default_window(dataset), "coronal")
    assert case.image.shape == (3, 1, 2, 4) and case.image.flags.c_contiguous
    assert case.label.shape == (3, 2, 4) and case.label.dtype == np.uint8
    assert case.image.min() >= 0 and case.image.max() <= 1
    torch.from_numpy(case.image)


def test_label_values_without_a_name(folder, save_nifti):
    label = np.zeros((4, 3, 2), np.uint8)
    label[0, 0, :] = 7, 9
    save_nifti(folder / "labelsTr" / "case_2.nii.gz", label)
    dataset = open_dataset(folder)
    with pytest.raises(UserError, match=r"case_2.nii.gz has label values \[7, 9\]"):
        index_slices(dataset, dataset.cases)


def test_nan_voxels_are_found_while_indexing(folder, save_nifti):
    save_nifti(folder / "imagesTr" / "case_2_0000.nii.gz", np.full((4, 3, 2), np.nan, np.float32))
    dataset = open_dataset(folder)
    with pytest.raises(UserError, match="case_2_0000.nii.gz has 24 NaN"):
        index_slices(dataset, dataset.cases)


def test_channels_and_axis_must_fit(folder, tmp_path, save_nifti):
    save_nifti(folder / "imagesTr" / "case_2_0000.nii.gz", np.ones((4, 3, 2, 2), np.float32))
    dataset = open_dataset(folder)
    with pytest.raises(UserError, match="has 2 channels but dataset.json names 1: MRI"):
        index_slices(dataset, dataset.cases)

    for name in ("imagesTr/a_0000.png", "labelsTr/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / name)
    about = '{"channel_names": {"0": "US"}, "labels": {"background": 0, "x": 1}, "file_ending": ".png"}'
    (tmp_path / "dataset.json").write_text(about)
    pictures = open_dataset(tmp_path)
    assert default_window(pictures) == Window(0, 255)
    with pytest.raises(UserError, match="--axis coronal"):
        load_case(pictures.cases[0], pictures, Window(0, 255), "coronal")


@pytest.mark.real
def test_chaos_lies_as_radiologists_see_it(shared_data):
    """The liver is at the image's left, the spleen at its right, the right kidney left of the left one."""
    dataset = open_dataset(shared_data / "chaos")
    case = load_case(dataset.cases[0], dataset, default_window(dataset))
    column = {name: np.argwhere(case.label == n)[:, 2].mean() for name, n in dataset.labels.items()}
    assert column["liver"] < column["spleen"] and column["kidney_right"] < column["kidney_left"]
    assert case.volume.unit == "mm"


@pytest.mark.real
@pytest.mark.parametrize("name", ["hippocampus", "lgg", "hc18"])
def test_the_shared_folders_index(shared_data, name):
    dataset = open_dataset(shared_data / name)
    index = index_slices(dataset, dataset.split("test"))
    assert (index.area_px.sum(0) > 0).all()
    assert name == "hippocampus" or all(s.has_foreground for s in index.slices)


def test_a_box_reaches_to_the_outermost_pixels_of_the_square():
    # Two pixels, 1 and 2, of four become pixels 2 to 5 of eight; where the slice shrinks, centres move as points do.
    assert Frame(4, 4, 8).box_to_model(np.array([1.0, 1, 2, 2])).tolist() == [2, 2, 5, 5]
    shrunk = Frame(8, 8, 4).box_to_model(np.array([2.0, 2, 5, 5]))
    assert shrunk == pytest.approx([0.75, 0.75, 2.25, 2.25])
