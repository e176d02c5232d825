"""`segdiff studio` in a process of its own, and a page of it in Chromium."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Debian's and others' names. Playwright's own builds are not used: they would have to be downloaded.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium's own words for an answer that is no success, which the page shows in its own.
_REFUSED = "Failed to load resource: the server responded"
# WebGL2 without a GPU.
_OPTIONS = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
_PATIENCE_MS = 120_000


@contextmanager
def running_studio(folder: Path) -> Iterator[str]:
    """The address of a page that is served by the command."""
    command = [sys.executable, "-m", "segdiff_dist", "studio", "--port", "0", "--browser", "none"]
    with (folder / "studio.err").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + (folder / "studio.err").read_text()
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_OPTIONS))
        yield browser
        browser.close()


@contextmanager
def page_of(
    browser: Browser, url: str, width: int = 1280, height: int = 800, *, by_touch: bool = False
) -> Iterator[Page]:
    """The page, not yet opened. After it: nothing was asked of another address, and no script failed."""
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=by_touch)
    page = context.new_page()
    page.set_default_timeout(_PATIENCE_MS)
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    assert [one for one in faults if not one.startswith(_REFUSED)] == []


def drop(page: Page, files: Mapping[str, bytes]) -> None:
    """Drop files on the drawn mask."""
    held = page.evaluate_handle(
        """files => {
             const held = new DataTransfer();
             const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
             for (const [name, text] of files) held.items.add(new File([bytes(text)], name));
             return held;
           }""",
        [[name, base64.b64encode(content).decode()] for name, content in files.items()],
    )
    page.dispatch_event("#mask-canvas", "drop", {"dataTransfer": held})


def open_page(page: Page, url: str) -> None:
    """Until a mask is shown."""
    page.goto(url)
    page.wait_for_selector("body[data-ready=yes]")
