"""Archives and folders from strangers: members that share bytes, archives in themselves, links in circles."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fer_dist.archives import BadArchive, find_directory
from fer_dist.data import pictures
from fer_dist.data.pictures import walk
from fer_dist.data.readers import read_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from tests.faults.test_hostile_pictures import encoded
from tests.helpers.malicious_pickles import zipped
from tests.helpers.memory_meter import Meter

GOOD = {"happy/1.png": encoded("PNG"), "sad/2.png": encoded("PNG")}
_ENTRY = "<4s6H3L5H2L"


def read(path: Path) -> list[str]:
    return list(read_faces(path, size=48, labels=LabelSet(), on_error="stop", ferplus=None).names)


def with_directory(body: bytes, entries: list[bytes], declared: int | None = None) -> bytes:
    """An archive whose directory is given entry by entry."""
    count = len(entries) if declared is None else declared
    listed = b"".join(entries)
    return body + listed + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(listed), len(body), 0)


def member(name: str, raw: bytes, packed: bytes, extra: bytes = b"") -> bytes:
    """The head of a deflated member, up to its bytes."""
    sizes = (zlib.crc32(raw), len(packed), len(raw))
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, *sizes, len(name), len(extra)) + name.encode() + extra


def entry(name: str, raw: bytes, packed: bytes, offset: int) -> bytes:
    """A member in the directory."""
    sizes = (zlib.crc32(raw), len(packed), len(raw))
    head = struct.pack(_ENTRY, b"PK\1\2", 20, 20, 0, 8, 0, 33, *sizes, len(name), 0, 0, 0, 0, 0, offset)
    return head + name.encode()


def deflated(raw: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(raw) + packer.flush()


def shared_bytes() -> bytes:
    """Fifield's better zip bomb in small: every entry is the same member."""
    raw = bytes(2**20)
    packed = deflated(raw)
    body = member("happy/0.png", raw, packed) + packed
    return with_directory(body, [entry("happy/0.png", raw, packed, 0)] * 30)


def quoted() -> bytes:
    """The other one: a member's bytes begin with the head of the next, quoted as a stored block."""
    raw = encoded("PNG")
    packed = deflated(raw)
    second = member("happy/2.png", raw, packed)
    quote = b"\0" + struct.pack("<HH", len(second), len(second) ^ 0xFFFF) + second  # a stored block, not the last
    first_raw = second + raw
    first = member("happy/1.png", first_raw, quote + packed)
    body = first + quote + packed
    entries = [
        entry("happy/1.png", first_raw, quote + packed, 0),
        entry("happy/2.png", raw, packed, len(first) + 5),
    ]
    return with_directory(body, entries)


def in_the_directory() -> bytes:
    """A member that reaches into the directory."""
    raw = encoded("PNG")
    packed = deflated(raw)
    return with_directory(member("happy/1.png", raw, packed) + packed[:-50], [entry("happy/1.png", raw, packed, 0)])


def many(count: int, declared: int = 1) -> bytes:
    """A directory of nothing but entries; the declared number is smaller."""
    return with_directory(b"", [entry("", b"", b"", 0)] * count, declared)


def long_names(count: int) -> bytes:
    return with_directory(b"", [entry("x" * 65_000, b"", b"", 0)] * count)


def links(target: str) -> bytes:
    """A picture that is a link, as `zip -y` writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("happy/1.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, target)
        archive.writestr("happy/2.png", encoded("PNG"))
    return out.getvalue()


def large(entries: int) -> bytes:
    """The records of a large archive, which claim as many entries."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, 46 * entries, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 46 * entries, 1)
    return record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "one member 30 times": (shared_bytes, "the members 'happy/0.png' and 'happy/0.png' overlap"),
    "a member in a member": (quoted, "the members 'happy/1.png' and 'happy/2.png' overlap"),
    "a member in the directory": (in_the_directory, "'happy/1.png' reaches into the directory"),
    "a link to a file": (lambda: links("/etc/passwd"), "'happy/1.png' is a link, not a file"),
    "a link to itself": (lambda: links("1.png"), "'happy/1.png' is a link, not a file"),
    "a member without a name": (lambda: many(1), "member '' has no name"),
    "a name that is nothing but a NUL": (lambda: with_directory(b"", [entry("\0", b"", b"", 0)]), "has no name"),
    "500,001 entries": (lambda: many(500_001), "its directory has 500,001 members, more than 500,000"),
    "3 million entries": (lambda: many(3_000_000), "its directory has 138,000,000 bytes, more than 128,000,000"),
    "2,000 long names": (lambda: long_names(2000), "bytes, more than 128,000,000"),
    "2**50 entries": (lambda: large(2**50), "does not fit into"),
    "a million entries in no bytes": (lambda: large(10**6), "does not fit into"),
    "an archive in an archive": (
        lambda: zipped({"happy/1.zip": zipped(GOOD), "happy/2.zip": zipped({"a.zip": zipped(GOOD)})}),
        "holds no picture",
    ),
    "an archive called a picture": (lambda: zipped({"happy/1.png": zipped(GOOD)}), "no picture of the formats"),
}


