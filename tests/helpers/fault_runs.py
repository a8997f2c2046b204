"""Runs that are broken: launches of `tests/workers/fault_worker.py`, and runs in this process."""

import json
import os
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fer_dist.config import Config
from fer_dist.engine import step, trainer
from fer_dist.engine.trainer import Result, fit
from tests.helpers.processes import TORCHRUN, WORKERS, Done, Process
from tests.helpers.shared import shared_folder
from tests.helpers.small_runs import everything, no_pictures, plain_lines, same, starts, state_hash

FAULT = str(WORKERS / "fault_worker.py")
EPOCH_STEPS, STEPS, SAVE_EVERY = 8, 24, 4
"""Of `runs.stateful`."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch that has ended.

    Attributes:
        out: holds the run folder `run`, and what the worker noted.
        alive: processes of it that were still there five seconds later.
    """

    out: Path
    done: Done
    alive: list[int]

    @property
    def folder(self) -> Path:
        return self.out / "run"

    @property
    def hash(self) -> str:
        return state_hash(self.folder / "last.pth")

    @property
    def starts(self) -> list[dict[str, Any]]:
        return starts(self.folder)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What the worker noted in a file; nothing where there is none."""
        path = self.out / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ledger(self) -> dict[int, list[tuple[int, int]]]:
        """Step -> (sample, checksum of its augmented picture) over all ranks, of the last time it was done."""
        ranks = [self.lines(path.name) for path in sorted(self.out.glob("ledger-*.jsonl"))]
        newest: dict[int, int] = {}
        for line in ranks[0]:
            newest[line["step"]] = max(line["start"], newest.get(line["step"], 0))
        found: dict[int, list[tuple[int, int]]] = {step: [] for step in sorted(newest)}
        for rank in ranks:
            for line in rank:
                if newest[line["step"]] == line["start"]:
                    found[line["step"]] += zip(line["rows"], line["pixels"], strict=True)
        return found

    def redone(self) -> int:
        """How many steps were done a second time."""
        steps = [line["step"] for line in self.lines("ledger-0.jsonl")]
        return len(steps) - len(set(steps))


def launch(out: Path, ranks: int, fault: dict[str, Any], **options: Any) -> Launch:
    """Run the worker under torchrun, wait for its end, and list processes that outlive it; options: see `begin`."""
    return end(out, begin(out, ranks, fault, **options))


def begin(
    out: Path,
    ranks: int,
    fault: dict[str, Any],
    *,
    arch: str = "patt_lite",
    settings: dict[str, Any] | None = None,
    restarts: int = 1,
    slow_s: float = 0.0,
) -> Process:
    """Start the worker under torchrun; it still runs when this returns.

    Args:
        fault: see `tests/workers/fault_worker.py`.
        settings: over those of `small_runs.stateful`.
        restarts: how often torchrun starts the ranks again.
        slow_s: how long each event of a save takes [s].
    """
    out.mkdir(parents=True, exist_ok=True)
    flags = ["--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    words = [FAULT, str(out), arch, json.dumps(settings or {}), json.dumps(fault)]
    return Process([*TORCHRUN, *flags, *words], env={"SLOW_S": str(slow_s)})


def end(out: Path, process: Process) -> Launch:
    """Wait for the end of a launch, and list processes that outlive it."""
    done = process.wait()
    deadline = time.monotonic() + 5
    while (alive := process.alive()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return Launch(out=out, done=done, alive=alive)


def unbroken(ranks: int, arch: str = "patt_lite") -> Launch:
    """Return a run that nothing has broken; each is trained once per run of pytest."""

    def train(folder: Path) -> None:
        found = launch(folder, ranks, {}, arch=arch, restarts=0)
        found.done.ok()
        assert [start["step"] for start in found.starts] == [0]

    folder = shared_folder(f"unbroken-{ranks}-{arch}", train)
    return Launch(out=folder, done=Done(code=0, out="", err=""), alive=[])


def require_whole(launch: Launch) -> None:
    """None lost and none twice: in each epoch every sample of its steps once."""
    ledger = launch.ledger()
    assert sorted(ledger) == list(range(STEPS))
    for epoch in range(STEPS // EPOCH_STEPS):
        seen = [sample for step in range(EPOCH_STEPS) for sample, _ in ledger[epoch * EPOCH_STEPS + step]]
        assert len(seen) == len(set(seen)) == 128, "128 training faces in eight batches of 16"


def require_equal(broken: Launch, whole: Launch) -> None:
    """The broken run is the unbroken one: state, metrics, samples and their pictures, to the bit."""
    assert broken.hash == whole.hash
    assert plain_lines(broken.folder) == plain_lines(whole.folder)
    for name in ("best.pth", "last.pth"):
        assert same(everything(broken.folder / name), everything(whole.folder / name)), name
    require_whole(broken)
    assert broken.ledger() == whole.ledger()
    assert broken.alive == []


# -- in this process

Ledger = list[tuple[int, list[tuple[int, int]]]]
"""Of each step: its number, and each sample with a checksum of its augmented picture."""


class Crash(Exception):
    """The process would be gone."""


@contextmanager
def breaking(at: int, how: str, ledger: Ledger) -> Iterator[None]:
    """Before step `at` (0-based) a signal comes, or the process is gone; the ledger notes what is trained on."""

    def train_step(config: Config, state: Any, batch: Any, world: Any, *rest: Any) -> Any:
        if state.step == at:
            if how == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGTERM)
        pixels = [zlib.crc32(image.numpy().tobytes()) for image in batch.images_N1SS]
        ledger.append((state.step, list(zip(batch.rows_N.tolist(), pixels, strict=True))))
        return step.train_step(config, state, batch, world, *rest)

    with no_pictures(), mock.patch.object(trainer, "train_step", train_step):
        yield


def run_whole(config: Config) -> tuple[Result, Ledger]:
    ledger: Ledger = []
    with breaking(-1, "", ledger):
        return fit(config), ledger
