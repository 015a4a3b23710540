"""What MONAI Label's own client does with a running server: connects, clicks, submits, trains, and clicks again."""

import contextlib
import hashlib
import json
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
import SimpleITK as sitk
import uvicorn

from cheaplunch.__main__ import main
from cheaplunch.data.cases import CaseSlices
from cheaplunch.data.volume import read_volume
from cheaplunch.errors import UserError
from cheaplunch.interactive import Mark, open_model, quality_of
from cheaplunch.prediction import segment_auto
from cheaplunch.runs import RunFolder
from cheaplunch.serving.access import Access
from cheaplunch.serving.app import build_app
from cheaplunch.serving.datastore import Datastore, Entry, file_name
from cheaplunch.serving.monailabel_answers import Images
from cheaplunch.serving.opened import Loaded, Served, load, on_voxels
from cheaplunch.serving.server import listen
from cheaplunch.serving.strategies import STRATEGIES, next_image
from cheaplunch.serving.training_job import TrainingJobs, Wanted, write_training_data

CLASSES = {"disc": 5, "block": 9}  # as the data numbers them; to clients they are 1 and 2
AFFINE = np.array([[0, 1.0, 0, 9], [-1, 0, 0, 7], [0, 0, 3, -5], [0, 0, 0, 1.0]])  # i runs posterior, j right
SHAPE = (32, 28, 6)
SMALL = ["--backbone", "tiny-random", "--image-size", "64", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def client_module():
    """MONAI Label's client as it is published; its package would bring torchvision and a package `tests`."""
    pytest.importorskip("cgi")  # which the client imports, and Python has until 3.12
    wheels = sorted((Path(sys.prefix) / "wheels").glob("monailabel-*.whl"))
    if not wheels:
        pytest.skip("the client's wheel is not there; `make install` fetches it")
    module = types.ModuleType("monailabel_client")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        source = wheel.read("monailabel/client/client.py")
    exec(compile(source, "monailabel/client/client.py", "exec"), module.__dict__)
    return module


def made_up(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(i, j, k) image and label: a bright disc and a dim block, elsewhere in each, on slices 1 to 4."""
    i, j = np.mgrid[: SHAPE[0], : SHAPE[1]]
    label = np.zeros(SHAPE, np.uint8)
    label[(i - 8 - number) ** 2 + (j - 9) ** 2 <= 30, 1:5] = CLASSES["disc"]
    label[20:28, 14 : 22 + number, 1:5] = CLASSES["block"]
    noise = np.random.default_rng(number).normal(0, 8, SHAPE)
    return (np.select([label == 5, label == 9], [200.0, 120.0], 50.0) + noise).astype(np.float32), label


def save(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """Two steps on one volume: it has learned next to nothing."""
    root = tmp_path_factory.mktemp("learned")
    data = root / "set"
    for number in (0, 1):
        image, label = made_up(number)
        save(image, data / "imagesTr" / f"own_{number}_0000.nii.gz")
        save(label, data / "labelsTr" / f"own_{number}.nii.gz")
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, **CLASSES}, "file_ending": ".nii.gz"}
    (data / "dataset.json").write_text(json.dumps(about))
    words = ["finetune", "--data", data, "--out", root / "run", *SMALL, "--steps", 2, "--exemplars", 1]
    words += ["--tuning", "full", "--decoder-tuning", "full", "--batch-size", 2, "--synthetic", 40, "--warmup-steps", 2]
    assert main([str(word) for word in words]) == 0
    return RunFolder(root / "run")


@pytest.fixture(scope="module")
def loaded(run) -> Loaded:
    return load(run, run.load_config())


@pytest.fixture
def data(tmp_path) -> Path:
    """Four volumes that nobody has labelled."""
    for number in range(2, 6):
        save(made_up(number)[0], tmp_path / "images" / f"patient_{number}.nii.gz")
    return tmp_path / "images"


@contextlib.contextmanager
def served_at(loaded: Loaded, data: Path, labels: Path, token: str | None = None):
    """The address of a server that runs beside the test."""
    listening = listen("127.0.0.1", 0)
    app = build_app(Served(loaded, data), Access(token=token), labels)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(client_module, loaded, data, tmp_path):
    with served_at(loaded, data, tmp_path / "labels") as address:
        yield client_module.MONAILabelClient(address, tmpdir=str(tmp_path))


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def voxels(path: Path | str) -> np.ndarray:
    """(i, j, k), as 3D Slicer reads it."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T


def clicks(number: int) -> dict[str, list[list[int]]]:
    """One on each class of the slices 1 to 4 of `made_up`."""
    return {"disc": [[8 + number, 9, k] for k in range(1, 5)], "block": [[23, 17, k] for k in range(1, 5)]}


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean over both classes."""
    return float(
        np.mean([2 * ((found == n) & (truth == n)).sum() / ((found == n).sum() + (truth == n).sum()) for n in (1, 2)])
    )


# ---- what there is


def test_connects_and_sees_a_model_to_click_with(client, run):
    info = client.info()
    [(name, model)] = info["models"].items()
    assert (name, model["type"], model["dimension"], model["labels"]) == ("run", "deepgrow", 3, [])
    assert info["labels"] == ["disc", "block"] and info["trainers"]["run"]["config"]["steps"] == 2
    assert info["datastore"] == {"total": 4, "completed": 0, "label_tags": {}} and set(info["strategies"]) == set(
        STRATEGIES
    )
    assert client.auth_enabled() is False
    assert str(run.root.parent) not in json.dumps([info, client.datastore()])


# ---- clicks


def test_clicks_find_what_predict_finds_with_them(client, run, data):
    model = open_model(run, run.load_config())
    case = model.open([data / "patient_2.nii.gz"])
    for asked, said in (
        # DeepGrow's form, one class; DeepEdit's, all at once
        ({"label": "block", "foreground": clicks(2)["block"], "background": [[3, 3, 2]]}, [("block", True)]),
        ({**clicks(2), "label": "disc", "background": []}, [("disc", True), ("block", True)]),
    ):
        marks = [Mark(name, "voxel", (tuple(at),)) for name, _ in said for at in clicks(2)[name]]
        marks += [Mark("block", "voxel", ((3.0, 3.0, 2.0),), False)] if "foreground" in asked else []
        prompts = [case.place(mark, CLASSES) for mark in marks]
        expected = case.label(case.propagate(prompts, case.segment(prompts)))
        file, params = client.infer("run", "patient_2", {**asked, "result_extension": ".nrrd", "result_dtype": "uint8"})
        names = ["block"] if "foreground" in asked else ["disc", "block"]
        assert params["label_names"] == {name: place for place, name in enumerate(names, start=1)}
        assert str(file).endswith(".nrrd") and expected.any()
        # The array runs (Z, Y, X) towards S, P and L: here k, i and −j.
        turned = expected.transpose(1, 2, 0)[:, ::-1]
        for place, name in enumerate(names, start=1):
            assert np.array_equal(voxels(file) == place, turned == CLASSES[name])
            assert params["voxels"][name] == (turned == CLASSES[name]).sum()
        image, mask = sitk.ReadImage(str(data / "patient_2.nii.gz")), sitk.ReadImage(str(file))
        assert image.GetSize() == mask.GetSize() and np.allclose(image.GetDirection(), mask.GetDirection(), atol=1e-6)
        assert np.allclose(image.GetOrigin(), mask.GetOrigin(), atol=1e-4)


def test_an_image_of_the_clients_own_is_asked_about_in_a_session(client, data):
    asked = {"label": "disc", "foreground": clicks(3)["disc"], "propagate": False}
    there, _ = client.infer("run", "patient_3", dict(asked))
    session = client.create_session(str(data / "patient_3.nii.gz"))["session_id"]
    here, _ = client.infer("run", "patient_3", dict(asked), session_id=session)
    alone, _ = client.infer("run", "", dict(asked), file=str(data / "patient_3.nii.gz"))
    assert np.array_equal(voxels(there), voxels(here)) and np.array_equal(voxels(there), voxels(alone))
    assert client.get_session(session)["image"] == "patient_3"
    client.remove_session(session)
    with pytest.raises(Exception, match="no longer open") as gone:
        client.get_session(session)
    assert gone.value.status_code == 404


@pytest.mark.parametrize(
    ("image", "model", "asked", "says"),
    [
        (
            "patient_2",
            "run",
            {"label": "liver", "foreground": [[1, 1, 1]]},
            "label is 'liver'; the classes are: disc, block",
        ),
        ("patient_2", "run", {"label": "disc", "foreground": []}, "nothing is clicked of disc"),
        ("patient_2", "run", {"label": "disc", "foreground": [[1, 1]]}, "foreground is not understood"),
        ("patient_2", "run", {"label": "disc", "foreground": [[1, 28, 1]]}, "lies outside of patient_2"),
        ("patient_2", "run", {"disc": [[1, 1, 1]], "result_extension": ".png"}, "cannot hold a mask"),
        ("patient_2", "other", {"disc": [[1, 1, 1]]}, "there is no model 'other'"),
        ("../images/patient_2", "run", {"disc": [[1, 1, 1]]}, "there is no image '../images/patient_2'"),
    ],
)
def test_what_cannot_be_meant_is_said(client, image, model, asked, says):
    with pytest.raises(Exception) as refused:
        client.infer(model, image, asked)
    assert says in refused.value.msg


# ---- labels


def slicer_label(number: int, path: Path, names=("disc", "block")) -> tuple[str, dict]:
    """As 3D Slicer writes segments: numbered from 1 in their own order."""
    _, label = made_up(number)
    own = np.zeros(SHAPE, np.uint8)
    for idx, name in enumerate(names, start=1):
        own[label == CLASSES[name]] = idx
    return str(save(own, path)), {"label_info": [{"name": name, "idx": n} for n, name in enumerate(names, start=1)]}


def test_a_submitted_label_is_kept_beside_and_the_next_image_is_another(client, data, tmp_path):
    before = contents(data)
    assert client.next_sample("first", {})["id"] == "patient_2"
    label, said = slicer_label(2, tmp_path / "sent.nii.gz", names=("block", "disc"))
    assert client.save_label("patient_2", label, params=said)["voxels"] == {
        "disc": int((made_up(2)[1] == 5).sum()),
        "block": int((made_up(2)[1] == 9).sum()),
    }
    kept = nib.load(tmp_path / "labels" / "labels" / "final" / "patient_2.nii.gz")
    assert np.array_equal(np.asarray(kept.dataobj), made_up(2)[1]) and np.allclose(kept.affine, AFFINE)
    assert np.array_equal(
        voxels(client.download_label("patient_2", "final")), np.select([made_up(2)[1] == n for n in (5, 9)], [1, 2])
    )
    assert client.next_sample("first", {})["id"] == "patient_3"
    assert {client.next_sample("random", {})["id"] for _ in range(40)} == {"patient_3", "patient_4", "patient_5"}
    assert client.info()["datastore"] == {"total": 4, "completed": 1, "label_tags": {"final": 1}}
    assert list(client.datastore()["objects"]["patient_2"]["labels"]) == ["final"]
    assert contents(data) == before


def test_the_image_is_had_as_it_is(client, data):
    answer = requests.get(f"{client.get_server_url()}/datastore/image", {"image": "patient_4"})
    assert answer.content == (data / "patient_4.nii.gz").read_bytes()
    assert 'filename="patient_4.nii.gz"' in answer.headers["content-disposition"]
    assert requests.head(f"{client.get_server_url()}/datastore/image", params={"image": "no"}).status_code == 404


def test_a_label_that_does_not_fit_is_refused(client, tmp_path):
    short = save(np.ones((32, 28, 5), np.uint8), tmp_path / "short.nii.gz")
    with pytest.raises(Exception) as refused:
        client.save_label("patient_2", str(short), params={})
    assert "short.nii.gz has shape (32, 28, 5) but patient_2.nii.gz has (32, 28, 6)" in refused.value.msg
    label, said = slicer_label(2, tmp_path / "sent.nii.gz")
    said["label_info"][1]["name"] = "Segment_1"
    with pytest.raises(Exception) as refused:
        client.save_label("patient_2", label, params=said)
    assert "voxels of 'Segment_1', and the classes are disc, block" in refused.value.msg
    (tmp_path / "text.nii.gz").write_text("no label")
    with pytest.raises(Exception) as refused:
        client.save_label("patient_2", str(tmp_path / "text.nii.gz"), params={})
    assert "text.nii.gz is no image that is known here" in refused.value.msg
    assert str(tmp_path) not in refused.value.msg and not (tmp_path / "labels").exists()


def test_a_volume_that_a_client_brings_is_labelled_like_any(client, data, tmp_path):
    """Slicer calls it as its node is called, and goes on calling it so."""
    source, label = save(made_up(7)[0], tmp_path / "sent" / "x.nii.gz"), slicer_label(7, tmp_path / "sent.nii.gz")
    for id_ in ("1: T1/sag", "../../../patient_2"):
        client.upload_image(str(source), id_)
        assert client.save_label(id_, label[0], params=label[1])["voxels"]["block"] > 0
    with pytest.raises(Exception) as refused:
        client.upload_image(str(source), "patient_2")
    assert "there is another image 'patient_2' already" in refused.value.msg
    kept = {p.name for p in (tmp_path / "labels").rglob("*") if p.is_file()}
    assert kept == {
        f"{file_name(id_)}{end}" for id_ in ("1: T1/sag", "../../../patient_2") for end in (".nii", ".nii.gz", ".json")
    }
    assert client.info()["datastore"] == {"total": 6, "completed": 2, "label_tags": {"final": 2}}


def test_names_of_files_cannot_leave_their_folder():
    assert file_name("patient_2 (a)") != file_name("patient_2_(a)") == "patient_2_(a)"
    for id_ in ("", ".", "..", "/etc/passwd", "a/../b", "x" * 300, "Ä b", "a\0b"):
        name = file_name(id_)
        assert name == file_name(name) and not set(name) & set("/\\.\0") and 0 < len(name) <= 80


def test_labels_are_not_kept_among_the_images(data):
    with pytest.raises(UserError, match="lies in --data"):
        Datastore({}, data, data / "labels", CLASSES)


def test_labels_that_came_with_the_images_are_shown_and_their_images_come_last(loaded, run, tmp_path):
    own = run.root.parent / "set"
    datastore = Datastore(Served(loaded, own).cases, own, tmp_path / "labels", CLASSES)
    first, second = datastore.all()
    assert datastore.tags(first) == ["original"] and datastore.statistics()["completed"] == 0
    label = datastore.in_places(datastore.label(first, "original", first.read()))
    assert np.array_equal(on_voxels(label, first.read().grid), np.select([made_up(0)[1] == n for n in (5, 9)], [1, 2]))
    source = save(made_up(8)[0], tmp_path / "x.nii.gz")
    datastore.add("brought", source)
    for expected in ("brought", first.id, second.id):
        entry = next_image(STRATEGIES["first"], Served(loaded, own), datastore, np.random.default_rng(0))
        assert entry is not None and entry.id == expected
        datastore.submit(entry, save(np.zeros(SHAPE, np.uint8), tmp_path / "empty.nii.gz"), {})
    assert next_image(STRATEGIES["first"], Served(loaded, own), datastore, np.random.default_rng(0)) is None
    datastore.withdraw(second)
    assert datastore.tags(second) == ["original"]


def test_an_image_of_several_files_is_shown_by_its_first_channel(loaded, tmp_path):
    first = save(made_up(2)[0], tmp_path / "a_0000.nii.gz")
    entry = Entry("a", (first, save(made_up(3)[0], tmp_path / "a_0001.nii.gz")))
    served = Served(loaded)
    content, name = Images(served, Datastore({}, None, tmp_path / "labels", CLASSES)).file(entry)
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(voxels(tmp_path / name), made_up(2)[0])
    assert np.allclose(nib.load(tmp_path / name).affine, AFFINE)


# ---- what to label next


def test_the_least_sure_image_comes_first(loaded, data, tmp_path):
    """The clicks are where the classes were in what was submitted; its own image is not among those left."""
    served = Served(loaded, data)
    datastore = Datastore(served.cases, data, tmp_path / "labels", CLASSES)
    submitted, *others = datastore.all()
    label, said = slicer_label(2, tmp_path / "sent.nii.gz")
    datastore.submit(submitted, Path(label), said)
    # The block is 8 × 10 voxels from (20, 14): the first of those furthest inside. The disc's middle is known.
    places = datastore.record(submitted)["places"]
    sure = {}
    for entry in others:
        case = loaded.model.open(entry.sources)
        z, y, x = (np.array(list(places.values())) * case.volume.array.shape[1:]).astype(int).T
        marks = [Mark(name, "voxel", ((y[n], SHAPE[1] - 1 - x[n], z[n]),)) for n, name in enumerate(places)]
        assert [made_up(2)[1][tuple(int(v) for v in mark.corners[0])] for mark in marks] == [5, 9]
        answers = case.segment([case.place(mark, CLASSES) for mark in marks])
        sure[entry.id] = np.mean([q or 0 for q in quality_of(answers, CLASSES).values()])
    assert len(set(sure.values())) == 3
    chosen = next_image(STRATEGIES["uncertainty"], served, datastore, np.random.default_rng(0))
    assert chosen is not None and chosen.id == min(sure, key=sure.__getitem__)


def test_a_network_without_prompts_segments_and_is_least_sure_by_itself(client_module, run, data, tmp_path):
    words = ["finetune", "--method", "samed", "--data", run.root.parent / "set", "--out", tmp_path / "samed", *SMALL]
    assert main([str(word) for word in [*words, "--steps", 1, "--batch-size", 1, "--exemplars", 1]]) == 0
    samed = RunFolder(tmp_path / "samed")
    loaded = load(samed, samed.load_config())
    with served_at(loaded, data, tmp_path / "labels") as address:
        client = client_module.MONAILabelClient(address, tmpdir=str(tmp_path))
        model = client.info()["models"]["samed"]
        assert (model["type"], model["labels"]) == ("segmentation", {"disc": 1, "block": 2})
        file, params = client.infer("samed", "patient_2", {})
        least = client.next_sample("uncertainty", {})["id"]
    case = loaded.model.open([data / "patient_2.nii.gz"])
    label = case.label_unprompted([5, 9])
    assert np.array_equal(voxels(file), np.select([on_voxels(label, case.volume.grid) == n for n in (5, 9)], [1, 2]))
    assert params["label_names"] == {"disc": 1, "block": 2}
    sure = {}
    for image in sorted(data.iterdir()):
        case = loaded.model.open([image])
        slices = CaseSlices(case.images, None, case.volume, step_mm=3.0)
        found = segment_auto(loaded.model.predictor, slices, [5, 9], keep=[5, 9])
        inside = [found.probabilities[k].astype(float)[found.label == n] for k, n in enumerate((5, 9))]
        sure[image.name.removesuffix(".nii.gz")] = np.mean([own.mean() if own.size else 0 for own in inside])
    assert least == min(sure, key=sure.__getitem__) and len(set(sure.values())) == 4


# ---- learning


def test_undecided_slices_are_left_out_and_the_runs_own_exemplars_stay(loaded, run, data, tmp_path):
    served = Served(loaded, data)
    datastore = Datastore(served.cases, data, tmp_path / "labels", CLASSES)
    label = np.zeros(SHAPE, np.uint8)
    label[:, :, 3] = np.select([made_up(2)[1][:, :, 3] == n for n in (5, 9)], [1, 2])
    datastore.submit(datastore.find("patient_2"), save(label, tmp_path / "sent.nii.gz"), {})
    said = write_training_data(tmp_path / "a", datastore, loaded, Wanted(9))
    assert said == ["submitted: 1 labelled slices of 1 volumes", "exemplars of run: 1"]
    # (Z, Y, X) as read: slices are k; whatever shows nothing in the submitted volume is ignored (1, the free number)
    by_slice = [set(np.unique(part)) for part in read_label_map(tmp_path / "a", "patient_2")]
    assert by_slice == [{1}, {1}, {1}, {0, 5, 9}, {1}, {1}]
    exemplar = int(run.exemplars.read_text().splitlines()[1].split(",")[1])
    [own] = (tmp_path / "a" / "labelsTr").glob("own-*")
    by_slice = [set(np.unique(part)) for part in read_label_map(tmp_path / "a", own.name.removesuffix(".nii"))]
    assert by_slice == [{0}, *({0, 5, 9} if k == exemplar else {1} for k in range(1, 5)), {0}]
    image = read_volume([tmp_path / "a" / "imagesTr" / "patient_2_0000.nii"])
    assert np.array_equal(image.array, read_volume([data / "patient_2.nii.gz"]).array)
    write_training_data(tmp_path / "b", datastore, loaded, Wanted(9, own_exemplars=False, complete=True))
    by_slice = [set(np.unique(part)) for part in read_label_map(tmp_path / "b", "patient_2")]
    assert by_slice == [{0}, {0}, {0}, {0, 5, 9}, {0}, {0}] and not list((tmp_path / "b").rglob("own-*"))


def read_label_map(folder: Path, name: str) -> np.ndarray:
    """(Z, Y, X)"""
    return read_volume([folder / "labelsTr" / f"{name}.nii"]).array[0].astype(int)


def test_after_training_on_submitted_labels_the_same_clicks_find_more(client, run, tmp_path):
    truth = np.select([made_up(5)[1] == n for n in (5, 9)], [1, 2])
    asked = {**clicks(5), "propagate": False}
    before, _ = client.infer("run", "patient_5", dict(asked))
    with pytest.raises(Exception) as refused:
        client.train_start("run", {})
    assert "nothing is labelled yet" in refused.value.msg
    for number in (2, 3, 4):
        label, said = slicer_label(number, tmp_path / f"sent_{number}.nii.gz")
        client.save_label(f"patient_{number}", label, params=said)
    assert not client.train_status(check_if_running=True)

    task = client.train_start("run", {"steps": 25})
    assert task["status"] == "RUNNING" and task["details"] and client.train_status(check_if_running=True)
    with pytest.raises(Exception) as refused:
        client.train_start("run", {})
    assert "a fine-tuning is running" in refused.value.msg
    assert client.info()["models"]  # it answers meanwhile
    while client.train_status(check_if_running=True):
        time.sleep(0.2)
    task = client.train_status()
    assert task["status"] == "DONE", task["details"]
    stats = client.info()["train_stats"]["run"]
    assert (stats["epoch"], stats["total_epochs"]) == (25, 25)

    after, _ = client.infer("run", "patient_5", dict(asked))
    assert dice(voxels(after), truth) > dice(voxels(before), truth) + 0.2
    assert client.info()["models"]["run"]["description"].endswith(
        f"run {task['run']}: click on what is to be segmented"
    )
    learned = RunFolder(run.root.with_name(task["run"]))
    assert learned.load_config().training.steps == 25 and learned.report.is_file()
    rows = learned.exemplars.read_text().splitlines()[1:]
    assert len(rows) == 13  # four slices of three volumes, and the run's own


@pytest.fixture
def jobs(loaded, data, tmp_path) -> TrainingJobs:
    """One label is submitted; no run may come of it."""
    datastore = Datastore(Served(loaded, data).cases, data, tmp_path / "labels", CLASSES)
    label, said = slicer_label(2, tmp_path / "sent.nii.gz")
    datastore.submit(datastore.find("patient_2"), Path(label), said)

    def never(run: RunFolder) -> None:
        raise AssertionError(run)

    return TrainingJobs(loaded, datastore, never)


def test_training_that_is_stopped_at_once_makes_no_run(jobs):
    task = jobs.start(Wanted(10_000))
    assert jobs.stop() is task and task.state == "STOPPED" and jobs.running is None and not task.run.finished()
    assert jobs._vacant().root != task.run.root


@pytest.mark.slow
def test_training_is_stopped_at_a_checkpoint_and_says_what_went_wrong(jobs, tmp_path):
    task = jobs.start(Wanted(10_000))
    while not task.record:
        time.sleep(0.1)
    assert jobs.stop() is task and task.state == "STOPPED" and list(task.run.checkpoint.iterdir())
    assert any("stopped after step" in line for line in task.lines())
    failed = jobs.start(Wanted(2, exemplars=99))
    while jobs.running:
        time.sleep(0.1)
    assert failed.state == "ERROR" and "--exemplars 99: only 5 training slices" in failed.lines()[-1]
    assert not any(str(tmp_path) in line for line in failed.lines())


@pytest.mark.parametrize("said", [{"steps": "many"}, {"steps": -1}, {"complete": 1}])
def test_a_choice_of_another_kind_is_refused(said):
    with pytest.raises(UserError, match="it must be"):
        Wanted.read(said, Wanted(5))


# ---- who may come in


def test_the_token_is_the_password(client_module, loaded, data, tmp_path):
    with served_at(loaded, data, tmp_path / "labels", token="only-for-friends") as address:
        stranger = client_module.MONAILabelClient(address)
        assert stranger.auth_enabled()
        with pytest.raises(Exception) as refused:
            stranger.info()
        assert refused.value.status_code == 401
        with pytest.raises(Exception) as refused:
            stranger.auth_token("me", "a guess")
        assert refused.value.status_code == 401
        friend = client_module.MONAILabelClient(address)
        friend.update_auth(stranger.auth_token("me", "only-for-friends"))
        assert (
            friend.auth_valid_token()
            and not stranger.auth_valid_token()
            and friend.info()["labels"] == ["disc", "block"]
        )
