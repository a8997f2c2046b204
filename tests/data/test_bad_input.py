"""Every kind of bad input is a UserError that names the file and the row or member."""

import re
import struct
import tracemalloc
import zipfile
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fer_dist.data import pictures
from fer_dist.data.faces import Faces
from fer_dist.data.readers import read_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from tests.helpers.picture_files import encoded, plain, write_folder, write_zip

PIXELS = " ".join(str(i % 256) for i in range(2304))
GOOD = f"3,{PIXELS},Training"
TWO = {"happy/1.png": plain(), "happy/2.png": plain()}


def read(path: Path, on_error: Literal["stop", "skip"] = "stop", ferplus: Path | None = None) -> Faces:
    return read_faces(path, size=48, labels=LabelSet(), on_error=on_error, ferplus=ferplus)


def refused(path: Path, *words: str, on_error: Literal["stop", "skip"] = "stop", ferplus: Path | None = None) -> None:
    """Reading fails with exactly a UserError that says all of these and what to do."""
    with pytest.raises(UserError) as caught:
        read(path, on_error, ferplus)
    assert type(caught.value) is UserError
    for word in words:
        assert word in caught.value.problem
    assert caught.value.fix
    assert not re.search("0x[0-9a-f]{6}", caught.value.problem), "an address in memory means nothing to anybody"


def csv(tmp_path: Path, *rows: str, header: str = "emotion,pixels,Usage") -> Path:
    path = tmp_path / "fer2013.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


BAD_ROWS = {
    "one pixel less": (f"3,{PIXELS[:-4]},Training", "2,303 pixels, expected 2,304"),
    "above 255": (f"3,256 {PIXELS[2:]},Training", "pixel value '256'"),
    "huge": (f"3,{'9' * 5000} {PIXELS[2:]},Training", "pixel value '9999"),
    "below 0": (f"3,-1 {PIXELS[2:]},Training", "pixel value '-1'"),
    "not whole": (f"3,0.5 {PIXELS[2:]},Training", "pixel value '0.5'"),
    "label 7": (f"7,{PIXELS},Training", "unknown class '7'"),
    "huge label": (f"{'1' * 5000},{PIXELS},Training", "unknown class '111"),
    "no label": (f",{PIXELS},Training", "unknown class ''"),
    "unknown Usage": (f"3,{PIXELS},Trainin", "unknown Usage 'Trainin', expected Training, PublicTest or PrivateTest"),
    "short row": (f"3,{PIXELS}", "2 fields, expected 3"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_stops_or_is_skipped(tmp_path: Path, kind: str) -> None:
    row, problem = BAD_ROWS[kind]
    path = csv(tmp_path, GOOD, row, GOOD)
    refused(path, str(path), "row 2 (line 3)", problem)
    faces = read(path, "skip")
    assert list(faces.names) == ["row 1", "row 3"]
    assert any("skipped 1 bad" in note and "row 2" in note and problem in note for note in faces.notes)


def test_a_damaged_csv_or_path_is_refused_also_with_skip(tmp_path: Path) -> None:
    refused(tmp_path / "none.csv", "none.csv", "does not exist")
    refused(tmp_path, str(tmp_path), "holds no picture")
    write_folder(tmp_path / "tree", {"happy/0.png": plain()})
    (tmp_path / "tree" / "happy" / "1.png").symlink_to("nowhere.png")
    refused(tmp_path / "tree", "1.png", "cannot be read")
    refused(csv(tmp_path, "1,2", header="emotion,Usage"), "fer2013.csv", "no column 'pixels'", on_error="skip")
    refused(csv(tmp_path, PIXELS, header="pixels"), "fer2013.csv", "no column 'emotion'", on_error="skip")
    refused(csv(tmp_path, "3," + "1" * 200_000), "line 2", "more than 65,536 characters", on_error="skip")
    refused(csv(tmp_path), "fer2013.csv", "holds no picture", on_error="skip")
    refused(csv(tmp_path, "9,1,x", "9,1,x"), "holds no picture", "2 bad ones", "row 1", on_error="skip")
    for name, raw, words in (
        ("fer2013.csv", b"", ("no column", "an empty file")),
        ("fer2013.csv", bytes(range(256)), ("fer2013.csv",)),
        ("faces.npz", b"x", ("faces.npz", "no known form")),
    ):
        (tmp_path / name).write_bytes(raw)
        refused(tmp_path / name, *words, on_error="skip")


def test_skipped_ones_are_counted_and_ten_named(tmp_path: Path) -> None:
    notes = read(csv(tmp_path, GOOD, *[f"7,{PIXELS},Training"] * 13), "skip").notes
    assert "skipped 13 bad pictures or rows" in notes[-1]
    assert "row 11 " in notes[-1]
    assert "row 12 " not in notes[-1]
    assert "3 more" in notes[-1]


WRONG_TREES = {
    "train/glad/a.png": "unknown class folder 'glad'",
    "train/a.png": "unknown class folder 'train'",
    "a.png": "lies in no class folder",
    "other/happy/a.png": "instead of 'other'",
    "train/test/happy/a.png": "instead of 'train/test'",
}


@pytest.mark.parametrize("name", WRONG_TREES)
def test_an_unknown_folder_stops_also_with_skip(tmp_path: Path, name: str) -> None:
    files = {"train/happy/1.png": b"not looked at", name: plain()}
    refused(write_folder(tmp_path / "tree", files), "tree", name, WRONG_TREES[name], on_error="skip")
    refused(write_zip(tmp_path / "a.zip", files), "a.zip", name, WRONG_TREES[name], on_error="skip")


BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no picture of the formats JPEG"),
    "text": (b"hello", "no picture of the formats JPEG"),
    "other format": (plain(form="TIFF"), "no picture of the formats JPEG"),
    "cut JPEG": (plain(form="JPEG")[:-20], "does not decode"),
    "cut PNG": (plain()[:-30], "does not decode"),
    "large enough for a warning of Pillow": (encoded(Image.new("1", (12_000, 12_000))), "12000x12000 pixels"),
    "17 MiB": (plain() + b"\0" * 17 * 2**20, "more than a picture may have"),
}
FORMS = [*product(BAD_PICTURES, ["folder"]), *product(["cut JPEG", "17 MiB"], ["zip", "parquet"])]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_bad_picture_stops_or_is_skipped(tmp_path: Path, kind: str, form: str) -> None:
    raw, problem = BAD_PICTURES[kind]
    where = "2.jpg" if raw.startswith(b"\xff\xd8") else "2.png"
    files = {"train/happy/1.png": plain(), f"train/happy/{where}": raw, "train/sad/3.png": plain()}
    if form == "zip":
        root = write_zip(tmp_path / "archive.zip", files)
    elif form == "parquet":
        root, where = tmp_path / "train.parquet", "row 2"
        parquet.write_table(pa.table({"image": list(files.values()), "label": ["happy", "happy", "sad"]}), root)
    else:
        root = write_folder(tmp_path / "tree", files)
    refused(root, str(root), where, problem)
    faces = read(root, "skip")
    assert faces.labels_N.tolist() == [3, 4]
    assert any("skipped 1 bad" in note and where in note for note in faces.notes)


def test_a_damaged_zip_is_refused_and_a_damaged_member_is_one_bad_picture(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "archive.zip", TWO, zipfile.ZIP_STORED)
    whole = path.read_bytes()
    for count in (len(whole) - 1, len(whole) // 2, 0):
        path.write_bytes(whole[:count])
        refused(path, "archive.zip", "truncated", on_error="skip")
    damaged = bytearray(whole)
    damaged[damaged.index(b"IDAT") + 6] ^= 1
    path.write_bytes(damaged)
    refused(path, "archive.zip, member 'happy/1.png'", "is damaged")
    assert list(read(path, "skip").names) == ["happy/2.png"]


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "happy/../../evil.png", "C:/x.png", "..\\evil.png"])
def test_a_member_that_escapes_is_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "archive.zip", TWO | {name: plain()})
    refused(path, "archive.zip", repr(name), "points outside", on_error="skip")


