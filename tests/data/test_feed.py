"""The feed: exact shares, order as a function of (seed, epoch), any start, targets that sum to 1."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fer_dist.config import Config
from fer_dist.data.faces import TRAIN, VAL, Faces
from fer_dist.data.feed import Batch, TrainFeed, epoch_order, evaluation_batches, share, targets

CPU = torch.device("cpu")
COUNT, TRAINED, SIDE = 60, 45, 16
AUGMENTS = {"flip": 0.5, "rotation": 20, "translation": 0.1, "erase": 0.5, "mixup": 0.4, "cutmix": 1.0}
SOME: dict[str, Any] = {f"data__augment__{name}": value for name, value in AUGMENTS.items()}


@pytest.fixture
def faces() -> Faces:
    """45 training pictures scattered among 60, every one different.

    Read-only as the memory map of the cache: torch warns of tensors over such memory, and warnings are errors here.
    """
    rng = np.random.default_rng(0)
    images_NHW = rng.integers(0, 256, (COUNT, SIDE, SIDE), dtype=np.uint8)
    usage_N = np.full(COUNT, VAL, np.int64)
    usage_N[rng.choice(COUNT, TRAINED, replace=False)] = TRAIN
    labels_N = rng.integers(0, 7, COUNT)
    for array in (images_NHW, labels_N):
        array.setflags(write=False)
    return Faces(images_NHW=images_NHW, labels_N=labels_N, usage_N=usage_N, names=[str(i) for i in range(COUNT)])


def feed_of(faces: Faces, device: torch.device = CPU, **values: Any) -> TrainFeed:
    """Make a feed; keywords spell the dots of settings as two underscores."""
    config = Config().override({"train.global_batch": 8, **{k.replace("__", "."): v for k, v in values.items()}})
    return TrainFeed(config, faces, faces.part(TRAIN), 7, device)


def batches_of(feed: TrainFeed, epoch: int = 0, *, rank: int = 0, size: int = 1, start: int = 0) -> list[Batch]:
    return list(feed.epoch(epoch, rank=rank, size=size, start=start))


def rows(feed: TrainFeed, epoch: int = 0) -> list[list[int]]:
    return [batch.rows_N.tolist() for batch in batches_of(feed, epoch)]


def equal(parts: Sequence[Batch], batch: Batch) -> bool:
    """Compare all bits of a batch with those of its parts."""
    return all(
        torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        for name in ("rows_N", "images_N1SS", "targets_NK")
    )


# -- shares and order


def test_shares_are_exact() -> None:
    for count, size in itertools.product([0, 1, 2, 3, 7, 64, 3589], [1, 2, 3, 7, 40]):
        shares = [share(count, rank, size) for rank in range(size)]
        assert [i for part in shares for i in part] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_order_is_a_permutation_of_the_training_rows_by_seed_and_epoch() -> None:
    rows_M = np.array([2, 3, 5, 8, 13, 21, 34, 55, 89])
    orders = [tuple(epoch_order(rows_M, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)]
    assert all(sorted(order) == rows_M.tolist() for order in orders)
    assert len(set(orders)) == len(orders)
    assert tuple(epoch_order(rows_M, seed=1, epoch=2)) == orders[4 + 2]
    assert rows_M.tolist() == sorted(rows_M.tolist()), "the argument was shuffled in place"


def test_an_epoch_shows_each_training_row_once_and_drops_the_last_incomplete_batch(faces: Faces) -> None:
    feed = feed_of(faces)
    batches = rows(feed)
    assert [len(batch) for batch in batches] == [8] * feed.steps == [8] * 5
    assert list(itertools.chain(*batches)) == epoch_order(faces.part(TRAIN), seed=0, epoch=0)[:40].tolist()
    shown = {row for epoch in range(6) for batch in rows(feed, epoch) for row in batch}
    assert shown == set(faces.part(TRAIN).tolist()), "what is dropped changes with the epoch"
    cut = feed_of(faces, train__steps_per_epoch=2)
    assert cut.steps == 2
    assert rows(cut) == batches[:2]
    assert feed_of(faces, train__steps_per_epoch=99).steps == 5
    assert feed_of(faces, train__global_batch=46).steps == 0


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_together_see_the_global_batch_in_order_from_any_step(size: int, faces: Faces) -> None:
    whole = batches_of(feed_of(faces, **SOME), 1)
    for start in (0, 1, 4):
        ranks = [batches_of(feed_of(faces, **SOME), 1, rank=rank, size=size, start=start) for rank in range(size)]
        for parts, batch in zip(zip(*ranks, strict=True), whole[start:], strict=True):
            assert equal(parts, batch)


def test_epochs_differ_in_order_and_pictures(faces: Faces) -> None:
    feed = feed_of(faces, data__augment__rotation=20, train__global_batch=TRAINED)
    (first,), (second,) = batches_of(feed, 0), batches_of(feed, 1)
    assert first.rows_N.tolist() != second.rows_N.tolist()
    change_N1SS = first.images_N1SS[first.rows_N.argsort()] - second.images_N1SS[second.rows_N.argsort()]
    assert change_N1SS.abs().amax((1, 2, 3)).min() > 1, "a picture was varied alike in two epochs"


def test_pictures_and_targets_are_those_of_the_rows(faces: Faces) -> None:
    feed = feed_of(faces)
    for batch in batches_of(feed, 0) + batches_of(feed, 1):
        rows_N = batch.rows_N.numpy()
        stored_N1SS = torch.from_numpy(faces.images_NHW[rows_N]).unsqueeze(1)
        assert (batch.images_N1SS - stored_N1SS).abs().max() <= 1e-3
        assert torch.equal(batch.targets_NK.argmax(1), torch.from_numpy(faces.labels_N[rows_N]))
        batch.targets_NK.zero_()  # a copy: the next epoch has them again


# -- mixing


def test_mixed_targets_are_those_of_the_two_pictures_in_their_shares(faces: Faces) -> None:
    """Pictures of one grey level per class: the share of each level in a mixed picture is the target."""
    flat_NHW = np.repeat(faces.labels_N * 40, SIDE * SIDE).reshape(COUNT, SIDE, SIDE).astype(np.uint8)
    faces = replace(faces, images_NHW=flat_NHW)
    mixtures = 0
    for batch in batches_of(feed_of(faces, data__augment__cutmix=1.0)):
        shares_NK = torch.stack([(batch.images_N1SS.round() == 40 * k).float().mean((1, 2, 3)) for k in range(7)], 1)
        assert torch.allclose(shares_NK, batch.targets_NK, atol=1e-6)
        mixtures += int((batch.targets_NK.amax(1) < 1).sum())
    assert mixtures > 15
    for batch in batches_of(feed_of(faces, data__augment__mixup=1.0)):
        level_N = batch.images_N1SS.mean((1, 2, 3))
        assert torch.allclose(level_N, batch.targets_NK @ (40.0 * torch.arange(7)), atol=1e-3)


@pytest.mark.parametrize(("epochs", "mix_off", "mixed"), [(10, 0.1, 9), (10, 0.7, 3), (10, 1.0, 0), (3, 0.1, 3)])
def test_mixing_rests_in_the_last_epochs(epochs: int, mix_off: float, mixed: int, faces: Faces) -> None:
    feed = feed_of(faces, train__epochs=epochs, data__augment__mix_off=mix_off, data__augment__mixup=1.0)
    blended = [
        any((batch.targets_NK.amax(1) < 0.999).any() for batch in batches_of(feed, epoch)) for epoch in range(epochs)
    ]
    assert blended == [True] * mixed + [False] * (epochs - mixed)


# -- targets


def all_targets(faces: Faces, *, smoothing: float = 0.0, weights: str = "none") -> NDArray[np.float32]:
    table_NK: NDArray[np.float32] = targets(faces, 7, faces.part(TRAIN), smoothing=smoothing, weights=weights).numpy()
    return table_NK


@pytest.fixture
def soft(faces: Faces) -> Faces:
    """With FER+ targets of ten votes a picture."""
    counts_NK = np.random.default_rng(1).multinomial(10, np.ones(7) / 7, COUNT)
    return replace(faces, targets_NK=(counts_NK / 10).astype(np.float32))


def test_targets_are_one_hot_or_votes_and_smoothed(faces: Faces, soft: Faces) -> None:
    one_hot_NK = np.eye(7, dtype=np.float32)[faces.labels_N]
    assert soft.targets_NK is not None
    for given, unsmoothed_NK in ((faces, one_hot_NK), (soft, soft.targets_NK)):
        assert np.array_equal(all_targets(given), unsmoothed_NK)
        assert np.allclose(all_targets(given, smoothing=0.14), 0.86 * unsmoothed_NK + 0.14 / 7, atol=1e-6)
    batch = batches_of(feed_of(soft, train__label_smoothing=0.14))[0]
    assert np.array_equal(batch.targets_NK.numpy(), all_targets(soft, smoothing=0.14)[batch.rows_N.numpy()])


def test_balanced_weights_are_inverse_frequencies_with_mean_one(faces: Faces, soft: Faces) -> None:
    train_M = faces.part(TRAIN)
    labels_N = np.where(np.arange(COUNT) % 5 == 0, 1, 3)  # two of the seven classes
    faces = replace(faces, labels_N=labels_N)
    weight_N = all_targets(faces, weights="balanced").sum(1)
    for k in (1, 3):
        assert weight_N[labels_N == k] == pytest.approx(1 / (2 * (labels_N[train_M] == k).mean()))
    assert weight_N[train_M].mean() == pytest.approx(1)
    # Smoothing spreads the target of a picture, not its weight.
    assert all_targets(faces, weights="balanced", smoothing=0.1).sum(1) == pytest.approx(weight_N)
    # Only the training part counts.
    others = replace(faces, labels_N=np.where(faces.usage_N == VAL, 6, labels_N))
    assert all_targets(others, weights="balanced").sum(1)[train_M] == pytest.approx(weight_N[train_M])
    assert all_targets(soft, weights="balanced")[train_M].sum(1).mean() == pytest.approx(1)


# -- micro-batches and evaluation


def test_micro_batches_are_the_batch(faces: Faces) -> None:
    batch = batches_of(feed_of(faces))[0]
    for size in (1, 3, 8, 100):
        pieces = batch.split(size)
        assert all(1 <= len(piece) <= size for piece in pieces)
        assert equal(pieces, batch)


def test_evaluation_takes_each_row_once(faces: Faces) -> None:
    for count, size in itertools.product((0, 1, 3, 17, 50), (1, 2, 3, 4)):
        rows_M = np.random.default_rng(2).permutation(COUNT)[:count]
        images, labels = [torch.empty(0, 1, SIDE, SIDE)], [torch.empty(0)]
        for rank in range(size):
            for images_N1SS, labels_N in evaluation_batches(faces, rows_M, batch=4, rank=rank, size=size, device=CPU):
                assert images_N1SS.dtype == torch.uint8
                assert 1 <= len(labels_N) <= 4
                images.append(images_N1SS)
                labels.append(labels_N)
        assert np.array_equal(torch.cat(images).squeeze(1).numpy(), faces.images_NHW[rows_M])
        assert torch.cat(labels).tolist() == faces.labels_N[rows_M].tolist()


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(faces: Faces) -> None:
    there = batches_of(feed_of(faces, torch.device("cuda", 0), **SOME))
    for here, batch in zip(batches_of(feed_of(faces, **SOME)), there, strict=True):
        assert batch.images_N1SS.device.type == batch.targets_NK.device.type == "cuda"
        assert (batch.images_N1SS.cpu() - here.images_N1SS).abs().mean() < 0.01
        assert torch.allclose(batch.targets_NK.cpu(), here.targets_NK, atol=1e-6)
