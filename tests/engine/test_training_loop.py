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
from fer_dist.engine.runlog import RunLog
from fer_dist.spec import LabelSet
from fer_dist.world import World
from tests.helpers.training import ALL_PARTS, SIDE, fit, noise_faces, settings


@pytest.mark.parametrize(
    ("monitor", "best", "rates"),
    [
        ("loss", 3, [1, 1, 1, 1, 1, 0.1]),
        ("accuracy", 2, [1, 1, 1, 1, 0.1]),
        ("macro_f1", 4, [1, 1, 1, 0.1, 0.1, 0.1, 0.01]),
    ],
)
def test_monitor_decides_on_best_epoch_plateau_and_early_stopping(
    monitor: str, best: int, rates: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An equal score is not a gain; patience and plateau count anew after a gain."""
    scores = [(5, 1, 2.0), (9, 0, 1.5), (5, 1, 1.0), (7, 2, 1.9), (5, 1, 1.2), (5, 1, 1.0), (5, 1, 1.3)]
    script = deque(  # correct pictures of the first class (of 9), of the second (of 3), and the loss
        Metrics(confusion_KK=np.pad([[a, 9 - a], [3 - b, b]], (0, 5)).astype(np.int64), loss_sum=12 * loss, count=12)
        for a, b, loss in scores
    )
    monkeypatch.setattr(trainer, "evaluate", lambda *_: script.popleft())
    plateau = {"optim.schedule": "plateau", "optim.plateau_patience": 1, "optim.plateau_factor": 0.1, "optim.lr": 1.0}
    train = {"train.epochs": 7, "train.patience": 3, "train.steps_per_epoch": 1, "train.monitor": monitor}
    result = fit(monkeypatch, tmp_path, settings(plateau, train))
    assert [record["lr"] for record in result.records] == pytest.approx(rates)
    assert load(result.folder / "best.pth").record["epoch"] == best
    last = load(result.folder / "last.pth")
    assert last.record["epoch"] == len(rates)
    assert last.resume["model"] == {}, "without an EMA the weights are the live ones, and are stored once"
    report = json.loads((result.folder / "report.json").read_text())
    assert (report["epoch"], report["loss"]) == (best, pytest.approx(scores[best - 1][2]))
    assert result.best.loss == report["loss"]
    assert not (result.folder / "tensorboard").exists(), "it is switched off"


def test_epochs_and_steps_make_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps_per_epoch, steps in ((None, [5, 10]), (2, [2, 4])):
        schedule = {"optim.schedule": "cosine", "optim.final_lr_scale": 0.1, "optim.backbone_lr_scale": 0.5}
        config = settings(schedule, optim__lr=1e-2, train__epochs=2, train__steps_per_epoch=steps_per_epoch)
        result = fit(monkeypatch, tmp_path / str(steps_per_epoch), config)
        assert [record["step"] for record in result.records] == steps
        assert len(result.losses) == steps[-1]
    assert [record["lr"] for record in result.records] == pytest.approx([0.775e-2, 0.1e-2])
    groups = load(result.folder / "last.pth").resume["optimizer"]["param_groups"]
    rates = sorted({group["lr"] for group in groups})
    assert rates == pytest.approx([0.05e-2, 0.1e-2]), "backbone and head in the last step"


def test_seed_decides_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every source of chance switched on: the same seed, the same run; another seed, another."""
    config = settings(ALL_PARTS, model__dropout=0.3, train__steps_per_epoch=2)
    torch.manual_seed(5)
    first = fit(monkeypatch, tmp_path / "a", config).losses
    torch.manual_seed(6)  # the state of torch's generator before `fit` does not matter
    assert fit(monkeypatch, tmp_path / "b", config).losses == first
    largest = config.override({"seed": 2**31 - 1, "train.epochs": 1})
    assert fit(monkeypatch, tmp_path / "c", largest).losses != first[:2]


def test_ranks_join_on_the_requested_device() -> None:
    with mock.patch.object(trainer, "join", side_effect=InterruptedError) as join, pytest.raises(InterruptedError):
        trainer.fit(settings(train__device="cuda", run__timeout_seconds=7))
    join.assert_called_once_with("cuda", 7)


# -- the data


def parts(**values: Any) -> tuple[int, int, np.ndarray]:
    """Return the sizes of the training and the validation part, and all pictures."""
    config = settings(**values)
    faces, train_M, val_M = trainer.open_parts(config, LabelSet(), World(), RunLog(config.run, first=True))
    return len(train_M), len(val_M), faces.images_NHW


def test_settings_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held out where no validation part is marked, and what is dropped since it is a copy."""
    faces = noise_faces()
    unmarked = dataclasses.replace(faces, usage_N=np.zeros(64, np.int64))
    monkeypatch.setattr(trainer, "open_faces", lambda data, labels: unmarked)
    for fraction, held in ((0.12, 7), (0.45, 28)):  # of nine pictures of each class (ten of the first) one, or four
        assert parts(data__val_fraction=fraction)[:2] == (64 - held, held)
    faces.images_NHW[:6] = faces.images_NHW[faces.part(VAL)[:6]]
    monkeypatch.setattr(trainer, "open_faces", lambda data, labels: faces)
    for drop_copies, kept in ((True, 34), (False, 40)):
        assert parts(data__drop_copies=drop_copies)[:2] == (kept, 24)


def test_embedded_faces_follow_their_settings(tmp_path: Path) -> None:
    drawn = {"data__embedded_train": 9, "data__embedded_val": 8, "data__cache_dir": str(tmp_path)}
    first, second = (parts(**drawn, data__embedded_seed=seed) for seed in (0, 1))
    assert first[:2] == second[:2] == (9, 8)
    assert first[2].shape[1:] == (SIDE, SIDE)
    assert not np.array_equal(first[2], second[2])
