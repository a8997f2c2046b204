"""A training small enough to step by hand: noise pictures of 16 pixels and a tiny patt_lite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fer_dist.config import Config, RunConfig
from fer_dist.data.faces import TRAIN, VAL, Faces
from fer_dist.data.feed import Batch, TrainFeed
from fer_dist.engine import plots, trainer
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import EpochRecord, RunLog
from fer_dist.engine.state import TrainState, prepare
from fer_dist.engine.step import train_step
from fer_dist.engine.trainer import Result, evaluate
from fer_dist.models import FaceModel, build_model
from fer_dist.spec import LabelSet
from fer_dist.world import World

SIDE = 16
TINY: dict[str, Any] = {
    "run.progress": "none",
    "run.tensorboard": False,
    "data.size": SIDE,
    "model.pretrained": False,
    "model.image_size": 32,
    "model.options": {"width_mult": 0.25, "channels": 16, "cut": 5},
    "optim.schedule": "constant",
    "train.global_batch": 8,
    "train.device": "cpu",
    "train.epochs": 2,
}
VIT: dict[str, Any] = {"model.arch": "vit", "model.options": {"hidden_size": 32, "intermediate_size": 64}}
VIT["model.options"] |= {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 16}
"""Over TINY: a network without batch norm, and without dropout."""
PARTS: dict[str, float] = {"flip": 1.0, "rotation": 20, "translation": 0.2, "scale": 0.3, "crop": 0.3, "blur": 4.0}
PARTS |= {"brightness": 0.2, "noise": 60.0, "contrast": 0.5, "erase": 1.0, "mixup": 1.0, "cutmix": 1.0}
"""Every augmentation, switched on."""
ALL_PARTS = {f"data.augment.{name}": value for name, value in PARTS.items()}
GRADIENT = {"optim.name": "sgd", "optim.momentum": 0, "optim.weight_decay": 0, "optim.lr": 1}
"""SGD that moves the weights by the gradient itself."""


def noise_faces(train: int = 40, val: int = 24) -> Faces:
    """Pictures of noise, brighter the higher the class, the training part first."""
    rng = np.random.default_rng(0)
    labels_N = np.arange(train + val) % 7
    noise_NHW = rng.integers(0, 100, (train + val, SIDE, SIDE)) + 22 * labels_N[:, None, None]
    return Faces(
        images_NHW=noise_NHW.astype(np.uint8),
        labels_N=labels_N,
        usage_N=np.repeat([TRAIN, VAL], [train, val]),
        names=[str(i) for i in range(train + val)],
    )


def settings(*layers: dict[str, Any], **values: Any) -> Config:
    """TINY, then the layers, then keywords that spell dots as two underscores."""
    config = Config()
    for layer in (TINY, *layers, {name.replace("__", "."): value for name, value in values.items()}):
        config = config.override(layer)
    return config


class Rig:
    """What `fit` makes, to be stepped by hand."""

    def __init__(self, config: Config, faces: Faces | None = None) -> None:
        self.config = config
        self.faces = faces or noise_faces()
        self.world = World()
        torch.manual_seed(config.seed)
        model = build_model(config.model, config.data.size, LabelSet())
        self.feed = TrainFeed(config, self.faces, self.faces.part(TRAIN), 7, self.world.device)
        log = RunLog(RunConfig(progress="none"), first=True)
        self.state: TrainState = prepare(config, model, self.feed.steps * config.train.epochs, self.world, log)
        self.state.wrapped.train()

    def batch(self, step: int = 0) -> Batch:
        return next(iter(self.feed.epoch(0, rank=0, size=1, start=step)))

    def step(self) -> float:
        """One training step as `run_epoch` does it; its loss."""
        self.state.schedule.set(self.state.optimizer, self.state.step)
        return train_step(self.config, self.state, self.batch(self.state.step % self.feed.steps), self.world).loss

    def evaluate(self) -> Metrics:
        return evaluate(self.config, self.state, self.faces, self.faces.part(VAL), self.world)

    def layer(self, name: str) -> nn.Module:
        return self.state.model.network.get_submodule(name)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the live weights."""
        return {name: value.detach().clone() for name, value in self.state.model.named_parameters()}


class Watch:
    """Records the shapes and types that pass through a module."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        module.register_forward_hook(self._see)

    @property
    def types(self) -> set[torch.dtype]:
        return {output.dtype for output in self.outputs}

    @property
    def counts(self) -> list[int]:
        return [len(output) for output in self.outputs]

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(inputs[0].detach())
        self.outputs.append(output.detach())


def validation_part(faces: Faces) -> tuple[Tensor, Tensor]:
    """Return the validation pictures, uint8 `[N, 1, S, S]`, and their labels."""
    rows_M = faces.part(VAL)
    return torch.from_numpy(faces.images_NHW[rows_M]).unsqueeze(1), torch.from_numpy(faces.labels_N[rows_M])


def metrics_of(model: FaceModel, faces: Faces, *, flip: bool = False) -> Metrics:
    """Score a model on the validation part with plain torch."""
    images_N1SS, labels_N = validation_part(faces)
    with torch.inference_mode():
        p_NK = model.eval()(images_N1SS).double().softmax(1)
        if flip:
            p_NK = (p_NK + model(images_N1SS.flip(-1)).double().softmax(1)) / 2
    return Metrics.of(p_NK.log(), labels_N)


def fit(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    config: Config,
    faces: Faces | None = None,
    on_epoch: Callable[[EpochRecord], bool | None] | None = None,
) -> Result:
    """`fit` alone on noise, into `folder/run`; no plots, and it does not wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr(plots, "curves", lambda *_: None)
    monkeypatch.setattr(plots, "confusion", lambda *_: None)
    monkeypatch.setattr(trainer, "open_faces", lambda data, labels: faces or noise_faces())
    return trainer.fit(config.override({"run.dir": str(folder), "run.name": "run"}), World(), on_epoch)
