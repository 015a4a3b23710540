"""The server's answers: those of `predict` on the same prompts, from everybody's own images and no others."""

import base64
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image as Picture

from cheaplunch.__main__ import main
from cheaplunch.data.slices import Window
from cheaplunch.data.volume import Grid, Volume, read_label, read_volume
from cheaplunch.interactive import Mark
from cheaplunch.serving.access import Access
from cheaplunch.serving.app import build_app, viewer_file
from cheaplunch.serving.opened import Limits, Loaded, NotOpen, Served

BASE = "http://127.0.0.1:8000"
# A click, a click off the target and a box on slice 2, a click on slice 3.
PROMPTS = [
    {"class": "disc", "kind": "point", "voxel": [11, 10, 2]},
    {"class": "disc", "kind": "point", "voxel": [20, 20, 2], "positive": False},
    {"class": "disc", "kind": "box", "voxel": [[6, 5, 2], [16, 15, 2]]},
    {"class": "block", "kind": "point", "voxel": [21, 22, 3]},
]


@pytest.fixture
def make(loaded, tiny_dataset, tmp_path):
    """(limits, model) → what a server has, and a client of it."""
    with ExitStack() as ending:

        def of(limits: Limits | None = None, model: Loaded = loaded) -> tuple[Served, TestClient]:
            served = Served(model, tiny_dataset, limits)
            app = build_app(served, Access(), tmp_path / "labels")
            return served, ending.enter_context(TestClient(app, base_url=BASE))  # one event loop for all its requests

        yield of


@pytest.fixture
def client(make) -> TestClient:
    return make()[1]


def predict(run: Path, image: Path, prompts: list[dict], out: Path, *words: str) -> Path:
    """The mask by the command line, from the same prompts in the words of its files."""
    entries = []
    for said in prompts:
        if said["kind"] == "box":
            entries.append({"class": said["class"], "box": {"voxel": said["voxel"]}})
        else:
            entries.append({"class": said["class"], "voxel": said["voxel"], "label": int(said.get("positive", True))})
    out.mkdir()
    (out / "prompts.json").write_text(json.dumps(entries))
    asked = ["predict", str(run), str(image), "--out", str(out), "--prompts", str(out / "prompts.json"), *words]
    assert main(asked) == 0
    [mask] = [path for path in out.iterdir() if path.suffix not in (".json", ".jsonl")]
    return mask


def label_of(answer: dict) -> np.ndarray:
    voxels = np.frombuffer(zlib.decompress(base64.b64decode(answer["mask"])), np.uint8)
    return voxels.reshape(answer["shape"], order="F")


def ask(client: TestClient, open_id: str, prompts: list[dict] = PROMPTS, **more) -> dict:
    answered = client.post(f"/api/open/{open_id}/segment", json={"prompts": prompts, **more})
    assert answered.status_code == 200, answered.text
    return answered.json()


def send(client: TestClient, *files: Path) -> dict:
    sent = client.post("/api/open", files=[("files", (path.name, path.read_bytes())) for path in files])
    assert sent.status_code == 200, sent.text
    return sent.json()


# ---- the same as predict


@pytest.mark.parametrize("propagate", [True, False])
def test_the_label_map_is_that_of_predict(client, run, tiny_dataset, tmp_path, propagate):
    opened = client.post("/api/open", json={"case": "case_0"}).json()
    assert (opened["slices"], opened["height"], opened["width"]) == (6, 32, 32)
    answer = ask(client, opened["open"], propagate=propagate)
    image = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"
    mask = predict(run, image, PROMPTS, tmp_path / "masks", *([] if propagate else ["--no-propagate"]))
    wanted = np.asarray(nib.load(mask).dataobj)
    assert set(np.unique(wanted)) == {0, 1, 2}
    np.testing.assert_array_equal(label_of(answer), wanted)
    [line] = (tmp_path / "masks" / "predictions.jsonl").read_text().splitlines()
    for name, found in answer["classes"].items():
        assert found["voxels"] == json.loads(line)["voxels"][name]
        assert found["quality"] == pytest.approx(json.loads(line)["quality"][name], abs=1e-4)
    saved = client.post(
        f"/api/open/{opened['open']}/save", json={"prompts": PROMPTS, "propagate": propagate, "format": "nii.gz"}
    )
    assert saved.headers["content-disposition"] == "attachment; filename*=UTF-8''case_0.nii.gz"
    (tmp_path / "saved.nii.gz").write_bytes(saved.content)
    again = nib.load(tmp_path / "saved.nii.gz")
    np.testing.assert_array_equal(np.asarray(again.dataobj), wanted)
    assert again.header == nib.load(mask).header


