"""`python -m fer_dist.launch ...`: torchrun, which leaves with what its ranks left with.

torchrun itself leaves with 1 in all cases, so that a script cannot tell a run that was told to stop from one that
crashed, and SLURM tells the script of neither where a job is preempted with a time of grace: only the ranks are told.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn
from unittest import mock

from fer_dist.commandline import leave
from fer_dist.errors import EXIT_RANK_LOST, EXIT_STOPPED, EXIT_USER_ERROR


def main() -> NoReturn:
    """Run torchrun with `sys.argv`."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    code = 0
    try:
        with mock.patch.object(api, "_terminate_process_handler", first_only(api._terminate_process_handler)):
            run.main()
    except SignalException as told:
        print(f"the launcher was told to stop: {told}", file=sys.stderr)
        code = EXIT_STOPPED
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = summary({failure.exitcode for failure in error.failures.values()})
    leave(code)


def summary(codes: set[int]) -> int:
    """One exit code for those of the ranks; negative ones are signals."""
    for code in (EXIT_STOPPED, EXIT_USER_ERROR):
        if code in codes:
            return code
    return EXIT_RANK_LOST if codes == {EXIT_RANK_LOST} else 1


def first_only(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
    """torchrun's handler, called for one signal only.

    It raises. At the third signal torchrun would leave its ranks alone in the middle of their save, and SLURM would
    end them; preemption alone sends two.
    """
    told: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not told:
            told.append(number)
            handler(number, frame)

    return handle


if __name__ == "__main__":
    main()
