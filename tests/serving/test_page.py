"""The page in a real browser, against a real `cheaplunch serve` on a run of a tiny network with random weights."""

import base64
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff, ornt_transform
from PIL import Image as Picture

from cheaplunch.__main__ import main
from cheaplunch.data.volume import read_label, read_volume
from cheaplunch.serving.app import STATIC

sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRAWS_IN_SOFTWARE = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]

DISC, BLOCK = [11, 10, 2], [21, 22, 3]  # voxels of both classes in `tiny_dataset`


def finetune(data: Path, out: Path, *more: str) -> Path:
    """A run of two steps."""
    words = ["finetune", "--data", data, "--out", out, "--backbone", "tiny-random", "--image-size", 64, "--steps", 2]
    assert main([str(word) for word in (*words, "--exemplars", 2, "--warmup-steps", 1, "--device", "cpu", *more)]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no Chromium here")
    if not (STATIC / "niivue.js").is_file():
        pytest.skip("the viewer is not there: python tools/viewer.py brings it")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=DRAWS_IN_SOFTWARE)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def serving(*words: object) -> Iterator[str]:
    """The address of a server on a free port."""
    command = [sys.executable, "-m", "cheaplunch", "serve", *map(str, words), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[-1] for line in process.stdout if "http://" in line)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address(run, tiny_dataset, browser) -> Iterator[str]:
    with serving(run, "--data", tiny_dataset) as address:
        yield address


@pytest.fixture
def page(browser):
    """A page of its own, which must not complain."""
    page = browser.new_page(viewport={"width": 1100, "height": 720})
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda said: said.type == "error" and "Failed to load" not in said.text and complaints.append(said.text),
    )
    yield page
    page.close()
    assert complaints == []


def settled(page) -> None:
    """Waits for what is under way. (Playwright's own waiting evaluates text, which the page's policy forbids.)"""
    until(page, "cheaplunch.isIdle")


def until(page, condition: str) -> None:
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"{condition} did not come; the page says {status(page)!r}"
        time.sleep(0.02)


def status(page) -> str:
    return page.locator("#status").inner_text()


def arrive(page, address: str) -> None:
    page.goto(address)
    page.get_by_role("button", name="case_0", exact=True).wait_for()


def open_case(page, address: str, name: str = "case_0") -> None:
    arrive(page, address)
    page.get_by_role("button", name=name, exact=True).click()
    until(page, "cheaplunch.mask !== null")
    settled(page)


def place(page, voxel: list[int]) -> tuple[float, float]:
    """Where a voxel is on the screen, once its slice is shown."""
    page.evaluate("voxel => cheaplunch.goTo(voxel)", voxel)
    until(page, "cheaplunch.isDrawn")
    x, y = page.evaluate("voxel => cheaplunch.clientOf(voxel)", voxel)
    return x, y


def click(page, voxel: list[int], button: str = "left") -> None:
    click_now(page, voxel, button)
    settled(page)


def click_now(page, voxel: list[int], button: str = "left") -> None:
    """Does not wait for the answer."""
    page.mouse.click(*place(page, voxel), button=button)


def mask(page) -> np.ndarray:
    """(I, J, K) that the page holds."""
    shape, data = page.evaluate("[cheaplunch.mask.shape, Array.from(cheaplunch.mask.data)]")
    return np.array(data, np.uint8).reshape(shape, order="F")


def colours(page) -> np.ndarray:
    """(rows, columns, 3) of what is on the screen."""
    return np.asarray(Picture.open(BytesIO(page.screenshot())).convert("RGB")).astype(int)


def download(page, button: str, folder: Path) -> Path:
    with page.expect_download() as coming:
        page.get_by_role("button", name=button, exact=True).click()
    path = folder / coming.value.suggested_filename
    coming.value.save_as(path)
    return path


def predict(run: Path, image: Path, prompts: Path, out: Path, *words: str) -> np.ndarray:
    assert main(["predict", str(run), str(image), "--out", str(out), "--prompts", str(prompts), *words]) == 0
    [path] = out.glob("*.nii.gz")
    return np.asarray(nib.load(path).dataobj)


