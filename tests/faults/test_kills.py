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
SLOW_S = 0.004
"""Of each event of a save in the sweep: a save takes half a second and more."""


def require_survived(broken: Launch, whole: Launch) -> None:
    """It was killed, went on from a step beyond 0, did one save interval again at the most, and is the unbroken run."""
    broken.done.ok()
    assert len(broken.lines("fault.jsonl")) == 1
    first, second = broken.starts
    assert first["step"] == 0
    assert second["step"] > 0
    assert second["left_out"] == [], "a save that was broken off leaves no damaged checkpoint"
    assert broken.redone() <= SAVE_EVERY
    require_equal(broken, whole)
    assert not list(broken.folder.rglob(".*")), "no temporary file is left"


MOMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "a rank in a step": (2, {"rank": 1, "step": 6, "after_s": 0.01}),
    "rank 0 in a step of the last epoch": (2, {"rank": 0, "step": 22, "after_s": 0.0}),
    "rank 0 while it writes": (2, {"rank": 0, "save": 12, "event": 60}),
    "rank 0 before the rename": (2, {"rank": 0, "save": 12, "event": 118}),
    "a rank in the last evaluation, no step left": (2, {"rank": 1, "evaluation": 24}),
    "a rank while rank 0 writes": (2, {"rank": 1, "save": 16, "event": 50}),
    "one of four in a step": (4, {"rank": 3, "step": 13, "after_s": 0.02}),
    "rank 0 of four after the rename": (4, {"rank": 0, "save": 8, "event": 121}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_like_the_unbroken_one(moment: str, tmp_path: Path) -> None:
    ranks, fault = MOMENTS[moment]
    broken = launch(tmp_path, ranks, {"signal": "SIGKILL", **fault}, slow_s=SLOW_S)
    require_survived(broken, unbroken(ranks))


@pytest.mark.parametrize("arch", ["vit", "vit_mae"])
def test_each_architecture_on_four_ranks(arch: str, tmp_path: Path) -> None:
    """DDP's groups of gradients: with two ranks any order of adding gives the same bits, with four it does not."""
    broken = launch(tmp_path, 4, {"signal": "SIGKILL", "rank": 2, "step": 10, "after_s": 0.01}, arch=arch)
    require_survived(broken, unbroken(4, arch))


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


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    """torchrun itself dies: its ranks see it, save and leave; the same line again goes on."""
    process = begin(tmp_path, 2, {"signal": "SIGUSR2", "rank": 9}, slow_s=SLOW_S)
    deadline = time.monotonic() + 120
    while not (tmp_path / "saves.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send(signal.SIGKILL)
    broken = end(tmp_path, process)
    assert broken.alive == []
    assert broken.done.code == -signal.SIGKILL
    assert "the end of its launcher after step" in broken.done.err
    saved = load(broken.folder / "last.pth").resume["step"]
    assert 0 < saved < STEPS
    again = launch(tmp_path, 2, {})
    again.done.ok()
    assert [start["step"] for start in again.starts] == [0, saved]
    assert again.hash == unbroken(2).hash


def test_a_launcher_that_dies_before_the_first_step_is_missed_too(tmp_path: Path) -> None:
    """While data are read, or the ranks wait for each other: they do not train on for nobody."""
    process = begin(tmp_path, 2, {"rank": 9, "launcher": 2})
    ended = end(tmp_path, process)
    assert ended.alive == []
    assert ended.done.code == -signal.SIGKILL
    assert "the end of its launcher after step" in ended.done.err
    assert 0 < load(ended.folder / "last.pth").resume["step"] < STEPS
    assert not (ended.folder / "best.pth").exists()


def moments(ranks: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Seeded moments after the first save; every third inside of a save."""
    random = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for i in range(count):
        fault: dict[str, Any] = {"rank": int(random.integers(ranks)), "signal": "SIGKILL"}
        if i % 3 == 0:
            fault |= {"save": int(random.integers(2, 6)) * SAVE_EVERY, "event": int(random.integers(124))}
        else:
            fault |= {"step": int(random.integers(SAVE_EVERY, STEPS - 1)), "after_s": float(random.uniform(0, 0.08))}
        found.append(fault)
    return found


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 4])
def test_sweep(ranks: int, tmp_path: Path) -> None:
    """50 moments for each number of ranks."""
    count = int(os.environ.get("SOAK_KILLS", "50"))
    inside = redone = 0
    for i, fault in enumerate(moments(ranks, count, seed=ranks)):
        broken = launch(tmp_path / str(i), ranks, fault, slow_s=SLOW_S)
        try:
            require_survived(broken, unbroken(ranks))
        except AssertionError:
            print(f"\nmoment {i}: {fault}\n{broken.starts}\n{broken.done.err[-3000:]}", flush=True)
            raise
        (strike,) = broken.lines("fault.jsonl")
        inside += "save" in strike["where"]
        redone += broken.redone()
        print(
            f"\n{ranks} ranks, moment {i}: rank {strike['rank']}, {strike['where']}; went on from step "
            f"{broken.starts[1]['step']}, {broken.redone()} steps again",
            flush=True,
        )
    print(f"\n{ranks} ranks: {count} kills survived, {inside} inside of a save, {redone} steps done again", flush=True)
    assert inside >= count * 3 // 10
