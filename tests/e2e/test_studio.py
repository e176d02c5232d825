"""The page of `segdiff studio` in a browser: draw an organ, paint, download. Skipped where there is no Chromium."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pytest
import requests
from PIL import Image
from studio_support import chromium, drop, open_page, page_of, running_studio

from data_shards.labels import AMOS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

SIZE = 256
AORTA = AMOS.names.index("aorta")
# Of the brush, in pixels. In the phantom the aorta is bright in CT (contrast medium) and dark in MR (flow).
BRUSH, MARGIN = 40, 3
LEAST_HU, LEAST_GREY = 100.0, 50.0
STEPS = 6
SCRIPT = "<img src=x onerror='window.wasRun = 1'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def url(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_studio(tmp_path_factory.mktemp("studio")) as address:
        yield address


@pytest.mark.parametrize(("width", "by_touch"), [(1280, False), (400, True)])
def test_a_drawn_organ_is_in_both_images(
    browser: Browser, url: str, tmp_path: Path, width: int, by_touch: bool
) -> None:
    with page_of(browser, url, width, by_touch=by_touch) as page:
        open_page(page, url)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        draw_aorta(page, by_touch)
        page.locator("#steps").fill(str(STEPS))
        page.locator("#paint").click()
        images = {one: finished(page, one, tmp_path) for one in ("CT", "MR")}
        mask = downloaded(page, "#save-mask", tmp_path)
        inside, around = parts(mask)
        assert set(np.unique(mask)) == {0, AORTA, AMOS.body_id}
        assert images["CT"][inside].mean() > images["CT"][around].mean() + LEAST_HU
        assert images["MR"][inside].mean() < images["MR"][around].mean() - LEAST_GREY
        if not by_touch:
            assert "synthetic" in page.locator(".warning").inner_text().lower()
            compare_with_readout(page, images)


def test_what_arrives_late_or_is_wrong_changes_nothing(browser: Browser, url: str) -> None:
    """A mask that is opened while another is drawn, a seed that is none, and a packing that fails."""
    with page_of(browser, url) as page:
        held: list[Route] = []
        page.route("**/masks", lambda route: held.append(route))
        open_page(page, url)
        draw_aorta(page, by_touch=False)
        small = gzip.compress(nib.Nifti1Image(np.full((32, 32, 2), AORTA, np.uint8), np.eye(4)).to_bytes())
        with page.expect_request("**/masks"):
            drop(page, {"small.nii.gz": small})
        page.mouse.down()
        held.pop().continue_()
        page.get_by_text("small.nii.gz is open").wait_for()
        page.mouse.up()
        assert page.locator("#undo").is_disabled(), "what was drawn belongs to the mask before"
        with page.expect_request("**/masks"):
            drop(page, {"late.nii.gz": small})
        page.locator(".start", has_text="outline").click()
        with page.expect_response("**/masks"):
            held.pop().continue_()
        page.wait_for_timeout(300)
        assert page.locator("#planes").is_hidden(), "the outline was chosen later"
        page.locator("#seed").fill("-1")
        page.locator("#paint").click()
        page.get_by_text("seed: -1").wait_for()
        page.locator("#seed").fill("1")
        page.evaluate("() => { window.CompressionStream = function () { throw new Error('no packing') } }")
        page.locator("#paint").click()
        page.get_by_text("no packing").wait_for()
        assert page.locator("#paint-text").inner_text().startswith("Paint")
        assert page.locator("#strip").is_hidden()


def test_undo_and_erase_give_back_the_patient(browser: Browser, url: str) -> None:
    with page_of(browser, url) as page:
        open_page(page, url)
        draw_aorta(page, by_touch=False)
        readout = page.locator("#mask-readout")
        assert readout.inner_text() == "aorta"
        for key, organ in (("z", "body"), ("y", "aorta"), ("e", "aorta")):
            page.keyboard.press(key)
            move_to_middle(page)
            assert readout.inner_text() == organ
        page.mouse.down()
        page.mouse.up()
        assert readout.inner_text() == "body"


def test_organs_are_drawn_by_keys_alone(browser: Browser, url: str, tmp_path: Path) -> None:
    with page_of(browser, url) as page:
        open_page(page, url)
        draw_aorta(page, by_touch=False)
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == "mask-canvas"
        page.keyboard.press("z")
        for key in ("k", *["ArrowLeft"] * 2, "Shift+ArrowDown", "Space"):
            page.keyboard.press(key)
        assert page.locator("#mask-readout").inner_text() == "aorta"
        assert middle_of(downloaded(page, "#save-mask", tmp_path)) == pytest.approx((108.5, 129.5))
        page.keyboard.press("k")
        page.keyboard.down("Space")
        page.keyboard.press("ArrowLeft")
        page.keyboard.up("Space")
        page.keyboard.press("ArrowLeft")
        drawn = downloaded(page, "#save-mask", tmp_path) == AORTA
        line = np.pi * (BRUSH / 2) ** 2 + BRUSH * BRUSH / 4
        assert drawn.sum() == pytest.approx(line, rel=0.05)
        for key in ("k", "z", "z", "l", "Space", *["ArrowRight"] * 3, *["ArrowUp"] * 2, "Space"):
            page.keyboard.press(key)
        assert (downloaded(page, "#save-mask", tmp_path) == AORTA).sum() == pytest.approx(np.pi * 15 * 10, rel=0.05)


def middle_of(mask: np.ndarray) -> tuple[float, float]:
    """Column and row of the aorta in the picture, whose left is the patient's right."""
    column, row = SIZE - np.argwhere(mask == AORTA).mean(axis=0)[:2] - 0.5
    return float(column), float(row)


