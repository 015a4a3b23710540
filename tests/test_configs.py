"""Every published row has settings behind it that load, and they are the paper's."""

import re

import pytest

from cheaplunch.config import build_config, load_config, save_config, settings
from cheaplunch.errors import UserError
from cheaplunch.evaluation.papers import paper_tables
from cheaplunch.reproduction import experiments, find_experiments, published_settings

ROWS = [row for rows in experiments().values() for row in rows]
PROMPT_FREE = {"samed", "attention-unet"}


def by_address(row) -> str:
    return row.address


def test_all_rows_of_the_papers_six_tables_are_there_once_and_in_order():
    assert list(experiments()) == [f"cheap-lunch:{number}" for number in range(1, 7)]
    for name, rows in experiments().items():
        assert [row.published for row in rows] == list(paper_tables()[name].rows)
        assert len({row.name for row in rows}) == len(rows)
    assert len(ROWS) == 9 + 11 + 6 + 6 + 5 + 6
    assert len({(row.data, row.name) for row in ROWS}) == 12 + 14  # what has to be run


@pytest.mark.parametrize("row", ROWS, ids=by_address)
def test_a_row_is_the_settings_of_a_run(row, tmp_path):
    assert row.settings.keys() <= settings().keys() | {"method"}
    assert row.offered
    config = row.config({})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config == build_config(row.method, {k: v for k, v in row.settings.items() if k != "method"})
    assert published_settings(row.address) == row.settings


@pytest.mark.parametrize("row", ROWS, ids=by_address)
def test_a_row_s_settings_are_what_its_label_says(row):
    """Counts and prompts as printed beside the figures."""
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


def test_rows_by_table_and_name():
    names = [row.address for row in find_experiments("cheap-lunch:2,cheap-lunch:4", ["ours-18", "without-18"])]
    assert names == ["cheap-lunch:2/ours-18", "cheap-lunch:4/without-18", "cheap-lunch:4/ours-18"]
    for words, rows, said in [
        ("msa:1", None, "msa:1: its rows come with a later version; choose of: cheap-lunch:1, "),
        ("cheap-lunch:7", None, "cheap-lunch:7: there is no such table"),
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
