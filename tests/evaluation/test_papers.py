"""The papers' tables as data: all there, as printed, with every average that is not the mean of its row listed."""

import re
from decimal import Decimal
from pathlib import Path

import pytest

from cheaplunch.errors import UserError
from cheaplunch.evaluation.papers import MEAN, class_key, find_tables, paper_tables

PAPERS = Path(__file__).parents[3] / "shared" / "papers"


def test_nine_tables_of_the_papers_sizes():
    sizes = {name: (len(table.rows), len(table.columns)) for name, table in paper_tables().items()}
    assert sizes == {
        "cheap-lunch:1": (9, 2),
        "cheap-lunch:2": (11, 10),
        "cheap-lunch:3": (6, 2),
        "cheap-lunch:4": (6, 10),
        "cheap-lunch:5": (5, 2),
        "cheap-lunch:6": (6, 10),
        "msa:1": (12, 16),
        "msa:2": (12, 13),
        "msa:3": (15, 7),
    }
    for table in paper_tables().values():
        assert all(len(row.cells) == len(table.columns) for row in table.rows)
        assert len({row.label for row in table.rows}) == len(table.rows)


def test_printed_averages_are_their_rows_means_but_for_the_known_slips():
    slips = {}
    for table in paper_tables().values():
        means = [place for place, c in enumerate(table.columns) if (c.metric, c.of) == ("dice", MEAN)]
        parts = [place for place, column in enumerate(table.columns) if column.of != MEAN]
        if not (means and parts):
            continue
        for row in table.rows:
            cells = [Decimal(cell) for cell in row.cells]
            printed, mean = cells[means[0]], sum((cells[place] for place in parts), Decimal(0)) / len(parts)
            last_digit = Decimal(1).scaleb(printed.as_tuple().exponent)
            if abs(mean - printed) > last_digit / 2:
                slips[table.name, row.label] = (float(printed), pytest.approx(float(mean), abs=1e-4))
                (note,) = [note for note in row.notes if "printed" in note]
                assert f"is printed as {printed}, but the mean of its row is" in note
                said = Decimal(re.search(r"row is ([\d.]+)\.", note)[1])
                assert abs(said - mean) <= last_digit / 2
            else:
                assert not any("is printed as" in note for note in row.notes)
    assert slips == {
        ("cheap-lunch:6", "Ours, 1 (one exemplar)"): (72.88, 71.0662),
        ("cheap-lunch:6", "Ours, 36 (two per volume)"): (81.25, 81.335),
        ("cheap-lunch:6", "Full Set, Total Nums"): (85.06, 84.06),
        ("msa:1", "UNetr"): (0.762, 0.7874),
        ("msa:1", "nnUNet"): (0.878, 0.8775),
        ("msa:1", "SAM, 1 point"): (0.493, 0.5011),
        ("msa:1", "SAM, 3 points"): (0.542, 0.5475),
        ("msa:1", "SAM, 10 points"): (0.699, 0.6971),
        ("msa:1", "MSA, 1-point"): (0.893, 0.8968),
        ("msa:2", "TransUNet"): (0.838, 0.8368),
        ("msa:2", "SegDiff"): (0.847, 0.8478),
        ("msa:2", "SAM, 3 points"): (0.631, 0.6053),
        ("msa:2", "MedSAM, 1 point"): (0.803, 0.8039),
        ("msa:2", "MSA, 1 point"): (0.883, 0.8842),
    }


@pytest.mark.parametrize(
    ("name", "label", "metric", "of", "value"),
    [
        ("cheap-lunch:1", "Ours, 150 (1%)", "dice", MEAN, "0.834"),
        ("cheap-lunch:1", "SAMed (w/ Data Synthesis), Total Num", "hd95", MEAN, "31.13"),
        ("cheap-lunch:2", "Ours, 18 (one per volume)", "dice", "gallbladder", "0.7133"),
        ("cheap-lunch:2", "SAMed, 9 (one per two volumes)", "dice", "liver", "0.8132"),
        ("cheap-lunch:3", "w/o Data Synthesis, 75 (0.5%)", "dice", MEAN, "0.6814"),
        ("cheap-lunch:4", "w/o Data Synthesis, 36 (three per volume)", "dice", "stomach", "0.8120"),
        ("cheap-lunch:5", "Full Set, Total Num", "hd95", MEAN, "7.92"),
        ("cheap-lunch:6", "SAM", "dice", "right kidney", "0.8255"),
        ("msa:1", "SAM, 1 point", "dice", "right adrenal gland", "0.085"),
        ("msa:2", "MSA, 1 point", "dice", "portal splenic veins", "0.811"),
        ("msa:3", "TransBTS", "iou", "brain tumor", "0.7844"),
        ("msa:3", "MSA", "hd95", "brain tumor", "12.46"),
    ],
)
def test_figures_as_printed_with_dice_and_iou_as_shares(name, label, metric, of, value):
    table = paper_tables()[name]
    (row,) = [row for row in table.rows if row.label == label]
    assert str(table.figures(row)[metric, of]) == value


