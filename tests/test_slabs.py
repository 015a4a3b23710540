"""The Medical SAM Adapter's depth branch in use: a volume's slices together, from the exemplars to the masks."""

import copy
import csv
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cheaplunch.__main__ import main
from cheaplunch.config import RunConfig, build_config
from cheaplunch.data.cases import CaseSlices, load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Frame, Window, as_rgb
from cheaplunch.data.volume import Grid, Volume
from cheaplunch.errors import UserError
from cheaplunch.exemplars import SliceKey
from cheaplunch.interactive import OpenCase
from cheaplunch.learner import Learner, start_processes
from cheaplunch.losses import UNLABELLED, class_loss
from cheaplunch.material import pick_window, prepare
from cheaplunch.methods import METHODS
from cheaplunch.models.lora import ADAPTER_FILE, save_adapter
from cheaplunch.models.segmenter import Segmenter, build_segmenter, load_segmenter
from cheaplunch.prediction import Predictor, carry_click, segment_auto, segment_with_oracle
from cheaplunch.prompts import Prompts
from cheaplunch.runs import RunFolder
from cheaplunch.synthesis import derive_seed, draw, move_labels, render
from cheaplunch.training import finetune
from cheaplunch.work import draw_work

PARTS = ("encoder", "decoder", "prompt", "depth")
SMALL = {"exemplars": 2, "steps": 2, "warmup_steps": 0, "batch_size": 2, "prompts_per_image": 2, "device": "cpu"}
SMALL |= {"precision": "fp32", "adapter_parts": PARTS, "depth": 3}


@pytest.fixture(scope="module", params=["tiny-random", "lite-medsam"])
def settings(request, tiny_dataset):
    """(changes) → the settings of a run of two small steps, with a ViT or a TinyViT."""
    if request.param == "lite-medsam":
        size = {"image_size": 32, "weights": request.getfixturevalue("weights")}
    else:
        size = {"image_size": 64}

    def make(**changes) -> RunConfig:
        return build_config("msa", {**SMALL, **size, "backbone": request.param, "data": tiny_dataset, **changes})

    return make


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> RunFolder:
    """A finished run; read it, do not change it."""
    return finetune(settings(), tmp_path_factory.mktemp("runs") / "first")


def gates_of(segmenter: Segmenter) -> dict[str, torch.Tensor]:
    return {name: p for name, p in segmenter.named_parameters() if name.endswith("depth.gate")}


@torch.no_grad()
def opened(segmenter: Segmenter) -> Segmenter:
    """As if trained, with gates wide open."""
    segmenter, generator = copy.deepcopy(segmenter), torch.Generator().manual_seed(4)
    for gate in gates_of(segmenter).values():
        gate.copy_(torch.randn(gate.shape, generator=generator))
    return segmenter.eval()


@pytest.fixture(scope="module")
def segmenter(settings) -> Segmenter:
    return opened(build_segmenter(settings().model))


@pytest.fixture(scope="module")
def slices() -> np.ndarray:
    """A volume of eight slices, (8, 1, 20, 32)."""
    return np.random.default_rng(3).random((8, 1, 20, 32), dtype=np.float32)


# ---- what is learned from


def named(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("case", "slice"), *rows])
    return path


AS_IT_IS = {"rotation_deg": 0.0, "scale": 0.0, "shift": 0.0, "blur_px": 0.0, "intensity": 0.0}


def test_an_exemplar_is_in_the_middle_of_those_around_it(settings, tmp_path):
    file = named(tmp_path / "exemplars.csv", [("case_0", 1), ("case_1", 3)])
    material = prepare(settings(depth=5, exemplar_file=file, batch_size=6, **AS_IT_IS))
    size = material.config.model.image_size
    dataset = open_dataset(material.config.data.data)
    window = pick_window(material.config, dataset)
    expected = {}  # place of the labelled slice → its slab; the first exemplar is next to its volume's end
    for key, start, place in zip(material.exemplars, (0, 1), (1, 2), strict=True):
        case = load_case(next(case for case in dataset.cases if case.id == key.case_id), dataset, window)
        slab = Frame(32, 32, size).to_model(torch.from_numpy(case.image[start : start + 5]))
        expected[place] = as_rgb(slab)
    work = draw_work(material, 0, range(6))
    assert work.slabs.shape == (6, 5, 3, size, size)
    assert set(work.places.tolist()) == {1, 2}
    for slab, place, image in zip(work.slabs, work.places.tolist(), work.images, strict=True):
        torch.testing.assert_close(slab, expected[place], atol=1e-5, rtol=0)
        assert torch.equal(slab[place], image)
    # Without depth the same slices are learned from, one by one.
    flat = prepare(settings(adapter_parts=PARTS[:3], exemplar_file=file, real_share=1.0))
    assert flat.slabs is None
    assert torch.equal(flat.pool.images, material.pool.images)


