"""The page stands alone, says what its figures are worth, and shows the cases it names."""

import io
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from cheaplunch import figures, scoring
from cheaplunch.config import build_config, save_config
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Window
from cheaplunch.errors import UserError
from cheaplunch.prediction import Predictor, segment_draws
from cheaplunch.prompting import read_prompting
from cheaplunch.report import write_report
from cheaplunch.report_cases import (
    MODES,
    PICTURED,
    costliest_slice,
    judge,
    pick_cases,
    prompts_given,
    rank_cases,
    save_case_overlays,
)
from cheaplunch.runs import RunFolder
from cheaplunch.synthesis import derive_seed


def results(dice: float, **changes) -> dict:
    """Of two classes: <liver> has `dice` on both cases, spleen is undefined on one."""
    figures = {"dice": dice, "hd95": 7.25, "iou": 0.4321, "nsd": 0.6543}
    nothing = dict.fromkeys(figures)
    return {
        "protocol": "strict",
        "prompts": "furthest",
        "oracle_prompts": True,
        "backbone": "lite-medsam",
        "method": "cheap-lunch",
        "n_cases": 2,
        "unit": "mm",
        "nsd_tolerance": 2.0,
        "classes": {"<liver>": figures | {"n": 2, "n_undefined": 0}, "spleen": figures | {"n": 1, "n_undefined": 1}},
        "mean": figures,
        "ci95": {"dice": [0.7891, 0.8765]},
        "cases": [
            {"id": "a&b", "class": "<liver>"} | figures,
            {"id": "a&b", "class": "spleen"} | nothing,
            {"id": "c", "class": "<liver>"} | figures,
            {"id": "c", "class": "spleen"} | figures,
        ],
    } | changes


def png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    (run.adapter).mkdir(parents=True)
    (run.adapter / "adapter_model.safetensors").touch()
    save_config(build_config("cheap-lunch", {"data": Path("some") / "abdomen"}), run.config)
    run.environment.write_text(json.dumps({"versions": {"torch": "2.99"}, "split": "by <hand>"}))
    run.exemplars.write_text("case,slice,<liver>_px,spleen_px\nc,14,133,162\n")
    run.metrics.write_text('{"step": 1, "loss": 1.5, "learning_rate": 0.001}\n')
    run.preview.write_bytes(png())
    return run


@pytest.fixture
def evaluated(run):
    def save(**columns: dict) -> RunFolder:
        folder = run.evaluations / "furthest"
        folder.mkdir(parents=True)
        for name, result in columns.items():
            (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(result))
        (folder / "best.png").write_bytes(png())
        (folder / "cases.json").write_text(json.dumps({"best": {"id": "a&b", "dice": 0.9123, "slice": 5}}))
        return run

    return save


def read(run: RunFolder) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_page_needs_nothing_but_itself(evaluated):
    run = evaluated(fine_tuned=results(0.84), zero_shot=results(0.01))
    page = read(run)
    assert not re.search(r"<link|@import|<script\s|url\(\s*['\"]?(?!#)|https?:(?!//www\.w3\.org)", page)
    assert "default-src 'none'" in page
    addresses = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", page)
    assert len([a for a in addresses if a.startswith("data:image/png;base64,")]) == 2
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not list(run.root.glob(".*"))  # written whole


def test_page_says_the_figures_with_zero_shot_beside_and_oracle_prompts(evaluated):
    page = read(evaluated(fine_tuned=results(0.8421), zero_shot=results(0.0123)))
    assert re.search(r"oracle prompts</span>\s*<strong>Mean Dice 0.84</strong> \(zero-shot 0.01\) on 2 test", page)
    assert "</span> One point a class and slice, the furthest from the boundary, drawn from the truth." in page
    for text in (
        "HD95, mm",
        "NSD at 2 mm",
        "0.842",
        "0.012",
        "7.2",
        "0.432",
        "0.654",
        "0.789–0.876",
        "1 (1 undefined)",
    ):
        assert f">{text}<" in page
    assert "may include this test set" in page
    assert "trained with boxes only" in page


