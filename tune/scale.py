"""Where values lie on an axis of a picture, and what is written beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.ticker import MaxNLocator

from fer_dist.errors import printable
from tune.words import spelt


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where the values of a setting lie on an axis from 0 to 1.

    Attributes:
        places: of each value, in their order.
        ticks: place and label of what is written beside the axis.
        kind: how the axis is divided; category: one place for each different value.
    """

    places: list[float]
    ticks: list[tuple[float, str]]
    kind: str

    @classmethod
    def of(cls, values: Sequence[Any], *, log: bool = True) -> "Scale":
        """The scale that suits values: categories unless all are numbers; log over more than a factor of 20.

        Args:
            log: whether it may be a log scale.
        """
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return cls._of_categories(values)
        low, high = min(values), max(values)
        if low == high:
            return cls(places=[0.5] * len(values), ticks=[(0.5, spelt(low))], kind="linear")
        log = log and low > 0 and high > 20 * low
        warp = math.log10 if log else float
        bottom, span = warp(low), warp(high) - warp(low)

        def place(value: float) -> float:
            return (warp(value) - bottom) / span

        different = sorted(set(values))
        near = min(place(b) - place(a) for a, b in pairwise(different))
        marks = different if len(different) <= 6 and near > 0.05 else _marks(low, high, log, set(map(type, values)))
        labels = _different(marks)
        ticks = [(place(mark), label) for mark, label in zip(marks, labels, strict=True)]
        return cls(places=[place(value) for value in values], ticks=ticks, kind="log" if log else "linear")

    @classmethod
    def _of_categories(cls, values: Sequence[Any]) -> "Scale":
        def order(value: Any) -> tuple[int, float, str]:
            number = isinstance(value, int | float)
            return (0 if value is None else 1 if number else 2, value if number else 0, str(value))

        names = list(dict.fromkeys(spelt(value) for value in sorted(values, key=order)))
        place = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        ticks = [(place[name], legible(name, 16)) for name in names[:: math.ceil(len(names) / 10)]]
        return cls(places=[place[spelt(value)] for value in values], ticks=ticks, kind="category")


def legible(text: str, most: int) -> str:
    """A text that matplotlib's own font has all signs of and that is no formula to it, its middle cut out."""
    text = "".join(sign if ord(sign) < 0x250 else "?" for sign in printable(text))
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"
    return text.replace("$", r"\$")


def _marks(low: float, high: float, log: bool, kinds: set[type]) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not log:
        found = MaxNLocator(5, integer=kinds == {int}, steps=[1, 2, 5, 10]).tick_values(low, high)
        return [float(mark) for mark in found if low <= mark <= high] or [low, high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        marks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        marks = [mark for mark in marks if low <= mark <= high]
        if len(marks) <= 6:
            return marks
    return marks[:: math.ceil(len(marks) / 6)]


def _different(marks: list[float]) -> list[str]:
    """Labels with as many digits as it takes to tell them apart."""
    labels = ([spelt(float(mark), digits) for mark in marks] for digits in range(3, 18))
    return next((found for found in labels if len(set(found)) == len(marks)), [str(mark) for mark in marks])
