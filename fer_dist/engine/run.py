"""`Run`: what stays the same while a run trains, and what it leaves on the disk on its way."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fer_dist.config import Config
from fer_dist.data.faces import Faces
from fer_dist.data.feed import Batch, TrainFeed
from fer_dist.engine import plots
from fer_dist.engine.checkpoint import Checkpoint, save, write_atomically
from fer_dist.engine.history import Newest, save_step, sweep
from fer_dist.engine.rundir import STARTS, write_json
from fer_dist.engine.runlog import EpochRecord, RunLog
from fer_dist.engine.state import TrainState, resume_state
from fer_dist.engine.step import Told
from fer_dist.engine.watch import Watch
from fer_dist.errors import Stopped, UserError
from fer_dist.world import World

NAMED = 8
"""Samples that a message names; all are in nonfinite.json."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same while a run trains.

    Attributes:
        folder: the run folder.
        origin: commit, versions, device, world size, data key.
        data: digest of the data set and its parts.
        val_M: int64, the rows of `faces` to validate on.
    """

    config: Config
    world: World
    log: RunLog
    watch: Watch
    folder: Path
    origin: dict[str, Any]
    data: str
    faces: Faces
    val_M: NDArray[np.int64]
    feed: TrainFeed


def introduce(folder: Path, config: Config, origin: dict[str, Any], state: TrainState, found: Newest) -> None:
    """Write what a run folder says of itself before anything is trained, and of this start (rank 0 only).

    Raises:
        UserError: the folder cannot be written.
    """
    sweep(folder)
    write_atomically(folder / "config.yaml", lambda file: file.write(config.to_yaml().encode()))
    if not (folder / "provenance.json").exists():
        write_json(folder / "provenance.json", origin)
    start = {
        **origin,
        "from": found.path and found.path.name,
        "step": state.step,
        "epochs": state.epoch,
        "left_out": [[path.name, why] for path, why in found.refused],
    }
    path = folder / STARTS
    try:
        with path.open("a") as file:
            file.write(json.dumps(start) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "free some space, or --run.dir FOLDER") from None


def save_state(run: Run, state: TrainState) -> None:
    """Save all that going on from this step needs; every rank comes here, rank 0 writes.

    Raises:
        UserError: on every rank alike; see `checkpoint.save`.
    """
    with run.watch.saving():
        run.world.only_first(lambda: save_step(run.folder, _checkpoint(run, state), state.step, run.config.run.keep))


def leave_epoch(
    run: Run, state: TrainState, record: EpochRecord, gained: bool, stop: Callable[[EpochRecord], object]
) -> None:
    """Write what a whole epoch leaves: its line, the best model with its report, the state, the curves.

    The line is first, since the state holds all lines and replaces what stands in the file. `stop` is
    asked before the state is saved: a run that is killed in between asks it again, and its answer is kept.

    Raises:
        UserError: on every rank alike; the disk is full or the folder cannot be written.
    """
    names, first_step = state.model.spec.labels.names, state.step - state.done

    def tell() -> dict[str, Any]:
        run.log.losses(first_step, state.epoch_losses)
        return run.log.epoch_ends(record, names, best=gained, epochs=run.config.train.epochs)

    state.records.append(run.world.together(tell))
    state.epoch_losses = []
    run.world.only_first(partial(_write_best, run, state) if gained else lambda: None)
    state.stopped = run.world.agree(bool(stop(record)))
    save_state(run, state)
    title = f"{run.folder.name} ({state.model.spec.arch})"
    run.world.only_first(lambda: plots.curves(state.records, run.folder / "curves.png", title))
    run.watch.beat()


def stop_run(run: Run, state: TrainState) -> NoReturn:
    """Save, and end the run because a rank was asked to; every rank comes here.

    Raises:
        Stopped: always.
        UserError: it cannot be saved.
    """
    why = next(filter(None, run.world.gather(run.watch.asked)))
    save_state(run, state)
    base = "" if run.config.run.dir == "runs" else f" --run.dir {run.config.run.dir}"
    raise Stopped(
        f"{why} after step {state.step}, which is saved in {run.folder}\n"
        f"  -> the same line with{base} --run.name {run.folder.name} --run.resume auto goes on"
    )


def note_spoilt(run: Run, state: TrainState, told: Told, batch: Batch) -> None:
    """Say that a step was skipped, and why; every rank comes here.

    Raises:
        UserError: on every rank alike, after more than `train.max_skipped` in a row.
    """
    lr = state.schedule.lr(state.step - 1)
    if told.overflow:
        scale = state.scaler.get_scale()
        run.log.say(f"step {state.step} skipped: gradients over float16's range; the loss scale is now {scale:g}")
        return
    rows = [int(row) for row in batch.rows_N]
    mine = {"loss": told.mine, "samples": rows, "names": [run.faces.names[row] for row in rows]}
    ranks: list[dict[str, Any]] = run.world.gather(mine)
    guilty = [i for i, rank in enumerate(ranks) if not math.isfinite(rank["loss"])] or list(range(len(ranks)))
    what = "the loss" if not math.isfinite(told.loss) else "the gradient"
    samples = [f"{n} ({name})" for i in guilty for n, name in zip(ranks[i]["samples"], ranks[i]["names"], strict=True)]
    more = f", and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
    line = (
        f"step {state.step} had a NaN or infinity in {what} on rank {', '.join(map(str, guilty))}, "
        f"lr {lr:.3g}, samples {', '.join(samples[:NAMED])}{more}"
    )
    if state.skipped_in_row <= run.config.train.max_skipped:
        run.log.say(f"{line}: skipped, {state.skipped_in_row} in a row")
        return
    content = {"step": state.step, "lr": lr, "skipped_in_row": state.skipped_in_row, "ranks": _json_safe(ranks)}
    run.world.only_first(lambda: write_json(run.folder / "nonfinite.json", content))
    raise UserError(
        f"{state.skipped_in_row} steps in a row (train.max_skipped {run.config.train.max_skipped}): {line}",
        f"a lower --optim.lr, or --optim.clip_norm 1; all samples are in {run.folder / 'nonfinite.json'}",
    )


def _checkpoint(run: Run, state: TrainState) -> Checkpoint:
    return Checkpoint(
        spec=state.model.spec,
        weights=state.deployed.state_dict(),
        config=run.config.to_dict(),
        record=state.records[-1] if state.records else {},
        provenance=run.origin,
        resume=resume_state(state, run.data),
    )


def _write_best(run: Run, state: TrainState) -> None:
    assert state.best is not None
    names = state.model.spec.labels.names
    save(run.folder / "best.pth", replace(_checkpoint(run, state), resume={}))
    report = {"epoch": state.epoch, "split": "val", **state.best.report(names)}
    write_json(run.folder / "report.json", report)
    title = f"{run.folder.name}: validation, epoch {state.epoch}, {100 * state.best.accuracy:.2f}%"
    plots.confusion(state.best.confusion_KK, names, run.folder / "confusion.png", title)


def _json_safe(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no NaN: a loss that is none becomes a text."""
    return [{**rank, "loss": rank["loss"] if math.isfinite(rank["loss"]) else str(rank["loss"])} for rank in ranks]
