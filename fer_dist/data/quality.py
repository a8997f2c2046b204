"""Worse pictures for training: blur and noise, as of small faces, cheap cameras and little light.

Numbers and operations are as in `augment.py`: a picture gets the same bits at any world size and in any batch.
The noise of a pixel is a function of its sample's 64-bit number and of its place: SplitMix64 (Steele et al. 2014,
doi:10.1145/2660193.2660195) of both, as a counter. Its four 16-bit parts are four uniform numbers, whose sum is close
to normal (Irwin-Hall).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fer_dist.config import AugmentConfig

GOLDEN = -0x61C8864680B583EB
"""SplitMix64's step, 2^64 over the golden ratio, as a signed number."""
FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Those of its finalizer, likewise."""
DEVIATIONS = 2.5
"""A blur reaches so far [standard deviations]: 99% of a Gaussian, as in each of its directions."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How each sample of the data set is spoilt in an epoch.

    Attributes:
        blur_N: float32, standard deviation of the Gaussian blur [pixels].
        noise_N: float32, standard deviation of the noise [grey levels].
        number_N: int64, what the noise is made from.
        reach: how far the widest blur looks [pixels].
    """

    blur_N: Tensor
    noise_N: Tensor
    number_N: Tensor
    reach: int


def draw_quality(config: AugmentConfig, rng: np.random.Generator, count: int) -> Quality | None:
    """Of samples 0..count-1; None: nothing is to be spoilt.

    A deviation is the square of a uniform number times the largest: half of the pictures get under a quarter of it.
    """
    if config.blur == 0 and config.noise == 0:
        return None
    raw_N3 = rng.integers(0, 2**64, (count, 3), dtype=np.uint64)  # a row per sample, whatever their count
    u_N2 = np.square((raw_N3[:, :2] >> np.uint64(11)) * 2.0**-53)
    return Quality(
        blur_N=torch.from_numpy((config.blur * u_N2[:, 0]).astype(np.float32)),
        noise_N=torch.from_numpy((config.noise * u_N2[:, 1]).astype(np.float32)),
        number_N=torch.from_numpy(raw_N3[:, 2].astype(np.int64)),
        reach=math.ceil(DEVIATIONS * config.blur),
    )


def spoil(images_NSS: Tensor, quality: Quality, rows_N: Tensor) -> Tensor:
    """Blur, then noise: float32 `[N, S, S]`, on 0..255 again.

    Args:
        images_NSS: float32 `[N, S, S]` on 0..255.
        rows_N: int64 `[N]`, on the CPU; the sample index of each picture.
    """
    device = images_NSS.device
    blurred_NSS = _blur(images_NSS, quality.blur_N[rows_N].to(device), quality.reach)
    noise_N11 = quality.noise_N[rows_N].to(device).view(-1, 1, 1)
    grain_NSS = grain(quality.number_N[rows_N].to(device), images_NSS.shape[-1])
    return (blurred_NSS + noise_N11 * grain_NSS).clamp(0, 255)


def grain(number_N: Tensor, side: int) -> Tensor:
    """Noise of mean 0 and deviation 1 from each number: float32 `[N, side, side]`, within 3.5."""
    place_SS = torch.arange(1, side * side + 1, device=number_N.device).view(side, side)
    x = number_N.view(-1, 1, 1) + place_SS * GOLDEN  # int64 wraps around
    x = (x ^ _shifted(x, 30)) * FACTORS[0]
    x = (x ^ _shifted(x, 27)) * FACTORS[1]
    x = x ^ _shifted(x, 31)
    parts = (x & 0xFFFF) + (_shifted(x, 16) & 0xFFFF) + (_shifted(x, 32) & 0xFFFF) + _shifted(x, 48)
    return ((parts + 2).double() / 65536 - 2).mul(math.sqrt(3)).float()  # each part's mean is 32767.5


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: `>>` of a signed number brings its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _blur(images_NSS: Tensor, sigma_N: Tensor, reach: int) -> Tensor:
    """By sums of shifted pictures, one weight a picture and shift: no kernel whose order depends on the batch."""
    if reach == 0:
        return images_NSS
    shift_D = torch.arange(-reach, reach + 1, device=images_NSS.device)
    weight_ND = torch.exp(-0.5 * (shift_D / sigma_N.clamp_min(1e-3).unsqueeze(1)).square())
    weight_ND = weight_ND / weight_ND.sum(1, keepdim=True)
    for dimension, pad in ((1, (0, 0, reach, reach)), (2, (reach, reach, 0, 0))):
        side = images_NSS.shape[dimension]
        padded = F.pad(images_NSS.unsqueeze(1), pad, mode="replicate").squeeze(1)
        images_NSS = torch.zeros_like(images_NSS)
        for d in range(2 * reach + 1):
            images_NSS = images_NSS + weight_ND[:, d].view(-1, 1, 1) * padded.narrow(dimension, d, side)
    return images_NSS
