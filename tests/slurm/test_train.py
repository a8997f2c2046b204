"""slurm/train.sh on two nodes: what it trains, what it survives, and when it does not come again."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.helpers.slurm_cluster import TRAINING, Cluster, Job
from tests.helpers.small_runs import plain_lines, starts, state_hash

pytestmark = pytest.mark.slow

SLOWLY: dict[str, Any] = {"SLOW_STEP_S": "0.4"}
"""Of the first start of a job, so that there is time to break it off."""


def require_unbroken(folder: Path, unbroken: Path, *, begun: int = 2) -> None:
    """The run is the unbroken one to the bit: weights, optimizer, metrics; and was started so many times."""
    assert state_hash(folder / "last.pth") == state_hash(unbroken / "last.pth")
    assert plain_lines(folder) == plain_lines(unbroken)
    assert len(starts(folder)) == begun


def test_two_nodes_are_one(cluster: Cluster, unbroken: Path) -> None:
    """One has the run folder read-only and a cache of its own: rank 0 alone writes, each node decodes once."""
    runs, cache = cluster.work / "runs", cluster.folder / "cache"
    runs.mkdir(exist_ok=True)
    cache.mkdir(exist_ok=True)
    read_only = f"mount --bind {runs} {runs} && mount -o remount,bind,ro {runs}"
    cluster.on("node2", "sh", "-c", f"{read_only} && mount -t tmpfs none {cache}")
    assert "Read-only" in cluster.on("node2", "sh", "-c", f"touch {runs}/x 2>&1; true"), "as the test wants it"
    try:
        log = cluster.train("two", nodes=2).done()
        assert "2 nodes (node[1-2])" in log
        assert "2 ranks on cpu" in log
        assert plain_lines(cluster.folder_of("two")) == plain_lines(unbroken), "the metrics of one node"
        require_unbroken(cluster.folder_of("two"), unbroken, begun=1)
        (entry,) = cache.iterdir()
        assert cluster.on("node2", "ls", str(cache)).split() == [entry.name]
    finally:
        cluster.on("node2", "umount", str(runs), str(cache))


def test_requeue(cluster: Cluster, unbroken: Path) -> None:
    job = cluster.train("requeued", **SLOWLY)
    job.until_step(cluster.folder_of("requeued"), 8)
    cluster.run("scontrol", "requeue", job.number)
    log = job.done()
    assert "stopped: SIGTERM" in log, "saved at the next step, not at the last interval"
    assert log.count("start 1:") == log.count("start 2:") == 1, "one log of both starts"
    require_unbroken(cluster.folder_of("requeued"), unbroken)


@pytest.mark.parametrize(("partition", "grace"), [("low", True), ("lowest", False)])
def test_preemption(cluster: Cluster, unbroken: Path, partition: str, grace: bool) -> None:
    """With a time of grace SLURM tells the ranks only, and the script requeues; without, SLURM does."""
    job = cluster.train(partition, f"--partition={partition}", **SLOWLY)
    job.until_step(cluster.folder_of(partition), 8)
    other = cluster.submit("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    log = job.done()
    assert ("told to stop: requeued" in log) == grace
    assert other.state == "COMPLETED"
    require_unbroken(cluster.folder_of(partition), unbroken)


def test_a_node_dies(cluster: Cluster, unbroken: Path) -> None:
    """In mid-epoch, with its daemon and all that runs there; when it is back, the job goes on."""
    job = cluster.train("dead-node", nodes=2, **SLOWLY)
    job.until_step(cluster.folder_of("dead-node"), 4)
    cluster.kill_node("node2")
    job.until(lambda: job.shown()["Restarts"] == "1" or job.state == "PENDING", "requeue")
    cluster.start_node("node2")
    log = job.done()
    assert "another rank is gone" in log or "NODE FAIL" in log
    require_unbroken(cluster.folder_of("dead-node"), unbroken)


def test_scancel_leaves_nothing(cluster: Cluster) -> None:
    job = cluster.train("cancelled", nodes=2, **SLOWLY)
    job.until_step(cluster.folder_of("cancelled"), 4)
    cluster.run("scancel", job.number)
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    cluster.until(lambda: not cluster.working(), f"end of {cluster.working()}")
    assert "stopped: SIGTERM" in job.log, "what was trained is saved all the same"


def program(path: Path, *lines: str) -> str:
    """The path of a program of these lines of sh."""
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return str(path)


def require_failed(job: Job, code: int) -> str:
    """It has ended with this exit code, and did not come again; its log."""
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"], shown["ExitCode"]) == ("FAILED", "0", f"{code}:0"), job.told()
    return job.log


def test_what_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """Settings that are wrong, a crash, hooks that are not there or fail; each says why."""
    setup = tmp_path / "site.sh"
    setup.write_text("module() { return 3; }\nmodule load cuda\n")
    wrong = cluster.train("wrong", settings=("--optim.lr", "-1"))
    misspelt = cluster.train("misspelt", nodes=2, settings=("--optim.lrr", "1"))
    crash = cluster.train("crash", CRASH_STEP="3")
    hook = cluster.train("hook", FER_SETUP="/no/such/file")
    failing = cluster.train("failing", FER_SETUP=str(setup))
    python = cluster.train("python", FER_PYTHON="/no/such/python")
    for job, told in ((wrong, "optim.lr is -1.0, expected > 0"), (misspelt, "unknown setting 'optim.lrr'")):
        log = require_failed(job, 2)
        assert log.count(told) == log.count("error") == 1, "told once"
        assert "Traceback" not in log
    log = require_failed(crash, 1)
    assert "the test has asked for it" in log
    assert "ended with 1: not requeued" in log
    assert "FER_SETUP names /no/such/file" in require_failed(hook, 2)
    assert "site.sh, has ended with exit code 3" in require_failed(failing, 2)
    assert "/no/such/python cannot run fer_dist.train" in require_failed(python, 2)


def test_a_task_of_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """The last task has the number of the array; it alone is requeued, while the others go on."""
    within = program(
        tmp_path / "instead",
        'case "$*$SLURM_RESTART_COUNT" in *--print-config | *[0-9]) exit ;; esac',
        f"trap 'exit 75' USR1; touch {tmp_path}/$SLURM_ARRAY_TASK_ID; sleep 8 & wait",
    )
    array = cluster.train("array", "--array=0-1", FER_WITHIN=within)
    first, last = (Job(cluster, f"{array.number}_{task}") for task in (0, 1))
    cluster.until((tmp_path / "0").exists, "first task")
    cluster.until((tmp_path / "1").exists, "last task")
    assert last.shown()["JobId"] == array.number
    cluster.run("scancel", "--signal=USR1", "--batch", last.number)
    assert (last.end()["JobState"], last.shown()["Restarts"]) == ("COMPLETED", "1"), last.told()
    assert (first.end()["JobState"], first.shown()["Restarts"]) == ("COMPLETED", "0"), first.told()


@pytest.mark.parametrize("by", ["chdir", "FER_SLURM", ""])
def test_submitted_from_elsewhere(cluster: Cluster, by: str) -> None:
    """With blanks in all paths; the environment beside the scripts is used, and hooks that are words."""
    repository = cluster.folder / "my repository"
    if not repository.exists():
        shutil.copytree(cluster.work / "slurm", repository / "slurm")
        (repository / ".venv" / "bin").mkdir(parents=True)
        program(repository / ".venv" / "bin" / "python", "printf '<%s>' here \"$@\"")
    where = (f"--chdir={repository}", "--export=NONE") if by == "chdir" else ()
    hooks = {"FER_SLURM": str(repository / "slurm"), "FER_SRUN": "--label --quiet", "FER_RANKS_PER_NODE": "3"}
    environment: dict[str, Any] = hooks if by == "FER_SLURM" else {}
    size = ("--gpus-per-node=0", "--cpus-per-task=1", f"--output={cluster.folder}/elsewhere {by}.log")
    words = ("sbatch", "--parsable", *size, *where, f"{repository}/slurm/train.sh", "--data", "my faces.zip")
    job = Job(cluster, cluster.run("sh", "-c", 'cd / && exec "$@"', "sh", *words, **environment).strip())
    if by:
        shown = job.end()
        assert shown["JobState"] == "COMPLETED"
        told = (cluster.folder / f"elsewhere {by}.log").read_text()
        assert re.search(r"<--rdzv-endpoint=[^<]+:\d+>.*<fer_dist.train><--data><my faces.zip>$", told)
        assert ("\n0: <here>" in told) == ("<--nproc_per_node=3>" in told) == (by == "FER_SLURM")
    else:
        assert job.end()["ExitCode"] == "2:0"
        told = (cluster.folder / "elsewhere .log").read_text()
        assert told == "error: no lib.sh; submit from the repository, or export FER_SLURM=.../slurm\n"


def test_a_cap_on_requeues(cluster: Cluster, tmp_path: Path) -> None:
    """Stopped again and again; the hooks of a site are followed at each start, and may be careless."""
    setup = tmp_path / "site.sh"
    setup.write_text(f"set -e; : $NOT_SET_ANYWHERE\necho start >> {tmp_path}/sourced\nexport FER_MAX_REQUEUES=1\n")
    within = program(
        tmp_path / "instead",
        'touch "$1"; shift',
        'case "$*" in *--print-config) exit ;; esac',
        "scancel --signal=USR1 --batch $SLURM_JOB_ID; sleep 1; exit 75",
    )
    words = f"env FER_WITHIN_WAS_HERE=1 {within} {tmp_path}/within"
    job = cluster.train("capped", FER_SETUP=str(setup), FER_WITHIN=words)
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "1"), job.told()
    assert "requeued 1 times already (FER_MAX_REQUEUES=1): not again" in job.log
    assert (tmp_path / "sourced").read_text().count("start") == 2
    assert (tmp_path / "within").exists()


def test_without_scontrol(cluster: Cluster, tmp_path: Path) -> None:
    """As within a container: the exit code says that it wants to be started again."""
    for name in ("bash", "srun", "date", "hostname", "sed", "head", "dirname", "timeout", "sleep", "env"):
        (tmp_path / name).symlink_to(cluster.run("which", name).strip())
    setup = tmp_path / "site.sh"
    setup.write_text(f"PATH={tmp_path}\nFER_PYTHON={shlex.quote(cluster.python)}\n")
    job = cluster.train("container", STOP_STEP="3", FER_SETUP=str(setup))
    log = require_failed(job, 75)
    assert "RequeueExit=75" in log
    assert "stopped: SIGUSR1" in log


def test_a_finished_run_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """The signal comes when the ranks are done, and changes nothing."""
    within = program(
        tmp_path / "within",
        'trap : USR1; "$@" || exit',
        'case "$*" in *fer_dist.launch*)',
        f"  scancel --signal=USR1 --batch $SLURM_JOB_ID && touch {tmp_path}/told; sleep 2 ;;",
        "esac",
    )
    job = cluster.train("finished", settings=("--train.epochs", "1"), FER_WITHIN=within)
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "0"), job.told()
    assert (tmp_path / "told").exists()
    assert "best validation accuracy" in job.log


def test_within_salloc(cluster: Cluster) -> None:
    """The interactive use: the same script, in an allocation that is there."""
    size = ("--nodes=2", "--cpus-per-task=1", "--ntasks-per-node=1")
    training = ("--train.epochs", "1", "--train.steps_per_epoch", "2", "--run.name", "interactive")
    printed = cluster.run("salloc", *size, "slurm/train.sh", *TRAINING, *training)
    assert "2 nodes (node[1-2])" in printed
    assert "best validation accuracy" in printed


def test_refusals_outside_of_a_job() -> None:
    for script, job, message in (
        *((script, "", "this is not a job of SLURM") for script in ("train", "tune", "export")),
        ("train", "1", "FER_MAX_REQUEUES is 'many', expected a number"),
    ):
        environment = {**os.environ, "SLURM_JOB_ID": job, "FER_MAX_REQUEUES": "many"}
        words = ["bash", f"slurm/{script}.sh"]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
