"""Damaged checkpoints are left out with a word, the newest valid one is used; a full disk costs nothing saved."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fer_dist.engine.checkpoint import Checkpoint, load
from fer_dist.engine.history import newest, save_step, step_files
from fer_dist.engine.trainer import fit
from fer_dist.errors import EXIT_USER_ERROR, UserError
from tests.engine.test_checkpoint import make
from tests.helpers.fault_runs import SAVE_EVERY, Crash, Ledger, breaking, run_whole
from tests.helpers.processes import ROOT
from tests.helpers.small_runs import everything, no_pictures, same, starts, stateful


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is gone at step 14: checkpoints of step 8 and 12."""
    config = stateful("patt_lite", tmp_path_factory.mktemp("broken"))
    with breaking(14, "crash", Ledger()), pytest.raises(Crash):
        fit(config)
    folder = Path(config.run.dir) / "run"
    assert [path.name for path in step_files(folder)] == ["step-00000012.pth", "step-00000008.pth"]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = run_whole(stateful("patt_lite", tmp_path_factory.mktemp("whole")))[0].folder
    return everything(folder / "last.pth")


def copied(folder: Path, to: Path) -> Path:
    """A run folder with last.pth as a second name again, not a second file."""
    shutil.copytree(folder, to / "run")
    (to / "run" / "last.pth").unlink()
    os.link(step_files(to / "run")[0], to / "run" / "last.pth")
    return to / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "zero length": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros at its end": lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_valid_one_is_used_and_the_others_are_told(
    damage: str, broken: Path, whole: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(broken, tmp_path)
    bad = step_files(folder)[0]
    DAMAGE[damage](bad)
    result, _ = run_whole(stateful("patt_lite", tmp_path, run__progress="plain"))
    assert f"resume: left out, {bad} is damaged or not a checkpoint: " in capsys.readouterr().out
    second = starts(folder)[1]
    assert (second["from"], second["step"]) == ("step-00000008.pth", 8)
    assert [name for name, _ in second["left_out"]] == ["step-00000012.pth"]
    assert same(everything(result.folder / "last.pth"), whole)
    for path in step_files(folder):
        load(path)


def test_a_missing_one_has_a_second_name(broken: Path, tmp_path: Path) -> None:
    """The newest is gone; last.pth is the same file, and newer than the other."""
    folder = copied(broken, tmp_path)
    step_files(folder)[0].unlink()
    found = newest(folder)
    assert found.path == folder / "last.pth"
    assert found.checkpoint
    assert found.checkpoint.resume["step"] == 12
    (folder / "last.pth").unlink()
    assert newest(folder).path == folder / "checkpoints" / "step-00000008.pth"
    shutil.rmtree(folder / "checkpoints")
    assert newest(folder).path is None


def test_only_last_pth_was_copied(broken: Path, tmp_path: Path) -> None:
    shutil.copy(broken / "last.pth", tmp_path / "last.pth")
    assert newest(tmp_path).path == tmp_path / "last.pth"


