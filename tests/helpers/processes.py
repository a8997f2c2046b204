"""Real processes for tests: `torchrun` with N ranks, two torchrun agents, or ranks started by hand.

Everything that is started here ends here: a run that takes too long is ended and its output shown.
"""

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "workers"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PATIENCE_S = float(os.environ.get("TEST_PATIENCE_S", "600"))
"""How long a launch, a search or a job may take, start-up on busy cores included; $TEST_PATIENCE_S for busier ones."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A process that has ended: exit code (negative: the signal) and what it printed."""

    code: int
    out: str
    err: str

    def ok(self) -> "Done":
        """Itself, where it ended with 0."""
        assert self.code == 0, f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
        return self


class Process:
    """A command that runs with this repository importable; output is caught, time is limited.

    It and all that it starts carry a mark of their own, by which `alive` finds them.
    """

    def __init__(
        self, command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.mark = f"TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), name: value, **(env or {})},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to what it has started."""
        self._process.send_signal(number)

    def alive(self) -> list[int]:
        """The processes of this command that still run, itself among them."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                mine = self.mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has ended meanwhile
                continue
            if mine and state != "Z":
                found.append(int(folder.name))
        return found

    def wait(self, patience: float = PATIENCE_S) -> Done:
        """Wait for its end; one that takes too long is ended and fails the test."""
        process = self._process
        try:
            out, err = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun ends its workers, which are in sessions of their own
            try:
                out, err = process.communicate(timeout=45)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            raise AssertionError(f"no end after {patience} s\n--- stdout\n{out}\n--- stderr\n{err}") from None
        return Done(code=process.returncode, out=out, err=err)


def python(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Done:
    """Run one Python process without a launcher."""
    return Process([sys.executable, *command], cwd=cwd, env=env).wait()


def torchrun(
    ranks: int,
    *command: str,
    flags: Sequence[str] = ("--standalone",),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run `torchrun --standalone --nproc_per_node=RANKS COMMAND` and wait for its end."""
    return Process([*TORCHRUN, *flags, f"--nproc_per_node={ranks}", *command], cwd=cwd, env=env).wait()


def two_agents(*command: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None) -> list[Done]:
    """Two torchrun agents with one rank each, as on two nodes, that meet on the loopback."""
    flags = [
        *flags,
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=two",
        "--local-addr=127.0.0.1",
    ]
    agents = [Process([*TORCHRUN, *flags, *command], env=env) for _ in range(2)]
    return [agent.wait() for agent in agents]


def by_hand(ranks: int, *command: str) -> list[Done]:
    """Ranks without an agent that would end the others: what each of them does is seen."""
    return [process.wait() for process in start_by_hand(ranks, *command)]


def start_by_hand(ranks: int, *command: str) -> list[Process]:
    """The same, still running."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    where["LOCAL_WORLD_SIZE"] = str(ranks)
    return [
        Process([sys.executable, *command], env={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
