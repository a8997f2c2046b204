"""Untrusted archives and folders: members that share bytes, archives in archives, links in circles."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fer_dist.archives import BadArchive, find_directory
from fer_dist.data import pictures
from fer_dist.data.pictures import walk
from fer_dist.data.readers import read_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from tests.faults.test_hostile_pictures import encoded
from tests.helpers.malicious_pickles import zipped
from tests.helpers.memory_meter import read_within

PICTURE = encoded("PNG")
GOOD = {"happy/1.png": PICTURE, "sad/2.png": PICTURE}


def read(path: Path) -> list[str]:
    return list(read_faces(path, size=48, labels=LabelSet(), on_error="stop", ferplus=None).names)


def with_directory(body: bytes, entries: list[bytes], declared: int | None = None) -> bytes:
    """Return an archive whose directory is given entry by entry."""
    count = len(entries) if declared is None else declared
    listed = b"".join(entries)
    return body + listed + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(listed), len(body), 0)


def head(name: str, raw: bytes, packed: bytes) -> bytes:
    """Return the head of a deflated member, up to its bytes."""
    sizes = (zlib.crc32(raw), len(packed), len(raw))
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, *sizes, len(name), 0) + name.encode()


def entry(name: str, raw: bytes = b"", packed: bytes = b"", offset: int = 0) -> bytes:
    """Return a member's entry in the directory."""
    sizes = (zlib.crc32(raw), len(packed), len(raw))
    fields = (b"PK\1\2", 20, 20, 0, 8, 0, 33, *sizes, len(name), 0, 0, 0, 0, 0, offset)
    return struct.pack("<4s6H3L5H2L", *fields) + name.encode()


def deflated(raw: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(raw) + packer.flush()


def shared_bytes() -> bytes:
    """Return Fifield's better zip bomb in small: every entry is the same member."""
    raw = bytes(2**20)
    packed = deflated(raw)
    return with_directory(head("happy/0.png", raw, packed) + packed, [entry("happy/0.png", raw, packed)] * 30)


def quoted() -> bytes:
    """Return its other form: a member's bytes begin with the head of the next, quoted as a stored block."""
    packed = deflated(PICTURE)
    second = head("happy/2.png", PICTURE, packed)
    quote = b"\0" + struct.pack("<HH", len(second), len(second) ^ 0xFFFF) + second  # a stored block, not the last
    first = head("happy/1.png", second + PICTURE, quote + packed)
    entries = [
        entry("happy/1.png", second + PICTURE, quote + packed),
        entry("happy/2.png", PICTURE, packed, len(first) + 5),
    ]
    return with_directory(first + quote + packed, entries)


def in_the_directory() -> bytes:
    """Return a member that reaches into the directory."""
    packed = deflated(PICTURE)
    return with_directory(head("happy/1.png", PICTURE, packed) + packed[:-50], [entry("happy/1.png", PICTURE, packed)])


def link(target: str) -> bytes:
    """Return an archive with a picture that is a link, as `zip -y` writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("happy/1.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, target)
    return out.getvalue()


def large(entries: int) -> bytes:
    """Return the records of a large archive, which claim as many entries."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, 46 * entries, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 46 * entries, 1)
    return record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0)


