"""A run with a fault: torchrun --nproc_per_node=4 tests/workers/fault_worker.py OUT ARCH SETTINGS FAULT

SETTINGS (JSON) go over `runs.stateful`; FAULT (JSON) says what happens to whom and when, in the first
start only. Each step of each start is noted in OUT/ledger-<rank>.jsonl before it is done, with its
samples and a checksum of each augmented picture, and a fault in OUT/fault.jsonl before it strikes.

FAULT: {"rank": R, "signal": "SIGKILL", "step": S, "after_s": T}: T seconds after step S (0-based) begins;
       {"rank": R, "signal": ..., "save": S, "event": E}: in the save after S steps, at its E-th event
       (some bytes written, fsync, rename, link, removal), or E times SLOW_S after its begin for a rank
       that does not write;
       {"rank": R, "signal": ..., "evaluation": S}: within the evaluation after S steps;
       {"rank": R, "spoil": {"S": "loss" | "gradient" | "statistics", ...}}: a NaN there in step S;
       {"rank": R, "settings": {...}}: other settings for that rank;
       {"rank": R, "weights": true}: other initial weights;
       {"rank": R, "launcher": S}: rank 0 kills the launcher while it makes its model, and S seconds go by.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
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


def note(path: Path, line: dict[str, Any]) -> None:
    """One line of JSON, on the disk before anything else happens."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


class Faulty:
    """The trainer's functions, watched, and made to fail where FAULT says so."""

    def __init__(self, out: Path, rank: int, fault: dict[str, Any]) -> None:
        self._out, self._rank = out, rank
        self._launcher_dies_s = fault.get("launcher", 0)
        self._fault = fault if START == 0 and rank == fault.get("rank") else {}
        self._saving = -1
        self._event = 0

    def strike(self, where: str) -> None:
        """The fault itself."""
        note(self._out / "fault.jsonl", {"where": where, "rank": self._rank, "time": time.time()})
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
        line = {"start": START, "step": state.step, "rows": batch.rows_N.tolist(), "pixels": pixels}
        note(self._out / f"ledger-{self._rank}.jsonl", line)
        if self._fault.get("step") == state.step:
            threading.Timer(self._fault["after_s"], self.strike, [f"step {state.step}"]).start()
        return step.train_step(config, state, batch, world, *rest)

    def evaluate(self, config: Any, state: Any, *rest: Any) -> Any:
        if self._fault.get("evaluation") == state.step:
            self.strike(f"evaluation after {state.step} steps")
        return evaluate(config, state, *rest)

    def backward(self, config: Any, state: Any, batch: Any, world: World) -> Tensor:
        """The real one, spoilt before the ranks tell each other of it; but for a gradient, which they share."""
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
            after = SLOW_S * self._fault["event"]
            threading.Timer(after, self.strike, [f"save of rank 0, {after:.3f} s after its begin"]).start()
        digests = [digest(model.state_dict()) for model in (state.model, state.deployed)]
        note(self._out / f"digests-{self._rank}.jsonl", {"step": state.step, "digests": digests})
        save_state(run_, state)

    def save_step(self, folder: Path, made: Checkpoint, number: int, keep: int) -> Path:
        self._saving, self._event = number, 0
        path = history.save_step(folder, made, number, keep)
        note(self._out / "saves.jsonl", {"start": START, "step": number, "events": self._event})
        self._saving = -1
        return path

    def event(self, what: str) -> None:
        """One event of a save of rank 0."""
        if self._saving < 0:
            return
        time.sleep(SLOW_S)
        if self._fault.get("save") == self._saving and self._fault["event"] == self._event and self._rank == 0:
            self.strike(f"event {self._event} of a save: {what}")
        self._event += 1

    def before(self, what: str, function: Any) -> Any:
        """The function, with an event before it."""

        def with_event(*arguments: Any, **keywords: Any) -> Any:
            self.event(what)
            return function(*arguments, **keywords)

        return with_event

    def save(self, content: Any, file: Any) -> None:
        """torch.save with an event every few writes."""
        faulty, writes = self, 0

        class Watched:
            def write(self, raw: bytes) -> int:
                nonlocal writes
                writes += 1
                if writes % WRITES_PER_EVENT == 0:
                    file.flush()
                    faulty.event(f"{file.tell()} bytes written")
                return int(file.write(raw))

            def flush(self) -> None:
                file.flush()

        torch_save(content, Watched())  # type: ignore[arg-type]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the place of what they watch."""
        with ExitStack() as stack:
            for target, name, new in (
                (trainer, "train_step", self.train_step),
                (trainer, "starting_model", self.starting_model),
                (trainer, "evaluate", self.evaluate),
                (trainer, "save_state", self.save_state),
                (run, "save_state", self.save_state),
                (run, "save_step", self.save_step),
                (step, "backward", self.backward),
                (torch, "save", self.save),
                (os, "fsync", self.before("fsync", os.fsync)),
                (os, "link", self.before("link", os.link)),
                (Path, "replace", self.before("rename", Path.replace)),
                (Path, "unlink", self.before("removal", Path.unlink)),
            ):
                stack.enter_context(mock.patch.object(target, name, new))
            yield


backward, evaluate, save_state, torch_save = step.backward, trainer.evaluate, run.save_state, torch.save


def main() -> None:
    out, arch = Path(sys.argv[1]), sys.argv[2]
    settings, fault = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    rank = int(os.environ.get("RANK", "0"))
    faulthandler.dump_traceback_later(0.9 * TIMEOUT_S, exit=True)  # who hangs says where
    if rank == fault.get("rank"):
        settings |= fault.get("settings", {})
    config = stateful(arch, out, **settings)
    with no_pictures(), Faulty(out, rank, fault).installed(), join("cpu", config.run.timeout_seconds) as world:
        trainer.fit(config, world)


if __name__ == "__main__":
    run_command(main)