@pytest.mark.parametrize("augmentation", ["none", "samed"])
def test_a_slab_is_transformed_as_its_middle_is_and_that_as_a_slice_on_its_own(settings, augmentation):
    changes = {"augmentation": augmentation, "blur_px": 2.0, "batch_size": 4}
    material = prepare(settings(**changes))
    flat = prepare(settings(adapter_parts=PARTS[:3], real_share=1.0, **changes))
    around = material.slabs
    same_slices = {
        key: around.rows[own] for key in around.rows for own in around.exemplars if own.case_id == key.case_id
    }
    alike = replace(material, slabs=replace(around, rows=same_slices))
    moved = 0
    for step in range(3):
        work, alone, same = (draw_work(each, step, range(4)) for each in (material, flat, alike))
        assert work.slabs.shape == (4, 3, *alone.images.shape[1:])
        assert torch.equal(work.slabs[range(4), work.places], work.images)
        assert torch.equal(work.images, alone.images)
        assert torch.equal(work.targets, alone.targets)
        assert torch.equal(work.shown_px, alone.shown_px)
        assert all(torch.equal(same.slabs[:, place], alone.images) for place in range(3))
        assert not torch.equal(work.slabs[:, 0], work.slabs[:, 2])
        assert torch.equal(work.seen, work.slabs) and torch.equal(alone.seen, alone.images)
        moved += not torch.isin(work.images.flatten(1).sum(1), material.pool.images.flatten(1).sum(1)).any()
    assert moved
    parts = list(work.parts(2))
    assert torch.equal(torch.cat([part.slabs for part in parts]), work.slabs)
    assert torch.equal(torch.cat([part.places for part in parts]), work.places)


def test_a_volume_of_too_few_slices_is_named(settings):
    with pytest.raises(UserError, match=r"--depth 7: case_\d has 6 slices in all; give --depth 5, or other exemplars"):
        prepare(settings(depth=7))
    assert prepare(settings(depth=1)).slabs is None


def pictures(root: Path) -> Path:
    """A data set of four pictures of a disc."""
    rng = np.random.default_rng(0)
    for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        (root / folder).mkdir(parents=True)
        for number in range(4):
            label = np.zeros((32, 32), np.uint8)
            label[8:20, 6 + number : 24] = 1
            picture = (
                label if folder == "labelsTr" else (120 * label + rng.integers(40, 90, label.shape)).astype(np.uint8)
            )
            Image.fromarray(picture).save(root / folder / f"p{number}{ending}.png")
    about = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "disc": 1}, "file_ending": ".png"}
    (root / "dataset.json").write_text(json.dumps(about | {"numTraining": 4}))
    return root


def test_pictures_are_learned_from_as_by_the_network_without_depth(settings, tmp_path):
    root = pictures(tmp_path / "pictures")
    losses = []
    for parts in (PARTS, PARTS[:3]):
        config = settings(data=root, adapter_parts=parts, real_share=1.0, training_prompts="point")
        material = prepare(config)
        learner = Learner(material.config, start_processes(material.config, tmp_path))
        losses.append([learner.step(draw_work(material, step, [0, 1]), 1e-3) for step in range(2)])
        assert material.slabs is None
        assert not any(gate.any() for gate in gates_of(learner.segmenter).values())
    assert losses[0] == losses[1]


# ---- the network


