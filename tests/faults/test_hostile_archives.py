"""Untrusted archives and folders: members that share bytes, archives in archives, links in circles."""

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from fer_dist.archives import BadArchive, find_directory
from fer_dist.data import pictures
from fer_dist.data.pictures import walk
from fer_dist.errors import UserError
from tests.helpers.malicious_pickles import entry, with_directory, zipped
from tests.helpers.memory_meter import read_set, read_within
from tests.helpers.picture_files import plain, write_folder

GOOD = {"happy/1.png": plain(), "sad/2.png": plain()}
FIRST, SECOND = entry("happy/1.png", 100), entry("happy/2.png", 100, offset=50)
LINK, OVERLAP = entry("happy/1.png", 100, mode=0o120777), "the members 'happy/1.png' and 'happy/{}.png' overlap"
ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "one member 30 times": (lambda: with_directory(bytes(500), [FIRST] * 30), OVERLAP.format(1)),
    "a member in a member": (lambda: with_directory(bytes(500), [FIRST, SECOND]), OVERLAP.format(2)),
    "a member in the directory": (lambda: with_directory(bytes(100), [FIRST]), "'happy/1.png' reaches into the"),
    "a link": (lambda: with_directory(bytes(500), [LINK]), "'happy/1.png' is a link, not a file"),
    "a name that is a NUL": (lambda: with_directory(b"", [entry("\0")]), "has no name"),
    "500,001 entries": (lambda: with_directory(b"", [entry("")] * 500_001, 1), "500,001 members, more than 500,000"),
    "2,000 long names": (lambda: with_directory(b"", [entry("x" * 65_000)] * 2000), "bytes, more than 128,000,000"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_is_refused(kind: str, tmp_path: Path) -> None:
    make, problem = ARCHIVES[kind]
    path = tmp_path / "faces.zip"
    path.write_bytes(make())
    read_within("faces", path, problem, max_mib=192)  # a directory of 128 MB may be looked at


def test_an_honest_archive_is_read_and_those_in_it_stay_closed(tmp_path: Path) -> None:
    """A program that unpacks itself has bytes before its archive, a comment is behind it."""
    path = tmp_path / "faces.zip"
    path.write_bytes(b"MZ" + bytes(500) + zipped(GOOD | {"r/r.zip": zipped(GOOD), "faces.zip": b"PK\3\4"}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"faces" * 100
    with mock.patch.object(zipfile.ZipFile, "open", autospec=True, side_effect=zipfile.ZipFile.open) as opened:
        assert list(read_set(path).names) == sorted(GOOD)
    assert [call.args[1].filename for call in opened.call_args_list] == sorted(GOOD)


def test_directories_that_contradict_each_other_are_refused() -> None:
    """Each of these numbers is used by one reader of archives or another."""
    good = zipped(GOOD)
    place = len(good) - 22
    (start,) = struct.unpack("<L", good[-6:-2])

    def record(count: int, size: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)

    def large_archive(record: bytes, place: int) -> bytes:
        return good[:-22] + record + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1) + good[-22:]

    honest = record(2, place - start)
    assert find_directory(io.BytesIO(good), 2) == (start, 2, 0, len(good))
    assert find_directory(io.BytesIO(large_archive(honest, place)), 2).start == start
    wrong = [large_archive(*case) for case in ((honest, place - 1), (honest, 0), (b"", place), (bytes(56), place))]
    for raw in (*wrong, b"PK\5\6", good[:-1]):
        with pytest.raises(BadArchive):
            find_directory(io.BytesIO(raw), 2)
    endless = large_archive(record(2**50, 46 * 2**50), start + 46 * 2**50)
    for raw, problem in ((good, "2 members, more than 1"), (endless, "does not fit into")):
        with pytest.raises(BadArchive, match=problem):
            find_directory(io.BytesIO(raw), 1)


# -- folders


def test_links_in_circles_are_followed_once(tmp_path: Path) -> None:
    """Pipes and devices are left out."""
    write_folder(tmp_path, {"happy/1.png": plain(), "sad/1.png": plain()})
    for folder in ("happy", "sad"):
        for name, target in (("up", ".."), ("self", "."), ("endless", "endless"), ("device.png", "/dev/zero")):
            (tmp_path / folder / name).symlink_to(target)
        os.mkfifo(tmp_path / folder / "pipe.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert [stamp.name for stamp in walk(tmp_path)] == ["happy/1.png", "happy/endless", "sad/1.png", "sad/endless"]
    assert list(read_set(tmp_path).names) == ["happy/1.png", "sad/1.png"]
    (tmp_path / "sad" / "2.png").symlink_to("2.png")
    with pytest.raises(UserError, match=r"sad/2.png: cannot be read: Too many levels of symbolic links"):
        read_set(tmp_path)


def test_files_and_links_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten links from each of seven folders to the next are ten million ways to the last."""
    monkeypatch.setattr(pictures, "MAX_PICTURES", 10)
    write_folder(tmp_path / "level7", {f"{index}.txt": b"" for index in range(10)})
    assert len(walk(tmp_path / "level7")) == 10
    (tmp_path / "level7" / "10.txt").touch()
    with pytest.raises(UserError, match="holds more than 10 files"):
        walk(tmp_path / "level7")
    monkeypatch.setattr(pictures, "MAX_PICTURES", 2000)
    for level in range(7):
        (tmp_path / f"level{level}").mkdir()
        for index in range(10):
            (tmp_path / f"level{level}" / f"{index}").symlink_to(f"../level{level + 1}")
    with pytest.raises(UserError, match="holds more than 2,000 files"):
        walk(tmp_path / "level0")
