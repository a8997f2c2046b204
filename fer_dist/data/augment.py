"""Augmentation: one batched pass over pictures at their stored resolution.

Every number is a function of (seed, epoch, sample index) and of nothing else: it is drawn for
the whole data set at once, one row per sample, before the epoch begins. So a sample gets the
same picture at any world size, in any batch, and after any resume.

Sources: random erasing (Zhong et al. 2017, arXiv:1708.04896), mixup (Zhang et al. 2017,
arXiv:1710.09412), cutmix (Yun et al. 2019, arXiv:1905.04899).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fer_dist.config import AugmentConfig
from fer_dist.data.quality import Quality, draw_quality, spoil

STREAMS = ("order", "geometry", "mixing", "portion")


def generator(seed: int, epoch: int, stream: str, part: int = 0) -> np.random.Generator:
    """The random stream of one epoch and one purpose: a counter-based generator, keyed; its parts are far apart."""
    bits = np.random.Philox(key=[seed * len(STREAMS) + STREAMS.index(stream), epoch])
    return np.random.Generator(bits.jumped(part) if part else bits)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The numbers of one epoch, a row per sample of the data set.

    Attributes:
        affine_N6: float32; where an output pixel (x, y) in -1..1 is sampled:
            (a*x + b*y + c, d*x + e*y + f).
        colour_N2: float32; factor of contrast, shift of brightness [grey levels].
        quality: blur and noise; None: none.
        erase_N5: float32; box x0, y0, x1, y1 in -1..1 (empty: nothing is erased), its grey.
        partner_N: int64; the sample that is mixed in.
        mix_N5: float32; weight of the sample itself and the box that shows the partner
            (mixup: an empty box; cutmix: weight 1 outside of it).
        mixes: whether the partner is used at all.
    """

    affine_N6: Tensor
    colour_N2: Tensor
    quality: Quality | None
    erase_N5: Tensor
    partner_N: Tensor
    mix_N5: Tensor
    mixes: bool


def draw(
    config: AugmentConfig, *, seed: int, epoch: int, count: int, partners_M: NDArray[np.int64], mixes: bool
) -> Draws:
    """Draw the numbers of an epoch for samples 0..count-1.

    Args:
        partners_M: the samples that may be mixed in (the training part).
        mixes: False in the last epochs, where mixup and cutmix rest.
    """
    u = generator(seed, epoch, "geometry").random((count, 16))
    mixes = mixes and (config.mixup > 0 or config.cutmix > 0)
    partner_N, mix_N5 = np.zeros(count, np.int64), np.zeros((count, 5))
    if mixes:
        v = generator(seed, epoch, "mixing").random((count, 4))
        partner_N = partners_M[(v[:, 0] * len(partners_M)).astype(np.int64)]
        mix_N5 = _mixing(config, v[:, 1:], generator(seed, epoch, "portion"))
    return Draws(
        affine_N6=_float(_affine(config, u[:, :8])),
        colour_N2=_float(
            np.stack([1 + config.contrast * (2 * u[:, 8] - 1), 255 * config.brightness * (2 * u[:, 9] - 1)], 1)
        ),
        quality=draw_quality(config, generator(seed, epoch, "geometry", part=1), count),
        erase_N5=_float(_erasing(config, u[:, 10:])),
        partner_N=torch.from_numpy(partner_N),
        mix_N5=_float(mix_N5),
        mixes=mixes,
    )


def augment(images_N1SS: Tensor, draws: Draws, rows_N: Tensor) -> Tensor:
    """Geometry, colour, blur, noise and erasing of a batch.

    Args:
        images_N1SS: uint8 `[N, 1, S, S]`.
        rows_N: int64 `[N]`, on the CPU; the sample index of each picture.

    Returns:
        float32 `[N, 1, S, S]` on 0..255. Only element-wise operations and one resampling per
        picture: a picture's bits do not depend on the batch around it.
    """
    device, n, side = images_N1SS.device, len(images_N1SS), images_N1SS.shape[-1]
    a, b, c, d, e, f = _columns(draws.affine_N6, rows_N, device)
    x, y = pixel_grid(side, device)
    grid_NSS2 = torch.stack([a * x + b * y + c, d * x + e * y + f], dim=-1)
    out = F.grid_sample(
        images_N1SS.float(), grid_NSS2, mode="bilinear", padding_mode="border", align_corners=False
    ).squeeze(1)
    contrast, brightness = _columns(draws.colour_N2, rows_N, device)
    # Integer sums are exact, so that the pivot of the contrast is the same in every batch.
    pivot = (images_N1SS.sum((1, 2, 3), dtype=torch.int64).double() / side**2).float().view(n, 1, 1)
    out = ((out - pivot) * contrast + pivot + brightness).clamp_(0, 255)
    if draws.quality is not None:
        out = spoil(out, draws.quality, rows_N)
    x0, y0, x1, y1, grey = _columns(draws.erase_N5, rows_N, device)
    return torch.where(_inside(x, y, x0, y0, x1, y1), grey, out).unsqueeze(1)


