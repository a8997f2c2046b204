"""Photos: upright, on white, in colour, and within their bounds."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fer_dist.data.decoding import MAX_PHOTO_BYTES, Photo, decode_photo
from fer_dist.errors import UserError
from fer_dist.serve.photos import PHOTO_SIDE, read_photo
from tests.helpers.picture_files import encoded

CORNER = np.full((40, 60, 3), 255, np.uint8)
CORNER[:20, :20] = (200, 0, 0)  # red at the upper left, and nowhere else
GOOD = encoded(CORNER)


def photo(raw: bytes, name: str = "", side: int = 2048) -> Photo:
    return decode_photo(raw, name, side=side)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_stands_upright(orientation: int) -> None:
    """The file holds the picture as the camera was held; EXIF tells how to turn it back."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that lead there
    stored = Image.fromarray(CORNER)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = photo(encoded(stored, "JPEG", exif=exif, quality=95), "x.jpg")
    assert (found.width, found.height) == (60, 40)
    assert found.rgb_HW3.shape == (40, 60, 3)
    assert found.rgb_HW3.dtype == np.uint8
    assert found.rgb_HW3.flags.writeable
    assert np.abs(found.rgb_HW3.astype(int) - CORNER)[2:18, 2:18].max() < 12
    assert found.rgb_HW3[25:, 25:].min() > 240


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow warns, and so should a library
def test_damaged_exif_changes_nothing() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"):
        assert photo(encoded(CORNER, "JPEG", exif=exif)).rgb_HW3.shape == (40, 60, 3)


def test_what_is_transparent_is_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (10, 20, 30, 255)
    rgba[6:] = (0, 0, 0, 128)
    found = photo(encoded(rgba)).rgb_HW3
    assert [found[row, 0].tolist() for row in (0, 5)] == [[10, 20, 30], [255, 255, 255]]
    assert abs(int(found[7, 0, 0]) - 127) <= 1
    assert photo(encoded(Image.new("LA", (8, 8), (9, 0)))).rgb_HW3.min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.paste(1, (0, 0, 8, 4))
    for raw in (encoded(palette, transparency=0), encoded(palette.convert("RGB"), transparency=(200, 0, 0))):
        found = photo(raw).rgb_HW3
        assert [found[row, 0].tolist() for row in (0, 7)] == [[0, 0, 200], [255, 255, 255]]


def test_other_modes_become_colour_and_an_animation_its_first_picture() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert np.array_equal(photo(encoded(levels)).rgb_HW3[..., 0], levels // 257), "the upper half of 16 bits"
    red = photo(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).rgb_HW3[0, 0]
    assert red[0] > 200
    assert red[1:].max() < 60
    for mode in ("1", "L", "P"):
        assert photo(encoded(Image.new(mode, (30, 20), 1))).rgb_HW3.shape == (20, 30, 3)
    frames = [Image.new("RGB", (20, 20), (level, 0, 0)) for level in (100, 200)]
    assert photo(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).rgb_HW3[0, 0, 0] == 100


def test_large_and_thin_photos() -> None:
    found = photo(encoded(Image.new("RGB", (6000, 5000), "gray"), "JPEG", quality=60))
    assert (found.width, found.height) == (6000, 5000)
    assert found.rgb_HW3.shape == (1707, 2048, 3)
    for width, height in ((1, 1), (1, 4000), (4000, 1), (3, 2049)):
        found = photo(encoded(Image.new("L", (width, height))), side=64)
        assert found.rgb_HW3.size
        assert max(found.rgb_HW3.shape) <= 64
        assert (found.width, found.height) == (width, height)


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("x.png", b"just text\n", "no picture of the formats"),
        ("x.png", b"", "no picture of the formats"),
        ("x.png", GOOD[:90], "does not decode"),
        ("x.jpg", GOOD, "its name says JPEG, but it holds PNG: rename it"),
        ("x.png", GOOD + bytes(MAX_PHOTO_BYTES), "more than a picture may have"),
        ("x.tif", encoded(CORNER, "TIFF"), "no picture of the formats"),
        ("x.png", encoded(Image.new("1", (8193, 6144))), "8193x6144 pixels, over 50,331,648"),
    ],
)
def test_what_is_refused(name: str, raw: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        photo(raw, name)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=problem):
        read_photo(tmp_path / name)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, problem in (
        ("pipe.png", "no regular file"),
        ("loop.png", "symbolic links"),
        ("missing.png", "No such file"),
        ("", "no regular file"),
    ):
        with pytest.raises(UserError, match=f"cannot be read: .*{problem}"):
            read_photo(tmp_path / name)
    (tmp_path / "good.png").write_bytes(GOOD)
    (tmp_path / "link.png").symlink_to("good.png")
    assert np.array_equal(read_photo(tmp_path / "link.png").rgb_HW3, CORNER)
    assert PHOTO_SIDE >= 1024