@torch.no_grad()
def test_one_slice_is_embedded_and_the_order_of_the_others_makes_no_difference(segmenter):
    side = segmenter.image_size_px
    slabs = torch.rand(2, 5, 3, side, side, generator=torch.Generator().manual_seed(2))
    shown_px = torch.tensor([[side, side - 8], [side - 16, side]])
    places = torch.tensor([2, 2])
    whole, middle = segmenter.embed_slabs(slabs, shown_px), segmenter.embed(slabs, shown_px, places)
    assert torch.equal(whole[:, 2], middle)
    assert torch.equal(segmenter.embed(slabs, shown_px, torch.tensor([4, 0])), whole[[0, 1], [4, 0]])
    order = [4, 0, 3, 1, 2]
    torch.testing.assert_close(segmenter.embed_slabs(slabs[:, order], shown_px), whole[:, order], atol=1e-3, rtol=0)
    shuffled = segmenter.embed(slabs[:, [4, 0, 2, 3, 1]], shown_px, places)
    torch.testing.assert_close(shuffled, middle, atol=1e-3, rtol=0)
    for place in (0, 1, 3, 4):  # every other slice is seen, and those of the other slab are not
        changed = slabs.clone()
        changed[0, place] = 1 - changed[0, place]
        found = segmenter.embed(changed, shown_px, places)
        assert (found[0] - middle[0]).abs().max() > 0.02
        torch.testing.assert_close(found[1], middle[1], atol=1e-3, rtol=0)


@torch.no_grad()
def test_slabs_of_one_slice_are_the_network_without_depth(settings, segmenter):
    flat = build_segmenter(settings(adapter_parts=PARTS[:3]).model)
    flat.load_state_dict({name: t for name, t in segmenter.state_dict().items() if not name.endswith("depth.gate")})
    images = torch.rand(3, 3, segmenter.image_size_px, segmenter.image_size_px)
    assert torch.equal(segmenter.embed_slabs(images[:, None])[:, 0], flat.eval().embed(images))
    assert torch.equal(segmenter.embed(images), flat.embed(images))
    assert build_segmenter(settings(depth=1).model).slab_slices == flat.slab_slices == 1


# ---- prediction


def whole_case(slices: np.ndarray) -> CaseSlices:
    label = np.zeros((len(slices), *slices.shape[-2:]), np.uint8)
    label[1:7, 4:12, 6:20], label[3, 14:18, 2:9] = 1, 2
    return CaseSlices(slices, label, volume=None, step_mm=1.0)


def test_slices_of_a_volume_have_seen_those_around_them_wherever_they_are_asked_for(segmenter, slices):
    """Slabs of 3 that share a slice: 0–2, 2–4, 4–6, 5–7."""
    predictor = Predictor(segmenter)
    framed = as_rgb(Frame(20, 32, segmenter.image_size_px).to_model(torch.from_numpy(slices)))
    shown = torch.tensor([Frame(20, 32, segmenter.image_size_px).resized[::-1]])
    with torch.no_grad():
        slabs = {start: segmenter.embed_slabs(framed[None, start : start + 3], shown)[0] for start in (0, 2, 4, 5)}
    expected = {
        1: slabs[0][1],
        2: (slabs[0][2] + slabs[2][0]) / 2,
        5: (2 * slabs[4][1] + slabs[5][0]) / 3,
        6: (slabs[4][2] + 2 * slabs[5][1]) / 3,
    }
    volume = Volume(slices[:, 0][None], (1.0, 1.0, 1.0), Grid("made up", (32, 20, 8), np.diag([-1.0, -1, 1, 1])))
    case, anywhere = OpenCase(predictor, volume, Window(0, 1)), predictor.open(slices)
    for number, in_turn in zip(expected, predictor.embed_each(slices, list(expected)), strict=True):
        for embedded in (in_turn, anywhere(number), case.embedded(number)):
            assert embedded.frame == Frame(20, 32, segmenter.image_size_px)
            torch.testing.assert_close(embedded.embedding[0], expected[number], atol=1e-4, rtol=0)
        [alone] = predictor.embed(slices[number : number + 1])
        assert (alone.embedding[0] - expected[number]).abs().max() > 0.02
    [picture] = predictor.embed_each(slices[:1], [0])
    assert torch.equal(picture.embedding, predictor.embed(slices[:1])[0].embedding)


