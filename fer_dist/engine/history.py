"""The checkpoints of a run folder that one can go on from: how many stay, and which is the newest valid one."""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fer_dist.engine.checkpoint import Checkpoint, load, save, sync_folder, unwritable, write_atomically
from fer_dist.errors import UserError

STEP_NAME = re.compile(r"step-(\d{8,})\.pth")


def save_step(folder: Path, checkpoint: Checkpoint, step: int, keep: int) -> Path:
    """Write `checkpoints/step-<step>.pth` of a run folder, call it `last.pth`, too, and leave the newest `keep`.

    Nothing is removed before the new one is whole on the disk.

    Raises:
        UserError: see `save`.
    """
    home = folder / "checkpoints"
    path = home / f"step-{step:08d}.pth"
    try:
        home.mkdir(exist_ok=True)
        save(path, checkpoint)
        _also_called(path, folder / "last.pth")
        files = step_files(folder)
        newer = [other for other in files if _step_of(other) > step]  # damaged, or the run had gone on from them
        for other in newer + files[len(newer) + keep :]:
            other.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
    return path


def step_files(folder: Path) -> list[Path]:
    """The checkpoints of a run folder that one can go on from, the newest first."""
    found = (path for path in (folder / "checkpoints").glob("step-*.pth") if STEP_NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_file()), key=_step_of, reverse=True)


@dataclass(frozen=True, kw_only=True)
class Newest:
    """The checkpoint to go on from, if there is one, and the newer ones that are damaged, with the reason."""

    checkpoint: Checkpoint | None = None
    path: Path | None = None
    refused: tuple[tuple[Path, str], ...] = ()


def newest(folder: Path) -> Newest:
    """The newest valid checkpoint of a run folder, older ones where newer ones are damaged.

    Raises:
        UserError: there are some, and none is valid.
    """
    files = step_files(folder)
    last = folder / "last.pth"
    refused: list[tuple[Path, str]] = []
    found: list[tuple[int, Path, Checkpoint]] = []
    # last.pth is a second name of one of them, unless somebody has removed that or copied the folder.
    alone = [last] if last.exists() and not any(last.samefile(path) for path in files) else []
    for candidates in (files, alone):
        for path in candidates:
            try:
                checkpoint = load(path)
                found.append((int(checkpoint.resume["step"]), path, checkpoint))
                break
            except UserError as error:
                refused.append((path, error.problem))
            except (KeyError, TypeError, ValueError):
                refused.append((path, f"{path} holds weights only, nothing to go on from"))
    if refused and not found:
        raise UserError(
            f"none of the {len(refused)} checkpoints of {folder} can be read; {refused[0][1]}",
            "put back a copy of one, or begin again with another --run.name",
        )
    if not found:
        return Newest()
    _, path, checkpoint = max(found, key=lambda item: item[0])
    return Newest(checkpoint=checkpoint, path=path, refused=tuple(refused))


def sweep(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for path in [*folder.glob(".*.tmp"), *(folder / "checkpoints").glob(".*.tmp")]:
        with suppress(OSError):
            path.unlink()


def _also_called(path: Path, name: Path) -> None:
    """Give a file a second name; a copy where the file system has no hard links."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        with path.open("rb") as source:
            return write_atomically(name, lambda file: shutil.copyfileobj(source, file))
    temporary.replace(name)
    return sync_folder(name.parent)


def _step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match
    return int(match[1])
