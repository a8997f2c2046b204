"""An ONNX file from outside: looked at whole before anything computes with it.

Files come from strangers, and ONNX Runtime trusts what it loads: it opens files that the graph names,
and allocates what its shapes ask for. A file is refused here unless it is one that fer_dist writes: our
metadata, our input and outputs, one file, plain operators, every shape known and modest. What is
computed with is what was looked at (`OnnxFile.serialized`), never the path a second time.

Time is not bounded: a graph within these bounds can still be slow.
"""

import math
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from fer_dist.errors import UserError, printable
from fer_dist.serve.artifact import ATTENTION, INPUT, LOGITS, PROBABILITIES, Precision, read_onnx_metadata
from fer_dist.serve.onnxshapes import NoShape, Shapes, check_graph, infer
from fer_dist.spec import ModelSpec

OPSET = 20
"""Version of ONNX's operators. Ours are written in it, and rules about shapes differ between versions."""
MOST_BYTES = 2**31 - 1
"""Largest file, which is protobuf's own limit."""
MOST_FIELDS, MOST_STRUCTURE = 2**20, 2**26
"""Most fields of the protobuf, and most bytes of it beside `raw_data`: an empty node has two bytes in the
file and some hundred in memory, a packed integer one and eight."""
MOST_ALIVE = 2**29
"""Most numbers that a graph may hold at once for one picture, beside 4 for each number in the file; attention
over 1024 pixels in patches of 16 has 2**28.6 with its softmax."""

MANY = 64
"""A batch that shapes are found for, beside 1."""

_CONTROL = {"If", "Loop", "Scan", "SequenceMap"}
_STORED: dict[int, tuple[int, str]] = {
    TensorProto.FLOAT: (4, "float_data"),
    TensorProto.FLOAT16: (2, "int32_data"),
    TensorProto.INT8: (1, "int32_data"),
    TensorProto.UINT8: (1, "int32_data"),
    TensorProto.INT32: (4, "int32_data"),
    TensorProto.INT64: (8, "int64_data"),
    TensorProto.BOOL: (1, "int32_data"),
}
"""Type of a stored tensor -> bytes of a number, and the field that holds them where `raw_data` does not."""
_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


