"""Checkpoints: written whole or not at all, read as tensors and plain values only."""

import os
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fer_dist.errors import UserError
from fer_dist.models import build
from fer_dist.models.base import FaceModel
from fer_dist.spec import ModelSpec

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model and where it came from.

    Attributes:
        spec: architecture, labels and input.
        weights: name -> tensor; what one would deploy (the EMA, where there is one).
        config: the settings of the run, nested plain values.
        record: the metrics of the epoch it was taken from.
        provenance: commit, versions, device, world size, data key.
        resume: everything else that going on needs; empty in best.pth.
    """

    spec: ModelSpec
    weights: dict[str, Tensor]
    config: dict[str, Any]
    record: dict[str, Any]
    provenance: dict[str, Any]
    resume: dict[str, Any] = field(default_factory=dict)

    def model(self) -> FaceModel:
        """The model with its weights, in evaluation mode.

        Raises:
            UserError: the weights are not those of the architecture.
        """
        model = build(self.spec)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's weights do not fit its own architecture {self.spec.arch!r}: {error}",
                "use a checkpoint that fer_dist has written",
            ) from None
        return model.eval()


def write_atomically(path: Path, write: Any) -> None:
    """Write a file through a temporary neighbour: the old file or the new one, never half of it.

    Args:
        write: called with the open binary file.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides a full disk
        if isinstance(cause, OSError):
            raise UserError(
                f"cannot write {path}: {cause.strerror}", "free some space, or choose another folder with --run.dir"
            ) from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically (temporary file, fsync, rename).

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is intact.
    """
    content = {
        "format": FORMAT,
        "spec": checkpoint.spec.to_dict(),
        "weights": {name: value.detach().cpu() for name, value in checkpoint.weights.items()},
        "config": checkpoint.config,
        "record": checkpoint.record,
        "provenance": checkpoint.provenance,
        "resume": checkpoint.resume,
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, without running code from it (`weights_only=True`).

    Its checksums are compared first: torch itself takes a changed byte for what was written.

    Raises:
        UserError: missing, damaged, not a checkpoint of ours, or of a newer format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} differs")
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "name a checkpoint, e.g. runs/NAME/best.pth") from None
    except Exception as error:  # whatever it is that the bytes make zipfile and torch.load stumble over
        raise UserError(
            f"{path} is damaged or not a checkpoint: {str(error).splitlines()[0] if str(error) else 'no content'}",
            "use another checkpoint of the run, e.g. last.pth",
        ) from None
    foreign = UserError(f"{path} is not a checkpoint of fer_dist", "name a best.pth or last.pth of a run folder")
    if not isinstance(content, dict) or "format" not in content:
        raise foreign
    if content["format"] != FORMAT:
        raise UserError(
            f"{path} has format {content['format']}, this version reads {FORMAT}", "install a newer fer-dist"
        )
    try:
        return Checkpoint(
            spec=ModelSpec.from_dict(content["spec"]),
            weights=dict(content["weights"]),
            config=dict(content["config"]),
            record=dict(content["record"]),
            provenance=dict(content["provenance"]),
            resume=dict(content["resume"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise foreign from None
