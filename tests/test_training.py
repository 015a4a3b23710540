"""The loop on a tiny data set and the real weights: reproducible, resumable, and its parts by hand."""

import dataclasses
import hashlib
import json
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cheaplunch.config import RunConfig, TrainingConfig, build_config
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Window
from cheaplunch.errors import Stopped, UserError
from cheaplunch.learner import learning_rate
from cheaplunch.material import prepare
from cheaplunch.models.lora import ADAPTER_FILE
from cheaplunch.models.segmenter import load_segmenter
from cheaplunch.prediction import Predictor, segment_with_oracle
from cheaplunch.runs import RunFolder
from cheaplunch.training import finetune
from cheaplunch.work import draw_targets


@pytest.fixture(scope="module")
def settings(tiny_dataset, weights):
    """(changes) → the settings of a run of 3 small steps."""

    def make(**changes) -> RunConfig:
        values = {
            "data": tiny_dataset,
            "weights": weights,
            "image_size": 32,
            "exemplars": 3,
            "synthetic": 12,
            "steps": 3,
            "batch_size": 2,
            "prompts_per_image": 2,
            "warmup_steps": 1,
            "precision": "fp32",
            "device": "cpu",
        }
        return build_config("cheap-lunch", values | changes)

    return make


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """A finished run; read it, do not change it."""
    return finetune(settings(), tmp_path_factory.mktemp("runs") / "first")


def adapter_hash(run) -> str:
    return hashlib.sha256((run.adapter / ADAPTER_FILE).read_bytes()).hexdigest()


def records(run) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


# ---- the schedule by hand


def test_learning_rate_rises_linearly_and_then_decays_exponentially():
    config = TrainingConfig(steps=9, warmup_steps=4, learning_rate=0.8, final_lr=0.01)
    rates = [learning_rate(step, config) for step in range(9)]
    # ¼ … 1 of the top; then over steps 4 … 8 from 1 to 0.01, a factor of 10^-½ each
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[5:] == pytest.approx([0.8 * 10**-0.5, 0.08, 0.8 * 10**-1.5, 0.008])


def test_learning_rate_without_warm_up():
    config = TrainingConfig(steps=3, warmup_steps=0, learning_rate=1.0, final_lr=0.25)
    assert [learning_rate(step, config) for step in range(3)] == pytest.approx([1, 0.5, 0.25])


def test_samed_s_decay_is_cut_off_where_160_of_200_epochs_are():
    config = TrainingConfig(steps=162, warmup_steps=1, learning_rate=1.0, final_lr=0.2**0.9, decay="polynomial")
    rates = [learning_rate(step, config) for step in range(162)]
    assert rates[1:] == pytest.approx([(1 - t / 200) ** 0.9 for t in range(161)])


# ---- what each prompt asks for


