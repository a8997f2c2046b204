"""Tables from strangers: endless rows, and parquet files that are small until they are read."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from pyarrow import parquet

from fer_dist.config import load_config
from fer_dist.data import gathering, tables
from fer_dist.data.readers import read_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from tests.faults.test_hostile_pictures import encoded
from tests.helpers.malicious_pickles import Calls
from tests.helpers.memory_meter import Meter

PIXELS = " ".join(["7"] * 2304)
ROW_BOUND = "a row of more than 65,536 characters"
MOST_BYTES = 48 * 2**20


def read(path: Path, on_error: Literal["stop", "skip"] = "stop", ferplus: Path | None = None) -> int:
    return len(read_faces(path, size=48, labels=LabelSet(), on_error=on_error, ferplus=ferplus))


# -- CSV


def sparse(path: Path, size: int) -> None:
    """A file of zeros that takes no room on the disk, and has no end of a line."""
    with path.open("wb") as file:
        file.truncate(size)


ROWS: dict[str, bytes] = {
    "10 million characters": b"7" * 10**7,
    "5 million fields": b"3," * 5 * 10**6,
    "10 million quotes": b'"' * 10**7,
    "over a million lines": b'3,"' + b"7\n" * 10**6,
    "one field in each of a million lines": b'3,"7\n' + b'","\n' * 10**6,
    "of letters beyond ASCII": "ä".encode() * 10**6,
    "of bytes that are none": b"\xff" * 10**7,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_a_row_has_a_bound(kind: str, zipped: bool, tmp_path: Path, meter: Meter) -> None:
    content = f"emotion,pixels\n3,{PIXELS}\n".encode() + ROWS[kind] + f"\n3,{PIXELS}\n".encode()
    path = tmp_path / "fer2013.csv"
    path.write_bytes(content)
    if zipped:
        path = tmp_path / "archive.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("fer2013.csv", content)
    answer = meter.ask("faces", path)
    assert answer.error == "UserError"
    assert f"line {answer.problem.split('line ')[1].split(':')[0]}: {ROW_BOUND}" in answer.problem
    assert answer.grown < MOST_BYTES
    assert answer.seconds < 5


def test_a_file_without_an_end_of_line(tmp_path: Path, meter: Meter) -> None:
    """Two gigabytes, and the header itself is endless; then the same behind a good header."""
    sparse(tmp_path / "fer2013.csv", 2 * 2**30)
    answer = meter.ask("faces", tmp_path / "fer2013.csv")
    assert f"line 1: {ROW_BOUND}" in answer.problem
    assert answer.grown < MOST_BYTES
    with (tmp_path / "fer2013.csv").open("r+b") as file:
        file.write(f"emotion,pixels\n3,{PIXELS}\n".encode())
    answer = meter.ask("faces", tmp_path / "fer2013.csv")
    assert f"line 3: {ROW_BOUND}" in answer.problem
    assert answer.grown < MOST_BYTES
    assert answer.seconds < 5


def test_votes_have_the_same_bound(tmp_path: Path) -> None:
    (tmp_path / "fer2013.csv").write_text(f"emotion,pixels\n3,{PIXELS}\n")
    (tmp_path / "votes.csv").write_bytes(b"1," * 10**6)
    with pytest.raises(UserError, match=f"votes.csv, line 1: {ROW_BOUND}"):
        read(tmp_path / "fer2013.csv", ferplus=tmp_path / "votes.csv")


def test_the_longest_honest_row(tmp_path: Path) -> None:
    """Three-digit pixels and every comma quoted, then a row of exactly the bound."""
    row = f'"3","{" ".join(["255"] * 2304)}"\n'
    assert len(row) < tables.MAX_ROW_CHARS / 7
    (tmp_path / "fer2013.csv").write_text("emotion,pixels\n" + row + row.replace(" ", "  " * 10))
    assert read(tmp_path / "fer2013.csv") == 2


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_rows_are_counted(tmp_path: Path, on_error: Literal["stop", "skip"], monkeypatch: pytest.MonkeyPatch) -> None:
    """Good ones, bad ones and blank ones; the bound is 500,000, here 50."""
    assert gathering.MAX_PICTURES == 500_000
    for module in (tables, gathering):
        monkeypatch.setattr(module, "MAX_PICTURES", 50)
    path = tmp_path / "fer2013.csv"
    path.write_text("emotion,pixels\n" + f"3,{PIXELS}\n" * 50)
    assert read(path, on_error=on_error) == 50
    for row in (f"3,{PIXELS}\n", "\n", *(["9,9\n"] if on_error == "skip" else [])):
        path.write_text("emotion,pixels\n" + row * 1000)
        with pytest.raises(UserError, match="has more than 50 rows"):
            read(path, on_error=on_error)


def test_pictures_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MAX_PICTURES", 3)
    parquet.write_table(pa.table({"image": [encoded("PNG")] * 4, "label": [3] * 4}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"row 4: more than 3 pictures or rows"):
        read(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"image": [encoded("PNG")] * 4, "label": [9] * 4}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"row 4: more than 3 pictures or rows"):
        read(tmp_path / "x.parquet", on_error="skip")


def test_bad_rows_take_no_memory(tmp_path: Path) -> None:
    """Ten are named, the others counted."""
    path = tmp_path / "fer2013.csv"
    path.write_text(f"emotion,pixels\n3,{PIXELS}\n" + "9,9\n" * 2000)
    faces = read_faces(path, size=48, labels=LabelSet(), on_error="skip", ferplus=None)
    assert "skipped 2,000 bad" in faces.notes[-1]
    assert "and 1,990 more" in faces.notes[-1]
    assert len(faces.notes[-1]) < 5000


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("fer2013.csv", "faces.zip", "train.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="neither a file nor a folder"):
            read(tmp_path / name)


# -- parquet: thrift's compact protocol by hand, for footers that pyarrow would not write


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def whole(step: int, value: int, kind: int = 5) -> bytes:
    """A whole number, `step` fields behind the one before."""
    return bytes([step << 4 | kind]) + varint(value << 1)


def name(step: int, value: bytes) -> bytes:
    return bytes([step << 4 | 8]) + varint(len(value)) + value


def footer(schema: list[bytes]) -> bytes:
    """A parquet file that is nothing but its schema."""
    elements = b"\x29\xfc" + varint(len(schema)) + b"".join(schema)
    told = whole(1, 2) + elements + whole(1, 0, 6) + b"\x19\x0c\0"
    return b"PAR1" + told + struct.pack("<L", len(told)) + b"PAR1"


def deep(levels: int) -> bytes:
    inner = whole(3, 1) + name(1, b"image") + whole(1, 1) + b"\0"
    leaf = whole(1, 6) + whole(2, 1) + name(1, b"x") + b"\0"
    return footer([name(4, b"schema") + whole(1, 1) + b"\0", *[inner] * levels, leaf])


def wide(columns: int) -> bytes:
    leaves = [whole(1, 6) + whole(2, 1) + name(1, b"c%d" % i) + b"\0" for i in range(columns)]
    return footer([name(4, b"schema") + whole(1, columns) + b"\0", *leaves])


def packed(image: Any, rows: int, **options: Any) -> bytes:
    """A parquet file of one picture many times over, as small as zstd makes it."""
    out = pa.BufferOutputStream()
    labels = pa.array(["happy"] * rows)
    settings = {
        "compression": "zstd",
        "store_schema": False,
        "dictionary_pagesize_limit": 2**30,
        "write_statistics": False,
    } | options
    parquet.write_table(pa.table({"image": image, "label": labels}), out, **settings)
    raw: bytes = out.getvalue().to_pybytes()
    return raw


PICTURE = encoded("PNG") + bytes(15 * 2**20)


def one_often(rows: int) -> bytes:
    """A picture of 15 MiB that the file holds once, in a kilobyte, and refers to from each row."""
    return packed(pa.array([PICTURE] * rows, pa.binary()), rows)


def in_struct(rows: int) -> bytes:
    pictures = pa.array([PICTURE] * rows, pa.binary())
    return packed(pa.StructArray.from_arrays([pictures, pa.array(["x.png"] * rows)], ["bytes", "path"]), rows)


def large_page(size: int) -> bytes:
    """One page that unpacks to `size` bytes."""
    return packed(pa.array([bytes(2**20)] * (size // 2**20), pa.binary()), size // 2**20, use_dictionary=False)


def lying_page(size: int) -> bytes:
    """The same, but its footer says that it unpacks to 100 bytes."""
    raw = large_page(size)
    told = parquet.ParquetFile(pa.BufferReader(raw)).metadata.row_group(0)
    for said in (told.column(0).total_uncompressed_size, told.total_byte_size):
        true = varint(said << 1)
        raw = raw.replace(true, bytes([0xC8] + [0x80] * (len(true) - 2) + [0]))
    assert parquet.ParquetFile(pa.BufferReader(raw)).metadata.row_group(0).column(0).total_uncompressed_size < 10**4
    return raw


TABLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "one picture in 40 rows": (lambda: one_often(40), "40"),
    "one picture in 40 rows, in a struct": (lambda: in_struct(40), "40"),
    "a page of 512 MiB": (lambda: large_page(2**29), "unpacks to 536,87"),
    "a page of 512 MiB whose footer lies": (lambda: lying_page(2**29), "unpacks to 536,87"),
    "schema 100,000 deep": (lambda: deep(100_000), "no readable parquet file of at most 10,000 columns"),
    "schema 9,000 deep": (lambda: deep(9_000), "no readable parquet file"),
    "schema of 900,000 columns": (lambda: wide(900_000), "no readable parquet file of at most 10,000 columns"),
    "lists of pictures": (lambda: packed(pa.array([[PICTURE]]), 1), "the column 'image' holds list<"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_parquet_file_stays_small(kind: str, tmp_path: Path, meter: Meter) -> None:
    make, problem = TABLES[kind]
    path = tmp_path / "train.parquet"
    path.write_bytes(make())
    answer = meter.ask("faces", path)
    assert answer.error == ("" if problem.isdecimal() else "UserError"), answer
    assert problem in answer.problem
    assert answer.grown < 512 * 2**20, "a row group of 256 MiB, and rows of it that are as large again"
    assert answer.seconds < 10


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_parquet_file_that_is_cut_or_changed(cut: int, tmp_path: Path) -> None:
    raw = bytearray(packed(pa.array([encoded("PNG")] * 3, pa.binary()), 3))
    path = tmp_path / "train.parquet"
    path.write_bytes(raw[: len(raw) * cut // 16])
    with pytest.raises(UserError):
        read(path)
    raw[4 + cut] ^= 0xFF  # in the head of the first page
    path.write_bytes(raw)
    with pytest.raises(UserError):
        read(path)


def test_a_pickle_in_a_schema_does_not_run(tmp_path: Path) -> None:
    """pyarrow once made extension types from pickles in a file (CVE-2023-47248)."""
    trace = tmp_path / "trace"
    attack = pickle.dumps(Calls(os.mkdir, str(trace)))
    hidden = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": attack}
    schema = pa.schema([pa.field("image", pa.binary(), metadata=hidden), pa.field("label", pa.string())])
    parquet.write_table(pa.table([[encoded("PNG")], ["happy"]], schema=schema), tmp_path / "train.parquet")
    assert read(tmp_path / "train.parquet") == 1
    assert not trace.exists()
    pickle.loads(attack)
    assert trace.exists()


def test_names_of_classes_are_bounded(tmp_path: Path) -> None:
    for names in ("[" * 100_000, "[" * 900 + "]" * 900, '"happy"', "[1, null]"):
        told = {b"huggingface": b'{"info": {"features": {"label": {"names": ' + names.encode() + b"}}}}"}
        table = pa.table({"image": [encoded("PNG")], "label": [3]}).replace_schema_metadata(told)
        parquet.write_table(table, tmp_path / "train.parquet")
        try:
            assert read(tmp_path / "train.parquet") == 1
        except UserError as error:
            assert "train.parquet row 1" in error.problem  # noqa: PT017


# -- settings


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    """`--config FILE` and the config.yaml of a run folder."""
    trace = tmp_path / "trace"
    for attack in (
        f"!!python/object/apply:os.mkdir ['{trace}']",
        f"!!python/object/new:os.mkdir ['{trace}']",
        "!!python/name:os.system",
        json.dumps({"seed": f"!!python/object/apply:os.mkdir ['{trace}']"}),
    ):
        (tmp_path / "config.yaml").write_text(f"seed: {attack}\n")
        with pytest.raises(UserError):
            load_config(str(tmp_path / "config.yaml"))
        assert not trace.exists()
