"""Scores against cases counted by hand, and against formulas written another way."""

import json
import math

import numpy as np
import pytest
import torch

from fer_dist.engine.metrics import Metrics, wilson
from fer_dist.spec import EXPRESSIONS


def of(confusion: list[list[int]], loss_sum: float = 0.0) -> Metrics:
    counts = np.array(confusion, np.int64)
    return Metrics(confusion_KK=counts, loss_sum=loss_sum, count=int(counts.sum()))


def test_counting_by_hand() -> None:
    """Rows are the true classes, columns are predictions; the sum of two parts is the whole."""
    logits_NK = torch.tensor([[4, 0, 0], [0, 4, 0], [0, 4, 0], [0, 0, 4]], dtype=torch.float64)
    log_p_NK, labels_N = logits_NK.log_softmax(1), torch.tensor([0, 1, 0, 1])
    hit, miss = -math.log(math.exp(4) / (math.exp(4) + 2)), -math.log(1 / (math.exp(4) + 2))
    parts = Metrics.of(log_p_NK[:1], labels_N[:1]) + Metrics.of(log_p_NK[1:], labels_N[1:])
    for counted in (Metrics.of(log_p_NK, labels_N), parts, Metrics.empty(3) + parts):
        assert counted.confusion_KK.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
        assert counted.loss == pytest.approx((2 * hit + 2 * miss) / 4)
        assert (counted.count, counted.accuracy) == (4, 0.5)
        assert type(counted.loss_sum) is float


def test_scores_and_report_by_hand() -> None:
    """Ten pictures of two classes; the third neither occurs nor is predicted, and does not count in macro-F1."""
    metrics = of([[5, 1, 0], [2, 2, 0], [0, 0, 0]], loss_sum=4.0)
    report = metrics.report(("cat", "dog", "eel"))
    assert json.loads(json.dumps(report)) == report
    classes = report.pop("classes")
    scores = {"accuracy": 0.7, "macro_f1": pytest.approx((10 / 13 + 4 / 7) / 2), "loss": 0.4, "count": 10}
    interval = pytest.approx(wilson(0.7, 10))
    assert report == {**scores, "accuracy_interval_95": interval, "confusion": metrics.confusion_KK.tolist()}
    assert {name: list(row.values()) for name, row in classes.items()} == {
        "cat": pytest.approx([5 / 7, 5 / 6, 10 / 13, 6]),
        "dog": pytest.approx([2 / 3, 2 / 4, 4 / 7, 4]),
        "eel": [0, 0, 0, 0],
    }
    assert list(classes["cat"]) == ["precision", "recall", "f1", "support"]
    assert of([[3, 0, 1], [0, 4, 0], [0, 0, 0]]).macro_f1 == pytest.approx((6 / 7 + 1 + 0) / 3), "predicted only"


def test_no_samples() -> None:
    none = Metrics.empty(7)
    assert (none.count, none.accuracy, none.loss, none.macro_f1) == (0, 0.0, 0.0, 0.0)
    assert none.recall == none.precision == none.f1 == [0.0] * 7
    assert none.report(EXPRESSIONS)["accuracy_interval_95"] == [0.0, 1.0]
    counted = Metrics.of(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    assert (counted.count, counted.confusion_KK.tolist()) == (0, none.confusion_KK.tolist())


def test_loss_is_summed_in_double_precision() -> None:
    """A hundred thousand small float32 losses add up without drifting."""
    log_p_NK = torch.full((100_000, 2), math.log(0.5))
    counted = Metrics.of(log_p_NK, torch.zeros(100_000, dtype=torch.int64))
    assert counted.loss == pytest.approx(float(np.float32(math.log(2))), rel=1e-12)


def test_only_the_monitored_score_decides_what_is_better() -> None:
    good = of([[8, 2], [2, 8]], loss_sum=10)
    lossy, lopsided = of([[8, 2], [2, 8]], loss_sum=20), of([[10, 0], [4, 6]], loss_sum=10)
    for monitor, worse in (("loss", lossy), ("accuracy", of([[8, 2], [3, 7]], loss_sum=5)), ("macro_f1", lopsided)):
        assert good.better_than(worse, monitor)
        assert not worse.better_than(good, monitor)
        assert not good.better_than(good, monitor), "an equal score is not a gain"
        assert worse.better_than(None, monitor)
    for other in (lossy, lopsided):  # as accurate
        assert not good.better_than(other, "accuracy")
        assert not other.better_than(good, "accuracy")
    nan = of([[1, 1], [1, 1]], loss_sum=math.nan)
    assert good.better_than(nan, "loss")
    assert not nan.better_than(good, "loss")


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
        for p in (0, 1):
            low, high = wilson(p, count)
            assert 0 <= low <= p + 1e-12
            assert p - 1e-12 <= high <= 1
