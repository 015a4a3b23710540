"""`cheaplunch reproduce`: every row on made-up data, and two rows from the command line through whatever happens."""

import csv
import hashlib
import json
import shutil
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cheaplunch.__main__ import main
from cheaplunch.config import METHODS, load_config, slab_slices
from cheaplunch.data.dataset import make_dataset, split_by_patient
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.recipes import SYNAPSE
from cheaplunch.errors import Stopped, UserError
from cheaplunch.learner import Learner
from cheaplunch.models.lora import ADAPTER_FILE
from cheaplunch.models.segmenter import build_segmenter, load_segmenter
from cheaplunch.reproduction import beside_published, experiments, find_experiments, plan_jobs, rows_on, run_jobs
from cheaplunch.runs import RunFolder
from cheaplunch.scoring import Assessment, assess
from cheaplunch.training import finetune

SMALL = {"backbone": "tiny-random", "image_size": 64, "steps": 2, "batch_size": 2, "device": "cpu", "precision": "fp32"}
TEST_CASES = ("0001", "0002")  # two of TransUNet's


def organs(height: int, volume: int) -> np.ndarray:
    """(48, 48) uint8: eight blocks, all on slice 2, fewer above, none on slice 0."""
    label = np.zeros((48, 48), np.uint8)
    for number in range(1, 9):
        row, column = divmod(number - 1, 3)
        if height == 2 or (height and (number + volume + height) % 3 == 0):
            label[3 + 15 * row : 14 + 15 * row + volume % 2, 3 + 15 * column : 14 + 15 * column] = number
    return label


def write_synapse(root: Path, volumes: int) -> Path:
    """TransUNet's folder with `volumes` training volumes of four slices, three of them with organs."""
    noise = np.random.default_rng(3)

    def image(label: np.ndarray) -> np.ndarray:
        return np.clip(0.2 + label / 12 + noise.normal(0, 0.02, label.shape), 0, 1).astype(np.float32)

    for folder in ("train_npz", "test_vol_h5"):
        (root / folder).mkdir(parents=True)
    for volume in range(volumes):
        for height in range(4):
            label = organs(height, volume)
            path = root / f"train_npz/case{volume + 5:04d}_slice{height:03d}.npz"
            np.savez(path, image=image(label), label=label.astype(np.float32))
    for volume, name in enumerate(TEST_CASES):
        label = np.stack([organs(height, volume) for height in range(4)])
        with h5py.File(root / f"test_vol_h5/case{name}.npy.h5", "w") as file:
            file["image"], file["label"] = image(label), label.astype(np.float32)
    return root


@pytest.fixture(scope="module")
def synapse(tmp_path_factory) -> Path:
    return write_synapse(tmp_path_factory.mktemp("synapse") / "Synapse", 18)


@pytest.fixture(scope="module")
def brats(tmp_path_factory) -> Path:
    """BraTS 2018's folder with ten patients who train, 46 slices with a tumour each, and two who test."""
    root = tmp_path_factory.mktemp("brats") / "Training"
    names = [f"Brats18_{number}_1" for number in range(12)]
    noise = np.random.default_rng(4)
    row, column = np.mgrid[:32, :32]
    for number, name in enumerate(names):
        count = 5 if name in split_by_patient(names) else 48
        seg = np.zeros((32, 32, count), np.uint8)
        seg[(row - 12 - number % 5) ** 2 + (column - 15) ** 2 <= 40, 1:-1] = 2
        seg[(row - 12 - number % 5) ** 2 + (column - 15) ** 2 <= 8, 1:-1] = 4
        flair = np.select([seg > 0], [300.0], 100.0) + noise.normal(0, 20, seg.shape)
        for kind, array in (("flair", flair.astype(np.int16)), ("seg", seg)):
            path = root / "HGG" / name / f"{name}_{kind}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return root


def of(data: Path):
    """What trains and scores a row, without progress bars and reports."""

    def train(job, run) -> None:
        finetune(job.config, run.root, resume=run.config.is_file())

    def score(job) -> dict[str, dict]:
        assessment = Assessment(data, job.row.prompting, job.protocols, seed=job.config.seed)
        config = job.config if job.run is None else job.run.load_config()
        model = build_segmenter(config.model) if job.run is None else load_segmenter(config.model, job.run.adapter)
        return assess(model, config, assessment, "fp32", job.result.parent / "masks")

    return train, score