def test_clicks_give_the_mask_that_predict_gives(page, address, run, tiny_dataset, tmp_path):
    open_case(page, address)
    assert not mask(page).any()

    click(page, DISC)
    first = mask(page)
    assert first.any() and set(np.nonzero(first)[2]) == {2}  # asked on slice 2 alone
    assert status(page) == f"Slice 3: disc {np.count_nonzero(first)} px."

    page.keyboard.press("2")
    click(page, BLOCK)
    click(page, [25, 5, 3], button="right")
    page.keyboard.down("Shift")
    page.mouse.move(*place(page, [16, 16, 2]))
    page.mouse.down()
    page.mouse.move(*place(page, [26, 27, 2]), steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    settled(page)
    assert page.evaluate("cheaplunch.prompts") == [
        {"class": "disc", "kind": "point", "voxel": DISC, "positive": True},
        {"class": "block", "kind": "point", "voxel": BLOCK, "positive": True},
        {"class": "block", "kind": "point", "voxel": [25, 5, 3], "positive": False},
        {"class": "block", "kind": "box", "voxel": [[16, 16, 2], [26, 27, 2]]},
    ]
    whole = mask(page)
    assert {2, 3} <= set(np.unique(np.nonzero(whole)[2])) and 2 in whole

    for _ in range(3):
        page.get_by_role("button", name="Undo").click()
        settled(page)
    assert np.array_equal(mask(page), first)
    for _ in range(3):
        page.keyboard.press("Control+Shift+Z")
        settled(page)
    assert np.array_equal(mask(page), whole)

    prompts = download(page, "Prompts", tmp_path)
    image = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"
    saved = nib.load(download(page, "NIfTI", tmp_path))
    assert np.array_equal(np.asarray(saved.dataobj), whole)
    assert np.array_equal(saved.affine, nib.load(image).affine)
    assert np.array_equal(predict(run, image, prompts, tmp_path / "still", "--no-propagate"), whole)

    page.keyboard.press("p")
    settled(page)
    carried = predict(run, image, prompts, tmp_path / "carried")
    assert np.array_equal(mask(page), carried)
    assert np.array_equal(np.asarray(nib.load(download(page, "NIfTI", tmp_path)).dataobj), carried)


def test_a_dropped_file_of_another_orientation_lies_where_it_is_drawn(page, address, tiny_dataset):
    """Axes that run to the front, down and to the right; the disc is bright, and is clicked where it is bright."""
    image = nib.load(tiny_dataset / "imagesTr" / "case_0_0000.nii.gz")
    to = nib.orientations.axcodes2ornt("AIR")
    turn = ornt_transform(nib.io_orientation(image.affine), to)
    voxels = apply_orientation(np.asarray(image.dataobj)[:, :, :5], turn)
    turned = nib.Nifti1Image(voxels, image.affine @ inv_ornt_aff(turn, (32, 32, 5)))
    i, j, k = (int(n) for n in np.unravel_index(np.argmax(voxels), voxels.shape))  # on the disc
    arrive(page, address)
    drop(page, "turned.nii", turned.to_bytes())
    until(page, "cheaplunch.mask !== null")
    assert page.title() == "turned · cheaplunch"

    x, y = (int(n) for n in place(page, [i, j, k]))
    dark = [int(n) for n in np.unravel_index(np.argmin(voxels[:, j, :]), (32, 32))]
    x_dark, y_dark = (int(n) for n in page.evaluate("v => cheaplunch.clientOf(v)", [dark[0], j, dark[1]]))
    before = colours(page)
    assert before[y + 2, x + 2].min() > 120 > before[y_dark, x_dark].max()  # beside the crosshair

    click(page, [i, j, k])
    assert page.evaluate("cheaplunch.prompts")[0]["voxel"] == [i, j, k]
    found = mask(page)
    assert set(np.nonzero(found)[1]) == {j}
    # What is tinted on the screen is the mask.
    after = colours(page)
    centres = {(a, c): page.evaluate("v => cheaplunch.clientOf(v)", [a, j, c]) for a in range(32) for c in range(32)}
    tinted = np.zeros((32, 32), bool)
    for (a, c), (px, py) in centres.items():
        red, _, blue = after[int(py) + 3, int(px) + 3]  # not on the crosshair's lines
        tinted[a, c] = red - blue > 25
    near = np.hypot(*(np.indices((32, 32)) - np.array([i, k])[:, None, None])) < 2  # where the click's own mark is
    assert (tinted == (found[:, j, :] > 0))[~near].mean() > 0.99


def drop(page, name: str, content: bytes) -> None:
    page.evaluate(
        """([name, content]) => {
          const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], name));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        [name, base64.b64encode(content).decode()],
    )


@pytest.mark.parametrize("how", ["dropped", "chosen"])
def test_a_dicom_folder_is_saved_as_the_seg_that_predict_writes(page, address, run, save_series, tmp_path, how):
    noise = np.random.default_rng(5).normal(50, 8, (6, 32, 40))
    noise[1:4, 6:15, 7:16] = 200  # a block that is bright
    save_series(tmp_path / "study" / "t2", noise.astype(np.uint16))
    (tmp_path / "study" / "README.TXT").write_text("from the scanner")
    arrive(page, address)
    if how == "dropped":
        drop_from_disk(page, tmp_path / "study")
    else:
        page.locator("#folder").set_input_files(tmp_path / "study")
    until(page, "cheaplunch.mask !== null")
    assert page.title() == "t2 · cheaplunch"
    assert page.locator("#formats button").all_inner_texts() == ["NIfTI", "NRRD", "DICOM SEG"]

    click(page, [11, 10, 2])
    page.keyboard.press("2")
    click(page, [30, 22, 3])
    page.keyboard.press("p")
    settled(page)
    shown = mask(page)
    assert shown.shape == (40, 32, 6) and set(np.unique(shown)) == {0, 1, 2}
    saved, prompts = download(page, "DICOM SEG", tmp_path), download(page, "Prompts", tmp_path)
    assert (saved.name, prompts.name) == ("t2.dcm", "t2.json")

    words = ["predict", run, tmp_path / "study", "--out", tmp_path / "out", "--prompts", prompts]
    assert main([str(word) for word in words]) == 0
    volume, names = read_volume([tmp_path / "study"]), {"disc": 1, "block": 2}
    wanted = read_label(tmp_path / "out" / "t2.dcm", volume, names)  # (Z, Y, X)
    assert np.array_equal(read_label(saved, volume, names), wanted)
    assert np.array_equal(shown.transpose(2, 1, 0), wanted)


def drop_from_disk(page, path: Path) -> None:
    """As from a file manager: the browser itself opens the folder."""
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})


def test_a_grey_picture_is_drawn_as_it_is(page, address):
    """Dark to the left, bright to the right, with a bright square in the upper left corner."""
    picture = np.full((40, 60), 30, np.uint8)
    picture[:, 30:], picture[:10, :10] = 180, 240
    arrive(page, address)
    drop(page, "scan.png", png(picture))
    until(page, "cheaplunch.mask !== null")
    settled(page)
    page.get_by_role("button", name="All values").click()
    settled(page)
    corner, left, right = (drawn(page, pixel).mean() for pixel in ([5, 5, 0], [15, 30, 0], [45, 10, 0]))
    assert corner > 240 and left < 15 and abs(right - 182) < 8  # 30 is black, 240 white
    assert page.locator("#formats button").all_inner_texts() == ["Mask"]


@pytest.mark.slow
def test_a_picture_in_colour_is_drawn_in_its_colours(page, tmp_path):
    noise = np.random.default_rng(3)
    quarters = np.zeros((40, 60, 3), np.uint8)
    quarters[:20, :30], quarters[:20, 30:], quarters[20:, :30] = (200, 40, 40), (30, 180, 60), (40, 60, 210)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        shades = (quarters * noise.uniform(0.8, 1)).astype(np.uint8)
        Picture.fromarray(shades).save(tmp_path / "data" / "images" / name)
        red = np.where(shades[..., 0] > 100, 255, 0).astype(np.uint8)
        Picture.fromarray(red).save(tmp_path / "data" / "masks" / name)
    run = finetune(tmp_path / "data", tmp_path / "run")
    with serving(run) as address:
        page.goto(address)
        page.get_by_role("button", name="Choose files…").wait_for()
        drop(page, "quarters.png", png(quarters))
        until(page, "cheaplunch.mask !== null")
        settled(page)
        assert not page.locator("#windowing").is_visible()  # colours have no window
        for x, y in ((8, 6), (50, 6), (8, 33), (50, 33)):
            assert np.abs(drawn(page, [x, y, 0]) - quarters[y, x]).max() <= 3
        click(page, [8, 6, 0])
        assert page.evaluate("cheaplunch.prompts")[0]["voxel"] == [8, 6, 0]
        assert mask(page).shape == (60, 40, 1) and mask(page).any()


def png(picture: np.ndarray) -> bytes:
    packed = BytesIO()
    Picture.fromarray(picture).save(packed, "png")
    return packed.getvalue()


def drawn(page, voxel: list[int]) -> np.ndarray:
    """(3,) the colour on the screen of a voxel of the slice that is shown."""
    x, y = (int(n) for n in page.evaluate("voxel => cheaplunch.clientOf(voxel)", voxel))
    return colours(page)[y, x]


def test_an_answer_that_comes_late_does_not_replace_a_newer_one(page, address):
    open_case(page, address)
    held = []
    page.route("**/segment", lambda route: held.append((route, route.fetch())), times=1)
    click_now(page, DISC)
    click_now(page, [13, 14, 2])
    until(page, "cheaplunch.mask.data.some(Boolean)")
    newer = mask(page)
    [(route, late)] = held
    assert not page.evaluate("cheaplunch.isIdle")
    route.fulfill(response=late)
    settled(page)
    assert np.array_equal(mask(page), newer)
    page.get_by_role("button", name="Undo").click()
    settled(page)
    assert not np.array_equal(mask(page), newer)  # what came late would have shown


def test_the_keyboard_alone_does_it_all(page, address, tmp_path):
    arrive(page, address)
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "case_1":
            break
    page.keyboard.press("Enter")
    until(page, "cheaplunch.mask !== null")
    settled(page)
    start = page.evaluate("cheaplunch.voxel")

    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Shift+ArrowDown", "PageDown", "Enter"):
        page.keyboard.press(key)
    settled(page)
    there = [start[0] + 2, start[1] + 9, start[2] - 1]  # i runs to the patient's left, j to the back, k up
    assert page.evaluate("cheaplunch.prompts") == [{"class": "disc", "kind": "point", "voxel": there, "positive": True}]
    one = mask(page)
    assert one.any()

    for key in ("2", "b", "Enter", "ArrowLeft", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    page.keyboard.press("Backspace")
    settled(page)
    box, off = page.evaluate("cheaplunch.prompts")[1:]
    assert box == {"class": "block", "kind": "box", "voxel": [there, [there[0] - 1, there[1] - 1, there[2]]]}
    assert (off["class"], off["positive"]) == ("block", False)

    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    settled(page)
    assert np.array_equal(mask(page), one)
    with page.expect_download() as coming:
        page.keyboard.press("Control+s")
    coming.value.save_as(tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), one)

    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()


def test_a_file_that_is_refused_says_why_and_leaves_the_image(page, address, tmp_path):
    (tmp_path / "notes.nii.gz").write_text("no image at all")
    arrive(page, address)
    page.locator("#files").set_input_files(tmp_path / "notes.nii.gz")
    page.locator("#refused").wait_for()
    line = page.locator("#refused").inner_text()
    assert "notes.nii.gz" in line and "\n" not in line and str(tmp_path) not in line
    page.get_by_role("button", name="case_2").click()
    until(page, "cheaplunch.mask !== null")
    click(page, DISC)
    shown = mask(page)
    page.locator("#files").set_input_files(tmp_path / "notes.nii.gz")
    until(page, "document.querySelector('#status').classList.contains('wrong')")
    assert status(page) == line
    assert np.array_equal(mask(page), shown) and shown.any()


def test_a_server_that_does_not_answer_is_said_and_prompts_are_kept(page, address):
    open_case(page, address)
    click(page, DISC)
    found = mask(page)
    page.context.set_offline(True)
    page.keyboard.press("2")
    click(page, BLOCK)
    alert = page.get_by_role("alert")
    assert "does not answer" in alert.inner_text()
    assert np.array_equal(mask(page), found) and len(page.evaluate("cheaplunch.prompts")) == 2
    page.context.set_offline(False)
    alert.get_by_role("button").click()
    settled(page)
    assert not alert.is_visible()
    assert np.array_equal(mask(page)[..., :3], found[..., :3]) and (mask(page)[..., 3] == 2).any()


@pytest.mark.slow
def test_a_network_of_boxes_says_so(page, tiny_dataset, tmp_path):
    boxes = finetune(tiny_dataset, tmp_path / "boxes", "--training-prompts", "box")
    with serving(boxes, "--data", tiny_dataset) as address:
        open_case(page, address)
        assert "boxes only" in page.locator("#kind").inner_text()
        page.keyboard.press("c")
        click(page, DISC)
        assert page.evaluate("cheaplunch.prompts") == [] and "boxes only" in status(page)
        for key in ("b", "Enter", "Shift+ArrowRight", "Shift+ArrowDown", "Enter"):
            page.keyboard.press(key)
        settled(page)
        assert mask(page).any()


@pytest.mark.slow
def test_a_network_without_prompts_segments_at_a_button(page, tiny_dataset, tmp_path):
    run = finetune(tiny_dataset, tmp_path / "run", "--method", "samed")
    with serving(run, "--data", tiny_dataset) as address:
        open_case(page, address)
        assert not page.locator("#click-tool").is_visible()
        page.get_by_role("button", name="Segment", exact=True).click()
        settled(page)
        shown = mask(page)
        saved = nib.load(download(page, "NIfTI", tmp_path))
    image = tiny_dataset / "imagesTr" / "case_0_0000.nii.gz"
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "out")]) == 0
    [written] = (tmp_path / "out").glob("*.nii.gz")
    assert np.array_equal(shown, np.asarray(saved.dataobj))
    assert np.array_equal(shown, np.asarray(nib.load(written).dataobj))
