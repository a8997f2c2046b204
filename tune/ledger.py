"""What a search knows of its trials: one folder, which explains itself without Ray.

    tune_runs/<name>/search.yaml     what was asked for
    tune_runs/<name>/trials.jsonl    a line when a trial is given its values, and one when it has ended
    tune_runs/<name>/trials/<id>/    the run folder of a trial, as the trainer leaves it

A line is on the disk before the trial starts, and only then; so after a kill at any moment no trial
is lost, and none is there twice. Ray's own state of an experiment is not kept: it lags behind.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fer_dist.errors import UserError

Status = Literal["running", "finished", "stopped", "failed"]
"""running: it has no end yet; stopped: by the scheduler, or by early stopping of its own; failed: see its reason."""

TRIALS, RUNS = "trials.jsonl", "trials"


def best_of(monitor: str) -> Callable[..., Any]:
    """What picks the better ones of scores of `train.monitor`: `min` or `max`."""
    return min if monitor == "loss" else max


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial.

    Attributes:
        id: three digits or more, in the order of their start; also the name of its run folder.
        values: dotted name of a setting -> the value that it was given.
        records: a line of metrics.jsonl for each of its epochs.
        reason: why it failed or was stopped; empty otherwise.
        seconds: from its start to its end, in the start of the search that has ended it; 0 while it runs [s].
    """

    id: str
    folder: Path
    values: dict[str, Any]
    status: Status = "running"
    reason: str = ""
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)

    def best(self, monitor: str) -> dict[str, Any] | None:
        """The record of its best epoch by `train.monitor`, the first of equals; None: it has finished no epoch."""
        found: dict[str, Any] | None
        found = best_of(monitor)(self.records, key=lambda record: record["val"][monitor], default=None)
        return found


def ranked(trials: list[Trial], monitor: str) -> list[Trial]:
    """The trials with an epoch, the best first; of equals, the one that was given first."""
    scored = [(trial, best) for trial in trials if (best := trial.best(monitor)) is not None]
    # Equals keep their order in reverse, too.
    return [trial for trial, best in sorted(scored, key=lambda one: one[1]["val"][monitor], reverse=monitor != "loss")]


class Ledger:
    """The trials of one search; one process writes at a time, see `hold`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / TRIALS

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes from running the same search.

        Raises:
            UserError: one does.
        """
        with self._opened() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process runs the search in {self.folder}", "wait for it, or end it") from None
            except OSError:
                pass  # this file system has no locks
            yield

    def give(self, values: dict[str, Any]) -> str:
        """Note a new trial with its values, on the disk; returns its id."""
        used = [*self._entries(), *self.runs()]  # a run folder is never given to another trial
        name = f"{max(map(int, used), default=0) + 1:03d}"
        self._append({"trial": name, "values": values})
        return name

    def end(self, name: str, status: Status, reason: str, seconds: float) -> None:
        """Note how a trial has ended; a second end replaces the first."""
        self._append({"trial": name, "status": status, "reason": reason, "seconds": round(seconds, 2)})

    def runs(self) -> list[str]:
        """The run folders that are there, whether the ledger knows of them or not."""
        return sorted(path.name for path in (self.folder / RUNS).glob("*") if path.name.isdecimal())

    def trials(self) -> list[Trial]:
        """All trials in the order of their start, with what they have left so far."""
        found = []
        for name, entry in self._entries().items():
            folder = self.folder / RUNS / name
            found.append(Trial(id=name, folder=folder, records=records_in(folder), **entry))
        return found

    def _entries(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for line in _lines(self.path):
            name = str(line.pop("trial", ""))
            if not name.isdecimal():
                continue
            if "values" in line and isinstance(line["values"], dict):
                found[name] = {"values": line["values"]}
            elif name in found and line.get("status") in get_args(Status):
                found[name].update(
                    status=line["status"], reason=str(line.get("reason") or ""), seconds=float(line.get("seconds") or 0)
                )
        return found

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}", "free some space, or --dir FOLDER") from None
        try:
            yield file
        finally:
            os.close(file)

    def _append(self, line: dict[str, Any]) -> None:
        """One line, whole, after whatever a killed process has left of one."""
        with self._opened() as file:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            text = ("\n" * torn + json.dumps(line) + "\n").encode()
            try:
                whole = os.write(file, text) == len(text)  # a disk that is nearly full takes a part, without an error
                os.fsync(file)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}", "free some space") from None
            if not whole:
                raise UserError(f"cannot write {self.path}: the disk is full", "free some space")


def records_in(run: Path) -> list[dict[str, Any]]:
    """The epochs that a run folder tells of, the newest line of each."""
    lines = (line for line in _lines(run / "metrics.jsonl") if "epoch" in line and isinstance(line.get("val"), dict))
    return list({line["epoch"]: line for line in lines}.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one in each line; torn lines are left out, a missing file has none."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "look at its permissions") from None
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
