"""One score: the same function counts a live model, and every artifact made from it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fer_dist.engine.metrics import Metrics
from fer_dist.world import World

Predict = Callable[[Tensor], Tensor]
"""uint8 pictures `[N, 1, S, S]` -> logits `[N, K]`."""


@torch.inference_mode()
def score(
    predict: Predict, batches: Iterable[tuple[Tensor, Tensor]], world: World, *, classes: int, flip: bool = False
) -> Metrics:
    """Evaluate this rank's batches and join them with those of the other ranks.

    Each sample is counted once at any world size, as long as the batches of the ranks are
    shares of one whole (`evaluation_batches`); ranks may have none.

    Args:
        flip: average the probabilities of a picture and of its mirror image.

    Returns:
        The same Metrics on every rank, added in order of rank.
    """
    mine = Metrics.empty(classes)
    for images_N1SS, labels_N in batches:
        log_p_NK = predict(images_N1SS).double().log_softmax(1)
        if flip:
            mirrored_NK = predict(images_N1SS.flip(-1)).double().log_softmax(1)
            log_p_NK = torch.logaddexp(log_p_NK, mirrored_NK) - torch.log(torch.tensor(2.0, dtype=torch.float64))
        mine = mine + Metrics.of(log_p_NK, labels_N)
    return sum(world.gather(mine), Metrics.empty(classes))
