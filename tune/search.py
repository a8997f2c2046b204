"""Search for settings: `python -m tune.search --config vit --data fer2013.csv --trials 40`.

Without arguments: a small search on the embedded drawn faces.
"""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NoReturn

from fer_dist.commandline import run
from fer_dist.console import say
from fer_dist.errors import Stopped, UserError
from tune.asked import PROG, Search, again, near, new, parser, resumed
from tune.ledger import Ledger
from tune.settings import FILE


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, 2 after a UserError, 75 where it was stopped."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    try:
        given, rest = parser().parse_known_args(argv)
        search = resumed(given, rest) if given.resume else new(given, rest)
        ledger = Ledger(search.folder)
        with ledger.hold():
            try:
                _search(search, ledger, given)
            finally:
                _leave_nothing(ledger)
            _report(search, ledger, shown=True)
    except KeyboardInterrupt:
        raise Stopped(f"before it had begun, or when it was over\n  -> {PROG} --resume tells") from None


def _search(search: Search, ledger: Ledger, given: Namespace) -> None:
    """Run trials until there are enough.

    Raises:
        UserError: the cluster, the nodes or the data will not do.
        Stopped: Ctrl-C or SIGTERM, after the first trial has begun.
    """
    try:
        _run(search, ledger, given)
    except KeyboardInterrupt:
        trials = ledger.trials()
        if not trials:
            raise
        _report(search, ledger, shown=False)
        ended, total = sum(trial.status != "running" for trial in trials), max(search.settings.trials, len(trials))
        raise Stopped(
            f"{ended} of {total} trials have ended, the others keep what they have\n  -> {again(search.folder)} goes on"
        ) from None


def _leave_nothing(ledger: Ledger) -> None:
    """Remove the folder of a search that has failed before its first trial: the same line can be typed again."""
    if not ledger.trials() and not ledger.runs():
        for path in (ledger.path, ledger.folder / FILE):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            ledger.folder.rmdir()


def _run(search: Search, ledger: Ledger, given: Namespace) -> None:
    """Everything that needs Ray.

    Raises:
        UserError: the cluster, the nodes or the data will not do.
        KeyboardInterrupt: Ctrl-C, or a SIGTERM.
    """
    from tune.cluster import connected, open_desk, prepare_nodes, require_resources, with_gpus
    from tune.trial import Task

    address = given.address or os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address  # Ray's word for a cluster of its own
    # Ray's own files: nothing that is wanted later, but all nodes of a cluster must see them.
    with (
        TemporaryDirectory(
            prefix=".ray-" if address else "fer_dist-", dir=search.folder if address else None
        ) as scratch,
        _interruptible(),
        connected(address, given.cores),
        _interruptible(),  # Ray has taken SIGTERM for itself
    ):
        settings = with_gpus(search.settings, search.config.train.device)
        at_once = require_resources(settings, given.concurrent)
        task = Task(
            folder=search.folder, scratch=Path(scratch), config=search.config, settings=settings, alone=not address
        )
        for line in prepare_nodes(task):
            say(line)
        _tune(search, ledger, task, open_desk(), at_once)


def _tune(search: Search, ledger: Ledger, task: Any, desk: Any, at_once: int) -> None:
    """Give trials their values until there are enough, and wait for the last one."""
    from ray import tune
    from ray.exceptions import RayError

    from tune.board import Board
    from tune.driver import Listener, Source

    settings, config = task.settings, search.config
    source = Source(ledger, config, search.space, settings)
    if not source.left:
        return
    say(
        f"search {near(search.folder)}: {source.left} trials, {at_once} at once, each {settings.workers} "
        f"worker{'s' * (settings.workers > 1)}; {settings.searcher}, {settings.scheduler}"
    )
    board = Board(ledger.trials, config.train.monitor, search.space.names)
    total = max(settings.trials, len(ledger.trials()))
    tuner = _tuner(task, source, Listener(ledger, config, settings, desk, total, board.tell), desk, at_once)
    try:
        with board:
            tuner.fit()
    except (RayError, tune.TuneError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
        raise UserError(f"Ray has ended the search: {told}", f"{again(search.folder)} goes on") from None
    except OSError as error:
        told = error.strerror or str(error)
        raise UserError(f"Ray cannot write: {told}", f"free some space; {again(search.folder)} goes on") from None


def _tuner(task: Any, source: Any, listener: Any, desk: Any, at_once: int) -> Any:
    """Ray's experiment, with our parts in their places."""
    from ray import tune

    from tune.driver import scheduler
    from tune.trial import run_trial

    settings = task.settings
    alone = {"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {})
    # The leader of several workers computes nothing, but a bundle of nothing is none to Ray.
    needs = alone if settings.workers == 1 else {"CPU": 0, "memory": 2**20}
    return tune.Tuner(
        tune.with_resources(partial(run_trial, task=task), needs),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler(settings, task.config, Ledger(task.folder).trials(), desk),
            num_samples=source.left,
            max_concurrent_trials=at_once,
            reuse_actors=settings.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(task.scratch),
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            callbacks=[listener],
            verbose=0,
        ),
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(search: Search, ledger: Ledger, *, shown: bool) -> None:
    """Write the tables, the pictures and the best model; show them.

    Raises:
        UserError: not one trial has finished an epoch.
    """
    from tune.report import show, write_report

    trials, monitor = ledger.trials(), search.config.train.monitor
    write_report(search.folder, trials, search.config, search.space.names, asdict(search.settings))
    if not shown:
        return
    show(trials, monitor, search.space.names, near(search.folder))
    if trials and not any(trial.records for trial in trials):
        told = trials[0].reason or "its run folder is gone"
        raise UserError(f"no trial has finished an epoch; the first: {told}", "put that right first")
    failed = sum(trial.status == "failed" for trial in trials)
    if failed:
        say(f"{failed} have failed; {again(search.folder)} --retry-failed gives them another try")


if __name__ == "__main__":
    main()