# ---- every row


@pytest.mark.parametrize(
    ("tables", "trained", "scored"), [("1,3,5", 11, 17), ("2,4,6", 13, 20)], ids=["brats", "synapse"]
)
def test_every_row_that_is_offered_runs(tables, trained, scored, request, tmp_path):
    name = "brats" if "1" in tables else "synapse"
    data = request.getfixturevalue(name)
    rows = find_experiments(",".join(f"cheap-lunch:{number}" for number in tables.split(",")))
    assert rows_on(rows, open_dataset(data)) == rows
    jobs = plan_jobs(rows, tmp_path, SMALL | {"data": data})
    told = []
    assert run_jobs(jobs, "these", *of(data), told.append) == {}
    assert len(jobs) == scored

    runs = {path.name: RunFolder(path) for path in (tmp_path / "runs").iterdir()}
    assert len(runs) == trained == sum("training, 2 steps" in line for line in told)  # tables share them
    for job in jobs:
        found = json.loads(job.result.read_text())
        assert (found["protocol"], found["prompts"], found["n_cases"]) == ("paper", job.row.published.prompts, 2)
        assert json.loads(job.result.with_suffix(".strict.json").read_text())["protocol"] == "strict"
        if job.run is None:
            assert found["method"] == "zero-shot"
            continue
        assert len(job.run.metrics.read_text().splitlines()) == 2
        made = load_config(job.run.config)
        assert (made.method, made.synthesis) == (job.row.method, job.config.synthesis)
        slices = {tuple(line.values())[:2] for line in csv.DictReader(job.run.exemplars.open())}
        wanted = 18 * 3 if name == "synapse" else 10 * 46  # every slice with foreground
        assert (
            len(slices)
            == made.data.exemplars
            == (wanted if job.config.data.strategy == "all" else job.config.data.exemplars)
        )

    again = []
    assert run_jobs(jobs, "these", *of(data), again.append) == {}
    assert all(line.endswith("done before") for line in again)
    if name == "synapse":
        for count in (9, 18, 36):  # of as many volumes as there are, though each slice is a file of its own
            chosen = [line["case"] for line in csv.DictReader(runs[f"synapse-ours-{count}"].exemplars.open())]
            assert len({case.partition("_slice")[0] for case in chosen}) == min(count, 18)
            assert sum(case.endswith("_slice002") for case in chosen) == min(count, 18)  # the one with all organs


# ---- Medical SAM Adapter's tables


def save(path: Path, values: np.ndarray) -> None:
    """A volume (i, j, k) or a picture, by the ending of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in path.name:
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    else:
        Image.fromarray(values).save(path)


def disc(shape: tuple[int, int], row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(y - row, x - column) <= radius


def volume(classes: int, moved: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (60, 60, 6) int16 and label uint8: a block a class on all slices but the first and the last."""
    label = np.zeros((60, 60, 6), np.uint8)
    for number, (row, column) in zip(range(1, classes + 1), product(range(4), range(4)), strict=False):
        label[2 + 15 * row : 12 + 15 * row + moved, 2 + 15 * column : 13 + 15 * column, 1:-1] = number
    noise = np.random.default_rng(moved).normal(0, 5, label.shape)
    return (label * 15.0 + noise).astype(np.int16), label


