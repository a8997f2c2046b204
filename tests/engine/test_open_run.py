"""A run folder is named, made once, found again by a restart, and written by one process at a time."""

import errno
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fer_dist.config import Config
from fer_dist.engine import rundir
from fer_dist.engine.rundir import Hold, open_run
from fer_dist.errors import UserError
from fer_dist.world import World
from tests.helpers.small_runs import tiny

FIRST, AGAIN = World(launch="one"), World(launch="one", restarted=True)
"""The first start of a launch, and a restart by its launcher."""


def settings(folder: Path, **values: Any) -> Config:
    return tiny("vit", folder, **values)


def test_the_name_is_the_given_one_or_the_architecture_and_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under runs/ in the working directory by default; runs of the same second are numbered."""
    monkeypatch.chdir(tmp_path)
    for resume in ("restart", "auto"):
        config = Config().override({"run.name": resume, "run.resume": resume})
        assert open_run(config, World()) == (Path("runs") / resume, False)
        assert (tmp_path / "runs" / resume).is_dir()
    folder, resumes = open_run(settings(tmp_path, model__arch="timm:vit_tiny_patch16_224"), World())
    assert re.fullmatch(r"timm-vit_tiny_patch16_224-\d{8}-\d{6}", folder.name)
    assert (folder.parent, resumes) == (tmp_path, False)
    monkeypatch.setattr(rundir.time, "strftime", lambda form: "-20260102-030405")  # type: ignore[attr-defined]
    names = [open_run(settings(tmp_path), World())[0].name for _ in range(3)]
    assert names == ["vit-20260102-030405", "vit-20260102-030405-1", "vit-20260102-030405-2"]


def test_an_existing_folder_or_file_is_refused(tmp_path: Path) -> None:
    """An empty folder, too; in the first start of a launch and in a restart of it."""
    (tmp_path / "mine").mkdir()
    for world in (World(), FIRST, AGAIN):
        with pytest.raises(UserError, match="exists; a run is never overwritten") as caught:
            open_run(settings(tmp_path, run__name="mine"), world)
        assert "--run.resume auto" in caught.value.fix
    assert list((tmp_path / "mine").iterdir()) == []
    (tmp_path / "runs").write_text("")
    for name in ("mine", None):
        with pytest.raises(UserError, match=r"cannot make the run folder .*Not a directory"):
            open_run(settings(tmp_path / "runs", run__name=name), World())


# -- the launcher starts it again


@pytest.mark.parametrize("name", [None, "mine", "deep/mine"])
def test_a_restart_finds_its_folder(tmp_path: Path, name: str | None) -> None:
    """Of several runs of its launch the newest by the clock, not by name, which begins with the architecture."""
    config = settings(tmp_path, run__name=name)
    made = [open_run(settings(tmp_path), world) for world in (FIRST, World(), World(launch="two"))]
    os.utime(made[0][0] / "launch.json", (1, 1))
    made.append(open_run(config.override({"model.arch": "patt_lite"}), FIRST))
    assert len({folder for folder, _ in made}) == 4
    assert not any(resumes for _, resumes in made)
    open_run(settings(tmp_path, run__name="zz-later"), World(launch="two"))
    assert open_run(config, AGAIN) == (made[-1][0], True)


def test_a_requeued_slurm_job_finds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number and the settings, except places and `run.*`; the launch of torchrun is another one then."""
    monkeypatch.setenv("SLURM_JOB_ID", "33")
    made = {seed: open_run(settings(tmp_path, seed=seed), World(launch=f"first {seed}"))[0] for seed in (1, 2)}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for seed, folder in made.items():
        again = settings(tmp_path, seed=seed, run__timeout_seconds=7.0, data__cache_dir="elsewhere")
        for restarted in (False, True):
            assert open_run(again, World(launch="new", restarted=restarted)) == (folder, True)
    assert open_run(settings(tmp_path, seed=3), World(launch="third"))[1] is False
    monkeypatch.setenv("SLURM_JOB_ID", "34")
    assert open_run(settings(tmp_path, seed=1), World(launch="new"))[1] is False


def test_a_start_that_ends_while_it_makes_its_folder_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next start would find a folder that no launch has made, and refuse it."""
    for name in (None, "mine"):
        config = settings(tmp_path / "runs", run__name=name)
        with mock.patch.object(rundir, "write_json", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            open_run(config, FIRST)
        assert list((tmp_path / "runs").iterdir()) == []
    if (child := os.fork()) == 0:  # SIGKILL leaves a temporary folder, which is not in the way
        monkeypatch.setattr(rundir, "write_json", lambda path, content: os.kill(os.getpid(), signal.SIGKILL))
        open_run(config, FIRST)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "runs" / "mine").exists()
    assert open_run(config, AGAIN) == (tmp_path / "runs" / "mine", False)


def test_a_damaged_launch_json_belongs_to_no_launch(tmp_path: Path) -> None:
    for i, content in enumerate(("", "[1]", "{", '{"launch": 3}', '{"slurm": null}')):
        config = settings(tmp_path / str(i))
        first, _ = open_run(config, FIRST)
        (first / "launch.json").write_text(content)
        assert open_run(config, AGAIN)[1] is False, content


# -- one writer


def test_a_folder_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits, and gives up; longer after a requeue: NFS keeps the lock of a dead node for a while."""
    monkeypatch.setattr(rundir, "HOLD_S", 0.2)
    held = Hold(tmp_path)
    with pytest.raises(UserError, match=rf"another process writes into {tmp_path} and has not left within 0 s"):
        Hold(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    timer = threading.Timer(0.5, held.release)
    timer.start()
    Hold(tmp_path).release()
    timer.join()


def test_a_file_system_without_locks_is_used_without(tmp_path: Path) -> None:
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOTSUP, "Operation not supported")):
        Hold(tmp_path).release()