def test_a_turned_volume_is_asked_in_its_own_voxels(client, run, tmp_path):
    """i towards inferior, j towards right, k towards anterior, oblique: slices run along i, and backwards."""
    affine = np.array([[0, 0.8, -0.6, 11], [0, 0.6, 0.8, -7], [-3, 0, 0, 30], [0, 0, 0, 1.0]])
    array = np.random.default_rng(0).normal(100, 20, (7, 20, 24)).astype(np.float32)
    image = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(array, affine), image)
    opened = send(client, image)
    assert (opened["shape"], opened["slice_axis"], opened["name"]) == ([7, 20, 24], 0, "scan")
    seen = nib.Nifti1Image.from_bytes(
        zlib.decompress(client.get(f"/api/open/{opened['open']}/image.nii.gz").content, 31)
    )
    np.testing.assert_array_equal(seen.get_fdata(), array)
    np.testing.assert_allclose(seen.affine, affine, atol=1e-6)

    prompts = [
        {"class": "disc", "kind": "point", "voxel": [5, 11, 10]},
        {"class": "block", "kind": "box", "voxel": [[1, 3, 4], [1, 12, 15]]},
    ]
    wanted = np.asarray(nib.load(predict(run, image, prompts, tmp_path / "masks")).dataobj)
    assert set(np.unique(wanted)) == {0, 1, 2}
    np.testing.assert_array_equal(label_of(ask(client, opened["open"], prompts, propagate=True)), wanted)
    parts = ask(client, opened["open"], prompts, propagate=True, slices=[1, 4])["parts"]
    for index, part in zip((1, 4), parts, strict=True):
        assert (part["slice"], part["axis"], part["shape"]) == (index, 0, [20, 24])
        np.testing.assert_array_equal(label_of(part), wanted[index])


def test_a_slice_is_that_of_the_whole_though_its_neighbours_steady_it(make, loaded):
    case = loaded.model.predictor
    steadied = type(case)(case.segmenter, smooth_mm=1.5)
    _, client = make(model=replace(loaded, model=replace(loaded.model, predictor=steadied)))
    opened = client.post("/api/open", json={"case": "case_1"}).json()
    assert opened["reach"] == 4
    prompts = [{"class": "disc", "kind": "point", "voxel": [11, 10, k]} for k in range(6)]
    whole = label_of(ask(client, opened["open"], prompts))
    assert not np.array_equal(whole[..., 5], label_of(ask(client, opened["open"], prompts[5:]))[..., 5])
    for k in (0, 2, 5):
        [part] = ask(client, opened["open"], prompts, slices=[k])["parts"]
        np.testing.assert_array_equal(label_of(part), whole[..., k])


def test_a_picture_is_one_slice(client, run, tmp_path):
    array = np.random.default_rng(1).integers(0, 255, (20, 30)).astype(np.uint8)
    image = tmp_path / "scan.png"
    Picture.fromarray(array).save(image)
    opened = send(client, image)
    assert (opened["shape"], opened["unit"], opened["formats"]) == ([30, 20, 1], "px", ["same"])
    seen = nib.Nifti1Image.from_bytes(
        zlib.decompress(client.get(f"/api/open/{opened['open']}/image.nii.gz").content, 31)
    )
    np.testing.assert_array_equal(np.asarray(seen.dataobj)[..., 0].T, array)
    prompts = [{"class": "disc", "kind": "point", "voxel": [21, 10, 0]}]
    wanted = np.asarray(Picture.open(predict(run, image, prompts, tmp_path / "masks")))
    assert wanted.any()
    np.testing.assert_array_equal(label_of(ask(client, opened["open"], prompts))[..., 0].T, wanted)
    saved = client.post(f"/api/open/{opened['open']}/save", json={"prompts": prompts, "format": "same"})
    assert saved.headers["content-disposition"].endswith("''scan.png")
    (tmp_path / "saved.png").write_bytes(saved.content)
    np.testing.assert_array_equal(np.asarray(Picture.open(tmp_path / "saved.png")), wanted)


def test_a_dicom_series_comes_back_as_seg(client, run, save_series, tmp_path):
    files = save_series(tmp_path / "ct", np.random.default_rng(2).integers(20, 220, (6, 24, 28)).astype(np.uint16))
    (tmp_path / "notes.txt").write_text("not an image")
    opened = send(client, *files, tmp_path / "notes.txt")
    assert (opened["shape"], opened["name"], opened["formats"]) == (
        [28, 24, 6],
        "series",
        ["nii.gz", "nrrd", "dcm", "same"],
    )
    wanted = predict(run, tmp_path / "ct", PROMPTS, tmp_path / "masks")
    assert wanted.suffix == ".dcm"
    saved = client.post(
        f"/api/open/{opened['open']}/save", json={"prompts": PROMPTS, "propagate": True, "format": "dcm"}
    )
    (tmp_path / "saved.dcm").write_bytes(saved.content)
    volume, names = read_volume([tmp_path / "ct"]), {"disc": 1, "block": 2}
    found = read_label(tmp_path / "saved.dcm", volume, names)
    assert set(np.unique(found)) == {0, 1, 2}
    np.testing.assert_array_equal(found, read_label(wanted, volume, names))


