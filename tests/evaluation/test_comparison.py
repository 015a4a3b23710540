"""Runs side by side: what may stand in one column, what is the best, and whose the published rows are."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import wilcoxon

from cheaplunch.errors import UserError
from cheaplunch.evaluation.comparison import Comparison, compare
from cheaplunch.evaluation.evaluations import Run, mean_of_runs, read_runs
from cheaplunch.evaluation.formats import FORMATS, csv_text, html, latex, markdown
from cheaplunch.evaluation.papers import find_tables, paper_tables
from cheaplunch.evaluation.protocols import Score
from cheaplunch.evaluation.tables import CaseScore, summarise

ORGANS = ("aorta", "gallbladder", "kidney_left", "kidney_right", "liver", "pancreas", "spleen", "stomach")


def run(name, dice, *, hd95=5.0, protocol="strict", prompts="furthest", classes=("liver", "spleen"), **more) -> Run:
    """A run with one figure a case: dice is a list, by case, of Dice for every class."""
    scores = [Score(dice=value, iou=value / 2, hd95=hd95, nsd=value) for value in dice]
    first = more.pop("first_case", 0)
    rows = [CaseScore(f"case{first + n}", class_, score) for n, score in enumerate(scores) for class_ in classes]
    said = {"backbone": "lite-medsam", "method": "cheap-lunch", "unit": "mm", "nsd_tolerance": 2.0}
    patients = {row.case_id: row.case_id for row in rows}
    result = summarise(
        rows,
        protocol=protocol,
        prompts=prompts,
        oracle_prompts=prompts != "auto",
        patients=patients,
        rng=np.random.default_rng(0),
        **said,
    )
    return Run(name, f"{name}.json", result | more)


def shown(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Row's label → heading → text, the best with an asterisk."""
    return {
        row.label: {
            column.heading: cell.text + "*" * cell.best for column, cell in zip(block.columns, row.cells, strict=True)
        }
        for block in comparison.blocks
        for group in block.groups
        for row in group.rows
    }


# -------------------------------------------------------------------- what may be compared


def test_figures_of_runs_and_the_best_of_each_column():
    rows = shown(compare([run("a", [0.5, 0.7], hd95=3.0), run("b", [0.6, 0.7], hd95=4.0)]))
    assert rows["a"]["mean Dice"] == "0.600"
    assert rows["b"]["mean Dice"] == "0.650*"
    assert rows["b"]["liver"] == "0.650*"
    assert rows["a"]["mean HD95 (mm)"] == "3.0*"
    assert rows["b"]["cases"] == "2"


def test_equals_are_all_the_best():
    rows = shown(compare([run("a", [0.5]), run("b", [0.5]), run("c", [0.4])]))
    assert [rows[name]["liver"] for name in "abc"] == ["0.500*", "0.500*", "0.400"]


def test_other_metrics_bring_their_direction_and_unit():
    runs = [run("a", [0.5], hd95=3.0), run("b", [0.6], hd95=9.0)]
    by_distance = shown(compare(runs, "hd95"))
    assert by_distance["a"]["mean HD95 (mm)"] == "3.0*"
    assert by_distance["a"]["spleen"] == "3.0*"
    assert by_distance["b"]["mean Dice"] == "0.600*"
    assert "mean NSD at 2 mm" in shown(compare(runs, "nsd"))["a"]
    with pytest.raises(UserError, match="--metric brightness"):
        compare(runs, "brightness")


def test_protocols_never_share_a_table():
    comparison = compare([run("a", [0.5]), run("b", [0.9], protocol="paper"), run("c", [0.4])])
    strict, paper = comparison.blocks
    assert (strict.heading, paper.heading) == ("Protocol strict", "Protocol paper")
    assert [row.label for group in strict.groups for row in group.rows] == ["a", "c"]
    assert "mean HD95 (px)" in [column.heading for column in paper.columns]
    assert shown(comparison)["b"]["mean Dice"] == "0.900"  # alone, so not the best


