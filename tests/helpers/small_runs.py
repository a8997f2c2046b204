"""Settings, faces and small tools that the workers and their tests share."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from fer_dist.config import Config
from fer_dist.data.faces import VAL, Faces
from fer_dist.engine import plots
from fer_dist.engine.checkpoint import digest, load
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.optim import Schedule
from fer_dist.errors import UserError
from tests.helpers.tiny_models import ALL

CLASSES = 7


def tiny(arch: str, folder: Path, **values: Any) -> Config:
    """A run of 50 steps of a tiny network on the CPU; `optim__lr=0.1` sets `optim.lr`."""
    settings: dict[str, Any] = {
        "run.dir": str(folder),
        "run.tensorboard": False,
        "run.progress": "none",
        "data.embedded_train": 400,
        "data.embedded_val": 60,
        "train.device": "cpu",
        "train.global_batch": 16,
        "train.epochs": 2,
        "optim.lr": 1e-3,  # from 2e-3 on AdamW's first steps amplify float32's last bits beyond 1e-5
        "optim.schedule": "constant",
        **ALL[arch],
    }
    return Config().override(settings | {name.replace("__", "."): value for name, value in values.items()})


AUGMENTED = {
    "data__augment__flip": 0.5,
    "data__augment__rotation": 15,
    "data__augment__translation": 0.1,
    "data__augment__scale": 0.1,
    "data__augment__crop": 0.1,
    "data__augment__brightness": 0.1,
    "data__augment__contrast": 0.2,
    "data__augment__erase": 0.3,
    "data__augment__mixup": 0.4,
    "data__augment__cutmix": 1.0,
    "data__augment__mix_off": 0.0,
}


def broken_run(folder: Path) -> Config:
    """Three epochs with all that has a state: batch norm, EMA, plateau, momentum; named by rank 0."""
    return tiny(
        "patt_lite",
        folder,
        **AUGMENTED,
        data__embedded_train=120,
        model__dropout=0.2,
        optim__schedule="plateau",
        optim__plateau_patience=0,
        train__ema=0.9,
        train__epochs=3,
    )


def stateful(arch: str, folder: Path, **values: Any) -> Config:
    """All that has a state: EMA, plateau, early stopping, accumulated gradients, dropout, mixup that rests at the end.

    Three epochs of eight steps on 128 faces, four steps a save.
    """
    settings = {
        **AUGMENTED,
        "data__embedded_train": 128,
        "data__augment__mix_off": 0.4,
        "model__dropout": 0.2,
        "optim__schedule": "plateau",
        "optim__plateau_patience": 0,
        "optim__clip_norm": 1.0,
        "train__ema": 0.9,
        "train__epochs": 3,
        "train__patience": 9,
        "train__micro_batch": 3,
        "train__save_every_steps": 4,
        "run__name": "run",
        "run__resume": "auto",
    }
    return tiny(arch, folder, **{**settings, **values})


@contextmanager
def no_gain() -> Iterator[None]:
    """No epoch counts as a gain for plateau: whether a tiny network's score rises differs by processor."""
    epoch_end = Schedule.epoch_end
    with mock.patch.object(Schedule, "epoch_end", lambda schedule, gained: epoch_end(schedule, gained=False)):
        yield


def numbered_faces(count: int) -> Faces:
    """Pictures that carry their own number in their first two pixels."""
    images_NHW = np.random.default_rng(count).integers(0, 256, (count, 4, 4), dtype=np.uint8)
    images_NHW[:, 0, 0], images_NHW[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
    return Faces(
        images_NHW=images_NHW,
        labels_N=np.arange(count, dtype=np.int64) * 3 % CLASSES,
        usage_N=np.full(count, VAL, np.int64),
        names=[str(i) for i in range(count)],
    )


def fake_metrics(accuracy: float) -> Metrics:
    """What an evaluation of 1000 samples might have given."""
    right = round(1000 * accuracy)
    confusion_KK = np.zeros((CLASSES, CLASSES), np.int64)
    confusion_KK[0, 0], confusion_KK[0, 1] = right, 1000 - right
    return Metrics(confusion_KK=confusion_KK, loss_sum=1000.0 - right, count=1000)


def message(work: Callable[[], object]) -> str:
    """The UserError that the work ends with; empty if it does not."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


@contextmanager
def no_pictures() -> Iterator[None]:
    """matplotlib would take longer than the training."""
    with mock.patch.object(plots, "curves"), mock.patch.object(plots, "confusion"):
        yield


MEASURED = ("images_per_second", "seconds", "peak_memory_mib")
"""What of a record a clock or a meter says; the rest of two equal runs is equal to the bit."""


def unclocked(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what a clock or a meter says."""
    return {key: value for key, value in record.items() if key not in MEASURED}


def plain_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or a meter says."""
    return [unclocked(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def starts(folder: Path) -> list[dict[str, Any]]:
    """The lines of starts.jsonl."""
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def same(a: Any, b: Any) -> bool:
    """Whether two nested values with tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def everything(path: Path) -> dict[str, Any]:
    """All of a checkpoint that two equal runs have in common: weights, optimizer, counters, records."""
    checkpoint = load(path)
    resume = dict(checkpoint.resume)
    resume["records"] = [unclocked(record) for record in resume.get("records", [])]
    return {"weights": checkpoint.weights, "record": unclocked(checkpoint.record), "resume": resume}


def state_hash(path: Path) -> str:
    """SHA-256 over the sorted tensors of weights and optimizer of a checkpoint."""
    checkpoint = load(path)
    return digest(dict(_tensors({"weights": checkpoint.weights, "resume": checkpoint.resume})))


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}")
