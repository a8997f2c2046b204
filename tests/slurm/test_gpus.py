"""What a cluster with GPUs takes and refuses, and what one without does; an array of exports. The GPUs are faked."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import TRAINING, Cluster
from tests.test_readme import COMMANDS

pytestmark = pytest.mark.slow

SBATCH = [line for line in COMMANDS if "sbatch " in line and "slurm/" in line and "container" not in line]
SHORT = (*TRAINING, "--train.epochs", "1", "--train.steps_per_epoch", "2", "--train.device", "cpu")


@pytest.fixture(scope="module")
def faked(proctrack: str) -> Iterator[Cluster]:
    """Two nodes with four GPUs each, as far as SLURM can see."""
    with Cluster(proctrack, gpus=4) as cluster:
        yield cluster


def test_ranks_are_those_of_the_gpus(faked: Cluster) -> None:
    log = faked.submit("--gpus-per-node=2", "--cpus-per-task=4", "slurm/train.sh", *SHORT).done()
    assert "2 ranks on cpu" in log, "a rank for each GPU, not for each core"


def test_more_than_there_are(faked: Cluster) -> None:
    """The nodes have four GPUs each."""
    for words in ("--gpus-per-node=5", "--nodes=2 --gpus-per-node=5"):
        printed = faked.run("sbatch", *words.split(), "--cpus-per-task=1", "slurm/train.sh", check=False)
        assert "Requested node configuration is not available" in printed, printed


@pytest.mark.parametrize("line", SBATCH)
def test_lines_of_the_readme(faked: Cluster, line: str) -> None:
    """SLURM takes each; with two nodes in the place of four, and the cores that these nodes have."""
    words = line.replace("--nodes=4", "--nodes=2").replace("--partition=preemptible", "--partition=low").split()
    at = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
    words[at:at] = ["--test-only", "--cpus-per-task=1"]
    words = [word for word in words if "=" not in word or word.startswith("--")]  # FER_WITHIN=...
    assert "to start at" in faked.run(*words)


def test_two_jobs_share_a_node(faked: Cluster) -> None:
    """Each sees its own GPU only."""
    words = ("--gpus-per-node=1", "--nodelist=node1", "--wrap", "echo GPUs $CUDA_VISIBLE_DEVICES; sleep 2")
    jobs = [faked.submit(*words) for _ in range(2)]
    assert sorted(job.done().strip() for job in jobs) == ["GPUs 0", "GPUs 1"]


def test_a_job_without_gpus(faked: Cluster, cluster: Cluster) -> None:
    """A zero replaces the header's line, --gres=none does not, also where SLURM knows of no GPUs at all."""
    size = ("--test-only", "--cpus-per-task=2", "slurm/train.sh")
    assert "not available" in faked.run("sbatch", "--gres=none", "--gpus-per-node=5", *size, check=False)
    for words in ((), ("--gres=none",)):
        assert "Invalid generic resource" in cluster.run("sbatch", *words, *size, check=False)
    for either in (faked, cluster):
        assert "to start at" in either.run("sbatch", "--gpus-per-node=0", *size)


def test_array_of_exports(cluster: Cluster, unbroken: Path) -> None:
    """Each task has its own exit code: one of the two checkpoints is damaged."""
    for name in ("a", "b"):
        (cluster.work / name).mkdir()
    shutil.copy(unbroken / "best.pth", cluster.work / "a")
    (cluster.work / "b" / "best.pth").write_bytes(b"no checkpoint")
    size = ("--array=5-6", "--gpus-per-node=0", "--cpus-per-task=1")
    words = ("slurm/export.sh", "a/best.pth", "b/best.pth", "--", "--limit", "14")
    job = cluster.submit(*size, *words, FER_EXPORT="export.onnx")
    logs = array_logs(cluster, f"fer_export-{job.number}-{{}}.log", 5, 6)
    assert "export of a/best.pth" in logs[5]
    assert json.loads((cluster.work / "a" / "best.onnx.json").read_text())["kind"] == "onnx"
    assert "export of b/best.pth" in logs[6]
    assert "b/best.pth: exit code 2; the others go on" in logs[6]
    states = cluster.run("scontrol", "show", "job", job.number)
    assert "JobState=COMPLETED" in states
    assert "JobState=FAILED" in states


def test_arrays_of_other_forms(cluster: Cluster) -> None:
    """A step is counted, a task too many has nothing to do, and gaps are refused: a part would be left out.

    A task takes every n-th checkpoint, and one that fails does not keep it from the next.
    """
    size = ("--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--output=form-%a.log")
    words = ("slurm/export.sh", "a.pth", "b.pth", "--", "--limit", "14")
    cluster.run("sbatch", "--array=1-5:2", *size, *words, FER_PYTHON="echo")
    cluster.run("sbatch", "--array=6,8,9", *size, *words, FER_PYTHON="echo")
    cluster.run("sbatch", "--array=10-11", *size, "slurm/export.sh", "a.pth", "b.pth", "c.pth", FER_PYTHON="false")
    logs = array_logs(cluster, "form-{}.log", 1, 3, 5, 6, 8, 9, 10, 11)
    assert logs[1].endswith("export of a.pth\n-m export.trt a.pth --limit 14\n")
    assert logs[3].endswith("export of b.pth\n-m export.trt b.pth --limit 14\n")
    assert logs[5].endswith("2 checkpoints, 3 tasks: nothing to do here\n")
    assert all("the array has gaps: 3 tasks of 6 to 9" in logs[task] for task in (6, 8, 9))
    assert re.findall(r"export of (\w)", logs[10]) == ["a", "c"]
    assert "a.pth: exit code 1; the others go on" in logs[10]
    assert re.findall(r"export of (\w)", logs[11]) == ["b"]


def array_logs(cluster: Cluster, name: str, *tasks: int) -> dict[int, str]:
    """Wait until no job is left; return the output of each task."""
    cluster.until(lambda: not cluster.run("squeue", "-h").strip(), "end of the arrays")
    return {task: (cluster.work / name.format(task)).read_text() for task in tasks}


def test_no_checkpoint(cluster: Cluster) -> None:
    job = cluster.submit("--gpus-per-node=0", "slurm/export.sh", "--", "--limit", "14")
    shown = job.end()
    assert shown["ExitCode"] == "2:0"
    assert "no checkpoint is named" in job.log