def test_nsd_at_another_tolerance_is_another_table():
    other = run("b", [0.9], nsd_tolerance=5.0)
    assert [block.key for block in compare([run("a", [0.5]), other], "nsd").blocks] == [
        "strict, NSD at 2 mm",
        "strict, NSD at 5 mm",
    ]
    assert len(compare([run("a", [0.5]), other], "dice").blocks) == 1


def test_prompted_and_automatic_rows_are_not_held_against_each_other():
    comparison = compare([run("a", [0.9]), run("b", [0.5], prompts="auto"), run("c", [0.6], prompts="auto")])
    (block,) = comparison.blocks
    assert [(group.oracle, [row.label for row in group.rows]) for group in block.groups] == [
        (True, ["a"]),
        (False, ["b", "c"]),
    ]
    assert block.groups[0].prompts.startswith("oracle prompts: one point")
    assert block.groups[1].prompts == "no prompts"
    rows = shown(comparison)
    assert [rows[name]["mean Dice"] for name in "abc"] == ["0.900", "0.500", "0.600*"]


def test_wider_boxes_are_other_prompts():
    tight, wide = run("a", [0.9], prompts="box"), run("b", [0.8], prompts="box", box_margin_px=5.0)
    (block,) = compare([tight, wide]).blocks
    assert [group.prompts.rpartition(", ")[2] for group in block.groups] == ["drawn from the truth", "box margin 5 px"]


def test_runs_of_one_row_are_their_mean_with_its_spread(tmp_path):
    # Means 0.6, 0.8 and 0.7: mean 0.7, standard deviation 0.1; case by case (0.5 + 0.9 + 0.7) / 3 and 0.7.
    seeds = [run("a", [0.5, 0.7]), run("b", [0.9, 0.7]), run("c", [0.7, 0.7])]
    paths = []
    for seed in seeds:
        paths.append(tmp_path / seed.source)
        paths[-1].write_text(json.dumps(seed.result), encoding="utf-8")
    [row] = read_runs(["ours=" + ",".join(map(str, paths))])
    assert [case["dice"] for case in row.result["cases"] if case["class"] == "liver"] == pytest.approx([0.7, 0.7])
    table = compare([row, run("other", [0.4, 0.5])])
    assert shown(table)["ours"]["mean Dice"] == "0.700 ± 0.100*"
    assert shown(table)["ours"]["liver"] == "0.700*"
    assert "The mean of 3 runs, case by case." in table.footnotes
    assert "mean Dice spread [strict]" in csv_text(table)


@pytest.mark.parametrize(
    ("other", "said"),
    [(run("b", [0.5]), "other cases"), (run("b", [0.5, 0.7], prompts="box"), "differ in prompts")],
)
def test_no_mean_is_taken_of_runs_that_are_not_alike(other, said):
    with pytest.raises(UserError, match=said):
        mean_of_runs({"a.json": run("a", [0.5, 0.7]).result, "b.json": other.result})


def test_p_is_the_paired_test_over_patients_against_the_groups_first_row():
    a, b = [0.5, 0.6, 0.7, 0.8, 0.6, 0.7, 0.75], [0.6, 0.65, 0.69, 0.88, 0.72, 0.73, 0.77]
    comparison = compare([run("a", a), run("b", b), run("auto", b, prompts="auto")])
    rows = shown(comparison)
    assert rows["b"]["p"] == f"{wilcoxon(a, b).pvalue:.3f}"
    assert rows["a"]["p"] == rows["auto"]["p"] == "–"
    assert any("Wilcoxon" in remark for remark in comparison.remarks)
    alone = compare([run("a", a)])
    assert "p" not in shown(alone)["a"]
    assert not any("Wilcoxon" in remark for remark in alone.remarks)


def test_rows_on_other_cases_do_not_compete_and_say_so():
    a, b = run("a", [0.5, 0.6, 0.7]), run("b", [0.9, 0.9, 0.9], first_case=1)
    comparison = compare([a, b])
    rows = shown(comparison)
    assert [rows[name]["mean Dice"] for name in "ab"] == ["0.600", "0.900"]
    assert comparison.footnotes == ("Shares 2 of the 3 cases of a, so its figures do not compete.",)
    assert rows["b"]["p"] == f"{wilcoxon([0.6, 0.7], [0.9, 0.9]).pvalue:.3f}"  # over the two that both have


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (run("b", [0.5], classes=("head",)), "a.json and b.json are of different data: classes liver, spleen against"),
        (run("b", [0.5], first_case=9), "a.json and b.json are of different data: they share no case"),
        (run("b", [0.5], dataset="amos"), "a.json and b.json are of different data: chaos against amos"),
    ],
)
def test_different_data_are_refused(other, said):
    with pytest.raises(UserError, match=said):
        compare([run("a", [0.5], dataset="chaos"), other])


