"""Where artifacts are made: a folder beside the source, out of which only what is whole and judged moves."""

import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from export.gate import ParityReport, show
from fer_dist.console import say
from fer_dist.engine.checkpoint import sync_folder
from fer_dist.errors import UserError
from fer_dist.serve.artifact import ExportedModel, sidecar, sidecar_json

REJECTED = ".rejected"
WORKSHOP = ".export-"
DEAD_AFTER_S = 24 * 3600.0
"""No export takes a day."""


@contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A folder in `folder`, on the same disk, which goes whatever happens, SIGTERM included.

    Raises:
        UserError: it cannot be made.
    """
    _remove_dead(folder)
    try:
        shop = tempfile.TemporaryDirectory(dir=folder, prefix=WORKSHOP)
    except OSError as error:
        raise unwritable(folder, error) from None
    with shop, _terminable():
        yield Path(shop.name)


def _remove_dead(folder: Path) -> None:
    """Remove what exports left behind that were killed more than a day ago."""
    for path in folder.glob(f"{WORKSHOP}*"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - DEAD_AFTER_S:
                shutil.rmtree(path)


def put(path: Path, raw: bytes) -> None:
    """Write a file of the workshop, down to the disk.

    Raises:
        UserError: the disk is full.
    """
    try:
        with path.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path.parent.parent, error) from None


def deliver(made: Path, target: Path, exported: ExportedModel, report: ParityReport) -> Path:
    """Give a judged file of the workshop its name, and its JSON file; `target.rejected` where it did not pass.

    Args:
        made: in the workshop.
        target: its name if it passes. What was there before stays where it does not.

    Returns:
        The name that it has.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    refused = target.with_name(f"{target.name}{REJECTED}")
    kept = target if report.passed else refused
    put(sidecar(made), sidecar_json(replace(exported, parity=report.to_dict())))
    before = made.with_name("before")
    try:
        for path in (kept, sidecar(kept)):
            if path.exists() and not path.is_file():
                raise OSError(errno.EEXIST, f"{path.name} is there, and is no file")
        if kept.exists():
            _keep(kept, before)
        try:
            made.replace(kept)
            sidecar(made).replace(sidecar(kept))
        except BaseException:  # a signal as well; alone it would not say what it is
            before.replace(kept) if before.exists() else kept.unlink(missing_ok=True)
            raise
        before.unlink(missing_ok=True)
        if report.passed:
            for old in (refused, sidecar(refused)):
                old.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(target.parent, error) from None
    sync_folder(target.parent)
    say(show(report))
    say(f"wrote {kept} ({exported.bytes / 1e6:.2f} MB) and {sidecar(kept).name}")
    if not report.passed and target.exists():
        say(f"{target}, which was there before, is another one and stays")
    return kept


def _keep(path: Path, before: Path) -> None:
    """Give a file a second name; a copy where the file system has no hard links."""
    before.unlink(missing_ok=True)
    try:
        os.link(path, before)
    except OSError:
        shutil.copy2(path, before)


def unwritable(folder: Path, cause: OSError) -> UserError:
    """The error for a folder that takes no artifact."""
    return UserError(
        f"cannot write into {folder}: {cause.strerror}; there is nothing half-written",
        "free some space, or copy the source into another folder",
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds, as Ctrl-C does, instead of ending the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        with suppress(TypeError):  # None: it was not Python's
            signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