def test_names_are_escaped(evaluated):
    page = read(evaluated(fine_tuned=results(0.84)))
    assert "&lt;liver&gt;" in page
    assert "a&amp;b" in page
    assert "by &lt;hand&gt;" in page
    assert "<liver>" not in page


def test_one_patient_has_no_interval(evaluated):
    page = read(evaluated(fine_tuned=results(0.84, ci95={"dice": None})))
    assert "—, fewer than two patients" in page


def test_prompt_free_results_are_not_called_oracle(evaluated):
    page = read(evaluated(fine_tuned=results(0.84, prompts="auto", oracle_prompts=False)))
    assert "oracle" not in page.lower().replace(".oracle", "")


def test_results_of_two_protocols_are_not_set_side_by_side(evaluated):
    run = evaluated(fine_tuned=results(0.84), zero_shot=results(0.01, protocol="paper", unit="px"))
    with pytest.raises(UserError, match="different protocols"):
        write_report(run)


def test_without_evaluations_the_next_command_is_given(run):
    page = read(run)
    assert f"cheaplunch evaluate {run.root} --data some/abdomen --out results.json" in page
    assert "abdomen" in re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)[1]


def test_a_bare_run_renders_and_says_that_training_has_not_finished(tmp_path):
    run = RunFolder(tmp_path)
    save_config(build_config("cheap-lunch", {}), run.config)
    assert "Training has not finished" in read(run)


def test_filled_backgrounds_and_the_runs_own_notes_are_said(run):
    assert "filling the foreground in" not in read(run)
    run.environment.write_text(json.dumps({"backgrounds_filled": True, "notes": ["One <template> brain."]}))
    page = read(run)
    assert "background slices of the synthesis were made by filling the foreground in" in page.replace("\n", " ")
    assert "One &lt;template&gt; brain." in page


def test_best_median_and_worst_by_the_mean_over_classes():
    def cases(*rows):
        return {"cases": [{"id": id_, "class": str(k), "dice": d} for id_, *dice in rows for k, d in enumerate(dice)]}

    # Means 0.5, 0.9, 0.2 and 0.7 (its undefined class does not count); e has no figure at all.
    four = cases(("a", 0.4, 0.6), ("b", 0.8, 1.0), ("c", 0.0, 0.4), ("d", None, 0.7), ("e", None, None))
    picked = pick_cases(four)
    assert {role: id_ for role, (id_, _) in picked.items()} == {"best": "b", "median": "a", "worst": "c"}
    assert picked["best"][1] == pytest.approx(0.9)
    assert pick_cases(cases(("a", 0.1), ("b", 0.2))) == {"best": ("b", 0.2), "worst": ("a", 0.1)}
    assert list(pick_cases(cases(("a", 0.1)))) == ["best"]
    assert pick_cases(cases(("a", None))) == {}


# --- failure modes, by hand ---


def rows(*strings: str) -> np.ndarray:
    """One slice (1, H, W) of digits, "." for background."""
    return np.array([[[0 if c == "." else int(c) for c in line] for line in strings]], np.uint8)


@pytest.mark.parametrize(
    ("truth", "prediction", "said"),
    [
        ("1111......", "..........", "missed"),
        ("..........", "111.......", "invented"),
        ("11....2222", "......1112", "swapped: 100 % on b"),
        ("1111222...", "..1111....", "boundary only"),  # half of it on b is not more than half
        ("1.....222.", "1.....1112", "swapped: 75 % on b"),
        ("......222.", "......111.", "swapped: 100 % on b"),  # says more than that a was invented
        ("1111......", "1111111...", "leaked: 75 % too large"),
        ("1111......", "111111....", "boundary only"),  # 50 % too large is not more than 50 %
        ("11111.....", "1111..1...", "leaked: 20 % apart"),
        ("111111111.", "1111111.1.", "boundary only"),  # two pieces, and both hold some of the truth
        ("1111111111", "1111......", "cut short: 40 % found"),
        ("1111111111", "11111.....", "boundary only"),
        (".11111....", "111111....", "boundary only"),
    ],
)
def test_what_went_wrong_with_a(truth, prediction, said):
    verdict = judge(rows(prediction), rows(truth), {"a": 1, "b": 2})["a"]
    assert str(verdict) == said
    assert verdict.mode in MODES
    assert verdict.failed == (said != "boundary only")