def picture(moved: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A photograph (80, 80, 3) of a disc with a cup, and the two as masks (80, 80) bool."""
    whole, cup = (disc((80, 80), 38 + moved, 40, radius) for radius in (30, 14))
    photograph = np.where(whole, 130, 60) + np.where(cup, 80, 0)
    return np.repeat(photograph[..., None], 3, axis=2).astype(np.uint8), whole, cup


def write_amos(root: Path) -> None:
    for side, number in (("Tr", 1), ("Tr", 2), ("Va", 3)):
        for folder, array in zip(("images", "labels"), volume(15, number % 3), strict=True):
            save(root / f"{folder}{side}" / f"amos_000{number}.nii.gz", array)


def write_btcv(root: Path) -> None:
    for number in (1, 5, 6):  # the first tests
        for folder, array in zip(("img", "label"), volume(13, number % 3), strict=True):
            save(root / folder / f"{folder}000{number}.nii.gz", array)


def write_brats(root: Path) -> None:
    for number in range(3):
        image, label = volume(1, number)
        for kind, array in (("flair", image), ("seg", label * np.uint8(4))):
            save(root / f"BraTS2021_0000{number}" / f"BraTS2021_0000{number}_{kind}.nii.gz", array)


def write_refuge(root: Path) -> None:
    for number, name in enumerate(("g0001", "n0001", "T0001")):
        photograph, whole, cup = picture(number)
        save(root / f"{name}.jpg", photograph)
        save(root / "Disc_Cup_Masks" / f"{name}.bmp", np.select([cup, whole], [0, 128], 255).astype(np.uint8))


def write_riga(root: Path) -> None:
    for number, place in enumerate(("MESSIDOR", "BinRushed/BinRushed2", "Magrabia/MagrabiFemale")):
        photograph, *masks = picture(number)
        lines = np.any([mask & ~np.roll(mask, 1, 0) | mask & ~np.roll(mask, 1, 1) for mask in masks], axis=0)
        lines |= np.any([mask & ~np.roll(mask, -1, 0) | mask & ~np.roll(mask, -1, 1) for mask in masks], axis=0)
        save(root / place / "image1prime.tif", photograph)
        for expert in range(1, 4):
            save(root / place / f"image1-{expert}.tif", np.where(lines[..., None], 0, photograph).astype(np.uint8))


def write_tn_scui(root: Path) -> None:
    for number in range(3):
        photograph, _, nodule = picture(number)
        save(root / "TNSCUI2020_train" / "image" / f"{number}.PNG", photograph[..., 0])
        save(root / "TNSCUI2020_train" / "mask" / f"{number}.PNG", nodule.astype(np.uint8) * 255)


def write_ddti(root: Path) -> None:
    points = ", ".join(f'{{"x": {x}, "y": {y}}}' for x, y in ((20, 20), (50, 20), (50, 50), (20, 50)))
    svg = f'[{{"points": [{points}]}}]'
    for number in range(1, 4):
        save(root / f"{number}_1.jpg", picture(number)[0][..., 0])
        mark = f"<mark><image>1</image><svg>{svg}</svg></mark>"
        (root / f"{number}.xml").write_text(f"<case><number>{number}</number>{mark}</case>")


def write_isic(root: Path) -> None:
    for number, side in enumerate(("Training", "Training", "Test")):
        photograph, lesion, _ = picture(number)
        save(root / f"ISIC2018_Task1-2_{side}_Input" / f"ISIC_000000{number}.jpg", photograph)
        mask = root / f"ISIC2018_Task1_{side}_GroundTruth" / f"ISIC_000000{number}_segmentation.png"
        save(mask, lesion.astype(np.uint8) * 255)


WRITERS = {
    "amos": write_amos,
    "btcv": write_btcv,
    "brats": write_brats,
    "refuge": write_refuge,
    "riga": write_riga,
    "tn-scui": write_tn_scui,
    "ddti": write_ddti,
    "isic": write_isic,
}
MSA_ROWS = [row for number in (1, 2, 3) for row in experiments()[f"msa:{number}"] if row.offered]
# One of each experiment, the networks of 25 to 105 million parameters apart, and each data set once.
QUICK = {"amos-sam-1", "amos-medsam", "amos-msa", "btcv-sam-10", "brats-msa", "refuge-msa", "riga-sam-3"}
QUICK |= {"tn-scui-msa", "ddti-sam-1", "isic-sam-1"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Short name → the data set's folder, as its owners have it, with one test case."""
    root = tmp_path_factory.mktemp("published")
    for name, write in WRITERS.items():
        write(root / name)
    return lambda name: root / name


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.run, marks=[pytest.mark.slow] * (r.run not in QUICK)) for r in MSA_ROWS]
)
def test_every_row_of_msa_that_is_offered_runs(row, published, tmp_path):
    data = published(row.data)
    [row] = rows_on([row], open_dataset(data))
    jobs = plan_jobs([row], tmp_path, SMALL | {"data": data})
    told = []
    assert run_jobs(jobs, "these", *of(data), told.append) == {}
    [job] = jobs
    asked = str(row.prompting).replace(":", "-")
    assert job.result.name == f"{row.run}-{asked}.json"
    found = json.loads(job.result.read_text())
    assert (found["protocol"], found["prompts"]) == ("msa", str(row.prompting))
    assert (found["method"], found["n_cases"]) == (row.method, 1)
    targets = {"amos": 15, "btcv": 12}.get(row.data, 1)
    assert len(found["classes"]) == targets and found["mean"]["dice"] is not None and found["mean"]["hd95"] is None
    strict = json.loads(job.result.with_suffix(".strict.json").read_text())
    assert strict["protocol"] == "strict" and strict["mean"]["hd95"] is not None
    if row.method == "zero-shot":
        assert job.run is None
        return
    assert len(job.run.metrics.read_text().splitlines()) == 2
    made = load_config(job.run.config)
    assert made.method == row.method and made.data.strategy == "all"
    volumes = row.data in ("amos", "btcv", "brats")
    assert made.data.exemplars == (2 * 4 if volumes else 2)  # every training slice with a target
    assert (slab_slices(made.model) > 1) == (volumes and row.method != "transunet" and row.method != "medsam")
    assert made.data.classes == (("cup",) if row.data in ("refuge", "riga") else None)
    shutil.rmtree(tmp_path)  # up to 400 MB


