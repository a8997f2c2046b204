"""Scores against cases counted by hand, and against formulas written another way."""

import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fer_dist.engine.metrics import Metrics, wilson
from fer_dist.engine.score import score
from fer_dist.spec import EXPRESSIONS
from fer_dist.world import World


def of(confusion: list[list[int]] | NDArray[np.int64], loss_sum: float = 0.0) -> Metrics:
    counts = np.array(confusion, np.int64)
    return Metrics(confusion_KK=counts, loss_sum=loss_sum, count=int(counts.sum()))


THREE = of([[5, 1, 0], [2, 2, 0], [0, 0, 0]], loss_sum=4.0)
"""Ten pictures of two classes; the third neither occurs nor is predicted."""


def log_softmax(logits: list[list[float]]) -> Tensor:
    return torch.tensor(logits, dtype=torch.float64).log_softmax(1)


def test_counting_by_hand() -> None:
    log_p_NK = log_softmax([[4, 0, 0], [0, 4, 0], [0, 4, 0], [0, 0, 4]])
    counted = Metrics.of(log_p_NK, torch.tensor([0, 1, 0, 1]))
    assert counted.confusion_KK.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    hit, miss = -math.log(math.exp(4) / (math.exp(4) + 2)), -math.log(1 / (math.exp(4) + 2))
    assert counted.loss == pytest.approx((2 * hit + 2 * miss) / 4)
    assert (counted.count, counted.accuracy) == (4, 0.5)
    assert isinstance(counted.loss_sum, float)
    assert isinstance(counted.count, int)


def test_scores_by_hand() -> None:
    assert THREE.count == 10
    assert THREE.accuracy == pytest.approx(0.7)
    assert THREE.loss == pytest.approx(0.4)
    assert THREE.recall == pytest.approx([5 / 6, 2 / 4, 0])
    assert THREE.precision == pytest.approx([5 / 7, 2 / 3, 0])
    assert THREE.f1 == pytest.approx([10 / 13, 4 / 7, 0])
    assert THREE.macro_f1 == pytest.approx((10 / 13 + 4 / 7) / 2)  # the absent class does not count


def test_a_class_that_is_only_predicted_counts_in_macro_f1() -> None:
    assert of([[3, 0, 1], [0, 4, 0], [0, 0, 0]]).macro_f1 == pytest.approx((6 / 7 + 1 + 0) / 3)


def test_scores_against_sets_of_samples() -> None:
    """The definitions, sample by sample, on 500 random answers."""
    rng = np.random.default_rng(0)
    true_N, logits_NK = rng.integers(0, 7, 500), rng.normal(size=(500, 7))
    counted = Metrics.of(torch.from_numpy(logits_NK).log_softmax(1), torch.from_numpy(true_N))
    answer_N = logits_NK.argmax(1)
    f1 = []
    for k in range(7):
        both = np.sum((true_N == k) & (answer_N == k))
        precision, recall = both / np.sum(answer_N == k), both / np.sum(true_N == k)
        assert counted.precision[k] == pytest.approx(precision)
        assert counted.recall[k] == pytest.approx(recall)
        f1.append(2 * precision * recall / (precision + recall))
    assert counted.f1 == pytest.approx(f1)
    assert counted.macro_f1 == pytest.approx(np.mean(f1))
    assert counted.accuracy == pytest.approx(np.mean(true_N == answer_N))
    odds_NK = np.exp(logits_NK)
    assert counted.loss == pytest.approx(-np.mean(np.log(odds_NK[range(500), true_N] / odds_NK.sum(1))))


def test_rows_are_truth_and_columns_are_predictions() -> None:
    counted = Metrics.of(log_softmax([[0, 0, 9]]), torch.tensor([1]))
    assert counted.confusion_KK[1, 2] == 1


