"""Untrusted pictures: bombs, endless animations, truncated ones, and ones under a wrong name."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fer_dist.data.decoding import FORMAT_OF, FORMATS, decode
from fer_dist.errors import UserError
from tests.helpers.memory_meter import read_set, read_within
from tests.helpers.picture_files import encoded, plain, write_folder, write_zip

NOISE = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)


def grey(side: int, level: int = 7) -> Image.Image:
    return Image.new("L", (side, side), level)


def png(width: int, height: int, chunks: bytes = b"") -> bytes:
    """Return a PNG of any size, with chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(48)) * 48))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def many_frames(count: int) -> bytes:
    """Return a GIF of full size, its one frame written many times."""
    raw = encoded(grey(4000), "GIF")
    head = raw.index(b"\x2c")
    return raw[:head] + raw[head:-1] * count + b";"


def many_scans(count: int, side: int = 4096) -> bytes:
    """Return a progressive JPEG whose last pass, of 33 bytes, is repeated."""
    raw = encoded(grey(side, 128), "JPEG", progressive=True, quality=50)
    last = raw[raw.rindex(b"\xff\xda") : -2]
    return raw[:-2] + last * count + raw[-2:]


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "text.png": (lambda: png(48, 48, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**26)))), "data too large"),
    "frames.gif": (lambda: many_frames(400), "read: "),
    "scans.jpg": (lambda: many_scans(100_000), "a JPEG of 100,006 scans, more than 100"),
}
PICTURES = BOMBS | {
    "pixels.png": (lambda: png(4097, 4096), "4097x4096 pixels, over 16,777,216"),
    "bytes.jpg": (lambda: plain(form="JPEG") + bytes(17 * 2**20), "more than a picture may have (16,777,216)"),
}
PHOTOS = BOMBS | {
    "largest.png": (lambda: encoded(Image.new("L", (8192, 6144)), compress_level=1), "read: "),
    "pixels.png": (lambda: png(8193, 6144), "8193x6144 pixels, over 50,331,648"),
    "bytes.jpg": (lambda: bytes(65 * 2**20), "more than a picture may have (67,108,864)"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_bomb_takes_no_more_than_a_picture(name: str, tmp_path: Path) -> None:
    make, outcome = PICTURES[name]
    read_within("faces", write_folder(tmp_path, {f"happy/{name}": make()}), outcome, max_mib=160)


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photo_has_larger_bounds(name: str, tmp_path: Path) -> None:
    make, outcome = PHOTOS[name]
    (tmp_path / name).write_bytes(make())
    read_within("photo", tmp_path / name, outcome, max_mib=320)


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_picture_is_refused(form: str) -> None:
    """At each sixteenth, however much could be shown of it."""
    raw = encoded(NOISE, form)
    assert decode(raw, 48).std() > 0
    for sixteenth in range(16):
        with pytest.raises(UserError, match=r"does not decode|no picture of the formats"):
            decode(raw[: len(raw) * sixteenth // 16], 48)


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_must_have_the_format_of_its_name(form: str) -> None:
    raw = plain(form=form)
    for ending, said in FORMAT_OF.items():
        name = f"train/happy/x{ending.upper() if form == 'PNG' else ending}"
        if said == form:
            assert decode(raw, 48, name).shape == (48, 48)
        else:
            with pytest.raises(UserError, match=f"its name says {said}, but it holds {form}: rename it"):
                decode(raw, 48, name)
    assert decode(raw, 48, "train.parquet row 1").shape == (48, 48), "rows have no such names"


def test_honest_jpegs_are_read() -> None:
    """One of several pictures, as some phones write them, and one of 90 scans."""
    raw = encoded(NOISE, "MPO", save_all=True, append_images=[grey(48)])
    with Image.open(io.BytesIO(raw)) as picture:
        assert picture.format == "MPO"
    assert decode(raw, 48, "x.jpg").std() > 0
    assert decode(many_scans(90, 512), 48, "x.jpg").shape == (48, 48)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_picture_of_an_animation_is_read(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    raw = encoded(grey(48, 50), form, save_all=True, append_images=[grey(48, 100), grey(48, 200)], **options)
    with Image.open(io.BytesIO(raw)) as picture:
        assert getattr(picture, "n_frames", 1) == 3
    assert decode(raw, 48).tolist() == [[50] * 48] * 48


def test_a_wrong_name_is_one_bad_picture(tmp_path: Path) -> None:
    """In folders and archives, where pictures have names; the rows of a parquet file only have paths in them."""
    files = {"happy/1.jpg": plain(form="JPEG"), "happy/2.jpg": plain()}
    for path in (write_folder(tmp_path / "faces", files), write_zip(tmp_path / "faces.zip", files)):
        with pytest.raises(UserError, match=r"2\.jpg'?: its name says JPEG, but it holds PNG: rename it"):
            read_set(path)
        assert len(read_set(path, "skip")) == 1
    images = [{"path": name, "bytes": raw} for name, raw in files.items()]
    parquet.write_table(pa.table({"image": images, "label": [3, 3]}), tmp_path / "x.parquet")
    assert len(read_set(tmp_path / "x.parquet")) == 2
