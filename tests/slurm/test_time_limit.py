"""The limit of a job comes near: SLURM sends USR1 to the script, and the job goes on in another start."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Cluster, Job, no_freezer
from tests.slurm.test_train import require_unbroken

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def limited(unbroken: Path) -> Iterator[dict[str, Job]]:
    """A job near its limit under each proctrack: in two clusters at once, since most of it is waiting.

    The limit is set when the job trains, and taken back before it comes again, however long its starts take: one to two
    minutes are left, and SLURM, which looks every 30 s, sends the signal at the next look.
    """
    ways = ("linuxproc",) if no_freezer() else ("cgroup", "linuxproc")
    with ExitStack() as stack:
        clusters = {way: stack.enter_context(Cluster(way)) for way in ways}
        words = ("--time=30", "--signal=B:USR1@90")
        jobs = {way: cluster.train("limited", *words, SLOW_STEP_S="1.2") for way, cluster in clusters.items()}
        with ThreadPoolExecutor() as pool:
            list(pool.map(reach_the_limit, jobs.values()))
        yield jobs


def reach_the_limit(job: Job) -> None:
    job.until_step(job.cluster.folder_of("limited"), 4)
    hours, minutes, _ = map(int, job.shown()["RunTime"].split(":"))
    job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * hours + minutes + 2}")
    job.until_log("told to stop (USR1): requeued")
    job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")


@pytest.mark.parametrize("way", ["cgroup", "linuxproc"])
def test_time_limit(limited: dict[str, Job], unbroken: Path, way: str) -> None:
    if way not in limited:
        pytest.skip(no_freezer())
    job = limited[way]
    log = job.done()
    assert "stopped: SIGUSR1" in log
    assert "told to stop (USR1): requeued" in log
    assert log.count("start 1:") == log.count("start 2:") == 1, "one log of both starts"
    assert "TIME LIMIT" not in log
    require_unbroken(job.cluster.folder_of("limited"), unbroken)
