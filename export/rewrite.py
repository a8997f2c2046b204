"""What the rewriters of precision share: a copy to work on, the parts that stay float32, a session, the checks."""

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fer_dist.serve.artifact import INPUT, Precision

PREPROCESSING = frozenset({"Cast", "Resize", "Add", "Sub", "Mul", "Div", "Expand", "Concat"})
"""What may stand between the picture as stored and the first layer of the network."""

HALF_BREAKS = ("NchwcTransformer",)
"""Optimiser of ONNX Runtime that crashes the process on some graphs with float16; not used on CPUs here."""


class CannotRewriteError(ValueError):
    """A graph that cannot be written in another precision."""


def working_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every constant among the initializers, every node named once, and the types of all tensors.

    Raises:
        CannotRewriteError: a node has a graph inside (If, Loop).
    """
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph, taken = model.graph, set[str]()
    nodes = []
    for node in graph.node:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise CannotRewriteError(f"a node {node.op_type} has a graph inside, which only fp32 is written for")
        if node.op_type == "Constant":
            graph.initializer.append(_constant(node))
            continue
        node.name = fresh(node.name or node.op_type, taken)
        nodes.append(node)
    replace_nodes(model, nodes)
    return model


def _constant(node: onnx.NodeProto) -> TensorProto:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    tensor = TensorProto()
    if isinstance(value, TensorProto):
        tensor.CopyFrom(value)
    else:
        kind = np.float32 if attribute.name.startswith("value_float") else np.int64
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, kind)))
    tensor.name = node.output[0]
    return tensor


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Set the nodes of a graph; some may be those it has."""
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def fresh(name: str, taken: set[str]) -> str:
    """`name`, or the first of `name_1`, `name_2`, ... that is not taken; it is taken afterwards."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors of a `working_copy`: constants, inputs, outputs and those between."""
    graph = model.graph
    infos = [*graph.value_info, *graph.input, *graph.output]
    found = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


def preprocessing(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes between the picture and the first layer, which enlarge and normalise.

    Args:
        model: a `working_copy`.
    """
    pixels, floats, found = {INPUT}, float_tensors(model), set[str]()
    for node in model.graph.node:
        if node.op_type in PREPROCESSING and pixels.intersection(node.input):
            found.add(node.name)
            pixels.update(floats.intersection(node.output))
    return found


def heads(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes whose results leave the graph: the last layer and the softmax."""
    leaving = {output.name for output in model.graph.output}
    return {node.name for node in model.graph.node if leaving.intersection(node.output)}


def cpu_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session on the CPU that says nothing and gives the same numbers at every call."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    # Without it the products of uint8 and int8 saturate on processors that have no VNNI instructions.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(HALF_BREAKS)
    )


def tell_precision(model: onnx.ModelProto, precision: Precision) -> None:
    """Write the precision into our metadata; a model without it stays without."""
    for entry in model.metadata_props:
        if entry.key == "fer_dist":
            ours: dict[str, Any] = json.loads(entry.value)
            entry.value = json.dumps(ours | {"precision": precision})


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes of its tensors, after the checks of ONNX.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid; our mistake.
    """
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(typed)
    return typed
