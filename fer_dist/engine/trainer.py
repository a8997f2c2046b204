"""`fit`: from a Config to a trained model in a run folder, on any number of ranks."""

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fer_dist.config import Config
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import TRAIN, VAL, Faces
from fer_dist.data.feed import Batch, TrainFeed, evaluation_batches
from fer_dist.data.split import hold_out_validation, require_part, training_index
from fer_dist.engine import plots
from fer_dist.engine.checkpoint import Checkpoint, save, write_atomically
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.rundir import open_run, provenance, write_json
from fer_dist.engine.runlog import EpochRecord, RunLog
from fer_dist.engine.score import score
from fer_dist.engine.state import TrainState, prepare, restore, resume_state
from fer_dist.errors import UserError
from fer_dist.models import build_model
from fer_dist.spec import LabelSet
from fer_dist.world import World, join

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OnEpoch = Callable[[EpochRecord], bool | None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `fit` leaves: the run folder, a record per epoch, the best metrics, each step's loss."""

    folder: Path
    records: list[dict[str, Any]]
    best: Metrics
    losses: list[float]


def fit(config: Config, world: World | None = None, on_epoch: OnEpoch | None = None) -> Result:
    """Train, evaluate each epoch, and leave a run folder.

    Args:
        config: all settings; `load_config("patt_lite", {...})` makes one.
        world: the processes to train with; None: this process joins torchrun's, or is alone.
        on_epoch: called on every rank after each epoch; a true answer of any rank stops the run.

    Raises:
        UserError: what the settings or the data make impossible, on every rank alike.
    """
    if world is None:
        with join(config.train.device) as joined:
            return fit(config, joined, on_epoch)
    check_batch(config, world)
    log = RunLog(config.run, first=world.first)
    labels = LabelSet()
    faces, train_M, val_M = open_parts(config, labels, world, log)
    torch.manual_seed(config.seed)
    model = world.node_first(lambda: build_model(config.model, config.data.size, labels))
    feed = TrainFeed(config, faces, train_M, len(labels), world.device)
    if feed.steps == 0:
        raise UserError(
            f"{len(train_M)} training pictures are fewer than train.global_batch {config.train.global_batch}",
            f"--train.global_batch {max(1, len(train_M) // world.size * world.size)} or smaller",
        )
    state = prepare(config, model, feed.steps * config.train.epochs, world, log)
    folder, resumes = open_run(config, world)
    origin = provenance(world, faces.key)
    if resumes:
        restore(state, folder / "last.pth", world, log)
    world.only_first(lambda: introduce(folder, config, origin))
    records = world.from_first(world.together(partial(log.open, folder, keep=state.epoch)))
    log.say(f"run folder {folder}: {describe(config, state, world)}")
    try:
        while goes_on(config, state):
            record, gained = run_epoch(config, state, feed, faces, val_M, world, log)
            written = partial(log.epoch_ends, record, labels.names, best=gained, epochs=config.train.epochs)
            records.append(world.together(written))
            world.only_first(partial(leave, folder, config, state, records, origin, gained))
            if world.agree(bool(on_epoch and on_epoch(record))):
                break
    finally:
        log.close()
    assert state.best is not None
    if state.epoch < config.train.epochs:
        log.say(f"stopped early after epoch {state.epoch}")
    log.say(f"best validation accuracy {100 * state.best.accuracy:.2f}%: {folder / 'best.pth'}")
    return Result(folder=folder, records=records, best=state.best, losses=state.losses)


def run_epoch(
    config: Config,
    state: TrainState,
    feed: TrainFeed,
    faces: Faces,
    val_M: NDArray[np.int64],
    world: World,
    log: RunLog,
) -> tuple[EpochRecord, bool]:
    """Train and evaluate one epoch. Returns its record and whether it is the best so far."""
    began = time.monotonic()
    log.epoch_begins(state.epoch + 1, config.train.epochs, feed.steps)
    first_step, losses = state.step, []
    state.wrapped.train()
    for batch in feed.epoch(state.epoch, rank=world.rank, size=world.size):
        lr = state.schedule.set(state.optimizer, state.step)
        losses.append(train_step(config, state, batch, world))
        state.step += 1
        if log.due():
            log.step(state.epoch + 1, len(losses), feed.steps, config.train.global_batch, losses[-1].item())
    step_losses = (world.sum_(torch.stack(losses)) / world.size).tolist()  # waits for the GPU
    trained = time.monotonic()
    state.epoch += 1
    log.losses(first_step, step_losses)
    state.losses.extend(step_losses)
    train_loss = sum(step_losses) / len(step_losses)
    require_finite(train_loss, "training", state.epoch)
    val = world.from_first(evaluate(config, state, faces, val_M, world))
    require_finite(val.loss, "validation", state.epoch)
    gained = val.better_than(state.best, config.train.monitor)
    state.best = val if gained else state.best
    state.bad_epochs = 0 if gained else state.bad_epochs + 1
    state.schedule.epoch_end(gained)
    record = EpochRecord(
        epoch=state.epoch,
        step=state.step,
        lr=lr,
        train_loss=train_loss,
        val=val,
        images_per_second=len(losses) * config.train.global_batch / (trained - began),
        seconds=time.monotonic() - began,
        peak_memory=max(world.gather(peak_memory(world.device))),
    )
    return world.from_first(record), gained


def goes_on(config: Config, state: TrainState) -> bool:
    """Whether another epoch is due: some are left, and patience is not at its end."""
    return state.epoch < config.train.epochs and not 0 < config.train.patience <= state.bad_epochs


def require_finite(loss: float, part: str, epoch: int) -> None:
    """Raises UserError for a loss that is no number."""
    if not math.isfinite(loss):
        raise UserError(f"the {part} loss is {loss} in epoch {epoch}", "a lower --optim.lr, or --optim.clip_norm 1")


def train_step(config: Config, state: TrainState, batch: Batch, world: World) -> Tensor:
    """One optimizer step on this rank's share; returns its mean loss (a detached scalar).

    The loss is a sum over pictures divided by the rank's share, and DDP averages over ranks: the
    gradient is that of the mean over the global batch, however it is cut into ranks and
    micro-batches. Dropout is drawn from (seed, step, rank).
    """
    torch.manual_seed(((config.seed * 1_000_003 + state.step) * 65_537 + world.rank) % 2**63)
    half = HALF.get(config.train.precision)
    total = torch.zeros((), device=world.device, dtype=torch.float64)
    pieces = batch.split(config.train.micro_batch or len(batch))
    for piece in pieces:
        with world.sync(state.wrapped, last=piece is pieces[-1]):
            with torch.autocast(world.device.type, dtype=half) if half else nullcontext():
                logits_NK = state.wrapped(piece.images_N1SS)
            log_p_NK = (logits_NK.float() if half else logits_NK).log_softmax(1)
            loss = -(piece.targets_NK.to(log_p_NK.dtype) * log_p_NK).sum() / len(batch)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    if config.optim.clip_norm:
        state.scaler.unscale_(state.optimizer)
        trainable = [p for group in state.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trainable, config.optim.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    world.mean_(state.running_stats)
    if state.ema:
        state.ema.update(state.step)
    return total


def evaluate(config: Config, state: TrainState, faces: Faces, rows_M: NDArray[np.int64], world: World) -> Metrics:
    """Score the deployed weights, in their own precision, on a part of the data."""
    batches = evaluation_batches(
        faces, rows_M, batch=config.train.eval_batch, rank=world.rank, size=world.size, device=world.device
    )
    state.deployed.eval()
    return score(state.deployed, batches, world, classes=len(state.model.spec.labels), flip=config.train.flip_tta)


def check_batch(config: Config, world: World) -> None:
    """Raises UserError where the ranks do not divide the global batch."""
    batch, size = config.train.global_batch, world.size
    if batch % size:
        below, above = batch // size * size, -(-batch // size) * size
        fits = " or ".join(str(n) for n in (below, above) if n)
        raise UserError(
            f"train.global_batch {batch} is not divisible by {size} ranks",
            f"--train.global_batch {fits}, or another number of ranks",
        )


def open_parts(
    config: Config, labels: LabelSet, world: World, log: RunLog
) -> tuple[Faces, NDArray[np.int64], NDArray[np.int64]]:
    """The data set with the rows of its training and validation parts; says what it did."""
    if config.data.path is None:
        log.say(
            "data: embedded drawn faces, since no --data was given; yours: --data fer2013.csv | archive.zip | FOLDER"
        )
    else:
        log.say(f"data: {config.data.path}")
    faces = world.node_first(lambda: open_faces(config.data, labels))
    if len(faces.part(TRAIN)) and not len(faces.part(VAL)):
        faces = hold_out_validation(faces, config.data.val_fraction, config.seed)
    for split in (TRAIN, VAL):
        require_part(faces, split)
    train_M, notes = training_index(faces, config.data.drop_copies)
    for note in (*faces.notes, *notes):
        log.say(f"data: {note}")
    return faces, train_M, faces.part(VAL)


def introduce(folder: Path, config: Config, origin: dict[str, Any]) -> None:
    """Write what a run folder says of itself before anything is trained."""
    write_atomically(folder / "config.yaml", lambda file: file.write(config.to_yaml().encode()))
    write_json(folder / "provenance.json", origin)


def leave(
    folder: Path,
    config: Config,
    state: TrainState,
    records: list[dict[str, Any]],
    origin: dict[str, Any],
    gained: bool,
) -> None:
    """Write what an epoch leaves in the run folder (rank 0 only)."""
    spec = state.model.spec
    best = Checkpoint(
        spec=spec,
        weights=state.deployed.state_dict(),
        config=config.to_dict(),
        record=records[-1],
        provenance=origin,
    )
    assert state.best is not None
    if gained:
        save(folder / "best.pth", best)
        write_json(
            folder / "report.json", {"epoch": state.epoch, "split": "val", **state.best.report(spec.labels.names)}
        )
        title = f"{folder.name}: validation, epoch {state.epoch}, {100 * state.best.accuracy:.2f}%"
        plots.confusion(state.best.confusion_KK, spec.labels.names, folder / "confusion.png", title)
    save(folder / "last.pth", Checkpoint(**{**best.__dict__, "resume": resume_state(state)}))
    plots.curves(records, folder / "curves.png", f"{folder.name} ({spec.arch})")


def describe(config: Config, state: TrainState, world: World) -> str:
    """One line on what is trained and how."""
    count = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    size = state.model.spec.input.image_size
    return (
        f"{config.model.arch} at {size} px, {count / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained; "
        f"{world.size} rank{'s' * (world.size > 1)} on {world.device.type}, global batch {config.train.global_batch}, "
        f"{config.train.precision}"
    )


def peak_memory(device: torch.device) -> float:
    """The highest use of memory so far by this process [MiB]: GPU memory, or resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
