"""Temperature scaling: numbers by hand, and predictions whose best temperature is known."""

import numpy as np
import pytest

from fer_dist.engine.calibration import calibration
from fer_dist.engine.temperature import FOLDS, LEAST, best_temperature, cross_fitted, fit, folds, nll
from fer_dist.errors import UserError


def drawn(count: int, times: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `[count, 7]`, `times` too large for labels that are drawn from their softmax."""
    random = np.random.default_rng(seed)
    logits_NK = random.normal(size=(count, 7)) * 1.5
    p_NK = np.exp(logits_NK)
    p_NK /= p_NK.sum(1, keepdims=True)
    labels_N = (p_NK.cumsum(1) > random.random((count, 1))).argmax(1)
    return logits_NK * times, labels_N


@pytest.mark.parametrize("times", [0.3, 1.0, 8.0])
def test_the_temperature_of_drawn_labels(times: float) -> None:
    logits_NK, labels_N = drawn(20_000, times)
    found = fit(logits_NK, labels_N)
    assert found.temperature == pytest.approx(times, rel=0.03)
    assert found.ece_cross_fitted < 0.012
    assert found.nll_after <= found.nll_cross_fitted <= found.nll_after + 1e-3
    log_p_NK = logits_NK - np.log(np.exp(logits_NK).sum(1, keepdims=True))
    assert best_temperature(log_p_NK, labels_N) == pytest.approx(found.temperature, rel=1e-9), "of log-probabilities"
    if times != 1:
        assert found.ece_before > 3 * found.ece_cross_fitted
        assert found.nll_before > found.nll_after + 0.01


def test_no_other_temperature_is_better() -> None:
    logits_NK, labels_N = drawn(300, 2.0, seed=3)
    temperature = best_temperature(logits_NK, labels_N)
    lowest = nll(logits_NK / temperature, labels_N)
    assert all(nll(logits_NK / t, labels_N) >= lowest for t in np.geomspace(0.02, 50, 400))
    assert all(0 < nll(logits_NK / (temperature * x), labels_N) - lowest < 1e-3 for x in (0.99, 1.01))
    # Two pictures with probabilities of 3/4 and 1/4 for the true class.
    by_hand = nll(np.log([[3.0, 1.0], [3.0, 1.0]]) + 5, np.array([0, 1]))
    assert by_hand == pytest.approx(-(np.log(0.75) + np.log(0.25)) / 2)


def test_folds_are_of_equal_size_and_mix() -> None:
    labels_N = np.repeat(np.arange(7), [30, 6, 41, 5, 99, 11, 8])
    fold_N = folds(labels_N, 0)
    for part in (np.arange(200), *(np.flatnonzero(labels_N == k) for k in range(7))):
        counts = np.bincount(fold_N[part], minlength=FOLDS)
        assert len(counts) == FOLDS
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(fold_N, folds(labels_N, 0))
    assert not np.array_equal(fold_N, folds(labels_N, 1))


def test_nothing_is_fitted_on_itself() -> None:
    """The probabilities of a picture do not change with its own label."""
    logits_NK, labels_N = drawn(100, 2.0)
    fold_N = folds(labels_N, 0)
    first = np.flatnonzero(fold_N == fold_N[0])
    changed_NK, other_NK = logits_NK.copy(), cross_fitted(logits_NK, labels_N, 0)
    changed_NK[0] *= -1
    again_NK = cross_fitted(changed_NK, labels_N, 0)
    assert np.array_equal(again_NK[first[1:]], other_NK[first[1:]])
    elsewhere = np.flatnonzero(fold_N != fold_N[0])
    assert not np.allclose(again_NK[elsewhere], other_NK[elsewhere], rtol=1e-6)
    found = fit(logits_NK, labels_N)
    assert found.ece_cross_fitted == pytest.approx(calibration(np.exp(other_NK), labels_N).ece), "pooled over the folds"
    assert (found.count, found.seed) == (100, 0)


def test_predictions_without_a_best_temperature() -> None:
    zeros, labels_N = np.zeros((35, 7)), np.arange(35) % 7
    right = np.eye(7)[labels_N]
    for logits_NK, message in (
        (zeros[: LEAST - 1], "24 pictures are too few .* expected at least 25"),
        (zeros + np.nan, "a NaN or an infinity"),
        (right, "no temperature within .* 35 pictures .* gets 100.0% right"),
        (np.roll(right, 1, axis=1), "no temperature within .* gets 0.0% right"),
        (zeros, "no temperature within"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            fit(logits_NK, labels_N[: len(logits_NK)])
        assert caught.value.fix
    assert 0.5 < fit(*drawn(LEAST, 2.0, seed=1)).temperature < 10, "the smallest part that is accepted"