def test_a_class_that_neither_has_is_no_failure():
    assert list(judge(rows("11."), rows("11."), {"a": 1, "b": 2})) == ["a"]


def test_regions_that_overlap_are_not_swapped_for_each_other():
    regions = {"whole": (1, 2), "core": 2}
    verdicts = judge(
        rows("1222......"), rows("1112......"), regions
    )  # the core, three times too large, is in the whole
    assert {name: str(verdict) for name, verdict in verdicts.items()} == {
        "whole": "boundary only",
        "core": "leaked: 200 % too large",
    }


def test_pieces_hang_together_across_slices():
    truth, prediction = np.zeros((2, 3, 8, 8), np.uint8)
    truth[0, :4, :4] = prediction[0, :4, :4] = 1
    prediction[1, 3, 3:6] = 1  # 3 of 19 voxels, above the corner of what is right
    assert str(judge(prediction, truth, {"a": 1})["a"]) == "boundary only"
    prediction[1] = np.roll(prediction[1], 1, axis=1)  # over nothing
    assert str(judge(prediction, truth, {"a": 1})["a"]) == "leaked: 16 % apart"


def test_costliest_slice_counts_each_wrong_voxel_against_its_class():
    truth = np.concatenate([rows("1111111111"), rows("22........"), rows(".........."), rows("1111111111")])
    prediction = np.concatenate([rows("1......111"), rows("2........."), rows(".........."), rows("1111111111")])
    # Six voxels of 34 of class 1 on slice 0; one voxel of three of class 2 on slice 1.
    assert costliest_slice(prediction, truth) == 1
    prediction[2, 0, :6] = 1  # six more of class 1, of now 40: 0.15 each; class 2 is still 0.33
    assert costliest_slice(prediction, truth) == 1
    prediction[2, 0, :4] = 2  # four voxels of now seven of class 2
    assert costliest_slice(prediction, truth) == 2
    assert costliest_slice(truth, truth) == 0  # nothing is wrong: most of the truth


def test_cases_are_ranked_worst_first_and_undefined_last():
    dice = [("a", 0.9), ("b", None), ("c", 0.2), ("a", 0.5), ("c", None), ("d", 0.0)]
    results = {"cases": [{"id": id_, "class": str(k), "dice": d} for k, (id_, d) in enumerate(dice)]}
    assert rank_cases(results) == [("d", 0.0), ("c", 0.2), ("a", pytest.approx(0.7)), ("b", None)]


# --- prompts as they were given ---


class Recorder(Predictor):
    """The real one, which remembers what it was given, in px of the slice."""

    def __init__(self, segmenter):
        super().__init__(segmenter)
        self.given: list[np.ndarray] = []

    def logits(self, embedded, prompts):
        if prompts.boxes_xyxy is not None:
            corners = prompts.boxes_xyxy[0].reshape(-1, 2, 2)  # (P, 2, 2)
            enlarged = embedded.frame.resized[0] / embedded.frame.height
            half = (enlarged - 1) / 2  # boxes reach to the outermost pixels
            corners = corners + torch.tensor([[half], [-half]])
            self.given.append(embedded.frame.point_from_model(corners).reshape(-1, 4).numpy())
        else:
            self.given.append(embedded.frame.point_from_model(prompts.points_xy[0]).numpy())  # (P, K, 2)
        return super().logits(embedded, prompts)


