"""A SLURM of two nodes on this machine, until standard input ends: `slurm_boot.py FOLDER PROCTRACK own|shared GPUS`.

Started by `tests.helpers.slurm_cluster`, as root. "own": inside namespaces of its own, where each node has a network,
a host name and mounts of its own; the end of this process is the end of all that it has started. "shared": on the
loopback of the machine, on ports that are free, and at the end all that carries the mark of this cluster is killed.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NODES = ("node1", "node2")
CPUS = 4
"""That a node says it has."""
BOOT_S = 30 * float(os.environ.get("TEST_TIME_FACTOR", "1"))


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Boot:
    """The daemons of a cluster."""

    def __init__(self, folder: Path, proctrack: str, own: bool, gpus: int) -> None:
        self.folder, self.proctrack, self.own, self.gpus = folder, proctrack, own, gpus
        self.slurmds: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Everything up, or an exception."""
        (self.folder / "state").mkdir()
        if self.own:
            self._private_machine()
        self._gpu_devices()
        self._munge()
        self._configure()
        self._daemon("slurmctld", "slurmctld", "-D")
        for number, node in enumerate(NODES, 1):
            self.node(number, node)
        deadline = time.monotonic() + BOOT_S
        while (states := self._states()) != ["idle", "idle"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes are {states} after {BOOT_S:.0f} s")
            time.sleep(0.1)

    def _private_machine(self) -> None:
        """Host names and a bridge between the nodes: of these namespaces only."""
        hosts = self.folder / "hosts"
        names = [f"10.77.0.{10 + number} {node}" for number, node in enumerate(NODES, 1)]
        hosts.write_text("\n".join(["127.0.0.1 localhost", "10.77.0.1 control", *names]) + "\n")
        for command in (
            f"mount --bind {hosts} /etc/hosts",
            "hostname control",
            "ip link set lo up",
            "ip link add br0 type bridge",
            "ip addr add 10.77.0.1/24 dev br0",
            "ip link set br0 up",
        ):
            subprocess.run(command.split(), check=True)

    def _gpu_devices(self) -> None:
        """Files that look like GPUs to SLURM; each reads as /dev/null does."""
        for i in range(self.gpus):
            os.mknod(self.folder / f"gpu{i}", 0o20666, os.makedev(1, 3))

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        flags = [f"--{flag}={self.folder}/munge.{name}" for flag, name in names.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *flags)
        deadline = time.monotonic() + BOOT_S
        while not (self.folder / "munge.socket").exists():
            if time.monotonic() > deadline:
                raise RuntimeError("munged does not open its socket")
            time.sleep(0.02)

    def _configure(self) -> None:
        text = (Path(__file__).with_name("slurm.conf")).read_text()
        control = "control" if self.own else socket.gethostname()
        nodes = []
        for number, node in enumerate(NODES, 1):
            where = f"NodeAddr=10.77.0.{10 + number}" if self.own else f"NodeHostname={control} NodeAddr=127.0.0.1"
            port = 6818 if self.own else free_port()
            gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
            nodes.append(f"NodeName={node} {where} Port={port} CPUs={CPUS} RealMemory=4000{gres}")
        values = {
            "FOLDER": str(self.folder),
            "CONTROL": f"{control}({'10.77.0.1' if self.own else '127.0.0.1'})",
            "PORT": str(6817 if self.own else free_port()),
            # Another one in each cluster: jobs of two that run at once share /tmp, the freezer, and without
            # namespaces the ports that follow from the number.
            "FIRST": str(random.randrange(1000, 60_000_000)),
            "PROCTRACK": self.proctrack,
            "GRES": "GresTypes=gpu" if self.gpus else "",
            "NODES": "\n".join(nodes),
        }
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        files = f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n" if self.gpus else ""
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{files}")

    def node(self, number: int, node: str) -> None:
        command = ["slurmd", "-D", "-N", node]
        if not self.own:
            self.slurmds[node] = self._daemon(node, *command)
            return
        # A name and a network of its own; it waits for its cable.
        script = f"hostname {node}; ip link set lo up; read -r go; exec {' '.join(command)}"
        inner = ["unshare", "--net", "--uts", "--mount", "sh", "-c", script]
        process = self._daemon(node, *inner, stdin=subprocess.PIPE)
        while Path(f"/proc/{process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        for words in (
            f"ip link add cable{number} type veth peer name eth0 netns {process.pid}",
            f"ip link set cable{number} master br0 up",
            f"nsenter -t {process.pid} -n ip addr add 10.77.0.{10 + number}/24 dev eth0",
            f"nsenter -t {process.pid} -n ip link set eth0 up",
        ):
            subprocess.run(words.split(), check=True)
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
        self.slurmds[node] = process

    def _daemon(self, name: str, *command: str, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.out").open("ab") as out:
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=out,
                stderr=out,
                env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
            )

    def _states(self) -> list[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"],
            capture_output=True,
            text=True,
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
            check=False,
        )
        return done.stdout.split()


def kill_marked(mark: str) -> None:
    """SIGKILL for all that carry the mark in their environment, but this process."""
    for _ in range(50):
        found = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ProcessLookupError):
                if int(folder.name) != os.getpid() and mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
                    found += 1
        if not found:
            return
        time.sleep(0.05)


def main() -> None:
    folder, proctrack, mode, gpus = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    boot = Boot(folder, proctrack, mode == "own", gpus)
    try:
        boot.start()
        told = " ".join(f"{node}={process.pid}" for node, process in boot.slurmds.items())
        print(f"up {told}", flush=True)
        for line in sys.stdin:  # "node2": this node is started once more
            node = line.strip()
            if boot.own:
                subprocess.run(["ip", "link", "del", f"cable{NODES.index(node) + 1}"], check=False, capture_output=True)
            boot.node(NODES.index(node) + 1, node)
            print(f"up {node}={boot.slurmds[node].pid}", flush=True)
    finally:
        kill_marked(f"FER_SLURM_TEST={os.environ['FER_SLURM_TEST']}")


if __name__ == "__main__":
    main()
