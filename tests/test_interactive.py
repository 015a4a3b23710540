"""An open case: where its pixels are, what is asked on them, and how an answer is carried."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine

from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.slices import Window
from cheaplunch.data.volume import Grid, Volume, read_volume
from cheaplunch.errors import UserError
from cheaplunch.interactive import Answer, Box, Click, EmbeddingCache, Mark, OpenCase, quality_of
from cheaplunch.prediction import Predictor, carry_click, segment_draws
from cheaplunch.prompting import Prompting
from cheaplunch.prompts import Prompts, furthest_point, tight_box

LABELS = {"disc": 1, "block": 2}


class LikeThePoint(torch.nn.Module):
    """Says of every pixel whether it has the grey step (0.1, 0.5, 0.9) of the first point, if that is on the target.

    A point off the target takes its own 8 × 8 px of the network's 64 away.
    """

    image_size_px = 64
    slab_slices = 1

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.encoded = 0
        self.asked = []

    def embed(self, images, shown_px=None):
        self.encoded += len(images)
        return ((images[:, :1] - 0.1) / 0.4).round()  # (B, 1, 64, 64): 0, 1 or 2

    def foreground(self, embeddings, prompts):
        self.asked.append(prompts)
        grey, logits = embeddings[0, 0], []
        for points, labels in zip(prompts.points_xy[0].round().long(), prompts.point_labels[0], strict=True):
            x, y = points[0].tolist()
            own = torch.where(grey == grey[y, x], 9.0, -9.0) if grey[y, x] else torch.full_like(grey, -9.0)
            for (x, y), label in zip(points.tolist(), labels, strict=True):
                if not label:
                    own[y // 8 * 8 : y // 8 * 8 + 8, x // 8 * 8 : x // 8 * 8 + 8] = -9.0
            logits.append(own)
        return torch.stack(logits)[None]  # (1, P, 64, 64)


def volume_of(array: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    """(Z, Y, X) in the array's own orientation, as if read from a file of LPS axes of 1 mm."""
    affine = np.diag([-1.0, -1, 1, 1]) if affine is None else affine
    return Volume(array[None].astype(np.float32), (1.0, 1.0, 1.0), Grid(Path("made up"), array.shape[::-1], affine))


def grey(labels: np.ndarray) -> np.ndarray:
    return np.array([0.1, 0.5, 0.9], np.float32)[labels]


def open_case(labels: np.ndarray, **more) -> OpenCase:
    return OpenCase(Predictor(LikeThePoint()), volume_of(grey(labels)), Window(0, 1), **more)


# ---- places


def test_marks_find_their_slice_in_any_coordinates():
    affine = np.array([[-0.7, 0, 0, 50], [0, -0.7, 0, 60], [0, 0, 4, -9], [0, 0, 0, 1.0]])
    case = OpenCase(Predictor(LikeThePoint()), volume_of(np.zeros((5, 6, 7)), affine), Window(0, 1), "coronal")
    # Voxel (i, j, k) = (2, 1, 3) of LPS axes is x 2 and y 1; superior is on top, so that z 3 of 5 is row 1.
    ras = tuple(apply_affine(affine, (2, 1, 3)).tolist())
    lps = (-ras[0], -ras[1], ras[2])
    for coordinates, place in (("voxel", (2, 1, 3)), ("world_ras", ras), ("world_lps", lps)):
        click = case.place(Mark("block", coordinates, (place,), False), LABELS)
        assert (click.number, click.slice_number, click.positive) == (2, 1, False)
        assert click.xy == pytest.approx((2, 1))
    box = case.place(Mark("disc", "voxel", ((4, 1, 0), (2, 1, 3))), LABELS)
    assert box == Box(1, 1, (2, 1, 4, 4))


