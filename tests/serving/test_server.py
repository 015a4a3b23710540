"""The command line: a real server on a free port, from its first line to Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from cheaplunch.__main__ import main


def complaint(capsys) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cheaplunch:")]
    return line


@pytest.fixture
def start(run, tmp_path):
    """(flags) → the process and the address that it prints; ended at the test's end."""
    processes = []

    def of(*flags: str) -> tuple[subprocess.Popen, str]:
        words = [sys.executable, "-m", "cheaplunch", "serve", str(run), "--port", "0", "--device", "cpu", *flags]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, env=environment, **pipes)
        processes.append(process)
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                return process, found[0]
        raise AssertionError(process.stderr.read())

    yield of
    for process in processes:
        process.kill()
        process.wait()


def test_from_the_first_line_to_ctrl_c(start, tiny_dataset, tmp_path):
    process, address = start("--data", str(tiny_dataset))
    assert address.startswith("http://127.0.0.1:") and "token" not in address
    scan = tmp_path / "Doe_Jane.nii.gz"
    scan.write_bytes((tiny_dataset / "imagesTr" / "case_0_0000.nii.gz").read_bytes())
    with httpx.Client(base_url=address, timeout=120) as client:
        assert len(client.get("/api/cases").json()["cases"]) == 3
        opened = client.post("/api/open", files={"files": (scan.name, scan.read_bytes())}).json()
        click = {"class": "disc", "kind": "point", "voxel": [11, 10, 2]}
        answer = client.post(f"/api/open/{opened['open']}/segment", json={"prompts": [click]}).json()
        assert answer["classes"]["disc"]["voxels"] > 0
        assert client.post("/api/open", files={"files": (scan.name, scan.read_bytes()[:999])}).status_code == 400
        assert client.get("/info/").json()["name"] == "cheaplunch"
    assert [path for path in tmp_path.iterdir() if path.name.startswith("cheaplunch-")]
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in complaints
    for private in ("Jane", opened["open"], "segment"):
        assert private not in said + complaints
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("cheaplunch-")]


def test_others_need_the_token(start):
    _, address = start("--host", "0.0.0.0")
    root, token = re.fullmatch(r"(http://\S+/)\?token=([\w-]{32,})", address).groups()
    root = f"http://127.0.0.1:{httpx.URL(root).port}"
    assert httpx.get(f"{root}/api/model").status_code == 401
    assert httpx.get(f"{root}/api/model", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    with httpx.Client(follow_redirects=True) as browser:
        browser.get(f"{root}/?token={token}")
        assert browser.get(f"{root}/api/model").status_code == 200


def test_a_port_that_is_taken(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(run), "--port", str(taken.getsockname()[1]), "--device", "cpu"]) == 2
    assert "cannot be had" in complaint(capsys)


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["--host", "no such host"], "--host no such host"),
        (["--port", "70000"], "--port 70000"),
        (["--token", "x"], "--token"),
        (["--max-open", "0"], "--max-open"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_meant(run, capsys, words, naming):
    assert main(["serve", str(run), "--device", "cpu", *words]) == 2
    assert naming in complaint(capsys)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart"])
def test_without_the_extra(run, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("cheaplunch.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", str(run)]) == 2
    assert f"serve needs {package}; run `pip install 'cheaplunch[serve]'`" in complaint(capsys)
