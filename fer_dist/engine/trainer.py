"""`fit`: from a Config to a trained model in a run folder, on any number of ranks."""

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fer_dist.config import Config
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import TRAIN, VAL, Faces
from fer_dist.data.feed import TrainFeed, evaluation_batches
from fer_dist.data.split import hold_out_validation, require_part, training_index
from fer_dist.engine.history import Newest
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.run import Run, introduce, leave_epoch, note_spoilt, save_state, stop_run
from fer_dist.engine.rundir import Hold, open_run, provenance
from fer_dist.engine.runlog import EpochRecord, RunLog
from fer_dist.engine.same import data_digest, require_same_data, require_same_settings
from fer_dist.engine.score import score
from fer_dist.engine.start import starting_model
from fer_dist.engine.state import TrainState, exact_kernels, prepare, restore
from fer_dist.engine.step import settle, train_step
from fer_dist.engine.watch import Watch, stop_signals
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from fer_dist.world import World, join

OnEpoch = Callable[[EpochRecord], bool | None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `fit` leaves: the run folder, a record per epoch, the best metrics, each step's loss in this process."""

    folder: Path
    records: list[dict[str, Any]]
    best: Metrics
    losses: list[float]


def fit(config: Config, world: World | None = None, on_epoch: OnEpoch | None = None) -> Result:
    """Train, evaluate each epoch, and leave a run folder.

    Args:
        config: all settings; `load_config("patt_lite", {...})` makes one.
        world: the processes to train with; None: this process joins torchrun's, or is alone.
        on_epoch: called on every rank after each epoch, before its state is saved; a true answer of any rank
            stops the run. A run that is killed right then calls it again for that epoch.

    Raises:
        UserError: what the settings or the data make impossible, on every rank alike.
        Stopped: a signal of `run.stop_signals` came to a rank; the state is saved.
        RankLost: another rank is gone (where `fit` has joined the ranks itself).
    """
    if world is None:
        with join(config.train.device, config.run.timeout_seconds) as joined:
            return fit(config, joined, on_epoch)
    with exact_kernels(config.train, world.device), ExitStack() as held:
        run, state = begin(config, world, held)
        try:
            with run.watch:
                while goes_on(config, state):
                    record, gained = run_epoch(run, state)
                    leave_epoch(run, state, record, gained, on_epoch or (lambda record: False))
        finally:
            run.log.close()
    assert state.best is not None
    if state.epoch < config.train.epochs:
        run.log.say(f"stopped early after epoch {state.epoch}")
    best = run.folder / "best.pth"
    where = best if best.exists() else f"{best} is not there any more"
    run.log.say(f"best validation accuracy {100 * state.best.accuracy:.2f}%: {where}")
    return Result(folder=run.folder, records=state.records, best=state.best, losses=state.losses)


def begin(config: Config, world: World, held: ExitStack) -> tuple[Run, TrainState]:
    """Everything before the first step: data, model, run folder, and the state that it goes on from.

    Args:
        held: is given the lock on the run folder, to be released when the run ends.

    Raises:
        UserError: as `fit`.
    """
    require_same_settings(config, world)
    check_batch(config, world)
    stop_signals(config.run.stop_signals)
    log = RunLog(config.run, first=world.first)
    labels = LabelSet()
    faces, train_M, val_M = open_parts(config, labels, world, log)
    data = data_digest(faces, train_M, val_M, drawn=config.data.path is None)
    require_same_data(data, world)
    torch.manual_seed(config.seed)
    model = world.node_first(lambda: starting_model(config.model, config.data.size, labels, log.say))
    feed = TrainFeed(config, faces, train_M, len(labels), world.device)
    if feed.steps == 0:
        raise UserError(
            f"{len(train_M)} training pictures are fewer than train.global_batch {config.train.global_batch}",
            f"--train.global_batch {max(1, len(train_M) // world.size * world.size)} or smaller",
        )
    state = prepare(config, model, feed.steps * config.train.epochs, world, log)
    settle(config, state, next(feed.epoch(0, rank=world.rank, size=world.size)), world)
    folder, resumes = open_run(config, world)
    world.only_first(lambda: held.callback(Hold(folder).release))
    found = restore(state, folder, config, data, world, log) if resumes else Newest()
    if config.run.resume == "auto" and config.run.name is None and not resumes:
        log.say(f"resume: no run.name was given, so this is a new run; --run.name {folder.name} would go on with it")
    origin = provenance(world, faces.key)
    world.only_first(lambda: introduce(folder, config, origin, state, found))
    world.together(lambda: log.open(folder, state.records))
    log.say(f"run folder {folder}: {describe(config, state, world)}")
    watch = Watch(config.run, world, folder)
    run = Run(
        config=config,
        world=world,
        log=log,
        watch=watch,
        folder=folder,
        origin=origin,
        data=data,
        faces=faces,
        val_M=val_M,
        feed=feed,
    )
    return run, state


def run_epoch(run: Run, state: TrainState) -> tuple[EpochRecord, bool]:
    """Train one epoch, or what is left of it, and evaluate. Returns its record and whether it is the best so far.

    Raises:
        Stopped: a rank was asked to stop; the state is saved.
        UserError: too many steps, or the validation loss, are not finite.
    """
    config, world = run.config, run.world
    began, first = time.monotonic(), state.done
    train_epoch(run, state)
    trained = time.monotonic()
    run.watch.place = f"in the evaluation of epoch {state.epoch + 1}"
    val = world.from_first(evaluate(config, state, run.faces, run.val_M, world, run.watch))
    if world.agree(bool(run.watch.asked)):  # a rank that was has left the rest of its share
        stop_run(run, state)
    losses = [loss for loss in state.epoch_losses if loss is not None]
    train_loss = sum(losses) / len(losses) if losses else math.nan
    require_finite(train_loss, "training", state.epoch + 1)
    require_finite(val.loss, "validation", state.epoch + 1)
    state.epoch += 1
    lr = state.schedule.lr(state.step - 1)
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
        images_per_second=(run.feed.steps - first) * config.train.global_batch / (trained - began),
        seconds=time.monotonic() - began,
        peak_memory=max(world.gather(peak_memory(world.device))),
        skipped=state.skipped,
        overflows=state.overflows,
    )
    return world.from_first(record), gained


