"""Untrusted tables: endless rows, and parquet files that are small until they are read."""

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from pyarrow import parquet

from fer_dist.data import gathering, tables
from fer_dist.errors import UserError
from tests.helpers.memory_meter import read_set, read_within
from tests.helpers.picture_files import plain, write_zip

ROW = "3," + " ".join(["7"] * 2304) + "\n"
HEADER = "emotion,pixels\n"
TOO_LONG = "a row of more than 65,536 characters"

# -- CSV

ROWS: dict[str, bytes] = {
    "characters in a zip": b"7" * 10**7,
    "lines": b'3,"' + b"7\n" * 10**6,
    "invalid bytes": b"\xff" * 10**7,
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_has_a_bound(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "fer2013.csv"
    path.write_bytes((HEADER + ROW).encode() + ROWS[kind] + f"\n{ROW}".encode())
    if kind.endswith("zip"):
        path = write_zip(tmp_path / "archive.zip", {"fer2013.csv": path.read_bytes()}, zipfile.ZIP_STORED)
    read_within("faces", path, f": {TOO_LONG}", max_mib=48)


def test_a_file_without_an_end_of_line_is_refused(tmp_path: Path) -> None:
    """Two gigabytes of zeros, without a header and with one; they take no space on the disk."""
    path = tmp_path / "fer2013.csv"
    for line, start in ((1, ""), (3, HEADER + ROW)):
        path.write_text(start)
        os.truncate(path, 2 * 2**30)
        read_within("faces", path, f"line {line}: {TOO_LONG}", max_mib=48)


def test_votes_have_the_same_bound(tmp_path: Path) -> None:
    (tmp_path / "fer2013.csv").write_text(HEADER + ROW)
    (tmp_path / "votes.csv").write_bytes(b"1," * 10**6)
    with pytest.raises(UserError, match=f"votes.csv, line 1: {TOO_LONG}"):
        read_set(tmp_path / "fer2013.csv", ferplus=tmp_path / "votes.csv")


def test_rows_and_pictures_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good ones, bad ones and blank ones."""
    for module in (tables, gathering):
        monkeypatch.setattr(module, "MAX_PICTURES", 50)
    path = tmp_path / "fer2013.csv"
    path.write_text(HEADER + ROW * 50)
    assert len(read_set(path)) == 50
    cases: list[tuple[str, Literal["stop", "skip"]]] = [(ROW, "stop"), ("\n", "stop"), ("9,9\n", "skip")]
    for row, on_error in cases:
        path.write_text(HEADER + row * 1000)
        with pytest.raises(UserError, match="has more than 50 rows"):
            read_set(path, on_error)
    path = tmp_path / "x.parquet"
    for label in (3, 9):
        parquet.write_table(pa.table({"image": [plain()] * 51, "label": [label] * 51}), path)
        with pytest.raises(UserError, match=r"row 51: more than 50 pictures or rows"):
            read_set(path, "skip")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("fer2013.csv", "faces.zip", "train.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="neither a file nor a folder"):
            read_set(tmp_path / name)


# -- parquet


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def deep(levels: int) -> bytes:
    """Return a schema of groups in groups without any data, in thrift's compact protocol."""
    group, leaf = b"\x35\x02\x18\x05image\x15\x02\0", b"\x15\x0c\x25\x02\x18\x01x\0"
    elements = varint(levels + 2) + b"\x48\x06schema\x15\x02\0" + group * levels + leaf
    footer = b"\x15\x04\x29\xfc" + elements + b"\x16\0\x19\x0c\0"
    return b"PAR1" + footer + struct.pack("<L", len(footer)) + b"PAR1"


def packed(image: Any, **options: Any) -> bytes:
    """Return a parquet file of pictures, as small as zstd makes it."""
    out = pa.BufferOutputStream()
    settings = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "write_statistics": False}
    table = pa.table({"image": image, "label": pa.array(["happy"] * len(image))})
    parquet.write_table(table, out, store_schema=False, **settings | options)
    raw: bytes = out.getvalue().to_pybytes()
    return raw


def one_in_40_rows() -> bytes:
    """Return a file that holds a picture of 15 MiB once, in a kilobyte, and refers to it from each row."""
    picture = pa.array([plain() + bytes(15 * 2**20)], pa.binary())
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), picture)
    return packed(pa.StructArray.from_arrays([many, pa.array(["x.png"] * 40)], ["bytes", "path"]))


def lying_page(mib: int) -> bytes:
    """Return one page that unpacks to so many MiB, and a footer that claims 100 bytes."""
    raw = packed(pa.array([bytes(2**20)] * mib, pa.binary()), use_dictionary=False)
    group = parquet.ParquetFile(pa.BufferReader(raw)).metadata.row_group(0)
    for claimed in (group.column(0).total_uncompressed_size, group.total_byte_size):
        true = varint(claimed << 1)
        raw = raw.replace(true, bytes([0xC8] + [0x80] * (len(true) - 2) + [0]))
    assert parquet.ParquetFile(pa.BufferReader(raw)).metadata.row_group(0).column(0).total_uncompressed_size < 10**4
    return raw


TABLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "one picture in 40 rows": (one_in_40_rows, "read: 40"),
    "a page of 320 MiB whose footer lies": (lambda: lying_page(320), "unpacks to 335,5"),
    "schema 100,000 deep": (lambda: deep(100_000), "no readable parquet file of at most 10,000 columns"),
    "schema 9,000 deep": (lambda: deep(9_000), "no readable parquet file"),
    "lists of pictures": (lambda: packed(pa.array([[plain()]])), "the column 'image' holds list<"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_parquet_file_takes_bounded_memory(kind: str, tmp_path: Path) -> None:
    make, expected = TABLES[kind]
    path = tmp_path / "train.parquet"
    path.write_bytes(make())
    max_mib = 512 if expected == "read: 40" else 128  # a row group of 256 MiB, and rows of it that are as large again
    read_within("faces", path, expected, max_mib=max_mib)


def test_wrong_names_of_classes_are_ignored_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"

    def write(names: str) -> None:
        metadata = {b"huggingface": b'{"info": {"features": {"label": {"names": ' + names.encode() + b"}}}}"}
        parquet.write_table(pa.table({"image": [plain()], "label": [3]}).replace_schema_metadata(metadata), path)

    write("[" * 100_000)
    assert len(read_set(path)) == 1
    for names, problem in (("[" * 900 + "]" * 900, "label 3, expected 0..0"), ('"happy"', "unknown class 'p'")):
        write(names)
        with pytest.raises(UserError, match=f"train.parquet row 1: {problem}"):
            read_set(path)
