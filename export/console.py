"""The arguments that the export commands have in common."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fer_dist.console import natural, positive

if TYPE_CHECKING:  # torch is behind it: --help must answer at once
    from fer_dist.serve.artifact import Precision

MOST = 65_536
"""Largest batch, and largest number of such a list."""


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


def numbers(text: str) -> tuple[int, ...]:
    """`1,8,64` as numbers of at least 1, for argparse."""
    try:
        found = tuple(positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,8,64") from None
    if max(found) > MOST:
        raise argparse.ArgumentTypeError(f"{max(found)} is more than {MOST}")
    return found
