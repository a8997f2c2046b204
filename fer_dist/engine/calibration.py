"""Whether a model is right as often as it is sure: reliability bins and the expected calibration error."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (2017), arXiv:1706.04599."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Answers by confidence; bin b holds confidences in (b / B, (b + 1) / B], the first one 0 as well.

    Attributes:
        count_B: int64, answers in each bin.
        confidence_B, accuracy_B: float64, their means; 0 in an empty bin.
    """

    count_B: NDArray[np.int64]
    confidence_B: NDArray[np.float64]
    accuracy_B: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean of |accuracy - confidence| over the answers, bin by bin, 0..1."""
        gap = np.abs(self.accuracy_B - self.confidence_B)
        return float((gap * self.count_B).sum() / max(1, self.count_B.sum()))


def calibration(probabilities_NK: NDArray[np.float64], labels_N: NDArray[np.int64], bins: int = BINS) -> Calibration:
    """Sort answers into bins by the probability of the class that was chosen.

    Args:
        probabilities_NK: float64, rows sum to 1.
        labels_N: int64, the true classes.
    """
    confidence_N = probabilities_NK.max(1) if len(labels_N) else np.zeros(0)
    right_N = (probabilities_NK.argmax(1) == labels_N).astype(np.float64)
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    count_B = np.bincount(bin_N, minlength=bins)
    whole_B = np.maximum(1, count_B)
    return Calibration(
        count_B=count_B,
        confidence_B=np.bincount(bin_N, confidence_N, bins) / whole_B,
        accuracy_B=np.bincount(bin_N, right_N, bins) / whole_B,
    )
