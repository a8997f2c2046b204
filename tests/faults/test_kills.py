"""Kill any rank at any moment, inside saves too, and require that the restarted run ends as the unbroken one.

The sweep of 100 moments is `pytest -m soak tests/faults/test_kills.py`.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fer_dist.engine.checkpoint import load
from tests.helpers.fault_runs import FAULT, SAVE_EVERY, STEPS, Launch, begin, end, launch, require_equal, unbroken
from tests.helpers.processes import two_agents
from tests.helpers.small_runs import starts, state_hash

pytestmark = pytest.mark.slow


def kill(folder: Path, ranks: int, fault: dict[str, Any], arch: str = "patt_lite") -> None:
    """Launch a run with a SIGKILL, and require that it resumes, does at most one save interval again, and ends equal.

    Each event of a save takes 4 ms, which makes half a second of a save and more.
    """
    broken = launch(folder, ranks, {"signal": "SIGKILL", **fault}, arch=arch, slow_s=0.004)
    broken.done.ok()
    assert len(broken.lines("fault.jsonl")) == 1
    first, second = broken.starts
    assert first["step"] == 0
    assert second["step"] > 0
    assert second["left_out"] == [], "a save that was broken off leaves no damaged checkpoint"
    assert broken.redone() <= SAVE_EVERY
    require_equal(broken, unbroken(ranks, arch))
    assert not list(broken.folder.rglob(".*")), "no temporary file is left"


MOMENTS: dict[str, tuple[Any, ...]] = {
    "a rank in a step": (2, {"rank": 1, "step": 6, "after_s": 0.01}),
    "rank 0 in a step of the last epoch": (2, {"rank": 0, "step": 22, "after_s": 0.0}),
    "rank 0 while it writes": (2, {"rank": 0, "save": 12, "event": 60}),
    "rank 0 before the rename": (2, {"rank": 0, "save": 12, "event": 118}),
    "a rank in the last evaluation, no step left": (2, {"rank": 1, "evaluation": 24}),
    "a rank while rank 0 writes": (2, {"rank": 1, "save": 16, "event": 50}),
    "rank 0 of four after the rename": (4, {"rank": 0, "save": 8, "event": 121}),
    # DDP's groups of gradients: with two ranks any order of adding gives the same bits, with four it does not
    "vit on four ranks": (4, {"rank": 2, "step": 10, "after_s": 0.01}, "vit"),
    "vit_mae on four ranks": (4, {"rank": 2, "step": 10, "after_s": 0.01}, "vit_mae"),
}
"""Name -> number of ranks, fault, architecture."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_like_the_unbroken_one(moment: str, tmp_path: Path) -> None:
    kill(tmp_path, *MOMENTS[moment])


@pytest.mark.parametrize("node", [0, 1])
def test_a_rank_of_another_node_is_killed(node: int, tmp_path: Path) -> None:
    """Two torchruns, as on two nodes, and no name for the run: the one that has lost no rank counts no restart."""
    fault = {"rank": node, "signal": "SIGKILL", "step": 10, "after_s": 0.01}
    words = [FAULT, str(tmp_path), "patt_lite", json.dumps({"run__name": None, "run__resume": "restart"})]
    for agent in two_agents(*words, json.dumps(fault), flags=["--max-restarts=1"]):
        agent.ok()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert [start["step"] for start in starts(folder)] == [0, 8]
    assert state_hash(folder / "last.pth") == unbroken(2).hash


def require_launcher_missed(ended: Launch) -> int:
    """The launcher was killed: its ranks have saved and left. Returns the saved step."""
    assert ended.alive == []
    assert ended.done.code == -signal.SIGKILL
    assert "the end of its launcher after step" in ended.done.err
    step: int = load(ended.folder / "last.pth").resume["step"]
    assert 0 < step < STEPS
    return step


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    """torchrun itself dies; the same line again resumes the run."""
    process = begin(tmp_path, 2, {}, slow_s=0.004)
    deadline = time.monotonic() + 120
    while not (tmp_path / "saves.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send(signal.SIGKILL)
    saved = require_launcher_missed(end(tmp_path, process))
    again = launch(tmp_path, 2, {})
    again.done.ok()
    assert [start["step"] for start in again.starts] == [0, saved]
    assert again.hash == unbroken(2).hash


def test_a_launcher_that_dies_before_the_first_step_is_missed_too(tmp_path: Path) -> None:
    """While data are read, or the ranks wait for each other: they do not train on for nobody."""
    ended = launch(tmp_path, 2, {"rank": 9, "launcher": 2})
    require_launcher_missed(ended)
    assert not (ended.folder / "best.pth").exists()


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 4])
def test_sweep(ranks: int, tmp_path: Path) -> None:
    """Kill at 50 seeded moments after the first save, every third inside of a save."""
    random = np.random.default_rng(ranks)
    for i in range(int(os.environ.get("SOAK_KILLS", "50"))):
        fault: dict[str, Any] = {"rank": int(random.integers(ranks))}
        if i % 3 == 0:
            fault |= {"save": int(random.integers(2, 6)) * SAVE_EVERY, "event": int(random.integers(124))}
        else:
            fault |= {"step": int(random.integers(SAVE_EVERY, STEPS - 1)), "after_s": float(random.uniform(0, 0.08))}
        print(f"\n{ranks} ranks, moment {i}: {fault}", flush=True)
        kill(tmp_path / str(i), ranks, fault)