def test_a_table_on_several_data_sets_in_one_folder(published, tmp_path, capsys):
    out = tmp_path / "out"
    for data, names in (("refuge", ("refuge-sam-1", "refuge-sam-3", "nnunet")), ("isic", ("isic-sam-1",))):
        assert reproduce(published(data), out, "--rows", *names, table="msa:3") == 0
    told = capsys.readouterr().out
    assert "msa:3/nnunet: left out, the method nnunet is not offered: it runs in an environment of its own" in told
    assert "[1/2] msa:3/refuge-sam-1: evaluating, oracle prompts: " in told
    refuge, isic = (json.loads((out / "results" / f"{d}-sam-1-clicks-1.json").read_text()) for d in ("refuge", "isic"))
    assert list(refuge["classes"]) == ["cup"]
    with (out / "msa-3.csv").open() as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    labels = [label for label in lines if label.startswith("SAM, 1")]
    assert labels == [
        *(f"SAM, 1 points: {what}" for what in ("here, refuge", "here, isic", "paper")),
        *(f"SAM, 1 points: here − paper, {data}" for data in ("refuge", "isic")),
    ]
    cup, lesion = "Optic-Cup Dice [msa:3]", "Lesion Dice [msa:3]"
    assert float(lines["SAM, 1 points: here, refuge"][cup]) == pytest.approx(refuge["mean"]["dice"])
    assert float(lines["SAM, 1 points: here, isic"][lesion]) == pytest.approx(isic["mean"]["dice"])
    assert not lines["SAM, 1 points: here, isic"][cup] and not lines["MSA: paper"][lesion]
    assert float(lines["MSA: paper"][cup]) == 0.868
    text = (out / "msa-3.md").read_text()
    assert "Here: REFUGE, 1 test cases; ISIC lesion segmentation, 1 test cases." in text
    assert "Not run here: the method mtseg is not offered: it is made for thyroid nodules." in text
    assert "Run with backbone tiny-random in place of sam-vit-h, image-size 64 in place of the default" in text


