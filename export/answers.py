"""What a model answers to every picture of an evaluation set, in batches of several sizes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from fer_dist.console import counting
from fer_dist.serve.dataset import Pictures
from fer_dist.serve.runner import Runner

BATCHES = (1, 2, 3, 7, 64)
"""Batch sizes that take turns: each picture is asked once, each size many times."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """M answers to N pictures; M is N but for sets too small to fill one turn of BATCHES, where pictures come again.

    Attributes:
        rows_M: int64, the picture of each answer.
        batch_M: int64, the size of the batch that it came in.
        logits_MK, probabilities_MK: float32, on the CPU.
        count: N.
    """

    rows_M: Tensor
    batch_M: Tensor
    logits_MK: Tensor
    probabilities_MK: Tensor
    count: int

    def by_picture(self) -> Tensor:
        """The logits `[N, K]`, one answer for each picture, in their order."""
        logits_NK = torch.empty(self.count, self.logits_MK.shape[1])
        logits_NK[self.rows_M] = self.logits_MK
        return logits_NK


def ask(runner: Runner, pictures: Pictures, progress: Callable[[int], object] = lambda done: None) -> Answers:
    """The answers of a model to all pictures, in batches of BATCHES in turn."""
    rows, sizes, logits, probabilities = [], [], [], []
    for batch in batches(len(pictures)):
        found = runner.run(pictures.images_N1SS[batch])
        rows.append(batch)
        sizes.append(torch.full((len(batch),), len(batch)))
        logits.append(found.logits_NK)
        probabilities.append(found.probabilities_NK)
        progress(len(batch))
    return Answers(
        rows_M=torch.cat(rows),
        batch_M=torch.cat(sizes),
        logits_MK=torch.cat(logits),
        probabilities_MK=torch.cat(probabilities),
        count=len(pictures),
    )


def ask_aloud(runner: Runner, pictures: Pictures) -> Answers:
    """The same, and people see how far it is."""
    with counting(f"asking {runner.path.name}", len(pictures)) as progress:
        return ask(runner, pictures, progress)


def batches(count: int) -> Iterator[Tensor]:
    """Rows 0..count-1 once each, in batches of BATCHES in turn; fewer pictures than one turn come again."""
    begin = 0
    turn = cycle(BATCHES)
    while begin < max(count, sum(BATCHES)):
        end = begin + next(turn)
        yield torch.arange(begin, end if count < sum(BATCHES) else min(end, count)) % count
        begin = end