def test_each_slab_is_encoded_once_and_only_where_something_is_asked(segmenter, slices, monkeypatch):
    predictor, case, seen = Predictor(segmenter), whole_case(slices), []
    monkeypatch.setattr(
        predictor, "embed_slab", lambda images, f=predictor.embed_slab: seen.append(len(images)) or f(images)
    )
    segment_with_oracle(predictor, case, "furthest", np.random.default_rng(0))
    assert seen == [3] * 4
    seen.clear()
    only = CaseSlices(slices, np.where(np.arange(8)[:, None, None] == 1, case.label, 0), volume=None)
    segment_with_oracle(predictor, only, "box", np.random.default_rng(0))
    assert seen == [3]
    seen.clear()
    carry_click(predictor, case, np.random.default_rng(0))
    assert set(seen) == {3} and len(seen) <= 8  # both directions


def test_threads_that_embed_slabs_and_pictures_do_not_mix_them_up(segmenter, slices):
    predictor = Predictor(segmenter)
    stacks = [slices[:3], slices[3:6], slices[:1], slices[5:8]]
    expected = [predictor.embed_slab(images).embedding for images in stacks]
    together = threading.Barrier(4)

    def embed(place: int) -> list[torch.Tensor]:
        together.wait()
        return [predictor.embed_slab(stacks[place]).embedding for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        for alone, found in zip(expected, pool.map(embed, range(4)), strict=True):
            assert all(torch.equal(alone, each) for each in found)


# ---- runs


def adapter_hash(run: RunFolder) -> str:
    return hashlib.sha256((run.adapter / ADAPTER_FILE).read_bytes()).hexdigest()


def test_two_steps_open_the_gates_and_the_network_comes_back_as_it_was(settings, slices, tmp_path):
    material = prepare(settings(accumulate=2, gradient_checkpointing=True))
    learner = Learner(material.config, start_processes(material.config, tmp_path))
    before = {name: gate.detach().clone() for name, gate in gates_of(learner.segmenter).items()}
    for step in range(2):
        learner.step(draw_work(material, step, [0, 1]), 1e-2)
    after = gates_of(learner.segmenter)
    assert before and all((after[name] != before[name]).any() for name in before)
    save_adapter(learner.segmenter.network, tmp_path / "adapter")
    again = load_segmenter(material.config.model, tmp_path / "adapter")
    assert again.slab_slices == 3
    trained, loaded = (list(Predictor(s).embed_each(slices, range(8))) for s in (learner.segmenter, again))
    for one, other in zip(trained, loaded, strict=True):
        assert torch.equal(one.embedding, other.embedding)
    flat = [Predictor(again).embed(slices[n : n + 1])[0] for n in range(8)]
    assert all((a.embedding - b.embedding).abs().max() > 1e-3 for a, b in zip(flat, loaded, strict=True))


def test_equal_seeds_give_equal_adapters_and_so_does_a_run_that_was_cut(settings, run, tmp_path):
    class PowerCut(Exception):
        pass

    def cut(done, total, record):
        if done == 2:
            raise PowerCut

    with pytest.raises(PowerCut):
        finetune(settings(checkpoint_every=1), tmp_path / "cut", progress=cut)
    told = []
    resumed = finetune(
        settings(checkpoint_every=1), tmp_path / "cut", resume=True, progress=lambda done, *_: told.append(done)
    )
    assert told == [2]
    assert adapter_hash(resumed) == adapter_hash(run)
    with pytest.raises(UserError, match="--resume: depth was 3"):
        finetune(settings(checkpoint_every=1, depth=5), tmp_path / "cut", resume=True)


def test_from_the_command_line(tiny_dataset, tmp_path, capsys):
    words = ["--method", "msa", "--adapter-parts", *PARTS, "--depth", "3", "--backbone", "tiny-random"]
    words += ["--data", tiny_dataset, "--image-size", "64", "--steps", "2", "--batch-size", "1", "--device", "cpu"]
    words += ["--validation-cases", "1", "--validate-every", "1", "--exemplars", "2", "--out", tmp_path / "run"]
    assert main(["finetune", *map(str, words)]) == 0
    config = RunFolder(tmp_path / "run").load_config()
    assert (config.model.depth, config.model.adapter_parts, config.synthesis.real_share) == (3, PARTS, 1.0)
    scored = ["evaluate", tmp_path / "run", "--data", tiny_dataset, "--out", tmp_path / "scores.json"]
    assert main([*map(str, scored)]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["mean"]["dice"] is not None
    scan = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"
    (tmp_path / "clicks.json").write_text(json.dumps([{"class": "disc", "voxel": [11, 10, 2]}]))
    capsys.readouterr()
    predicted = ["predict", tmp_path / "run", scan, "--prompts", tmp_path / "clicks.json", "--out", tmp_path / "masks"]
    assert main([*map(str, predicted)]) == 0, capsys.readouterr().err
    for format_ in ("onnx", "safetensors"):
        assert main(["export", str(tmp_path / "run"), "--format", format_, "--out", str(tmp_path / "x")]) == 2
        assert "without adapters can be exported" in capsys.readouterr().err


# ---- networks in 3-D


def volumetric(data: Path, **changes) -> RunConfig:
    values = {
        "data": data,
        "image_size": 32,
        "exemplars": 2,
        "steps": 2,
        "warmup_steps": 0,
        "device": "cpu",
        "depth": 4,
    }
    return build_config("unet-3d", values | {"precision": "fp32", "checkpoint_every": 1} | changes)


def test_a_labelled_slice_is_anywhere_in_its_slab_and_so_is_one_without_organs(tiny_dataset, tmp_path):
    file = named(tmp_path / "exemplars.csv", [("case_0", 2), ("case_1", 3)])
    config = volumetric(tiny_dataset, exemplar_file=file, batch_size=8, empty_share=0.5, **AS_IT_IS)
    material = prepare(config)
    dataset, volumes = open_dataset(tiny_dataset), {}
    for case in dataset.cases:
        loaded = load_case(case, dataset, pick_window(material.config, dataset))
        volumes[case.id] = as_rgb(torch.from_numpy(loaded.image)), torch.from_numpy(loaded.label)
    found = set()  # (case, slice, its place)
    for step in range(10):
        work = draw_work(material, step, range(8))
        assert work.places is None and work.targets.shape == (8, 4, 32, 32)
        for slab, targets, image in zip(work.slabs, work.targets, work.images, strict=True):
            place = next(place for place, seen in enumerate(slab) if torch.equal(seen, image))
            [(id_, start)] = [
                (id_, start)
                for id_, (images, _) in volumes.items()
                for start in range(3)
                if torch.allclose(images[start : start + 4], slab, atol=1e-4)
            ]
            # The two exemplars and what shows no organ are labelled, each where it is; nobody knows of the others.
            shows = volumes[id_][1][start + place].any()
            for number, target in enumerate(targets, start):
                label = volumes[id_][1][number]
                known = (id_, number) in (("case_0", 2), ("case_1", 3)) and shows or not label.any()
                assert torch.equal(target, label if known else torch.full_like(target, UNLABELLED))
            found.add((id_, start + place, place))
    # Of six slices: the third can be at places 0 to 2, the fourth at 1 to 3, the first and the last at one alone.
    assert {each for each in found if each[1] in (2, 3)} == {
        *(("case_0", 2, place) for place in (0, 1, 2)),
        *(("case_1", 3, place) for place in (1, 2, 3)),
    }
    assert {each[1:] for each in found if each[1] not in (2, 3)} == {(0, 0), (5, 3)}


def test_the_last_slice_of_a_volume_that_is_too_short_is_repeated(tiny_dataset):
    work = draw_work(prepare(volumetric(tiny_dataset, depth=8)), 0, range(2))
    assert work.slabs.shape[1] == 8
    assert torch.equal(work.slabs[:, 6:], work.slabs[:, 5:6].expand(-1, 2, -1, -1, -1))
    assert not torch.equal(work.slabs[:, 4], work.slabs[:, 5])


def test_all_labelled_slices_of_a_slab_are_learned_from(tiny_dataset):
    """With all slices labelled; moved, scaled and turned, each label lies where its slice's organ does."""
    settings = {**METHODS["full-set"], "empty_share": 0.0, "rotation_deg": 40.0, "shift": 0.2}
    material = prepare(volumetric(tiny_dataset, batch_size=4, **settings))
    work = draw_work(material, 0, range(4))
    assert work.targets.shape == (4, 4, 32, 32) and not (work.targets == UNLABELLED).any()
    assert len(work.targets.unique(dim=0)) == 4
    own = material.slabs
    for number, (slab, targets) in enumerate(zip(work.slabs, work.targets, strict=True)):
        generator = torch.Generator().manual_seed(derive_seed(0, "sample", number))
        plan = draw(material.pool, material.config.synthesis, generator)
        key = own.exemplars[plan.exemplar]
        alone = render(material.pool, [plan], material.config.synthesis)
        [place] = [p for p in range(4) if torch.equal(as_rgb(alone.images)[0], slab[p])]
        assert torch.equal(alone.labels[0], targets[place])
        for beside, target in enumerate(targets, key.slice_number - place):
            row = own.rows[SliceKey(key.case_id, beside)]
            assert torch.equal(target, move_labels(own.labels[row][None], plan.ground)[0])
    outputs = torch.randn(16, 1, 3, 32, 32, requires_grad=True)
    unknown = work.targets.clone()
    unknown[0, 2] = unknown[3, 0] = UNLABELLED
    class_loss(outputs, unknown, 1.0, 1.0).backward()
    assert (outputs.grad.flatten(1) == 0).all(dim=1).nonzero()[:, 0].tolist() == [2, 12]


@torch.no_grad()
def test_slabs_are_answered_and_predicted_as_wholes(slices):
    model = replace(volumetric(Path()).model, class_names=("disc", "block"))
    segmenter = build_segmenter(model).eval()
    slabs = torch.rand(2, 4, 3, 32, 32)
    whole, some = segmenter.embed_slabs(slabs), segmenter.embed(slabs, None, torch.tensor([3, 1]))
    assert whole.shape == (2, 4, 3, 32, 32)
    assert torch.equal(some, whole[[0, 1], [3, 1]])
    assert torch.equal(segmenter(slabs, Prompts()), whole.flatten(0, 1)[:, None])
    predictor = Predictor(segmenter)
    framed = as_rgb(Frame(20, 32, 32).to_model(torch.from_numpy(slices)))
    slabs = {start: segmenter.embed_slabs(framed[None, start : start + 4])[0] for start in (0, 2, 4)}
    expected = {0: slabs[0][0], 3: (slabs[0][3] + 2 * slabs[2][1]) / 3, 7: slabs[4][3]}
    for number, embedded in zip(expected, predictor.embed_each(slices, list(expected)), strict=True):
        torch.testing.assert_close(predictor.classes(embedded), expected[number], atol=1e-4, rtol=0)
    volume = Volume(slices[:1, 0][None], (1.0, 1.0, 1.0), Grid(Path("scan.png"), (20, 32)))
    with pytest.raises(UserError, match=r"scan\.png has one slice, and this network sees volumes"):
        segment_auto(predictor, CaseSlices(slices[:1], None, volume), [1, 2])


def test_pictures_are_refused_by_a_network_of_volumes(tmp_path):
    with pytest.raises(UserError, match=r"--method unet-3d sees volumes, and p\d has one slice; give --method unet$"):
        prepare(volumetric(pictures(tmp_path / "pictures")))


def test_a_network_of_volumes_from_the_command_line(tiny_dataset, tmp_path, capsys):
    words = ["--method", "unet-3d", "--data", tiny_dataset, "--image-size", "32", "--depth", "4", "--exemplars", "2"]
    words += ["--steps", "2", "--checkpoint-every", "1", "--device", "cpu", "--precision", "fp32", "--seed", "0"]
    words += ["--validation-cases", "1", "--validate-every", "1"]
    for dry in ([], ["--dry-run"]):
        out = tmp_path / ("dry" if dry else "run")
        assert main(["finetune", *map(str, words), "--out", str(out), *dry]) == 0
    run = RunFolder(tmp_path / "run")
    config = run.load_config()

    def cut(done, total, record):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "cut", progress=cut)
    assert adapter_hash(finetune(config, tmp_path / "cut", resume=True)) == adapter_hash(run)
    scored = ["evaluate", tmp_path / "run", "--data", tiny_dataset, "--out", tmp_path / "scores.json"]
    assert main([*map(str, scored)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["prompts"], scores["method"], scores["n_cases"]) == ("auto", "unet-3d", 1)
    scan = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"
    assert main(["predict", str(tmp_path / "run"), str(scan), "--out", str(tmp_path / "masks")]) == 0
    assert len([*(tmp_path / "masks").glob("*.nii.gz")]) == 1
    (tmp_path / "pictures").mkdir()
    picture = pictures(tmp_path / "pictures" / "set") / "imagesTr" / "p0_0000.png"
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(picture), "--out", str(tmp_path / "more")]) == 2
    assert "p0_0000.png has one slice, and this network sees volumes" in capsys.readouterr().err
