"""The feed: exact shares, order as a function of (seed, epoch), any start, targets that sum to 1."""

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
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
SOME = {f"data__augment__{name}": value for name, value in AUGMENTS.items()}


def noise_faces(folder: Path | None = None) -> Faces:
    """45 training pictures scattered among 60, every one different; in a read-only memory map if a folder is given."""
    rng = np.random.default_rng(0)
    images_NHW = rng.integers(0, 256, (COUNT, SIDE, SIDE), dtype=np.uint8)
    if folder is not None:
        np.save(folder / "images.npy", images_NHW)
        images_NHW = np.load(folder / "images.npy", mmap_mode="r")
    usage_N = np.full(COUNT, VAL, np.int64)
    usage_N[rng.choice(COUNT, TRAINED, replace=False)] = TRAIN
    labels_N = rng.integers(0, 7, COUNT)
    labels_N.setflags(write=folder is None)
    return Faces(images_NHW=images_NHW, labels_N=labels_N, usage_N=usage_N, names=[str(i) for i in range(COUNT)])


def settings(**values: Any) -> Config:
    """Keywords spell dots as two underscores."""
    return Config().override({"train.global_batch": 8, **{k.replace("__", "."): v for k, v in values.items()}})


def feed_of(config: Config, faces: Faces | None = None) -> TrainFeed:
    faces = faces or noise_faces()
    return TrainFeed(config, faces, faces.part(TRAIN), 7, CPU)


def rows(feed: TrainFeed, epoch: int = 0, *, rank: int = 0, size: int = 1, start: int = 0) -> list[list[int]]:
    return [batch.rows_N.tolist() for batch in feed.epoch(epoch, rank=rank, size=size, start=start)]


def digest(batch: Batch) -> tuple[list[int], str]:
    """The rows of a batch and a fingerprint of all its bits."""
    content = hashlib.sha256(batch.images_N1SS.numpy().tobytes() + batch.targets_NK.numpy().tobytes())
    return batch.rows_N.tolist(), content.hexdigest()


# -- shares and order


