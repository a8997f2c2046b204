"""What the export commands have in common on the terminal: arguments, plain lines, a bar for long work."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fer_dist.errors import printable

if TYPE_CHECKING:  # torch is behind it: --help must answer at once
    from fer_dist.serve.artifact import Precision

MOST = 65_536
"""Largest batch, and largest number of such a list."""
SECONDS_BETWEEN_LINES = 15.0
"""Where there is no terminal, long work says at most so often how far it is."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be exported, and how it is judged; see the help of `add_export`."""

    path: Path
    precision: "Precision | None" = None
    data: str | None = None
    limit: int | None = None
    tolerance: str = ""
    calibration: int = 256
    seed: int = 0


def add_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what an artifact is compared on, and how strictly."""
    parser.add_argument("--data", metavar="PATH", help="another data set than the checkpoint's; its validation part")
    parser.add_argument(
        "--limit",
        metavar="N",
        type=positive,
        help="only N pictures, spread evenly; counts as loosened",
    )
    parser.add_argument(
        "--tolerance",
        metavar="TEXT",
        default="",
        help="loosen the gate, which the report records: agreement=0.95,accuracy=0.01,kl=0.1,relative=1e-3",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that exports."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint such as best.pth")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), help="default: fp32, or that of the .onnx")
    parser.add_argument(
        "--calibration", metavar="N", type=positive, default=256, help="int8: training pictures to calibrate with"
    )
    parser.add_argument("--seed", metavar="S", type=natural, default=0, help="int8: seed of their choice")
    add_data(parser)


def wish_of(given: argparse.Namespace) -> Wish:
    """What the arguments of `add_export` say."""
    return Wish(**{field.name: getattr(given, field.name) for field in fields(Wish)})


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


def numbers(text: str) -> tuple[int, ...]:
    """`1,8,64` as numbers of at least 1, for argparse."""
    try:
        found = tuple(positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,8,64") from None
    if max(found) > MOST:
        raise argparse.ArgumentTypeError(f"{max(found)} is more than {MOST}")
    return found


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
