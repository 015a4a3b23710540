from pathlib import Path

import pytest

from cheaplunch.config import METHODS, build_config, load_config, read_yaml, save_config, settings, slab_slices
from cheaplunch.errors import UserError


def test_the_contract_s_flags_are_settings():
    flags = {"--" + name.replace("_", "-") for name in settings()}
    assert flags >= {
        *("--data", "--backbone", "--weights", "--image-size", "--exemplars", "--strategy", "--synthetic"),
        *("--exemplar-file", "--steps", "--batch-size", "--seed", "--device"),
    }


def test_every_setting_says_what_it_is():
    assert all(item.metadata["help"].strip() for _, item in settings().values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loads_and_comes_back_from_yaml(method, tmp_path):
    config = build_config(method, {})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    for name, value in METHODS[method].items():
        group, _ = settings()[name]
        assert getattr(getattr(config, group) if group else config, name) == value


def test_yaml_round_trip_of_every_kind_of_value(tmp_path):
    values = {
        "data": Path("some/folder"),
        "window": (-125.0, 275.0),
        "exemplar_file": Path("picked.csv"),
        "image_size": 128,
        "learning_rate": 1e-5,  # YAML writes 1.0e-05; a reader that sees text here would not come back equal
        "seed": 2**40,
        "strategy": "random",
        "flip": 0,
    }
    config = build_config("cheap-lunch", values)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.data.window == (-125.0, 275.0)
    assert config.model.image_size == 128
    assert config.seed == 2**40


def test_flags_go_before_the_method_s_own_values():
    assert build_config("zero-shot", {}).model.tuning == "none"
    assert build_config("zero-shot", {"tuning": "lora"}).model.tuning == "lora"


def test_yaml_takes_names_as_flags_are_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("image-size: 64\nbatch_size: 2\nwindow: [0, 80]\ndata: here\nlearning-rate: 1e-4\n")
    config = build_config("cheap-lunch", read_yaml(path))
    assert (config.model.image_size, config.training.batch_size) == (64, 2)
    assert config.data.window == (0, 80)
    assert config.data.data == Path("here")
    assert config.training.learning_rate == 1e-4  # for YAML 1.1 this spelling is text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "stepz"),
        ({"exemplars": 0}, "--exemplars is 0"),
        ({"synthetic": -1}, "--synthetic is -1"),
        ({"steps": 0}, "--steps is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"learning_rate": 0.0}, "--learning-rate is 0"),
        ({"lora_rank": 0}, "--lora-rank is 0"),
        ({"image_size": 100}, "--image-size is 100"),
        ({"image_size": 16}, "--image-size is 16"),
        ({"real_share": 1.5}, "--real-share is 1.5"),
        ({"flip": -0.1}, "--flip is -0.1"),
        ({"window": (10.0, 10.0)}, "--window is"),
        ({"adapter_parts": ("encoder", "head")}, "--adapter-parts head is not known; choose from: encoder"),
        ({"depth": 4}, "--depth is 4; it must be odd"),
        ({"depth": 0}, "--depth is 0"),
    ],
)
def test_values_no_run_can_have(values, message):
    with pytest.raises(UserError, match=message):
        build_config("cheap-lunch", values)


def test_slabs_are_of_whole_exemplars_among_real_slices():
    deep = {"adapter_parts": ["encoder", "depth"]}
    assert build_config("msa", deep).synthesis.real_share == 1.0
    assert build_config("msa", {}).synthesis.real_share < 1
    for values, way_out in (
        ({"real_share": 0.5}, "give --real-share 1"),
        ({"empty_share": 0.2, "head": "classes", "training_prompts": "none"}, "give --empty-share 0"),
        ({"synthetic_set": Path("set")}, "leave out --synthetic-set"),
    ):
        with pytest.raises(UserError, match=f"--adapter-parts depth learns from exemplars .*; {way_out}"):
            build_config("msa", deep | values)
        for without in ({"depth": 1}, {"tuning": "lora"}, {"adapter_parts": ["encoder"]}):
            build_config("msa", deep | values | without)


def test_how_many_slices_a_network_sees_at_once():
    deep = {"adapter_parts": ["encoder", "depth"]}
    assert slab_slices(build_config("msa", deep | {"depth": 7}).model) == 7
    assert slab_slices(build_config("msa", {"depth": 7}).model) == 1
    assert slab_slices(build_config("cheap-lunch", deep | {"depth": 7}).model) == 1


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"steps": "many"}, "--steps"),
        ({"steps": 2.5}, "--steps"),
        ({"steps": None}, "--steps"),
        ({"window": (1.0, 2.0, 3.0)}, "--window"),
        ({"window": 40}, "--window"),
        ({"axis": "diagonal"}, "--axis"),
        ({"strategy": "best"}, "--strategy"),
        ({"tuning": "everything"}, "--tuning"),
        ({"precision": "fp8"}, "--precision"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"warmup_steps": -5}, "--warmup-steps"),
        ({"blur_px": -1.0}, "--blur-px"),
        ({"scale": -2.0}, "--scale"),
    ],
)
def test_values_of_the_wrong_kind_as_a_yaml_file_may_hold_them(values, flag):
    with pytest.raises(UserError, match=flag):
        build_config("cheap-lunch", values)


def test_an_unknown_method():
    with pytest.raises(UserError, match=r"--method magic .*cheap-lunch"):
        build_config("magic", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("- a\n- b\n", "setting: value"),
        ("a: [1\n", "not valid YAML"),
        ("", "setting: value"),
        ("steps: 3\nstepz: 4\n", "there is no setting stepz"),
    ],
)
def test_a_yaml_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_without_method_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    with pytest.raises(UserError, match="no line `method:`"):
        load_config(tmp_path / "config.yaml")
