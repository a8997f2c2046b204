"""Reliability bins and ECE, against numbers computed by hand."""

import numpy as np
import pytest

from fer_dist.engine.calibration import BINS, calibration


def two_classes(confidence: list[float]) -> np.ndarray:
    """Class 0 with these probabilities, float64 `[N, 2]`."""
    p_N = np.array(confidence, dtype=np.float64)
    return np.stack([p_N, 1 - p_N], axis=1)


def test_by_hand() -> None:
    """Bins of 1/15: 0.96 and 0.98 in the last, 0.72 in (10/15, 11/15]."""
    found = calibration(two_classes([0.96, 0.98, 0.72, 0.70]), np.array([0, 1, 0, 0]))
    assert BINS == 15
    assert found.count_B.tolist() == [0] * 10 + [2, 0, 0, 0, 2]
    assert found.accuracy_B[[10, 14]].tolist() == [1.0, 0.5]
    assert found.confidence_B[[10, 14]] == pytest.approx([0.71, 0.97])
    assert found.ece == pytest.approx(0.5 * (1 - 0.71) + 0.5 * (0.97 - 0.5))


def test_borders_belong_to_the_bin_below() -> None:
    found = calibration(two_classes([0.5, 0.75, 1.0]), np.array([0, 0, 0]), bins=4)
    assert found.count_B.tolist() == [0, 1, 1, 1]
    assert calibration(two_classes([0.5000001]), np.array([0]), bins=4).count_B.tolist() == [0, 0, 1, 0]


def test_perfect_and_hopeless() -> None:
    assert calibration(two_classes([1.0] * 5), np.zeros(5, np.int64)).ece == 0
    assert calibration(two_classes([1.0] * 5), np.ones(5, np.int64)).ece == 1


def test_nothing() -> None:
    found = calibration(np.zeros((0, 7)), np.zeros(0, np.int64))
    assert found.ece == 0
    assert found.count_B.tolist() == [0] * BINS