@pytest.fixture(scope="module")
def usual(meter: Meter, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The memory that a good archive takes."""
    path = tmp_path_factory.mktemp("usual") / "faces.zip"
    path.write_bytes(zipped(GOOD))
    answer = meter.ask("faces", path)
    assert answer.problem == "2"
    return answer.grown


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive(kind: str, tmp_path: Path, meter: Meter, usual: int) -> None:
    make, problem = ARCHIVES[kind]
    path = tmp_path / "faces.zip"
    path.write_bytes(make())
    answer = meter.ask("faces", path)
    assert answer.error == "UserError", answer
    assert str(path) in answer.problem
    assert problem in answer.problem
    assert answer.grown - usual < 160 * 2**20, "a directory of 128 MB may be looked at"
    assert answer.seconds < 5


def test_an_archive_that_holds_itself_stays_closed(tmp_path: Path) -> None:
    """What is inside of a member is never looked at, so that no circle can be gone round."""
    path = tmp_path / "faces.zip"
    path.write_bytes(zipped(GOOD | {"r/r.zip": zipped(GOOD), "faces.zip": b"PK\3\4"}))
    opened: list[str] = []
    original = zipfile.ZipFile.open

    def watched(self: zipfile.ZipFile, name: zipfile.ZipInfo, *options: object, **others: object) -> object:
        opened.append(name.filename)
        return original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", watched)
        assert read(path) == sorted(GOOD)
    assert opened == sorted(GOOD)


def test_something_before_and_behind_an_honest_archive(tmp_path: Path) -> None:
    """A program that unpacks itself is one; so is an archive with a comment."""
    path = tmp_path / "faces.zip"
    path.write_bytes(b"MZ" + bytes(500) + zipped(GOOD))
    assert read(path) == sorted(GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"faces" * 100
    assert read(path) == sorted(GOOD)


def test_directories_that_contradict_each_other() -> None:
    """Each of these numbers is looked at by one reader of archives or another."""
    good = zipped(GOOD)
    listed = good[struct.unpack("<L", good[-6:-2])[0] : -22]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(listed), len(good) - 22 - len(listed))
    place = len(good) - 22

    def told(record: bytes, place: int) -> bytes:
        return good[:-22] + record + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1) + good[-22:]

    assert find_directory(io.BytesIO(good), 2) == find_directory(io.BytesIO(good), 2)._replace(declared=2, prefix=0)
    assert find_directory(io.BytesIO(told(record, place)), 2).start == place - len(listed)
    for wrong in (
        told(record, place - 1),
        told(record, 0),
        told(b"", place),
        told(bytes(56), place),
        b"PK\5\6",
        good[:-1],
    ):
        with pytest.raises(BadArchive):
            find_directory(io.BytesIO(wrong), 2)
    with pytest.raises(BadArchive, match="2 members, more than 1"):
        find_directory(io.BytesIO(good), 1)


# -- folders


def test_links_in_circles(tmp_path: Path) -> None:
    """A folder is not gone into a second time on the way down from itself."""
    for folder in ("happy", "sad"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(encoded("PNG"))
        (tmp_path / folder / "up").symlink_to("..")
        (tmp_path / folder / "self").symlink_to(".")
        (tmp_path / folder / "endless").symlink_to("endless")
    (tmp_path / "again").symlink_to(tmp_path)
    names = ["happy/1.png", "happy/endless", "sad/1.png", "sad/endless"]
    assert [stamp.name for stamp in walk(tmp_path)] == names
    assert read(tmp_path) == ["happy/1.png", "sad/1.png"]
    (tmp_path / "sad" / "2.png").symlink_to("2.png")
    with pytest.raises(UserError, match=r"sad/2.png: cannot be read: Too many levels of symbolic links"):
        read(tmp_path)


def test_links_without_circles_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten links from each of seven folders to the next are ten million ways to the last."""
    monkeypatch.setattr(pictures, "MAX_PICTURES", 2000)
    for level in range(7):
        (tmp_path / f"level{level}").mkdir()
        for index in range(10):
            (tmp_path / f"level{level}" / f"{index}").symlink_to(f"../level{level + 1}")
    (tmp_path / "level7").mkdir()
    (tmp_path / "level7" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds more than 2,000 files"):
        walk(tmp_path / "level0")


def test_files_of_a_folder_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURES", 50)
    (tmp_path / "happy").mkdir()
    for index in range(49):
        (tmp_path / "happy" / f"{index}.png").write_bytes(b"")
    assert len(walk(tmp_path)) == 49
    (tmp_path / "happy" / "more.txt").write_bytes(b"")
    with pytest.raises(UserError, match="holds more than 50 files"):
        walk(tmp_path)


def test_a_pipe_among_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "happy").mkdir()
    (tmp_path / "happy" / "1.png").write_bytes(encoded("PNG"))
    os.mkfifo(tmp_path / "happy" / "2.png")
    (tmp_path / "happy" / "3.png").symlink_to("/dev/zero")
    assert read(tmp_path) == ["happy/1.png"]