@pytest.mark.parametrize("name", ["happy/1.png", "fer2013.csv"])
def test_member_that_lies_about_its_size_is_not_inflated(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "archive.zip", {name: b"\0" * 64 * 2**20})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<I", 64 * 2**20), struct.pack("<I", 1000)))
    tracemalloc.start()
    refused(path, "archive.zip", name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_bombs_rare_methods_and_encryption_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "archive.zip", TWO, zipfile.ZIP_BZIP2)
    refused(path, "member 'happy/1.png'", "packed by method 12", on_error="skip")
    raw = bytearray(write_zip(path, TWO).read_bytes())
    raw[raw.index(b"PK\1\2") + 8] |= 1  # of the first alone: the archive is refused, not the member skipped
    path.write_bytes(raw)
    refused(path, "member 'happy/1.png'", "is encrypted", on_error="skip")
    monkeypatch.setattr(pictures, "FREE_BYTES", 2**20)
    write_zip(path, {f"happy/{i}.bmp": b"\0" * 2**20 for i in range(8)})
    refused(path, "archive.zip", "would inflate to 8,388,608 bytes", on_error="skip")


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    refused(path, "train.parquet", "no readable parquet", on_error="skip")
    tables: list[tuple[dict[str, list[Any]], str]] = [
        ({"image": [plain()]}, ": no column 'label'"),
        ({"image": [plain()] * 2, "label": [1, 7]}, " row 2: unknown class '7'"),
        ({"image": [{"bytes": None, "path": "x.png"}], "label": [1]}, " row 1: no picture"),
        ({"image": [plain()], "label": [1], "split": ["dev"]}, " row 1: unknown Usage 'dev'"),
    ]
    for table, problem in tables:
        parquet.write_table(pa.table(table), path)
        refused(path, f"train.parquet{problem}")


VOTES = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"


def test_bad_ferplus(tmp_path: Path) -> None:
    source, votes = csv(tmp_path, GOOD, GOOD), tmp_path / "votes.csv"
    refused(source, "votes.csv", "does not exist", ferplus=votes)
    first = "Training,x,1,0,0,0,0,0,0,0,0,0"
    for lines, words in (
        ((VOTES, first), ("votes.csv", "has 1 rows, expected 2")),
        (("Usage,neutral", "Training,1"), ("votes.csv", "no column 'angry'")),
        ((VOTES, first, first.replace("Training", "PublicTest")), ("votes.csv, row 2", "val")),
        ((VOTES, first, first.replace("1", "-1")), ("votes.csv, row 2", "expected whole numbers")),
    ):
        votes.write_text("\n".join(lines) + "\n")
        refused(source, *words, ferplus=votes)
    path = write_zip(tmp_path / "archive.zip", {"happy/1.png": plain()})
    refused(path, "--data.ferplus", "archive.zip", ferplus=votes)
