"""What a run tells: a JSON line per epoch, TensorBoard events, and a progress line."""

import json
import sys
import time
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
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    val: Metrics
    images_per_second: float
    seconds: float
    peak_memory: float

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

    def say(self, line: str) -> None:
        """One line for the user."""
        if self._speaks:
            self._console.print(line)

    def open(self, folder: Path, *, keep: int) -> list[dict[str, Any]]:
        """Begin to write into a run folder; returns the records of its first `keep` epochs (rank 0 only).

        Raises:
            UserError: it cannot be written, or its metrics.jsonl not be read.
        """
        self._folder = folder
        if not self._first:
            return []
        path = folder / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines()[:keep] if keep and path.exists() else []
            records: list[dict[str, Any]] = [json.loads(line) for line in lines]
            write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
            if self._tensorboard:
                from torch.utils.tensorboard.writer import SummaryWriter

                step = records[-1]["step"] if records else 0
                self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write into {folder}: {error}", "choose another folder with --run.dir") from None
        return records

    def epoch_begins(self, epoch: int, epochs: int, steps: int) -> None:
        """Show the progress of an epoch (1-based)."""
        self._began = self._spoke = time.monotonic()
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
            self._task = self._progress.add_task("", total=steps, epoch=epoch, epochs=epochs, rest="")
            self._progress.start()

    def due(self) -> bool:
        """Whether a step's loss will be shown; asked first, since reading it waits for a GPU."""
        pause = 0.5 if self._live else HEARTBEAT_S
        return self._speaks and time.monotonic() - self._spoke > pause

    def step(self, epoch: int, done: int, steps: int, batch: int, loss: float) -> None:
        """Show that `done` steps of the epoch are done."""
        self._spoke = time.monotonic()
        speed = done * batch / (self._spoke - self._began)
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

    def losses(self, step: int, values: list[float]) -> None:
        """TensorBoard: the loss of each step of an epoch that began after `step` steps."""
        for i, value in enumerate(values if self._events is not None else []):
            self._events.add_scalar("train/step_loss", value, step + i + 1)

    def close(self) -> None:
        """Stop the live line and flush the events."""
        if self._progress is not None:
            self._progress.stop()
        if self._events is not None:
            self._events.close()

    def _append(self, plain: dict[str, Any]) -> None:
        assert self._folder is not None
        try:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._folder}/metrics.jsonl: {error.strerror}", "free some space") from None
        if self._events is not None:
            # All against steps: what a resumed run writes again is told apart by that number alone.
            for name in ("epoch", "lr", "train_loss", "images_per_second"):
                self._events.add_scalar(f"epoch/{name}", plain[name], plain["step"])
            for name in ("loss", "accuracy", "macro_f1"):
                self._events.add_scalar(f"val/{name}", plain["val"][name], plain["step"])
            for name, value in plain["val"]["recall"].items():
                self._events.add_scalar(f"recall/{name}", value, plain["step"])
            self._events.flush()
