"""The limit of a job comes near: SLURM sends USR1 to the script, and the job goes on in another start."""

import re
from datetime import datetime
from pathlib import Path

import pytest

from tests.slurm.rig import Cluster
from tests.slurm.test_train import require_unbroken


@pytest.mark.parametrize("proctrack", ["cgroup", "linuxproc"], indirect=True)
def test_time_limit(cluster: Cluster, unbroken: Path) -> None:
    """A minute is the shortest limit, and SLURM looks every 30 s: the signal comes 5 to 35 s after the start."""
    job = cluster.train("limited", "--time=1", "--signal=B:USR1@25", SLOW_STEP_S="0.9")
    log = job.done()
    assert "stopped: SIGUSR1" in log
    assert "told to stop (USR1): requeued" in log
    begun = [datetime.fromisoformat(when) for when in re.findall(r"^(\S+) job \d+, start \d", log, re.M)]
    (told,) = (datetime.fromisoformat(when) for when in re.findall(r"^(\S+) told to stop", log, re.M))
    assert len(begun) == 2
    assert (told - begun[0]).total_seconds() < 60, "before the limit"
    assert "TIME LIMIT" not in log
    require_unbroken(cluster.folder_of("limited"), unbroken)
