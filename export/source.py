"""What is exported: a checkpoint, or an ONNX file of ours."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from fer_dist.console import say
from fer_dist.engine.checkpoint import Checkpoint, load
from fer_dist.errors import UserError
from fer_dist.serve.artifact import ExportedModel, Precision, file_sha256, sidecar
from fer_dist.serve.dataset import CHECKPOINTS, data_settings, read_beside
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Source:
    """What everything is made from.

    Attributes:
        checkpoint: None where an ONNX file was given.
        graph: None where a checkpoint was given.
        reference: the file that artifacts are compared with.
        settings: of the data set that the model was judged on (`data_settings`); empty: unknown.
        made, calibration: what the precision of an ONNX file took, as its JSON file says.
    """

    path: Path
    spec: ModelSpec
    precision: Precision
    checkpoint_sha256: str
    reference: Path
    settings: dict[str, Any]
    checkpoint: Checkpoint | None = None
    graph: onnx.ModelProto | None = None
    made: tuple[str, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)

    def name(self, precision: str, suffix: str) -> Path:
        """`best.onnx`, `best.fp16.engine`, ..., beside the source."""
        stem = self.path.stem.removesuffix(f".{self.precision}")
        return self.path.with_name(f"{stem}{'' if precision == 'fp32' else f'.{precision}'}{suffix}")


def open_source(path: Path) -> Source:
    """A checkpoint, or an ONNX file of ours.

    Raises:
        UserError: it is neither, or is damaged.
    """
    if path.suffix in CHECKPOINTS:
        checkpoint = load(path)
        return Source(
            path=path,
            spec=checkpoint.spec,
            precision="fp32",
            checkpoint_sha256=file_sha256(path),
            reference=path,
            settings=data_settings(checkpoint.config),
            checkpoint=checkpoint,
        )
    if path.suffix != ".onnx":
        raise UserError(
            f"{path} is neither a checkpoint ({', '.join(CHECKPOINTS)}) nor an .onnx of fer_dist",
            "name a checkpoint such as runs/NAME/best.pth",
        )
    opened = read_onnx(path)
    beside = read_beside(path)
    return Source(
        path=path,
        spec=opened.spec,
        precision=opened.precision,
        checkpoint_sha256=opened.checkpoint_sha256,
        reference=_reference_of(path, opened.checkpoint_sha256, beside),
        settings=beside.data if beside else {},
        graph=opened.model,
        made=beside.made if beside else (),
        calibration=beside.calibration if beside else {},
    )


def _reference_of(path: Path, checkpoint_sha256: str, beside: ExportedModel | None) -> Path:
    """The checkpoint that an ONNX file came from, or the graph before it, where one lies beside it; else itself.

    Raises:
        UserError: there is neither, and no JSON file that says that it had passed the gate.
    """
    for suffix in CHECKPOINTS:
        for other in sorted(path.parent.glob(f"*{suffix}")):
            if path.name.startswith(f"{other.stem}.") and file_sha256(other) == checkpoint_sha256:
                return other
    parent = path.with_name(beside.parent) if beside else path
    if beside and parent.suffix == ".onnx" and parent.is_file() and file_sha256(parent) == beside.parent_sha256:
        return parent
    if beside is None or beside.parity.get("passed") is not True:
        raise UserError(
            f"nothing beside {path} says whether it is the model: neither its checkpoint nor {sidecar(path).name}",
            "put one of them there, or export it again: python -m export.onnx best.pth",
        )
    say(f"the checkpoint that {path.name} came from is not beside it: artifacts are compared with {path.name} itself")
    return path
