"""The cache: decoded once, keyed by content, whole or not there, whoever else builds it."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fer_dist.config import DataConfig
from fer_dist.data import cache
from fer_dist.data.faces import Faces
from fer_dist.data.readers import read_faces
from fer_dist.data.synthetic import DRAWING_VERSION, draw_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from tests.helpers.picture_files import faces_of, plain, write_folder, write_zip
from tests.helpers.processes import python

LABELS = LabelSet()
NAMES = ("train/happy/0.png", "train/sad/1.png", "test/fear/2.png")


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    source = write_folder(tmp_path / "source", {name: plain(level) for level, name in enumerate(NAMES)})
    return DataConfig(path=str(source), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call of read_faces."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Faces:
        calls.append(1)
        return read_faces(*args, **kwargs)

    monkeypatch.setattr(cache, "read_faces", counted)
    return calls


def entries(data: DataConfig) -> list[str]:
    """What lies in the cache folder, temporary folders included."""
    return sorted(path.name for path in cache.cache_dir(data).iterdir())


def test_second_opening_decodes_nothing(data: DataConfig, decoded: list[int]) -> None:
    first, second = cache.open_faces(data, LABELS), cache.open_faces(data, LABELS)
    assert len(decoded) == 1
    assert isinstance(second.images_NHW, np.memmap)
    assert not second.images_NHW.flags.writeable
    assert second.images_NHW[:, 0, 0].tolist() == [2, 0, 1]
    assert second.labels_N.tolist() == [2, 3, 4]
    assert list(second.names) == sorted(NAMES)
    assert (first.key, first.notes) == (second.key, second.notes)
    assert entries(data) == [first.key]  # nothing temporary stays


def test_votes_notes_and_odd_names_survive(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    votes = np.full((2, 7), 1 / 7, dtype=np.float32)
    names = ["caf\udce9.png", "b\r\x85.png"]  # a byte that was no UTF-8; signs that splitlines would split at
    made = faces_of(np.zeros((2, 48, 48), np.uint8), [1, 2], [0, 1], names=names, targets_NK=votes, notes=("a", "b"))
    monkeypatch.setattr(cache, "read_faces", lambda *_, **__: made)
    faces = cache.open_faces(data, LABELS)
    assert (list(faces.names), faces.notes) == (names, ("a", "b"))
    assert faces.targets_NK is not None
    assert np.array_equal(faces.targets_NK, votes)


def test_key_follows_content_and_settings(data: DataConfig, tmp_path: Path) -> None:
    def key(labels: LabelSet = LABELS, **changes: object) -> str:
        return cache.open_faces(data.override(changes), labels).key

    keys = {key(), key(size=32), key(on_error="skip"), key(LabelSet(names=LABELS.names[::-1]))}
    assert len(keys) == 4
    assert key(val_fraction=0.3) == key()
    changed = tmp_path / "source" / NAMES[0]
    os.utime(changed, ns=(1, changed.stat().st_mtime_ns + 1))
    assert key() not in keys


def test_zip_is_known_by_its_content(data: DataConfig, tmp_path: Path, decoded: list[int]) -> None:
    def opened(name: str, levels: dict[int, int]) -> Faces:
        path = write_zip(tmp_path / name, {NAMES[i]: plain(level) for i, level in levels.items()})
        return cache.open_faces(data.override({"path": str(path)}), LABELS)

    first = opened("a.zip", {0: 7, 1: 8, 2: 9})
    assert opened("b.zip", {2: 9, 0: 7, 1: 8}).key == first.key
    assert len(decoded) == 1
    other = opened("a.zip", {0: 7, 1: 8, 2: 10})
    assert other.key != first.key
    assert other.images_NHW[0, 0, 0] == 10


def test_embedded_faces_need_no_path(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"path": None, "embedded_train": 14, "embedded_val": 7, "embedded_seed": 5, "size": 32}
    embedded = data.override(changes)
    first = cache.open_faces(embedded, LABELS)
    assert np.array_equal(first.images_NHW, draw_faces(14, 7, 7, seed=5, size=32).images_NHW)
    assert cache.open_faces(embedded.override({"embedded_seed": 6}), LABELS).key != first.key
    with monkeypatch.context() as patch:
        patch.setattr(cache, "DRAWING_VERSION", DRAWING_VERSION + 1)
        assert cache.open_faces(embedded, LABELS).key != first.key
    monkeypatch.setattr(cache, "draw_faces", lambda *_: pytest.fail("drawn again"))
    assert cache.open_faces(embedded, LABELS).key == first.key


DAMAGE = {  # what is then the whole content of a file; None: it is gone
    "other pictures": ("images_NHW.npy", b"x" * (128 + 3 * 48 * 48)),  # of the right size
    "cut names": ("names.txt", b"a\nb\nc"),  # as many, so that only the size gives it away
    "no names": ("names.txt", None),
    "empty record": ("meta.json", b""),
    "other record": ("meta.json", b"[1, 2]"),
    "record without notes": ("meta.json", b'{"files": {}}'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_entry_is_built_again(data: DataConfig, decoded: list[int], kind: str) -> None:
    key = cache.open_faces(data, LABELS).key
    name, content = DAMAGE[kind]
    file = cache.cache_dir(data) / key / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    faces = cache.open_faces(data, LABELS)
    assert len(decoded) == 2
    assert faces.images_NHW[:, 0, 0].tolist() == [2, 0, 1]
    assert entries(data) == [key]


@pytest.mark.parametrize("damaged", [False, True])
def test_two_builders_at_once(data: DataConfig, damaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if damaged:  # both find it, and both want to replace it
        os.truncate(cache.cache_dir(data) / cache.open_faces(data, LABELS).key / "images_NHW.npy", 100)
    both = threading.Barrier(2, timeout=60)

    def meet(*args: Any, **kwargs: Any) -> Faces:
        both.wait()  # neither has found a whole entry
        return read_faces(*args, **kwargs)

    monkeypatch.setattr(cache, "read_faces", meet)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cache.open_faces(data, LABELS), range(2))
    assert entries(data) == [first.key] == [second.key]
    for faces in (first, second):
        assert faces.images_NHW[:, 0, 0].tolist() == [2, 0, 1]


KILLED = """
import os, sys
from fer_dist.config import DataConfig
from fer_dist.data import cache
from fer_dist.spec import LabelSet

