"""Checkpoints: written whole or not at all, sealed by a checksum, read as tensors and plain values only."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fer_dist.engine.form import require_form
from fer_dist.errors import UserError, told_as_ours
from fer_dist.models import build
from fer_dist.models.base import FaceModel
from fer_dist.spec import ModelSpec
from fer_dist.tensors import NotTensors, first_line, read_metadata, read_tensors

FORMAT = 2
SEAL = b"fer_dist sha256 "
"""Begins the comment at the end of the file, which is a .zip to other readers; the digest of all before it follows."""
SEAL_BYTES = len(SEAL) + 64
MOST_METADATA = 2**20
"""Longest text about a model that is read from a .safetensors file [characters]."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model and where it came from.

    Attributes:
        spec: architecture, labels and input.
        weights: name -> tensor; what one would deploy (the EMA, where there is one).
        config: the settings of the run, nested plain values.
        record: the metrics of the newest whole epoch; empty inside of the first.
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
        problem = f"the checkpoint's weights do not fit its own architecture {self.spec.arch!r}"
        with told_as_ours(problem, "use a checkpoint that fer_dist has written"):
            model = build(self.spec)
            model.load_state_dict(self.weights)
        return model.eval()


def write_atomically(path: Path, write: Callable[[BufferedRandom], object]) -> None:
    """Write a file through a temporary neighbour: the old file or the new one, never half of it.

    Args:
        write: called with the open binary file, which can be read back, too.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides a full disk
        if isinstance(cause, OSError):
            raise unwritable(path, cause) from None
        raise
    sync_folder(path.parent)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically (temporary file, checksum, fsync, rename).

    Raises:
        UserError: it holds a NaN or an infinity; the disk is full or the folder cannot be written.
            The old file is intact.
    """
    content = {
        "format": FORMAT,
        "spec": checkpoint.spec.to_dict(),
        "weights": _on_cpu(dict(checkpoint.weights)),
        "config": checkpoint.config,
        "record": checkpoint.record,
        "provenance": checkpoint.provenance,
        "resume": _on_cpu(checkpoint.resume),
    }
    if (name := next(_spoilt(content), None)) is not None:
        raise UserError(
            f"{path.name} is not written: {name} holds a NaN or an infinity; the checkpoints before it are intact",
            "a lower --optim.lr, or --optim.clip_norm 1, and --run.resume auto",
        )

    def write(file: BufferedRandom) -> None:
        torch.save(content, file)
        _seal(file)

    write_atomically(path, write)


def write_safetensors(path: Path, checkpoint: Checkpoint, *, half: bool = False) -> str:
    """Write weights, spec, settings, metrics and provenance as safetensors, which hold no code; `load` reads it.

    Args:
        half: floating weights as float16, half the size; the model that they are read into has its own type.

    Returns:
        The SHA-256 of the file, to be told beside it.

    Raises:
        UserError: a weight is beyond float16's range; the disk is full or the folder cannot be written.
    """
    weights = {name: value.detach().cpu() for name, value in checkpoint.weights.items()}
    if half:
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        if (spoilt := next(_spoilt(weights), None)) is not None:
            raise UserError(f"{path.name} is not written: {spoilt} is beyond float16's range", "write it as float32")
    tensors = {name: value.contiguous().clone() for name, value in weights.items()}
    about = {"format": FORMAT, "weights": digest(tensors), "spec": checkpoint.spec.to_dict()}
    about |= {name: getattr(checkpoint, name) for name in ("config", "record", "provenance")}
    raw = safetensors.torch.save(tensors, {"format": "pt", "fer_dist": json.dumps(about)})
    write_atomically(path, lambda file: file.write(raw))
    return hashlib.sha256(raw).hexdigest()


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, `.pth` or `.safetensors`, onto the CPU, without running code from it.

    Its checksum is compared first: torch itself takes a changed byte for what was written.

    Raises:
        UserError: missing, damaged, not a checkpoint of ours, or of another format.
    """
    path = Path(path)
    try:
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise NotTensors("it is no regular file")
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_sealed(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "name a checkpoint, e.g. runs/NAME/best.pth") from None
    except NotTensors as error:
        raise UserError(f"{path} is damaged or not a checkpoint: {error}", "use another one") from None
    foreign = UserError(f"{path} is not a checkpoint of fer_dist", "name a best.pth or last.pth of a run folder")
    if not isinstance(content, dict) or "format" not in content:
        raise foreign
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise UserError(
            f"{path} has format {str(content['format'])[:20]}, this version reads {FORMAT}",
            "use the version of fer-dist that wrote it",
        )
    try:
        require_form(content)
        return Checkpoint(
            spec=ModelSpec.from_dict(content["spec"]),
            weights=dict(content["weights"]),
            config=dict(content["config"]),
            record=dict(content["record"]),
            provenance=dict(content["provenance"]),
            resume=dict(content["resume"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{foreign.problem}: {first_line(error)}", foreign.fix) from None


def is_checkpoint(path: Path) -> bool:
    """Whether a file says of itself that it is a checkpoint of fer_dist; `load` finds out whether it is true."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return b'"fer_dist":' in file.read(MOST_METADATA)
            file.seek(-SEAL_BYTES, os.SEEK_END)
            return file.read(len(SEAL)) == SEAL
    except OSError:
        return False


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, sorted by name."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha256.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _read_sealed(path: Path) -> Any:
    _check_seal(path)
    return read_tensors(path)


def _read_safetensors(path: Path) -> Any:
    """What `write_safetensors` has written, as `save` would have it; None where it was something else."""
    weights = read_tensors(path)
    try:
        content = json.loads(read_metadata(path).get("fer_dist", "")[:MOST_METADATA])
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("weights") != digest(weights):
        raise NotTensors("the checksum of its weights differs")
    return {**content, "weights": weights, "resume": {}}


def _seal(file: BufferedRandom) -> None:
    """Append the checksum as the comment of the .zip that torch has written."""
    file.seek(-2, os.SEEK_END)  # where the length of the comment stands
    file.write(SEAL_BYTES.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.write(SEAL + digest.encode())  # file_digest has come to the end


def _check_seal(path: Path) -> None:
    """Raises UserError where the checksum at the end is not that of the bytes before it."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - SEAL_BYTES
        while left > 0 and (piece := file.read(min(left, 2**20))):
            sha256.update(piece)
            left -= len(piece)
        seal = file.read(SEAL_BYTES + 1)
    if seal == SEAL + sha256.hexdigest().encode():
        return
    reason = (
        "its checksum differs: bytes have changed"
        if len(seal) == SEAL_BYTES and seal.startswith(SEAL)
        else "there is no checksum at its end: it was cut off, or something else wrote it"
    )
    raise UserError(f"{path} is damaged or not a checkpoint: {reason}", "use another checkpoint of the run")


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that.

    Raises:
        UserError: the disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems, and FUSE
            raise unwritable(folder, error) from None


def unwritable(path: Path, cause: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {cause.strerror}; what was saved before is intact",
        "free some space, or choose another folder with --run.dir",
    )


def _on_cpu(tree: Any) -> Any:
    """Nested values with their tensors on the CPU."""
    if isinstance(tree, Mapping):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return tree.detach().cpu() if isinstance(tree, Tensor) else tree


def _spoilt(tree: Any, name: str = "") -> Iterator[str]:
    """Names of the floating tensors below `tree` that hold a NaN or an infinity."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _spoilt(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, Tensor) and tree.is_floating_point() and not bool(torch.isfinite(tree).all()):
        yield name