def train_epoch(run: Run, state: TrainState) -> None:
    """The steps that an epoch has left.

    Raises:
        Stopped: a rank was asked to stop; the state is saved.
        UserError: too many steps in a row, or all of the epoch, were not finite.
    """
    config, world, watch, steps = run.config, run.world, run.watch, run.feed.steps
    run.log.epoch_begins(state.epoch + 1, config.train.epochs, steps, state.done)
    state.wrapped.train()
    for batch in watch.steps(run.feed.epoch(state.epoch, rank=world.rank, size=world.size, start=state.done)):
        watch.place = f"in epoch {state.epoch + 1}, step {state.done + 1}/{steps}"
        state.schedule.set(state.optimizer, state.step)
        told = train_step(config, state, batch, world, lambda: bool(watch.asked))
        if not told.fine:
            note_spoilt(run, state, told, batch)
        if told.stop:
            stop_run(run, state)
        if config.train.save_every_steps and state.step % config.train.save_every_steps == 0:
            save_state(run, state)
        if run.log.due():
            run.log.step(state.epoch + 1, state.done, steps, config.train.global_batch, told.loss)


def goes_on(config: Config, state: TrainState) -> bool:
    """Whether another epoch is due: some are left, nobody has ended the run, and patience is not at its end."""
    if state.stopped:
        return False
    return state.epoch < config.train.epochs and not 0 < config.train.patience <= state.bad_epochs


def require_finite(loss: float, part: str, epoch: int) -> None:
    """Raises UserError for a loss that is no number."""
    if not math.isfinite(loss):
        raise UserError(f"the {part} loss is {loss} in epoch {epoch}", "a lower --optim.lr, or --optim.clip_norm 1")


def evaluate(
    config: Config,
    state: TrainState,
    faces: Faces,
    rows_M: NDArray[np.int64],
    world: World,
    watch: Watch | None = None,
) -> Metrics:
    """Score the deployed weights, in their own precision, on a part of the data.

    Where `watch` is asked to stop, a rank leaves the rest of its share, and nobody may use the result.
    """
    batches = evaluation_batches(
        faces, rows_M, batch=config.train.eval_batch, rank=world.rank, size=world.size, device=world.device
    )
    if watch is not None:
        batches = watch.over(batches, until_asked=True)
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
