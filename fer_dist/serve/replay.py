"""Work on a GPU that was recorded once as a CUDA graph, to be timed by replaying it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Runs before the recording: libraries allocate, choose kernels and compile in the first ones."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A recorded piece of work; nothing in it is copied to or from the host.

    Attributes:
        work: puts the graph into the queue of `stream` once, and does not wait for it.
        stream: CUDA events around the work belong on it, and on no other.
        logits_NK: float32 `[N, K]` on the GPU, where the work leaves them.
    """

    work: Callable[[], object]
    stream: torch.cuda.Stream
    logits_NK: Tensor


def record(work: Callable[[], Tensor], stream: torch.cuda.Stream) -> Replay:
    """Record what `work` puts into the queue of the current stream; it answers with the logits."""
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits_NK = work()

    def replay(kept: Any = work) -> None:  # the graph works on the memory that this holds
        graph.replay()

    return Replay(work=replay, stream=stream, logits_NK=logits_NK)


def warm(work: Callable[[], Tensor], stream: torch.cuda.Stream) -> Replay:
    """The same of a library that records the graph itself in its first runs, and replays it in the later ones."""
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            logits_NK = work()
            stream.synchronize()
    return Replay(work=work, stream=stream, logits_NK=logits_NK)
