"""`TrainState`: everything that changes while training, made once and carried along."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fer_dist.config import Config, TrainConfig
from fer_dist.engine.checkpoint import Checkpoint, load
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.optim import Ema, Schedule, build_optimizer, parameter_groups
from fer_dist.engine.runlog import RunLog
from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel
from fer_dist.world import World

SMALL_SHARE = 16
"""Pictures per rank and step under which batch norm needs those of the other ranks."""


@dataclass
class TrainState:
    """Everything that changes while training; the one mutable type.

    `model` holds the live weights, `wrapped` is the same model as DDP and torch.compile see it.
    """

    model: FaceModel
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: Ema | None
    running_stats: list[Tensor]
    epoch: int = 0
    step: int = 0
    best: Metrics | None = None
    bad_epochs: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def deployed(self) -> FaceModel:
        """The model that is evaluated and saved."""
        return self.ema.model if self.ema else self.model


def prepare(config: Config, model: FaceModel, steps: int, world: World, log: RunLog) -> TrainState:
    """The model on its device, with optimizer, schedule, EMA and DDP around it."""
    train = config.train
    if train.precision == "float64":
        model = model.double()
    model = model.to(world.device)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    norms = any(isinstance(m, _BatchNorm) and any(p.requires_grad for p in m.parameters()) for m in model.modules())
    if norms and (reason := why_sync_batchnorm(train, world)):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        log.say(f"batch norm: statistics over all ranks, since {reason}")
    average = copy.deepcopy(model).eval().requires_grad_(False) if train.ema else None
    model.train()
    moving = [
        buffer
        for module in model.modules()
        if module.training and isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    wrapped = world.wrap(model)
    return TrainState(
        model=model,
        wrapped=torch.compile(wrapped) if train.compile else wrapped,  # type: ignore[arg-type]
        optimizer=build_optimizer(parameter_groups(model, config.optim), config.optim),
        schedule=Schedule(config.optim, steps),
        scaler=torch.amp.GradScaler(world.device.type, enabled=train.precision == "float16"),
        ema=Ema(model, average, train.ema) if average else None,
        running_stats=moving,
    )


def why_sync_batchnorm(train: TrainConfig, world: World) -> str:
    """Why trained batch norms take their statistics over all ranks; empty: they do not.

    Only on GPUs, where torch has it, and where there is more than one rank.
    """
    share = train.global_batch // world.size
    seen = min(share, train.micro_batch or share)
    if world.size == 1 or world.device.type != "cuda" or train.sync_batchnorm == "never":
        return ""
    if train.sync_batchnorm == "always":
        return "train.sync_batchnorm is always"
    return f"a rank sees {seen} pictures at once, fewer than {SMALL_SHARE}" if seen < SMALL_SHARE else ""


def resume_state(state: TrainState) -> dict[str, Any]:
    """What going on at the end of an epoch needs beside the deployed weights; plain values."""
    assert state.best is not None
    return {
        "model": {name: value.detach().cpu() for name, value in state.model.state_dict().items()},
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "schedule": state.schedule.state(),
        "epoch": state.epoch,
        "step": state.step,
        "bad_epochs": state.bad_epochs,
        "best": {
            "confusion": state.best.confusion_KK.tolist(),
            "loss_sum": state.best.loss_sum,
            "count": state.best.count,
        },
    }


def restore(state: TrainState, path: Path, world: World, log: RunLog) -> None:
    """Go on from last.pth, at the end of its epoch; from the beginning where there is none.

    Rank 0 reads it and tells the others, which may not share its disk.

    Raises:
        UserError: the file is damaged, or is of another model or optimizer.
    """
    found: list[Checkpoint] = []
    world.only_first(lambda: found.append(load(path)) if path.exists() else None)
    checkpoint = world.from_first(found[0] if found else None)
    if checkpoint is None:
        log.say(f"resume: {path} does not exist, starting from the beginning")
        return
    kept = checkpoint.resume
    try:
        state.model.load_state_dict(kept["model"])
        if state.ema:
            state.ema.model.load_state_dict(checkpoint.weights)
        state.optimizer.load_state_dict(kept["optimizer"])
        state.scaler.load_state_dict(kept["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} does not fit these settings: {error}", f"--config {path.parent}/config.yaml, or another --run.name"
        ) from None
    state.schedule.load(kept["schedule"])
    state.epoch, state.step, state.bad_epochs = kept["epoch"], kept["step"], kept["bad_epochs"]
    best = kept["best"]
    state.best = Metrics(
        confusion_KK=np.array(best["confusion"], np.int64), loss_sum=best["loss_sum"], count=best["count"]
    )
    log.say(f"resume: {path}, after epoch {state.epoch}")
