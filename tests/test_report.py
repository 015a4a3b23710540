"""The page stands alone, says what its figures are worth, and shows the cases it names."""

import io
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cheaplunch.config import build_config, save_config
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Window
from cheaplunch.errors import UserError
from cheaplunch.report import pick_cases, save_case_overlays, write_report
from cheaplunch.runs import RunFolder


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
    assert not re.search(r"<script|<link|@import|url\(\s*['\"]?(?!#)", page)
    addresses = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", page)
    assert len([a for a in addresses if a.startswith("data:image/png;base64,")]) == 2
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not list(run.root.glob(".*"))  # written whole


def test_page_says_the_figures_with_zero_shot_beside_and_oracle_prompts(evaluated):
    page = read(evaluated(fine_tuned=results(0.8421), zero_shot=results(0.0123)))
    assert re.search(r"oracle prompts</span>\s*<strong>Mean Dice 0.84</strong> \(zero-shot 0.01\) on 2 test", page)
    assert "oracle prompts: one point a class and slice, the furthest from the boundary, drawn from the truth" in page
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


def test_overlays_show_the_slice_with_most_of_the_truth(tmp_path):
    label = np.zeros((6, 5, 4), np.uint8)  # (i, j, k): axial slices along k
    label[1, 1, 0], label[1:4, 1:3, 2] = 1, 1
    for name, array in (("imagesTr/a_0000", label * 100.0), ("labelsTr/a", label), ("masks/a", label * 0)):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(array, np.diag([1, 1, 3, 1])), path)
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))

    scores = {"cases": [{"id": "a", "class": "one", "dice": 0.25}]}
    save_case_overlays(tmp_path / "out", scores, open_dataset(tmp_path), tmp_path / "masks", Window(), "axial")
    assert json.loads((tmp_path / "out/cases.json").read_text()) == {"best": {"id": "a", "dice": 0.25, "slice": 2}}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best.png", "cases.json"]
