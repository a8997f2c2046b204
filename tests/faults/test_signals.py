"""Told to stop: the ranks agree, save after their step and leave with code 75; a lost rank is not waited for."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fer_dist.config import RunConfig
from fer_dist.data.feed import evaluation_batches
from fer_dist.engine import trainer
from fer_dist.engine import watch as watch_module
from fer_dist.engine.checkpoint import load
from fer_dist.engine.trainer import fit
from fer_dist.engine.watch import LAST_STEP_S, Watch, stop_signals
from fer_dist.errors import EXIT_RANK_LOST, EXIT_STOPPED, Stopped, UserError
from fer_dist.world import World
from tests.helpers.fault_runs import FAULT, Crash, launch, unbroken
from tests.helpers.processes import Process, start_by_hand
from tests.helpers.small_runs import no_pictures, stateful
from tests.test_train import TRAIN


def ranks(out: Path, fault: dict[str, Any], settings: dict[str, Any] | None = None) -> list[Process]:
    """Two ranks of the worker without a launcher that would end them."""
    return start_by_hand(2, FAULT, str(out), "patt_lite", json.dumps(settings or {}), json.dumps(fault))


def until(folder: Path, pattern: str) -> None:
    """Wait for a file with something in it."""
    deadline = time.monotonic() + 120
    while not any(path.read_text() for path in folder.glob(pattern)):
        assert time.monotonic() < deadline, f"there is no {pattern}"
        time.sleep(0.01)


def step_of(out: Path) -> int:
    step: int = load(out / "run" / "last.pth").resume["step"]
    return step


def require_stopped(started: list[Process], folder: Path, settings: dict[str, Any] | None = None) -> tuple[int, str]:
    """Both ranks leave with code 75, and the resumed run ends as an unbroken one; return the step and the error."""
    done = [process.wait() for process in started]
    assert [one.code for one in done] == [EXIT_STOPPED, EXIT_STOPPED] == [75, 75]
    assert done[1].err == ""
    step = step_of(folder)
    again = launch(folder, 2, {}, settings=settings, restarts=0)
    again.done.ok()
    assert [start["step"] for start in again.starts] == [0, step]
    assert again.hash == unbroken(2).hash
    return step, done[0].err


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    started = ranks(tmp_path, {"rank": 1, "signal": "SIGTERM", "step": 9, "after_s": 0})
    step, error = require_stopped(started, tmp_path)
    assert 10 <= step <= 12, "the step that was on its way, and the next at the most"
    assert error == (
        f"stopped: SIGTERM after step {step}, which is saved in {tmp_path}/run\n"
        f"  -> the same line with --run.dir {tmp_path} --run.name run --run.resume auto goes on\n"
    )


@pytest.mark.slow
def test_a_second_signal_does_not_disturb_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher, SLURM and a person in a hurry: both ranks get more signals while rank 0 saves."""
    settings = {"train__save_every_steps": None}
    with monkeypatch.context() as patch:
        patch.setenv("SLOW_S", "0.02")
        started = ranks(tmp_path, {"rank": 0, "signal": "SIGTERM", "step": 5, "after_s": 0}, settings)
    until(tmp_path, "fault.jsonl")
    for _ in range(10):
        for process in started:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                process.send(number)
        time.sleep(0.05)
    assert require_stopped(started, tmp_path, settings)[0] in (6, 7)