class _Refused(Exception):
    """Why a file is refused, in one line without its path."""


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """An ONNX file of ours that has passed every check.

    Attributes:
        model: the graph; unknown fields are gone.
        spec, precision, checkpoint_sha256: out of its metadata.
        attention: rows and columns of the output of that name; None: there is no such output.
    """

    model: ModelProto
    spec: ModelSpec
    precision: Precision
    checkpoint_sha256: str
    attention: tuple[int, int] | None

    def serialized(self) -> bytes:
        """The model as bytes, for a session or a parser."""
        raw: bytes = self.model.SerializeToString()
        return raw


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file that fer_dist has written, and nothing beside it.

    Raises:
        UserError: missing, not ONNX, not one of ours, or beyond the bounds above.
    """
    path = Path(path)
    fix = "export it again: python -m export.onnx best.pth"
    try:
        raw = _read(path)
        _require_modest_fields(raw)
        model = ModelProto.FromString(raw)
        del raw  # the weights are in memory twice until here
        model.DiscardUnknownFields()
        return _checked(model)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "name an ONNX file, e.g. best.onnx") from None
    except (_Refused, NoShape) as refused:
        problem = str(refused)
    except Exception as error:  # protobuf and onnx fail on damaged files in a dozen ways
        problem = f"it is damaged or not ONNX ({(str(error).splitlines() or [''])[0]})"
    raise UserError(f"{path} is refused: {printable(problem[:600])}", fix)


def _read(path: Path) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise _Refused("it is no regular file")
    if found.st_size <= MOST_BYTES:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if not raw:
            raise _Refused("it is empty")
        if len(raw) <= MOST_BYTES:
            return raw
    raise _Refused(f"it is larger than {MOST_BYTES:,} bytes, which ONNX in one file cannot be")


def _require_modest_fields(raw: bytes) -> None:
    """Count the fields of a protobuf without building it, which takes up to a hundred times its bytes."""
    fields, structure = 0, len(raw)
    stack = [(0, len(raw), ModelProto.DESCRIPTOR)]
    while stack:
        at, end, message = stack.pop()
        while at < end:
            tag, at = _varint(raw, at)
            fields += 1
            if fields > MOST_FIELDS:
                raise _Refused(f"it has more than {MOST_FIELDS:,} fields")
            field = message.fields_by_number.get(tag >> 3)
            match tag & 7:
                case 0:
                    _, at = _varint(raw, at)
                case 1:
                    at += 8
                case 5:
                    at += 4
                case 2:
                    size, start = _varint(raw, at)
                    at = start + size
                    if field is not None and field.message_type is not None and at <= end:
                        stack.append((start, at, field.message_type))
                    elif field is not None and field.name == "raw_data":
                        structure -= size
                case _:
                    raise _Refused("it is no ONNX: its bytes are no fields")
        if at != end:
            raise _Refused("it was cut off, or is no ONNX: a field goes on behind its end")
    if structure > MOST_STRUCTURE:
        raise _Refused(f"it has {structure:,} bytes beside its weights, more than {MOST_STRUCTURE:,}")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of protobuf, and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            raise _Refused("it was cut off, or is no ONNX: it ends within a number")
        byte, at = raw[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Refused("it is no ONNX: a number has more than ten bytes")


def _checked(model: ModelProto) -> OnnxFile:
    """Every check on the parsed model, the cheap ones first."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if len(properties) != len(model.metadata_props):
        raise _Refused("its metadata names something twice")
    try:
        spec, precision, checkpoint_sha256 = read_onnx_metadata(properties)
    except ValueError as error:
        raise _Refused(str(error)) from None
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if opsets != [OPSET]:
        raise _Refused(f"it is of opset {opsets}, expected {OPSET}")
    if model.functions or model.training_info:
        raise _Refused("it defines functions or training, which fer_dist never writes")
    _check_nodes(model.graph)
    _check_tensors(model.graph)
    attention = _check_contract(model.graph, spec)
    _check_precision(model.graph, precision)
    _check_shapes(model, spec, attention)
    return OnnxFile(
        model=model, spec=spec, precision=precision, checkpoint_sha256=checkpoint_sha256, attention=attention
    )


