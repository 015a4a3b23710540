"""What nnInteractive's own client does with a running server: connects, sends an image, clicks, takes back."""

import contextlib
import importlib
import json
import struct
import sys
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient

from cheaplunch.__main__ import main
from cheaplunch.errors import UserError
from cheaplunch.serving import nninteractive
from cheaplunch.serving.access import Access
from cheaplunch.serving.app import build_app
from cheaplunch.serving.opened import Limits, Served, TooLarge
from cheaplunch.serving.packed_arrays import pack, unpack
from cheaplunch.serving.server import listen

TOKEN = "only-for-friends"


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """The client as it is published, out of its wheel."""
    pytest.importorskip("blosc2")
    wheels = sorted((Path(sys.prefix) / "wheels").glob("nninteractive_client-*.whl"))
    if not wheels:
        pytest.skip("the client's wheel is not there; `make install` fetches it")
    folder, finders = tmp_path_factory.mktemp("client"), sys.meta_path[:]
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("nnInteractive.inference.remote")
    sys.meta_path[:] = finders  # the client adds one of its own


@contextlib.contextmanager
def serving(loaded, labels: Path, limits: Limits | None = None, token: str | None = None):
    """What a server has that runs beside the test, and its address."""
    listening, served = listen("127.0.0.1", 0), Served(loaded, None, limits)
    app = build_app(served, Access(token=token), labels)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield served, f"http://127.0.0.1:{listening.getsockname()[1]}/nninteractive"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def server(loaded, tmp_path):
    with serving(loaded, tmp_path / "labels") as there:
        yield there


@pytest.fixture
def connect(remote, server):
    """(path below the address, array, spacing) → a client that has sent it."""
    with contextlib.ExitStack() as ending:

        def of(path: str, array: np.ndarray, spacing=(1, 1, 1)):
            session = ending.enter_context(remote.nnInteractiveRemoteInferenceSession(server[1] + path))
            session.set_image(array[None], {"spacing": np.array(spacing)})
            session.set_target_buffer(np.zeros(array.shape, np.uint8))
            return session

        yield of


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def predict(run: Path, image: Path, prompts: list[dict], out: Path, *words: str) -> np.ndarray:
    """(i, j, k) of the command line's mask, as it makes it of the same prompts."""
    out.mkdir()
    (out / "prompts.json").write_text(json.dumps(prompts))
    asked = ["predict", run, image, "--out", out, "--prompts", out / "prompts.json", *words]
    assert main([str(word) for word in asked]) == 0
    [mask] = out.glob("*.nii.gz")
    return voxels(mask)


@pytest.fixture
def image(tiny_dataset) -> Path:
    """Its voxels run towards L, P and S."""
    return tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"


# ---- masks


def test_each_prompt_finds_what_predict_finds_with_those_so_far(connect, run, image, tmp_path):
    session = connect("", voxels(image).T)  # as 3D Slicer sends it: (k, j, i); the run's first class
    assert session.original_image_shape == (1, 6, 32, 32)
    said = [{"class": "disc", "voxel": [11, 10, 2]}]
    session.add_point_interaction([2, 10, 11], include_interaction=True)
    masks = [session.target_buffer.copy()]
    session.add_point_interaction([2, 20, 20], include_interaction=False)
    masks.append(session.target_buffer.copy())
    session.add_bbox_interaction([[3, 4], [5, 16], [6, 17]], include_interaction=True)
    masks.append(session.target_buffer.copy())
    said += [
        {"class": "disc", "voxel": [20, 20, 2], "label": 0},
        {"class": "disc", "box": {"voxel": [[6, 5, 3], [16, 15, 3]]}},
    ]
    for count, mask in enumerate(masks, start=1):
        wanted = predict(run, image, said[:count], tmp_path / str(count))
        assert wanted.any()
        np.testing.assert_array_equal(mask.T, wanted == 1)
    assert len(np.flatnonzero(masks[0].any((1, 2)))) > 1 and not np.array_equal(masks[0], masks[2])

    session.add_bbox_interaction([[3, 4], [1, 3], [1, 3]], include_interaction=True)  # takes the first one's place
    said[2] = {"class": "disc", "box": {"voxel": [[1, 1, 3], [2, 2, 3]]}}
    np.testing.assert_array_equal(session.target_buffer.T, predict(run, image, said, tmp_path / "box") == 1)
    for mask in (*masks[::-1], np.zeros_like(masks[0])):
        assert session.undo()
        np.testing.assert_array_equal(session.target_buffer, mask)
    assert not session.undo()