def test_a_dash_is_no_figure():
    table = paper_tables()["msa:3"]
    (row,) = [row for row in table.rows if row.label == "SAM, 3 points"]
    assert {of for _, of in table.figures(row)} == {"brain tumor"}


def test_who_had_prompts():
    prompts = {
        name: {row.label: (row.prompts, row.oracle_prompts) for row in table.rows}
        for name, table in paper_tables().items()
    }
    assert prompts["cheap-lunch:2"]["Ours, 18 (one per volume)"] == ("furthest", True)
    assert prompts["cheap-lunch:2"]["SAMed, Total Num"] == ("auto", False)
    assert prompts["cheap-lunch:6"]["Full Set, Total Nums"] == ("random", True)
    assert prompts["msa:1"]["SAM, 10 points"] == ("points:10", True)
    assert prompts["msa:3"]["MSA"] == ("unknown", False)


def test_the_ablation_repeats_the_main_tables_rows():
    tables = paper_tables()
    for main, ablation in (("cheap-lunch:1", "cheap-lunch:3"), ("cheap-lunch:2", "cheap-lunch:4")):
        ours = [row.cells for row in tables[main].rows if row.method == "Ours" and not row.setting.startswith("1 ")]
        assert [row.cells for row in tables[ablation].rows if row.method.startswith("w/ ")] == ours


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("kidney_left", "Kidney(L)"),
        ("left kidney", "L kidney"),
        ("whole_tumour", "whole tumor"),
        ("postcava", "inferior vena cava"),
        ("gall bladder", "Gallbladder"),
        ("Portal vein and splenic vein", "portal splenic veins"),
    ],
)
def test_one_class_in_two_spellings(ours, theirs):
    assert class_key(ours) == class_key(theirs)


def test_left_is_not_right():
    assert class_key("kidney_left") != class_key("kidney_right")
    table = paper_tables()["cheap-lunch:2"]
    organs = ["spleen", "stomach", "liver", "aorta", "pancreas", "gallbladder", "kidney_left"]
    assert table.has_classes(dict.fromkeys([*organs, "kidney_right"]))
    assert not table.has_classes(dict.fromkeys(organs))


def test_data_sets_by_name():
    synapse, brats = paper_tables()["cheap-lunch:2"], paper_tables()["cheap-lunch:1"]
    assert synapse.is_on("Dataset012_Synapse")
    assert brats.is_on("brats-2018")
    assert not brats.is_on("BraTS 2021")
    assert not synapse.is_on("BTCV")


def test_tables_by_name():
    assert [table.name for table in find_tables("msa:1, cheap-lunch:2,msa:1")] == ["msa:1", "cheap-lunch:2"]
    with pytest.raises(UserError, match="--papers cheap-lunch:7: no such table"):
        find_tables("cheap-lunch:2,cheap-lunch:7")


@pytest.mark.real
def test_every_cell_stands_in_the_papers_text():
    """In the order of the papers' own rows, which pins each cell to its column."""
    if not PAPERS.is_dir():
        pytest.skip(f"{PAPERS} is not here")
    texts = {"cheap-lunch": "cheap-lunch.txt", "msa": "medical-sam-adapter.txt"}
    for name, table in paper_tables().items():
        paper, number = name.split(":")
        text = (PAPERS / texts[paper]).read_text(encoding="utf-8")
        body = re.split(rf"^Table {number}[.:] ", text, flags=re.M)[1]
        body = re.split(r"^Table \d[.:] ", body, flags=re.M)[0]
        lines = [re.split(r"\s*[|\t]\s*", line.strip("| ")) for line in body.splitlines() if re.search(r"[|\t]", line)]
        numbers = [tuple(cells[-len(table.columns) :]) for cells in lines]
        printed = [row for row in numbers if all(re.fullmatch(r"[\d.]+|-", cell) for cell in row)]
        assert [row.cells for row in table.rows] == printed, name
