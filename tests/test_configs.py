"""Every published row has settings behind it that load, and they are the paper's."""

import re

import pytest

from cheaplunch.config import build_config, load_config, save_config, settings
from cheaplunch.errors import UserError
from cheaplunch.evaluation.papers import paper_tables
from cheaplunch.reproduction import experiments, find_experiments, published_settings

EVERY_ROW = [row for rows in experiments().values() for row in rows]
ROWS = [row for row in EVERY_ROW if row.table.name.startswith("cheap-lunch")]
MSA_ROWS = [row for row in EVERY_ROW if row.table.name.startswith("msa")]
PROMPT_FREE = {"samed", "attention-unet"}


def by_address(row) -> str:
    return row.address


def test_all_rows_of_the_papers_nine_tables_are_there_in_order():
    assert list(experiments()) == list(paper_tables())
    for name, rows in experiments().items():
        assert list(dict.fromkeys(row.published for row in rows)) == list(paper_tables()[name].rows)
        assert len({row.name for row in rows}) == len(rows)
        if name != "msa:3":  # on several data sets
            assert len(rows) == len(paper_tables()[name].rows)
            assert {row.classes for row in rows} == {paper_tables()[name].classes}
    assert len(ROWS) == 9 + 11 + 6 + 6 + 5 + 6
    assert len({row.run for row in ROWS}) == 12 + 14  # what has to be run


@pytest.mark.parametrize("row", [row for row in EVERY_ROW if row.offered], ids=by_address)
def test_a_row_is_the_settings_of_a_run(row, tmp_path):
    assert row.settings.keys() <= settings().keys() | {"method"}
    config = row.config({})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config == build_config(row.method, {k: v for k, v in row.settings.items() if k != "method"})
    assert published_settings(row.address) == row.settings


@pytest.mark.parametrize("row", ROWS, ids=by_address)
def test_a_row_s_settings_are_what_its_label_says(row):
    """Counts and prompts as printed beside the figures."""
    assert row.offered
    count = re.match(r"\d+", row.published.setting)
    if count:
        assert row.settings["exemplars"] == int(count[0])
    elif row.published.setting.startswith("Total Num"):
        assert (row.settings["strategy"], row.settings["real_share"]) == ("all", 1)
    else:
        assert (row.settings["method"], row.settings["backbone"]) == ("zero-shot", "sam-vit-h")
    drawn = "random" if row.table.number in (5, 6) else "furthest"
    assert str(row.prompting) == ("auto" if row.method in PROMPT_FREE else drawn)
    assert "w/o" not in row.published.method or row.settings["real_share"] == 1


OURS = [row for row in ROWS if row.method in ("cheap-lunch", "full-set")]


@pytest.mark.parametrize("row", OURS, ids=by_address)
def test_what_the_paper_states_of_its_own_method(row):
    config = row.config({})
    training = config.training
    assert (training.ce_weight, training.dice_weight, training.learning_rate) == (1, 0.8, 0.001)  # §3.3
    assert (config.model.backbone, config.model.lora_rank, config.model.decoder_tuning) == ("sam-vit-b", 4, "lora")
    assert (training.prompts_per_image, training.furthest_share) == (1, 0)  # §2.2: one class, one random point
    if config.synthesis.real_share == 0:
        assert config.synthesis.synthetic == {"brats": 4500, "synapse": 1800}[row.data]  # §3.3
        assert config.data.strategy == {"brats": "random", "synapse": "most-classes"}[row.data]  # §3.2
        epochs = training.steps * training.batch_size / config.synthesis.synthetic
        assert epochs == 160  # SAMed's, where the paper says nothing
    else:
        assert config.synthesis.synthetic == training.steps * training.batch_size


@pytest.mark.parametrize("row", [row for row in ROWS if row.method == "samed"], ids=by_address)
def test_samed_is_trained_as_its_authors_did(row):
    config = row.config({})
    training, model = config.training, config.model
    assert (training.ce_weight, training.dice_weight, training.learning_rate) == (0.2, 0.8, 0.005)
    assert (training.batch_size, training.warmup_steps, training.weight_decay) == (24, 250, 0.1)
    assert (training.decay, training.final_lr) == ("polynomial", pytest.approx(0.2**0.9, abs=5e-4))  # 160 of 200
    assert (model.backbone, model.image_size, model.pixels) == ("sam-vit-b", 512, "as-they-are")
    [ours] = {r.config({}).training.steps for r in ROWS if r.data == row.data and r.method == "cheap-lunch"}
    assert training.steps == ours


