"""The trials of a search as a table for the terminal."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fer_dist.errors import printable
from tune.ledger import Trial, ranked
from tune.words import SCORES, number, spelt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

REASON = 80
"""So much of a reason stands in the table [signs]."""
LEAST_REASON = 24
"""To so little it is folded on a narrow terminal [signs]."""
WIDE = 10_000
"""Wider than any table."""


def print_table(trials: list[Trial], monitor: str, axes: Sequence[str]) -> None:
    """Print the trials, the best first."""
    from rich.console import Console

    # Where there is no terminal, there is no width to fit into.
    wide = None if sys.stdout.isatty() else WIDE
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=wide)
    console.print(fitting_table(console, trials, monitor, axes))


def fitting_table(console: "Console", trials: list[Trial], monitor: str, axes: Sequence[str]) -> "Table":
    """The trials, the best first: a column a setting; where a terminal is too narrow for that, one for all of them."""
    from rich.measure import Measurement

    ordered = ranked(trials, monitor) + [trial for trial in trials if not trial.records]
    table = _table(ordered, monitor, axes, ruled=console.is_terminal, merged=False)
    needed = Measurement.get(console, console.options.update_width(WIDE), table).maximum
    folding = max((len(_cut(trial.reason)) for trial in trials), default=0) - LEAST_REASON
    if needed - max(0, folding) > console.width:
        table = _table(ordered, monitor, axes, ruled=console.is_terminal, merged=True)
    return table


def _table(ordered: list[Trial], monitor: str, axes: Sequence[str], *, ruled: bool, merged: bool) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if ruled else None)
    names = [_leaf(axis, axes) for axis in axes]
    reasons = not merged and any(trial.reason for trial in ordered)
    for column in ("trial", "status"):
        table.add_column(column, no_wrap=True)
    for column in (SCORES[monitor], "in epoch", "epochs", *["seconds"] * (not merged), *names * (not merged)):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ["settings"] * merged + ["reason"] * reasons:
        table.add_column(column, overflow="fold", min_width=LEAST_REASON)
    for trial in ordered:
        best = trial.best(monitor)
        score = ["-", "-"] if best is None else [number(monitor, best["val"][monitor]), str(best["epoch"])]
        cells = [trial.id, trial.status, *score, str(len(trial.records))]
        values = [printable(spelt(trial.values[axis])) if axis in trial.values else "-" for axis in axes]
        if merged:
            pairs = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
            cells.append(f"{pairs}\n{_cut(trial.reason)}".rstrip())
        else:
            cells += [f"{trial.seconds:.1f}" if trial.seconds else "-", *values, *[_cut(trial.reason)] * reasons]
        table.add_row(*cells)
    return table


def _leaf(axis: str, axes: Sequence[str]) -> str:
    """The last part of a dotted name; all of it where another has the same."""
    leaf = axis.rpartition(".")[2]
    return axis if [other.rpartition(".")[2] for other in axes].count(leaf) > 1 else leaf


def _cut(reason: str) -> str:
    line = printable(next(iter(reason.strip().splitlines()), ""))
    return line if len(line) <= REASON else f"{line[: REASON - 1]}…"