@pytest.mark.parametrize(
    ("mark", "naming"),
    [
        (Mark("liver", "voxel", ((0, 0, 0),)), "'liver'; choose of: disc, block"),
        (
            Mark("disc", "voxel", ((7, 0, 0),)),
            r"voxel \[7, 0, 0\] lies outside of scan.nii, which has 7 × 6 × 5 voxels",
        ),
        (Mark("disc", "world_lps", ((0, 0, -0.6),)), "outside"),
        (Mark("disc", "voxel", ((1, 1),)), "has 5 slices; add the third"),
        (Mark("disc", "voxel", ((1, 1, 1), (2, 2, 3))), "from slice 1 to 3"),
    ],
)
def test_marks_that_are_nowhere(mark, naming, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((7, 6, 5), np.float32), np.diag([-1, -1, 1, 1])), tmp_path / "scan.nii")
    case = OpenCase(Predictor(LikeThePoint()), read_volume([tmp_path / "scan.nii"]), Window(0, 1))
    with pytest.raises(UserError, match=naming):
        case.place(mark, LABELS)


# ---- asking


def two_organs() -> np.ndarray:
    """(7, 16, 16): a disc's rectangle on slices 1 to 4 and a block's on 2 to 5."""
    labels = np.zeros((7, 16, 16), int)
    labels[1:5, 2:7, 2:7] = 1
    labels[2:6, 9:14, 8:15] = 2
    return labels


def test_several_classes_share_a_pass_and_do_not_overlap():
    labels = two_organs()
    case = open_case(labels)
    on_three = [Click(2, 3, (11, 11)), Click(1, 3, (4, 4)), Click(1, 3, (3, 3)), Click(2, 3, (9, 10))]
    answers = case.segment([*on_three, Click(1, 1, (4, 4))])
    network = case.predictor.segmenter
    assert network.encoded == 2
    assert [tuple(asked.points_xy.shape) for asked in network.asked] == [(1, 1, 1, 2), (1, 2, 2, 2)]
    assert {number: list(classes) for number, classes in answers.items()} == {1: [1], 3: [1, 2]}
    expected = np.where(np.isin(np.arange(7), (1, 3))[:, None, None], labels, 0)
    expected[1][labels[1] == 2] = 0
    np.testing.assert_array_equal(case.label(answers), expected)


def test_negative_clicks_take_away_and_alone_say_nothing():
    case = open_case(two_organs())
    whole = case.segment([Click(1, 3, (4, 4))])[3][1].mask
    less = case.segment([Click(1, 3, (4, 4)), Click(1, 3, (2, 2), positive=False)])[3][1].mask
    assert 0 < less.sum() < whole.sum() and not (less & ~whole).any()
    assert case.segment([Click(1, 3, (2, 2), positive=False)]) == {}


def test_prompts_off_the_image():
    case = open_case(two_organs())
    for prompt in (Click(1, 7, (3, 3)), Click(1, -1, (3, 3)), Click(1, 3, (16, 3)), Box(1, 3, (0, 0, 3, 15.6))):
        with pytest.raises(UserError, match="outside of 7 slices of 16 × 16 px"):
            case.segment([prompt])
    with pytest.raises(UserError, match="two boxes"):
        case.segment([Box(1, 3, (0, 0, 3, 3)), Box(1, 3, (4, 4, 9, 9))])


def labelled_case(volume: Volume, labels: np.ndarray) -> CaseSlices:
    """Axial slices of a volume with the truth on them."""
    return CaseSlices(volume.array[0][:, None], labels.astype(np.uint8), volume, step_mm=1.0)


@pytest.mark.parametrize("kind", ["furthest", "box"])
def test_prompts_as_evaluation_draws_them_give_the_same_masks(kind, zero_shot):
    labels = two_organs().repeat(2, axis=1).repeat(2, axis=2)
    rng = np.random.default_rng(0)
    volume = volume_of(grey(labels) + rng.normal(0, 0.05, labels.shape))
    predictor = Predictor(zero_shot, smooth_mm=0.8)
    [drawn] = segment_draws(predictor, labelled_case(volume, labels), Prompting(kind), [rng])
    prompts = []
    for number, classes in enumerate(labels):
        for k in (1, 2):
            if (mask := classes == k).any():
                prompts.append(
                    Click(k, number, furthest_point(mask)) if kind == "furthest" else Box(k, number, tight_box(mask))
                )
    case = OpenCase(predictor, volume, Window(0, 1))
    case.images = volume.array[0][:, None]  # not cut off at 0 and 1, as the other's are not
    label = case.label(case.segment(prompts))
    np.testing.assert_array_equal(label, drawn.label)
    assert kind == "furthest" or len(np.unique(label)) == 3