def test_a_single_class_has_one_column_and_stands_in_the_title():
    comparison = compare([run("a", [0.5], classes=("head",))])
    assert comparison.title == "Comparison · head"
    assert list(shown(comparison)["a"]) == ["cases", "mean Dice", "mean HD95 (mm)"]


# -------------------------------------------------------------------- the papers' rows


def test_published_rows_join_runs_of_their_data_set_classes_and_protocol():
    ours = run("ours", [0.80, 0.82], protocol="paper", classes=ORGANS, dataset="Dataset01_Synapse")
    comparison = compare([ours], tables=find_tables("cheap-lunch:2"))
    (block,) = comparison.blocks
    furthest, auto = block.groups
    assert [row.label for row in furthest.rows][:2] == ["ours", "Cheap Lunch, Table 2: SAM"]
    assert [row.label for row in auto.rows][0] == "Cheap Lunch, Table 2: Att-UNet [18], Total Num"
    rows = shown(comparison)
    best = rows["Cheap Lunch, Table 2: Full Set, Total Num"]
    assert (best["mean Dice"], best["mean HD95 (px)"]) == ("0.8595*", "8.97")
    assert (best["kidney_left"], best["cases"]) == ("0.9249*", "–")
    assert rows["ours"]["mean HD95 (px)"] == "5.0*"
    published = furthest.rows[1]
    assert published.published
    note = comparison.footnotes[published.notes[0] - 1]
    assert note.startswith("Cheap Lunch, Table 2, on Synapse, protocol paper: as published, not run here;")


def test_published_rows_of_a_single_class_join_too():
    ours = run("ours", [0.8], protocol="paper", classes=("whole_tumour",), dataset="brats2018")
    (block,) = compare([ours]).blocks
    assert [column.heading for column in block.columns] == ["cases", "mean Dice", "mean HD95 (px)"]
    assert {row.origin.partition(", as")[0] for group in block.groups for row in group.rows} == {
        "run here",
        *(f"Cheap Lunch, Table {number}" for number in (1, 3, 5)),
    }


def test_the_data_sets_name_brings_its_tables_and_nothing_else_does():
    def blocks(**more):
        return [block.key for block in compare([run("a", [0.5], classes=ORGANS, **more)]).blocks]

    assert blocks() == ["strict"]
    assert blocks(dataset="liver set") == ["strict"]
    assert blocks(dataset="synapse") == ["strict", "cheap-lunch:2", "cheap-lunch:4", "cheap-lunch:6"]
    assert blocks(dataset="synapse", protocol="paper") == ["paper"]


@pytest.mark.parametrize(
    ("more", "remark"),
    [
        ({"classes": ORGANS}, "Data: Synapse, the runs' data, under another protocol"),
        ({"protocol": "paper"}, "Data: Synapse, other data than the runs'"),
        ({"classes": ORGANS, "protocol": "paper", "dataset": "amos"}, "Data: Synapse, other data than the runs'"),
    ],
)
def test_published_rows_that_do_not_belong_have_a_table_of_their_own(more, remark):
    comparison = compare([run("a", [0.99], **more)], tables=find_tables("cheap-lunch:2"))
    ours, theirs = comparison.blocks
    assert remark in theirs.remarks[1]
    assert theirs.remarks[1].startswith("As published, not run here.")
    assert [column.heading for column in theirs.columns][:3] == ["DSC", "HD", "Aorta"]
    assert sum(len(group.rows) for group in theirs.groups) == 11
    assert not any(cell.best for cell in ours.groups[0].rows[0].cells)