def test_every_class_is_asked_for_before_any_again(generator):
    label = torch.tensor([[0, 1, 1], [3, 3, 0], [4, 0, 0]], dtype=torch.uint8)
    only = torch.tensor([[0, 2, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.uint8)
    firsts = set()
    for _ in range(20):
        targets = [draw_targets(each, 5, 4, generator) for each in (label, only)]  # 5 of the 3 there are
        assert targets[0].shape == (5, 3, 3)
        assert targets[0].dtype == torch.bool
        asked = []
        for target in targets[0]:
            (number,) = label[target].unique().tolist()  # one class …
            assert torch.equal(target, label == number)  # … and all of it
            asked.append(number)
        assert sorted(asked[:3]) == [1, 3, 4]
        assert len(set(asked[3:])) == 2
        assert all(torch.equal(target, only == 2) for target in targets[1])
        firsts.add(asked[0])
    assert firsts == {1, 3, 4}


# ---- reproducible


def test_equal_seeds_give_equal_adapters_and_others_another(settings, run, tmp_path):
    torch.rand(5)  # the global generators play no part
    np.random.rand(5)  # noqa: NPY002
    again = finetune(settings(), tmp_path / "again")
    assert adapter_hash(again) == adapter_hash(run)
    assert [r["loss"] for r in records(again)] == [r["loss"] for r in records(run)]
    other = finetune(settings(seed=1), tmp_path / "other")
    assert adapter_hash(other) != adapter_hash(run)


class _PowerCut(Exception):
    pass


def _cut_at(step):
    def progress(done, total, record):
        if done == step:
            raise _PowerCut

    return progress


def test_a_resumed_run_is_the_undisturbed_one(settings, run, tmp_path):
    config = settings(checkpoint_every=1)
    with pytest.raises(_PowerCut):
        finetune(config, tmp_path / "cut", progress=_cut_at(2))
    assert not (tmp_path / "cut" / "adapter" / ADAPTER_FILE).exists()
    told = []
    resumed = finetune(config, tmp_path / "cut", resume=True, progress=lambda done, *_: told.append(done))
    assert told == [2, 3]  # the first step was not taken again
    assert adapter_hash(resumed) == adapter_hash(run)
    assert [r["step"] for r in records(resumed)] == [1, 2, 3]  # and no step is written down twice
    assert [r["loss"] for r in records(resumed)] == [r["loss"] for r in records(run)]


def test_sigterm_saves_the_step_and_leaves_and_resume_ends_the_same(settings, run, tmp_path):
    def send(done, total, record):
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"step 2.*--resume"):
        finetune(settings(), tmp_path / "stopped", progress=send)
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = finetune(settings(), tmp_path / "stopped", resume=True)
    assert adapter_hash(resumed) == adapter_hash(run)


def test_checkpoints_are_rotated_and_a_damaged_one_falls_back(settings, run, tmp_path):
    config = settings(checkpoint_every=1, steps=4)
    with pytest.raises(_PowerCut):
        finetune(config, tmp_path / "cut", progress=_cut_at(4))
    folder = RunFolder(tmp_path / "cut").checkpoint
    assert [path.name for path in sorted(folder.iterdir())] == ["step-000002.pt", "step-000003.pt"]
    newest = folder / "step-000003.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    (folder / ".step-000004.pt.123.unfinished").write_bytes(b"half")  # as a kill leaves it
    told = []
    finetune(config, tmp_path / "cut", resume=True, progress=lambda done, *_: told.append(done))
    assert told == [3, 4]
    assert not list(folder.glob(".*"))


def test_damaged_checkpoints_are_named(settings, tmp_path):
    with pytest.raises(_PowerCut):
        finetune(settings(checkpoint_every=1), tmp_path / "cut", progress=_cut_at(2))
    for path in RunFolder(tmp_path / "cut").checkpoint.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"step-000001\.pt .*damaged"):
        finetune(settings(checkpoint_every=1), tmp_path / "cut", resume=True)