def test_the_network_goes_on_from_its_answer_and_takes_boxes_with_clicks(zero_shot):
    volume = volume_of(grey(two_organs()))
    case = OpenCase(Predictor(zero_shot), volume, Window(0, 1))
    box, click = Box(2, 3, (8, 9, 14, 13)), Click(2, 3, (11, 11))
    logits = {name: case.segment(asked)[3][2].logits for name, asked in {"box": [box], "click": [click]}.items()}
    logits["both"] = case.segment([box, click])[3][2].logits
    logits["on"] = case.segment([box], before=case.segment([box]))[3][2].logits
    for one, other in (("box", "click"), ("box", "both"), ("click", "both"), ("box", "on")):
        assert not torch.allclose(logits[one], logits[other], atol=1e-2), (one, other)
    embedded = case.embedded(3)
    prompts = torch.tensor([[box.xyxy]])
    again = case.predictor.logits(
        embedded,
        Prompts(boxes_xyxy=embedded.frame.box_to_model(prompts), masks=logits["box"][None, None]),
    )
    torch.testing.assert_close(again[0], logits["on"], atol=1e-4, rtol=0)


def test_quality_is_the_mean_probability_inside():
    sure = Answer(np.array([[0.6, 0.8], [0.2, 0.5]], np.float32), torch.zeros(1))
    assert sure.quality == pytest.approx(0.7)
    blank = Answer(np.full((2, 2), 0.5, np.float32), torch.zeros(1))
    assert blank.quality is None
    surer = Answer(np.full((2, 2), 0.9, np.float32), torch.zeros(1))
    answers = {0: {1: sure, 2: blank}, 4: {1: surer}}
    # Two pixels at 0.7 and four at 0.9.
    assert quality_of(answers, LABELS) == {"disc": pytest.approx((2 * 0.7 + 4 * 0.9) / 6), "block": None}


# ---- carrying


def test_one_click_a_class_is_carried_as_in_evaluation():
    labels = two_organs()
    labels[5, 9:11, 8:10] = 2  # so much smaller that it overlaps too little
    case = open_case(labels)
    [(first, one), (second, two)] = [((4, 4), 1), ((11, 11), 2)]
    prompts = [Click(one, 1, first), Click(two, 2, second)]
    answers = case.propagate(prompts, case.segment(prompts))
    marked = np.zeros(labels.shape, np.uint8)
    marked[1, 4, 4], marked[2, 11, 11] = 1, 2
    same = CaseSlices(case.images, marked, case.volume, step_mm=1.0)
    carried = carry_click(Predictor(LikeThePoint()), same, np.random.default_rng(0))
    np.testing.assert_array_equal(case.label(answers), carried.label)
    assert set(np.unique(carried.label[4])) == {0, 1, 2}
    assert case.predictor.segmenter.encoded == 7  # each slice once, though two directions pass some


def test_an_answer_is_carried_so_far_as_asked():
    case = open_case(two_organs())
    answers = case.segment([Click(1, 2, (4, 4))])
    assert sorted(case.propagate([], answers, reach=1)) == [1, 2, 3]
    assert sorted(case.propagate([], answers)) == [1, 2, 3, 4]


def test_negative_clicks_on_a_slice_that_is_reached():
    case = open_case(two_organs())
    prompts = [Click(1, 2, (4, 4)), Click(1, 3, (2, 2), positive=False)]
    answers = case.propagate(prompts, case.segment(prompts))
    assert not answers[3][1].mask[2, 2]
    assert answers[3][1].mask[4, 4] and answers[4][1].mask[2, 2]


