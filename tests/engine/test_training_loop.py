"""`fit` follows its settings: what epochs are judged by, how long it trains, from which seed, on which data."""

import dataclasses
import json
from collections import deque
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fer_dist.data.faces import VAL
from fer_dist.engine import trainer
from fer_dist.engine.checkpoint import load
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import EpochRecord, RunLog
from fer_dist.spec import LabelSet
from fer_dist.world import World
from tests.helpers.training import ALL_PARTS, SIDE, fit, metrics_of, noise_faces, settings

# -- what epochs are judged by


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: tuple[int, int, float]) -> None:
    """Replace evaluations; a score: correct pictures of the first class (of 9), of the second (of 3), and the loss."""
    script = deque(
        Metrics(confusion_KK=np.pad([[a, 9 - a], [3 - b, b]], (0, 5)).astype(np.int64), loss_sum=12 * loss, count=12)
        for a, b, loss in scores
    )
    monkeypatch.setattr(trainer, "evaluate", lambda *_: script.popleft())


@pytest.mark.parametrize(("monitor", "best"), [("loss", 3), ("accuracy", 2), ("macro_f1", 4)])
def test_monitor_picks_the_best_epoch(monitor: str, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An equal score is not a gain, and later epochs that are worse do not replace the best model."""
    scores = [(5, 1, 2.0), (9, 0, 1.5), (5, 1, 1.0), (7, 2, 1.9), (5, 1, 1.2)]
    scripted(monkeypatch, *scores)
    config = settings(train__monitor=monitor, train__epochs=5, train__steps_per_epoch=1)
    result = fit(monkeypatch, tmp_path, config)
    assert load(result.folder / "best.pth").record["epoch"] == best
    assert load(result.folder / "last.pth").record["epoch"] == 5
    report = json.loads((result.folder / "report.json").read_text())
    assert (report["epoch"], report["loss"]) == (best, pytest.approx(scores[best - 1][2]))
    assert result.best.loss == report["loss"]
    assert not (result.folder / "tensorboard").exists(), "it is switched off"


@pytest.mark.parametrize(("patience", "losses"), [(0, [1, 2, 3, 4]), (1, [1, 1.1]), (2, [1, 1.1, 0.9, 1, 1])])
def test_patience(patience: int, losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted anew after a gain; `on_epoch` is called after the last epoch, too: Ray would miss its result."""
    scripted(monkeypatch, *((5, 1, loss) for loss in losses))
    config = settings(train__patience=patience, train__monitor="loss", train__steps_per_epoch=1)
    config = config.override({"train.epochs": 9 if patience else len(losses)})
    seen: list[int] = []

    def note(record: EpochRecord) -> None:
        seen.append(record.epoch)

    assert len(fit(monkeypatch, tmp_path, config, on_epoch=note).records) == len(losses)
    assert seen == list(range(1, len(losses) + 1))


@pytest.mark.parametrize(("monitor", "rates"), [("loss", [1, 1, 1, 0.1, 0.1, 0.01]), ("accuracy", [1, 1, 1, 1, 1, 1])])
def test_plateau_listens_to_the_monitored_score(
    monitor: str, rates: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, *((2 + i, 1, 1.0 + i) for i in range(6)))  # accuracy gains, loss does not
    plateau = {"optim.schedule": "plateau", "optim.plateau_patience": 1, "optim.plateau_factor": 0.1}
    config = settings(plateau, optim__lr=1.0, train__monitor=monitor, train__epochs=6, train__steps_per_epoch=1)
    records = fit(monkeypatch, tmp_path, config).records
    assert [record["lr"] for record in records] == pytest.approx(rates)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_checkpoint_holds_the_average_as_weights(ema: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train__ema=ema, train__epochs=1, train__steps_per_epoch=3, optim__lr=0.02)
    result = fit(monkeypatch, tmp_path, config)
    last = load(result.folder / "last.pth")
    live = last.resume["model"]
    assert bool(live) == bool(ema), "without an average the weights are the live ones, and stand there once"
    assert not any(torch.equal(value, live[name]) for name, value in last.weights.items() if ema and value.ndim)
    assert metrics_of(last.model(), noise_faces()).loss == pytest.approx(result.records[0]["val"]["loss"], rel=1e-6)


# -- how long, from where, on what


def test_epochs_and_steps_make_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps_per_epoch, steps in ((None, [5, 10]), (2, [2, 4])):
        schedule = {"optim.schedule": "cosine", "optim.lr": 1e-2, "optim.final_lr_scale": 0.1}
        config = settings(schedule, train__epochs=2, train__steps_per_epoch=steps_per_epoch)
        result = fit(monkeypatch, tmp_path / str(steps_per_epoch), config)
        assert [record["step"] for record in result.records] == steps
        assert len(result.losses) == steps[-1]
    assert [record["lr"] for record in result.records] == pytest.approx([0.775e-2, 0.1e-2])
    groups = load(result.folder / "last.pth").resume["optimizer"]["param_groups"]
    assert max(group["lr"] for group in groups) == pytest.approx(0.1e-2), "the rate of the last step"


def test_seed_decides_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every source of chance switched on: the same seed, the same run; another seed, another."""
    config = settings(ALL_PARTS, model__dropout=0.3, train__steps_per_epoch=2)
    torch.manual_seed(5)
    first = fit(monkeypatch, tmp_path / "a", config).losses
    torch.manual_seed(6)  # what the caller did with torch's generator does not matter
    assert fit(monkeypatch, tmp_path / "b", config).losses == first
    largest = config.override({"seed": 2**31 - 1, "train.epochs": 1})
    assert fit(monkeypatch, tmp_path / "c", largest).losses != first[:2]


def test_drop_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = noise_faces(train=20)
    images_NHW = faces.images_NHW.copy()
    images_NHW[:6] = images_NHW[faces.part(VAL)[:6]]
    for drop_copies, steps in ((True, 14 // 5), (False, 20 // 5)):
        config = settings(data__drop_copies=drop_copies, train__epochs=1, train__global_batch=5)
        copied = dataclasses.replace(faces, images_NHW=images_NHW)
        assert len(fit(monkeypatch, tmp_path / str(drop_copies), config, copied).losses) == steps


def test_ranks_join_on_the_requested_device() -> None:
    for device in ("auto", "cuda"):
        with mock.patch.object(trainer, "join", side_effect=InterruptedError) as join, pytest.raises(InterruptedError):
            trainer.fit(settings(train__device=device, run__timeout_seconds=7))
        join.assert_called_once_with(device, 7)


def parts(**values: Any) -> tuple[int, int, np.ndarray]:
    """Return the sizes of the training and the validation part, and all pictures."""
    config = settings(**values)
    faces, train_M, val_M = trainer.open_parts(config, LabelSet(), World(), RunLog(config.run, first=True))
    return len(train_M), len(val_M), faces.images_NHW


def test_val_fraction_is_the_share_that_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    unmarked = dataclasses.replace(noise_faces(), usage_N=np.zeros(64, np.int64))
    monkeypatch.setattr(trainer, "open_faces", lambda data, labels: unmarked)
    for fraction, held in ((0.12, 7), (0.45, 28)):  # of nine pictures of each class (ten of the first) one, or four
        assert parts(data__val_fraction=fraction)[:2] == (64 - held, held)


def test_embedded_faces_follow_their_settings(tmp_path: Path) -> None:
    drawn = {"data__embedded_train": 9, "data__embedded_val": 8, "data__cache_dir": str(tmp_path)}
    first, second = (parts(**drawn, data__embedded_seed=seed) for seed in (0, 1))
    assert first[:2] == second[:2] == (9, 8)
    assert first[2].shape[1:] == (SIDE, SIDE)
    assert not np.array_equal(first[2], second[2])
