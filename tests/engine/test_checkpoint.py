"""Checkpoints: whole or not at all on disk, tensors and plain values only, and damage is always noticed."""

import errno
import hashlib
import json
import math
import os
import resource
import signal
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fer_dist.engine.checkpoint import FORMAT, SEAL_BYTES, Checkpoint, _seal, load, save, write_atomically
from fer_dist.engine.describe import describe
from fer_dist.engine.history import newest
from fer_dist.errors import UserError
from tests.helpers.tiny_models import pictures, tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Checkpoint, Path]:
    """A checkpoint of a tiny network, and where it was saved."""
    made = make(0)
    save(tmp_path / "best.pth", made)
    return made, tmp_path / "best.pth"


def make(number: int) -> Checkpoint:
    model = tiny_model("patt_lite")
    return Checkpoint(
        spec=model.spec,
        weights=model.state_dict(),
        config={"seed": number, "train": {"epochs": 2}, "data": {"path": None}},
        record={"epoch": number, "val": {"accuracy": 0.5}},
        provenance={"commit": "abc", "world_size": 4},
        resume={"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}},
    )


def write(content: Any, path: Path) -> None:
    """Any content with a checksum that is right: somebody else's doing, not damage."""
    with path.open("w+b") as file:
        torch.save(content, file)
        _seal(file)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Limit the size of files, so that the kernel fails in the middle of a write [bytes]."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


# -- writing


def test_it_comes_back_as_it_was(saved: tuple[Checkpoint, Path]) -> None:
    made, path = saved
    back = load(path)
    assert [other.name for other in path.parent.iterdir()] == ["best.pth"]
    for name in ("spec", "config", "record", "provenance", "resume"):
        assert getattr(back, name) == getattr(made, name), name
    assert back.weights.keys() == made.weights.keys()
    assert all(torch.equal(back.weights[name], made.weights[name]) for name in made.weights)
    with torch.inference_mode():
        original = tiny_model("patt_lite").eval()
        assert torch.equal(back.model()(pictures(2)), original(pictures(2)))
    assert not back.model().training


def test_the_file_holds_tensors_and_plain_values_only(saved: tuple[Checkpoint, Path]) -> None:
    def shape(value: Any) -> list[int]:
        assert type(value) is torch.Tensor
        return list(value.shape)

    content = torch.load(saved[1], weights_only=True)
    assert set(content) == {"format", "spec", "weights", "config", "record", "provenance", "resume"}
    json.dumps(content, default=shape)
    raw = saved[1].read_bytes()
    assert raw.endswith(hashlib.sha256(raw[:-SEAL_BYTES]).hexdigest().encode()), "the checksum of all before it"
    assert zipfile.ZipFile(saved[1]).comment == raw[-SEAL_BYTES:], "to other readers it is a comment"


def test_a_full_disk_leaves_the_old_file(saved: tuple[Checkpoint, Path]) -> None:
    path = saved[1]
    before = path.read_bytes()
    assert len(before) > 150_000
    for size in (0, 100, 10_000, 100_000):
        with small_disk(size), pytest.raises(UserError, match=r"cannot write .*best\.pth: File too large"):
            save(path, make(1))
        assert path.read_bytes() == before
        assert [other.name for other in path.parent.iterdir()] == ["best.pth"], "a temporary file is left"


def test_any_other_failure_leaves_the_old_file(saved: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved[1]
    before = path.read_bytes()
    for error in (RuntimeError("torch gives up"), KeyboardInterrupt()):

        def fail(content: object, file: Any, error: BaseException = error) -> None:
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(type(error)):
            save(path, make(1))
    if (child := os.fork()) == 0:  # a process that dies in the middle of the write
        write_atomically(path, lambda file: os._exit(9) if file.write(b"half") else None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == before
    assert [other.suffix for other in path.parent.iterdir() if other != path] == [".tmp"], "that of the dead process"


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, then rename, then fsync of the folder."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(handle: int) -> None:
        events.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split(".")[-1])  # noqa: PTH119, PTH115
        fsync(handle)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"whole"))
    assert events == ["fsync tmp", "rename to file", f"fsync {tmp_path.name}"]


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems, and FUSE: the file is written; a disk that fails is reported."""
    fsync = os.fsync
    for number in (errno.EINVAL, errno.ENOTSUP, errno.EIO):

        def without_folders(handle: int, number: int = number) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", without_folders)
        path = tmp_path / str(number)
        with pytest.raises(UserError, match="Input/output error") if number == errno.EIO else nullcontext():
            write_atomically(path, lambda file: file.write(b"whole"))
        assert path.read_bytes() == b"whole"


# -- reading


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    """A pipe is not waited for."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        save(tmp_path / "file" / "best.pth", make(0))
    with pytest.raises(UserError, match="No such file or directory"):
        load(tmp_path / "best.pth")
    with pytest.raises(UserError, match="Is a directory"):
        load(tmp_path)
    os.mkfifo(tmp_path / "last.pth")
    with pytest.raises(UserError, match="no regular file"):
        load(tmp_path / "last.pth")
    assert "no regular file" in describe(tmp_path / "last.pth")["reason"]
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        newest(tmp_path)


