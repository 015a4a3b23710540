"""Brings the viewer of `cheaplunch serve`: NiiVue, out of a wheel on the package registry that pip is set up for.

Hatchling runs this where a wheel or an environment is built (pyproject.toml); by hand: `python tools/viewer.py`. The
package `ipyniivue` carries NiiVue's own module as text, for the pages that NiiVue saves; that text, with the licence
beside it, is all that is taken. The package is read, not installed, and nothing needs Node.
"""

import hashlib
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object

WANTED = "ipyniivue==2.4.4"
SCRIPT, LICENCE = "ipyniivue/static/widget.js", "ipyniivue-2.4.4.dist-info/licenses/LICENSE"
BEFORE, AFTER = 'var o2="', '"'
"""What stands around the module in the script."""
SHA256 = "35e7040be726521bdae73f2171df3bf2701cda991c10f8be9929231fceb30272"
"""Of the module, NiiVue 0.65.0."""

STATIC = Path(__file__).parent.parent / "src/cheaplunch/serving/static"


def bring(folder: Path = STATIC) -> None:
    """Puts niivue.js and niivue.LICENSE into `folder`; one that is there and whole is left.

    RuntimeError where the registry cannot be reached or the wheel is another than the one known here.
    """
    module, licence = folder / "niivue.js", folder / "niivue.LICENSE"
    if licence.is_file() and module.is_file() and _sha256(module.read_bytes()) == SHA256:
        return
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "--dest", scratch, WANTED], check=False, stdout=subprocess.DEVNULL).returncode:
            raise RuntimeError(f"pip could not download {WANTED}, which holds the viewer")
        [path] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            script, terms = wheel.read(SCRIPT).decode(), wheel.read(LICENCE)
    found = urllib.parse.unquote(script.partition(BEFORE)[2].partition(AFTER)[0]).encode()
    if _sha256(found) != SHA256:
        raise RuntimeError(f"the viewer in {WANTED} is not the known one (sha256 {_sha256(found)[:12]}…)")
    folder.mkdir(parents=True, exist_ok=True)
    licence.write_bytes(terms)
    module.write_bytes(found)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class ViewerHook(BuildHookInterface):
    """A wheel is not built without the viewer; an environment for development is, and `serve` says what is missing."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            bring()
        except RuntimeError as error:
            if version != "editable":
                raise
            self.app.display_warning(f"{error}; `python tools/viewer.py` brings it later")


if __name__ == "__main__":
    try:
        bring()
    except RuntimeError as error:
        sys.exit(f"{error}; try again, or set pip up for a registry that can be reached")
