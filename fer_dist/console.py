"""What commands have in common on the terminal: plain lines, a bar for long work, kinds of arguments."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fer_dist.errors import printable

SPLIT_CODES = {"val": 1, "test": 2}
"""Parts that can judge a model; `fer_dist.data.faces` says the same, but with numpy."""
SECONDS_BETWEEN_LINES = 15.0
"""Where there is no terminal, long work says at most so often how far it is."""


def say(text: str) -> None:
    """Lines for people, at once; what a stranger's file says is shown without what a terminal would obey."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere; call what comes out of it with the number done since."""
    if sys.stdout.isatty():
        from rich.progress import Progress

        with Progress(transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.advance(task, done)
        return
    began = last = time.monotonic()
    count = 0

    def count_on(done: int) -> None:
        nonlocal count, last
        count += done
        if (now := time.monotonic()) - last > SECONDS_BETWEEN_LINES:
            last = now
            say(f"{title}: {count:,} of {total:,} after {now - began:.0f} s")

    yield count_on


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value
