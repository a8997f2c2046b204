"""What a run tells: a JSON line per epoch, TensorBoard events, and a progress line."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fer_dist.config import RunConfig
from fer_dist.engine.checkpoint import write_atomically
from fer_dist.engine.metrics import Metrics
from fer_dist.errors import UserError

HEARTBEAT_S = 20.0
"""Seconds between plain progress lines inside an epoch."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch, the same on every rank.

    Attributes:
        epoch: 1-based.
        step: optimizer steps since the run began.
        lr: learning rate of the head at the last step.
        train_loss: mean over the epoch's steps [nats].
        val: what the validation part gave.
        images_per_second: training throughput over all ranks.
        seconds: duration of training and evaluation [s].
        peak_memory: highest use of memory by any rank, GPU memory on GPUs [MiB].
        skipped: steps of the run so far that a NaN or infinity spoilt.
        overflows: steps of the run so far that float16's loss scale was too high for.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    val: Metrics
    images_per_second: float
    seconds: float
    peak_memory: float
    skipped: int = 0
    overflows: int = 0

    def to_dict(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Plain values for metrics.jsonl."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "train_loss": self.train_loss,
            "val": {
                "loss": self.val.loss,
                "accuracy": self.val.accuracy,
                "macro_f1": self.val.macro_f1,
                "recall": dict(zip(names, self.val.recall, strict=True)),
                "count": self.val.count,
            },
            "skipped": self.skipped,
            "overflows": self.overflows,
            "images_per_second": round(self.images_per_second, 1),
            "seconds": round(self.seconds, 2),
            "peak_memory_mib": round(self.peak_memory, 1),
        }


class RunLog:
    """Prints and writes on rank 0; on the other ranks every call does nothing."""

    def __init__(self, config: RunConfig, *, first: bool) -> None:
        self._speaks = first and config.progress != "none"
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._live = self._speaks and config.progress == "auto" and self._console.is_terminal
        self._first = first
        self._tensorboard = config.tensorboard
        self._events: Any = None
        self._folder: Path | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = self._spoke = time.monotonic()
        self._done_before = 0

    def say(self, line: str) -> None:
        """One line for the user."""
        if self._speaks:
            self._console.print(line)

    def open(self, folder: Path, records: list[dict[str, Any]]) -> None:
        """Begin to write into a run folder, behind the records of its whole epochs (rank 0 only).

        They come from the checkpoint, and metrics.jsonl is written anew from them: whatever a
        killed process left there, it never disagrees with the state that the run goes on from.

        Raises:
            UserError: it cannot be written.
        """
        self._folder = folder
        if not self._first:
            return
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(folder / "metrics.jsonl", lambda file: file.write(lines.encode()))
        if self._tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            step = records[-1]["step"] if records else 0
            with self._writing("tensorboard"):
                self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def epoch_begins(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        """Show the progress of an epoch (1-based), of which `done` steps were done by an earlier start."""
        self._began = self._spoke = time.monotonic()
        self._done_before = done
        if self._live:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rest]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task("", total=steps, completed=done, epoch=epoch, epochs=epochs, rest="")
            self._progress.start()

    def due(self) -> bool:
        """Whether a step's loss will be shown; asked first, since reading it waits for a GPU."""
        pause = 0.5 if self._live else HEARTBEAT_S
        return self._speaks and time.monotonic() - self._spoke > pause

    def step(self, epoch: int, done: int, steps: int, batch: int, loss: float) -> None:
        """Show that `done` steps of the epoch are done."""
        self._spoke = time.monotonic()
        speed = (done - self._done_before) * batch / (self._spoke - self._began)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, rest=f"loss {loss:.3f}  {speed:.0f} images/s")
        else:
            left = (steps - done) * batch / speed
            self.say(f"  epoch {epoch} step {done}/{steps} loss {loss:.3f} {speed:.0f} images/s, {left:.0f} s left")

    def epoch_ends(self, record: EpochRecord, names: tuple[str, ...], *, best: bool, epochs: int) -> dict[str, Any]:
        """Write and print the record of an epoch."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        plain = record.to_dict(names)
        left = (epochs - record.epoch) * record.seconds
        self.say(
            f"epoch {record.epoch:>3}/{epochs}  lr {record.lr:.2e}  train {record.train_loss:.4f}  "
            f"val {record.val.loss:.4f}  accuracy {100 * record.val.accuracy:.2f}%  "
            f"macro-F1 {100 * record.val.macro_f1:.2f}%  {record.images_per_second:.0f} images/s  "
            f"{record.seconds:.1f} s  left {left / 60:.1f} min{'  *' if best else ''}"
        )
        if self._first and self._folder is not None:
            self._append(plain)
        return plain

    def losses(self, step: int, values: list[float | None]) -> None:
        """TensorBoard: the loss of each step of an epoch that began after `step` steps; None: skipped."""
        with self._writing("tensorboard"):
            for i, value in enumerate(values if self._events is not None else []):
                if value is not None:
                    self._events.add_scalar("train/step_loss", value, step + i + 1)

    def close(self) -> None:
        """Stop the live line and flush the events."""
        if self._progress is not None:
            self._progress.stop()
        if self._events is not None:
            try:
                self._events.close()
            except (OSError, RuntimeError) as error:  # the run itself is written by now, or has its own error
                self.say(f"the last TensorBoard events cannot be written: {error}")

    def _append(self, plain: dict[str, Any]) -> None:
        assert self._folder is not None
        with self._writing("metrics.jsonl"), (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(plain) + "\n")
        with self._writing("tensorboard"):
            self._add_events(plain)

    def _add_events(self, plain: dict[str, Any]) -> None:
        if self._events is None:
            return
        # All against steps: what a resumed run writes again is told apart by that number alone.
        for name in ("epoch", "lr", "train_loss", "images_per_second"):
            self._events.add_scalar(f"epoch/{name}", plain[name], plain["step"])
        for name in ("loss", "accuracy", "macro_f1"):
            self._events.add_scalar(f"val/{name}", plain["val"][name], plain["step"])
        for name, value in plain["val"]["recall"].items():
            self._events.add_scalar(f"recall/{name}", value, plain["step"])
        self._events.flush()

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turns an OSError of a file of the run folder into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder}/{name}: {error.strerror or error}",
                "free some space, or choose another folder with --run.dir",
            ) from None