def test_texts_of_strangers_are_shown_as_text(browser: Browser, url: str) -> None:
    with page_of(browser, url) as page:
        page.route("**/models", with_script_in_a_label)
        open_page(page, url)
        page.set_input_files("#file", {"name": f"{SCRIPT}.png", "mimeType": "image/png", "buffer": b"no picture"})
        message = page.locator("#messages .error")
        message.wait_for()
        assert SCRIPT in message.inner_text()
        assert page.locator(f'#organs button[title="{SCRIPT}"]').inner_text().startswith(SCRIPT)
        assert page.locator("img").count() == 0
        assert page.evaluate("window.wasRun") is None


def test_masks_are_dropped(browser: Browser, url: str, tmp_path: Path) -> None:
    """Of each kind, also a SEG beside its series. What cannot be read is named, and changes nothing."""
    nifti = requests.get(f"{url}examples/liver.nii.gz", timeout=60).content
    ids = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(nifti)).dataobj)
    asked = {"files": {"mask": nifti}, "data": {"steps": 1}, "headers": {"Accept": "application/dicom+zip"}}
    with zipfile.ZipFile(io.BytesIO(requests.post(f"{url}paint", timeout=120, **asked).content)) as answer:
        dicom = {name.rpartition("/")[2]: answer.read(name) for name in answer.namelist()}
    with page_of(browser, url) as page:
        open_page(page, url)
        kinds = {"liver.nii.gz": {"liver.nii.gz": nifti}, "liver.png": {"liver.png": png_of(ids)}, "mask.dcm": dicom}
        for name, files in kinds.items():
            page.locator(".start", has_text="outline").click()
            drop(page, files)
            page.locator("#messages", has_text=f"{name} is open.").wait_for()
            np.testing.assert_array_equal(downloaded(page, "#save-mask", tmp_path), ids)
        refused = {
            "2 files: drop one mask": {"a.png": png_of(ids), "b.png": png_of(ids)},
            "no known format": {"a.png": b"no picture"},
            "77": {"a.png": png_of(ids + 77 * (ids == 0))},
            "all background": {"a.png": png_of(0 * ids)},
            "Nothing that can be read": {},
        }
        for words, files in refused.items():
            drop(page, files)
            page.locator("#messages .error", has_text=words).wait_for()
        np.testing.assert_array_equal(downloaded(page, "#save-mask", tmp_path), ids)
        page.locator("#messages .error button", has_text="Leave them out").click()
        page.locator("#messages", has_text="a.png is open.").wait_for()


