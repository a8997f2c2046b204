"""`TrainState`: everything that changes while training, made once and carried along."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fer_dist.config import Config, TrainConfig
from fer_dist.engine.history import Newest, newest
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.optim import Ema, Schedule, build_optimizer, parameter_groups
from fer_dist.engine.runlog import RunLog
from fer_dist.engine.same import require_same_run
from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel
from fer_dist.world import World

SMALL_SHARE = 16
"""Pictures per rank and step under which batch norm needs those of the other ranks."""


@dataclass
class TrainState:
    """Everything that changes while training; the one mutable type.

    Attributes:
        model: the live weights; `wrapped` is the same model as DDP and torch.compile see it.
        running_stats: means and variances of the batch norms that train.
        epoch: whole epochs done; `step`: optimizer steps done, the skipped ones among them.
        bad_epochs: epochs since the best one.
        skipped: steps that a NaN or infinity spoilt, and `skipped_in_row` the newest of them.
        overflows: steps that float16's loss scale was too high for.
        epoch_losses: the mean loss of each step of the epoch that is not whole yet; None: skipped.
        stopped: `on_epoch` has ended the run.
        records: of all whole epochs, as in metrics.jsonl.
        losses: of the steps of this process that were not skipped.
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
    skipped: int = 0
    skipped_in_row: int = 0
    overflows: int = 0
    stopped: bool = False
    epoch_losses: list[float | None] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Steps done of the epoch that is not whole yet."""
        return len(self.epoch_losses)

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
    model.train()
    moving = [
        buffer
        for module in model.modules()
        if module.training and isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    wrapped = world.wrap(model)  # every rank has rank 0's weights now
    average = copy.deepcopy(model).eval().requires_grad_(False) if train.ema else None
    return TrainState(
        model=model,
        wrapped=torch.compile(wrapped) if train.compile else wrapped,  # type: ignore[arg-type]
        optimizer=build_optimizer(parameter_groups(model, config.optim), config.optim),
        schedule=Schedule(config.optim, steps),
        scaler=torch.amp.GradScaler(world.device.type, enabled=train.precision == "float16"),
        ema=Ema(model, average, train.ema) if average else None,
        running_stats=moving,
    )


@contextmanager
def exact_kernels(train: TrainConfig, device: torch.device) -> Iterator[None]:
    """On a GPU, only kernels that give the same bits each time; afterwards as before.

    Where torch has no such kernel, it warns and takes the other.
    """
    if not train.deterministic or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


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


def resume_state(state: TrainState, data: str) -> dict[str, Any]:
    """All that going on needs beside the deployed weights, at any step; plain values and tensors.

    Args:
        data: digest of the data set and its parts.
    """
    best = state.best
    return {
        # Without an EMA the deployed weights are the live ones, and stand in the checkpoint once.
        "model": dict(state.model.state_dict()) if state.ema else {},
        "optimizer": {"name": type(state.optimizer).__name__, **state.optimizer.state_dict()},
        "scaler": state.scaler.state_dict(),
        "schedule": state.schedule.state(),
        "epoch": state.epoch,
        "step": state.step,
        "losses": state.epoch_losses,
        "records": state.records,
        "bad_epochs": state.bad_epochs,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        "overflows": state.overflows,
        "stopped": state.stopped,
        "best": None
        if best is None
        else {"confusion": best.confusion_KK.tolist(), "loss_sum": best.loss_sum, "count": best.count},
        "data": data,
    }


def restore(state: TrainState, folder: Path, config: Config, data: str, world: World, log: RunLog) -> Newest:
    """Go on from the newest valid checkpoint of a run folder; from the beginning where there is none.

    Rank 0 reads it and tells the others, which may not share its disk.

    Args:
        data: digest of the data set and its parts.

    Returns:
        What was found, without the tensors.

    Raises:
        UserError: there are checkpoints and all are damaged; the newest is of another model, optimizer,
            data set or order of samples.
    """
    files: list[Newest] = []
    world.only_first(lambda: files.append(newest(folder)))
    found = world.from_first(replace(files[0], checkpoint=None) if files else Newest())
    for _, why in found.refused:
        log.say(f"resume: left out, {why}")
    if found.path is None:
        world.only_first(lambda: _require_begun(folder))
        log.say(f"resume: {folder} has no checkpoint yet, starting from the beginning")
        return found
    read = files[0].checkpoint if files else None
    weights, then, kept = world.share((read.weights, read.config, read.resume) if read else ({}, {}, {}))
    changed = require_same_run(then, config, str(kept.get("data")), data, str(found.path))
    try:
        _load(state, weights, kept)
        # Who asks for more epochs than then wants them.
        state.stopped = kept["stopped"] and config.train.epochs <= then["train"]["epochs"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{found.path} does not fit these settings: {error}",
            f"--config {folder}/config.yaml, or another --run.name",
        ) from None
    if changed:
        log.say(f"resume: settings have changed: {'; '.join(changed)}")
    log.say(f"resume: {found.path}, after step {state.step}: {state.epoch} epochs, {state.done} steps of the next")
    return found


def _require_begun(folder: Path) -> None:
    """Raises UserError where a run got further than its first epoch and its checkpoints were removed."""
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and len(metrics.read_bytes().splitlines()) > 1:
        raise UserError(
            f"{folder} has the metrics of several epochs and no checkpoint to go on from: they would be lost",
            "put a checkpoint back, or begin again with another --run.name",
        )


def _load(state: TrainState, weights: dict[str, Tensor], kept: dict[str, Any]) -> None:
    """Put a checkpoint into the state; hyper-parameters of the optimizer stay those of the settings, but for `lr`.

    That is set before each step. An epoch may have no step left, and then the old one is what the next save holds.
    """
    if kept["optimizer"]["name"] != (name := type(state.optimizer).__name__):
        raise ValueError(f"its optimizer is {kept['optimizer']['name']}, here it is {name}")
    groups = state.optimizer.state_dict()["param_groups"]
    sizes, own = ([len(group["params"]) for group in g] for g in (kept["optimizer"]["param_groups"], groups))
    if sizes != own:
        raise ValueError(f"its optimizer moves groups of {sizes} parameters, here they are {own}")
    if bool(kept["model"]) != bool(state.ema):
        raise ValueError(f"it was made {'with' if kept['model'] else 'without'} train.ema")
    state.model.load_state_dict(kept["model"] or weights)
    if state.ema:
        state.ema.model.load_state_dict(weights)
    for group, then in zip(groups, kept["optimizer"]["param_groups"], strict=True):
        group["lr"] = then["lr"]
    state.optimizer.load_state_dict({"state": kept["optimizer"]["state"], "param_groups": groups})
    state.scaler.load_state_dict(kept["scaler"])
    state.schedule.load(kept["schedule"])
    state.epoch, state.step, state.bad_epochs = kept["epoch"], kept["step"], kept["bad_epochs"]
    state.epoch_losses, state.records = list(kept["losses"]), list(kept["records"])
    state.skipped, state.skipped_in_row, state.overflows = kept["skipped"], kept["skipped_in_row"], kept["overflows"]
    if best := kept["best"]:
        state.best = Metrics(
            confusion_KK=np.array(best["confusion"], np.int64), loss_sum=best["loss_sum"], count=best["count"]
        )
