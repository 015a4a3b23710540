"""`cheaplunch compare` end to end: masks on disk, scored by `evaluate`, side by side as tables and as a picture."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from cheaplunch.__main__ import main

LABELS = {"background": 0, "disc": 1, "block": 2}


def truth(n: int) -> np.ndarray:
    """(24, 24, 4) uint8: a disc and a block that grow with the slice."""
    label = np.zeros((24, 24, 4), np.uint8)
    x, y = np.mgrid[:24, :24]
    for z in range(4):
        label[(x - 7 - n % 3) ** 2 + (y - 8) ** 2 < (2 + z) ** 2, z] = 1
        label[15 : 17 + z, 14:20, z] = 2
    return label


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("compare") / "data"
    about = {"name": "shapes", "channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nii.gz"}
    for side, cases in (("Tr", ["t"]), ("Ts", [f"c{n}" for n in range(6)])):
        for kind in (f"images{side}", f"labels{side}"):
            (root / kind).mkdir(parents=True)
        for n, id_ in enumerate(cases):
            label = truth(n)
            image = np.random.default_rng(n).normal(100, 5, label.shape) + 50 * label
            nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), root / f"images{side}/{id_}_0000.nii.gz")
            nib.save(nib.Nifti1Image(label, np.eye(4)), root / f"labels{side}/{id_}.nii.gz")
    (root / "dataset.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    """A folder with the masks of two tools, good/ and thin/, and their evaluations under both protocols."""
    root = tmp_path_factory.mktemp("made")
    for name in ("good", "thin"):
        (root / name).mkdir()
        for n in range(6):
            label = truth(n)
            if name == "thin":
                label = ndimage.grey_erosion(label, (3, 3, 1))
            elif n:
                label[7, 8] = 0  # so that they differ by patient
            nib.save(nib.Nifti1Image(label, np.eye(4)), root / name / f"c{n}.nii.gz")
        words = ["evaluate", "--predictions", root / name, "--label", name, "--data", data]
        out = ["--protocol", "strict,paper", "--out", root / f"{name}.json"]
        assert main([str(word) for word in (*words, *out)]) == 0
    return root


def compared(made: Path, tmp_path: Path, *more: object, out: str = "table.md") -> str:
    """What `compare` writes of both tools and of `more`: further files, then flags."""
    words = ["compare", made / "good.json", made / "thin.json", *more, "--out", tmp_path / out]
    assert main([str(word) for word in words]) == 0
    return (tmp_path / out).read_text(encoding="utf-8")


def test_a_table_of_two_tools(made, tmp_path, capsys):
    text = compared(made, tmp_path)
    good = json.loads((made / "good.json").read_text())["mean"]["dice"]
    assert f"**{good:.3f}**" in text
    (thin,) = [line for line in text.splitlines() if line.startswith("| thin")]
    assert "| 0.031 |" in thin  # 2 / 2 ** 6: six patients, all of one sign
    assert "not run here" not in text
    assert capsys.readouterr().out == f"table: {tmp_path / 'table.md'}\n"


@pytest.mark.parametrize("ending", ["md", "csv", "tex", "html"])
def test_a_papers_table_beside_in_every_format(made, tmp_path, ending):
    text = compared(made, tmp_path, "--papers", "cheap-lunch:2,msa:1", out=f"table.{ending}")
    assert "Ours, 18 (one per volume)" in text
    assert "0.8304" in text
    assert "as published, not run here" in text
    assert "printed as 0.893, but the mean of its row is 0.897" in text


def test_two_protocols_of_the_same_masks_stand_apart(made, tmp_path):
    text = compared(made, tmp_path, made / "thin.paper.json")
    assert text.index("## Protocol strict") < text.index("## Protocol paper")
    assert text.count("| thin") == 2


def test_rows_are_named_and_default_names_kept_apart(made, tmp_path):
    named = compared(made, tmp_path, f"our own={made / 'thin.json'}")
    assert "| our own |" in named
    (made / "again.json").write_bytes((made / "good.json").read_bytes())
    same = compared(made, tmp_path, made / "again.json", made / "good.paper.json")
    assert [f"| good{more} |" in same for more in (" (good)", " (again)", "")] == [True] * 3


def test_the_figure_shows_image_truth_and_each_run(data, made, tmp_path):
    figure = tmp_path / "figure.png"
    masks = ["--masks", f"good={made / 'good'}", f"thin={made / 'thin'}"]
    compared(made, tmp_path, *masks, "--data", data, "--figure", figure, "--slices", "c0:3", "c2")
    with Image.open(figure) as picture:
        assert picture.width == pytest.approx((0.2 + 4 * 1.5) * 300, abs=2)
        assert picture.height > 2 * 1.5 * 300
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[5, 5] == 255).all()  # white ground
    # The first row's panels, by their share of colour: none in the image, less in the eroded masks than in the truth.
    row = pixels[80:520]
    panels = [row[:, int((0.2 + 1.5 * n) * 300) : int((0.2 + 1.5 * (n + 1)) * 300)] for n in range(4)]
    coloured = [(np.ptp(panel.astype(int), axis=-1) > 20).mean() for panel in panels]
    assert coloured[0] == 0
    assert coloured[1] == pytest.approx(coloured[2], abs=0.01)
    assert coloured[3] < 0.8 * coloured[1]


# ---- wrong input: one line that names the file or flag, and nothing is written


def said(capsys, words: list[object]) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_wrong_input(data, made, tmp_path, capsys):
    good, out = made / "good.json", tmp_path / "table.md"
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "half.json").write_text('{"protocol": ')
    other = json.loads(good.read_text())
    other["cases"] = [row | {"id": f"x{row['id']}"} for row in other["cases"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    drawing = ["--data", data, "--figure", tmp_path / "f.png"]
    for words, naming in [
        ([tmp_path / "none.json"], "none.json cannot be read"),
        ([tmp_path / "list.json"], "list.json is no evaluation"),
        ([tmp_path / "half.json"], "half.json is not JSON"),
        ([data / "dataset.json"], "dataset.json is no evaluation: it lacks protocol"),
        ([good, tmp_path / "other.json"], "other.json are of different data"),
        ([f"a={good}", f"a={good}"], "two rows are called a (good)"),
        ([f"a={good},{good}"], "a file is there twice"),
        ([good, "--papers", "cheap-lunch:9"], "--papers cheap-lunch:9: no such table"),
        ([good, "--papers", "msa:1", "--no-papers"], "--no-papers"),
        ([good, "--metric", "beauty"], "--metric beauty"),
        ([good, "--figure", tmp_path / "f.png"], "--figure needs --data DIR and --masks"),
        ([good, "--masks", f"a={made / 'good'}"], "--figure FILE.png"),
        ([good, "--masks", made / "good", *drawing], "write NAME=DIR"),
        ([good, "--masks", f"a={tmp_path / 'nowhere'}", *drawing], "there is no folder"),
        ([good, "--masks", f"a={tmp_path}", *drawing], "c0.nii.gz is missing"),
        ([good, "--masks", f"a={made / 'good'}", *drawing, "--slices", "c9:1"], "--slices c9"),
        ([good, "--masks", f"a={made / 'good'}", *drawing, "--slices", "c1:4"], "slices 0 to 3"),
        ([good, "--masks", f"a={made / 'good'}", *drawing, "--slices", "c1:x"], "write CASE:NUMBER"),
    ]:
        assert naming in said(capsys, ["compare", *words, "--out", out])
    assert "unknown ending" in said(capsys, ["compare", good, "--out", tmp_path / "table.xlsx"])
    assert not out.exists()
    assert not (tmp_path / "f.png").exists()
