"""One score: the same function counts a live model, and every artifact made from it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fer_dist.data.faces import Faces
from fer_dist.data.feed import evaluation_blocks
from fer_dist.engine.metrics import Metrics
from fer_dist.world import World

Predict = Callable[[Tensor], Tensor]
"""uint8 pictures `[N, 1, S, S]` -> logits `[N, K]`."""
Views = Literal["none", "flip", "ten_crop"]
"""Test-time augmentation: over which views of a picture the probabilities are averaged."""
VIEWS: tuple[Views, ...] = get_args(Views)
CROP = 11 / 12
"""Side of a crop over that of the picture: 44 of 48 pixels, within the 10% of scale that training draws from."""


def views(images_N1SS: Tensor, kind: Views) -> Iterator[Tensor]:
    """The pictures as they are; with their mirror images; or four corners and the middle, each mirrored too.

    Crops are enlarged to the pictures' own size, since a model takes no other: uint8 `[N, 1, S, S]` each.
    """
    crops = _crops(images_N1SS) if kind == "ten_crop" else [images_N1SS]
    for crop_N1SS in crops:
        yield crop_N1SS
        if kind != "none":
            yield crop_N1SS.flip(-1)


def log_probabilities(predict: Predict, images_N1SS: Tensor, kind: Views = "none") -> Tensor:
    """The logarithm of the probabilities, averaged over the views: float64 `[N, K]`."""
    found_VNK = torch.stack([predict(view_N1SS).double().log_softmax(1) for view_N1SS in views(images_N1SS, kind)])
    return found_VNK[0] if len(found_VNK) == 1 else found_VNK.logsumexp(0) - math.log(len(found_VNK))


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
        mine = mine + Metrics.of(log_probabilities(predict, images_N1SS, "flip" if flip else "none"), labels_N)
    return sum(world.gather(mine), Metrics.empty(classes))


@torch.no_grad()
def answers(
    predict: Predict,
    faces: Faces,
    rows_M: NDArray[np.int64],
    world: World,
    *,
    batch: int,
    kind: Views = "none",
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """What a model answers to each picture, on every rank: log-probabilities, float64 `[M, K]` on the CPU.

    The batches are the same at any world size, and so is what is in them: the answers are, to the bit, where
    the ranks compute with equally many threads.

    Args:
        rows_M: int64, which pictures, in the order of the answers; at least one.
        progress: is told the pictures that are done since, on this rank.

    Raises:
        UserError: of any rank, on all of them.
    """

    def mine() -> list[Tensor]:
        found = []
        for images_N1SS in evaluation_blocks(faces, rows_M, batch=batch, rank=world.rank, size=world.size):
            found.append(log_probabilities(predict, images_N1SS, kind).cpu())
            progress(len(images_N1SS))
        return found

    parts = world.gather(world.together(mine))
    return torch.cat([log_p_NK for part in parts for log_p_NK in part])


def _crops(images_N1SS: Tensor) -> list[Tensor]:
    """Four corners and the middle, enlarged again: uint8 `[N, 1, S, S]` each."""
    whole = images_N1SS.shape[-1]
    side = max(1, round(CROP * whole))
    last = whole - side
    found = []
    for top, left in ((0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)):
        crop = images_N1SS[..., top : top + side, left : left + side].float()
        large = F.interpolate(crop, size=(whole, whole), mode="bilinear", align_corners=False)
        found.append(large.round().clamp(0, 255).to(torch.uint8))
    return found