cache.np.save = lambda file, array: os.kill(os.getpid(), 9)
cache.open_faces(DataConfig(path=sys.argv[1], cache_dir=sys.argv[2]), LabelSet())
"""


def test_a_killed_builder_leaves_nothing_that_is_read(data: DataConfig, decoded: list[int]) -> None:
    assert python("-c", KILLED, str(data.path), str(data.cache_dir)).code == -signal.SIGKILL
    (left,) = entries(data)
    assert left.startswith(".building-")
    faces = cache.open_faces(data, LABELS)
    assert len(decoded) == 1
    assert faces.images_NHW[:, 0, 0].tolist() == [2, 0, 1]
    assert entries(data) == [left, faces.key]  # it might belong to a build that still runs

    old = time.time() - 2 * 24 * 3600
    os.utime(cache.cache_dir(data) / left, (old, old))
    other = cache.open_faces(data.override({"size": 32}), LABELS)
    assert entries(data) == sorted([faces.key, other.key])


def test_a_failed_build_leaves_nothing_and_names_the_setting(
    data: DataConfig, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    unwritable = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=rf"{unwritable}[\s\S]*--data\.cache_dir"):
        cache.open_faces(data.override({"cache_dir": unwritable}), LABELS)
    assert decoded == []  # known before minutes of decoding

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match=r"No space left[\s\S]*--data\.cache_dir"):
            cache.open_faces(data, LABELS)
    assert entries(data) == []
    Path(str(data.path), NAMES[0]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png"):
        cache.open_faces(data, LABELS)
    assert entries(data) == []


def test_a_missing_source_is_named(data: DataConfig) -> None:
    for changes, message in (
        ({"path": "gone.zip"}, r"gone\.zip does not exist[\s\S]*--data\.path"),
        ({"ferplus": "gone.csv"}, r"gone\.csv does not exist[\s\S]*--data\.ferplus"),
        ({"path": None, "ferplus": "gone.csv"}, "needs the FER2013 CSV"),
    ):
        with pytest.raises(UserError, match=message):
            cache.open_faces(data.override(changes), LABELS)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later row goes before an earlier one, and the setting before all."""
    for variable in ("XDG_CACHE_HOME", "FER_DIST_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value, expected in (
        ("HOME", "/of/home", "/of/home/.cache/fer_dist"),
        ("XDG_CACHE_HOME", "/of/xdg", "/of/xdg/fer_dist"),
        ("FER_DIST_CACHE", "/of/variable", "/of/variable"),
    ):
        monkeypatch.setenv(variable, value)
        assert cache.cache_dir(DataConfig()) == Path(expected)
    assert cache.cache_dir(DataConfig(cache_dir="~/mine")) == Path("/of/home/mine")