@pytest.mark.parametrize("part", range(16))
def test_cut_at_each_sixteenth(part: int, broken: Path, tmp_path: Path) -> None:
    folder = copied(broken, tmp_path)
    bad = step_files(folder)[0]
    os.truncate(bad, bad.stat().st_size * part // 16)
    found = newest(folder)
    assert found.path == folder / "checkpoints" / "step-00000008.pth"
    ((path, why),) = found.refused
    assert path == bad
    assert "there is no checksum at its end: it was cut off, or something else wrote it" in why


def test_if_none_is_valid_nothing_is_begun(broken: Path, tmp_path: Path) -> None:
    folder = copied(broken, tmp_path)
    for path in step_files(folder):
        flip(path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=r"none of the 2 checkpoints of .* can be read; .*its checksum differs"):
        run_whole(stateful("patt_lite", tmp_path))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_weights_alone_are_nothing_to_go_on_from(broken: Path, tmp_path: Path) -> None:
    folder = copied(broken, tmp_path)
    shutil.copy(folder / "best.pth", folder / "checkpoints" / "step-00000020.pth")
    found = newest(folder)
    assert [why.split(" holds ")[1] for _, why in found.refused] == ["weights only, nothing to go on from"]
    assert found.path == folder / "checkpoints" / "step-00000012.pth"


# -- how many stay


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep_bounds_how_many_stay(keep: int, tmp_path: Path) -> None:
    with no_pictures():
        folder = fit(stateful("vit", tmp_path, run__keep=keep)).folder
    steps = [24 - SAVE_EVERY * i for i in range(keep)]
    assert [path.name for path in step_files(folder)] == [f"step-{step:08d}.pth" for step in steps]
    assert (folder / "last.pth").samefile(step_files(folder)[0])


def test_there_is_always_a_valid_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before and after each call that changes the folder, from the first save on."""
    seen: list[int] = []
    watching = False

    def look() -> None:
        nonlocal watching
        if not watching or not step_files(tmp_path):
            return
        watching = False
        found = newest(tmp_path).checkpoint
        assert found
        seen.append(int(found.resume["step"]))
        watching = True

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            look()
            result = function(*arguments, **keywords)
            look()
            return result

        return call

    for target, name in ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (os, "link"), (os, "fsync")):
        monkeypatch.setattr(target, name, watched(getattr(target, name)))
    for keep in (1, 2):
        for step in range(1, 6):
            watching = True
            save_step(tmp_path, resumable(step), step, keep)
            assert newest(tmp_path).path == tmp_path / "checkpoints" / f"step-{step:08d}.pth"
    assert len(seen) > 50


def resumable(step: int) -> Checkpoint:
    made = make(step)
    return Checkpoint(**{**made.__dict__, "resume": {**made.resume, "step": step}})


def test_without_hard_links_last_pth_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    for step in (1, 2):
        path = save_step(tmp_path, resumable(step), step, 2)
        assert (tmp_path / "last.pth").read_bytes() == path.read_bytes()
        assert not (tmp_path / "last.pth").samefile(path)
    assert newest(tmp_path).path == path


def test_a_damaged_newer_one_goes_with_the_next_save(tmp_path: Path) -> None:
    """Resumed before it, the run would otherwise keep it as its newest for ever."""
    for step in (10, 20):
        save_step(tmp_path, resumable(step), step, 2)
    flip(tmp_path / "checkpoints" / "step-00000020.pth")
    save_step(tmp_path, resumable(15), 15, 2)
    assert [path.name for path in step_files(tmp_path)] == ["step-00000015.pth", "step-00000010.pth"]
    assert newest(tmp_path).refused == ()


# -- the disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_disk_that_fails_leaves_the_last_checkpoint(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    """A file system of 3 MB, which root can mount here and there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The demo's model, small, with all that a run writes, as a person starts it."""
    line = [sys.executable, "-m", "fer_dist.train", "--run.dir", str(folder), "--run.name", "run"]
    line += ["--run.resume", "auto", "--data.embedded_train", "140", "--data.embedded_val", "28"]
    line += ["--train.device", "cpu", "--model.options", "{cut: 5, width_mult: 0.25, channels: 32}", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_full_disk_ends_the_run_with_an_error_and_space_lets_it_go_on(small_disk: Path) -> None:
    """A real one: whatever file it is that does not fit any more."""
    first = command(small_disk, "--train.epochs", "6", "--run.keep", "50", "--train.save_every_steps", "1")
    assert first.returncode == EXIT_USER_ERROR, first.stderr
    assert "No space left on device" in first.stderr
    assert first.stderr.count("error: ") == 1
    assert "Traceback" not in first.stderr
    kept = newest(small_disk / "run")
    assert kept.path
    assert kept.refused == ()
    assert not list((small_disk / "run").rglob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = command(small_disk, "--train.epochs", "6")
    assert again.returncode == 0, again.stderr
    assert f"resume: {kept.path}" in again.stdout


def test_a_read_only_disk(small_disk: Path) -> None:
    assert command(small_disk, "--train.epochs", "1").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = command(small_disk, "--train.epochs", "2")
    assert done.returncode == EXIT_USER_ERROR
    assert "Read-only file system" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert newest(small_disk / "run").checkpoint
