"""Who sees which sample when: exact shares for every rank, batches ready on the device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fer_dist.config import Config
from fer_dist.data.augment import augment, draw, generator, mix
from fer_dist.data.faces import Faces


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures and targets of one rank for one step.

    Attributes:
        images_N1SS: uint8 as stored, or float32 on 0..255 once augmented.
        targets_NK: float32, rows sum to 1 (times the class weight, where one is set).
        rows_N: int64, on the CPU: the sample indices in the data set.
    """

    images_N1SS: Tensor
    targets_NK: Tensor
    rows_N: Tensor

    def __len__(self) -> int:
        return len(self.rows_N)

    def split(self, size: int) -> "list[Batch]":
        """Micro-batches of at most `size` pictures."""
        return [
            Batch(
                images_N1SS=self.images_N1SS[i : i + size],
                targets_NK=self.targets_NK[i : i + size],
                rows_N=self.rows_N[i : i + size],
            )
            for i in range(0, len(self), size)
        ]


def epoch_order(rows_M: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The training rows in the order of one epoch, the same on every rank."""
    return generator(seed, epoch, "order").permutation(rows_M)


def share(count: int, rank: int, size: int) -> range:
    """The positions that a rank takes of `count`: every one once, none padded, at any size."""
    return range(rank * count // size, (rank + 1) * count // size)


class Pictures:
    """The pictures of some rows, as uint8 batches on a device.

    On a GPU the part lies in its memory (28,709 pictures are 66 MB); on a CPU batches are taken
    from the memory map, which all ranks of a machine share.
    """

    def __init__(self, faces: Faces, rows_M: NDArray[np.int64], device: torch.device) -> None:
        self._images_NSS = faces.images_NHW
        self._device = device
        self._resident: Tensor | None = None
        if device.type == "cuda":
            self._place_N = torch.zeros(len(faces), dtype=torch.int64)
            self._place_N[torch.from_numpy(rows_M)] = torch.arange(len(rows_M))
            self._resident = torch.from_numpy(np.ascontiguousarray(faces.images_NHW[rows_M])).to(device)

    def take(self, rows_N: Tensor) -> Tensor:
        """uint8 `[N, 1, S, S]` on the device."""
        if self._resident is not None:
            return self._resident[self._place_N[rows_N].to(self._device)].unsqueeze(1)
        return torch.from_numpy(self._images_NSS[rows_N.numpy()]).unsqueeze(1)


def targets(faces: Faces, classes: int, rows_M: NDArray[np.int64], *, smoothing: float, weights: str) -> Tensor:
    """float32 `[N, K]`: one-hot or FER+ targets, smoothed, times the class weights of the training rows.

    Label smoothing as in Szegedy et al. 2015 (arXiv:1512.00567).

    Balanced weights are inverse class frequencies, scaled to a mean of 1 over the training
    part; they are constants, so that the loss is the same sum at any world size.
    """
    if faces.targets_NK is not None:
        targets_NK = torch.from_numpy(np.array(faces.targets_NK))
    else:
        targets_NK = torch.nn.functional.one_hot(torch.from_numpy(np.array(faces.labels_N)), classes).float()
    smooth_NK = (1 - smoothing) * targets_NK + smoothing / classes
    if weights == "balanced":
        frequency_K = targets_NK[torch.from_numpy(rows_M)].mean(0)
        present = frequency_K > 0
        weight_K = torch.where(present, 1 / (frequency_K.clamp_min(1e-12) * present.sum()), 0.0)
        smooth_NK = smooth_NK * (targets_NK @ weight_K).unsqueeze(1)
    return smooth_NK


class TrainFeed:
    """Augmented training batches of one rank.

    Step s of an epoch takes rows s*B..(s+1)*B of the epoch's order, B the global batch, and a
    rank the share of them that its number gives. The last incomplete batch is dropped.
    """

    def __init__(
        self, config: Config, faces: Faces, rows_M: NDArray[np.int64], classes: int, device: torch.device
    ) -> None:
        self._config = config
        self._rows_M = rows_M
        self._count = len(faces)
        self._device = device
        self._pictures = Pictures(faces, rows_M, device)
        self._targets_NK = targets(
            faces, classes, rows_M, smoothing=config.train.label_smoothing, weights=config.train.class_weights
        )
        steps = len(rows_M) // config.train.global_batch
        self.steps = min(steps, config.train.steps_per_epoch or steps)

    def epoch(self, epoch: int, *, rank: int, size: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one rank from step `start` on."""
        config, batch = self._config, self._config.train.global_batch
        order_M = epoch_order(self._rows_M, seed=config.seed, epoch=epoch)
        calm = math.floor(config.train.epochs * config.data.augment.mix_off + 1e-9)  # 0.7 of 10 are 7
        draws = draw(
            config.data.augment,
            seed=config.seed,
            epoch=epoch,
            count=self._count,
            partners_M=self._rows_M,
            mixes=epoch < config.train.epochs - calm,
        )
        mine = share(batch, rank, size)
        for step in range(start, self.steps):
            rows_N = torch.from_numpy(order_M[step * batch + mine.start : step * batch + mine.stop])
            images = augment(self._pictures.take(rows_N), draws, rows_N)
            targets_NK = self._targets_NK[rows_N].to(self._device)
            if draws.mixes:
                other_N = draws.partner_N[rows_N]
                partners = augment(self._pictures.take(other_N), draws, other_N)
                images, own_N = mix(images, partners, draws, rows_N)
                targets_NK = torch.lerp(self._targets_NK[other_N].to(self._device), targets_NK, own_N.unsqueeze(1))
            yield Batch(images_N1SS=images, targets_NK=targets_NK, rows_N=rows_N)


def evaluation_batches(
    faces: Faces, rows_M: NDArray[np.int64], *, batch: int, rank: int, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """A rank's share of an evaluation part: uint8 pictures `[N, 1, S, S]`, labels `[N]`."""
    mine = share(len(rows_M), rank, size)
    for begin in range(mine.start, mine.stop, batch):
        rows = rows_M[begin : min(begin + batch, mine.stop)]
        images = torch.from_numpy(faces.images_NHW[rows]).unsqueeze(1).to(device)
        yield images, torch.from_numpy(faces.labels_N[rows]).to(device)


def evaluation_blocks(faces: Faces, rows_M: NDArray[np.int64], *, batch: int, rank: int, size: int) -> Iterator[Tensor]:
    """A rank's share of some rows in whole batches, uint8 `[N, 1, S, S]`: what is in them is the same at any size."""
    for block in share(math.ceil(len(rows_M) / batch), rank, size):
        yield torch.from_numpy(faces.images_NHW[rows_M[block * batch : (block + 1) * batch]]).unsqueeze(1)
