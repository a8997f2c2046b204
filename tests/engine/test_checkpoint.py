"""Checkpoints: whole or not at all on disk, tensors and plain values only, and damage is always noticed."""

import errno
import hashlib
import json
import math
import os
import resource
import stat
import zipfile
from contextlib import nullcontext
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


def make() -> Checkpoint:
    model = tiny_model("patt_lite")
    return Checkpoint(
        spec=model.spec,
        weights=model.state_dict(),
        config={"seed": 0, "train": {"epochs": 2}, "data": {"path": None}},
        record={"epoch": 1, "val": {"accuracy": 0.5}},
        provenance={"commit": "abc", "world_size": 4},
        resume={"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Save a checkpoint of a tiny network; the only file of its folder."""
    save(tmp_path / "best.pth", make())
    return tmp_path / "best.pth"


# -- writing


def test_a_checkpoint_is_read_as_it_was_written(path: Path) -> None:
    made, back = make(), load(path)
    for name in ("spec", "config", "record", "provenance", "resume"):
        assert getattr(back, name) == getattr(made, name), name
    assert back.weights.keys() == made.weights.keys()
    assert all(torch.equal(back.weights[name], made.weights[name]) for name in made.weights)
    with torch.inference_mode():
        assert torch.equal(back.model()(pictures(2)), tiny_model("patt_lite").eval()(pictures(2)))
    assert not back.model().training


def test_the_file_holds_tensors_and_plain_values_only(path: Path) -> None:
    def shape(value: Any) -> list[int]:
        assert type(value) is torch.Tensor
        return list(value.shape)

    content = torch.load(path, weights_only=True)
    assert set(content) == {"format", "spec", "weights", "config", "record", "provenance", "resume"}
    json.dumps(content, default=shape)
    raw = path.read_bytes()
    assert raw.endswith(hashlib.sha256(raw[:-SEAL_BYTES]).hexdigest().encode()), "the checksum of all before it"
    assert zipfile.ZipFile(path).comment == raw[-SEAL_BYTES:], "to other readers it is a comment"


def test_a_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(before) > 150_000
    for size in (0, 100, 100_000):  # the kernel fails in the middle of a write, as on a full disk
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(UserError, match=r"cannot write .*best\.pth: File too large"):
                save(path, make())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for error in (RuntimeError("torch failed"), KeyboardInterrupt()):

        def fail(content: object, file: Any, error: BaseException = error) -> None:
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(type(error)):
            save(path, make())
    assert [other.name for other in path.parent.iterdir()] == ["best.pth"], "a temporary file is left"
    if (child := os.fork()) == 0:  # a process that is killed in the middle of the write
        write_atomically(path, lambda file: os._exit(9) if file.write(b"half") else None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == before


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, then rename, then fsync of the folder."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(handle: int) -> None:
        events.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().name.split('.')[-1]}")
        fsync(handle)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"whole"))
    assert events == ["fsync tmp", "rename to file", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems, and FUSE: the file is written; a disk that fails is reported."""
    fsync = os.fsync

    def without_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", without_folders)
    with pytest.raises(UserError, match="Input/output error") if number == errno.EIO else nullcontext():
        write_atomically(tmp_path / "file", lambda file: file.write(b"whole"))
    assert (tmp_path / "file").read_bytes() == b"whole"


# -- reading


def test_a_path_that_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    """A pipe is not waited for."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        save(tmp_path / "file" / "best.pth", make())
    os.mkfifo(pipe := tmp_path / "last.pth")
    for path, message in (
        (tmp_path / "best.pth", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (pipe, "no regular file"),
    ):
        with pytest.raises(UserError, match=message):
            load(path)
    assert "no regular file" in describe(pipe)["reason"]
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        newest(tmp_path)


def test_a_valid_checksum_does_not_make_a_checkpoint(path: Path) -> None:
    """Anybody can compute it: the content is checked as well."""

    def refuse(other: Any, message: str) -> None:
        with path.open("w+b") as file:
            torch.save(other, file)
            _seal(file)
        with pytest.raises(UserError, match=message):
            load(path)

    content = torch.load(path, weights_only=True)
    for part, name, value in (
        ("weights", "bias", "none"),
        ("weights", 3, torch.zeros(1)),
        ("config", "seed", torch.zeros(1)),
        ("record", "seed", torch.zeros(1)),
        ("provenance", "torch", [torch.zeros(1)]),
        *(("resume", "losses", value) for value in (5, ["x"], [math.inf])),
        *(("resume", "epoch", value) for value in ("x", -1)),
        *(("resume", "best", value) for value in ("x", {"confusion": [[1, 2]], "loss_sum": 1.0, "count": 3})),
        ("resume", "step", math.inf),
        ("resume", "records", [1]),
        ("resume", "schedule", {"scale": "x"}),
        ("resume", "optimizer", None),
    ):
        odd = {**content, part: {**content[part], name: value}}
        refuse(odd, rf"is not a checkpoint of fer_dist: its {part}[\w.]* has another form")
    specs = ({**content, "spec": spec} for spec in ({"arch": "vit"}, "vit"))
    for other in ({"state_dict": {}}, [1, 2], torch.zeros(3), {"format": FORMAT, "spec": {}, "weights": {}}, *specs):
        refuse(other, "is not a checkpoint of fer_dist")
    for number in (FORMAT + 1, None, "1"):
        refuse({**content, "format": number}, f"has format {number}, this version reads {FORMAT}")


def test_a_truncated_or_foreign_file_is_refused(path: Path) -> None:
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    truncated = (content[: int(part * len(content))] for part in (*(i / 16 for i in range(16)), 0.9999))
    for raw in (path.read_bytes(), "a text, grün".encode(), bytes(range(256)) * 40, *truncated):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load(path)


def test_a_changed_bit_is_always_an_error(path: Path) -> None:
    """A bit is flipped at 300 places, head and tail of the file among them: never another exception, never loaded."""
    content, random = path.read_bytes(), np.random.default_rng(0)
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