@pytest.mark.parametrize(
    ("words", "px"),
    [
        ("furthest", {}),
        ("random", {"point_jitter_px": 2.0}),
        ("box", {"box_margin_px": 1.0, "box_jitter_px": 3.0}),
        ("clicks:2", {}),
        ("one-click", {"point_jitter_px": 2.0}),
    ],
)
def test_prompts_are_drawn_again_as_the_model_got_them(zero_shot, tiny_dataset, words, px):
    dataset, prompting = open_dataset(tiny_dataset), read_prompting(words, **px)
    case = load_case(dataset.cases[0], dataset, Window())
    recorder = Recorder(zero_shot)
    segment_draws(recorder, case, prompting, [np.random.default_rng(5)])
    shown = [n for n in range(len(case.label)) if case.label[n].any()]
    expected = [prompts_given(n, case.label, prompting, np.random.default_rng(5)) for n in shown]
    assert all(expected) or words == "one-click"

    given = recorder.given
    if words == "one-click":
        given = given[: sum(map(bool, expected))]  # the user's; then those carried
    elif words == "clicks:2":
        given = [points for points in given if points.shape[1] == 1]  # first clicks
    for prompts, places in zip([each for each in expected if each], given, strict=True):
        assert np.allclose(places.reshape(len(prompts), -1), list(prompts.values()), atol=1e-4)

    known = prompts_given(shown[1], case.label, prompting, None)  # without the generator
    assert bool(known) == (words == "furthest")


def test_seed_of_the_prompts_is_the_evaluations(tiny_dataset):
    case = open_dataset(tiny_dataset).cases[0]
    assessment = scoring.Assessment(tiny_dataset, seed=5)
    assert scoring._prompt_seed(assessment, case, draw=0) == derive_seed(5, "prompts", case.id)


def test_later_clicks_answer_the_model_and_are_not_made_up():
    clicks = read_prompting("clicks:3", point_jitter_px=1.0)
    assert prompts_given(0, rows("111"), clicks, np.random.default_rng(0)) == {}
    assert prompts_given(0, rows("111"), read_prompting("auto"), np.random.default_rng(0)) == {}


# --- thumbnails ---


