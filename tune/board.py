"""What a search shows while it runs: on a terminal the table of its trials, drawn again in place; elsewhere lines."""

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from fer_dist.errors import printable
from tune.ledger import Trial, ranked
from tune.table import fitting_table

ROOM = 8
"""Lines of a terminal that the table leaves free."""


class Board:
    """Use it in a `with`; `tell` is called whenever something has happened."""

    def __init__(self, trials: Callable[[], list[Trial]], monitor: str, axes: Sequence[str]) -> None:
        self._trials, self._monitor, self._axes = trials, monitor, axes
        self._live: Any = None

    def tell(self, line: str) -> None:
        """A line on what has happened; on a terminal it stands under the table until the next one comes."""
        line = printable(line)
        if self._live is None:
            print(line, flush=True)
        else:
            self._live.update(self._drawn(line), refresh=True)

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(highlight=False, markup=False, emoji=False)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _drawn(self, line: str) -> Any:
        """The trials that run and the best of the others, as many as there is room for."""
        from rich.console import Group

        console, trials = self._live.console, self._trials()
        rows = max(3, console.height - ROOM)
        shown = [trial for trial in trials if trial.status == "running"][:rows]
        ended = [trial for trial in trials if trial.status != "running"]
        shown += ranked(ended, self._monitor)[: rows - len(shown)]
        return Group(fitting_table(console, shown, self._monitor, self._axes), line)
