"""Draws, protocols and other tools' masks, on the real weights at 64 px."""

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cheaplunch.config import build_config
from cheaplunch.errors import UserError
from cheaplunch.prediction import Predictor
from cheaplunch.prompting import Prompting
from cheaplunch.scoring import Assessment, assess, assess_predictions


@pytest.fixture(scope="module")
def config(tiny_dataset, weights):
    return build_config("zero-shot", {"data": tiny_dataset, "weights": weights, "image_size": 64})


@pytest.fixture(scope="module")
def score(config, zero_shot, tmp_path_factory):
    """An Assessment's fields → its results and the folder of masks."""

    def run(**fields) -> tuple[dict[str, dict], Path]:
        masks = tmp_path_factory.mktemp("masks")
        return assess(zero_shot, config, Assessment(config.data.data, **fields), "fp32", masks), masks

    return run


BOX = Prompting("box")


@pytest.fixture(scope="module")
def boxed(score) -> tuple[dict[str, dict], Path]:
    return score(prompting=BOX, protocols=("strict", "paper"))


# ---- protocols


def test_protocols_share_one_prediction_and_score_as_alone(score, boxed, monkeypatch):
    embedded = []
    embed = Predictor.embed
    monkeypatch.setattr(Predictor, "embed", lambda self, images: embedded.append(len(images)) or embed(self, images))
    both, _ = score(prompting=BOX, protocols=("paper", "strict"))
    assert sum(embedded) == 4  # the slices of the one test case that show something
    assert both == boxed[0]
    assert list(both) == ["paper", "strict"]
    assert both["paper"] == score(prompting=BOX, protocols=("paper",))[0]["paper"]
    assert both["strict"]["mean"]["dice"] == both["paper"]["mean"]["dice"]
    assert (both["strict"]["unit"], both["paper"]["unit"]) == ("mm", "px")


def test_probabilities_reach_the_protocol_that_scores_them(score, masks, config):
    results, _ = score(prompting=Prompting("clicks", clicks=3), protocols=("strict", "msa"))
    assert list(results["strict"]["by_clicks"]) == ["1", "3"]
    assert list(results["msa"]["by_clicks"]) == ["3"]  # those of the last click alone are kept
    # Of six slices two are empty in truth and prediction, and count 1; most thresholds find something on the others.
    assert 2 / 6 < results["msa"]["mean"]["dice"] < 1
    with pytest.raises(UserError, match="--protocol msa"):
        theirs(masks, config, protocols=("msa",))


# ---- draws


def test_draws_give_their_mean_and_spread(score):
    jittered = replace(BOX, box_jitter_px=4.0)
    several = score(prompting=jittered, draws=3)[0]["strict"]
    single, masks = score(prompting=jittered)
    dice = [draw["dice"] for draw in several["draws"]]
    assert len(set(dice)) == 3
    assert dice[0] == single["strict"]["mean"]["dice"]  # the first draw is that of a single one
    assert several["mean"]["dice"] == pytest.approx(np.mean(dice))
    assert several["spread"]["dice"] == pytest.approx(np.std(dice, ddof=1))
    assert several["box_jitter_px"] == 4
    assert "spread" not in single["strict"]
    assert several == score(prompting=jittered, draws=3)[0]["strict"]
    assert several["draws"] != score(prompting=jittered, draws=3, seed=1)[0]["strict"]["draws"]
    assert len(list(masks.iterdir())) == 1


def test_clicks_say_dice_on_the_way(score):
    [(_, result)] = score(prompting=Prompting("clicks", clicks=3))[0].items()
    assert result["prompts"] == "clicks:3"
    assert result["oracle_prompts"] is True
    assert list(result["by_clicks"]) == ["1", "3"]
    assert result["by_clicks"]["3"] == result["mean"]["dice"]
    one = score(prompting=Prompting("clicks", clicks=1))[0]["strict"]
    assert result["by_clicks"]["1"] == one["mean"]["dice"]
    assert one["mean"] == score(prompting=Prompting("random"))[0]["strict"]["mean"]  # a first click is a random point


# ---- masks of another tool


@pytest.fixture
def masks(boxed, tmp_path) -> Path:
    return Path(shutil.copytree(boxed[1], tmp_path / "theirs"))


PROMPTLESS = Prompting("auto")


def theirs(masks: Path, config, prompting=PROMPTLESS, protocols=("strict",)) -> dict[str, dict]:
    return assess_predictions(masks, "theirs", Assessment(config.data.data, prompting, protocols))


def test_masks_score_as_the_model_that_wrote_them(masks, boxed, config):
    results = theirs(masks, config, BOX, ("strict", "paper"))
    for protocol, result in results.items():
        as_the_model = {"method": "zero-shot", "backbone": "lite-medsam", "smooth_mm": 0.8}
        assert {**result, **as_the_model} == boxed[0][protocol]
        assert result["method"] == "theirs"
    promptless = theirs(masks, config)["strict"]
    assert promptless["prompts"] == "auto"
    assert promptless["oracle_prompts"] is False
    assert promptless["mean"] == results["strict"]["mean"]


def test_masks_may_have_another_ending(masks, boxed, config):
    (path,) = masks.iterdir()
    nib.save(nib.load(path), masks / path.name.removesuffix(".gz"))
    with pytest.raises(UserError, match="leave one"):
        theirs(masks, config)
    path.unlink()
    assert theirs(masks, config, BOX)["strict"]["cases"] == boxed[0]["strict"]["cases"]


def rewrite(path: Path, change) -> None:
    image = nib.load(path)
    voxels, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.mark.parametrize(
    ("change", "naming"),
    [
        (lambda voxels, affine: (voxels[1:], affine), "shape"),
        (lambda voxels, affine: (voxels, affine + np.eye(4, k=3) * 5), "affine"),  # moved along x
        (lambda voxels, affine: (np.where(voxels == 2, 7, voxels).astype(np.uint8), affine), r"values \[7\]"),
        (lambda voxels, affine: (voxels.astype(np.float32) / 2, affine), "integers"),
    ],
)
def test_masks_that_do_not_fit(masks, config, change, naming):
    (path,) = masks.iterdir()
    rewrite(path, change)
    with pytest.raises(UserError, match=naming) as said:
        theirs(masks, config)
    assert str(path) in str(said.value)


def test_a_mask_that_is_not_there(masks, config):
    (path,) = masks.iterdir()
    path.rename(masks / f"other_{path.name}")
    with pytest.raises(UserError, match="is missing") as said:
        theirs(masks, config)
    assert str(path) in str(said.value)
    with pytest.raises(UserError, match="no such folder"):
        theirs(masks / "nowhere", config)
