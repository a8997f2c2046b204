"""A search that joins a cluster of two nodes, one of which dies."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.ray_search import LOOPBACK, Search
from tune.ledger import Ledger

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")


@pytest.fixture
def cluster() -> Iterator[tuple[str, int]]:
    """Its address, and the raylet of its second node."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.ray_two_nodes"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"address (\S+) (\d+)", line):
                yield found[1], int(found[2])
                break
        else:
            pytest.fail("the cluster has not started")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def children(parent: int) -> list[int]:
    """The processes that one has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_two_nodes_and_then_one(cluster: tuple[str, int], tmp_path: Path) -> None:
    """The data are decoded once, both nodes train at once, and what the dead one has begun is ended by the other."""
    address, raylet = cluster
    data = ("--data.cache_dir", str(tmp_path / "cache"), "--data.embedded_train", "700", "--train.epochs", "4")
    words = ("--trials", "3", "--searcher", "random", "--scheduler", "none", "--name", "one", *data)
    search = Search(tmp_path, *words, "--address", address)
    try:
        search.until(
            lambda lines: all(any(f"trial 00{i} epoch 2/4" in line for line in lines) for i in (1, 2)), "both trials"
        )
        entries = {path.name: path.stat().st_ino for path in (tmp_path / "cache").iterdir() if path.is_dir()}
        assert search.addresses() <= LOOPBACK
        for pid in [raylet, *children(raylet)]:  # all that a node that dies takes with it
            os.kill(pid, signal.SIGKILL)
        assert search.wait() == 0, search.printed
        search.require_no_orphans()
        assert "3 trials, 2 at once" in search.printed, "a core on each node: both train"
        assert search.printed.count("840 pictures are ready") == 2, search.printed
        assert len(entries) == 1
        found = Ledger(tmp_path / "tune_runs" / "one").trials()
        assert [(trial.status, len(trial.records)) for trial in found] == [("finished", 4)] * 3, search.printed
        starts = [len((trial.folder / "starts.jsonl").read_text().splitlines()) for trial in found]
        assert sorted(starts) == [1, 1, 2], "one trial has lost its node"
        after = {path.name: path.stat().st_ino for path in (tmp_path / "cache").iterdir() if path.is_dir()}
        assert after == entries
    finally:
        search.close()
    again = Search(tmp_path, "--resume", tiny=False, RAY_ADDRESS=address)
    assert again.wait() == 0, again.printed
    assert again.printed.count("pictures are ready") == 1, "the cluster of $RAY_ADDRESS, of which one node is left"
    assert "best: trial" in again.printed
