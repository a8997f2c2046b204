"""How a run ends before its time: errors for people without a traceback, and the exit codes of every command.

0 done, 1 a mistake of ours (with its traceback), and the four below.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
"""A UserError: something to put right first."""
EXIT_REJECTED = 3
"""An artifact is not the model that it was made from; it keeps the name `*.rejected`."""
EXIT_RANK_LOST = 69
"""Another rank is gone, or none has come on for `run.timeout_seconds`; the last checkpoint stands."""
EXIT_STOPPED = 75
"""Told to stop by a signal: saved, and to be started again to go on (BSD's EX_TEMPFAIL)."""


def printable(text: str) -> str:
    """A stranger's text without what a terminal would obey, line ends included."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


class UserError(Exception):
    """Something the user can put right: what was found, and what to type next.

    Args:
        problem: what was found and what was expected, naming file, row or field.
        fix: what to do about it, ideally a line to type.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  -> {self.fix}" if self.fix else self.problem


@contextmanager
def told_as_ours(problem: str, fix: str, tell: Callable[[Exception], str] = str) -> Iterator[None]:
    """Around what a library makes of a stranger's values: whatever it raises becomes a UserError.

    Args:
        problem: what could not be done; the library's own words follow.
        tell: how these are taken from its error.

    Raises:
        UserError: the library raised anything; one of ours stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem}: {tell(error)}", fix) from None


class Stopped(Exception):
    """The run was told to stop: its state is on the disk, and it can go on from there."""


class RankLost(Exception):
    """Another rank is gone: this one cannot go on, and leaves without saving."""


class Rejected(Exception):
    """An artifact did not pass the parity gate."""