def test_within_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is broken off, and the steps before it are saved; test_resume.py resumes from such a state."""
    served: list[int] = []

    def batches(*args: Any, **keywords: Any) -> Any:
        for batch in evaluation_batches(*args, **{**keywords, "batch": 10}):
            served.append(len(served))
            if len(served) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(trainer, "evaluation_batches", batches)
    with no_pictures(), pytest.raises(Stopped, match="SIGTERM after step 8"):
        fit(stateful("vit", tmp_path))
    assert len(served) in (3, 4), "the rest of 60 pictures was left out"
    resume = load(tmp_path / "run" / "last.pth").resume
    assert (resume["epoch"], resume["step"], len(resume["losses"])) == (0, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_within_an_evaluation(rank: int, tmp_path: Path) -> None:
    """It leaves its share, the other finishes its own: both stop there, and the evaluation is done again."""
    started = ranks(tmp_path, {"rank": rank, "signal": "SIGTERM", "evaluation": 8})
    assert require_stopped(started, tmp_path)[0] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "min_s", "max_s", "error"),
    [
        ("SIGKILL", 0.0, LAST_STEP_S, "error: rank 0: another rank is gone ("),
        ("SIGSTOP", 0.9 * LAST_STEP_S, LAST_STEP_S + 10, "told to stop, and waiting for another rank for"),
    ],
)
def test_a_lost_rank_is_not_waited_for(name: str, min_s: float, max_s: float, error: str, tmp_path: Path) -> None:
    """Rank 0 gets the signal and leaves without a save. With NCCL a death is silence, too, as after SIGSTOP."""
    started = ranks(tmp_path, {"rank": 1, "signal": name, "step": 9, "after_s": 0})
    until(tmp_path, "fault.jsonl")
    started[0].send(signal.SIGTERM)
    begun = time.monotonic()
    done = started[0].wait()
    assert min_s <= time.monotonic() - begun < max_s
    started[1].send(signal.SIGKILL)
    assert started[1].wait().code == -signal.SIGKILL
    assert done.code == EXIT_RANK_LOST == 69
    assert error in done.err
    assert "Traceback" not in done.err
    assert step_of(tmp_path) == 8


def test_one_process_as_a_person_starts_it(tmp_path: Path) -> None:
    """Ctrl-C in `python -m fer_dist.train`: saved, said how to go on, code 75; and what was said works."""
    words = [*TRAIN, "--data.embedded_train", "1120", "--train.epochs", "2", "--run.dir", str(tmp_path / "runs")]
    process = Process([sys.executable, *words, "--run.progress", "plain"], cwd=tmp_path)
    until(tmp_path, "runs/*/metrics.jsonl")
    process.send(signal.SIGINT)
    done = process.wait()
    assert done.code == EXIT_STOPPED
    (folder,) = (tmp_path / "runs").iterdir()
    advice = done.err.splitlines()[-1].removeprefix("  -> the same line with ").removesuffix(" goes on").split()
    assert advice == ["--run.dir", str(tmp_path / "runs"), "--run.name", folder.name, "--run.resume", "auto"]
    again = Process([sys.executable, *words, *advice], cwd=tmp_path).wait().ok()
    assert f"resume: {folder}/checkpoints/step-" in again.out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]


# -- the watch itself


def test_names_of_signals(tmp_path: Path) -> None:
    assert stop_signals("SIGTERM, usr1,SIGRTMIN") == {15: "SIGTERM", 10: "SIGUSR1", 34: "SIGRTMIN"}
    assert stop_signals("none") == {}
    for names in ("SIGKILL", "SIGSTOP", "SIGTERM,", "15", "TERM;USR1"):
        with pytest.raises(UserError, match=r"run\.stop_signals has .*, expected names of signals that can be caught"):
            fit(stateful("vit", tmp_path, run__stop_signals=names))
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_there_for_the_training_only(tmp_path: Path) -> None:
    """A signal that is ignored stays so: under nohup the end of the terminal must not stop the run."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with Watch(RunConfig(stop_signals="SIGTERM,SIGUSR1,SIGHUP"), World(), tmp_path) as watch:
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
            assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert watch.asked == ""
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            assert watch.asked == "SIGUSR1"
            assert list(watch.over([1, 2])) == [1, 2]
            assert list(watch.over([1, 2], until_asked=True)) == []
        assert {number: signal.getsignal(number) for number in before} == before
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGHUP, hangup)


@pytest.mark.parametrize(
    ("launched", "error", "ignored"), [(True, Stopped, True), (False, Stopped, False), (True, Crash, False)]
)
def test_a_rank_that_was_stopped_is_on_its_way(
    launched: bool, error: type[Exception], ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher sees another rank leave and sends SIGTERM, between the end of the watch and the exit code."""
    monkeypatch.setenv("RANK", "0") if launched else monkeypatch.delenv("RANK", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(error), Watch(RunConfig(stop_signals="SIGTERM"), World(), tmp_path):
            raise error
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_IGN) == ignored
    finally:
        signal.signal(signal.SIGTERM, before)


def test_control_c_again_is_at_once(tmp_path: Path) -> None:
    with Watch(RunConfig(), World(), tmp_path) as watch:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert watch.asked == "SIGINT"
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize(("where", "leaves"), [("steps", True), ("save", False), ("evaluation", False)])
def test_where_a_told_rank_is_in_a_hurry(
    where: str, leaves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step it waits for nobody for long; a save of rank 0, or its own share of an evaluation, takes its time."""
    left: list[str] = []
    monkeypatch.setattr(Watch, "_leave", lambda watch, why: left.append(why))
    monkeypatch.setattr(watch_module, "LAST_STEP_S", 0.2)
    with Watch(RunConfig(), World(size=2), tmp_path) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in watch.over([0]) if where == "evaluation" else watch.steps([0]):
            with watch.saving() if where == "save" else nullcontext():
                time.sleep(1.0)
    assert bool(left) == leaves


def test_outside_of_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    """Ray runs a trial in a thread: there, Python lets nobody install a handler."""

    def inside() -> Any:
        with Watch(RunConfig(), World(), tmp_path):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == signal.getsignal(signal.SIGTERM)
