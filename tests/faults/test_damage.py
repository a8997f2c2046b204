"""Damaged checkpoints are left out with a message, the newest valid one is used; a full disk costs nothing saved."""

import errno
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fer_dist.engine.checkpoint import Checkpoint, load, save
from fer_dist.engine.history import newest, save_step, step_files
from fer_dist.engine.trainer import fit
from fer_dist.errors import EXIT_USER_ERROR, UserError
from tests.helpers.fault_runs import Crash, Ledger, breaking, run_whole
from tests.helpers.processes import Done, python
from tests.helpers.small_runs import starts, stateful
from tests.helpers.tiny_models import tiny_model


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder, the newest first."""
    return [int(path.stem.removeprefix("step-")) for path in step_files(folder)]


def flip(path: Path) -> None:
    """Change a bit of a file, or change it back."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_a_run_resumes_from_the_newest_valid_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is begun where none is valid."""
    small = {"data__embedded_train": 64, "train__global_batch": 8, "train__epochs": 2, "run__keep": 3}
    config, folder = stateful("vit", tmp_path, run__progress="plain", **small), tmp_path / "run"
    with breaking(14, "crash", Ledger()), pytest.raises(Crash):
        fit(config)
    files = step_files(folder)
    assert steps(folder) == [12, 8, 4]
    for path in files:
        flip(path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=r"none of the 3 checkpoints of .* can be read; .*its checksum differs"):
        run_whole(config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    flip(files[1])
    run_whole(config)
    assert f"resume: left out, {files[0]} is damaged or not a checkpoint: " in capsys.readouterr().out
    second = starts(folder)[1]
    assert (second["from"], second["step"]) == ("step-00000008.pth", 8)
    assert [name for name, _ in second["left_out"]] == ["step-00000012.pth"]
    assert steps(folder) == [16, 12, 8]
    assert newest(folder).refused == ()


def resumable(step: int) -> Checkpoint:
    spec = tiny_model("patt_lite").spec
    weights = {"x": torch.full((1000,), float(step))}
    return Checkpoint(spec=spec, weights=weights, config={}, record={}, provenance={}, resume={"step": step})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with checkpoints of step 1 and 2."""
    for step in (1, 2):
        save_step(tmp_path, resumable(step), step, 2)
    return tmp_path


def test_a_damaged_one_is_left_out_with_the_reason(folder: Path) -> None:
    bad, good = step_files(folder)
    content = bad.read_bytes()
    save(folder / "best.pth", replace(resumable(3), resume={}))
    cut = "there is no checksum at its end: it was cut off, or something else wrote it"
    for damaged, reason in (
        ((folder / "best.pth").read_bytes(), "holds weights only, nothing to go on from"),
        (b"", cut),
        (content[: len(content) // 2], cut),
        (content[:-1], cut),
        (content[:-4096] + bytes(4096), cut),
        (content[:999] + b"x" + content[1000:], "its checksum differs: bytes have changed"),
    ):
        bad.write_bytes(damaged)
        found = newest(folder)
        assert (found.path, found.refused[0][0], len(found.refused)) == (good, bad, 1)
        assert reason in found.refused[0][1]


def test_a_missing_one_has_a_second_name(folder: Path) -> None:
    """The newest is gone; last.pth is the same file, and newer than the other."""
    bad, good = step_files(folder)
    bad.unlink()
    assert newest(folder).path == folder / "last.pth"
    assert load(folder / "last.pth").resume["step"] == 2
    good.unlink()
    assert newest(folder).path == folder / "last.pth", "as in a folder to which only last.pth was copied"
    (folder / "last.pth").unlink()
    assert newest(folder).path is None


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


def test_last_pth_is_a_copy_where_there_are_no_hard_links(folder: Path) -> None:
    with mock.patch.object(os, "link", side_effect=OSError(errno.ENOTSUP, "Operation not supported")):
        path = save_step(folder, resumable(3), 3, 2)
    assert (folder / "last.pth").read_bytes() == path.read_bytes()
    assert not (folder / "last.pth").samefile(path)
    assert newest(folder).path == path


def test_the_next_save_removes_a_damaged_newer_one(folder: Path) -> None:
    """Resumed before it, the run would otherwise keep it as its newest for ever."""
    save_step(folder, resumable(20), 20, 2)
    flip(folder / "checkpoints" / "step-00000020.pth")
    save_step(folder, resumable(15), 15, 2)
    assert steps(folder) == [15, 2]
    assert newest(folder).refused == ()


# -- the disk


@pytest.mark.parametrize(("target", "call"), [(os, "fsync"), (Path, "replace"), (Path, "open")])
def test_a_disk_that_fails_leaves_the_last_checkpoint(target: Any, call: str, folder: Path) -> None:
    """At the end, at the renaming and at the beginning of a save."""
    content = {path: path.read_bytes() for path in folder.rglob("*.pth")}
    message = "cannot write .*step-00000003.pth: Disk quota exceeded; what was saved before is intact"
    with mock.patch.object(target, call, side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")):  # noqa: SIM117
        with pytest.raises(UserError, match=message):
            save_step(folder, resumable(3), 3, 1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == content


def train(folder: Path, epochs: int, *words: str) -> Done:
    """Train the demo's model, small, as a person starts it."""
    line = ["-m", "fer_dist.train", "--run.dir", str(folder), "--run.name", "run", "--run.resume", "auto"]
    line += ["--data.embedded_train", "140", "--data.embedded_val", "28", "--train.epochs", str(epochs)]
    line += ["--train.device", "cpu", "--model.options", "{cut: 5, width_mult: 0.25, channels: 32}"]
    return python(*line, "--run.tensorboard", "false", *words)


def test_a_full_or_read_only_disk_ends_the_run_and_space_lets_it_resume(tmp_path: Path) -> None:
    """A file system for four checkpoints and the plots, so that the fifth does not fit; only root can mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        first = train(tmp_path, 6, "--run.keep", "50", "--train.save_every_steps", "1")
        kept = newest(tmp_path / "run")
        assert kept.path
        assert kept.refused == ()
        assert not list((tmp_path / "run").rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,ro,size=64m", str(tmp_path)], check=True)
        second = train(tmp_path, 6)
        for done, message in ((first, "No space left on device"), (second, "Read-only file system")):
            assert done.code == EXIT_USER_ERROR, done.err
            assert message in done.err
            assert done.err.count("error: ") == 1
            assert "Traceback" not in done.err
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path)], check=True)
        assert f"resume: {kept.path}" in train(tmp_path, 1).ok().out
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)