def test_the_address_says_which_class_and_where_the_axes_run(connect, run, tmp_path):
    """i towards inferior, j towards right, k towards anterior, thick slices: the run's lie along i, backwards."""
    affine = np.array([[0, 0.5, 0, 11], [0, 0, 0.75, -7], [-3, 0, 0, 30], [0, 0, 0, 1.0]])
    array = np.random.default_rng(0).normal(100, 20, (7, 20, 24)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "scan.nii.gz")
    session = connect("/block/IRA", array, (3, 0.5, 0.75))
    session.add_point_interaction((4, 9, 12), include_interaction=True)
    said = [{"class": "block", "voxel": [4, 9, 12]}]
    wanted = predict(run, tmp_path / "scan.nii.gz", said, tmp_path / "masks")
    assert set(np.unique(wanted)) == {0, 2}
    np.testing.assert_array_equal(session.target_buffer, wanted == 2)
    other = connect("/block", array, (3, 0.5, 0.75))  # SPL: the same voxels upside down
    other.add_point_interaction((4, 9, 12), include_interaction=True)
    assert not np.array_equal(session.target_buffer, other.target_buffer)


def test_prompts_can_be_gathered_and_kept_to_their_slices(connect, run, image, tmp_path):
    session = connect("/disc/LPS", voxels(image))
    session.set_do_autozoom(False)
    assert session._predict() is None
    for k in (2, 3):
        assert session.add_point_interaction([11, 10, k], include_interaction=True, run_prediction=False) is None
    assert not session.target_buffer.any()
    assert session._predict() is not None and session._predict() is None
    said = [{"class": "disc", "voxel": [11, 10, k]} for k in (2, 3)]
    wanted = predict(run, image, said, tmp_path / "masks", "--no-propagate")
    assert list(np.flatnonzero(wanted.any((0, 1)))) == [2, 3]
    np.testing.assert_array_equal(session.target_buffer, wanted == 1)
    session.reset_interactions()
    assert not session.target_buffer.any() and not session.undo()
    session.add_point_interaction([11, 10, 2], include_interaction=True)
    wanted = predict(run, image, said[:1], tmp_path / "alone", "--no-propagate")
    np.testing.assert_array_equal(session.target_buffer, wanted == 1)


# ---- what is not taken


def test_what_cannot_be_done_is_said_and_changes_nothing(connect, server, image):
    session = connect("", voxels(image).T)
    assert session.supported_interactions == {"points": True, "bbox2d": True} and not session.supports_initial_label
    session.add_point_interaction([2, 10, 11], include_interaction=True)
    mask = session.target_buffer.copy()
    for wrong in (
        lambda: session.add_point_interaction([6, 10, 11], include_interaction=True),
        lambda: session.add_point_interaction([6, 10, 11], include_interaction=True, run_prediction=False),
        lambda: session.add_bbox_interaction([[1, 3], [5, 16], [6, 17]], include_interaction=True),  # two slices
        lambda: session.add_bbox_interaction([[2, 3], [5, 16], [6, 17]], include_interaction=False),
        lambda: session.add_scribble_interaction(mask, include_interaction=True),
        lambda: session.add_lasso_interaction(mask, include_interaction=True),
        lambda: session.set_image(np.full((1, 4, 8, 8), np.nan)),
        lambda: session.set_image(np.zeros((1, 4, 8, 8)), {"spacing": [0, 1, 1]}),
    ):
        with pytest.raises(Exception, match=r"Client error '4(00|22) "):
            wrong()
        np.testing.assert_array_equal(session.target_buffer, mask)
    assert session.undo() and not session.undo()
    assert len(list(server[0]._scratch.glob("tmp*"))) == 1  # what was refused left nothing


@pytest.mark.parametrize("path", ["/liver", "/disc/SPX", "/disc/SSL", "/disc/SP"])
def test_another_class_or_direction_is_refused(remote, server, path):
    with pytest.raises(Exception, match="Client error '400 "):
        remote.nnInteractiveRemoteInferenceSession(server[1] + path)