def test_colours_and_fractions_reach_the_viewer():
    rgb = np.random.default_rng(0).integers(0, 255, (3, 1, 4, 5)).astype(np.float32)
    volume = Volume(rgb, None, Grid(Path("a.png"), (4, 5), channels=3, dtype=np.dtype(np.uint8)))
    seen = np.asarray(nib.Nifti1Image.from_bytes(zlib.decompress(viewer_file(volume), 31)).dataobj)
    for channel, name in zip(rgb, "RGB", strict=True):
        np.testing.assert_array_equal(seen[name][..., 0].T, channel[0])
    for array, kind in (([[[-3.0, 900]]], np.int16), ([[[0.5, 70000]]], np.float32), ([[[7.0, 255]]], np.uint8)):
        volume = Volume(
            np.array([array], np.float32), (1, 1, 1), Grid(Path("a.nii"), (2, 1, 1), np.diag([-1.0, -1, 1, 1]))
        )
        seen = np.asarray(nib.Nifti1Image.from_bytes(zlib.decompress(viewer_file(volume), 31)).dataobj)
        assert seen.dtype == kind
        np.testing.assert_array_equal(seen.T, array)


# ---- what is kept, and for whom


def test_a_further_click_costs_only_itself(make, loaded, monkeypatch):
    asked = []
    logits, embed = loaded.model.predictor.logits, loaded.model.predictor.embed
    monkeypatch.setattr(loaded.model.predictor, "logits", lambda *given: asked.append("click") or logits(*given))
    monkeypatch.setattr(loaded.model.predictor, "embed", lambda given: asked.append("slice") or embed(given))
    _, client = make()
    opened = client.post("/api/open", json={"case": "case_0"}).json()["open"]
    clicks = [{"class": "disc", "kind": "point", "voxel": [11, 10, k]} for k in range(3)]
    first = label_of(ask(client, opened, clicks[:2]))
    assert sorted(asked) == ["click", "click", "slice", "slice"]
    asked.clear()
    ask(client, opened, clicks)
    assert sorted(asked) == ["click", "slice"]
    np.testing.assert_array_equal(label_of(ask(client, opened, clicks[:2])), first)  # undo
    other = client.post("/api/open", json={"case": "case_0"}).json()["open"]  # somebody else, the same image
    assert other != opened
    np.testing.assert_array_equal(label_of(ask(client, other, clicks[:2])), first)
    assert sorted(asked) == ["click", "slice"]


def test_another_model_answers_and_images_stay_open(make, loaded):
    served, client = make()
    opened = client.post("/api/open", json={"case": "case_0"}).json()["open"]
    before = label_of(ask(client, opened, propagate=True))
    other = replace(loaded, model=replace(loaded.model, window=Window(0, 1000)))
    served.swap(other)
    after = label_of(ask(client, opened, propagate=True))
    assert not np.array_equal(before, after)
    _, fresh = make(model=other)
    own = fresh.post("/api/open", json={"case": "case_0"}).json()["open"]
    np.testing.assert_array_equal(after, label_of(ask(fresh, own, propagate=True)))


def test_many_at_once_get_their_own_answers(make):
    """Of three images under caches that hold a slice each, so that all is forgotten and found again."""
    _, client = make(Limits(cache_bytes=1, answer_bytes=1, workers=4))
    ids = [client.post("/api/open", json={"case": f"case_{n}"}).json()["open"] for n in range(3)]
    rng = np.random.default_rng(0)
    asked = []
    for number in range(12):
        i, j, k = (int(v) for v in rng.integers(0, (32, 32, 6)))
        asked.append(
            (ids[number % 3], [{"class": "disc", "kind": "point", "voxel": [i, j, k]}, *PROMPTS[number % 4 :]])
        )
    one_by_one = [ask(client, *what, propagate=2)["mask"] for what in asked]
    assert len(set(one_by_one)) > 3
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda what: ask(client, *what, propagate=2)["mask"], asked * 2))
    assert together == one_by_one * 2


def test_the_longest_unused_is_closed_for_another(make):
    served, client = make(Limits(images=2))
    a, b = (client.post("/api/open", json={"case": "case_0"}).json()["open"] for _ in "ab")
    ask(client, a, slices=[2])
    c = client.post("/api/open", json={"case": "case_1"}).json()["open"]
    assert [client.get(f"/api/open/{i}/image.nii.gz").status_code for i in (a, b, c)] == [200, 404, 200]
    assert client.get(f"/api/open/{b}/image.nii.gz").json() == {"error": "this image is no longer open; open it again"}
    assert client.delete(f"/api/open/{a}").status_code == 200
    assert client.delete(f"/api/open/{a}").status_code == 404
    assert served.open_bytes == 6 * 32 * 32 * 8


