"""Untrusted pictures: bombs, endless animations, truncated ones, and ones under a wrong name."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFile
from pyarrow import parquet

from fer_dist.data.decoding import FORMAT_OF, MAX_PICTURE_BYTES, decode
from fer_dist.data.readers import read_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from tests.helpers.malicious_pickles import zipped
from tests.helpers.memory_meter import read_within

FORMATS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "GIF": "gif"}
NOISE = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)


def encoded(form: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (picture or Image.fromarray(NOISE)).save(out, form, **options)
    return out.getvalue()


def grey(side: int, level: int = 7) -> Image.Image:
    return Image.new("L", (side, side), level)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, width: int = 48, height: int = 48, behind: bytes = b"") -> bytes:
    """Return a PNG with chunks before its pixels, and behind them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(48)) * 48))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + behind + chunk(b"IEND", b"")


@cache
def zeros(size: int) -> bytes:
    """Return that many zeros, compressed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size // 2**20)) + packer.flush()


def frames(form: str, count: int) -> bytes:
    """Return an animation whose pictures all differ."""
    first, *others = (grey(48, 83 * i % 251) for i in range(count))
    return encoded(form, first, save_all=True, append_images=others, duration=20)


def many_frames(count: int) -> bytes:
    """Return a GIF of full size, its one frame written many times."""
    raw = encoded("GIF", grey(4000))
    head = raw.index(b"\x2c")
    return raw[:head] + raw[head:-1] * count + b";"


def many_scans(count: int, side: int = 4096) -> bytes:
    """Return a progressive JPEG whose last pass, of 33 bytes, is repeated."""
    raw = encoded("JPEG", grey(side, 128), progressive=True, quality=50)
    last = raw[raw.rindex(b"\xff\xda") : -2]
    return raw[:-2] + last * count + raw[-2:]


def large_gif_frame() -> bytes:
    """Return a screen of 48 x 48 and a frame of 60,000 x 60,000."""
    raw = bytearray(encoded("GIF"))
    place = raw.index(b"\x2c", 13 + 3 * 256) + 5
    raw[place : place + 4] = struct.pack("<HH", 60_000, 60_000)
    return bytes(raw)


TOO_LARGE = "Decompressed data too large"
# Name: ending, file, and the reason of the refusal; "": it is read, within bounds.
BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "60,000 x 60,000": ("png", lambda: png(width=60_000, height=60_000), "does not decode"),
    "4,097 x 4,096": ("png", lambda: png(width=4097, height=4096), "4097x4096 pixels, over 16,777,216"),
    "2**31 wide": ("png", lambda: png(width=2**31 - 1, height=1), "does not decode"),
    "text of 256 MiB": ("png", lambda: png(chunk(b"zTXt", b"x\0\0" + zeros(2**28))), TOO_LARGE),
    "text behind the pixels": ("png", lambda: png(behind=chunk(b"zTXt", b"x\0\0" + zeros(2**28))), TOO_LARGE),
    "many texts": ("png", lambda: png(chunk(b"zTXt", b"x\0\0" + zeros(2**20)) * 2000), "does not decode"),
    "international text": ("png", lambda: png(chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(2**28))), "does not decode"),
    "profile of 256 MiB": ("png", lambda: png(chunk(b"iCCP", b"x\0\0" + zeros(2**28))), "does not decode"),
    "pixels without end": ("png", lambda: png(behind=chunk(b"IDAT", zeros(2**28))), ""),
    "GIF of 500 pictures": ("gif", lambda: frames("GIF", 500), ""),
    "GIF of 400 large pictures": ("gif", lambda: many_frames(400), ""),
    "WEBP of 500 pictures": ("webp", lambda: frames("WEBP", 500), ""),
    "PNG of 500 pictures": ("png", lambda: frames("PNG", 500), ""),
    "large frame of GIF": ("gif", large_gif_frame, "does not decode"),
    "JPEG of 100,000 scans": ("jpg", lambda: many_scans(100_000), "a JPEG of 100,006 scans, more than 100"),
    "17 MiB": ("jpg", lambda: encoded("JPEG") + bytes(17 * 2**20), "more than a picture may have (16,777,216)"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_no_more_than_a_picture(kind: str, tmp_path: Path) -> None:
    ending, make, problem = BOMBS[kind]
    (tmp_path / "happy").mkdir()
    (tmp_path / "happy" / f"1.{ending}").write_bytes(make())
    read_within("faces", tmp_path, problem, max_mib=160)


def test_a_photo_has_larger_bounds(tmp_path: Path) -> None:
    """A photo of the largest size is read; what `decode_photo` shares with `decode` refuses the rest."""
    (tmp_path / "1.png").write_bytes(encoded("PNG", Image.new("L", (8192, 6144)), compress_level=1))
    read_within("photo", tmp_path / "1.png", "", max_mib=320)
    files: dict[str, tuple[Callable[[], bytes], str]] = {
        "2.png": (lambda: png(width=8193, height=6144), "8193x6144 pixels, over 50,331,648"),
        "3.png": BOMBS["text of 256 MiB"][1:],
        "4.gif": BOMBS["GIF of 400 large pictures"][1:],
        "5.jpg": BOMBS["JPEG of 100,000 scans"][1:],
        "6.jpg": (lambda: bytes(65 * 2**20), "more than a picture may have (67,108,864)"),
    }
    for name, (make, problem) in files.items():
        (tmp_path / name).write_bytes(make())
        read_within("photo", tmp_path / name, problem, max_mib=320)


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_picture_is_refused(form: str) -> None:
    """At each sixteenth, however much could be shown of it."""
    raw = encoded(form)
    assert decode(raw, 48, f"x.{FORMATS[form]}").std() > 0
    for sixteenth in range(16):
        with pytest.raises(UserError, match=r"does not decode|no picture of the formats"):
            decode(raw[: len(raw) * sixteenth // 16], 48, f"x.{FORMATS[form]}")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_must_have_the_format_of_its_name(form: str) -> None:
    raw = encoded(form)
    for ending, said in FORMAT_OF.items():
        name = f"train/happy/x{ending.upper() if form == 'PNG' else ending}"
        if said == form:
            assert decode(raw, 48, name).shape == (48, 48)
        else:
            with pytest.raises(UserError, match=f"its name says {said}, but it holds {form}: rename it"):
                decode(raw, 48, name)
    assert decode(raw, 48, "train.parquet row 1").shape == (48, 48), "rows have no such names"


def test_a_jpeg_of_several_pictures_is_read() -> None:
    """Some phones write them."""
    raw = encoded("MPO", save_all=True, append_images=[grey(48)])
    with Image.open(io.BytesIO(raw)) as picture:
        assert picture.format == "MPO"
    assert decode(raw, 48, "x.jpg").std() > 0


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_picture_of_an_animation_is_read(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    raw = encoded(form, grey(48, 50), save_all=True, append_images=[grey(48, 100), grey(48, 200)], **options)
    with Image.open(io.BytesIO(raw)) as picture:
        assert getattr(picture, "n_frames", 1) == 3
    assert decode(raw, 48, f"x.{FORMATS[form]}").tolist() == [[50] * 48] * 48


def test_a_jpeg_of_90_scans_is_read() -> None:
    """The bound leaves room for honest ones; without it a file of the largest size could have half a million."""
    assert decode(many_scans(90, 512), 48, "x.jpg").shape == (48, 48)
    assert MAX_PICTURE_BYTES // 33 > 500_000


def test_a_wrong_name_is_one_bad_picture(tmp_path: Path) -> None:
    """In folders and archives, where pictures have names; the rows of a parquet file only have paths in them."""
    files = {"happy/1.jpg": encoded("JPEG"), "happy/2.jpg": encoded("PNG")}
    (tmp_path / "faces.zip").write_bytes(zipped(files))
    (tmp_path / "faces" / "happy").mkdir(parents=True)
    for name, raw in files.items():
        (tmp_path / "faces" / name).write_bytes(raw)
    options: dict[str, Any] = {"size": 48, "labels": LabelSet(), "ferplus": None}
    for path in (tmp_path / "faces", tmp_path / "faces.zip"):
        with pytest.raises(UserError, match=r"2\.jpg'?: its name says JPEG, but it holds PNG: rename it") as caught:
            read_faces(path, on_error="stop", **options)
        assert "--data.on_error skip" in caught.value.fix
        assert len(read_faces(path, on_error="skip", **options)) == 1
    images = [{"path": name, "bytes": raw} for name, raw in files.items()]
    parquet.write_table(pa.table({"image": images, "label": [3, 3]}), tmp_path / "x.parquet")
    assert len(read_faces(tmp_path / "x.parquet", on_error="stop", **options)) == 2
