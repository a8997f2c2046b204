"""A real SLURM for tests: `Cluster` boots it, runs its commands, waits for its jobs, and takes it down."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.conftest import ROOT
from tests.helpers.processes import TIMEOUT_S

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "nsenter")
FREEZER = Path("/sys/fs/cgroup/freezer")
NAMESPACES = ("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
TRAINING = (
    "--train.epochs", "4", "--train.steps_per_epoch", "12", "--train.global_batch", "8",
    "--data.embedded_train", "140", "--data.embedded_val", "28", "--train.save_every_steps", "4",
    "--run.tensorboard", "false", "--model.dropout", "0.2",
)  # fmt: skip
"""A run of 48 steps, of 8 faces each."""
SLOW = Path(__file__).with_name("slurm_slow_imports")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY")


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    if sys.platform != "linux":
        return "SLURM runs on Linux"
    if lacking := [name for name in NEEDED if shutil.which(name) is None]:
        return (
            f"needs {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2)"
        )
    if os.geteuid() != 0:
        return "slurmd and munged are started as root"
    probe = "ip link add br0 type bridge && ip link add cable type veth peer name end"
    done = subprocess.run([*NAMESPACES, "sh", "-c", probe], capture_output=True, text=True, timeout=30, check=False)
    return f"SLURM's nodes need namespaces and a bridge: {done.stderr.strip()}" if done.returncode else ""


def no_freezer() -> str:
    """Why proctrack/cgroup cannot be had here; empty where it can."""
    probe = FREEZER / f"fer_dist_{uuid.uuid4().hex}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"proctrack/cgroup needs a writable freezer of cgroup v1 in {FREEZER}: {error.strerror}"
    return ""


class Cluster:
    """Two nodes of four cores: `with Cluster("cgroup") as cluster`.

    Attributes:
        folder: of the cluster itself.
        work: where jobs are submitted from; it holds a copy of slurm/.
        python: the interpreter of the jobs.
    """

    python = sys.executable

    def __init__(self, proctrack: str, *, gpus: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fer_slurm_", dir="/tmp"))
        self.folder.chmod(0o755)
        self.work = self.folder / "work"
        self._jobs: list[str] = []
        self._mark = uuid.uuid4().hex
        bin_folder = Path(sys.executable).parent
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "FER_SLURM_TEST": self._mark,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{SLOW}",
            "FER_DIST_CACHE": str(self.folder / "cache"),
        }
        words = [str(self.folder), proctrack, str(gpus)]
        self._boot = subprocess.Popen(
            [*NAMESPACES, "--", sys.executable, str(Path(__file__).with_name("slurm_boot.py")), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        self._nodes: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            self._hear()
            shutil.copytree(ROOT / "slurm", self.work / "slurm")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hear(self) -> None:
        """The numbers of the slurmds, as the boot tells them; they are those of its namespace."""
        assert self._boot.stdout is not None
        line = self._boot.stdout.readline()
        if not line.startswith("up "):
            logs = "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in self.folder.glob("*.out"))
            raise AssertionError(f"SLURM does not start: {line}\n{logs}")
        self._nodes |= dict(word.split("=") for word in line.split()[1:])

    def close(self) -> None:
        """All of it ends, also what a failed test has left."""
        assert self._boot.stdin is not None
        assert self._boot.stdout is not None
        self._boot.stdin.close()
        try:
            self._boot.wait(30)
        except subprocess.TimeoutExpired:
            self._boot.kill()
            self._boot.wait()
        self._boot.stdout.close()
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        for node in ("node1", "node2"):
            top = FREEZER / f"slurm_{node}"
            for folder in sorted((p for p in [top, *top.rglob("*")] if p.is_dir()), reverse=True):
                with contextlib.suppress(OSError):  # of another cluster, which lives
                    folder.rmdir()
        for left in (path for job in self._jobs for path in Path("/tmp").glob(f"fer_ray_{job}.*")):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        if "FER_SLURM_KEEP" not in os.environ:
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- commands

    def _inside(self) -> list[str]:
        """Words that run a command where the daemons are."""
        (inner,) = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
        return ["nsenter", "-t", inner, "-m", "-n", "-u", "-p", f"--wd={self.work}", "--"]

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a command prints, run on the control node in the folder of the user."""
        done = subprocess.run(
            [*self._inside(), *command],
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def on(self, node: str, *command: str) -> str:
        """What a command prints, run in the namespaces of a node."""
        return self.run("nsenter", "-t", self._nodes[node], "-m", "-n", "-u", "--", *command)

    def submit(self, *words: str, **environment: Any) -> "Job":
        """`sbatch WORDS`; `environment` goes with the job."""
        printed = self.run("sbatch", *words, **environment)
        found = re.search(r"Submitted batch job (\d+)", printed)
        assert found, printed
        self._jobs.append(found[1])
        return Job(self, found[1])

    def train(self, name: str, *words: str, nodes: int = 1, settings: Sequence[str] = (), **environment: str) -> "Job":
        """`sbatch slurm/train.sh` on CPUs with two ranks in all; `words` are for sbatch, `settings` for the trainer."""
        size = (f"--nodes={nodes}", "--gpus-per-node=0", f"--cpus-per-task={2 // nodes}")
        run = ("slurm/train.sh", *TRAINING, *settings, "--run.name", name)
        return self.submit(*size, *words, *run, **environment)

    def folder_of(self, name: str) -> Path:
        """A run folder."""
        return self.work / "runs" / name

    def kill_node(self, node: str) -> None:
        """The daemon of a node and all that runs there, at once, as when its power goes."""
        network = self.run("readlink", f"/proc/{self._nodes[node]}/ns/net").strip()
        theirs = f'[ "$(readlink $p/ns/net)" = "{network}" ]'
        script = f"kill -9 {self._nodes[node]}; for p in /proc/[0-9]*; do {theirs} && kill -9 ${{p#/proc/}}; done; true"
        self.run("sh", "-c", script)

    def start_node(self, node: str) -> None:
        """A node that has died comes back."""
        assert self._boot.stdin is not None
        self._boot.stdin.write(f"{node}\n")
        self._boot.stdin.flush()
        self._hear()

    def until(self, seen: Callable[[], object], what: str, limit_s: float = TIMEOUT_S) -> None:
        """Wait for something."""
        deadline = time.monotonic() + limit_s
        while not seen():
            assert time.monotonic() < deadline, f"no {what} within {limit_s:.0f} s"
            time.sleep(0.2)

    def processes(self) -> dict[int, str]:
        """What carries the mark of this cluster and still lives, seen from outside: number -> command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"FER_SLURM_TEST={self._mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if command:  # a zombie has none
                        found[int(folder.name)] = command
            except OSError:
                continue
        return found

    def working(self) -> dict[int, str]:
        """The same without the cluster's own daemons."""
        own = ("slurmctld", "slurmd", "munged", "slurm_boot.py", "unshare", "nsenter")
        return {pid: command for pid, command in self.processes().items() if not any(name in command for name in own)}


class Job:
    """A job that has been submitted."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def shown(self) -> dict[str, str]:
        """`scontrol show job`, of the first task of an array."""
        text = self.cluster.run("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text.split("\n\n")[0]))

    @property
    def state(self) -> str:
        return self.shown()["JobState"]

    @property
    def log(self) -> str:
        """What its output file holds."""
        path = Path(self.shown()["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, seen: Callable[[], object], what: str, limit_s: float = TIMEOUT_S) -> None:
        """Wait for something."""
        deadline = time.monotonic() + limit_s
        while not seen():
            going_on = time.monotonic() < deadline and self.state not in ENDED
            assert going_on, f"no {what} within {limit_s:.0f} s; {self.told()}"
            time.sleep(0.2)

    def until_step(self, folder: Path, step: int) -> None:
        """Wait for a checkpoint of this step."""
        self.until((folder / "checkpoints" / f"step-{step:08}.pth").exists, f"checkpoint of step {step}")

    def until_log(self, part: str) -> None:
        self.until(lambda: part in self.log, f"{part!r} in the log")

    def end(self, limit_s: float = TIMEOUT_S) -> dict[str, str]:
        """Wait for its end, requeues included; what `scontrol show job` says then."""
        deadline = time.monotonic() + limit_s
        while (shown := self.shown())["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"no end within {limit_s:.0f} s; {self.told()}"
            time.sleep(0.2)
        return shown

    def done(self, limit_s: float = TIMEOUT_S) -> str:
        """Wait until it has completed; its log."""
        shown = self.end(limit_s)
        assert shown["JobState"] == "COMPLETED", self.told()
        return self.log

    def told(self) -> str:
        shown = self.shown()
        return f"job {self.number} is {shown['JobState']}, {shown['Reason']}, {shown['Restarts']} restarts\n{self.log}"