def test_a_row_finds_its_data_by_classes_and_name(tmp_path):
    def named(name: str, *classes: str):
        labels = {label: number for number, label in enumerate(classes, start=1)}
        return make_dataset(tmp_path, cases=[], labels=labels, channel_names=("0",), split_rule="", name=name)

    def found(table: str, *data: str, rows=None) -> set[str]:
        return {row.data for row in rows_on(find_experiments(table, rows), named(*data)) if row.offered}

    assert found("msa:3", "Dataset007_DDTI", "nodule") == {"ddti"}
    assert found("msa:3", "Task01_BrainTumour", "brain tumor") == {"brats"}
    assert found("msa:3", "mine", "thyroid_nodule", rows=["tn-scui-msa"]) == {"tn-scui"}
    organs = experiments()["msa:2"][0].classes
    assert found("cheap-lunch:2,msa:2", "Synapse multi-organ CT (BTCV, raw)", *organs) == {"synapse", "btcv"}
    [sam] = rows_on(find_experiments("cheap-lunch:2", ["sam"]), named("Synapse, raw", *organs))
    assert set(sam.config({}).data.classes or ()) == set(SYNAPSE)  # eight of the twelve
    for table, rows, data, said in (
        ("msa:3", None, ("mine", "nodule"), "may be ddti or tn-scui, which its name (mine) does not tell; choose the"),
        ("msa:3", ["refuge-msa"], ("RIGA", "disc", "cup"), "--rows: those of msa:3 are on refuge, but --data"),
        ("msa:3", None, ("mine", "disc", "cup"), "but msa:3 is on brats: brain tumor; refuge: optic cup; riga: "),
        ("msa:1", None, ("BTCV", *organs), "but msa:1 is on AMOS: spleen, right kidney, left"),
        ("cheap-lunch:2", None, ("AMOS 2022", *SYNAPSE, "duodenum"), "but cheap-lunch:2 is on Synapse: aorta"),
    ):
        with pytest.raises(UserError) as error:
            found(table, *data, rows=rows)
        assert said in str(error.value)