NO_FILE = "'happy/1.png' is a link, not a file"
NESTED = {"happy/1.zip": zipped(GOOD), "happy/2.zip": zipped({"a.zip": zipped(GOOD)})}
ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "one member 30 times": (shared_bytes, "the members 'happy/0.png' and 'happy/0.png' overlap"),
    "a member in a member": (quoted, "the members 'happy/1.png' and 'happy/2.png' overlap"),
    "a member in the directory": (in_the_directory, "'happy/1.png' reaches into the directory"),
    "a link to a file": (lambda: link("/etc/passwd"), NO_FILE),
    "a link to itself": (lambda: link("1.png"), NO_FILE),
    "a member without a name": (lambda: with_directory(b"", [entry("")]), "member '' has no name"),
    "a name that is a NUL": (lambda: with_directory(b"", [entry("\0")]), "has no name"),
    "500,001 entries": (
        lambda: with_directory(b"", [entry("")] * 500_001, 1),
        "its directory has 500,001 members, more than 500,000",
    ),
    "3 million entries": (
        lambda: with_directory(b"", [entry("")] * 3_000_000, 1),
        "its directory has 138,000,000 bytes, more than 128,000,000",
    ),
    "2,000 long names": (lambda: with_directory(b"", [entry("x" * 65_000)] * 2000), "bytes, more than 128,000,000"),
    "2**50 entries": (lambda: large(2**50), "does not fit into"),
    "a million entries in no bytes": (lambda: large(10**6), "does not fit into"),
    "an archive in an archive": (lambda: zipped(NESTED), "holds no picture"),
    "an archive called a picture": (lambda: zipped({"happy/1.png": zipped(GOOD)}), "no picture of the formats"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_is_refused(kind: str, tmp_path: Path) -> None:
    make, problem = ARCHIVES[kind]
    path = tmp_path / "faces.zip"
    path.write_bytes(make())
    read_within("faces", path, problem, max_mib=192)  # a directory of 128 MB may be looked at


def test_an_archive_that_holds_itself_stays_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "faces.zip"
    path.write_bytes(zipped(GOOD | {"r/r.zip": zipped(GOOD), "faces.zip": b"PK\3\4"}))
    opened: list[str] = []
    original = zipfile.ZipFile.open

    def watched(self: zipfile.ZipFile, name: zipfile.ZipInfo, *_: Any, **__: Any) -> Any:
        opened.append(name.filename)
        return original(self, name)

    monkeypatch.setattr(zipfile.ZipFile, "open", watched)
    assert read(path) == sorted(GOOD)
    assert opened == sorted(GOOD)


def test_bytes_before_and_behind_an_honest_archive_are_ignored(tmp_path: Path) -> None:
    """A program that unpacks itself has some before, an archive with a comment some behind."""
    path = tmp_path / "faces.zip"
    path.write_bytes(b"MZ" + bytes(500) + zipped(GOOD))
    assert read(path) == sorted(GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"faces" * 100
    assert read(path) == sorted(GOOD)


def test_directories_that_contradict_each_other_are_refused() -> None:
    """Each of these numbers is used by one reader of archives or another."""
    good = zipped(GOOD)
    place = len(good) - 22
    (start,) = struct.unpack("<L", good[-6:-2])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, place - start, start)

    def large_archive(record: bytes, place: int) -> bytes:
        return good[:-22] + record + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1) + good[-22:]

    assert find_directory(io.BytesIO(good), 2) == (start, 2, 0, len(good))
    assert find_directory(io.BytesIO(large_archive(record, place)), 2).start == start
    wrong = [large_archive(*case) for case in ((record, place - 1), (record, 0), (b"", place), (bytes(56), place))]
    for raw in (*wrong, b"PK\5\6", good[:-1]):
        with pytest.raises(BadArchive):
            find_directory(io.BytesIO(raw), 2)
    with pytest.raises(BadArchive, match="2 members, more than 1"):
        find_directory(io.BytesIO(good), 1)


# -- folders


def test_links_in_circles_are_followed_once(tmp_path: Path) -> None:
    for folder in ("happy", "sad"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(PICTURE)
        for name, target in (("up", ".."), ("self", "."), ("endless", "endless")):
            (tmp_path / folder / name).symlink_to(target)
    (tmp_path / "again").symlink_to(tmp_path)
    names = ["happy/1.png", "happy/endless", "sad/1.png", "sad/endless"]
    assert [stamp.name for stamp in walk(tmp_path)] == names
    assert read(tmp_path) == ["happy/1.png", "sad/1.png"]
    (tmp_path / "sad" / "2.png").symlink_to("2.png")
    with pytest.raises(UserError, match=r"sad/2.png: cannot be read: Too many levels of symbolic links"):
        read(tmp_path)


def test_files_and_links_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten links from each of seven folders to the next are ten million ways to the last."""
    monkeypatch.setattr(pictures, "MAX_PICTURES", 2000)
    for level in range(7):
        (tmp_path / f"level{level}").mkdir()
        for index in range(10):
            (tmp_path / f"level{level}" / f"{index}").symlink_to(f"../level{level + 1}")
    last = tmp_path / "level7"
    last.mkdir()
    for index in range(10):
        (last / f"{index}.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds more than 2,000 files"):
        walk(tmp_path / "level0")
    monkeypatch.setattr(pictures, "MAX_PICTURES", 10)
    assert len(walk(last)) == 10
    (last / "more.txt").write_bytes(b"")
    with pytest.raises(UserError, match="holds more than 10 files"):
        walk(last)


def test_pipes_and_devices_among_the_pictures_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "happy").mkdir()
    (tmp_path / "happy" / "1.png").write_bytes(PICTURE)
    os.mkfifo(tmp_path / "happy" / "2.png")
    (tmp_path / "happy" / "3.png").symlink_to("/dev/zero")
    assert read(tmp_path) == ["happy/1.png"]
