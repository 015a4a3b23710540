"""What a run learns from: a set made as it trains, or one that lies on the disk."""

import csv
import shutil

import pytest
import torch

from cheaplunch.config import build_config, override
from cheaplunch.errors import UserError
from cheaplunch.material import prepare, preview, write_set
from cheaplunch.work import draw_work

SMALL = {"image_size": 32, "exemplars": 2, "synthetic": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def config(tiny_dataset):
    return build_config("cheap-lunch", {**SMALL, "data": tiny_dataset})


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    """The set of `config`, eight samples of it."""
    folder = tmp_path_factory.mktemp("written") / "set"
    write_set(prepare(config), folder, 8)
    return folder


# ---- exemplars


def test_a_percentage_of_the_slices_that_show_something(config):
    # Two volumes train; slices 1 to 4 of each show a class: a quarter of eight are two.
    material = prepare(override(config, {"exemplar_percent": 25, "exemplars": 9}))
    assert len(material.exemplars) == 2
    assert material.config.data.exemplars == 2  # the run says how many it took
    with pytest.raises(UserError, match=r"--exemplar-percent 1\.0: no exemplar shows (disc|block)"):
        for seed in range(20):  # half of the slices show one class alone
            prepare(override(config, {"exemplar_percent": 1.0, "strategy": "random", "seed": seed}))


def test_classes_that_differ_in_their_side_are_known_in_planes_that_show_it(config, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "sided")
    about = data / "dataset.json"
    about.write_text(about.read_text().replace('"disc"', '"left disc"').replace('"block"', '"right disc"'))
    assert prepare(override(config, {"data": data})).pool.paired == (1, 2)
    assert prepare(override(config, {"data": data, "axis": "sagittal"})).pool.paired == ()
    assert prepare(config).pool.paired == ()


# ---- a set on the disk


def test_training_on_a_stored_set_sees_its_samples(config, written):
    stored = prepare(override(config, {"synthetic_set": written}))
    made = prepare(config)
    for step in (0, 1, 7):  # of six samples, the seventh step sees the second again
        here, there = (draw_work(material, step, [0]) for material in (stored, made))
        torch.testing.assert_close(here.images, there.images, atol=0.5 / 255 + 1e-6, rtol=0)
        assert torch.equal(here.targets, there.targets)
        torch.testing.assert_close(here.prompts.points_xy, there.prompts.points_xy, atol=0, rtol=0)
    assert len(preview(stored).images) == 6
    named = [(row["case"], int(row["slice"])) for row in csv.DictReader((written / "exemplars.csv").open())]
    assert named == [(key.case_id, key.slice_number) for key in made.exemplars]


def test_another_seed_trains_on_the_same_set_by_its_exemplars(config, written):
    chosen = {"synthetic_set": written, "exemplar_file": written / "exemplars.csv", "seed": 5}
    material = prepare(override(config, chosen))
    assert material.exemplars == prepare(config).exemplars
    assert torch.equal(material.samples([3]).labels, prepare(config).samples([3]).labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exemplars": 3}, r"shows other exemplars; add --exemplar-file .*exemplars\.csv"),
        ({"flip": 0.5}, r"was made with --flip 0\.0, and --flip is 0\.5 here; make them equal"),
        ({"image_size": 64}, r"was made with --image-size 32, and --image-size is 64 here"),
        ({"paste": "soft"}, r"was made with --paste hard"),
        ({"synthetic": 9}, r"--synthetic 9: .*set holds 8 samples"),
    ],
)
def test_a_set_that_this_run_would_not_have_made_is_refused(config, written, values, message):
    with pytest.raises(UserError, match=message):
        prepare(override(config, {"synthetic_set": written, **values}))


def test_a_set_of_other_images_is_refused(config, written, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "other")
    path = data / "imagesTr" / "case_0_0000.nii.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="was made from other images or classes than --data"):
        prepare(override(config, {"synthetic_set": written, "data": data}))
