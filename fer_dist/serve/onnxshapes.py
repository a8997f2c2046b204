"""What shape each tensor of an ONNX graph has, found node by node without computing the graph.

ONNX's inference over a whole graph will not do for files from strangers: what it knows of values
(`data_prop`) it keeps at any length, and forty small nodes that double a tensor took all memory of a
machine. Without that it gives up where a length is computed from a shape. Here the values of a few
numbers are computed, and no more.
"""

import math
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

SMALL = 1024
"""Most numbers of a tensor that may be a shape or an index; the values of larger ones say nothing here."""
_COMPUTED = {
    *("Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Identity"),
    *("Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceProd", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub"),
    *("Transpose", "Unsqueeze", "Where"),
}
"""Operators whose small results are computed: those that exporters make shapes and indices with."""

Shapes = dict[str, tuple[int, ...]]


class NoShape(Exception):
    """A graph that contradicts itself, or a tensor whose shape depends on values, in one line."""


def check_graph(model: ModelProto) -> None:
    """What ONNX's own checker looks at: operators and their attributes, names, order. Weights stay out of it.

    Raises:
        NoShape: it refuses the graph.
    """
    skeleton = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = skeleton.graph
    graph.name = "skeleton"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        onnx.checker.check_model(skeleton)
    except Exception as error:  # C++'s own among them
        raise NoShape(f"its graph is invalid: {_line(error)}") from None


def infer(model: ModelProto, batch: int) -> Shapes:
    """The shape of the input and of everything that the nodes make, with `batch` pictures.

    The model has passed `check_graph`, has one input besides its stored tensors, and these are whole.

    Raises:
        NoShape: a shape does not follow from the batch.
    """
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    given = TypeProto()
    given.CopyFrom(model.graph.input[0].type)
    side = given.tensor_type.shape.dim[0]
    side.Clear()
    side.dim_value = batch
    types = {model.graph.input[0].name: given}
    values: dict[str, TensorProto] = {}
    for tensor in model.graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if math.prod(tensor.dims) <= SMALL:
            values[tensor.name] = tensor
    shapes = {model.graph.input[0].name: _shape(given, model.graph.input[0].name)}
    for node in model.graph.node:
        inputs = {name: types[name] for name in node.input if name}
        known = {name: values[name] for name in inputs if name in values}
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
            outputs = infer_node_outputs(schema, node, inputs, known, opset_imports=list(model.opset_import))
        except Exception as error:
            raise NoShape(f"its node {node.op_type[:40]!r} ({node.name[:80]!r}) is invalid: {_line(error)}") from None
        for name in filter(None, node.output):
            shapes[name] = _shape(outputs.get(name), name)
            types[name] = outputs[name]
        value = _value(node, known, shapes)
        if value is not None:
            values[node.output[0]] = onnx.numpy_helper.from_array(value, node.output[0])
    return shapes


def _shape(kind: TypeProto | None, name: str) -> tuple[int, ...]:
    """The sides of a tensor, all of them known."""
    sides = kind.tensor_type.shape.dim if kind is not None and kind.tensor_type.HasField("shape") else None
    if sides is None or not all(side.HasField("dim_value") and side.dim_value >= 0 for side in sides):
        raise NoShape(f"the shape of its tensor {name[:80]!r} does not follow from the batch")
    return tuple(side.dim_value for side in sides)


def _value(node: NodeProto, known: dict[str, TensorProto], shapes: Shapes) -> Any:
    """What a node gives as an array, if that is a few numbers that do not depend on pixels; else None."""
    if len(node.output) != 1 or math.prod(shapes[node.output[0]]) > SMALL:
        return None
    if node.op_type == "Shape":
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        return np.array(shapes[node.input[0]][bounds.get("start", 0) : bounds.get("end")], dtype=np.int64)
    if node.op_type not in _COMPUTED | {"Constant"} or not all(name in known for name in node.input if name):
        return None
    feeds = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in known.items()}
    try:
        with np.errstate(all="ignore"):
            (value,) = ReferenceEvaluator(node, opsets={"": 20}).run(None, feeds)
    except Exception:  # an index out of range, a division by zero: then nothing is known
        return None
    found = np.asarray(value)
    return found if found.shape == shapes[node.output[0]] else None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
