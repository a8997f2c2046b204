"""What a checkpoint is, for people and for programs."""

import hashlib
from pathlib import Path
from typing import Any

from fer_dist.engine.checkpoint import Checkpoint, load
from fer_dist.engine.form import is_record
from fer_dist.engine.history import step_files
from fer_dist.errors import UserError


def describe(path: Path) -> dict[str, Any]:
    """Everything but the tensors, as plain values; a damaged file is described as far as it can be.

    Returns:
        `valid`, and where that is False `reason`; `path`, `bytes`, `sha256` of a file that can be read;
        of a valid one `spec`, `parameters`, `record`, `provenance`, `resume` and `config`.
    """
    found: dict[str, Any] = {"path": str(path), "valid": False}
    try:
        if not path.is_file() and path.exists():  # a pipe would be waited for
            return found | {"reason": f"{path} is no regular file"}
        with path.open("rb") as file:
            found |= {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        checkpoint = load(path)
    except OSError as error:
        return found | {"reason": f"cannot read {path}: {error.strerror}"}
    except UserError as error:
        return found | {"reason": error.problem}
    if checkpoint.record and not is_record(checkpoint.record):
        return found | {"reason": f"{path} holds metrics of another form"}
    return found | {
        "valid": True,
        "spec": checkpoint.spec.to_dict(),
        "parameters": sum(value.numel() for value in checkpoint.weights.values() if value.is_floating_point()),
        "record": checkpoint.record,
        "provenance": checkpoint.provenance,
        "resume": _position(checkpoint),
        "config": checkpoint.config,
    }


def describe_folder(folder: Path) -> list[dict[str, Any]]:
    """The same of every checkpoint of a run folder, the newest first, best.pth last; last.pth is one of them.

    Raises:
        UserError: there is none.
    """
    files = step_files(folder)
    last, best = folder / "last.pth", folder / "best.pth"
    if last.is_file() and not any(last.samefile(path) for path in files):
        files.insert(0, last)
    files += [best] * best.is_file()
    if not files:
        raise UserError(f"{folder} holds no checkpoint", "name a .pth file, or a run folder such as runs/NAME")
    return [describe(path) for path in files]


def _position(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Where a run goes on; None: weights only."""
    kept = checkpoint.resume
    if not kept:
        return None
    names = ("step", "epoch", "bad_epochs", "skipped", "overflows", "data")
    return {**{name: kept.get(name) for name in names}, "steps_of_next_epoch": len(kept.get("losses", []))}