def pixels(webp: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB")).astype(int)


def test_thumbnail_fills_the_prediction_outlines_the_truth_and_shows_the_prompts():
    image, truth, prediction = np.full((1, 40, 40), 0.5, np.float32), np.zeros((40, 40)), np.zeros((40, 40))
    truth[10:30, 10:20], prediction[10:30, 15:30] = 7, 7
    drawn = pixels(figures.thumbnail(image, truth, prediction, {"liver": 3, "spleen": 7}, prompts={7: (17.0, 19.0)}))
    assert drawn.shape == (288, 288, 3)
    # The structures span 20 px: a square of 25 around them, from row and column 8 on.
    scale, colour = 288 / 25, 255 * figures.class_colours(2)[1]

    def at(x: float, y: float) -> np.ndarray:
        return drawn[round((y - 8 + 0.5) * scale), round((x - 8 + 0.5) * scale)]

    assert np.allclose(at(25, 15), 0.6 * 127 + 0.4 * colour, atol=12)  # predicted
    assert np.allclose(at(12, 20), 127, atol=12)  # true, and not predicted: bare inside the line
    edge = round((10 - 8) * scale)
    assert np.abs(drawn[144, edge : edge + 3] - colour).max(axis=1).min() < 40  # the line, inside the edge
    assert (at(17, 19 - 0.45) > 190).all()  # the point's ring is white


def test_box_stands_around_its_pixels():
    truth = np.zeros((20, 20))
    truth[5:15, 5:15] = 1
    image = np.zeros((1, 20, 20), np.float32)
    drawn = pixels(figures.thumbnail(image, truth, truth * 0, {"a": 1}, prompts={1: (5.0, 5.0, 14.0, 14.0)}))
    left = round(288 * (5 - 4) / 13)  # a square of 13 px (1.25 · 10) from 4 on
    assert (drawn[144, left - 4 : left] > 180).all(axis=1).any()
    assert not (drawn[144, left + 1 : left + 120] > 180).all(axis=1).any()


def test_thumbnail_of_noise_stays_small_and_in_proportion():
    noise = np.random.default_rng(0).random((3, 300, 150)).astype(np.float32)
    empty = np.zeros((300, 150), np.uint8)
    whole = figures.thumbnail(noise, empty + 1, empty, {"a": 1}, spacing=(1.0, 2.0))
    assert len(whole) <= figures.THUMBNAIL_BYTES
    assert pixels(whole).shape == (288, 288, 3)  # 300 mm each way
    assert pixels(figures.thumbnail(noise, empty + 1, empty, {"a": 1})).shape == (288, 144, 3)


# --- the whole page, from files ---


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(data, masks, protocol → results) of 63 pictures; of the n-th n rows of 64 are not found, of the last none."""
    root = tmp_path_factory.mktemp("scored")
    about = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "disc": 1, "speck": 2}, "file_ending": ".png"}
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (root / "data" / folder).mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "data" / "dataset.json").write_text(json.dumps(about))
    noise = np.random.default_rng(3)
    for number in range(64):
        label = np.zeros((64, 64), np.uint8)
        label[:, :32], label[60:, 60:] = 1, 2
        image = (100 * (label > 0) + noise.integers(0, 99, label.shape)).astype(np.uint8)
        side, id_ = ("Tr", "train") if number == 63 else ("Ts", f"case{number:02}")
        Image.fromarray(image).save(root / "data" / f"images{side}" / f"{id_}_0000.png")
        Image.fromarray(label).save(root / "data" / f"labels{side}" / f"{id_}.png")
        predicted = label.copy()
        predicted[64 - number if number < 62 else 0 :, :32] = 0
        if number == 0:
            predicted[60:, 60:] = 0  # but its speck
        Image.fromarray(predicted).save(root / "masks" / f"{id_}.png")
    assessment = scoring.Assessment(root / "data", read_prompting("box"), ("strict", "paper"))
    return root / "data", root / "masks", scoring.assess_predictions(root / "masks", "spoilt", assessment)


@pytest.fixture(scope="module")
def drawn_run(scored, tmp_path_factory):
    data, masks, results = scored
    run = RunFolder(tmp_path_factory.mktemp("drawn"))
    save_config(build_config("cheap-lunch", {}), run.config)
    for protocol, result in results.items():
        folder = run.evaluations / f"box-{protocol}"
        folder.mkdir(parents=True)
        (folder / "fine-tuned.json").write_text(json.dumps(result))
        save_case_overlays(folder, result, open_dataset(data), masks, Window(0, 255))
    return run


def test_every_case_once_worst_first_with_bounded_thumbnails(drawn_run, scored):
    page = read(drawn_run)
    strict = page[page.index('id="box-strict"') : page.index('id="box-paper"')]
    listed = re.findall(r'data-case="([^"]*)"', strict)
    dice = dict(rank_cases(scored[2]["strict"]))
    assert len(listed) == len(set(listed)) == 63
    assert [dice[id_] for id_ in listed] == sorted(dice.values())
    assert listed[:2] == ["case00", "case62"]  # the speck counts as much as the disc
    thumbnails = re.findall(r"data:image/webp;base64,([^\"]*)", page)
    assert len(thumbnails) == PICTURED < 63  # and once for both protocols
    assert max(map(len, thumbnails)) <= 4 / 3 * figures.THUMBNAIL_BYTES + 4
    assert "stands under “box, protocol strict”" in page[page.index('id="box-paper"') :]
    assert len(page) < 3e6
    assert not re.search(r"<link|@import|<script\s|https?:(?!//www\.w3\.org)", page)


def test_failure_modes_are_counted_and_named_in_their_case(drawn_run):
    page = read(drawn_run)
    counts = page[page.index("Cases by failure mode") :]
    counted = {
        name: dict(zip(MODES, map(int, re.findall(r'data-value="(\d+)"', row)), strict=True))
        for row in counts[: counts.index("</table>")].split("<tr>")[2:]
        if (name := re.search(r"</span>(\w+)</th>", row)[1])
    }
    # From 33 rows of 64 on less than half is found.
    assert counted["disc"] == dict.fromkeys(MODES, 0) | {"missed": 1, "cut short": 61 - 32, "boundary only": 33}
    assert counted["speck"] == dict.fromkeys(MODES, 0) | {"missed": 1, "boundary only": 62}
    first = page[page.index('data-case="case00"') :]
    assert re.search(r'speck</span> <span class="dice">0.000</span> <span class="why">missed</span>', first[:60_000])
    assert "White: the box that was given" in page
    assert "truth outlined, with the prompt for disc, speck" in page


def test_random_prompts_are_shown_only_where_the_seed_is_known(run, scored):
    data, masks, results = scored
    folder = run.evaluations / "random-strict"
    folder.mkdir(parents=True)
    result = results["strict"] | {"prompts": "random", "cases": results["strict"]["cases"][:6]}
    (folder / "fine-tuned.json").write_text(json.dumps(result))
    save_case_overlays(folder, result, open_dataset(data), masks, Window(0, 255))
    assert "The prompts that were given are not shown" in read(run)
    unseeded = (folder / "thumbnails" / "001.webp").read_bytes()
    save_case_overlays(folder, result, open_dataset(data), masks, Window(0, 255), seed=0)
    assert "White: the point that was given" in read(run)
    assert (folder / "thumbnails" / "001.webp").read_bytes() != unseeded


def test_clicks_draws_and_what_the_prompts_tell_are_said(evaluated):
    more = {
        "prompts": "clicks:3",
        "present_classes_only": True,
        "ci95_method": "studentised",
        "point_jitter_px": 2.0,
        "by_clicks": {"1": 0.7654, "3": 0.4321},
        "draws": [{}, {}],
        "spread": {"dice": 0.0123},
    }
    run = evaluated(fine_tuned=results(0.84, **more), zero_shot=results(0.01, **more))
    (run.evaluations / "furthest" / "clicks.png").write_bytes(png())
    page = read(run)
    assert "asked for present classes only" in page
    assert "over 2 patients, by a studentised bootstrap" in page
    assert "points off by up to 2 px" in page
    assert re.search(r'<th scope="row">3</th><td>0.432</td><td>0.432</td>', page)
    assert "means over 2 draws" in page and "deviation of 0.012" in page
    assert page.count("data:image/png") == 3  # the sheet, the best case, the clicks


def test_overlays_show_the_slice_with_most_of_the_truth(tmp_path):
    label = np.zeros((6, 5, 4), np.uint8)  # (i, j, k): axial slices along k
    label[1, 1, 0], label[1:4, 1:3, 2] = 1, 1
    for name, array in (("imagesTr/a_0000", label * 100.0), ("labelsTr/a", label), ("masks/a", label * 0)):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(array, np.diag([1, 1, 3, 1])), path)
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))

    scores = {"prompts": "furthest", "cases": [{"id": "a", "class": "one", "dice": 0.25}]}
    save_case_overlays(tmp_path / "out", scores, open_dataset(tmp_path), tmp_path / "masks", Window(), "axial")
    assert json.loads((tmp_path / "out/cases.json").read_text()) == {"best": {"id": "a", "dice": 0.25, "slice": 2}}
    failures = json.loads((tmp_path / "out/failures.json").read_text())
    assert failures == {
        "labels": ["one"],
        "cases": [
            {
                "id": "a",
                "classes": {"one": {"mode": "missed", "detail": ""}},
                "picture": "thumbnails/001.webp",
                "slice": 2,
                "given": ["one"],
            }
        ],
    }
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"best.png", "cases.json", "failures.json", "thumbnails/001.webp"}
