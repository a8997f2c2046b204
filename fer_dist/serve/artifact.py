"""What an exported file is: its contract inside the ONNX, and the JSON file beside each artifact."""

import errno
import hashlib
import json
import re
import stat
from dataclasses import asdict, dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from fer_dist.errors import UserError
from fer_dist.spec import ModelSpec

FORMAT = 1
PRECISIONS = ("fp32", "fp16", "int8", "int8.cpu")
"""What an artifact computes in. `int8` is quantised as TensorRT reads it, `int8.cpu` as CPUs are fast at it."""
INPUT, LOGITS, PROBABILITIES, ATTENTION = "images", "logits", "probabilities", "attention"
"""Names of the input and the outputs; attention only in ONNX files, of architectures that have one to show."""
MOST_SIDECAR = 2**20
"""Longest JSON file beside an artifact that is read [bytes]."""

Precision = Literal["fp32", "fp16", "int8", "int8.cpu"]

_DIGEST = re.compile(r"[0-9a-z]{64}")


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """The JSON file beside an artifact; the artifact itself stays plain ONNX or plain engine bytes.

    Attributes:
        kind: what the file is.
        precision: one of PRECISIONS.
        spec: architecture, labels and input of the checkpoint.
        batch: smallest, best and largest batch that an engine was built for; empty: any.
        sha256, bytes: of the artifact.
        checkpoint_sha256: of the checkpoint that everything began with.
        parent, parent_sha256: the file that this one was made from; its name, as it lay beside.
        built_with: package -> version; `backend` and `compute_capabilities` of an engine.
        data: settings of the data set that the checkpoint was judged on (of its config).
        made: what the precision took, one sentence each: layers kept in float32, calibration, fall-backs.
        calibration: method, count, seed and data of the calibration; empty but for int8.
        parity: the report of the gate, plain values; empty: not measured.
        attends: whether the file has the output `attention`.
    """

    kind: Literal["onnx", "engine"]
    precision: Precision
    spec: ModelSpec
    sha256: str
    bytes: int
    checkpoint_sha256: str
    parent: str
    parent_sha256: str
    batch: tuple[int, ...] = ()
    built_with: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    made: tuple[str, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    attends: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values as they are stored, with the input contract spelt out for readers without fer_dist."""
        plain = asdict(self) | {"spec": self.spec.to_dict(), "batch": list(self.batch), "made": list(self.made)}
        return {"fer_dist_artifact": FORMAT, **plain, "contract": contract(self.spec, attends=self.attends)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ExportedModel":
        """The inverse of `to_dict`; the dictionary may come from a stranger's file.

        Raises:
            KeyError, TypeError, ValueError: the dictionary is not one of ours.
        """
        if plain["fer_dist_artifact"] != FORMAT:
            raise ValueError(f"format {str(plain['fer_dist_artifact'])[:20]}, this version reads {FORMAT}")
        texts = {name: plain[name] for name in ("sha256", "checkpoint_sha256", "parent", "parent_sha256")}
        if not all(type(text) is str for text in texts.values()) or type(plain["bytes"]) is not int:
            raise TypeError("its hashes and names are no texts")
        if not all(_DIGEST.fullmatch(texts[name]) for name in texts if name != "parent"):
            raise ValueError("its hashes are no SHA-256")
        if Path(texts["parent"]).name != texts["parent"] or texts["parent"] in ("", "..") or "\0" in texts["parent"]:
            raise ValueError("its parent is not the name of a file")
        if plain["kind"] not in ("onnx", "engine") or plain["precision"] not in PRECISIONS:
            raise ValueError("its kind or precision is none")
        tables = {name: plain[name] for name in ("built_with", "data", "calibration", "parity")}
        if not all(type(table) is dict for table in tables.values()):
            raise TypeError("its tables are none")
        batch, made = tuple(plain["batch"]), tuple(map(str, plain["made"]))
        if not all(type(size) is int and size > 0 for size in batch) or len(batch) not in (0, 3):
            raise ValueError("its batch sizes are none")
        return cls(
            kind=plain["kind"],
            precision=plain["precision"],
            spec=ModelSpec.from_dict(plain["spec"]),
            bytes=plain["bytes"],
            batch=batch,
            made=made,
            attends=plain.get("attends") is True,  # files of before had no such output
            **texts,
            **tables,
        )


def contract(spec: ModelSpec, *, attends: bool = False) -> dict[str, Any]:
    """What goes in and what comes out, for people and programs that do not have fer_dist."""
    side, classes = spec.input.size, len(spec.labels)
    attention = {"dtype": "float32", "shape": ["N", "h", "w"], "values": "part of each patch in it; sums to 1"}
    return {
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["N", 1, side, side],
            "values": "grey 0..255; enlarging, channels and normalisation are inside",
        },
        "outputs": {
            LOGITS: {"dtype": "float32", "shape": ["N", classes]},
            PROBABILITIES: {"dtype": "float32", "shape": ["N", classes], "values": "softmax of the logits"},
            **({ATTENTION: attention} if attends else {}),
        },
        "labels": list(spec.labels.names),
    }


def onnx_metadata(
    spec: ModelSpec, *, precision: Precision, checkpoint_sha256: str, attends: bool = False
) -> dict[str, str]:
    """Name -> text of an ONNX file's metadata_props: ours as JSON, and the contract in plain names."""
    ours = {
        "format": FORMAT,
        "spec": spec.to_dict(),
        "precision": precision,
        "checkpoint_sha256": checkpoint_sha256,
    }
    told = contract(spec, attends=attends)
    return {
        "fer_dist": json.dumps(ours),
        "labels": json.dumps(told["labels"]),
        "input": json.dumps(told["input"]),
        "outputs": json.dumps(told["outputs"]),
    }


def read_onnx_metadata(properties: dict[str, str]) -> tuple[ModelSpec, Precision, str]:
    """Spec, precision and the checkpoint's hash out of an ONNX file's metadata.

    Raises:
        ValueError: the file is not one of ours.
    """
    try:
        ours = json.loads(properties["fer_dist"][:MOST_SIDECAR])
        if ours["format"] != FORMAT or ours["precision"] not in PRECISIONS:
            raise ValueError("of another format")
        spec, labels = ModelSpec.from_dict(ours["spec"]), json.loads(properties["labels"][:MOST_SIDECAR])
        if labels != list(spec.labels.names):
            raise ValueError("its two lists of labels differ")
        return spec, ours["precision"], str(ours["checkpoint_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata is not that of fer_dist ({type(error).__name__}: {error})") from None


def sidecar(path: Path) -> Path:
    """Where the JSON file of an artifact lies: `best.onnx` -> `best.onnx.json`."""
    return path.with_name(f"{path.name}.json")


def sidecar_json(exported: ExportedModel) -> bytes:
    """The content of the JSON file."""
    return (json.dumps(exported.to_dict(), indent=1, allow_nan=False) + "\n").encode()


def read_sidecar(path: Path) -> ExportedModel:
    """The JSON file beside the artifact `path`.

    Raises:
        UserError: missing, unreadable, or not one of ours.
    """
    beside = sidecar(path)
    fix = "export it again: python -m export.trt best.pth"
    try:
        with _open(beside) as file:
            raw = file.read(MOST_SIDECAR + 1)
    except OSError as error:
        raise UserError(f"cannot read {beside}, which says what {path.name} is: {error.strerror}", fix) from None
    try:
        if len(raw) > MOST_SIDECAR:
            raise ValueError(f"it is longer than {MOST_SIDECAR:,} bytes")
        return ExportedModel.from_dict(json.loads(raw))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{beside} is not a description of an artifact of fer_dist: {error}", fix) from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with _open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check the path") from None


def _open(path: Path) -> BufferedReader:
    """A regular file for reading: a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return path.open("rb")
