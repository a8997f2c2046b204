"""One cluster for each module that asks for one, and the run that nothing has broken."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import torchrun
from tests.helpers.shared import shared_folder
from tests.helpers.slurm_cluster import TRAINING, Cluster, missing, no_freezer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of this folder, with the reason, where there can be no SLURM."""
    reason = missing()
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def proctrack() -> str:
    """How SLURM finds the processes of a job; cgroup, as real clusters do, where it can be had."""
    return "linuxproc" if no_freezer() else "cgroup"


@pytest.fixture(scope="module")
def cluster(proctrack: str) -> Iterator[Cluster]:
    """Two nodes of four cores without GPUs."""
    with Cluster(proctrack) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def unbroken() -> Path:
    """The run folder of two ranks on one node, without SLURM, that nothing has broken."""

    def train(folder: Path) -> None:
        torchrun(2, "-m", "fer_dist.train", *TRAINING, "--run.name", "unbroken", cwd=folder).ok()

    return shared_folder("unbroken-slurm", train) / "runs" / "unbroken"
