"""Confusion counts, and every score that follows from them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What an evaluation counted. Parts are joined by adding, so one rank and four give the same.

    Attributes:
        confusion_KK: int64 `[K, K]`; row: true class, column: predicted class.
        loss_sum: sum of the cross-entropies [nats].
        count: number of samples.
    """

    confusion_KK: NDArray[np.int64]
    loss_sum: float
    count: int

    @classmethod
    def of(cls, log_probabilities_NK: Tensor, labels_N: Tensor) -> "Metrics":
        """Count one batch: log-probabilities `[N, K]` against class indices `[N]`."""
        classes = log_probabilities_NK.shape[1]
        predicted_N = log_probabilities_NK.argmax(1)
        counts = torch.bincount(labels_N * classes + predicted_N, minlength=classes**2)
        loss = -log_probabilities_NK.double().gather(1, labels_N.unsqueeze(1)).sum()
        return cls(confusion_KK=counts.view(classes, classes).cpu().numpy(), loss_sum=loss.item(), count=len(labels_N))

    @classmethod
    def empty(cls, classes: int) -> "Metrics":
        """Nothing counted yet."""
        return cls(confusion_KK=np.zeros((classes, classes), np.int64), loss_sum=0.0, count=0)

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(
            confusion_KK=self.confusion_KK + other.confusion_KK,
            loss_sum=self.loss_sum + other.loss_sum,
            count=self.count + other.count,
        )

    @property
    def loss(self) -> float:
        """Mean cross-entropy [nats]."""
        return self.loss_sum / max(1, self.count)

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion_KK)) / max(1, self.count)

    @property
    def recall(self) -> list[float]:
        return _ratio(np.diag(self.confusion_KK), self.confusion_KK.sum(1))

    @property
    def precision(self) -> list[float]:
        return _ratio(np.diag(self.confusion_KK), self.confusion_KK.sum(0))

    @property
    def f1(self) -> list[float]:
        return _ratio(2 * np.diag(self.confusion_KK), self.confusion_KK.sum(0) + self.confusion_KK.sum(1))

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur in truth or prediction."""
        seen = (self.confusion_KK.sum(0) + self.confusion_KK.sum(1)) > 0
        return float(np.mean(np.array(self.f1)[seen])) if seen.any() else 0.0

    def better_than(self, other: "Metrics | None", monitor: str) -> bool:
        """Whether the monitored score gained; the lower loss, the higher accuracy or macro-F1.

        Any score is better than none, and than one that is no number.
        """
        if other is None or math.isnan(getattr(other, monitor)):
            return True
        gain: float = getattr(self, monitor) - getattr(other, monitor)
        return gain < 0 if monitor == "loss" else gain > 0

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The classification report as plain values, with a 95% Wilson interval of the accuracy."""
        low, high = wilson(self.accuracy, self.count)
        rows = zip(self.precision, self.recall, self.f1, self.confusion_KK.sum(1).tolist(), strict=True)
        return {
            "accuracy": self.accuracy,
            "accuracy_interval_95": [low, high],
            "macro_f1": self.macro_f1,
            "loss": self.loss,
            "count": self.count,
            "classes": {
                name: {"precision": p, "recall": r, "f1": f, "support": n}
                for name, (p, r, f, n) in zip(names, rows, strict=True)
            },
            "confusion": self.confusion_KK.tolist(),
        }


def wilson(p: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float]:
    return [float(a / b) if b else 0.0 for a, b in zip(part, whole, strict=True)]