def mix(images_N1SS: Tensor, partners_N1SS: Tensor, draws: Draws, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of augmented pictures with their augmented partners.

    Returns:
        float32 `[N, 1, S, S]`, and float32 `[N]`: the weight of the sample's own target.
    """
    side, device = images_N1SS.shape[-1], images_N1SS.device
    weight, x0, y0, x1, y1 = _columns(draws.mix_N5, rows_N, device)
    x, y = pixel_grid(side, device)
    inside = _inside(x, y, x0, y0, x1, y1)
    weight_NSS = torch.where(inside, 0.0, weight)
    own_N = weight.flatten() * (1 - inside.sum((1, 2), dtype=torch.int64) / side**2)
    weight_N1SS = weight_NSS.unsqueeze(1)
    return weight_N1SS * images_N1SS + (1 - weight_N1SS) * partners_N1SS, own_N


def pixel_grid(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres in -1..1: x `[1, S]` and y `[S, 1]`, float32."""
    centres = (2 * torch.arange(side, device=device, dtype=torch.float32) + 1) / side - 1
    return centres.view(1, side), centres.view(side, 1)


def _affine(config: AugmentConfig, u: NDArray[Any]) -> NDArray[Any]:
    mirror = np.where(u[:, 0] < config.flip, -1.0, 1.0)
    angle = math.radians(config.rotation) * (2 * u[:, 1] - 1)
    window = 1 - config.crop * u[:, 2]
    zoom = window / (1 + config.scale * (2 * u[:, 3] - 1))
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    a, b, d, e = mirror * cos, -sin, mirror * sin, cos
    # A crop moves its window inside the picture; a translation moves what is then seen.
    room = 1 - window
    right, down = 2 * config.translation * (2 * u[:, 5] - 1), 2 * config.translation * (2 * u[:, 7] - 1)
    c = room * (2 * u[:, 4] - 1) - (a * right + b * down)
    f = room * (2 * u[:, 6] - 1) - (d * right + e * down)
    return np.stack([a, b, c, d, e, f], 1)


def _erasing(config: AugmentConfig, u: NDArray[Any]) -> NDArray[Any]:
    area = 4 * config.erase_area * (0.1 + 0.9 * u[:, 1])
    aspect = np.exp((2 * u[:, 2] - 1) * math.log(3.0))
    width, height = np.minimum(2, np.sqrt(area * aspect)), np.minimum(2, np.sqrt(area / aspect))
    erased = u[:, 0] < config.erase
    x0 = -1 + (2 - width) * u[:, 3]
    y0 = -1 + (2 - height) * u[:, 4]
    return np.stack([x0, y0, np.where(erased, x0 + width, -2), y0 + height, 255 * u[:, 5]], 1)


def _mixing(config: AugmentConfig, u: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    cuts = (config.cutmix > 0) & ((config.mixup == 0) | (u[:, 0] < 0.5))
    alpha = np.where(cuts, config.cutmix, config.mixup)
    portion = rng.beta(alpha, alpha)  # mixup: of the sample itself; cutmix: the area of the box
    half = np.sqrt(portion)  # half the side of the box, of 2
    x, y = 2 * u[:, 1] - 1, 2 * u[:, 2] - 1
    return np.stack([np.where(cuts, 1.0, portion), x - half, y - half, np.where(cuts, x + half, -2), y + half], 1)


def _inside(x: Tensor, y: Tensor, x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def _columns(table: Tensor, rows_N: Tensor, device: torch.device) -> list[Tensor]:
    """The columns of some rows, each `[N, 1, 1]`."""
    return [column.view(-1, 1, 1) for column in table[rows_N].to(device).unbind(1)]


def _float(table: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(table, np.float32))
