"""Which pictures are copies: exact ones by content, near and mirrored ones by correlation."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

FREQUENCIES = 12
"""The prefilter compares the lowest 12 x 12 cosine frequencies of two pictures."""

BLOCK = 2048
"""Pictures per block: a block of products is 16 MiB, whatever the size of the set."""

MAX_PAIRS = 200_000
"""The search for near copies ends here (frames of a film would give every pair)."""

SLACK = 2e-5
"""What the prefilter allows for rounding: a float32 product of two descriptors is off by less."""

Pair = tuple[int, int, float, bool]
"""Two pictures that are near: lower index, higher index, correlation, whether one is mirrored."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""


def exact_groups(images_NHW: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Group pictures of identical pixels.

    Returns:
        int64 `[N]`: 0 for the first picture and all like it, 1 for the next new one, and so on.
    """
    images_NHW = np.asarray(images_NHW)  # a memory map makes an object for each picture, slowly
    seen: dict[bytes, int] = {}
    digests = (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images_NHW)
    return np.fromiter((seen.setdefault(d, len(seen)) for d in digests), dtype=np.int64, count=len(images_NHW))


def near_pairs(
    images_NHW: NDArray[np.uint8], index_D: NDArray[np.int64], near: float, tell: Progress
) -> tuple[list[Pair], tuple[str, ...]]:
    """All pairs of these pictures that correlate, as they are or mirrored.

    Every pair is compared by descriptor first, and at full resolution only if that lets it pass.
    The descriptor is the lowest frequencies of the picture (mean removed, norm 1), and the norm of
    all that they leave out as one more number. The product of two descriptors is the correlation
    of the low parts plus the most that the rest can add (Cauchy-Schwarz), so never less than the
    correlation itself. The prefilter loses nothing; `SLACK` covers float32 rounding.

    Args:
        images_NHW: uint8 `[N, S, S]`.
        index_D: int64 `[D]`, ascending: which to compare; none of them constant.
        near: the least correlation.
        tell: progress.

    Returns:
        The pairs, most alike first, each once; and a note if the search ended at `MAX_PAIRS`.
    """
    plain_DK, mirrored_DK = _descriptors(images_NHW, index_D)
    starts = range(0, len(index_D), BLOCK)
    blocks = [(i, j) for i in starts for j in starts if i <= j]
    pairs: list[Pair] = []
    notes: tuple[str, ...] = ()
    for done, (i, j) in enumerate(blocks, start=1):
        for mirrored, other_DK in enumerate((plain_DK, mirrored_DK)):
            # corr(a, mirrored b) = corr(mirrored a, b): the upper triangle is enough for both.
            a_P, b_P = np.nonzero(plain_DK[i : i + BLOCK] @ other_DK[j : j + BLOCK].T >= near - SLACK)
            upper_P = a_P + i < b_P + j
            a_P, b_P = index_D[a_P[upper_P] + i], index_D[b_P[upper_P] + j]
            pairs += islice(_verified(images_NHW, a_P, b_P, bool(mirrored), near), MAX_PAIRS - len(pairs))
        tell("near copies", done, len(blocks))
        if len(pairs) == MAX_PAIRS:
            notes = (f"the search for near copies ended at {MAX_PAIRS:,} pairs; there may be more",)
            break
    best: dict[tuple[int, int], Pair] = {}  # a symmetric picture can be near both as it is and mirrored
    for pair in sorted(pairs, key=lambda pair: -pair[2]):
        best.setdefault(pair[:2], pair)
    return list(best.values()), notes


def _descriptors(
    images_NHW: NDArray[np.uint8], index_D: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Descriptors `[D, K*K + 1]` of the pictures and of their mirror images."""
    side = images_NHW.shape[-1]
    frequency_K = np.arange(min(FREQUENCIES, side))
    waves_KS = np.cos(np.pi / side * frequency_K[:, None] * (np.arange(side) + 0.5))  # DCT-II: orthogonal rows
    waves_KS /= np.linalg.norm(waves_KS, axis=1, keepdims=True)
    plain_DK = np.empty((len(index_D), len(frequency_K) ** 2 + 1), dtype=np.float32)
    for start in range(0, len(index_D), rows_at_once(images_NHW)):
        image_BHW = _standardised(images_NHW[index_D[start : start + rows_at_once(images_NHW)]])
        low_BK = (waves_KS @ image_BHW @ waves_KS.T).reshape(len(image_BHW), -1)
        # In float64: a small rest is the root of a difference of nearly equal numbers.
        rest_B = np.sqrt(np.maximum(0, 1 - (low_BK**2).sum(axis=1)))
        plain_DK[start : start + len(low_BK)] = np.column_stack([low_BK, rest_B])
    # A mirror turns the sign of the odd horizontal waves (the last axis) and keeps the norm of the rest.
    sign_K = np.append(np.tile(1 - 2 * (frequency_K % 2), len(frequency_K)), 1)
    return plain_DK, plain_DK * sign_K.astype(np.float32)


def _verified(
    images_NHW: NDArray[np.uint8], a_P: NDArray[np.int64], b_P: NDArray[np.int64], mirrored: bool, near: float
) -> Iterator[Pair]:
    """Those of the candidates whose correlation at full resolution is at least `near`."""
    for start in range(0, len(a_P), rows_at_once(images_NHW)):
        a_B, b_B = a_P[start : start + rows_at_once(images_NHW)], b_P[start : start + rows_at_once(images_NHW)]
        other_BHW = images_NHW[b_B][:, :, ::-1] if mirrored else images_NHW[b_B]
        correlation_B = (_standardised(images_NHW[a_B]) * _standardised(other_BHW)).sum(axis=(1, 2))
        for k in np.flatnonzero(correlation_B >= near):
            yield int(a_B[k]), int(b_B[k]), float(correlation_B[k]), mirrored


def _standardised(images_BHW: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean 0 and norm 1 each, so that a product of two is their Pearson correlation."""
    image_BHW = images_BHW.astype(np.float64)
    image_BHW -= image_BHW.mean(axis=(1, 2), keepdims=True)
    image_BHW /= np.sqrt((image_BHW**2).sum(axis=(1, 2), keepdims=True))
    return image_BHW


def rows_at_once(images_NHW: NDArray[np.uint8]) -> int:
    """How many pictures may be float64 at a time: 32 MiB of them."""
    side: int = images_NHW.shape[-1]
    return max(1, 2**22 // side**2)