def test_no_samples() -> None:
    none = Metrics.empty(7)
    assert (none.count, none.accuracy, none.loss, none.macro_f1) == (0, 0.0, 0.0, 0.0)
    assert none.recall == none.precision == none.f1 == [0.0] * 7
    assert none.report(EXPRESSIONS)["accuracy_interval_95"] == [0.0, 1.0]
    counted = Metrics.of(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    assert counted.count == 0
    assert counted.confusion_KK.tolist() == none.confusion_KK.tolist()


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
        assert joined.report(EXPRESSIONS)["classes"] == whole.report(EXPRESSIONS)["classes"]


def test_loss_is_summed_in_double_precision() -> None:
    """A hundred thousand small float32 losses add up without drifting."""
    log_p_NK = torch.full((100_000, 2), math.log(0.5))
    counted = Metrics.of(log_p_NK, torch.zeros(100_000, dtype=torch.int64))
    assert counted.loss == pytest.approx(float(np.float32(math.log(2))), rel=1e-12)


GOOD = of([[8, 2], [2, 8]], loss_sum=10)
LOSSY = of([[8, 2], [2, 8]], loss_sum=20)
LOPSIDED = of([[10, 0], [4, 6]], loss_sum=10)  # as accurate as GOOD, lower macro-F1


@pytest.mark.parametrize(
    ("monitor", "better", "worse"),
    [("loss", GOOD, LOSSY), ("accuracy", GOOD, of([[8, 2], [3, 7]])), ("macro_f1", GOOD, LOPSIDED)],
)
def test_better_than(monitor: str, better: Metrics, worse: Metrics) -> None:
    assert better.better_than(worse, monitor)
    assert not worse.better_than(better, monitor)
    assert not better.better_than(better, monitor), "the same is no gain"
    assert worse.better_than(None, monitor)


def test_only_the_monitored_score_decides() -> None:
    assert not GOOD.better_than(LOSSY, "accuracy")
    assert not LOPSIDED.better_than(GOOD, "accuracy")
    assert not of([[1, 0], [0, 1]], loss_sum=9).better_than(GOOD, "loss")


def test_a_number_is_better_than_none_and_not_the_other_way() -> None:
    lost = of([[1, 1], [1, 1]], loss_sum=math.nan)
    assert GOOD.better_than(lost, "loss")
    assert not lost.better_than(GOOD, "loss")


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_interval_of_known_cases(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_stays_on_0_to_1() -> None:
    for count in range(1, 300):
        for hits in (0, count):
            low, high = wilson(hits / count, count)
            assert 0 <= low <= high <= 1
            assert low - 1e-12 <= hits / count <= high + 1e-12


def test_report_is_plain_and_whole() -> None:
    names = ("cat", "dog", "eel")
    report = THREE.report(names)
    assert json.loads(json.dumps(report)) == report
    assert report["accuracy"] == pytest.approx(0.7)
    assert report["accuracy_interval_95"] == pytest.approx(wilson(0.7, 10))
    assert report["macro_f1"] == THREE.macro_f1
    assert report["loss"] == pytest.approx(0.4)
    assert report["count"] == 10
    assert report["confusion"] == [[5, 1, 0], [2, 2, 0], [0, 0, 0]]
    assert list(report["classes"]) == list(names)
    assert report["classes"]["dog"] == pytest.approx({"precision": 2 / 3, "recall": 0.5, "f1": 4 / 7, "support": 4})


# -- score: the same counts from any cut into batches, and with the mirror image


def answers(images_N1SS: Tensor) -> Tensor:
    """A "network" of three classes: the grey levels of the first three pixels of the first row."""
    return images_N1SS[:, 0, 0, :3].float() / 16


def some_batches(size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (40,), generator=generator)
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, 40, size)]


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("flip", [False, True])
def test_score_counts_the_same_in_any_batches(size: int, flip: bool) -> None:
    whole = score(answers, some_batches(40), World(), classes=3, flip=flip)
    cut = score(answers, some_batches(size), World(), classes=3, flip=flip)
    assert np.array_equal(cut.confusion_KK, whole.confusion_KK)
    assert cut.count == 40
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)


def test_flip_averages_the_probabilities_of_both_pictures() -> None:
    ((images, labels),) = some_batches(40)
    seen = score(answers, [(images, labels)], World(), classes=3, flip=True)
    mean_NK = (answers(images).double().softmax(1) + answers(images.flip(-1)).double().softmax(1)) / 2
    expected = Metrics.of(mean_NK.log(), labels)
    assert np.array_equal(seen.confusion_KK, expected.confusion_KK)
    assert seen.loss == pytest.approx(expected.loss, rel=1e-12)
    assert seen.loss != score(answers, [(images, labels)], World(), classes=3).loss


def test_score_without_samples() -> None:
    assert score(answers, [], World(), classes=3).count == 0
