"""Augmentation: a function of (seed, epoch, sample) alone, and each part does what its name says."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fer_dist.config import AugmentConfig
from fer_dist.data.augment import STREAMS, Draws, augment, draw, generator, mix, pixel_grid

COUNT, SIDE = 64, 48
GEOMETRY = {"flip": 0.5, "rotation": 20, "translation": 0.1, "scale": 0.2, "crop": 0.2}
LOOKS = {"brightness": 0.2, "contrast": 0.3, "blur": 1.5, "noise": 20, "erase": 0.5}
EVERYTHING = AugmentConfig(**GEOMETRY, **LOOKS, mixup=0.4, cutmix=1.0)
TABLES = ["affine_N6", "colour_N2", "erase_N5", "partner_N", "mix_N5"]
ROWS = torch.arange(COUNT)


def noise(count: int = COUNT, side: int = SIDE) -> Tensor:
    """uint8 `[count, 1, side, side]`, the same at every call."""
    return torch.randint(0, 256, (count, 1, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def draws_of(config: AugmentConfig, *, seed: int = 0, epoch: int = 0, count: int = COUNT, mixes: bool = True) -> Draws:
    return draw(config, seed=seed, epoch=epoch, count=count, partners_M=np.arange(count), mixes=mixes)


def only(**options: float) -> Draws:
    return draws_of(AugmentConfig(**options))


def shown(images_N1SS: Tensor, draws: Draws) -> Tensor:
    return augment(images_N1SS, draws, torch.arange(len(images_N1SS)))


def mixed(images_N1SS: Tensor, draws: Draws, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """What the feed does with a batch."""
    others_N = draws.partner_N[rows_N]
    return mix(
        augment(images_N1SS[rows_N], draws, rows_N), augment(images_N1SS[others_N], draws, others_N), draws, rows_N
    )


def affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Draws:
    """Draws that sample output (x, y) at (ax + by + c, dx + ey + f), in every sample."""
    still = draws_of(AugmentConfig())
    return Draws(**{**still.__dict__, "affine_N6": torch.tensor([[a, b, c, d, e, f]]).expand(COUNT, 6)})


# -- the same picture in any batch


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("side", [48, 17])
def test_same_bits_in_any_batch_order_and_with_any_threads(side: int, threads: None) -> None:
    images = noise(side=side)
    draws = draws_of(EVERYTHING)
    torch.set_num_threads(1)
    whole, weights = mixed(images, draws, ROWS)
    assert (whole - images).abs().mean() > 20, "nothing was varied: the comparison would be blind"
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    runs = [(1, 1, ROWS[:8]), (1, 7, ROWS), (1, 17, ROWS.flip(0)), (2, 17, shuffled), (2, 64, ROWS)]
    for count, size, order in runs:
        torch.set_num_threads(count)
        parts = [mixed(images, draws, rows) for rows in torch.split(order, size)]
        pictures, shares = torch.cat([p for p, _ in parts]), torch.cat([w for _, w in parts])
        assert torch.equal(pictures, whole[order]), f"batches of {size}, {count} threads"
        assert torch.equal(shares, weights[order])


def changes(a: Draws, b: Draws) -> list[str]:
    """Names of the tables that differ in any row."""
    return [name for name in TABLES if not torch.equal(getattr(a, name), getattr(b, name))]


def test_draws_are_a_function_of_seed_and_epoch() -> None:
    first = draws_of(EVERYTHING, seed=3, epoch=5)
    assert changes(first, draws_of(EVERYTHING, seed=3, epoch=5)) == []
    assert changes(first, draws_of(EVERYTHING, seed=3, epoch=6)) == TABLES
    assert changes(first, draws_of(EVERYTHING, seed=4, epoch=5)) == TABLES


def test_every_sample_is_varied_in_its_own_way() -> None:
    draws = draws_of(EVERYTHING, count=1000)
    for table in (draws.affine_N6, draws.colour_N2, draws.mix_N5):
        assert len(torch.unique(table, dim=0)) == 1000


def test_draws_of_a_sample_do_not_depend_on_the_number_of_samples() -> None:
    few, many = (
        draw(EVERYTHING, seed=1, epoch=2, count=count, partners_M=np.arange(40), mixes=True) for count in (50, 5000)
    )
    for name in TABLES:
        assert torch.equal(getattr(few, name), getattr(many, name)[:50]), name


def test_the_numbers_of_a_sample_are_independent_of_each_other() -> None:
    """A random stream or a column that serves two purposes, such as partner and share, would correlate them."""
    config = AugmentConfig(flip=0.5, rotation=20, translation=0.1, **LOOKS, mixup=1.0)
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


def test_switching_one_part_leaves_the_numbers_of_the_others() -> None:
    """So that two runs that differ in one option differ in that option only."""
    without = draws_of(EVERYTHING.override({"erase": 0.0, "mixup": 0.0, "cutmix": 0.0}))
    assert changes(draws_of(EVERYTHING), without) == ["erase_N5", "partner_N", "mix_N5"]


def test_streams_never_meet() -> None:
    """No two of (seed, epoch, purpose) share their numbers, up to the largest seed."""
    seeds = [0, 1, 2, 3, 4, 2**31 - 2, 2**31 - 1]
    firsts = {generator(s, e, stream).random() for s in seeds for e in range(5) for stream in STREAMS}
    assert len(firsts) == len(seeds) * 5 * len(STREAMS)


# -- geometry


def test_nothing_set_leaves_pictures_as_they_are() -> None:
    """Within 1e-3 grey levels: sampling points are float32 and miss pixel centres by up to 3e-6 pixels."""
    for side in (48, 64, 47):
        images = noise(side=side)
        out = shown(images, only())
        assert out.dtype == torch.float32
        assert (out - images).abs().max() <= 1e-3


def test_flip() -> None:
    images = noise()
    assert (shown(images, only(flip=1.0)) - images.flip(-1)).abs().max() <= 1e-3
    half = draws_of(AugmentConfig(flip=0.3), count=4000).affine_N6[:, 0] < 0
    assert half.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_the_affine_matrix_rotates_moves_and_zooms() -> None:
    images = noise()
    for turns in (1, 2, 3):
        cos, sin = math.cos(turns * math.pi / 2), math.sin(turns * math.pi / 2)
        out = shown(images, affine(cos, -sin, 0, sin, cos, 0))
        assert (out - torch.rot90(images.float(), turns, (-2, -1))).abs().max() <= 2e-3
    out = shown(images, affine(1, 0, -2 * 5 / SIDE, 0, 1, -2 * 3 / SIDE))  # 5 to the right, 3 down
    assert (out[..., 3:, 5:] - images[..., :-3, :-5]).abs().max() <= 1e-3
    # The border repeats the last pixels: there are no black bars.
    assert (out[..., 3:, :5] - images[..., :-3, :1]).abs().max() <= 1e-3
    assert (out[..., :3, 5:] - images[..., :1, :-5]).abs().max() <= 1e-3
    # A window of half the side at the upper left shows each pixel twice as large.
    ramp = torch.arange(SIDE, dtype=torch.uint8).view(1, 1, 1, SIDE).expand(1, 1, SIDE, SIDE)
    out = shown(ramp, affine(0.5, 0, -0.5, 0, 0.5, -0.5))
    assert (out[0, 0, :, 1:] - (torch.arange(SIDE) / 2 - 0.25)[1:]).abs().max() <= 1e-3


RANGES: dict[str, tuple[float, Callable[[Draws], Tensor], float, float]] = {
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
    found = amounts(draws_of(AugmentConfig(**{part: setting}), count=4000)).double()
    margin = 0.01 * (high - low)
    assert low - 1e-3 * margin <= found.min() < low + margin
    assert high - margin < found.max() <= high + 1e-3 * margin
    assert found.mean().item() == pytest.approx((low + high) / 2, abs=5 * margin)


def test_rotation_and_translation_do_nothing_else() -> None:
    table = draws_of(AugmentConfig(rotation=20)).affine_N6
    angle, zero = torch.atan2(table[:, 3], table[:, 0]), torch.zeros(COUNT)
    expected = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1)
    assert torch.allclose(table, expected, atol=1e-6)
    table = draws_of(AugmentConfig(translation=0.1)).affine_N6
    assert torch.equal(table[:, [0, 1, 3, 4]], torch.tensor([1.0, 0, 0, 1]).expand(COUNT, 4))


def test_translation_is_bounded_however_the_picture_is_turned_and_scaled() -> None:
    """The centre of the picture is shown within the shift of the centre, with all else drawn too."""
    config = AugmentConfig(flip=0.5, rotation=180, scale=0.9, translation=0.1)
    a, b, c, d, e, f = draws_of(config, count=4000).affine_N6.double().unbind(1)
    at = torch.linalg.solve(torch.stack([a, b, d, e], 1).view(-1, 2, 2), -torch.stack([c, f], 1))
    assert 0.098 < (at / 2).abs().max() <= 0.1 + 1e-6


def test_crop_stays_inside_and_reaches_every_border() -> None:
    draws = draws_of(AugmentConfig(crop=0.3, flip=0.5), count=1000)
    window = draws.affine_N6[:, 0].abs()
    assert torch.equal(window, draws.affine_N6[:, 4])  # square
    x, y = pixel_grid(SIDE, torch.device("cpu"))
    a, b, c, d, e, f = (v.view(-1, 1, 1) for v in draws.affine_N6.double().unbind(1))
    half = (window / SIDE).view(-1, 1, 1)  # of a sampled pixel, where the picture reaches from -1 to 1
    for along in (a * x + b * y + c, d * x + e * y + f):
        assert ((along - half >= -1 - 1e-5) & (along + half <= 1 + 1e-5)).all()
        centre = along.mean((1, 2))
        assert centre.min() < -0.24
        assert centre.max() > 0.24


# -- colour


def test_brightness_shifts_and_contrast_turns_about_the_mean_of_the_picture() -> None:
    images = (noise().float() * 0.4 + 80).to(torch.uint8)  # far from black and white
    draws = only(brightness=0.2, contrast=0.3)
    before, after = images.double().flatten(1), shown(images, draws).double().flatten(1)
    assert torch.allclose(after.mean(1) - before.mean(1), draws.colour_N2[:, 1].double(), atol=0.01)
    assert torch.allclose(after.std(1) / before.std(1), draws.colour_N2[:, 0].double(), atol=1e-4)


def test_values_stay_on_0_to_255() -> None:
    out = shown(noise(), only(brightness=1.0, contrast=1.0))
    assert (out.min().item(), out.max().item()) == (0, 255)


# -- erasing


def erased(draws: Draws, count: int = COUNT) -> Tensor:
    """Which pixels a box covers: bool `[N, S, S]`, seen on pictures that differ from any erasing grey."""
    black, white = (torch.full((count, 1, SIDE, SIDE), level, dtype=torch.uint8) for level in (0, 255))
    return (shown(black, draws) == shown(white, draws)).squeeze(1)


def test_erasing_area_and_probability() -> None:
    draws = draws_of(AugmentConfig(erase=0.4, erase_area=0.2), count=2000)
    boxes = erased(draws, 2000)
    hit = boxes.any(-1).any(-1)
    assert hit.float().mean().item() == pytest.approx(0.4, abs=0.04)
    area = boxes[hit].float().mean((1, 2))
    assert 0.19 < area.max() <= 0.2 * 1.08  # to the border of pixels
    assert area.min() < 0.04
    # Anywhere, up to the borders, and no side more than another.
    assert boxes.any(0).float().mean() > 0.99
    halves = [boxes[:, :24], boxes[:, 24:], boxes[:, :, :24], boxes[:, :, 24:]]
    covered = [half.float().mean().item() for half in halves]
    assert covered == pytest.approx([boxes.float().mean().item()] * 4, rel=0.1)
    whole = only(erase=1.0, erase_area=1.0)
    assert (whole.erase_N5[:, :4].abs() <= 1 + 1e-6).all()


def test_erased_boxes_are_rectangles_of_one_grey_level() -> None:
    draws = only(erase=1.0, erase_area=0.3)
    ratios = []
    for box, picture in zip(erased(draws), shown(noise(), draws).squeeze(1), strict=True):
        high, wide = box.any(1).sum().item(), box.any(0).sum().item()
        ratios.append(wide / high)
        assert box.sum().item() == high * wide > 0
        assert len(set(picture[box].tolist())) == 1
    assert 0.25 < min(ratios) < 0.5
    assert 2 < max(ratios) < 4
    greys = draws.erase_N5[:, 4]
    assert greys.min() < 30
    assert greys.max() > 225


# -- mixing


def test_mixup_weights_pictures_and_targets_alike() -> None:
    draws = only(mixup=0.4)
    images = noise()
    out, own_N = mixed(images, draws, ROWS)
    share = own_N.view(-1, 1, 1, 1)
    expected = share * images + (1 - share) * images[draws.partner_N]
    assert (out - expected).abs().max() <= 2e-3
    assert own_N.min() < 0.1
    assert own_N.max() > 0.9


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_portions_follow_the_beta_distribution(option: str, alpha: float) -> None:
    table = draws_of(AugmentConfig(**{option: alpha}), count=20_000).mix_N5
    portion = table[:, 0] if option == "mixup" else ((table[:, 3] - table[:, 1]) / 2) ** 2
    assert portion.mean().item() == pytest.approx(0.5, abs=0.02)
    assert portion.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_cutmix_area_is_the_target_weight() -> None:
    """The share of pixels that are the sample's own is exactly the weight of its target."""
    draws = only(cutmix=1.0)
    own, partner = (torch.full((COUNT, 1, SIDE, SIDE), level) for level in (0.0, 1.0))
    out, own_N = mix(own, partner, draws, ROWS)
    assert set(out.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(own_N, 1 - out.double().mean((1, 2, 3)).float())
    for picture in out.squeeze(1) > 0:
        assert picture.sum() == picture.any(0).sum() * picture.any(1).sum()  # a rectangle
    assert own_N.min() < 0.3
    assert own_N.max() > 0.9


def test_mixup_and_cutmix_together_take_turns() -> None:
    table = draws_of(AugmentConfig(mixup=1.0, cutmix=1.0), count=4000).mix_N5
    cuts = table[:, 3] > -2
    assert cuts.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (table[cuts, 0] == 1).all()
    assert (table[~cuts, 0] < 1).all()


def test_partners_are_training_rows_only() -> None:
    partners_M = np.array([3, 7, 11, 63])
    draws = draw(EVERYTHING, seed=0, epoch=0, count=COUNT, partners_M=partners_M, mixes=True)
    assert set(draws.partner_N.tolist()) == set(partners_M.tolist())


def test_nothing_is_mixed_where_it_is_off() -> None:
    assert not draws_of(AugmentConfig(), mixes=True).mixes
    assert not draws_of(AugmentConfig(mixup=0.4, cutmix=1.0), mixes=False).mixes
    assert draws_of(AugmentConfig(mixup=0.1), mixes=True).mixes
