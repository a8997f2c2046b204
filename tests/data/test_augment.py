"""Augmentation: a function of (seed, epoch, sample) alone, and each part does what its name says."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fer_dist.config import AugmentConfig
from fer_dist.data.augment import STREAMS, Draws, augment, draw, generator, mix

COUNT, SIDE = 64, 48
EVERYTHING: dict[str, Any] = {"flip": 0.5, "rotation": 20, "translation": 0.1, "scale": 0.2, "crop": 0.2}
EVERYTHING |= {"brightness": 0.2, "contrast": 0.3, "blur": 1.5, "noise": 20, "erase": 0.5, "mixup": 0.4, "cutmix": 1.0}
TABLES = ["affine_N6", "colour_N2", "erase_N5", "partner_N", "mix_N5"]
ROWS = torch.arange(COUNT)


def noise(side: int = SIDE) -> Tensor:
    """uint8 `[COUNT, 1, side, side]`, the same at every call."""
    return torch.randint(0, 256, (COUNT, 1, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def draws_of(count: int = COUNT, *, seed: int = 0, epoch: int = 0, **options: Any) -> Draws:
    config = AugmentConfig(**options)
    return draw(config, seed=seed, epoch=epoch, count=count, partners_M=np.arange(COUNT), mixes=True)


def augmented(images_N1SS: Tensor, draws: Draws) -> Tensor:
    return augment(images_N1SS, draws, torch.arange(len(images_N1SS)))


# -- the same picture in any batch


@pytest.mark.parametrize("side", [48, 17])
def test_same_bits_in_any_batch_order_and_with_any_threads(side: int, request: pytest.FixtureRequest) -> None:
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    images, draws = noise(side), draws_of(**EVERYTHING)

    def mixed(rows_N: Tensor) -> tuple[Tensor, Tensor]:
        own, other = (augment(images[of_N], draws, of_N) for of_N in (rows_N, draws.partner_N[rows_N]))
        return mix(own, other, draws, rows_N)

    torch.set_num_threads(1)
    whole, weights = mixed(ROWS)
    assert (whole - images).abs().mean() > 20, "nothing was varied: the comparison would be blind"
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    for count, size, order in [(1, 1, ROWS[:8]), (1, 7, ROWS), (2, 17, shuffled), (2, 64, ROWS)]:
        torch.set_num_threads(count)
        pictures, shares = map(torch.cat, zip(*map(mixed, torch.split(order, size)), strict=True))
        assert torch.equal(pictures, whole[order]), f"batches of {size}, {count} threads"
        assert torch.equal(shares, weights[order])


def test_draws_are_a_function_of_seed_epoch_and_sample() -> None:
    first = draws_of(seed=3, epoch=5, **EVERYTHING)

    def changes(other: Draws) -> list[str]:
        return [name for name in TABLES if not torch.equal(getattr(first, name), getattr(other, name)[:COUNT])]

    assert changes(draws_of(seed=3, epoch=5, **EVERYTHING)) == []
    assert changes(draws_of(seed=3, epoch=6, **EVERYTHING)) == TABLES
    assert changes(draws_of(seed=4, epoch=5, **EVERYTHING)) == TABLES
    assert changes(draws_of(5000, seed=3, epoch=5, **EVERYTHING)) == [], "depends on the number of samples"
    # Two runs that differ in one option differ in that option only.
    without = EVERYTHING | {"erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    assert changes(draws_of(seed=3, epoch=5, **without)) == ["erase_N5", "partner_N", "mix_N5"]


def test_the_numbers_of_a_sample_are_independent_of_each_other() -> None:
    """A random stream or a column that serves two purposes, such as partner and share, would correlate them."""
    config = AugmentConfig(**EVERYTHING | {"scale": 0.0, "crop": 0.0, "mixup": 1.0, "cutmix": 0.0})
    epochs = []
    for epoch in range(500):
        draws = draw(config, seed=0, epoch=epoch, count=1, partners_M=np.arange(1000), mixes=True)
        assert draws.quality is not None
        mirror_turn_shift, colour, grey = draws.affine_N6[0, [0, 1, 2, 5]], draws.colour_N2[0], draws.erase_N5[0, 4:]
        blur_noise = torch.cat([draws.quality.blur_N, draws.quality.noise_N])
        share, partner = draws.mix_N5[0, :1], draws.partner_N.float()
        epochs.append(torch.cat([mirror_turn_shift, colour, grey, blur_noise, share, partner]))
    correlation = torch.corrcoef(torch.stack(epochs).T) - torch.eye(11)
    assert correlation.abs().max() < 0.22  # five standard deviations


def test_streams_never_meet() -> None:
    """No two of (seed, epoch, purpose) share their numbers, up to the largest seed."""
    seeds = [0, 1, 2, 3, 4, 2**31 - 2, 2**31 - 1]
    firsts = {generator(s, e, stream).random() for s in seeds for e in range(5) for stream in STREAMS}
    assert len(firsts) == len(seeds) * 5 * len(STREAMS)


# -- geometry


def test_without_a_setting_pictures_stay_and_flip_mirrors_a_part() -> None:
    """Within 1e-3 grey levels: sampling points are float32 and miss pixel centres by up to 3e-6 pixels."""
    for side in (48, 47):
        images = noise(side)
        assert (augmented(images, draws_of()) - images).abs().max() <= 1e-3
        assert (augmented(images, draws_of(flip=1.0)) - images.flip(-1)).abs().max() <= 1e-3
    flipped = draws_of(4000, flip=0.3).affine_N6[:, 0] < 0
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_the_affine_matrix_rotates_moves_and_zooms() -> None:
    images = noise()

    def sampled(images_N1SS: Tensor, *matrix: float) -> Tensor:
        return augmented(images_N1SS, replace(draws_of(), affine_N6=torch.tensor([matrix]).expand(COUNT, 6)))

    for turns in (1, 2, 3):
        cos, sin = math.cos(turns * math.pi / 2), math.sin(turns * math.pi / 2)
        out = sampled(images, cos, -sin, 0, sin, cos, 0)
        assert (out - torch.rot90(images.float(), turns, (-2, -1))).abs().max() <= 2e-3
    out = sampled(images, 1, 0, -2 * 5 / SIDE, 0, 1, -2 * 3 / SIDE)  # 5 to the right, 3 down
    assert (out[..., 3:, 5:] - images[..., :-3, :-5]).abs().max() <= 1e-3
    # The border repeats the last pixels: there are no black bars.
    assert (out[..., 3:, :5] - images[..., :-3, :1]).abs().max() <= 1e-3
    assert (out[..., :3, 5:] - images[..., :1, :-5]).abs().max() <= 1e-3
    # A window of half the side at the upper left shows each pixel twice as large.
    ramp = torch.arange(SIDE, dtype=torch.uint8).expand(1, 1, SIDE, SIDE)
    out = sampled(ramp, 0.5, 0, -0.5, 0, 0.5, -0.5)
    assert (out[0, 0, :, 1:] - (torch.arange(SIDE) / 2 - 0.25)[1:]).abs().max() <= 1e-3


RANGES: dict[str, tuple[Any, Callable[[Draws], Tensor], float, float]] = {
    "rotation": (20, lambda d: torch.rad2deg(torch.atan2(d.affine_N6[:, 3], d.affine_N6[:, 0])), -20, 20),
    "translation": (0.1, lambda d: d.affine_N6[:, [2, 5]] / 2, -0.1, 0.1),  # fraction of the side
    "scale": (0.2, lambda d: 1 / d.affine_N6[:, 0], 0.8, 1.2),  # of what is shown, over its own size
    "crop": (0.3, lambda d: d.affine_N6[:, 0], 0.7, 1),
    "contrast": (0.3, lambda d: d.colour_N2[:, 0], 0.7, 1.3),
    "brightness": (0.2, lambda d: d.colour_N2[:, 1], -51, 51),
}


@pytest.mark.parametrize("part", RANGES)
def test_amounts_fill_their_range(part: str) -> None:
    setting, amounts, low, high = RANGES[part]
    found = amounts(draws_of(4000, **{part: setting})).double()
    margin = 0.01 * (high - low)
    assert low - 1e-3 * margin <= found.min() < low + margin
    assert high - margin < found.max() <= high + 1e-3 * margin
    assert found.mean().item() == pytest.approx((low + high) / 2, abs=5 * margin)


def test_rotation_and_translation_do_nothing_else() -> None:
    a, b, c, d, e, f = draws_of(rotation=20).affine_N6.unbind(1)
    angle = torch.atan2(d, a)
    assert torch.allclose(torch.stack([a, b, d, e]), torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]))
    assert not torch.stack([c, f]).any()
    table = draws_of(translation=0.1).affine_N6
    assert torch.equal(table[:, [0, 1, 3, 4]], torch.tensor([1.0, 0, 0, 1]).expand(COUNT, 4))


def test_translation_is_bounded_however_the_picture_is_turned_and_scaled() -> None:
    """The centre of the picture is shown within the shift of the centre, with all else drawn too."""
    table = draws_of(4000, flip=0.5, rotation=180, scale=0.9, translation=0.1).affine_N6
    a, b, c, d, e, f = table.double().unbind(1)
    at = torch.linalg.solve(torch.stack([a, b, d, e], 1).view(-1, 2, 2), -torch.stack([c, f], 1))
    assert 0.098 < (at / 2).abs().max() <= 0.1 + 1e-6


def test_crop_stays_inside_and_reaches_every_border() -> None:
    a, _, c, _, e, f = draws_of(1000, crop=0.3, flip=0.5).affine_N6.unbind(1)
    assert torch.equal(a.abs(), e), "the window is square"
    for centre in (c, f):
        assert (centre.abs() + e).max() <= 1 + 1e-6, "half a window from its centre is beyond the border"
        assert centre.min() < -0.24
        assert centre.max() > 0.24


# -- colour


def test_brightness_shifts_and_contrast_turns_about_the_mean_of_the_picture() -> None:
    images = (noise().float() * 0.4 + 80).to(torch.uint8)  # far from black and white
    draws = draws_of(brightness=0.2, contrast=0.3)
    before, after = images.double().flatten(1), augmented(images, draws).double().flatten(1)
    assert torch.allclose(after.mean(1) - before.mean(1), draws.colour_N2[:, 1].double(), atol=0.01)
    assert torch.allclose(after.std(1) / before.std(1), draws.colour_N2[:, 0].double(), atol=1e-4)
    out = augmented(noise(), draws_of(brightness=1.0, contrast=1.0))
    assert (out.min().item(), out.max().item()) == (0, 255)


# -- erasing


def test_erased_boxes_are_rectangles_of_one_grey_level_anywhere() -> None:
    draws = draws_of(2000, erase=0.4, erase_area=0.2)
    black, white = (
        augmented(torch.full((2000, 1, SIDE, SIDE), level, dtype=torch.uint8), draws).squeeze(1) for level in (0, 255)
    )
    boxes = black == white  # where a picture no longer shows
    hit = boxes.any(-1).any(-1)
    assert hit.float().mean().item() == pytest.approx(0.4, abs=0.04)
    ratios = []
    for box, picture in zip(boxes[hit], black[hit], strict=True):
        high, wide = box.any(1).sum().item(), box.any(0).sum().item()
        assert box.sum().item() == high * wide
        assert len(picture[box].unique()) == 1
        ratios.append(wide / high)
    assert 0.25 < min(ratios) < 0.5
    assert 2 < max(ratios) < 4
    assert black[hit].amax((1, 2)).min() < 30
    assert black[hit].amax((1, 2)).max() > 225
    area = boxes[hit].float().mean((1, 2))
    assert 0.19 < area.max() <= 0.2 * 1.08  # to the border of pixels
    assert area.min() < 0.04
    # Anywhere, up to the borders, and no side more than another.
    assert boxes.any(0).float().mean() > 0.99
    halves = [boxes[:, :24], boxes[:, 24:], boxes[:, :, :24], boxes[:, :, 24:]]
    covered = [half.float().mean().item() for half in halves]
    assert covered == pytest.approx([boxes.float().mean().item()] * 4, rel=0.1)
    assert (draws_of(erase=1.0, erase_area=1.0).erase_N5[:, :4].abs() <= 1 + 1e-6).all()


# -- mixing


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [0.2, 8.0])
def test_portions_follow_the_beta_distribution(option: str, alpha: Any) -> None:
    table = draws_of(20_000, **{option: alpha}).mix_N5
    portion = table[:, 0] if option == "mixup" else ((table[:, 3] - table[:, 1]) / 2) ** 2
    assert portion.mean().item() == pytest.approx(0.5, abs=0.02)
    assert portion.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_mixup_and_cutmix_take_turns_with_training_rows() -> None:
    partners_M = np.array([3, 7, 11, 63])
    config = AugmentConfig(mixup=1.0, cutmix=1.0)
    draws = draw(config, seed=0, epoch=0, count=4000, partners_M=partners_M, mixes=True)
    assert set(draws.partner_N.tolist()) == set(partners_M.tolist())
    cuts = draws.mix_N5[:, 3] > -2
    assert cuts.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (draws.mix_N5[cuts, 0] == 1).all()
    assert (draws.mix_N5[~cuts, 0] < 1).all()
