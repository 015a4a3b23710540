"""Nothing of a patient is left lying about."""

import signal
import subprocess
import sys

from cheaplunch.serving.scratch import own_folder

HOLD = """
from cheaplunch.serving.scratch import own_folder
folder, _ = own_folder()
(folder / "upload.nii").write_bytes(b"voxels")
print(folder, flush=True)
input()
"""


def test_what_a_killed_server_left_is_removed_by_the_next_and_a_running_one_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, running = (tmp_path / holder.stdout.readline().strip() for holder in holders)
    holders[0].send_signal(signal.SIGKILL)
    holders[0].wait()
    assert killed.is_dir() and running.is_dir()
    folder, remove = own_folder()
    assert not killed.exists()
    assert (running / "upload.nii").read_bytes() == b"voxels"
    assert folder.stat().st_mode & 0o077 == 0
    remove()
    assert not folder.exists()
    holders[1].communicate("\n")