# ---- from the command line


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Nine volumes: enough for nine exemplars, but not for 36."""
    return write_synapse(tmp_path_factory.mktemp("few") / "Synapse", 9)


def reproduce(data: Path, out: Path, *more: object, table: str = "cheap-lunch:2") -> int:
    words = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    return main([str(word) for word in ("reproduce", table, "--data", data, "--out", out, *words, *more)])


def test_interrupted_gone_on_with_and_one_row_that_fails(few, tmp_path, capsys, monkeypatch):
    out, rows = tmp_path / "out", ("--rows", "ours-9", "ours-36", "samed-9", "--steps", 4)
    step, taken = Learner.step, []

    def step_and_sigterm(self, *arguments):
        taken.append(step(self, *arguments))
        if len(taken) == 2:
            signal.raise_signal(signal.SIGTERM)
        return taken[-1]

    monkeypatch.delitem(METHODS, "samed")  # as a method of a later version is
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step_and_sigterm)
        assert reproduce(few, out, *rows) == 1
    assert "stopped in cheap-lunch:2/ours-9; the same command goes on" in capsys.readouterr().err
    assert not (out / "results").exists()

    assert reproduce(few, out, *rows) == 1
    told = capsys.readouterr()
    assert "cheap-lunch:2/samed-9: left out, the method samed is not offered yet" in told.out
    assert "[1/2] cheap-lunch:2/ours-9: going on with the training, 4 steps in all" in told.out
    assert "[2/2] cheap-lunch:2/ours-36: failed: --exemplars 36: only 27 training slices" in told.out
    assert "1 of 2 rows failed" in told.err
    run = RunFolder(out / "runs" / "synapse-ours-9")
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4]
    [row] = find_experiments("cheap-lunch:2", ["ours-9"])
    whole = finetune(row.config(SMALL | {"steps": 4, "data": few}), tmp_path / "undisturbed")
    assert adapter(run) == adapter(whole)
    assert run.report.is_file()

    result = json.loads((out / "results" / "synapse-ours-9-furthest.json").read_text())
    text = (out / "cheap-lunch-2.md").read_text()
    dice = result["mean"]["dice"]
    [here, paper, less] = [line for line in text.splitlines() if line.startswith("| Ours, 9 ")]
    assert f"| {dice:.4f}" in here and "| 0.7908 | 21.62 | 0.8875 |" in paper
    assert f"| {dice - 0.7908:+.4f} | {result['mean']['hd95'] - 21.62:+.2f} |" in less
    assert "Failed here: --exemplars 36: only 27 training slices" in text
    assert "Run with backbone tiny-random in place of sam-vit-b, " in text
    assert "Not run here: the method samed is not offered yet." in text
    assert "Synapse multi-organ CT (TransUNet's slices), 2 test cases" in text
    assert "<html" in (out / "cheap-lunch-2.html").read_text()
    with (out / "cheap-lunch-2.csv").open() as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    place = "DSC [cheap-lunch:2]"
    found = [
        float(lines[f"Ours, 9 (one per two volumes): {what}"][place]) for what in ("here", "paper", "here − paper")
    ]
    assert found == pytest.approx([dice, 0.7908, dice - 0.7908])

    # A row of another table is the same evaluation where the prompts are the same, and else the same run.
    before = adapter(run)
    assert reproduce(few, out, "--rows", "ours-9", "--steps", 4, table="cheap-lunch:4,cheap-lunch:6") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert told[0] == "[1/2] cheap-lunch:4/ours-9: done before"
    assert len(told) == 2 and "cheap-lunch:6/ours-9: evaluating, oracle prompts: one random point" in told[1]
    assert adapter(run) == before
    assert json.loads((out / "results" / "synapse-ours-9-random.json").read_text())["prompts"] == "random"
    assert f"| {dice:.4f}" in (out / "cheap-lunch-4.md").read_text()
    assert "printed as 72.88, but the mean of its row is 71.07" in (out / "cheap-lunch-6.md").read_text()

    # What lies there was made otherwise.
    for words, naming in (
        (
            ("--rows", "ours-9", "--steps", 5),
            "furthest.json was made with --steps 4, not 5; give that, or another --out",
        ),
        (("--rows", "ours-9", "--steps", 4, "--seed", 1), "with --seed 0, not 1"),
    ):
        assert reproduce(few, out, *words) == 2
        assert naming in capsys.readouterr().err
    (out / "results" / "synapse-ours-9-furthest.json").unlink()
    assert reproduce(few, out, "--rows", "ours-9", "--steps", 5) == 2
    assert "synapse-ours-9 was made with --steps 4, not 5" in capsys.readouterr().err


def adapter(run: RunFolder) -> str:
    return hashlib.sha256((run.adapter / ADAPTER_FILE).read_bytes()).hexdigest()


def test_the_list_and_a_row_s_settings_for_finetune(few, tmp_path, capsys, monkeypatch):
    assert main(["reproduce", "cheap-lunch:2,cheap-lunch:4", "--list", "--steps", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 11 + 6
    [ours] = [line.split() for line in lines if line.startswith("cheap-lunch:2/ours-18")]
    assert ours[-6:] == ["cheap-lunch", "sam-vit-b", "18", "50", "24", "furthest"]
    [samed] = [line.split() for line in lines if line.startswith("cheap-lunch:2/samed-18")]
    assert samed[-6:] == ["samed", "sam-vit-b", "18", "50", "24", "auto"]
    with monkeypatch.context() as patch:
        patch.delitem(METHODS, "samed")
        assert main(["reproduce", "cheap-lunch:2", "--list"]) == 0
    assert [line.endswith("not offered yet") for line in capsys.readouterr().out.splitlines()].count(True) == 4

    words = ["finetune", "--config", "cheap-lunch:4/without-9", "--data", few, "--out", tmp_path / "run"]
    words += [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main([str(word) for word in words]) == 0
    made = load_config(tmp_path / "run" / "config.yaml")
    assert (made.synthesis.real_share, made.data.exemplars, made.training.learning_rate) == (1, 9, 0.001)


def test_msa_s_list(capsys):
    assert main(["reproduce", "msa:1", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 12
    assert sum(" is not offered: " in line for line in lines) == 4
    [msa] = [line.split() for line in lines if line.startswith("msa:1/msa ")]
    assert msa[1:] == ["MSA,", "1-point", "msa", "sam-vit-h", "all", "40000", "16", "clicks:1"]


def test_wrong_input(tiny_dataset, few, tmp_path, capsys):
    out = tmp_path / "out"
    for words, naming in [
        (["msa:1", "--data", few, "--out", out], "has the classes aorta, gallbladder, "),
        (["msa:3", "--data", few, "--out", out], "but msa:3 is on brats: brain tumor; refuge: optic cup; "),
        (["msa:4", "--data", few, "--out", out], "msa:4: there is no such table"),
        (["cheap-lunch:9", "--data", few, "--out", out], "cheap-lunch:9: there is no such table"),
        (["cheap-lunch:2", "--data", few], "--out is missing"),
        (["cheap-lunch:2", "--out", out], "--data is missing"),
        (["cheap-lunch:2", "--data", few, "--out", __file__], "test_reproduce.py is a file; give a folder"),
        (["cheap-lunch:2", "--data", few, "--out", out, "--rows", "ours-10"], "--rows ours-10"),
        (["cheap-lunch:2", "--data", few, "--out", out, "--weights", "x.pth"], "--weights"),
        (
            ["cheap-lunch:2", "--data", tiny_dataset, "--out", out],
            "has the classes disc, block, but cheap-lunch:2 is on",
        ),
        (["cheap-lunch:2", "--data", tmp_path / "none", "--out", out], "no such folder"),
    ]:
        assert main(["reproduce", *map(str, words)]) == 2
        captured = capsys.readouterr()
        [line] = captured.err.strip().splitlines()
        assert naming in line
        assert not captured.out
    assert not out.exists()


# ---- the loop and the table by hand


def test_no_failure_keeps_the_others(few, tmp_path):
    jobs = plan_jobs(find_experiments("cheap-lunch:2", ["ours-1", "ours-9", "ours-18"]), tmp_path, SMALL)
    asked = []

    def score(job):
        asked.append(job.row.name)
        if job.row.name == "ours-1":
            raise ZeroDivisionError("by\nzero")
        if job.row.name == "ours-18":
            raise KeyboardInterrupt
        return {protocol: {"protocol": protocol} for protocol in job.protocols}

    told = []
    with pytest.raises(Stopped, match=r"stopped in cheap-lunch:2/ours-18; the same command goes on"):
        run_jobs(jobs, "these", lambda job, run: None, score, told.append)
    trace = tmp_path / "results" / "synapse-ours-1-furthest.failed.txt"
    assert f"failed: ZeroDivisionError: by zero ({trace} shows where)" in told[2]
    assert "in score" in trace.read_text()
    assert asked == ["ours-1", "ours-9", "ours-18"]
    assert json.loads(jobs[1].result.read_text())["settings"]["steps"] == 2
    with pytest.raises(Stopped):
        run_jobs(jobs, "these", lambda job, run: None, score, told.append)
    assert asked[3:] == ["ours-1", "ours-18"]  # what is done is left alone


def test_a_table_of_figures_worked_by_hand():
    """One class missed altogether; classes in another order and spelling than the paper's."""
    rows = experiments()["cheap-lunch:6"]
    [nine] = [row for row in rows if row.name == "ours-9"]
    names = {name.replace(" ", "_"): index for index, name in enumerate(reversed(list(SYNAPSE)))}
    classes = {name: {"dice": 0.5 + index / 100, "hd95": 3.0} for name, index in names.items()}
    classes["aorta"] = {"dice": None, "hd95": None}
    result = {
        "classes": classes,
        "mean": {"dice": 0.75, "hd95": 20.0},
        "ci95": {"dice": [0.7, 0.8]},
        "n_cases": 12,
        "dataset": "Synapse",
        "settings": {name: value for name, value in nine.settings.items() if name != "steps"} | {"steps": 7},
    }
    comparison = beside_published(rows, {"ours-9": result}, {"synapse-ours-18-random": "the disk is full"})
    lines = {line.label: line for block in comparison.blocks for group in block.groups for line in group.rows}
    here, paper, less = (lines[f"Ours, 9 (one per two volumes): {what}"] for what in ("here", "paper", "here − paper"))
    assert [cell.text for cell in here.cells[:5]] == ["0.7500", "20.00", "–", "0.5600", "0.5500"]
    assert here.cells[0].interval == (0.7, 0.8)
    assert [cell.text for cell in paper.cells[:4]] == ["0.7683", "16.05", "0.8840", "0.5245"]
    assert [cell.text for cell in less.cells[:5]] == ["-0.0183", "+3.95", "–", "+0.0355", "-0.3259"]
    assert comparison.footnotes[here.notes[0] - 1] == "Run with steps 7 in place of 12000."
    said = {label: [comparison.footnotes[n - 1] for n in line.notes] for label, line in lines.items()}
    assert said["Ours, 18 (one per volume): paper"] == ["Failed here: the disk is full"]
    assert said["SAM: paper"] == ["The SAM tested is ViT-H; all others are ViT-B.", "Not run here."]
    assert "DSC is printed as 81.25, but the mean of its row is 81.34." in said["Ours, 36 (two per volume): paper"]
    assert "Pancreas and Stomach are equal, 50.72, which looks copied." in said["Ours, 1 (one exemplar): paper"]
    assert replace(comparison.blocks[0], groups=()).columns[9].heading == "Stomach"
