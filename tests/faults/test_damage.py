"""Damaged checkpoints are left out with a message, the newest valid one is used; a full disk costs nothing saved."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fer_dist.engine.checkpoint import Checkpoint, load
from fer_dist.engine.history import newest, save_step, step_files
from fer_dist.engine.trainer import fit
from fer_dist.errors import EXIT_USER_ERROR, UserError
from tests.helpers.fault_runs import Crash, Ledger, breaking, run_whole
from tests.helpers.processes import Done, python
from tests.helpers.small_runs import everything, same, starts, stateful
from tests.helpers.tiny_models import tiny_model


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder, the newest first."""
    return [int(path.stem.removeprefix("step-")) for path in step_files(folder)]


SMALL = {"data__embedded_train": 64, "train__global_batch": 8}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at step 14: checkpoints of step 8 and 12."""
    config = stateful("patt_lite", tmp_path_factory.mktemp("broken"), **SMALL)
    with breaking(14, "crash", Ledger()), pytest.raises(Crash):
        fit(config)
    folder = Path(config.run.dir) / "run"
    assert steps(folder) == [12, 8]
    return folder


@pytest.fixture
def folder(broken: Path, tmp_path: Path) -> Path:
    """A copy of it with last.pth as a second name again, not a second file."""
    shutil.copytree(broken, tmp_path / "run")
    (tmp_path / "run" / "last.pth").unlink()
    os.link(step_files(tmp_path / "run")[0], tmp_path / "run" / "last.pth")
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_a_run_resumes_from_the_newest_valid_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends as an unbroken one; `run.keep` says how many checkpoints stay."""
    bad = step_files(folder)[0]
    flip(bad)
    result, _ = run_whole(stateful("patt_lite", tmp_path, run__progress="plain", **SMALL))
    assert f"resume: left out, {bad} is damaged or not a checkpoint: " in capsys.readouterr().out
    second = starts(folder)[1]
    assert (second["from"], second["step"]) == ("step-00000008.pth", 8)
    assert [name for name, _ in second["left_out"]] == ["step-00000012.pth"]
    whole, _ = run_whole(stateful("patt_lite", tmp_path / "whole", run__keep=3, **SMALL))
    assert same(everything(result.folder / "last.pth"), everything(whole.folder / "last.pth"))
    assert (steps(folder), steps(whole.folder)) == ([24, 20], [24, 20, 16])
    for path in step_files(folder):
        load(path)


