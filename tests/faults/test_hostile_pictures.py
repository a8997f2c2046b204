"""Pictures from strangers: bombs, animations without end, cut ones, and ones under a wrong name."""

import io
import struct
import time
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
from tests.data.test_bad_input import chunk
from tests.helpers.malicious_pickles import zipped
from tests.helpers.memory_meter import Meter

FORMATS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "GIF": "gif"}
NOISE = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)


def encoded(form: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (picture or Image.fromarray(NOISE)).save(out, form, **options)
    return out.getvalue()


def png(*chunks: bytes, width: int = 48, height: int = 48, behind: bytes = b"") -> bytes:
    """A PNG with chunks before its pixels, and behind them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(48)) * 48))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + behind + chunk(b"IEND", b"")


@cache
def zeros(size: int) -> bytes:
    """That many zeros, packed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size // 2**20)) + packer.flush()


def frames(form: str, count: int, side: int = 48) -> bytes:
    """An animation; no picture of it is like the one before."""
    levels = (83 * i % 251 for i in range(count))
    first, *others = (Image.new("L", (side, side), level) for level in levels)
    return encoded(form, first, save_all=True, append_images=others, duration=20)


def many_frames(count: int) -> bytes:
    """A GIF of full size, its one frame written many times over."""
    raw = encoded("GIF", Image.new("L", (4000, 4000), 7))
    head = raw.index(b"\x2c")
    return raw[:head] + raw[head:-1] * count + b";"


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 4096 x 4096 whose last pass, of 33 bytes, is made again and again."""
    raw = encoded("JPEG", Image.new("L", (4096, 4096), 128), progressive=True, quality=50)
    last = raw[raw.rindex(b"\xff\xda") : -2]
    return raw[:-2] + last * count + raw[-2:]


def large_webp() -> bytes:
    """A canvas of 16,384 x 16,384 with a small picture in it, as an animation."""
    raw = bytearray(frames("WEBP", 2))
    place = raw.index(b"VP8X") + 12
    raw[place : place + 6] = b"\xff\x3f\x00\xff\x3f\x00"
    return bytes(raw)


def large_gif_frame() -> bytes:
    """A screen of 48 x 48 and a frame of 60,000 x 60,000."""
    raw = bytearray(encoded("GIF"))
    place = raw.index(b"\x2c", 13 + 3 * 256) + 5
    raw[place : place + 4] = struct.pack("<HH", 60_000, 60_000)
    return bytes(raw)


# Name: ending, file, and what is said. None: it is read, within bounds.
BOMBS: dict[str, tuple[str, Callable[[], bytes], str | None]] = {
    "60,000 x 60,000": ("png", lambda: png(width=60_000, height=60_000), "does not decode"),
    "4,097 x 4,096": ("png", lambda: png(width=4097, height=4096), "4097x4096 pixels, over 16,777,216"),
    "2**31 wide": ("png", lambda: png(width=2**31 - 1, height=1), "does not decode"),
    "text of 256 MiB": ("png", lambda: png(chunk(b"zTXt", b"x\0\0" + zeros(2**28))), "Decompressed data too large"),
    "text behind the pixels": (
        "png",
        lambda: png(behind=chunk(b"zTXt", b"x\0\0" + zeros(2**28))),
        "Decompressed data too large",
    ),
    "many texts": (
        "png",
        lambda: png(chunk(b"zTXt", b"x\0\0" + zeros(2**20)) * 2000),
        "does not decode",
    ),
    "international text": (
        "png",
        lambda: png(chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(2**28))),
        "does not decode",
    ),
    "profile of 256 MiB": ("png", lambda: png(chunk(b"iCCP", b"x\0\0" + zeros(2**28))), "does not decode"),
    "pixels that go on": ("png", lambda: png(behind=chunk(b"IDAT", zeros(2**28))), None),
    "GIF of 5,000 pictures": ("gif", lambda: frames("GIF", 5000), None),
    "GIF of 400 large pictures": ("gif", lambda: many_frames(400), None),
    "WEBP of 500 pictures": ("webp", lambda: frames("WEBP", 500), None),
    "PNG of 2,000 pictures": ("png", lambda: frames("PNG", 2000), None),
    "large canvas of WEBP": ("webp", large_webp, "does not decode"),
    "large frame of GIF": ("gif", large_gif_frame, "does not decode"),
    "JPEG of 100,000 scans": ("jpg", lambda: many_scans(100_000), "a JPEG of 100,006 scans, more than 100"),
    "17 MiB": ("jpg", lambda: encoded("JPEG") + bytes(17 * 2**20), "more than a picture may have (16,777,216)"),
}


@pytest.fixture(scope="module")
def usual(meter: Meter, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The memory that a picture of the largest size takes."""
    folder = tmp_path_factory.mktemp("usual") / "happy"
    folder.mkdir()
    (folder / "1.png").write_bytes(encoded("PNG", Image.new("L", (4096, 4096), 7)))
    answer = meter.ask("faces", folder.parent)
    assert answer.problem == "1"
    return answer.grown


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_no_more_than_a_picture(kind: str, tmp_path: Path, meter: Meter, usual: int) -> None:
    ending, make, problem = BOMBS[kind]
    (tmp_path / "happy").mkdir()
    path = tmp_path / "happy" / f"1.{ending}"
    path.write_bytes(make())
    answer = meter.ask("faces", tmp_path)
    assert answer.error == ("UserError" if problem else ""), answer
    assert (problem or "") in answer.problem
    assert answer.grown - usual < 96 * 2**20, f"{answer.grown / 2**20:.0f} MiB against {usual / 2**20:.0f}"
    assert answer.seconds < 5


PHOTO_PROBLEM = {"4,097 x 4,096": "does not decode", "17 MiB": None}  # photos have other bounds; its pixels are few


@pytest.fixture(scope="module")
def usual_photo(meter: Meter, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The memory that a photo of the largest size takes, with transparency."""
    path = tmp_path_factory.mktemp("usual") / "1.png"
    path.write_bytes(encoded("PNG", Image.new("RGBA", (8192, 6144), (7, 7, 7, 9)), compress_level=1))
    answer = meter.ask("photo", path)
    assert answer.problem == "(1536, 2048, 3)", answer
    return answer.grown


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_no_more_than_a_photo(kind: str, tmp_path: Path, meter: Meter, usual_photo: int) -> None:
    ending, make, problem = BOMBS[kind]
    problem = PHOTO_PROBLEM.get(kind, problem)
    path = tmp_path / f"1.{ending}"
    path.write_bytes(make())
    answer = meter.ask("photo", path)
    assert answer.error == ("UserError" if problem else ""), answer
    assert (problem or "") in answer.problem
    assert answer.grown < usual_photo, f"{answer.grown / 2**20:.0f} MiB against {usual_photo / 2**20:.0f}"
    assert answer.seconds < 5


@pytest.mark.parametrize("form", FORMATS)
def test_a_cut_picture_is_refused(form: str) -> None:
    """At each sixteenth, however much could be shown of it."""
    raw = encoded(form)
    assert decode(raw, 48, f"x.{FORMATS[form]}").std() > 0
    for sixteenth in range(16):
        with pytest.raises(UserError, match=r"does not decode|no picture of the formats"):
            decode(raw[: len(raw) * sixteenth // 16], 48, f"x.{FORMATS[form]}")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_is_what_its_name_says(form: str) -> None:
    raw = encoded(form)
    for ending, said in FORMAT_OF.items():
        name = f"train/happy/x{ending.upper() if form == 'PNG' else ending}"
        if said == form:
            assert decode(raw, 48, name).shape == (48, 48)
        else:
            with pytest.raises(UserError, match=f"its name says {said}, but it holds {form}: rename it"):
                decode(raw, 48, name)
    assert decode(raw, 48, "train.parquet row 1").shape == (48, 48), "rows have no such names"


def test_phones_put_several_pictures_into_a_jpeg() -> None:
    raw = encoded("MPO", save_all=True, append_images=[Image.new("L", (48, 48))])
    with Image.open(io.BytesIO(raw)) as picture:
        assert picture.format == "MPO"
    assert decode(raw, 48, "x.jpg").std() > 0


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    others = [Image.new("L", (48, 48), level) for level in (100, 200)]
    raw = encoded(form, Image.new("L", (48, 48), 50), save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(raw)) as picture:
        assert getattr(picture, "n_frames", 1) == 3
    assert decode(raw, 48, f"x.{FORMATS[form]}").tolist() == [[50] * 48] * 48


def test_scans_cost_time() -> None:
    """Why their number is bounded: 33 bytes take as long as the whole picture."""
    raw = many_scans(90)
    start = time.monotonic()
    assert decode(raw, 48, "x.jpg").shape == (48, 48)
    assert time.monotonic() - start < 5
    assert MAX_PICTURE_BYTES // 33 > 500_000


@pytest.mark.parametrize("form", ["folder", "zip", "parquet"])
def test_a_wrong_name_is_one_bad_picture(form: str, tmp_path: Path) -> None:
    """In folders and archives, where pictures have names; the rows of a parquet file only have paths in them."""
    files = {"happy/1.jpg": encoded("JPEG"), "happy/2.jpg": encoded("PNG")}
    path = tmp_path / "faces"
    if form == "zip":
        path = path.with_suffix(".zip")
        path.write_bytes(zipped(files))
    elif form == "parquet":
        path = path.with_suffix(".parquet")
        images = [{"path": name, "bytes": raw} for name, raw in files.items()]
        parquet.write_table(pa.table({"image": images, "label": [3, 3]}), path)
    else:
        for name, raw in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(raw)
    options: dict[str, Any] = {"size": 48, "labels": LabelSet(), "ferplus": None}
    if form == "parquet":
        assert len(read_faces(path, on_error="stop", **options)) == 2
        return
    with pytest.raises(UserError, match=r"2\.jpg'?: its name says JPEG, but it holds PNG: rename it") as caught:
        read_faces(path, on_error="stop", **options)
    assert "--data.on_error skip" in caught.value.fix
    assert len(read_faces(path, on_error="skip", **options)) == 1
