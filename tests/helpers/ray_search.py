"""A search as a user starts it, watched from outside: its output, its processes and the addresses they listen on."""

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
from typing import Self

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
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


class Search:
    """Run `python -m tune.search` in a folder; a mark in the environment finds every process that it starts."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.folder, self.lines, mark = folder, list[str](), uuid.uuid4().hex
        self.mark = f"FER_DIST_MARK={mark}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tune.search", *(() if "--resume" in words else TINY), *words],
            cwd=folder,
            env={**os.environ, "FER_DIST_MARK": mark, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))

    @property
    def printed(self) -> str:
        return "\n".join(self.lines)

    def until(self, seen: Callable[[str], bool]) -> None:
        """Wait for something in the output."""
        deadline = time.monotonic() + TIMEOUT_S
        while not seen(self.printed):
            assert self.process.poll() is None, f"the search ended too early:\n{self.printed}"
            assert time.monotonic() < deadline, f"not seen within {TIMEOUT_S:.0f} s:\n{self.printed}"
            time.sleep(0.05)

    def wait(self) -> int:
        """Return the exit code when all output has been read."""
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(30)
        return code

    def ok(self) -> None:
        """Wait for the end and require exit code 0."""
        assert self.wait() == 0, self.printed

    def processes(self) -> dict[int, str]:
        """Return all processes of the search that still run: process id -> command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if command:  # a zombie has none
                        found[int(folder.name)] = command
        return found

    def named(self, part: str) -> list[int]:
        """Return the processes with a part in their command line."""
        return sorted(pid for pid, command in self.processes().items() if part in command)

    def addresses(self) -> set[str]:
        """Return the addresses that the processes listen on, in hexadecimal, as Linux writes them."""
        sockets: set[str] = set()
        for pid in self.processes():
            for handle in Path(f"/proc/{pid}/fd").glob("*"):
                with contextlib.suppress(OSError):
                    sockets.add(str(handle.readlink()).removeprefix("socket:[").removesuffix("]"))
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                place, state, inode = (line.split()[i] for i in (1, 3, 9))
                if state == "0A" and inode in sockets:
                    found.add(place.rpartition(":")[0])
        return found

    def require_no_orphans(self) -> None:
        """Wait until no process is left; Ray's agents look for their parent every few seconds."""
        deadline = time.monotonic() + 120
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.25)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End what a failed test has left."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self._reader.join(30)