def test_slips_are_footnotes_of_their_rows():
    comparison = compare([run("a", [0.5])], tables=find_tables("cheap-lunch:6"))
    (row,) = [
        row for group in comparison.blocks[1].groups for row in group.rows if row.label == "Ours, 1 (one exemplar)"
    ]
    said = [comparison.footnotes[number - 1] for number in row.notes[1:]]
    assert said == [
        "Cheap Lunch, Table 6: DSC is printed as 72.88, but the mean of its row is 71.07.",
        "Cheap Lunch, Table 6: Pancreas and Stomach are equal, 50.72, which looks copied.",
    ]


def test_every_published_table_can_stand_beside():
    comparison = compare([run("a", [0.5])], tables=list(paper_tables().values()))
    assert len(comparison.blocks) == 10
    for to_text in FORMATS.values():
        assert to_text(comparison)


# -------------------------------------------------------------------- formats


@pytest.fixture(scope="module")
def mixed() -> Comparison:
    """Two protocols, two kinds of prompts, published rows, and a name that each format must escape."""
    runs = [
        run("a_<b>|50%&$ *x*", [0.5, 0.6], dataset="synapse", classes=ORGANS),
        run("plain", [0.7, 0.4], dataset="synapse", classes=ORGANS),
        run("auto", [0.3, 0.2], protocol="paper", prompts="auto", dataset="synapse", classes=ORGANS),
    ]
    return compare(runs)


def test_markdown_tables_are_rectangular_and_marked(mixed):
    text = markdown(mixed)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(tables) == sum(len(block.groups) for block in mixed.blocks)
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    assert "## Protocol strict" in text
    assert "**Oracle prompts: one point a class and slice" in text
    assert r"a\_\<b>\|50%&$ \*x\*" in text
    assert "**0.600**" not in text
    assert "| **0.550** [" in text
    assert "as published, not run here" in text


def test_csv_is_one_table_in_which_no_column_mixes_protocols(mixed):
    rows = list(csv.DictReader(io.StringIO(csv_text(mixed))))
    assert len(rows) == sum(len(group.rows) for block in mixed.blocks for group in block.groups)
    first, _, auto, *published = rows
    assert first["row"] == "a_<b>|50%&$ *x*"
    assert float(first["mean Dice [strict]"]) == pytest.approx(0.55)
    low, high = (float(first[f"mean Dice {end} [strict]"]) for end in ("low", "high"))
    assert low < 0.55 < high
    assert float(first["kidney_left Dice [strict]"]) == pytest.approx(0.55)
    assert first["mean Dice [paper]"] == auto["mean Dice [strict]"] == ""
    assert float(auto["mean Dice [paper]"]) == 0.25
    assert auto["oracle_prompts"] == "false"
    ours = next(row for row in published if row["row"].endswith("Table 2: Ours, 18 (one per volume)"))
    assert (ours["mean Dice [paper]"], ours["origin"]) == ("0.8304", "Cheap Lunch, Table 2, as published")
    assert "not run here" in ours["notes"]


def test_latex_rows_have_the_columns_they_declare(mixed):
    text = latex(mixed)
    tables = re.findall(r"\\begin\{tabular\*\}.*?\\fill\}\}(lr*)\}(.*?)\\end\{tabular\*\}", text, flags=re.S)
    assert len(tables) == len(mixed.blocks)
    for declared, body in tables:
        lines = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(declared)}
    assert r"a\_\textless{}b\textgreater{}\textbar{}50\%\&\$ *x*" in text
    assert r"\textbf{0.550}" in text
    assert text.count("{") == text.count("}")
    assert text.isascii()


class Page(HTMLParser):
    """Text of cells, and what a page asks the network for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.cells += [""] if tag in ("td", "th") else []
        self.asked += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_html_is_whole_escaped_and_asks_for_nothing(mixed):
    page = Page(html(mixed))
    assert page.open == []
    assert page.asked == []
    assert "a_<b>|50%&$ *x*" in page.cells
    assert any(cell.startswith("oracle prompts one point a class and slice") for cell in page.cells)
    assert any(re.match(r"0\.550 \[[01]\.\d{3}, [01]\.\d{3}\]$", cell) for cell in page.cells)
