"""Ranges of the tensors of a graph, measured on pictures with bounded memory: min-max, percentile, entropy."""

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.rewrite import cpu_session, float_tensors
from fer_dist.serve.artifact import INPUT

BATCH = 4
"""Pictures per run. Two numbers per tensor leave a run, but the tensors exist in it."""
BINS = 2048
"""Of a histogram, from 0 to the largest absolute value."""
PERCENTILE = 99.99
"""Share of the absolute values that the percentile ranges hold [%]."""
LEVELS = 128
"""Absolute values that int8 tells apart."""
STRIDE = 16
"""Bins between two ranges that entropy compares."""

Ranges = dict[str, tuple[float, float]]
"""Name of a tensor -> its smallest and largest value."""
Histograms = dict[str, NDArray[np.int64]]
"""Name of a tensor -> counts of its absolute values `[BINS]`, up to the largest in its range."""


def batches(images_N1SS: NDArray[np.uint8], size: int) -> Iterator[dict[str, NDArray[np.uint8]]]:
    """The pictures as inputs of a session, `size` at a time; the last may be fewer."""
    for start in range(0, len(images_N1SS), size):
        yield {INPUT: images_N1SS[start : start + size]}


def tensor_ranges(model: onnx.ModelProto, images_N1SS: NDArray[np.uint8]) -> Ranges:
    """Smallest and largest value that each computed float32 tensor takes over some pictures.

    Args:
        model: a `working_copy`.
        images_N1SS: uint8 `[N, 1, S, S]`, at least one.
    """
    assert len(images_N1SS), "no pictures to measure ranges on"
    floats = float_tensors(model)
    names = [name for node in model.graph.node for name in node.output if name in floats]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in names:
        # Reduced inside the graph, so that a tensor is freed as soon as its readers are done.
        for op_type in ("ReduceMin", "ReduceMax"):
            number = f"{name}/{op_type}"
            watched.graph.node.append(helper.make_node(op_type, [name], [number], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(number, TensorProto.FLOAT, []))
    session = cpu_session(watched)
    rows = np.array([session.run(None, feed) for feed in batches(images_N1SS, BATCH)], np.float32)
    lowest, highest = rows[:, 0::2].min(axis=0), rows[:, 1::2].max(axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, lowest, highest, strict=True)}


def histograms(model: onnx.ModelProto, images_N1SS: NDArray[np.uint8], ranges: Ranges) -> Histograms:
    """How often each size of value occurs in some tensors.

    Args:
        model: a `working_copy`.
        images_N1SS: uint8 `[N, 1, S, S]`, those that the ranges come from.
        ranges: of the tensors that are asked for.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in ranges:
        watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = cpu_session(watched)
    counts = {name: np.zeros(BINS, np.int64) for name in ranges}
    for feed in batches(images_N1SS, 1):  # whole tensors come out: one picture at a time
        for (name, (low, high)), values in zip(ranges.items(), session.run(None, feed), strict=True):
            size = max(-low, high)
            if size > 0:
                counts[name] += np.histogram(np.abs(values), BINS, range=(0.0, size))[0]
    return counts


def clipped_by_percentile(ranges: Ranges, counts: Histograms) -> Ranges:
    """The ranges, cut so that PERCENTILE of the absolute values are inside."""
    bins = {name: int(np.searchsorted(c.cumsum(), c.sum() * PERCENTILE / 100)) + 1 for name, c in counts.items()}
    return {name: _cut(bounds, bins[name]) for name, bounds in ranges.items()}


def clipped_by_entropy(ranges: Ranges, counts: Histograms) -> Ranges:
    """The ranges, cut where LEVELS levels tell most about the values: the smallest Kullback-Leibler divergence."""
    return {name: _cut(bounds, _least_divergence(counts[name])) for name, bounds in ranges.items()}


def _cut(bounds: tuple[float, float], bins: int) -> tuple[float, float]:
    low, high = bounds
    limit = max(-low, high) * min(bins, BINS) / BINS
    return max(low, -limit), min(high, limit)


def _least_divergence(counts: NDArray[np.int64]) -> int:
    """How many of the bins to keep; of equals the most."""
    counts = counts.copy()
    counts[0] = counts[1]  # zeros, which any range holds: after a Relu they would drown the rest
    best, kept = np.inf, BINS
    for end in range(BINS, LEVELS - 1, -STRIDE):
        divergence = _divergence(counts, end)
        if divergence < best:
            best, kept = divergence, end
    return kept


def _divergence(counts: NDArray[np.int64], end: int) -> float:
    """Of the values cut to `end` bins from the same values in LEVELS levels, each spread over its filled bins."""
    inside, filled = counts[:end], counts[:end] > 0
    truth = inside.astype(np.float64)
    truth[-1] += counts[end:].sum()
    level = np.arange(end) * LEVELS // end
    height = np.bincount(level, inside, LEVELS) / np.maximum(np.bincount(level, filled, LEVELS), 1)
    seen = np.where(filled, height[level], 0.0)
    truth, seen = truth / max(truth.sum(), 1.0), seen / max(seen.sum(), 1.0)
    there = truth > 0
    return float(np.sum(truth[there] * np.log(truth[there] / np.maximum(seen[there], 1e-12))))
