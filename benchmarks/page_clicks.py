"""The page in a browser, on a real volume: one click per organ and slice that has it, against `predict`.

The script opens a test case of `--data` on the page of `cheaplunch serve RUN` in headless Chromium, chooses each organ
by its key and clicks it on every slice that shows it, at the pixel furthest from its boundary (`furthest_point`; oracle
prompts). What the page saves has to be what `cheaplunch predict` writes from the same clicks, voxel for voxel, so that
every Dice is equal too. Needs playwright for Python and a Chromium; pictures of the page go to `--screenshots`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import CHEAPLUNCH, DATA, arguments, command, progress, spread, write
from playwright.sync_api import Page, sync_playwright

from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.slices import Places, Window, from_slices
from cheaplunch.data.volume import read_label
from cheaplunch.evaluation.metrics import MaskPair, dice
from cheaplunch.prompts import furthest_point
from cheaplunch.runs import RunFolder

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
PATIENCE_S = 120

Entry = dict[str, Any]
"""A click in the words of `predict --prompts`."""


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("run", type=Path, help="folder of a fine-tuned run")
    parser.add_argument("--data", type=Path, default=DATA.parent / "chaos", help="images and labels")
    parser.add_argument("--case", default="chaos_1", help="of these, one that the run has not learned from")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the page")
    found = next(filter(None, map(shutil.which, BROWSERS)), BROWSERS[0])
    parser.add_argument("--browser", type=Path, default=Path(found), help="a Chromium")
    options = parser.parse_args()

    axis = RunFolder(options.run).load_config().data.axis
    dataset = open_dataset(options.data)
    case = next(case for case in dataset.cases if case.id == options.case)
    loaded = load_case(case, dataset, Window(), axis)
    slices = furthest_clicks(loaded.label, dataset.labels, Places(loaded.volume.grid, axis))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        saved = folder / "page.nii.gz"
        first_s, again_s = click_on_page(options, slices, list(dataset.labels), saved)
        clicks = [entry for entries in slices for entry in entries]
        prompts = folder / "clicks.json"
        prompts.write_text(json.dumps({options.case: clicks}))
        masks = folder / "masks"
        command("predict", options.run, *case.images, "--out", masks, "--prompts", prompts, "--no-propagate")
        page, predicted = (read_label(path, loaded.volume) for path in (saved, *masks.glob("*.nii.gz")))  # (Z, Y, X)

    truth = from_slices(loaded.label, axis)
    dices = {
        name: {"page": of(page, truth, k), "predict": of(predicted, truth, k)} for name, k in dataset.labels.items()
    }
    write(
        options,
        {
            "prompts": "oracle prompts: the furthest point of each organ on each slice that has it",
            "clicks": len(clicks),
            "dice": dices,
            "voxels_that_differ": int(np.count_nonzero(page != predicted)),
            "first_click_of_a_slice_s": spread(first_s),
            "further_click_of_a_slice_s": spread(again_s),
        },
    )


def of(found: np.ndarray, truth: np.ndarray, number: int) -> float:
    """Dice of one class."""
    return dice(MaskPair(found == number, truth == number, (1.0, 1.0, 1.0), truth.shape))


def furthest_clicks(label: np.ndarray, labels: Mapping[str, int], places: Places) -> list[list[Entry]]:
    """For each slice of `label` (N, H, W) that shows a class one click on each class there."""
    slices = []
    for number, truth in enumerate(label):
        points = {name: furthest_point(truth == k) for name, k in labels.items() if (truth == k).any()}
        voxels = {name: places.off_slices(x, y, number, "voxel") for name, (x, y) in points.items()}
        slices.append([{"class": name, "voxel": [round(i) for i in voxel]} for name, voxel in voxels.items()])
    return [entries for entries in slices if entries]


# --- the page --------------------------------------------------------------------------------------------------------


def click_on_page(
    options: Any, slices: list[list[Entry]], names: list[str], saved: Path
) -> tuple[list[float], list[float]]:
    """Makes the clicks and saves the mask; seconds to the mask of each slice's first click, and of all others."""
    serve = [*CHEAPLUNCH, "serve", str(options.run), "--data", str(options.data), "--port", "0"]
    first_s, again_s = [], []
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        try:
            address = next(line.split()[-1] for line in server.stdout if "http://" in line)
            chromium = playwright.chromium.launch(executable_path=options.browser, args=SOFTWARE_GL)
            page = chromium.new_page(viewport={"width": 1280, "height": 800})
            page.goto(address)
            page.get_by_role("button", name=options.case, exact=True).wait_for()
            shoot(page, options.screenshots, "open")
            page.get_by_role("button", name=options.case, exact=True).click()
            until(page, "cheaplunch.mask !== null && cheaplunch.isIdle")
            for entries in progress(slices, "slices"):
                waits_s = [click(page, names.index(entry["class"]) + 1, entry["voxel"]) for entry in entries]
                first_s.append(waits_s[0])
                again_s += waits_s[1:]
            given = page.evaluate("cheaplunch.prompts.map(({ class: name, voxel }) => ({ class: name, voxel }))")
            if given != [entry for entries in slices for entry in entries]:
                raise RuntimeError("the page made other clicks than it was told to")
            show(page, max(slices, key=len)[0]["voxel"])
            shoot(page, options.screenshots, "mask")
            with page.expect_download() as coming:
                page.get_by_role("button", name="NIfTI", exact=True).click()
            coming.value.save_as(saved)
            chromium.close()
        finally:
            server.terminate()
    return first_s, again_s


def click(page: Page, key: int, voxel: list[int]) -> float:
    """Clicks a class on a voxel of its slice; seconds until the mask is drawn."""
    page.keyboard.press(str(key))
    x, y = show(page, voxel)
    started = time.perf_counter()
    page.mouse.click(x, y)
    until(page, "cheaplunch.isIdle")
    return time.perf_counter() - started


def show(page: Page, voxel: list[int]) -> tuple[float, float]:
    """Brings a voxel's slice up, and says where the voxel is on the screen."""
    page.evaluate("voxel => cheaplunch.goTo(voxel)", voxel)
    until(page, "cheaplunch.isIdle")
    x, y = page.evaluate("voxel => cheaplunch.clientOf(voxel)", voxel)
    return x, y


def until(page: Page, condition: str) -> None:
    """Waits for the page. (Playwright's own waiting evaluates text, which the page's policy forbids.)"""
    end = time.monotonic() + PATIENCE_S
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise RuntimeError(f"{condition} did not come; the page says {page.locator('#status').inner_text()!r}")
        time.sleep(0.005)


def shoot(page: Page, folder: Path | None, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"page-{name}.png")


if __name__ == "__main__":
    main()