def test_msa_s_third_table_is_on_the_data_sets_of_the_text():
    rows = [row for row in experiments()["msa:3"] if row.offered]
    targets = {row.data: row.classes for row in rows}
    assert targets == {
        "brats": ("brain tumor",),
        "refuge": ("optic cup",),
        "riga": ("optic cup",),
        "tn-scui": ("thyroid nodule",),
        "ddti": ("thyroid nodule",),
        "isic": ("lesion",),  # in the text, but in no table
    }
    for data in targets:
        names = ["transunet", "unetr", "swin-unetr", "sam-1", "sam-3", "msa"]
        assert [row.name for row in rows if row.data == data] == [f"{data}-{name}" for name in names]


@pytest.mark.parametrize("row", MSA_ROWS, ids=by_address)
def test_what_msa_s_rows_are(row):
    """Methods and prompts by the label; what is not offered says why."""
    label = row.published.label
    if not row.offered:
        assert row.published.method in (
            *("EnsDiff", "EnsemDiff", "SegDiff", "MedSegDiff", "MedsegDiff", "nnUNet"),
            *("ResUnet", "BEAL", "TransBTS", "MTSeg", "UltraUNet"),
        )
        assert row.why_not_offered.startswith(f"the method {row.method} is not offered: it ")
        return
    count = re.search(r"(\d+).points?$", label)
    assert str(row.prompting) == (f"clicks:{count[1]}" if count else "clicks:1" if label == "MSA" else "auto")
    config, volumes = row.config({}), row.data in ("amos", "btcv", "brats")
    assert (
        row.method
        == {
            "SAM": "zero-shot",
            "MedSAM": "medsam",
            "MSA": "msa",
            "TransUNet": "transunet",
            "UNetr": "unetr-3d" if volumes else "unetr",
            "Swin-UNetr": "swin-unetr-3d" if volumes else "swin-unetr",
        }[row.published.method]
    )
    if row.method in ("zero-shot", "medsam", "msa"):
        assert config.model.backbone == "sam-vit-h"  # §2.1
    if row.method == "zero-shot":
        return
    assert (config.data.strategy, config.synthesis.real_share) == ("all", 1)
    assert config.synthesis.synthetic >= config.training.steps * config.training.batch_size
    if row.method == "msa":
        assert config.model.tuning == "adapter" and config.model.training_prompts.startswith("clicks:")  # §2.2, §2.3
        assert config.model.adapter_parts == ("encoder", "decoder", "prompt", *(["depth"] if volumes else []))  # §2.2
        # SAM's own (its appendix A), whose training MSA's "is basically the same as"
        training = config.training
        assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (8e-4, 0.1, 250)


def test_rows_by_table_and_name():
    names = [row.address for row in find_experiments("cheap-lunch:2,cheap-lunch:4", ["ours-18", "without-18"])]
    assert names == ["cheap-lunch:2/ours-18", "cheap-lunch:4/without-18", "cheap-lunch:4/ours-18"]
    for words, rows, said in [
        ("cheap-lunch:7", None, "cheap-lunch:7: there is no such table; choose of: cheap-lunch:1, "),
        ("msa:3", ["msa"], "--rows msa: msa:3 has no such row; choose of: resunet, beal, "),
        ("cheap-lunch:1", ["ours-18"], "--rows ours-18: cheap-lunch:1 has no such row; choose of: sam, samed-75"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            find_experiments(words, rows)
    assert published_settings("some/folder/my.yaml") is None


def test_other_settings_in_place_of_a_row_s():
    [row] = find_experiments("cheap-lunch:2", ["ours-18"])
    few = row.config({"steps": 120, "backbone": "lite-medsam"})
    assert (few.training.steps, few.training.warmup_steps, few.model.backbone) == (120, 2, "lite-medsam")
    assert few.training.learning_rate == 0.001
    assert row.config({"steps": 120, "warmup_steps": 9}).training.warmup_steps == 9
    [sam] = find_experiments("cheap-lunch:2", ["sam"])  # nothing is trained
    assert sam.config({"steps": 120, "batch_size": 2, "synthetic": 9}) == sam.config({})
    assert sam.config({"image_size": 256, "precision": "fp32"}).training.precision == "fp32"
