"""Temperature scaling: one number that makes a model as sure as it is right, and what it gains on other pictures.

After Guo et al., "On Calibration of Modern Neural Networks" (2017), arXiv:1706.04599.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fer_dist.engine.calibration import calibration
from fer_dist.errors import UserError
from fer_dist.spec import HIGHEST, LOWEST

FOLDS = 5
LEAST = 5 * FOLDS
"""Fewest pictures: five a fold. A number that means something needs some hundreds."""
HALVINGS = 60
"""Of the interval of log T: its width ends far below the last digit of a float."""

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A temperature and what it does.

    Attributes:
        temperature: divides logits.
        nll_before, nll_after: mean negative log-likelihood of the pictures that it was fitted on [nats].
        nll_cross_fitted: each picture at a temperature that other pictures gave.
        ece_before, ece_cross_fitted: expected calibration error, 15 bins, 0..1; cross-fitted likewise.
        count: pictures.
        seed: of the folds.
    """

    temperature: float
    nll_before: float
    nll_after: float
    nll_cross_fitted: float
    ece_before: float
    ece_cross_fitted: float
    count: int
    seed: int


def fit(log_p_NK: Floats, labels_N: Labels, seed: int = 0, before_NK: Floats | None = None) -> Fit:
    """The temperature of all pictures, and by five-fold cross-fitting what one does for pictures it has not seen.

    Args:
        log_p_NK: float64, log-probabilities or logits.
        labels_N: int64, the true classes.
        seed: of the folds.
        before_NK: the log-probabilities that `before` is about; None: the same ones.

    Raises:
        UserError: too few pictures; answers that are no numbers; no temperature within LOWEST..HIGHEST is best.
    """
    if len(labels_N) < LEAST:
        raise UserError(
            f"{len(labels_N):,} pictures are too few for a temperature, expected at least {LEAST}",
            "--data PATH with more in that part",
        )
    if not np.isfinite(log_p_NK).all():
        raise UserError("some answers of the model are a NaN or an infinity", "train it again")
    temperature = best_temperature(log_p_NK, labels_N)
    if not LOWEST * 1.001 < temperature < HIGHEST / 1.001:
        right = float((log_p_NK.argmax(1) == labels_N).mean())
        raise UserError(
            f"no temperature within {LOWEST}..{HIGHEST:g} is best for {len(labels_N):,} pictures of which the model "
            f"gets {right:.1%} right",
            "--data PATH with other pictures, or a model that has been trained longer",
        )
    before_NK = log_p_NK if before_NK is None else before_NK
    crossed_NK = cross_fitted(log_p_NK, labels_N, seed)
    return Fit(
        temperature=temperature,
        nll_before=nll(before_NK, labels_N),
        nll_after=nll(log_p_NK / temperature, labels_N),
        nll_cross_fitted=nll(crossed_NK, labels_N),
        ece_before=_ece(before_NK, labels_N),
        ece_cross_fitted=_ece(crossed_NK, labels_N),
        count=len(labels_N),
        seed=seed,
    )


def best_temperature(log_p_NK: Floats, labels_N: Labels) -> float:
    """The temperature of the least negative log-likelihood, within LOWEST..HIGHEST.

    The likelihood is convex in 1/T, so its slope changes sign once at most: halving finds where.
    """
    low, high = math.log(LOWEST), math.log(HIGHEST)
    right_N = log_p_NK[np.arange(len(labels_N)), labels_N]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        p_NK = np.exp(_log_softmax(log_p_NK / math.exp(middle)))
        slope = ((p_NK * log_p_NK).sum(1) - right_N).mean()  # of the likelihood, by 1/T
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp((low + high) / 2)


def cross_fitted(log_p_NK: Floats, labels_N: Labels, seed: int) -> Floats:
    """Each picture's log-probabilities at the temperature that the other folds give."""
    fold_N = folds(labels_N, seed)
    found_NK = np.empty_like(log_p_NK)
    for fold in range(FOLDS):
        held_N = fold_N == fold
        temperature = best_temperature(log_p_NK[~held_N], labels_N[~held_N])
        found_NK[held_N] = _log_softmax(log_p_NK[held_N] / temperature)
    return found_NK


def folds(labels_N: Labels, seed: int) -> Labels:
    """The fold of each picture, 0..FOLDS-1, int64: of each class, and of all, equally many but for one."""
    random = np.random.default_rng(seed)
    by_class = np.lexsort((random.permutation(len(labels_N)), labels_N))
    fold_N = np.empty(len(labels_N), np.int64)
    fold_N[by_class] = np.arange(len(labels_N)) % FOLDS
    return fold_N


def nll(log_p_NK: Floats, labels_N: Labels) -> float:
    """Mean negative log-likelihood of logits or log-probabilities [nats]."""
    return float(-_log_softmax(log_p_NK)[np.arange(len(labels_N)), labels_N].mean())


def _ece(log_p_NK: Floats, labels_N: Labels) -> float:
    return calibration(np.exp(_log_softmax(log_p_NK)), labels_N).ece


def _log_softmax(logits_NK: Floats) -> Floats:
    shifted_NK: Floats = logits_NK - logits_NK.max(1, keepdims=True)
    found_NK: Floats = shifted_NK - np.log(np.exp(shifted_NK).sum(1, keepdims=True))
    return found_NK