ODD: list[tuple[str, Any, Any]] = [
    ("weights", "bias", "none"),
    ("weights", 3, torch.zeros(1)),
    *((part, "seed", torch.zeros(1)) for part in ("config", "record")),
    ("provenance", "torch", [torch.zeros(1)]),
    *(("resume", "losses", value) for value in (5, ["x"], [math.inf])),
    *(("resume", "epoch", value) for value in ("x", -1)),
    *(("resume", "best", value) for value in ("x", {"confusion": [[1, 2]], "loss_sum": 1.0, "count": 3})),
    ("resume", "step", math.inf),
    ("resume", "records", [1]),
    ("resume", "schedule", {"scale": "x"}),
    ("resume", "optimizer", None),
]
"""A part of a checkpoint, a name in it, and a value that does not belong there."""


def test_a_sealed_file_of_another_form_is_refused(saved: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    """Anybody can compute the seal: what is in the file is checked all the same."""
    for part, name, value in ODD:
        content = torch.load(saved[1], weights_only=True)
        content[part][name] = value
        write(content, path := tmp_path / "odd.pth")
        with pytest.raises(UserError, match=r"is not a checkpoint of fer_dist: its [\w.]+ has another form"):
            load(path)
        assert describe(path)["valid"] is False, (part, name)


def test_a_truncated_file_is_refused(saved: tuple[Checkpoint, Path]) -> None:
    content = saved[1].read_bytes()
    for part in (*(i / 16 for i in range(16)), 0.9999):
        saved[1].write_bytes(content[: int(part * len(content))])
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load(saved[1])


def test_a_changed_bit_is_always_an_error(saved: tuple[Checkpoint, Path]) -> None:
    """A bit is flipped at 300 places, head and tail of the file among them: never another exception, never loaded."""
    path, random = saved[1], np.random.default_rng(0)
    content = path.read_bytes()
    for place in [
        *range(0, 3000, 30),
        *random.integers(0, len(content), 100),
        *range(len(content) - 3000, len(content), 30),
        *range(len(content) - SEAL_BYTES - 2, len(content)),
    ]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="checksum"):
            load(path)
    path.write_bytes(content)
    assert load(path).config == saved[0].config


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    for raw in (path.read_bytes(), b"", "no checkpoint, grün".encode(), bytes(range(256)) * 40):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load(path)
    whole: dict[str, Any] = {name: {} for name in ("weights", "config", "record", "provenance", "resume")}
    specs = ({"format": FORMAT, "spec": spec, **whole} for spec in ({"arch": "vit"}, "vit"))
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(3), {"format": FORMAT, "spec": {}, "weights": {}}, *specs):
        write(content, path)
        with pytest.raises(UserError, match="is not a checkpoint of fer_dist"):
            load(path)


def test_another_format_is_refused(saved: tuple[Checkpoint, Path]) -> None:
    content = torch.load(saved[1], weights_only=True)
    for number in (FORMAT + 1, None, "1"):
        write({**content, "format": number}, saved[1])
        with pytest.raises(UserError, match=f"has format {number}, this version reads {FORMAT}"):
            load(saved[1])
