"""A search as a person starts it, watched from outside: what it prints, which processes it has, what they listen on."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT
from tests.helpers.processes import TIMEOUT_S

TINY = (
    "--data.embedded_train", "140", "--data.embedded_val", "70", "--train.epochs", "3",
    "--train.global_batch", "16", "--model.image_size", "32", "--run.tensorboard", "false",
)  # fmt: skip
SPACE = """\
optim.lr: {log_uniform: [1.0e-4, 1.0e-2]}
train.global_batch: {choice: [8, 16, 32]}
model.freeze_depth: {integer: [0, null]}
optim.weight_decay: {uniform: [0.0, 0.1]}
data.augment.mixup: [0.0, 0.2]
model.options.cut: [8, 10]
"""


class Search:
    """`python -m tune.search` in a folder; every process that it starts is known by a mark in its environment."""

    def __init__(self, folder: Path, *words: str, tiny: bool = True, **environment: str) -> None:
        self.folder, self.mark = folder, f"FER_DIST_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tune.search", *(TINY if tiny else ()), *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def printed(self) -> str:
        return "\n".join(self.lines)

    def until(self, seen: Callable[[list[str]], bool], what: str) -> None:
        """Wait for something in what it prints."""
        deadline = time.monotonic() + TIMEOUT_S
        while not seen(self.lines):
            assert self.process.poll() is None, f"it ended before {what}:\n{self.printed}"
            assert time.monotonic() < deadline, f"no {what} within {TIMEOUT_S:.0f} s:\n{self.printed}"
            time.sleep(0.05)

    def until_line(self, part: str) -> None:
        self.until(lambda lines: any(part in line for line in lines), f"line with {part!r}")

    def wait(self) -> int:
        """Its exit code, once all of its lines have come."""
        code = self.process.wait(TIMEOUT_S)
        self._close()
        return code

    def processes(self) -> dict[int, str]:
        """All that it has started and that still live: number -> command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if command:  # a zombie has none
                        found[int(folder.name)] = command
            except OSError:
                continue
        return found

    def named(self, *parts: str) -> list[int]:
        """Processes of which the command line has one of the parts."""
        return sorted(pid for pid, command in self.processes().items() if any(part in command for part in parts))

    def addresses(self) -> set[str]:
        """Where its processes listen: hexadecimal addresses, as Linux writes them."""
        sockets: set[str] = set()
        for pid in self.processes():
            for handle in Path(f"/proc/{pid}/fd").glob("*"):
                try:
                    sockets.add(str(handle.readlink()).removeprefix("socket:[").removesuffix("]"))
                except OSError:
                    continue
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                place, state, inode = (line.split()[i] for i in (1, 3, 9))
                if state == "0A" and inode in sockets:
                    found.add(place.rpartition(":")[0])
        return found

    def require_no_orphans(self) -> None:
        """Ray's agents look for their raylet every few seconds."""
        deadline = time.monotonic() + 120  # Ray's agents look for their parent now and then
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.25)

    def close(self) -> None:
        """End whatever a failed test has left."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self._close()

    def _close(self) -> None:
        self._reader.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