def test_parts_of_a_batch_add_up_to_it(settings, run, tmp_path):
    # The same gradients but for the order of additions; AdamW's first steps magnify rounding near zero.
    parts = finetune(settings(accumulate=2), tmp_path / "parts")
    losses = [[r["loss"] for r in records(each)] for each in (parts, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_gradient_checkpointing_changes_no_number(settings, run, tmp_path):
    thrifty = finetune(settings(gradient_checkpointing=True), tmp_path / "thrifty")
    assert adapter_hash(thrifty) == adapter_hash(run)


# ---- other backbones


def test_a_vit_trains_and_predicts_on_slices_that_are_not_square(tmp_path):
    # Its logits are coarser than its input, and its padding is what its pixel norm makes of nothing.
    label = np.zeros((24, 40, 3), np.uint8)
    label[6:14, 10:22, 1] = 1
    data = _write(tmp_path / "set", np.where(label > 0, 200, 50).astype(np.float32), label)
    values = {"backbone": "tiny-random", "image_size": 64, "steps": 2, "warmup_steps": 1, "exemplars": 1}
    config = build_config("cheap-lunch", values | {"data": data, "device": "cpu", "gradient_checkpointing": True})
    run = finetune(config, tmp_path / "run")
    assert [line["step"] for line in records(run)] == [1, 2]
    case = load_case(open_dataset(data).cases[0], open_dataset(data), Window())
    predictor = Predictor(load_segmenter(run.load_config().model, run.adapter))
    assert segment_with_oracle(predictor, case, "furthest", np.random.default_rng(0)).shape == (3, 40, 24)


# ---- validation


def test_the_best_step_on_held_out_cases_is_kept(settings, tmp_path):
    config = settings(validation_cases=1, validate_every=1, exemplars=1, synthetic=4, steps=4, learning_rate=0.05)
    run = finetune(config, tmp_path / "run")
    scores = [line["validation_dice"] for line in records(run)]
    best = scores.index(max(scores)) + 1
    environment = json.loads(run.environment.read_text())
    (held,) = environment["validation_cases"]
    assert held not in run.exemplars.read_text()
    # The adapter is that of a run whose schedule is the same and that is cut after the best step.
    cut = tmp_path / "cut"
    with pytest.raises(Stopped):
        finetune(config, cut, progress=lambda done, *_: signal.raise_signal(signal.SIGTERM) if done == best else None)
    state = torch.load(RunFolder(cut).checkpoint / f"step-{best:06d}.pt", weights_only=True)
    kept = load_file(run.adapter / ADAPTER_FILE)
    assert state["best"]["step"] == best
    name = next(name for name in kept if "lora_B" in name)
    trained = next(value for key, value in state["trained"].items() if key.replace(".default", "").endswith(name))
    assert torch.equal(trained, kept[name])


def test_patience_ends_a_run_that_no_longer_gains(settings, tmp_path):
    values = {"validation_cases": 1, "validate_every": 1, "exemplars": 1, "synthetic": 4, "learning_rate": 1e-12}
    run = finetune(settings(**values, steps=9, patience=2), tmp_path / "run")
    assert len(records(run)) == 3  # the first look is the best of all equal ones; two more without gain


def test_validation_needs_cases(settings, tmp_path):
    with pytest.raises(UserError, match=r"--validation-cases 2"):
        finetune(settings(validation_cases=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"--patience"):
        settings(patience=1)


# ---- trackers


def test_tensorboard_gets_every_step(settings, run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = finetune(settings(tracker="tensorboard"), tmp_path / "run")
    assert adapter_hash(tracked) == adapter_hash(run)
    told = EventAccumulator(str(tracked.root / "tensorboard" / "cheaplunch")).Reload().Scalars("loss")
    assert [event.step for event in told] == [1, 2, 3]
    assert [event.value for event in told] == pytest.approx([line["loss"] for line in records(tracked)])


def test_resume_with_other_settings_is_refused_and_names_them(settings, tmp_path):
    with pytest.raises(_PowerCut):
        finetune(settings(), tmp_path / "cut", progress=_cut_at(1))
    with pytest.raises(UserError, match=r"--resume: .*batch.size was 2"):
        finetune(settings(batch_size=1), tmp_path / "cut", resume=True)


def test_resume_of_a_finished_run_is_that_run_and_no_other(settings, run):
    assert finetune(settings(), run.root, resume=True).root == run.root
    with pytest.raises(UserError, match="--resume: lora_rank was 4"):
        finetune(settings(lora_rank=8), run.root, resume=True)


def test_resume_of_nothing(settings, tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        finetune(settings(), tmp_path / "none", resume=True)


# ---- the run's folder


def test_the_folder_explains_itself(run, settings, tiny_dataset):
    for path in (run.config, run.exemplars, run.preview, run.metrics, run.adapter / ADAPTER_FILE, run.environment):
        assert path.stat().st_size, path
    assert run.load_config() == settings()
    assert run.finished()
    lines = records(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["loss"] < 20 and line["images_per_s"] > 0 for line in lines)
    environment = json.loads(run.environment.read_text())
    assert environment["seed"] == 0
    assert environment["device"] == "cpu"
    assert environment["precision"] == "fp32"
    assert len(environment["data_fingerprint"]) == 64
    assert environment["versions"]["torch"]
    assert not list(run.root.rglob(".*.part"))


def test_every_setting_is_written_down_resolved(settings):
    size = prepare(settings(image_size=None)).config.model.image_size
    assert size is not None
    assert 32 <= size < 256  # small slices are not blown up to all that the backbone takes


def test_training_moves_the_network(settings, run, build):
    from cheaplunch.models.lora import load_adapter

    started, trained = build(image_size=32), build(image_size=32)
    load_adapter(trained.network, run.adapter)
    before = dict(started.named_parameters())
    moved = {n for n, p in trained.named_parameters() if not torch.equal(p, before[n])}
    assert all(before[name].requires_grad for name in moved)  # nothing else did
    for part in ("vision_encoder", "mask_decoder.transformer"):
        assert sum("lora_B" in name and part in name for name in moved) == (20 if part == "vision_encoder" else 14)
    assert any("point_embed.1" in name for name in moved)
    assert any("mask_tokens" in name for name in moved)


def test_an_out_that_holds_a_run_is_left_alone(settings, run):
    before = adapter_hash(run), run.config.read_text()
    with pytest.raises(UserError, match=r"--out .* already holds a run.*--resume"):
        finetune(settings(seed=9), run.root)
    assert (adapter_hash(run), run.config.read_text()) == before


def test_an_out_that_is_a_file(settings, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*taken is a file"):
        finetune(settings(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_run_that_could_not_start_does_not_hold_its_folder(settings, tmp_path):
    with pytest.raises(UserError, match="--weights"):
        finetune(settings(weights=tmp_path / "typo.pth"), tmp_path / "run")
    finetune(settings(steps=1), tmp_path / "run")


def test_two_precisions_in_one_process(settings, run, tmp_path):
    other = finetune(settings(precision="bf16", steps=1), tmp_path / "bf16")
    first, same = records(run)[0]["loss"], records(other)[0]["loss"]
    assert same == pytest.approx(first, rel=0.1)
    assert adapter_hash(other) != adapter_hash(run)


def test_nothing_to_train_is_said(settings, tmp_path):
    with pytest.raises(UserError, match=r"--tuning|--method"):
        finetune(settings(tuning="none"), tmp_path / "run")


# ---- what is trained on


def test_the_pool_holds_the_exemplars_named_and_the_slices_without_foreground(settings, tiny_dataset, tmp_path):
    chosen = tmp_path / "mine.csv"
    a, b = sorted({key.case_id for key in prepare(settings()).exemplars})  # of three cases one is held out
    chosen.write_text(f"case,slice\n{a},2\n{b},4\n")
    material = prepare(settings(exemplar_file=chosen))
    pool = material.pool
    for key, image, label in zip(material.exemplars, pool.images, pool.labels, strict=True):
        truth = nib.load(tiny_dataset / "labelsTr" / f"{key.case_id}.nii.gz").get_fdata()[:, :, key.slice_number].T
        assert np.array_equal(label.numpy(), truth)  # 32 px in 32 px, rows are y
        for number, grey in ((0, 0.15), (1, 0.9), (2, 0.5)):  # dark, 'disc' bright, 'block' between
            assert abs(image[0][label == number].mean() - grey) < 0.15 or not (label == number).any()
    assert [label.unique().tolist() for label in pool.labels] == [[0, 1, 2], [0, 2]]
    assert len(pool.backgrounds) == 2 * 2  # slices 0 and 5 of two volumes
    assert not pool.backgrounds_filled
    assert pool.backgrounds.mean(dim=(1, 2, 3)).max() < 0.4


def test_an_exemplar_without_foreground_is_refused(settings, tmp_path):
    # It gives nothing to prompt: training would look for a class on it for ever.
    (case, *_) = {key.case_id for key in prepare(settings()).exemplars}
    chosen = tmp_path / "mine.csv"
    chosen.write_text(f"case,slice\n{case},2\n{case},0\n")
    with pytest.raises(UserError, match=r"mine\.csv.*(slice 0|line 3)"):
        prepare(settings(exemplar_file=chosen))


def _write(root: Path, image: np.ndarray, label: np.ndarray, cases=("a", "b")) -> Path:
    for case in cases:
        for folder, array, ending in (("imagesTr", image, "_0000"), ("labelsTr", label, "")):
            path = root / folder / f"{case}{ending}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([-1, -1, 1, 1])), path)
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "line": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def test_what_shrinking_loses_is_kept_or_refused(settings, tmp_path):
    # A line one pixel wide in 128 px, seen at 32 px: nearest neighbour reads columns 2, 6, 10 … and misses it.
    label = np.zeros((128, 128, 2), np.uint8)
    label[64, 20:100, 0] = 1
    data = _write(tmp_path / "set", np.random.default_rng(0).normal(100, 9, label.shape).astype(np.float32), label)
    try:
        labels = prepare(settings(data=data, exemplars=1)).pool.labels
    except UserError:
        return
    assert labels.flatten(1).any(dim=1).all()


def test_without_a_slice_free_of_foreground_backgrounds_are_filled_in(settings, tmp_path):
    label = np.zeros((32, 32, 2), np.uint8)
    label[10:20, 12:20] = 1
    image = np.where(label > 0, 200, 50) + np.random.default_rng(0).normal(0, 3, label.shape)
    material = prepare(settings(data=_write(tmp_path / "set", image.astype(np.float32), label), exemplars=2))
    pool = material.pool
    assert pool.backgrounds_filled
    assert pool.backgrounds.shape == pool.images.shape
    organ = pool.labels[:, None] > 0
    assert pool.images[organ].mean() > 0.8
    assert pool.backgrounds[organ].mean() < 0.2


def test_a_loss_that_is_not_a_number_names_the_flag(settings, tmp_path):
    config = settings(learning_rate=1e6, steps=12)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, learning_rate=float("inf")))
    with pytest.raises(UserError, match="--learning-rate"):
        finetune(config, tmp_path / "run")
