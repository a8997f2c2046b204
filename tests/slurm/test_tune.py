"""slurm/tune.sh: one search over two nodes, and over two starts of a job; Ray is gone whatever happens."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Cluster, Job
from tune.ledger import Ledger

pytestmark = pytest.mark.slow

SEARCH = (
    "--data.embedded_train", "140", "--data.embedded_val", "70", "--train.epochs", "3", "--train.global_batch", "16",
    "--model.image_size", "32", "--model.options.width_mult", "0.25", "--run.tensorboard", "false",
    "--searcher", "random", "--scheduler", "none",
)  # fmt: skip
OUTSIDER = 'import sys, ray; ray.init(sys.argv[1], logging_level="ERROR"); print("let in")'


def listening(cluster: Cluster, node: str) -> set[tuple[str, int]]:
    """Addresses and ports that Ray listens on at a node."""
    lines = cluster.on(node, "ss", "-Hltn").splitlines()
    places = [line.split()[3].rpartition(":") for line in lines]
    return {(host, int(port)) for host, _, port in places if int(port) < 32768 and int(port) != 6818}


def require_no_ray(cluster: Cluster, *jobs: Job) -> None:
    cluster.until(lambda: not cluster.working(), f"end of {cluster.working()}")
    for job in jobs:
        assert not list(Path("/tmp").glob(f"fer_ray_{job.number}.*"))


def test_two_nodes(cluster: Cluster) -> None:
    job = cluster.submit(
        "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "slurm/tune.sh", *SEARCH, "--trials", "2"
    )
    job.until_log("trial 001 epoch 1/3")
    address = re.search(r"(\S+:\d+)$", job.log.splitlines()[0])
    assert address
    base = int(address[1].rpartition(":")[2])
    for node in ("node1", "node2"):
        assert {port for _, port in listening(cluster, node)} <= set(range(base, base + 200)), "of this job alone"
    # Ray repeats its request for minutes, and is ended here.
    python = shlex.quote(sys.executable)
    command = f"RAY_AUTH_MODE=disabled timeout -s KILL 15 {python} -c '{OUTSIDER}' {address[1]} 2>&1; true"
    assert "let in" not in cluster.on("node2", "sh", "-c", command), "without the token of the job"
    log = job.done()
    assert "2 trials, 2 at once" in log, "a core on each node"
    assert log.count("280 pictures are ready") == 2
    found = Ledger(cluster.work / "tune_runs" / f"job-{job.number}").trials()
    assert [(trial.status, len(trial.records)) for trial in found] == [("finished", 3)] * 2
    require_no_ray(cluster, job)


def test_a_search_goes_on(cluster: Cluster) -> None:
    """One node, stopped before its limit, requeued; the second start has the search of the first."""
    size = ("--gpus-per-node=0", "--cpus-per-task=2")
    words = ("--trials", "2", "--name", "mine", "--concurrent", "1")
    job = cluster.submit(*size, "slurm/tune.sh", *SEARCH, *words)
    job.until_log("trial 001 epoch 1/3")
    assert {host for host, _ in listening(cluster, "node1")} <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    log = job.done()
    assert "told to stop (USR1): requeued" in log
    assert job.shown()["Restarts"] == "1"
    assert log.count(" trials, 1 at once") == 2, "as it was asked for, in both starts"
    found = Ledger(cluster.work / "tune_runs" / "mine").trials()
    assert [(trial.status, len(trial.records)) for trial in found] == [("finished", 3)] * 2
    require_no_ray(cluster, job)


def test_two_jobs_on_one_node(cluster: Cluster) -> None:
    """Each has ports and a folder of its own; scancel of one leaves the other as it is, and nothing of its own."""
    words = ("--gpus-per-node=0", "--cpus-per-task=1", "--nodelist=node1", "slurm/tune.sh", *SEARCH, "--trials", "1")
    one, other = cluster.submit(*words), cluster.submit(*words)
    for job in (one, other):
        job.until_log("trial 001 starts")
    assert one.log.splitlines()[0].split()[-1] != other.log.splitlines()[0].split()[-1], "addresses"
    cluster.run("scancel", one.number)
    assert one.end()["JobState"] == "CANCELLED"
    assert "trial 001 epoch 3/3" in other.done()
    require_no_ray(cluster, one, other)


def test_wrong_words(cluster: Cluster) -> None:
    """Told before Ray is started."""
    size = ("--gpus-per-node=0", "--cpus-per-task=1", "slurm/tune.sh")
    misspelt, unknown = cluster.submit(*size, "--optim.lrr", "1"), cluster.submit(*size, "--sercher", "tpe")
    address = cluster.submit(*size, "--address", "auto")
    for job, told in (
        (misspelt, "did you mean 'optim.lr'?"),
        (unknown, "did you mean '--searcher'?"),
        (address, "--address is not for this script"),
    ):
        shown = job.end()
        assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0")
        assert told in job.log
        assert len(job.log.splitlines()) == 2, "this, and nothing else"


def test_not_on_a_node(cluster: Cluster) -> None:
    """salloc leaves the script where it is: a loopback would not be that of the node."""
    for script in ("slurm/tune.sh", "slurm/export.sh"):
        printed = cluster.run("salloc", "--gpus-per-node=0", "--cpus-per-task=1", script, check=False)
        assert "is no node of job" in printed