def test_what_another_class_hides_is_not_carried():
    """Clicks on a rectangle find the block beside it too, less surely: no click of the user's would show that."""

    class Spilling(LikeThePoint):
        def foreground(self, embeddings, prompts):
            found, grey = super().foreground(embeddings, prompts), embeddings[0, 0]
            x, y = prompts.points_xy[0, :, 0].round().long().unbind(-1)
            spilt = (grey[y, x] == 1)[:, None, None] & (grey == 2)
            return torch.where(spilt, 1.0, found[0])[None]

    labels = np.zeros((5, 16, 16), int)
    labels[:, 2:14, 2:6], labels[:, 2:14, 6:11] = 1, 2  # the middle of both together, (6, 7), is in the second
    predictor = Predictor(Spilling())
    case = OpenCase(predictor, volume_of(grey(labels)), Window(0, 1))
    clicks = [Click(1, 2, (3, 7)), Click(2, 2, (8, 7))]
    answers = case.segment(clicks)
    assert answers[2][1].mask.sum() == 12 * 9
    label = case.label(case.propagate(clicks, answers))
    np.testing.assert_array_equal(label, labels)
    carried = carry_click(predictor, CaseSlices(case.images, labels.astype(np.uint8), case.volume), None)
    np.testing.assert_array_equal(carried.label, labels)


# ---- embeddings


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago():
    one = 64 * 64 * 4
    cache = EmbeddingCache(limit_bytes=2 * one)
    case = open_case(two_organs(), cache=cache)
    network = case.predictor.segmenter
    for number, encoded in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):  # 2 puts 1 out, since 0 was used again
        case.embedded(number)
        assert network.encoded == encoded
    assert cache.bytes == 2 * one
    other = OpenCase(case.predictor, case.volume, Window(0, 1), cache=cache)
    other.embedded(1)
    assert network.encoded == 5  # another case's slice of this number is another slice
    case.close()
    assert cache.bytes == one
    small = open_case(two_organs(), cache=EmbeddingCache(limit_bytes=1))
    small.embedded(0), small.embedded(0)
    assert small.predictor.segmenter.encoded == 1


def test_threads_share_a_case():
    case = open_case(two_organs(), cache=EmbeddingCache(limit_bytes=3 * 64 * 64 * 4))
    expected = {number: open_case(two_organs()).segment([Click(1, number, (4, 4))]) for number in range(1, 5)}
    together = threading.Barrier(8)

    def ask(thread: int) -> None:
        together.wait()
        for number in [1, 2, 3, 4] * 3:
            answer = case.segment([Click(1, number, (4, 4))])
            np.testing.assert_array_equal(answer[number][1].mask, expected[number][number][1].mask)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ask, thread) for thread in range(8)]:
            done.result()


def test_a_slice_is_embedded_once_for_all_who_wait_and_an_error_is_not_kept():
    cache, entered, release = EmbeddingCache(), threading.Event(), threading.Event()
    made = []

    def slowly():
        entered.set()
        release.wait(10)
        made.append(1)
        return open_case(two_organs()).embedded(0)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "slice", slowly)
        entered.wait(10)
        second = pool.submit(cache.get, "slice", slowly)
        release.set()
        assert first.result() is second.result()
    assert len(made) == 1

    def broken():
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.get("other", broken)
    assert cache.get("other", lambda: first.result()) is first.result()


# ---- masks


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_mask_lies_on_the_grid_of_its_file(axis, tmp_path):
    array = np.full((9, 8, 7), 0.1, np.float32)
    affine = np.array([[-0.56, 0.48, 0, 31.5], [-0.42, -0.64, 0, 5], [0, 0, -3, 110], [0, 0, 0, 1]])  # turned
    array[2:7, 2:6, 2:5] = 0.9
    image = nib.Nifti1Image(array, affine)
    nib.save(image, tmp_path / "scan.nii.gz")
    case = OpenCase(Predictor(LikeThePoint()), read_volume([tmp_path / "scan.nii.gz"]), Window(0, 1), axis)
    click = case.place(Mark("block", "voxel", ((4, 3, 3),)), LABELS)
    case.write(case.label(case.propagate([click], case.segment([click]))), tmp_path / "mask.nii.gz", LABELS)
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.where(array > 0.5, 2, 0))
