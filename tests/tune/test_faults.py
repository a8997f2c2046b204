"""Faults on real Ray: processes of trials, a rank, a node or the search itself die; Ctrl-C; bad data."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.helpers.processes import torchrun
from tests.helpers.ray_search import LOOPBACK, Search
from tune.ledger import Ledger, Trial, records_in
from tune.settings import read

pytestmark = pytest.mark.slow

LONG = ("--data.embedded_train", "280", "--train.epochs", "4", "--model.options.width_mult", "0.25")
RANDOM = ("--searcher", "random", "--scheduler", "none", "--name", "one", *LONG)
THREE = (*RANDOM, "--trials", "3", "--cpus", "2")
TOGETHER = ("--workers-per-trial", "2", "--cpus", "4")
TWO_NODES = """\
import os, sys
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # read at Ray's import
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 128 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node})
second = cluster.add_node(**node)
print("address", cluster.address, second.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start searches in the folder of the test and end what they leave."""
    made: list[Search] = []

    def begin(*words: str, **environment: str) -> Search:
        made.append(Search(tmp_path, *words, **environment))
        return made[-1]

    yield begin
    for search in made:
        search.__exit__()


def trials(folder: Path) -> list[Trial]:
    return Ledger(folder / "tune_runs" / "one").trials()


def results(records: list[dict[str, Any]]) -> list[Any]:
    """Return what does not depend on the clock."""
    return [(record["train_loss"], record["val"]) for record in records]


def outcome(folder: Path) -> list[Any]:
    return [(trial.id, trial.values, trial.status, results(trial.records)) for trial in trials(folder)]


def starts(folder: Path) -> list[int]:
    """Return how often each trial was started."""
    return [len((trial.folder / "starts.jsonl").read_text().splitlines()) for trial in trials(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The three trials of a search without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Search(folder, *THREE) as search:
        search.ok()
    return outcome(folder)


@pytest.mark.parametrize(("how", "group"), [(signal.SIGKILL, False), (signal.SIGINT, True)])
def test_a_search_that_was_ended_is_resumed(
    how: int, group: bool, start: Any, tmp_path: Path, undisturbed: list[Any]
) -> None:
    """The same trials have the same values and, bit for bit, the same results; a terminal signals all processes."""
    search = start(*THREE)
    search.until(lambda printed: "epoch 2/4" in printed)
    (os.killpg if group else os.kill)(search.process.pid, how)
    code = search.wait()
    search.require_no_orphans()
    if how == signal.SIGKILL:
        assert code == -how
    else:
        assert code == 75, search.printed
        assert "of 3 trials have ended" in search.printed
        assert "python -m tune.search --name one --resume goes on" in search.printed
        assert "Traceback" not in search.printed
    assert any(trial.status == "running" for trial in trials(tmp_path))
    again = start("--resume", *(["--trials", "4"] if group else []))
    again.ok()
    again.require_no_orphans()
    assert outcome(tmp_path)[:3] == undisturbed
    assert max(starts(tmp_path)) == 2, "one was resumed"
    assert [trial.id for trial in trials(tmp_path)][3:] == ["004"] * group, "more trials may be requested"
    assert read(tmp_path / "tune_runs" / "one")[0].trials == 3 + group, "and are kept"


def test_the_process_of_a_trial_dies(start: Any, tmp_path: Path, undisturbed: list[Any]) -> None:
    search = start(*THREE)
    search.until(lambda printed: "epoch 2/4" in printed)
    os.kill(search.named("ray::ImplicitFunc")[0], signal.SIGKILL)
    search.ok()
    assert outcome(tmp_path) == undisturbed
    assert "goes on: optim.lr" in search.printed
    assert max(starts(tmp_path)) == 2


def test_a_trial_that_dies_each_time_is_given_up(start: Any, tmp_path: Path) -> None:
    search = start(*RANDOM, "--trials", "2", "--retries", "1", "--concurrent", "1")
    search.until(lambda printed: "trial 001 epoch" in printed)

    def killed(printed: str) -> bool:
        if "001 failed" not in printed and "trial 002" not in printed:
            for pid in search.named("ray::ImplicitFunc"):
                os.kill(pid, signal.SIGKILL)
                time.sleep(1)  # until Ray has noticed
        return "001 failed" in printed

    search.until(killed)
    search.ok()
    first, second = trials(tmp_path)
    assert (first.status, second.status) == ("failed", "finished"), search.printed
    assert first.reason == "its process has died 2 times"


def both_train(printed: str) -> bool:
    return all(f"trial 00{i} epoch 2/4" in printed for i in (1, 2))


def test_a_rank_and_a_leader_die(start: Any, tmp_path: Path) -> None:
    """Of two trials with two ranks, one loses a rank, the other its leader; both end like trainings without a fault."""
    search = start(*RANDOM, "--trials", "2", *TOGETHER)
    search.until(both_train)
    assert search.addresses() <= LOOPBACK, "the ranks of a trial, too"
    ranks = search.named("ray::RayTrainWorker")
    assert len(ranks) == 4, search.processes()
    os.kill(ranks[0], signal.SIGKILL)
    os.kill(search.named("ray::ImplicitFunc")[-1], signal.SIGKILL)
    search.ok()
    search.require_no_orphans()
    assert [trial.status for trial in trials(tmp_path)] == ["finished", "finished"]
    assert max(starts(tmp_path)) >= 2
    for trial in trials(tmp_path):
        again = ("--run.dir", str(tmp_path / "again"), "--run.name", trial.id)
        torchrun(2, "-m", "fer_dist.train", "--config", str(trial.folder / "config.yaml"), *again).ok()
        assert results(records_in(tmp_path / "again" / trial.id)) == results(trial.records)


def test_one_rank_of_a_trial_fails(start: Any, tmp_path: Path) -> None:
    """The other rank waits for it; the trial ends with the error of that rank, and the next one trains."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(BOOM)
    (tmp_path / "space.yaml").write_text("optim.lr: [3.0e-3, 2.0e-2]\n")
    words = ("--space", "space.yaml", "--searcher", "grid", "--scheduler", "none", "--name", "one", "--retries", "0")
    search = start(*words, *TOGETHER, PYTHONPATH=f"{tmp_path / 'hook'}:{ROOT}")
    search.ok()
    found = {trial.values["optim.lr"]: trial for trial in trials(tmp_path)}
    assert (found[0.003].status, found[0.003].reason) == ("failed", "MemoryError: boom on rank 1")
    assert found[0.02].status == "finished", search.printed


def test_a_trial_of_two_ranks_is_stopped_by_the_scheduler(start: Any, tmp_path: Path) -> None:
    """It frees its cores, which the next trial needs."""
    (tmp_path / "space.yaml").write_text("optim.lr: [0.06, 0.03, 1.0e-8]\n")
    words = ("--space", "space.yaml", "--searcher", "grid", "--name", "one", "--reduction", "2")
    search = start(*words, *LONG, "--workers-per-trial", "2", "--cpus", "2", "--train.monitor", "loss")
    search.ok()
    found = trials(tmp_path)
    assert [trial.values["optim.lr"] for trial in found] == [1e-8, 0.06, 0.03], "the order of seed 0"
    assert [trial.status for trial in found] == ["finished", "stopped", "stopped"], search.printed
    for trial in found[1:]:
        assert len(trial.records) == len(records_in(trial.folder)) < 4
        assert trial.reason == f"after epoch {len(trial.records)} of 4"
    assert all((trial.folder / "best.pth").exists() for trial in found)


def test_data_that_a_node_cannot_read(start: Any, tmp_path: Path) -> None:
    search = start("--data", "nowhere.csv")
    assert search.wait() == 2
    assert "nowhere.csv" in search.printed
    assert "Traceback" not in search.printed
    assert not list(tmp_path.glob("tune_runs/*")), "the corrected line can be typed"


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, int]]:
    """Start a Ray cluster of two nodes with one core each: its address, and the raylet of its second node."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", TWO_NODES], text=True, env=environment, **pipes) as process:
        assert process.stdout is not None
        found = next(filter(None, (re.match(r"address (\S+) (\d+)", line) for line in process.stdout)), None)
        assert found is not None, "the cluster has not started"
        yield found[1], int(found[2])
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_two_nodes_and_then_one(two_nodes: tuple[str, int], start: Any, tmp_path: Path) -> None:
    """The data are decoded once, both nodes train at once, and the trial of the dead one ends on the other."""
    address, raylet = two_nodes
    cache = tmp_path / "cache"
    search = start(*RANDOM, "--trials", "3", "--data.cache_dir", str(cache), "--address", address)
    search.until(both_train)
    entries = {path.name: path.stat().st_ino for path in cache.iterdir() if path.is_dir()}
    assert len(entries) == 1
    assert search.addresses() <= LOOPBACK
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    for pid in [raylet, *map(int, children)]:  # all processes of a node die with it
        os.kill(pid, signal.SIGKILL)
    search.ok()
    search.require_no_orphans()
    assert "3 trials, 2 at once" in search.printed, "a core on each node: both train"
    assert search.printed.count("420 pictures are ready") == 2, search.printed
    assert [(trial.status, len(trial.records)) for trial in trials(tmp_path)] == [("finished", 4)] * 3, search.printed
    assert sorted(starts(tmp_path)) == [1, 1, 2], "one trial has lost its node"
    assert {path.name: path.stat().st_ino for path in cache.iterdir() if path.is_dir()} == entries
    again = start("--resume", RAY_ADDRESS=address)
    again.ok()
    assert again.printed.count("pictures are ready") == 1, "the cluster of $RAY_ADDRESS, of which one node is left"
    assert "best: trial" in again.printed
