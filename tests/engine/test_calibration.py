"""Reliability bins, ECE and McNemar's test with Holm's correction, against numbers computed by hand."""

import numpy as np
import pytest

from fer_dist.engine.calibration import BINS, calibration
from fer_dist.engine.significance import EXACT_BELOW, McNemar, holm, mcnemar


def two_classes(*confidence: float) -> np.ndarray:
    """Return class 0 with these probabilities, float64 `[N, 2]`."""
    p_N = np.array(confidence, dtype=np.float64)
    return np.stack([p_N, 1 - p_N], axis=1)


def test_ece_by_hand() -> None:
    """Bins of 1/15: 0.96 and 0.98 in the last, 0.72 in (10/15, 11/15]."""
    found = calibration(two_classes(0.96, 0.98, 0.72, 0.70), np.array([0, 1, 0, 0]))
    assert found.count_B.tolist() == [0] * 10 + [2, 0, 0, 0, 2]
    assert found.accuracy_B[[10, 14]].tolist() == [1.0, 0.5]
    assert found.confidence_B[[10, 14]] == pytest.approx([0.71, 0.97])
    assert found.ece == pytest.approx(0.5 * (1 - 0.71) + 0.5 * (0.97 - 0.5))


def test_borders_and_extremes() -> None:
    """A border belongs to the bin below it."""
    found = calibration(two_classes(0.5, 0.5000001, 0.75, 1.0), np.array([0, 0, 0, 0]), bins=4)
    assert found.count_B.tolist() == [0, 1, 2, 1]
    assert calibration(two_classes(*[1.0] * 5), np.zeros(5, np.int64)).ece == 0
    assert calibration(two_classes(*[1.0] * 5), np.ones(5, np.int64)).ece == 1
    nothing = calibration(np.zeros((0, 7)), np.zeros(0, np.int64))
    assert (nothing.ece, nothing.count_B.tolist()) == (0, [0] * BINS)


def table(both: int, only_first: int, only_second: int, neither: int) -> McNemar:
    """Return the test of a two-by-two table."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return mcnemar(np.array(first), np.array(second))


def test_mcnemar() -> None:
    """Exact for few: a coin that falls 1 to 9, two-sided 22 / 1024. For many: (|121 - 59| - 1)^2 / 180 = 20.67."""
    many = table(101, 121, 59, 33)
    assert (many.only_first, many.only_second, many.method) == (121, 59, "chi-square, corrected")
    assert many.p == pytest.approx(5.45e-6, rel=0.01)
    few = table(50, 9, 1, 3)
    assert (few.only_first, few.only_second, few.method) == (9, 1, "exact binomial")
    assert few.p == pytest.approx(22 / 1024)
    assert table(50, 1, 9, 3).p == few.p
    assert table(5, 4, 4, 0).p == table(5, 0, 0, 2).p == 1.0
    assert table(0, 13, 13, 0).p == 1.0  # the correction does not go below 0
    border = table(9, 17, EXACT_BELOW - 18, 9), table(9, 17, EXACT_BELOW - 17, 9)
    assert [found.method for found in border] == ["exact binomial", "chi-square, corrected"]
    assert border[0].p == pytest.approx(border[1].p, abs=0.05)


def test_holm() -> None:
    """0.01, 0.04, 0.03: times 3, then 2 and 1, never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
