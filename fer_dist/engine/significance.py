"""Whether one model is better than another on the same pictures, or was lucky: McNemar's test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXACT_BELOW = 25
"""With fewer pictures that only one of the two gets right, the p-value is exact."""


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """McNemar (1947) on pictures that two models answered.

    Attributes:
        only_first, only_second: pictures that only this one got right.
        p: two-sided; how probable a difference at least this large is if both are equally good.
        method: "exact binomial" or "chi-square, corrected" (Edwards' correction for continuity, 1948).
    """

    only_first: int
    only_second: int
    p: float
    method: str


def mcnemar(first_right_N: NDArray[np.bool_], second_right_N: NDArray[np.bool_]) -> McNemar:
    """The test, from whether each model was right on each picture, bool `[N]` each."""
    only_first = int(np.count_nonzero(first_right_N & ~second_right_N))
    only_second = int(np.count_nonzero(second_right_N & ~first_right_N))
    discordant = only_first + only_second
    if discordant < EXACT_BELOW:
        tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1)) / 2**discordant
        return McNemar(only_first=only_first, only_second=only_second, p=min(1.0, 2 * tail), method="exact binomial")
    statistic = max(0, abs(only_first - only_second) - 1) ** 2 / discordant
    p = math.erfc(math.sqrt(statistic / 2))  # upper tail of chi-square with one degree of freedom
    return McNemar(only_first=only_first, only_second=only_second, p=p, method="chi-square, corrected")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, raised so that all of them together are wrong no more often than one (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
