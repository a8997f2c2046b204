"""What a search survives: its trials' processes die, a rank dies, it is killed itself, Ctrl-C."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.helpers.ray_search import LOOPBACK, Search
from tune.ledger import Ledger, Trial, records_in
from tune.settings import read

FOUR = ("--trials", "4", "--searcher", "random", "--scheduler", "none", "--name", "one", "--cpus", "2")
LONG = ("--data.embedded_train", "700", "--train.epochs", "4")
SLOW = pytest.mark.slow


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts searches in a folder of the test, and ends what they leave."""
    made: list[Search] = []

    def begin(*words: str, **environment: str) -> Search:
        made.append(Search(tmp_path, *words, tiny="--resume" not in words, **environment))
        return made[-1]

    yield begin
    for search in made:
        search.close()


def trials(folder: Path) -> list[Trial]:
    return Ledger(folder / "tune_runs" / "one").trials()


def outcome(found: list[Trial]) -> list[Any]:
    """What of the trials does not depend on the clock."""
    return [
        (trial.id, trial.values, trial.status, [(record["train_loss"], record["val"]) for record in trial.records])
        for trial in found
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The four trials of a search that nothing has happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    search = Search(folder, *FOUR, *LONG)
    try:
        assert search.wait() == 0, search.printed
        return outcome(trials(folder))
    finally:
        search.close()


def starts(trial: Trial) -> int:
    return len((trial.folder / "starts.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=SLOW), pytest.param(signal.SIGTERM, marks=SLOW)]
)
def test_the_search_itself_is_ended(how: int, start: Any, tmp_path: Path, unbroken: list[Any]) -> None:
    """--resume goes on: the same trials with the same values and, bit for bit, the same results."""
    search = start(*FOUR, *LONG)
    search.until_line("epoch 2/4")
    os.kill(search.process.pid, how)
    code = search.wait()
    search.require_no_orphans()
    if how == signal.SIGKILL:
        assert code == -how
    else:
        assert code == 75, search.printed
        assert "of 4 trials have ended" in search.printed
        assert "python -m tune.search --name one --resume goes on" in search.printed
        assert "Traceback" not in search.printed
    known = trials(tmp_path)
    assert known, "they are in the ledger before they start"
    assert any(trial.status == "running" for trial in known)
    again = start("--resume")
    assert again.wait() == 0, again.printed
    again.require_no_orphans()
    assert outcome(trials(tmp_path)) == unbroken
    assert max(starts(trial) for trial in trials(tmp_path)) == 2, "one has gone on"


def test_ctrl_c_in_a_terminal_reaches_every_process(start: Any, tmp_path: Path, unbroken: list[Any]) -> None:
    search = start(*FOUR, *LONG)
    search.until_line("epoch 2/4")
    os.killpg(search.process.pid, signal.SIGINT)
    assert search.wait() == 75, search.printed
    search.require_no_orphans()
    again = start("--resume", "--trials", "5")
    assert again.wait() == 0, again.printed
    assert outcome(trials(tmp_path))[:4] == unbroken
    assert read(tmp_path / "tune_runs" / "one")[0].trials == 5, "and are kept"
    assert [trial.id for trial in trials(tmp_path)][4:] == ["005"], "more trials may be asked for"


def test_the_process_of_a_trial_dies(start: Any, tmp_path: Path, unbroken: list[Any]) -> None:
    search = start(*FOUR, *LONG)
    search.until_line("epoch 2/4")
    victim = search.named("ray::ImplicitFunc")[0]
    os.kill(victim, signal.SIGKILL)
    assert search.wait() == 0, search.printed
    assert outcome(trials(tmp_path)) == unbroken
    assert "goes on: optim.lr" in search.printed
    assert max(starts(trial) for trial in trials(tmp_path)) == 2


def test_a_trial_that_dies_each_time_is_given_up(start: Any, tmp_path: Path) -> None:
    search = start(*FOUR[2:], *LONG, "--trials", "2", "--retries", "1", "--concurrent", "1")
    done = threading.Event()

    def murder() -> None:
        while not done.is_set() and "001 failed" not in search.printed:
            if "trial 001 epoch" in search.printed and "trial 002" not in search.printed:
                for pid in search.named("ray::ImplicitFunc"):
                    os.kill(pid, signal.SIGKILL)
                    time.sleep(1)
            time.sleep(0.05)

    thread = threading.Thread(target=murder)
    thread.start()
    code = search.wait()
    done.set()
    thread.join()
    assert code == 0, search.printed
    first, second = trials(tmp_path)
    assert (first.status, second.status) == ("failed", "finished"), search.printed
    assert first.reason == "its process has died 2 times"


TOGETHER = ("--workers-per-trial", "2", "--cpus", "4")


@SLOW
def test_a_rank_and_a_leader_die(start: Any, tmp_path: Path) -> None:
    """Two trials of two ranks at once; one loses a rank, the other its leader; both end as if nothing had been."""
    search = start(*FOUR[2:], *LONG, "--trials", "2", *TOGETHER)
    search.until(
        lambda lines: all(any(f"trial 00{i} epoch 2/4" in line for line in lines) for i in (1, 2)), "both trials"
    )
    assert search.addresses() <= LOOPBACK, "the ranks of a trial, too"
    ranks = search.named("ray::RayTrainWorker")
    assert len(ranks) == 4, search.processes()
    os.kill(ranks[0], signal.SIGKILL)
    os.kill(search.named("ray::ImplicitFunc")[-1], signal.SIGKILL)
    assert search.wait() == 0, search.printed
    search.require_no_orphans()
    broken = outcome(trials(tmp_path))
    assert [trial.status for trial in trials(tmp_path)] == ["finished", "finished"]
    assert max(starts(trial) for trial in trials(tmp_path)) >= 2
    (tmp_path / "tune_runs" / "one").rename(tmp_path / "broken")
    again = start(*FOUR[2:], *LONG, "--trials", "2", *TOGETHER)
    assert again.wait() == 0, again.printed
    assert outcome(trials(tmp_path)) == broken


BOOM = """\
import builtins, sys
real = builtins.__import__
def spy(name, *rest, **more):
    found = real(name, *rest, **more)
    trainer = sys.modules.get("fer_dist.engine.trainer")
    if name == "fer_dist.engine.trainer" and not hasattr(trainer, "calm"):
        trainer.calm = trainer.run_epoch
        def run_epoch(run, state):
            if run.world.rank == 1 and state.epoch == 1 and run.config.optim.lr < 0.01:
                raise MemoryError("boom on rank 1")
            return trainer.calm(run, state)
        trainer.run_epoch = run_epoch
    return found
builtins.__import__ = spy
"""


def test_one_rank_of_a_trial_fails(start: Any, tmp_path: Path) -> None:
    """The other one waits for it; the trial ends all the same, with what that rank said, and the next is trained."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(BOOM)
    (tmp_path / "space.yaml").write_text("optim.lr: [3.0e-3, 2.0e-2]\n")
    words = ("--space", "space.yaml", "--searcher", "grid", "--scheduler", "none", "--name", "one", "--retries", "0")
    path = f"{tmp_path / 'hook'}:{ROOT}"
    search = start(*words, "--workers-per-trial", "2", "--cpus", "4", PYTHONPATH=path)
    assert search.wait() == 0, search.printed
    found = {trial.values["optim.lr"]: trial for trial in trials(tmp_path)}
    assert (found[0.003].status, found[0.003].reason) == ("failed", "MemoryError: boom on rank 1")
    assert found[0.02].status == "finished", search.printed


@SLOW
def test_a_trial_of_two_ranks_is_stopped_by_the_scheduler(start: Any, tmp_path: Path) -> None:
    """It frees its place: the next trials need it."""
    (tmp_path / "space.yaml").write_text("optim.lr: [1.0e-8, 3.0e-3, 1.0e-7, 1.0e-6]\n")
    words = ("--space", "space.yaml", "--searcher", "grid", "--name", "one", "--reduction", "2")
    search = start(*words, *LONG, "--workers-per-trial", "2", "--cpus", "2", "--train.monitor", "loss")
    assert search.wait() == 0, search.printed
    found = trials(tmp_path)
    assert len(found) == 4
    stopped = [trial for trial in found if trial.status == "stopped"]
    assert stopped, search.printed
    for trial in stopped:
        assert len(trial.records) == len(records_in(trial.folder)) < 4
        assert trial.reason == f"after epoch {len(trial.records)} of 4"
    assert all((trial.folder / "best.pth").exists() for trial in found)