def test_without_blosc2_it_says_what_to_install(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    app = build_app(Served(loaded), Access(), tmp_path / "labels")
    answer = TestClient(app, base_url="http://127.0.0.1").post("/nninteractive/disc/claim")
    assert answer.status_code == 501 and "pip install 'cheaplunch[nninteractive]'" in answer.json()["error"]


# ---- bounds


def test_sessions_are_few_and_end(remote, loaded, image, tmp_path, monkeypatch):
    array = voxels(image).T[None]
    with serving(loaded, tmp_path / "labels", Limits(images=2, idle_s=30)) as (served, address):
        first, second = (remote.nnInteractiveRemoteInferenceSession(address) for _ in range(2))
        with pytest.raises(remote.ServerAtCapacityError):
            remote.nnInteractiveRemoteInferenceSession(address)
        assert first.ping() and 29 < first.heartbeat() <= 30 and first.lease_status()["idle_timeout_seconds"] == 30
        first.set_image(array)
        first.set_image(array)
        assert len(served._open) == 1
        second.set_image(array)
        first.close()
        assert len(served._open) == 1
        third = remote.nnInteractiveRemoteInferenceSession(address)
        served.close(next(iter(served._open)))  # as for another's image
        with pytest.raises(remote.SessionExpiredError):
            second.undo()
        monkeypatch.setattr(nninteractive, "_SILENCE_S", 0.0)
        with pytest.raises(remote.SessionExpiredError):
            third.heartbeat()
        monkeypatch.undo()
        fourth = remote.nnInteractiveRemoteInferenceSession(address)
        fourth.set_image(array)
        served.limits.__dict__["idle_s"] = 0.0
        with pytest.raises(remote.SessionExpiredError):
            fourth.add_point_interaction([2, 10, 11], include_interaction=True)
        assert not served._open


def test_the_token_is_the_api_key(remote, loaded, tmp_path):
    with serving(loaded, tmp_path / "labels", token=TOKEN) as (_, address):
        with pytest.raises(Exception, match="401"):
            remote.nnInteractiveRemoteInferenceSession(address)
        with remote.nnInteractiveRemoteInferenceSession(address, api_key=TOKEN) as session:
            assert session.supports_undo


def test_an_image_beyond_the_servers_memory_is_refused(remote, loaded, tmp_path):
    with (
        serving(loaded, tmp_path / "labels", Limits(image_bytes=2**16)) as (_, address),
        remote.nnInteractiveRemoteInferenceSession(address) as session,
        pytest.raises(Exception, match="Client error '413 "),
    ):
        session.set_image(np.zeros((1, 64, 64, 64), np.int16))  # few bytes, much of them


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "float64", "bool"])
def test_packed_arrays_are_those_of_the_client(remote, kind):
    serialization = importlib.import_module("nnInteractive.inference.remote.serialization")
    array = np.random.default_rng(0).integers(0, 2, (1, 9, 8, 7)).astype(kind)
    there = unpack(serialization.pack_array(array), 4, 10**6)
    assert there.dtype == array.dtype and np.array_equal(there, array)
    mask = array[0].astype(np.uint8)
    assert np.array_equal(serialization.unpack_array(pack(mask)), mask)


def test_what_is_no_packed_array_is_refused():
    pytest.importorskip("blosc2")
    good = bytearray(pack(np.arange(60, dtype=np.uint8).reshape(3, 4, 5)))
    start = 4 + 4 + len("uint8") + 3 * 8 + 4  # of the part's lengths; its chunk is 16 bytes on
    assert unpack(bytes(good), 3, 60).shape == (3, 4, 5)
    with pytest.raises(TooLarge, match="at most"):
        unpack(bytes(good), 3, 59)
    with pytest.raises(UserError, match="no packed array of 4 axes"):
        unpack(bytes(good), 4, 10**6)

    def changed(place: int, *parts: bytes) -> bytes:
        wrong = good.copy()
        wrong[place : place + len(b"".join(parts))] = b"".join(parts)
        return bytes(wrong)

    for wrong in (
        b"",
        bytes(good[:-1]),
        changed(0, b"NNIB"),
        changed(8, b"voidx"),
        changed(13, struct.pack("<q", -3)),
        changed(13, struct.pack("<q", 4)),  # fewer voxels than it says
        changed(start, struct.pack("<Q", 61)),
        changed(start + 16 + 4, struct.pack("<I", 2**30)),  # a chunk of 1 GiB
        changed(start + 16 + 2, b"\xc0"),  # a codec by its number
        changed(start + 16 + 16, b"\x20"),  # a filter that is a plugin
    ):
        with pytest.raises(UserError, match="no packed array"):
            unpack(wrong, 3, 10**6)
