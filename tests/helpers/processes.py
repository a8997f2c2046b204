"""Start processes for tests: `torchrun` with N ranks, two torchrun agents, or ranks without an agent.

A process that takes too long is ended and its output shown.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import warm_python

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "workers"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TIMEOUT_S = 240 * float(os.environ.get("TEST_TIME_FACTOR", "1"))
"""How long a launch, a search or a job may take, start-up on busy cores included."""
MARKED = f"{warm_python.MARK}=".encode()
FRESH = bool(os.environ.get("TEST_FRESH_PROCESSES"))
"""Start a new interpreter for each process, as `make coverage` requires."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """Result of a process: exit code (negative: the signal) and what it printed."""

    code: int
    out: str
    err: str

    def ok(self) -> "Done":
        """Require exit code 0 and return this object."""
        assert self.code == 0, f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
        return self


_started: list["Process"] = []
_servers: list[subprocess.Popen[bytes]] = []


class Process:
    """A command that runs with this repository importable; its output is kept, its time is limited.

    A command of this interpreter is forked from the server of `tests.helpers.warm_python`, unless `fresh` requires a
    new interpreter. It and all processes that it starts carry a mark of their own, by which `alive` finds them.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        start_server()
        self.mark = f"t{uuid.uuid4().hex[:14]}"  # the kernel keeps 15 characters of a process's name
        environment = {**os.environ, "PYTHONPATH": str(ROOT), warm_python.MARK: self.mark, **(env or {})}
        self._process: subprocess.Popen[str]
        self._output = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        warm = command[0] == sys.executable and (command[1] in ("-m", "-c", "-u") or command[1][0] != "-")
        if fresh or FRESH or not warm:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output[0],
                stderr=self._output[1],
                cwd=cwd or ROOT,
                env=environment,
                text=True,
            )
        else:
            with Path(os.devnull).open() as nothing:
                files = [nothing.fileno(), *(file.fileno() for file in self._output)]
                self._process = warm_python.start(command[1:], files, cwd or ROOT, environment)

        _started.append(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its children."""
        self._process.send_signal(number)

    def alive(self) -> list[int]:
        """Return the processes of this command that still run, itself among them."""
        itself = set() if self._process.poll() is not None else {self.pid}  # torchrun renames itself
        return sorted(running({self.mark}) | itself)

    def read(self) -> tuple[str, str]:
        """Return what it has printed so far to stdout and stderr."""
        size = [os.fstat(file.fileno()).st_size for file in self._output]
        out, err = (os.pread(file.fileno(), n, 0).decode() for file, n in zip(self._output, size, strict=True))
        return out, err

    def wait(self, timeout_s: float = TIMEOUT_S) -> Done:
        """Wait for its end. Raises AssertionError with the output, after ending it, if that takes too long."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # torchrun ends its workers, which are in sessions of their own
            try:
                self._process.wait(45)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            out, err = self.read()
            message = f"still running after {timeout_s} s\n--- stdout\n{out}\n--- stderr\n{err}"
            raise AssertionError(message) from None
        deadline = time.monotonic() + 30
        while code < 0 and self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)  # ranks outlive a killed launcher, and print why they end
        out, err = self.read()
        for file in self._output:
            file.close()
        return Done(code=code, out=out, err=err)


def start_server() -> None:
    """Start the server of warm processes, unless it runs or is not to be used; it ends with this process."""
    if FRESH or warm_python.ADDRESS in os.environ:
        return
    path = os.environ[warm_python.ADDRESS] = str(Path(tempfile.mkdtemp(prefix="warm")) / "server")
    warm_python.prctl(warm_python.CHILD_SUBREAPER, 1)
    command = [sys.executable, warm_python.__file__, path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    _servers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment))


def kill_leftovers() -> None:
    """End the server and the processes of tests that failed before they could."""
    for server in _servers:
        server.kill()
        server.wait()
        shutil.rmtree(Path(os.environ.pop(warm_python.ADDRESS)).parent)
    for process in _started:
        process.send(signal.SIGKILL)
    for pid in running({process.mark for process in _started}):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def running(marks: set[str]) -> set[int]:
    """Return the processes that carry one of the marks: in their environment, or as the name of a fork."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            own = {x.decode(errors="replace").partition("=")[2] for x in environment if x.startswith(MARKED)}
            own.add((folder / "comm").read_text().strip())
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended meanwhile
            continue
        if own & marks and state != "Z":
            found.add(int(folder.name))
    return found


def python(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, fresh: bool = False) -> Done:
    """Run one Python process without a launcher."""
    return Process([sys.executable, *command], cwd=cwd, env=env, fresh=fresh).wait()


def torchrun(
    ranks: int,
    *command: str,
    flags: Sequence[str] = ("--standalone",),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Done:
    """Run `torchrun --standalone --nproc_per_node=RANKS COMMAND` and wait for its end."""
    return Process([*TORCHRUN, *flags, f"--nproc_per_node={ranks}", *command], cwd=cwd, env=env, fresh=fresh).wait()


def two_agents(*command: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None) -> list[Done]:
    """Run two torchrun agents with one rank each, as on two nodes, that meet on the loopback."""
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
    """Run ranks without an agent that would end the others: the result of each is returned."""
    return [process.wait() for process in start_by_hand(ranks, *command)]


def start_by_hand(ranks: int, *command: str) -> list[Process]:
    """Start ranks without an agent; they still run when this returns."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    where["LOCAL_WORLD_SIZE"] = str(ranks)
    return [
        Process([sys.executable, *command], env={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def free_port() -> int:
    """Return a TCP port on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
