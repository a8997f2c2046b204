"""Scores against cases counted by hand, and against formulas written another way."""

import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fer_dist.engine.metrics import Metrics, wilson
from fer_dist.spec import EXPRESSIONS


def of(confusion: list[list[int]] | NDArray[np.int64], loss_sum: float = 0.0) -> Metrics:
    counts = np.array(confusion, np.int64)
    return Metrics(confusion_KK=counts, loss_sum=loss_sum, count=int(counts.sum()))


THREE = of([[5, 1, 0], [2, 2, 0], [0, 0, 0]], loss_sum=4.0)
"""Ten pictures of two classes; the third neither occurs nor is predicted."""


def log_softmax(logits: list[list[float]]) -> Tensor:
    return torch.tensor(logits, dtype=torch.float64).log_softmax(1)


def test_counting_by_hand() -> None:
    """Rows are the truth, columns are predictions."""
    log_p_NK = log_softmax([[4, 0, 0], [0, 4, 0], [0, 4, 0], [0, 0, 4]])
    counted = Metrics.of(log_p_NK, torch.tensor([0, 1, 0, 1]))
    assert counted.confusion_KK.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    hit, miss = -math.log(math.exp(4) / (math.exp(4) + 2)), -math.log(1 / (math.exp(4) + 2))
    assert counted.loss == pytest.approx((2 * hit + 2 * miss) / 4)
    assert (counted.count, counted.accuracy) == (4, 0.5)
    assert isinstance(counted.loss_sum, float)
    assert isinstance(counted.count, int)


def test_scores_and_report_by_hand() -> None:
    assert [THREE.count, THREE.accuracy, THREE.loss] == pytest.approx([10, 0.7, 0.4])
    assert THREE.recall == pytest.approx([5 / 6, 2 / 4, 0])
    assert THREE.precision == pytest.approx([5 / 7, 2 / 3, 0])
    assert THREE.f1 == pytest.approx([10 / 13, 4 / 7, 0])
    assert THREE.macro_f1 == pytest.approx((10 / 13 + 4 / 7) / 2)  # the absent class does not count
    assert of([[3, 0, 1], [0, 4, 0], [0, 0, 0]]).macro_f1 == pytest.approx((6 / 7 + 1 + 0) / 3), "predicted only"
    report = THREE.report(("cat", "dog", "eel"))
    assert json.loads(json.dumps(report)) == report
    low, high = wilson(0.7, 10)
    classes = report.pop("classes")
    assert report.pop("confusion") == [[5, 1, 0], [2, 2, 0], [0, 0, 0]]
    scores = {"accuracy": THREE.accuracy, "macro_f1": THREE.macro_f1, "loss": THREE.loss, "count": 10}
    assert report == {**scores, "accuracy_interval_95": [low, high]}
    assert list(classes) == ["cat", "dog", "eel"]
    assert classes["dog"] == pytest.approx({"precision": 2 / 3, "recall": 0.5, "f1": 4 / 7, "support": 4})


def test_no_samples() -> None:
    none = Metrics.empty(7)
    assert (none.count, none.accuracy, none.loss, none.macro_f1) == (0, 0.0, 0.0, 0.0)
    assert none.recall == none.precision == none.f1 == [0.0] * 7
    assert none.report(EXPRESSIONS)["accuracy_interval_95"] == [0.0, 1.0]
    counted = Metrics.of(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    assert (counted.count, counted.confusion_KK.tolist()) == (0, none.confusion_KK.tolist())
    assert none.better_than(None, "accuracy")
    assert not none.better_than(none, "accuracy")


def test_adding_is_counting_together_in_any_grouping() -> None:
    rng = np.random.default_rng(1)
    log_p_NK = torch.from_numpy(rng.integers(-8, 8, (90, 7)) / 4).log_softmax(1)
    labels_N = torch.from_numpy(rng.integers(0, 7, 90))
    whole = Metrics.of(log_p_NK, labels_N)
    a, b, c = (Metrics.of(log_p_NK[part], labels_N[part]) for part in (slice(10), slice(10, 11), slice(11, 90)))
    for joined in ((a + b) + c, a + (b + c), c + a + b, sum([a, b, c], Metrics.empty(7))):
        assert np.array_equal(joined.confusion_KK, whole.confusion_KK)
        assert joined.count == 90
        assert joined.loss == pytest.approx(whole.loss, rel=1e-12)


def test_loss_is_summed_in_double_precision() -> None:
    """A hundred thousand small float32 losses add up without drifting."""
    log_p_NK = torch.full((100_000, 2), math.log(0.5))
    counted = Metrics.of(log_p_NK, torch.zeros(100_000, dtype=torch.int64))
    assert counted.loss == pytest.approx(float(np.float32(math.log(2))), rel=1e-12)


GOOD = of([[8, 2], [2, 8]], loss_sum=10)
LOSSY = of([[8, 2], [2, 8]], loss_sum=20)
LOPSIDED = of([[10, 0], [4, 6]], loss_sum=10)  # as accurate as GOOD, lower macro-F1


def test_only_the_monitored_score_decides_what_is_better() -> None:
    for monitor, worse in (("loss", LOSSY), ("accuracy", of([[8, 2], [3, 7]], loss_sum=5)), ("macro_f1", LOPSIDED)):
        assert GOOD.better_than(worse, monitor)
        assert not worse.better_than(GOOD, monitor)
        assert not GOOD.better_than(GOOD, monitor), "the same is no gain"
        assert worse.better_than(None, monitor)
    assert not GOOD.better_than(LOSSY, "accuracy")
    assert not LOPSIDED.better_than(GOOD, "accuracy")
    lost = of([[1, 1], [1, 1]], loss_sum=math.nan)
    assert GOOD.better_than(lost, "loss"), "a number is better than NaN"
    assert not lost.better_than(GOOD, "loss")


def test_wilson_interval() -> None:
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ):
        assert wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)
    for count in range(1, 300):
        for hits in (0, count):
            low, high = wilson(hits / count, count)
            assert 0 <= low <= high <= 1
            assert low - 1e-12 <= hits / count <= high + 1e-12