def png_of(ids_IJK: np.ndarray) -> bytes:
    """As a viewer shows them."""
    stream = io.BytesIO()
    shown_HW = ids_IJK[::-1, ::-1, 0].T.astype(np.uint8)
    Image.fromarray(np.ascontiguousarray(shown_HW)).save(stream, format="PNG")
    return stream.getvalue()


def test_a_volume_is_shown_by_niivue(browser: Browser, url: str) -> None:
    with page_of(browser, url) as page:
        open_page(page, url)
        page.locator(".start", has_text="volume").click()
        page.locator("#planes").wait_for()
        page.keyboard.press("v")
        page.locator("#volume-about", has_text="mask of").wait_for()
        assert page.evaluate("globalThis.niivue.Niivue !== undefined")


def draw_aorta(page: Page, by_touch: bool) -> None:
    """A disc in the middle of an empty patient."""
    page.locator(".start", has_text="outline").click()
    page.locator("#size").fill(str(BRUSH))
    page.locator("#organs button", has_text="aorta").click()
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.touchscreen.tap(*middle) if by_touch else page.mouse.click(*middle)


def move_to_middle(page: Page) -> None:
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    for shift in (2, 0):
        page.mouse.move(box["x"] + box["width"] / 2 + shift, box["y"] + box["height"] / 2)


def finished(page: Page, modality: str, folder: Path) -> np.ndarray:
    page.wait_for_selector(f"[data-panel={modality}][data-status=done]")
    return downloaded(page, f"[data-panel={modality}] button:has-text('NIfTI')", folder)


def downloaded(page: Page, button: str, folder: Path) -> np.ndarray:
    with page.expect_download() as waiting:
        page.locator(button).click()
    file = folder / waiting.value.suggested_filename
    waiting.value.save_as(file)
    return np.asarray(nib.load(file).dataobj)


def parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The aorta without its edge, and a ring around it."""
    voxels = np.argwhere(mask == AORTA)
    assert len(voxels) == pytest.approx(np.pi * (BRUSH / 2) ** 2, rel=0.05)
    middle = voxels.mean(axis=0)
    distance = np.linalg.norm(np.indices(mask.shape).reshape(3, -1).T - middle, axis=1).reshape(mask.shape)
    return distance < BRUSH / 2 - MARGIN, (distance > BRUSH / 2 + MARGIN) & (distance < BRUSH / 2 + 5 * MARGIN)


def compare_with_readout(page: Page, images: dict[str, np.ndarray]) -> None:
    """The value under the pointer is that of the file: the picture shows the patient's right on its left."""
    box = page.locator("[data-panel=CT] canvas").bounding_box()
    assert box is not None
    for row, column in ((100, 90), (128, 128), (150, 170)):
        page.mouse.move(box["x"] + (column + 0.5) / SIZE * box["width"], box["y"] + (row + 0.5) / SIZE * box["height"])
        for modality, unit in (("CT", "{} HU"), ("MR", "grey {}")):
            value = int(images[modality][SIZE - 1 - column, SIZE - 1 - row, 0])
            shown = page.locator(f"[data-panel={modality}] .readout").inner_text()
            assert shown.startswith(unit.format(value))


def with_script_in_a_label(route: object) -> None:
    answer = route.fetch()  # type: ignore[attr-defined]
    content = answer.json()
    content["models"][0]["labels"][AORTA]["name"] = SCRIPT
    route.fulfill(response=answer, json=content)  # type: ignore[attr-defined]
