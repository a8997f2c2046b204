"""A run whose last rank dies after its first epoch, once: torchrun starts all ranks again.

torchrun --standalone --nproc_per_node=2 --max-restarts=1 tests/workers/restart_worker.py OUT
"""

import os
import signal
import sys
from pathlib import Path

from fer_dist.commandline import leave
from fer_dist.engine.runlog import EpochRecord
from fer_dist.engine.trainer import fit
from fer_dist.world import join
from tests.helpers.small_runs import broken_run, no_pictures


def main() -> None:
    with join("cpu") as world, no_pictures():

        def die_once(record: EpochRecord) -> None:
            last = world.rank == world.size - 1
            if last and record.epoch == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)

        result = fit(broken_run(Path(sys.argv[1])), world, die_once)
        world.only_first(lambda: print("folder", result.folder))


if __name__ == "__main__":
    main()
    leave(0)