def test_shares_are_exact() -> None:
    for count, size in itertools.product([0, 1, 2, 3, 7, 17, 64, 3589, 28_709], [1, 2, 3, 4, 7, 40]):
        shares = [share(count, rank, size) for rank in range(size)]
        assert [i for part in shares for i in part] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_order_is_a_permutation_of_the_training_rows_by_seed_and_epoch() -> None:
    rows_M = np.array([2, 3, 5, 8, 13, 21, 34, 55, 89])
    orders = {
        (seed, epoch): tuple(epoch_order(rows_M, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)
    }
    assert all(sorted(order) == rows_M.tolist() for order in orders.values())
    assert len(set(orders.values())) == len(orders)
    assert tuple(epoch_order(rows_M, seed=1, epoch=2)) == orders[1, 2]
    assert rows_M.tolist() == sorted(rows_M.tolist()), "the argument was shuffled in place"


def test_an_epoch_shows_each_training_row_once_and_drops_the_last_incomplete_batch() -> None:
    faces = noise_faces()
    feed = feed_of(settings(), faces)
    assert feed.steps == 5
    batches = rows(feed)
    assert [len(batch) for batch in batches] == [8] * 5
    shown = [row for batch in batches for row in batch]
    assert len(set(shown)) == 40
    assert set(shown) < set(faces.part(TRAIN).tolist())
    assert shown == epoch_order(faces.part(TRAIN), seed=0, epoch=0)[:40].tolist()
    all_shown = {row for epoch in range(6) for batch in rows(feed, epoch) for row in batch}
    assert len(all_shown) == TRAINED, "what is dropped changes with the epoch"
    cut = feed_of(settings(train__steps_per_epoch=2))
    assert cut.steps == 2
    assert rows(cut) == batches[:2]
    assert feed_of(settings(train__steps_per_epoch=99)).steps == 5
    assert feed_of(settings(train__global_batch=46)).steps == 0


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_together_see_the_global_batch_in_order(size: int) -> None:
    config = settings(**SOME)
    faces = noise_faces()
    whole = list(feed_of(config, faces).epoch(1, rank=0, size=1))
    feeds = [list(feed_of(config, faces).epoch(1, rank=rank, size=size)) for rank in range(size)]
    for step, batch in enumerate(whole):
        parts = [feed[step] for feed in feeds]
        assert torch.equal(torch.cat([part.rows_N for part in parts]), batch.rows_N)
        assert torch.equal(torch.cat([part.images_N1SS for part in parts]), batch.images_N1SS)
        assert torch.equal(torch.cat([part.targets_NK for part in parts]), batch.targets_NK)


def test_an_epoch_resumes_at_any_step() -> None:
    config = settings(**SOME)
    whole = [digest(batch) for batch in feed_of(config).epoch(2, rank=1, size=2)]
    for start in (0, 1, 4, 5):
        assert [digest(batch) for batch in feed_of(config).epoch(2, rank=1, size=2, start=start)] == whole[start:]


def test_epochs_differ_in_order_and_pictures() -> None:
    feed = feed_of(settings(data__augment__rotation=20, train__global_batch=45))
    seen = []
    for epoch in (0, 1):
        (batch,) = feed.epoch(epoch, rank=0, size=1)
        seen.append((batch.rows_N.tolist(), batch.images_N1SS[batch.rows_N.argsort()]))
    assert seen[0][0] != seen[1][0]
    assert (seen[0][1] - seen[1][1]).abs().amax((1, 2, 3)).min() > 1, "a picture was varied alike in two epochs"


def test_pictures_are_those_of_the_rows() -> None:
    faces = noise_faces()
    for batch in feed_of(settings(), faces).epoch(0, rank=0, size=1):
        stored = torch.from_numpy(faces.images_NHW[batch.rows_N.numpy()]).unsqueeze(1)
        assert (batch.images_N1SS - stored).abs().max() <= 1e-3
        assert torch.equal(batch.targets_NK.argmax(1), torch.from_numpy(faces.labels_N[batch.rows_N.numpy()]))


def test_read_only_memory_map_is_read_without_a_warning(tmp_path: Path) -> None:
    """torch warns of tensors over memory that may not be written; warnings are errors in these tests."""
    faces = noise_faces(tmp_path)
    assert not faces.images_NHW.flags.writeable
    mapped = [digest(b) for b in feed_of(settings(data__augment__mixup=1.0), faces).epoch(0, rank=0, size=1)]
    assert mapped == [digest(b) for b in feed_of(settings(data__augment__mixup=1.0)).epoch(0, rank=0, size=1)]
    labels = [
        labels_N for _, labels_N in evaluation_batches(faces, faces.part(VAL), batch=4, rank=0, size=1, device=CPU)
    ]
    assert torch.cat(labels).tolist() == faces.labels_N[faces.part(VAL)].tolist()


def test_writing_into_a_batch_does_not_reach_the_data_set() -> None:
    faces = noise_faces()
    before = faces.images_NHW.copy(), faces.labels_N.copy()
    for images_N1SS, labels_N in evaluation_batches(faces, faces.part(VAL), batch=4, rank=0, size=1, device=CPU):
        images_N1SS.zero_()
        labels_N.zero_()
    for batch in feed_of(settings(), faces).epoch(0, rank=0, size=1):
        batch.images_N1SS.zero_()
        batch.targets_NK.zero_()
    assert np.array_equal(faces.images_NHW, before[0])
    assert np.array_equal(faces.labels_N, before[1])
    feed = feed_of(settings(), faces)
    first = next(iter(feed.epoch(0, rank=0, size=1)))
    first.targets_NK.zero_()
    assert next(iter(feed.epoch(0, rank=0, size=1))).targets_NK.sum() == 8


# -- mixing


def test_mixed_targets_are_those_of_the_two_pictures_in_their_shares() -> None:
    """Pictures of one grey level per class: the share of each level in a mixed picture is the target."""
    faces = noise_faces()
    flat_NHW = np.repeat(faces.labels_N * 40, SIDE * SIDE).reshape(COUNT, SIDE, SIDE).astype(np.uint8)
    faces = replace(faces, images_NHW=flat_NHW)
    mixtures = 0
    for batch in feed_of(settings(data__augment__cutmix=1.0), faces).epoch(0, rank=0, size=1):
        shares_NK = torch.stack([(batch.images_N1SS.round() == 40 * k).float().mean((1, 2, 3)) for k in range(7)], 1)
        assert torch.allclose(shares_NK, batch.targets_NK, atol=1e-6)
        mixtures += int((batch.targets_NK.amax(1) < 1).sum())
    assert mixtures > 15
    for batch in feed_of(settings(data__augment__mixup=1.0), faces).epoch(0, rank=0, size=1):
        level_N = batch.images_N1SS.mean((1, 2, 3))
        assert torch.allclose(level_N, batch.targets_NK @ (40.0 * torch.arange(7)), atol=1e-3)


@pytest.mark.parametrize(
    ("epochs", "mix_off", "mixed"),
    [(10, 0.1, 9), (10, 0.7, 3), (10, 0.0, 10), (10, 1.0, 0), (3, 0.1, 3), (12, 0.1, 11), (100, 0.29, 71)],
)
def test_mixing_rests_in_the_last_epochs(epochs: int, mix_off: float, mixed: int) -> None:
    feed = feed_of(settings(train__epochs=epochs, data__augment__mix_off=mix_off, data__augment__mixup=1.0))
    blended = [
        any((batch.targets_NK.amax(1) < 0.999).any() for batch in feed.epoch(epoch, rank=0, size=1))
        for epoch in range(epochs)
    ]
    assert blended == [True] * mixed + [False] * (epochs - mixed)


# -- targets


def all_targets(faces: Faces, *, smoothing: float = 0.0, weights: str = "none") -> NDArray[np.float32]:
    table_NK: NDArray[np.float32] = targets(faces, 7, faces.part(TRAIN), smoothing=smoothing, weights=weights).numpy()
    return table_NK


def votes() -> NDArray[np.float32]:
    """FER+ targets: ten votes a picture."""
    counts_NK = np.random.default_rng(1).multinomial(10, np.ones(7) / 7, COUNT)
    return (counts_NK / 10).astype(np.float32)


def test_targets_are_one_hot_or_votes_and_smoothed() -> None:
    hard = noise_faces()
    soft = replace(hard, targets_NK=votes())
    assert np.array_equal(all_targets(hard), np.eye(7, dtype=np.float32)[hard.labels_N])
    assert np.array_equal(all_targets(soft), votes())
    batch = next(iter(feed_of(settings(), soft).epoch(0, rank=0, size=1)))
    assert np.array_equal(batch.targets_NK.numpy(), votes()[batch.rows_N.numpy()])
    by_hand_NK = all_targets(hard, smoothing=0.14)
    assert by_hand_NK[0, hard.labels_N[0]] == pytest.approx(0.88)
    assert np.sort(by_hand_NK[0])[:6] == pytest.approx(0.02)
    for faces, smoothing in itertools.product((hard, soft), (0.1, 0.9)):
        table_NK = all_targets(faces, smoothing=smoothing)
        assert np.allclose(table_NK.sum(1), 1, atol=1e-6)
        assert table_NK.min() >= smoothing / 7 - 1e-7


def test_balanced_weights_are_inverse_frequencies_with_mean_one() -> None:
    faces = noise_faces()
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
    soft = replace(faces, targets_NK=votes())
    assert all_targets(soft, weights="balanced")[train_M].sum(1).mean() == pytest.approx(1)


# -- micro-batches and evaluation


def test_micro_batches_are_the_batch() -> None:
    batch = next(iter(feed_of(settings()).epoch(0, rank=0, size=1)))
    for size in (1, 3, 5, 8, 100):
        pieces = batch.split(size)
        assert all(1 <= len(piece) <= size for piece in pieces)
        for name in ("rows_N", "images_N1SS", "targets_NK"):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))


def test_evaluation_takes_each_row_once() -> None:
    faces = noise_faces()
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
def test_batches_on_a_gpu_are_those_of_the_cpu() -> None:
    config = settings(**SOME)
    faces = noise_faces()
    there = TrainFeed(config, faces, faces.part(TRAIN), 7, torch.device("cuda", 0))
    for here, batch in zip(
        feed_of(config, faces).epoch(0, rank=0, size=1), there.epoch(0, rank=0, size=1), strict=True
    ):
        assert batch.images_N1SS.device.type == batch.targets_NK.device.type == "cuda"
        assert (batch.images_N1SS.cpu() - here.images_N1SS).abs().mean() < 0.01
        assert torch.allclose(batch.targets_NK.cpu(), here.targets_NK, atol=1e-6)
