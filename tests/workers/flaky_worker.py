"""A command that ends with a UserError: of all ranks before the group exists, or of rank 1 alone inside of it.

torchrun --standalone --nproc_per_node=2 tests/workers/flaky_worker.py all|one
"""

import os
import sys
import time

from fer_dist.commandline import run
from fer_dist.errors import UserError


def main() -> None:
    rank = int(os.environ["RANK"])
    if sys.argv[1] == "all":
        time.sleep(3.0 if rank == 0 else 0)  # the others end long before rank 0
        raise UserError("all ranks stumble", "mind the step")

    from fer_dist.world import join

    def fail_on_rank_1() -> None:
        if rank == 1:
            raise UserError("rank 1 stumbles", "mind the step")

    with join("cpu") as world:
        world.together(fail_on_rank_1)


if __name__ == "__main__":
    run(main)
