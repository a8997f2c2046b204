"""Blur and noise of training pictures: as wide as they say, and each sample's own."""

import pytest
import torch

from fer_dist.config import AugmentConfig
from fer_dist.data.augment import generator
from fer_dist.data.quality import Quality, draw_quality, grain, spoil

ROW = torch.tensor([0])


def of(*, blur: float = 0.0, noise: float = 0.0) -> Quality:
    """The same for one sample."""
    return Quality(blur_N=torch.tensor([blur]), noise_N=torch.tensor([noise]), number_N=torch.tensor([1]), reach=8)


@pytest.mark.parametrize("sigma", [0.6, 2.0])
def test_blur_spreads_a_point_by_its_deviation(sigma: float) -> None:
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 255
    out = spoil(point, of(blur=sigma), ROW)[0].double() / 255
    assert out.sum().item() == pytest.approx(1, abs=1e-5)
    place = torch.arange(33).double() - 16
    assert (out.sum(0) * place.square()).sum().sqrt().item() == pytest.approx(sigma, rel=0.02)
    assert torch.allclose(out, out.T, atol=1e-7)
    assert torch.allclose(out, out.flip(0), atol=1e-7)
    even = torch.full((1, 20, 20), 77.0)
    assert torch.allclose(spoil(even, of(blur=sigma), ROW), even, atol=1e-4), "also at the border"


def test_no_blur_and_no_noise_change_nothing() -> None:
    picture = torch.rand(1, 48, 48) * 255
    assert torch.equal(spoil(picture, of(), ROW), picture)
    assert draw_quality(AugmentConfig(), generator(0, 0, "geometry"), 10) is None


def test_noise_is_splitmix64_of_its_deviation() -> None:
    """The first numbers of the generator with seed 1234567, as its authors publish them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    sums = [sum((number >> (16 * part)) & 0xFFFF for part in range(4)) for number in published]
    expected = [3**0.5 * ((total + 2) / 65536 - 2) for total in sums]
    assert grain(torch.tensor([1234567]), 2).flatten()[:3].tolist() == pytest.approx(expected, abs=1e-6)
    found = grain(torch.arange(200), 48)
    assert found.mean().item() == pytest.approx(0, abs=0.005)
    assert found.std().item() == pytest.approx(1, abs=0.005)
    assert abs((found * found.roll(1, 0)).mean().item()) < 0.005, "pictures have the same noise"
    noisy = spoil(torch.full((1, 48, 48), 128.0), of(noise=20), ROW)
    assert noisy.std().item() == pytest.approx(20, rel=0.05)


def test_draws_lie_within_their_bounds_and_are_mostly_small() -> None:
    config = AugmentConfig(blur=2.0, noise=30.0)
    quality, few = (draw_quality(config, generator(0, 0, "geometry"), count) for count in (10_000, 50))
    assert quality is not None
    assert quality.reach == 5
    for drawn, largest in ((quality.blur_N, 2.0), (quality.noise_N, 30.0)):
        assert drawn.min() >= 0
        assert 0.99 * largest < drawn.max() <= largest
        assert drawn.median().item() == pytest.approx(largest / 4, rel=0.05)
    assert len(torch.unique(quality.number_N)) == 10_000
    for name in ("blur_N", "noise_N", "number_N"):
        assert torch.equal(getattr(few, name), getattr(quality, name)[:50]), "depends on the number of samples"
