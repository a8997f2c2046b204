"""A run with a fault: torchrun --nproc_per_node=4 tests/workers/fault_worker.py OUT ARCH SETTINGS FAULT

SETTINGS (JSON) override `small_runs.stateful`; FAULT (JSON) says what happens to which rank and when, in the first
start only. Each start notes in OUT/ledger-<rank>.jsonl, before each step, its samples with a checksum of each augmented
picture, and a fault in OUT/fault.jsonl before it happens.

FAULT: {"rank": R, "signal": "SIGKILL", "step": S, "after_s": T}: T seconds after step S (0-based) begins;
       {"rank": R, "signal": ..., "save": S, "event": E}: in the save after S steps, at its E-th event
       (some bytes written, fsync, rename, link, removal), or E times SLOW_S after its begin for a rank
       that does not write;
       {"rank": R, "signal": ..., "evaluation": S}: within the evaluation after S steps;
       {"rank": R, "spoil": {"S": "loss" | "gradient" | "statistics", ...}}: a NaN there in step S;
       {"rank": R, "settings": {...}}: other settings for that rank;
       {"rank": R, "weights": true}: other initial weights;
       {"rank": R, "launcher": S}: rank 0 kills the launcher while it makes its model, and waits for S seconds.
SLOW_S in the environment: how long each event of a save takes, as on a slow disk [s].
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fer_dist.commandline import run as run_command
from fer_dist.engine import history, run, step, trainer
from fer_dist.engine.checkpoint import Checkpoint, digest
from fer_dist.engine.start import starting_model
from fer_dist.world import World, join
from tests.helpers.processes import TIMEOUT_S
from tests.helpers.small_runs import no_pictures, stateful

SLOW_S = float(os.environ.get("SLOW_S", "0"))
WRITES_PER_EVENT = 40
START = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
backward, evaluate, save_state, torch_save = step.backward, trainer.evaluate, run.save_state, torch.save


class Faulty:
    """The functions of the trainer, watched, and made to fail as FAULT says."""

    def __init__(self, out: Path, rank: int, fault: dict[str, Any]) -> None:
        self._out, self._rank = out, rank
        self._launcher_dies_s = fault.get("launcher", 0)
        self._fault = fault if START == 0 and rank == fault.get("rank") else {}
        self._saving = -1
        self._event = 0

    def note(self, name: str, **line: Any) -> None:
        """Append a line of JSON to a file of OUT; it is on the disk before this returns."""
        with (self._out / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def strike(self, where: str) -> None:
        self.note("fault.jsonl", where=where, rank=self._rank, time=time.time())
        os.kill(os.getpid(), getattr(signal, self._fault["signal"]))

    def starting_model(self, *arguments: Any) -> Any:
        if self._rank == 0 and START == 0 and self._launcher_dies_s:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(self._launcher_dies_s)
        model = starting_model(*arguments)
        if self._fault.get("weights"):
            with torch.no_grad():
                for x in model.state_dict().values():
                    x += 1
        return model

    def train_step(self, config: Any, state: Any, batch: Any, world: World, *rest: Any) -> Any:
        pixels = [zlib.crc32(image.numpy().tobytes()) for image in batch.images_N1SS]
        rows = batch.rows_N.tolist()
        self.note(f"ledger-{self._rank}.jsonl", start=START, step=state.step, rows=rows, pixels=pixels)
        if self._fault.get("step") == state.step:
            threading.Timer(self._fault["after_s"], self.strike, [f"step {state.step}"]).start()
        return step.train_step(config, state, batch, world, *rest)

    def evaluate(self, config: Any, state: Any, *rest: Any) -> Any:
        if self._fault.get("evaluation") == state.step:
            self.strike(f"evaluation after {state.step} steps")
        return evaluate(config, state, *rest)

    def backward(self, config: Any, state: Any, batch: Any, world: World) -> Tensor:
        """Make the result non-finite before the ranks exchange it; a gradient after that."""
        loss = backward(config, state, batch, world)
        what = self._fault.get("spoil", {}).get(str(state.step))
        if what == "loss":
            return loss * float("inf")
        if what == "statistics":
            state.running_stats[0][0] = float("nan")
        elif what == "gradient":
            state.optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        return loss

    def save_state(self, run_: run.Run, state: Any) -> None:
        if self._fault.get("save") == state.step and self._rank > 0:
            after_s = SLOW_S * self._fault["event"]
            threading.Timer(after_s, self.strike, [f"save of rank 0, {after_s:.3f} s after its begin"]).start()
        digests = [digest(model.state_dict()) for model in (state.model, state.deployed)]
        self.note(f"digests-{self._rank}.jsonl", step=state.step, digests=digests)
        save_state(run_, state)

    def save_step(self, folder: Path, made: Checkpoint, number: int, keep: int) -> Path:
        self._saving, self._event = number, 0
        path = history.save_step(folder, made, number, keep)
        self.note("saves.jsonl", start=START, step=number, events=self._event)
        self._saving = -1
        return path

    def event(self, what: str) -> None:
        """Count an event of a save of rank 0."""
        if self._saving < 0:
            return
        time.sleep(SLOW_S)
        if self._fault.get("save") == self._saving and self._fault["event"] == self._event and self._rank == 0:
            self.strike(f"event {self._event} of a save: {what}")
        self._event += 1

    def counted(self, what: str, function: Any) -> Any:
        """Return the function with an event before it."""

        def with_event(*arguments: Any, **keywords: Any) -> Any:
            self.event(what)
            return function(*arguments, **keywords)

        return with_event

    def save(self, content: Any, file: Any) -> None:
        """Do torch.save with an event every few writes."""
        writes = 0

        def write(raw: bytes) -> int:
            nonlocal writes
            writes += 1
            if writes % WRITES_PER_EVENT == 0:
                file.flush()
                self.event(f"{file.tell()} bytes written")
            return int(file.write(raw))

        torch_save(content, SimpleNamespace(write=write, flush=file.flush))


def main() -> None:
    out, arch = Path(sys.argv[1]), sys.argv[2]
    settings, fault = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    rank = int(os.environ.get("RANK", "0"))
    faulthandler.dump_traceback_later(0.9 * TIMEOUT_S, exit=True)  # a rank that hangs prints where
    if rank == fault.get("rank"):
        settings |= fault.get("settings", {})
    config, faulty = stateful(arch, out, **settings), Faulty(out, rank, fault)
    with ExitStack() as stack:
        stack.enter_context(no_pictures())
        for target, name, new in (
            (trainer, "train_step", faulty.train_step),
            (trainer, "starting_model", faulty.starting_model),
            (trainer, "evaluate", faulty.evaluate),
            (trainer, "save_state", faulty.save_state),
            (run, "save_state", faulty.save_state),
            (run, "save_step", faulty.save_step),
            (step, "backward", faulty.backward),
            (torch, "save", faulty.save),
            (os, "fsync", faulty.counted("fsync", os.fsync)),
            (os, "link", faulty.counted("link", os.link)),
            (Path, "replace", faulty.counted("rename", Path.replace)),
            (Path, "unlink", faulty.counted("removal", Path.unlink)),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        trainer.fit(config, stack.enter_context(join("cpu", config.run.timeout_seconds)))


if __name__ == "__main__":
    run_command(main)
