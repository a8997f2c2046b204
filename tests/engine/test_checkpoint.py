"""Checkpoints: whole or not at all on disk, tensors and plain values only, and honest about damage."""

import errno
import hashlib
import io
import math
import os
import pickle
import resource
import signal
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import BufferedRandom
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
    """Files cannot grow beyond `size` bytes: the kernel's own error in the middle of a write."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def plain(value: Any) -> bool:
    """Whether a value is built of tensors and plain values only."""
    if type(value) is dict:
        return all(type(k) in (str, int) and plain(v) for k, v in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return value is None or type(value) in (torch.Tensor, str, int, float, bool)


# -- writing


def test_it_comes_back_as_it_was(saved: tuple[Checkpoint, Path]) -> None:
    made, path = saved
    back = load(path)
    assert back.spec == made.spec
    assert back.config == made.config
    assert back.record == made.record
    assert back.provenance == made.provenance
    assert back.resume == {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}
    assert back.weights.keys() == made.weights.keys()
    assert all(torch.equal(back.weights[name], made.weights[name]) for name in made.weights)
    with torch.inference_mode():
        original = tiny_model("patt_lite").eval()
        assert torch.equal(back.model()(pictures(2)), original(pictures(2)))
    assert not back.model().training


def test_only_tensors_and_plain_values(saved: tuple[Checkpoint, Path]) -> None:
    content = torch.load(saved[1], weights_only=True)
    assert type(content) is dict
    assert set(content) == {"format", "spec", "weights", "config", "record", "provenance", "resume"}
    weights = content.pop("weights")  # state_dict() makes an OrderedDict
    assert all(type(value) is torch.Tensor for value in weights.values())
    assert plain(content)


def test_nothing_else_is_left_in_the_folder(saved: tuple[Checkpoint, Path]) -> None:
    assert [path.name for path in saved[1].parent.iterdir()] == ["best.pth"]


@pytest.mark.parametrize("size", [0, 100, 10_000, 100_000])
def test_a_full_disk_leaves_the_old_file(saved: tuple[Checkpoint, Path], size: int) -> None:
    path = saved[1]
    before = path.read_bytes()
    assert len(before) > 150_000
    with small_disk(size), pytest.raises(UserError, match=r"cannot write .*best\.pth: File too large"):
        save(path, make(1))
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == ["best.pth"], "no temporary file is left"
    save(path, make(1))
    assert load(path).config["seed"] == 1


@pytest.mark.parametrize("error", [RuntimeError("torch gives up"), KeyboardInterrupt()])
def test_any_other_failure_leaves_the_old_file(
    saved: tuple[Checkpoint, Path], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved[1]
    before = path.read_bytes()

    def fail(content: object, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        save(path, make(1))
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == ["best.pth"]


def test_a_killed_writer_leaves_the_old_file(saved: tuple[Checkpoint, Path]) -> None:
    """A process that dies in the middle of the write, as by power loss or the kernel's hand."""
    path = saved[1]
    before = path.read_bytes()
    child = os.fork()
    if child == 0:

        def half(file: BufferedRandom) -> None:
            file.write(b"half")
            file.flush()
            os._exit(9)

        write_atomically(path, half)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == before
    assert load(path).config["seed"] == 0


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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems, and FUSE: the file is written; a disk that fails is told."""
    fsync = os.fsync

    def without_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", without_folders)
    told = pytest.raises(UserError, match="Input/output error") if number == errno.EIO else nullcontext()
    with told:
        write_atomically(tmp_path / "file", lambda file: file.write(b"whole"))
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        save(tmp_path / "runs" / "best.pth", make(0))


# -- reading


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        load(tmp_path / "best.pth")
    with pytest.raises(UserError, match="Is a directory"):
        load(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.pth")
    with pytest.raises(UserError, match="no regular file"):
        load(tmp_path / "last.pth")
    assert "no regular file" in describe(tmp_path / "last.pth")["reason"]
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        newest(tmp_path)


ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "weights": lambda content: content["weights"].update(bias="none"),
    "names of weights": lambda content: content["weights"].update({3: torch.zeros(1)}),
    "config": lambda content: content["config"].update(seed=torch.zeros(1)),
    "record": lambda content: content["record"].update(epoch=torch.zeros(1)),
    "provenance": lambda content: content["provenance"].update(torch=[torch.zeros(1)]),
    "losses": lambda content: content["resume"].update(losses=5),
    "a loss": lambda content: content["resume"].update(losses=["x"]),
    "an infinite loss": lambda content: content["resume"].update(losses=[math.inf]),
    "step": lambda content: content["resume"].update(step=math.inf),
    "epoch": lambda content: content["resume"].update(epoch="x"),
    "a negative epoch": lambda content: content["resume"].update(epoch=-1),
    "records": lambda content: content["resume"].update(records=[1]),
    "best": lambda content: content["resume"].update(best={"confusion": [[1, 2]], "loss_sum": 1.0, "count": 3}),
    "schedule": lambda content: content["resume"].update(schedule={"scale": "x"}),
    "optimizer": lambda content: content["resume"].update(optimizer=None),
}


@pytest.mark.parametrize("part", ODD)
def test_a_sealed_file_of_another_form(part: str, saved: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    """Anybody can compute the seal: what is in the file is looked at all the same."""
    content = torch.load(saved[1], weights_only=True)
    ODD[part](content)
    path = tmp_path / "odd.pth"
    write(content, path)
    with pytest.raises(UserError, match=r"is not a checkpoint of fer_dist: its [\w.]+ has another form"):
        load(path)
    assert describe(path)["valid"] is False


@pytest.mark.parametrize("part", [*(i / 16 for i in range(16)), 0.9999])
def test_a_truncated_file(saved: tuple[Checkpoint, Path], part: float) -> None:
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match="is damaged or not a checkpoint"):
        load(saved[1])


def test_a_changed_bit_is_always_an_error(saved: tuple[Checkpoint, Path]) -> None:
    """A bit is flipped at 300 places, head and tail of the file among them: never another exception, never loaded."""
    path = saved[1]
    content = path.read_bytes()
    random = np.random.default_rng(0)
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


def test_the_checksum_is_that_of_all_bytes_before_it(saved: tuple[Checkpoint, Path]) -> None:
    content = saved[1].read_bytes()
    assert content.endswith(hashlib.sha256(content[:-SEAL_BYTES]).hexdigest().encode())
    assert zipfile.ZipFile(saved[1]).comment == content[-SEAL_BYTES:], "to other readers it is a comment"


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint", b"PK\x03\x04", b"\x80\x02}q\x00.", "grün".encode(), bytes(range(256)) * 40],
    ids=["empty", "text", "zip head", "pickle", "umlaut", "bytes"],
)
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError):
        load(tmp_path / "x.pth")


def test_a_foreign_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match="is damaged or not a checkpoint"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"weights": {}},
        [1, 2],
        torch.zeros(3),
        {"format": FORMAT, "spec": {}, "weights": {}},
        {
            "format": FORMAT,
            "spec": {"arch": "vit"},
            "weights": {},
            "config": {},
            "record": {},
            "provenance": {},
            "resume": {},
        },
        {"format": FORMAT, "spec": "vit", "weights": {}, "config": {}, "record": {}, "provenance": {}, "resume": {}},
    ],
)
def test_somebody_elses_checkpoint(tmp_path: Path, content: Any) -> None:
    write(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="is not a checkpoint of fer_dist"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("number", [FORMAT + 1, None, "1"])
def test_another_format(saved: tuple[Checkpoint, Path], number: Any) -> None:
    content = torch.load(saved[1], weights_only=True)
    write({**content, "format": number}, saved[1])
    with pytest.raises(UserError, match=f"has format {number}, this version reads {FORMAT}"):
        load(saved[1])


class Hostile:
    """Unpickled by a plain `torch.load`, it would make a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, trace = tmp_path / "x.pth", tmp_path / "trace"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Hostile(trace)))
    else:
        torch.save({"spec": 1, "weights": Hostile(trace)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError):
        load(path)
    assert not trace.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False) if form != "pickle" else pickle.loads(
        path.read_bytes()
    )
    assert trace.exists(), "it was loaded with the guard off, and works: the test means something"


def test_weights_of_another_size(saved: tuple[Checkpoint, Path]) -> None:
    content = torch.load(saved[1], weights_only=True)
    content["spec"]["options"]["channels"] = 16
    write(content, saved[1])
    with pytest.raises(UserError, match="do not fit its own architecture"):
        load(saved[1]).model()


def test_it_is_loaded_with_the_guard_on(saved: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    torch_load = torch.load

    def watched(path: Path, **options: Any) -> Any:
        asked.append(options)
        return torch_load(path, **options)

    monkeypatch.setattr(torch, "load", watched)
    load(saved[1])
    assert asked == [{"map_location": "cpu", "weights_only": True}]