def _check_precision(graph: onnx.GraphProto, precision: Precision) -> None:
    """The graph is what its metadata says, since that decides how strictly it is judged."""
    quantised = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node)
    casts = [a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    half = TensorProto.FLOAT16 in (*casts, *(tensor.data_type for tensor in graph.initializer))
    found = "int8" if quantised else "fp16" if half else "fp32"
    if found != precision.partition(".")[0]:
        raise _Refused(f"its metadata says {precision}, its graph is {found}")


def _check_nodes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise _Refused(f"its node {node.op_type[:40]!r} is of the domain {node.domain[:60]!r}, none of ONNX's own")
        branches = any(a.HasField("g") or a.graphs or a.ref_attr_name for a in node.attribute)
        if node.op_type in _CONTROL or branches:
            raise _Refused(f"its node {node.op_type[:40]!r} holds graphs, which fer_dist never writes")
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors or attribute.type_protos:
                raise _Refused(f"its node {node.op_type[:40]!r} holds sparse tensors or types")
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                _check_tensor(tensor)


def _check_tensors(graph: onnx.GraphProto) -> None:
    if graph.sparse_initializer:
        raise _Refused("it holds sparse tensors, which fer_dist never writes")
    for tensor in graph.initializer:
        _check_tensor(tensor)
    name, times = max(Counter(t.name for t in graph.initializer).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise _Refused(f"it has {times} tensors named {name[:80]!r}")


def _check_tensor(tensor: TensorProto) -> None:
    """Its bytes are here, and as many as its shape says."""
    name = tensor.name[:80]
    if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
        where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        raise _Refused(f"its tensor {name!r} is in another file ({where[:120]!r}); ours are one file")
    if tensor.data_type not in _STORED or tensor.HasField("segment"):
        raise _Refused(f"its tensor {name!r} is of type {tensor.data_type}, or in segments, which ours are not")
    width, typed = _STORED[tensor.data_type]
    if any(side < 0 for side in tensor.dims):
        raise _Refused(f"its tensor {name!r} has a negative size")
    count = math.prod(tensor.dims)
    held = {field: len(getattr(tensor, field)) for field in _FIELDS if len(getattr(tensor, field))}
    expected = [{"raw_data": count * width}, {typed: count}] if count else [{}]
    if held not in expected:
        raise _Refused(f"its tensor {name!r} has the shape {list(tensor.dims)[:8]}, but its data are {held}")


def _check_contract(graph: onnx.GraphProto, spec: ModelSpec) -> tuple[int, int] | None:
    """`images` goes in, `logits` and `probabilities` come out, with a free batch; perhaps `attention`: its sides."""
    side, classes = spec.input.size, len(spec.labels)
    found = [_signature(value) for value in (*graph.input, *graph.output)]
    expected = [
        (INPUT, TensorProto.UINT8, ("N", 1, side, side)),
        (LOGITS, TensorProto.FLOAT, ("N", classes)),
        (PROBABILITIES, TensorProto.FLOAT, ("N", classes)),
    ]
    attention: tuple[int, int] | None = None
    match found[len(expected) :]:
        case [(name, TensorProto.FLOAT, ("N", int(rows), int(columns)))] if name == ATTENTION and rows * columns > 0:
            attention = rows, columns
            found.pop()
    if len(graph.input) != 1 or found != expected:
        raise _Refused(f"its inputs and outputs are {found[:6]}, expected {expected}; name, type, shape")
    return attention


def _signature(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    kind = value.type.tensor_type
    sides = [side.dim_value if side.HasField("dim_value") else "N" for side in kind.shape.dim[:8]]
    return value.name[:80], kind.elem_type, tuple(sides)


def _check_shapes(model: ModelProto, spec: ModelSpec, attention: tuple[int, int] | None) -> None:
    """Every tensor has a shape that follows from the batch, grows no faster than it, and fits into memory."""
    check_graph(model)
    one, many = infer(model, 1), infer(model, MANY)
    for name, shape in one.items():
        if math.prod(many[name]) > MANY * math.prod(shape):
            raise _Refused(f"its tensor {name[:80]!r} grows faster than the batch")
    promised: dict[str, tuple[int, ...]] = {LOGITS: (len(spec.labels),), PROBABILITIES: (len(spec.labels),)}
    if attention is not None:
        promised[ATTENTION] = attention
    answers = [shapes[name] for shapes in (one, many) for name in promised]
    if answers != [(batch, *sides) for batch in (1, MANY) for sides in promised.values()]:
        raise _Refused(f"for 1 and for {MANY} pictures its outputs have the shapes {answers}")
    stored = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    if (most := _most_alive(model.graph, one)) > MOST_ALIVE + 4 * stored:
        raise _Refused(f"it would hold {most:,} numbers at once for one picture, more than {MOST_ALIVE:,}")


def _most_alive(graph: onnx.GraphProto, shapes: Shapes) -> int:
    """How many numbers are held at once, each from where it is made to where it is used last.

    What does not depend on the pictures is computed when a session is made, and kept.
    """
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    last = {name: place for place, node in enumerate(graph.node) for name in node.input}
    ends = Counter[int]()
    fleeting = {INPUT}
    alive = most = counts[INPUT]
    for place, node in enumerate(graph.node):
        made = [name for name in node.output if name]
        alive += sum(counts[name] for name in made)
        most = max(most, alive)
        if node.op_type not in ("Shape", "Size") and not fleeting.isdisjoint(node.input):
            fleeting.update(made)
            for name in made:
                ends[last.get(name, place)] += counts[name]
        alive -= ends.pop(place, 0)
    return most