CUT = "there is no checksum at its end: it was cut off, or something else wrote it"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip, "its checksum differs: bytes have changed"),
    "zero length": (lambda path: path.write_bytes(b""), CUT),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), CUT),
    "all but a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), CUT),
    "zeros at its end": (lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)), CUT),
    "weights alone": (
        lambda path: shutil.copy(path.parents[1] / "best.pth", path),
        "holds weights only, nothing to go on from",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_left_out_with_the_reason(damage: str, folder: Path) -> None:
    bad = step_files(folder)[0]
    spoil, reason = DAMAGE[damage]
    spoil(bad)
    found = newest(folder)
    assert found.path == folder / "checkpoints" / "step-00000008.pth"
    ((path, why),) = found.refused
    assert path == bad
    assert reason in why


def test_a_missing_one_has_a_second_name(folder: Path, tmp_path: Path) -> None:
    """The newest is gone; last.pth is the same file, and newer than the other."""
    shutil.copy(folder / "last.pth", tmp_path / "last.pth")
    assert newest(tmp_path).path == tmp_path / "last.pth", "only last.pth was copied"
    step_files(folder)[0].unlink()
    found = newest(folder)
    assert found.path == folder / "last.pth"
    assert found.checkpoint
    assert found.checkpoint.resume["step"] == 12
    (folder / "last.pth").unlink()
    assert newest(folder).path == folder / "checkpoints" / "step-00000008.pth"
    shutil.rmtree(folder / "checkpoints")
    assert newest(folder).path is None


def test_nothing_is_begun_where_none_is_valid(folder: Path, tmp_path: Path) -> None:
    for path in step_files(folder):
        flip(path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=r"none of the 2 checkpoints of .* can be read; .*its checksum differs"):
        run_whole(stateful("patt_lite", tmp_path, **SMALL))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# -- saving


def resumable(step: int) -> Checkpoint:
    spec = tiny_model("patt_lite").spec
    weights = {"x": torch.full((1000,), float(step))}
    return Checkpoint(spec=spec, weights=weights, config={}, record={}, provenance={}, resume={"step": step})


def test_there_is_always_a_valid_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each call that changes the folder, from the first save on, and at the end of each save."""
    seen: list[int] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if step_files(tmp_path):
                found = newest(tmp_path).checkpoint
                assert found
                seen.append(int(found.resume["step"]))
            return function(*arguments, **keywords)

        return call

    for target, name in ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (os, "link"), (os, "fsync")):
        monkeypatch.setattr(target, name, watched(getattr(target, name)))
    for keep in (1, 2):
        for step in range(1, 6):
            path = save_step(tmp_path, resumable(step), step, keep)
            assert newest(tmp_path).path == path == tmp_path / "checkpoints" / f"step-{step:08d}.pth"
            assert steps(tmp_path) == list(range(step, max(step - keep, 0), -1))
            assert (tmp_path / "last.pth").samefile(path)
    assert len(seen) > 25


def test_last_pth_is_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    for step in (1, 2):
        path = save_step(tmp_path, resumable(step), step, 2)
        assert (tmp_path / "last.pth").read_bytes() == path.read_bytes()
        assert not (tmp_path / "last.pth").samefile(path)
    assert newest(tmp_path).path == path


def test_the_next_save_removes_a_damaged_newer_one(tmp_path: Path) -> None:
    """Resumed before it, the run would otherwise keep it as its newest for ever."""
    for step in (10, 20):
        save_step(tmp_path, resumable(step), step, 2)
    flip(tmp_path / "checkpoints" / "step-00000020.pth")
    save_step(tmp_path, resumable(15), 15, 2)
    assert steps(tmp_path) == [15, 10]
    assert newest(tmp_path).refused == ()


# -- the disk

FAILURES = [("fsync", errno.ENOSPC), ("replace", errno.EDQUOT), ("open", errno.EROFS), ("fsync", errno.EIO)]


@pytest.mark.parametrize(("call", "number"), FAILURES)
def test_a_disk_that_fails_leaves_the_last_checkpoint(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, over quota, read-only, broken: at the beginning, at the end and at the renaming of a save."""
    save_step(tmp_path, resumable(1), 1, 1)
    content = {path: path.read_bytes() for path in tmp_path.rglob("*.pth")}

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, fail)
        with pytest.raises(UserError, match=f"cannot write .*step-00000002.pth: {os.strerror(number)}") as caught:
            save_step(tmp_path, resumable(2), 2, 1)
    assert "what was saved before is intact" in caught.value.problem
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content
    assert newest(tmp_path).path == tmp_path / "checkpoints" / "step-00000001.pth"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system for four checkpoints and the plots, so that the fifth does not fit; only root can mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def train(folder: Path, epochs: int, *words: str) -> Done:
    """Train the demo's model, small, as a person starts it."""
    line = ["-m", "fer_dist.train", "--run.dir", str(folder), "--run.name", "run", "--run.resume", "auto"]
    line += ["--data.embedded_train", "140", "--data.embedded_val", "28", "--train.epochs", str(epochs)]
    line += ["--train.device", "cpu", "--model.options", "{cut: 5, width_mult: 0.25, channels: 32}"]
    return python(*line, "--run.tensorboard", "false", *words)


def test_a_full_or_read_only_disk_ends_the_run_and_space_lets_it_resume(small_disk: Path) -> None:
    """A real one: whatever file it is that does not fit any more."""
    first = train(small_disk, 6, "--run.keep", "50", "--train.save_every_steps", "1")
    kept = newest(small_disk / "run")
    assert kept.path
    assert kept.refused == ()
    assert not list((small_disk / "run").rglob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,ro,size=64m", str(small_disk)], check=True)
    second = train(small_disk, 6)
    for done, message in ((first, "No space left on device"), (second, "Read-only file system")):
        assert done.code == EXIT_USER_ERROR, done.err
        assert message in done.err
        assert done.err.count("error: ") == 1
        assert "Traceback" not in done.err
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert f"resume: {kept.path}" in train(small_disk, 1).ok().out
