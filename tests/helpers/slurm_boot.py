"""A SLURM of two nodes on this machine, until standard input ends: `slurm_boot.py FOLDER PROCTRACK GPUS`.

Started by `tests.helpers.slurm_cluster`, as root, as the first process of a PID namespace: its end is the end of all
that it has started. Each node has a network, a host name and mounts of its own.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

NODES = ("node1", "node2")
CPUS = 4
"""That a node says it has."""
TIME_FACTOR = float(os.environ.get("TEST_TIME_FACTOR", "1"))
BOOT_S, KILL_WAIT_S = 30 * TIME_FACTOR, 20 * TIME_FACTOR
"""How long the daemons may take to start, and the processes of a job to end before SLURM kills them."""


class Boot:
    """The daemons of a cluster."""

    def __init__(self, folder: Path, proctrack: str, gpus: int) -> None:
        self.folder, self.proctrack, self.gpus = folder, proctrack, gpus
        self.slurmds: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Everything up, or an exception."""
        (self.folder / "state").mkdir()
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
        nodes = []
        for number, node in enumerate(NODES, 1):
            gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
            nodes.append(f"NodeName={node} NodeAddr=10.77.0.{10 + number} CPUs={CPUS} RealMemory=4000{gres}")
        values = {
            "FOLDER": str(self.folder),
            # Another one in each cluster: jobs of two that run at once share /tmp and the freezer.
            "FIRST": str(random.randrange(1000, 60_000_000)),
            "PROCTRACK": self.proctrack,
            "GRES": "GresTypes=gpu" if self.gpus else "",
            "KILL_WAIT": str(round(KILL_WAIT_S)),
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


def main() -> None:
    boot = Boot(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    boot.start()
    nodes = " ".join(f"{node}={process.pid}" for node, process in boot.slurmds.items())
    print(f"up {nodes}", flush=True)
    for line in sys.stdin:  # "node2": this node is started once more
        number = NODES.index(line.strip()) + 1
        subprocess.run(["ip", "link", "del", f"cable{number}"], check=False, capture_output=True)
        boot.node(number, line.strip())
        print(f"up {line.strip()}={boot.slurmds[line.strip()].pid}", flush=True)


if __name__ == "__main__":
    main()