def test_images_are_bounded_in_bytes_and_time(make, tiny_dataset, tmp_path):
    one = 6 * 32 * 32 * 8
    served, client = make(Limits(image_bytes=2 * one, idle_s=0.0))
    scans = [tiny_dataset / "imagesTr" / f"case_{n}_0000.nii.gz" for n in range(3)]
    ids = [send(client, scan)["open"] for scan in scans]
    assert served.open_bytes == 2 * one
    with pytest.raises(NotOpen):
        served.find(ids[0])
    served.close_idle()
    assert served.open_bytes == 0
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 13), np.uint8), np.eye(4)), tmp_path / "long.nii.gz")
    sent = client.post("/api/open", files={"files": ("long.nii.gz", (tmp_path / "long.nii.gz").read_bytes())})
    assert sent.status_code == 413 and "--memory-mb" in sent.json()["error"]


def test_files_go_away_with_the_image(make, tiny_dataset):
    served, client = make()
    folder = served.new_folder()
    scan = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"
    opened = served.open_files([scan], "scan", folder)
    shared = served.find(opened.id)
    served.close(opened.id)
    del opened
    assert folder.is_dir()  # somebody is at it
    del shared
    assert not folder.exists()
    before = sorted(folder.parent.iterdir())
    assert client.post("/api/open", files={"files": ("a.nii", b"nothing")}).status_code == 400
    assert sorted(folder.parent.iterdir()) == before
    served.close_all()
    assert not folder.parent.exists()


# ---- what is not understood


@pytest.mark.parametrize(
    ("prompts", "naming"),
    [
        ([PROMPTS[0], {"class": "liver", "kind": "point", "voxel": [1, 1, 1]}], "prompt 2: there is no class 'liver'"),
        ([{"class": "disc", "kind": "point", "voxel": [1, 1, 6]}], "lies outside of case_0_0000.nii.gz"),
        ([{"class": "disc", "kind": "point", "voxel": [1, 1]}], "prompts.0.voxel"),
        ([{"class": "disc", "kind": "point", "voxel": [1, 1, 1], "size": 3}], "prompts.0.size"),
        ([{"class": "disc", "kind": "box", "voxel": [[1, 1, 1], [2, 2, 2]]}], "give both corners on one slice"),
        ([PROMPTS[2], PROMPTS[2]], "two boxes"),
        ([{"class": "disc", "kind": "text"}], "prompts.0"),
    ],
)
def test_a_wrong_prompt_is_one_line(client, tiny_dataset, prompts, naming):
    opened = client.post("/api/open", json={"case": "case_0"}).json()["open"]
    answered = client.post(f"/api/open/{opened}/segment", json={"prompts": prompts})
    assert answered.status_code in (400, 422)
    assert naming in answered.json()["error"] and "\n" not in answered.json()["error"]
    assert str(tiny_dataset) not in answered.text


def test_what_cannot_be_asked(client):
    opened = client.post("/api/open", json={"case": "case_0"}).json()["open"]
    assert "(.dcm)" not in client.post(f"/api/open/{opened}/save", json={"prompts": []}).text
    refused = client.post(f"/api/open/{opened}/save", json={"prompts": PROMPTS, "format": "dcm"})
    assert refused.status_code == 400 and ".dcm cannot hold a mask of this image" in refused.json()["error"]
    assert client.post(f"/api/open/{opened}/segment", content=b"{").status_code == 422
    assert client.post("/api/open", content=b"[").json()["error"].startswith('send {"case": ID}')
    assert client.post("/api/open", json={"case": "../case_0"}).status_code == 404
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/api/nowhere").json() == {"error": "Not Found"}


def test_what_the_server_says_of_itself(client):
    about = client.get("/api/model").json()
    assert about["classes"][0] == {"name": "disc", "number": 1, "color": "#e69f00"}
    assert (about["method"], about["backbone"], about["prompted"], about["boxes_only"]) == (
        "cheap-lunch",
        "tiny-random",
        True,
        False,
    )
    assert [case["id"] for case in client.get("/api/cases").json()["cases"]] == ["case_0", "case_1", "case_2"]


def test_marks_without_a_page(make):
    """As other routes ask: through `Served` alone."""
    served, _ = make()
    opened = served.open_case("case_2")
    answered = served.segment(opened, [Mark("disc", "voxel", ((11.0, 10.0, 2.0),))], propagate=1)
    assert answered.voxels["disc"] == np.count_nonzero(answered.label == 1) > 0
    assert not answered.label[[0, 4, 5]].any()
