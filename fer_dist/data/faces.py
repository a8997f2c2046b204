"""`Faces`: a decoded data set, and the three parts of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

TRAIN, VAL, TEST = 0, 1, 2
SPLITS = ("train", "val", "test")
"""Names of the codes in `Faces.usage_N`; FER2013 calls them Training, PublicTest, PrivateTest."""


@dataclass(frozen=True, kw_only=True)
class Faces:
    """Every picture of a data set, decoded.

    Attributes:
        images_NHW: uint8 `[N, S, S]`, grey; often a read-only memory map.
        labels_N: int64 `[N]`, class indices in the order of the LabelSet.
        usage_N: int64 `[N]`, TRAIN, VAL or TEST.
        names: N short texts that say where each picture came from (file name or row).
        targets_NK: float32 `[N, K]` soft targets (FER+), rows sum to 1; None: use labels.
        key: identifies the source's content (the cache key).
        notes: what the reader decided or left out, one sentence each, for the log.
    """

    images_NHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    usage_N: NDArray[np.int64]
    names: Sequence[str]
    targets_NK: NDArray[np.float32] | None = None
    key: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_N)

    def part(self, split: int) -> NDArray[np.int64]:
        """Indices of one split, ascending."""
        return np.flatnonzero(self.usage_N == split)

    def select(self, index: NDArray[np.int64]) -> "Faces":
        """The faces at these indices, in that order (copies the pictures)."""
        return replace(
            self,
            images_NHW=self.images_NHW[index],
            labels_N=self.labels_N[index],
            usage_N=self.usage_N[index],
            names=[self.names[i] for i in index],
            targets_NK=None if self.targets_NK is None else self.targets_NK[index],
        )
