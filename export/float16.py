"""Half precision written into the graph: float16 where it holds the values, float32 where it would drift."""

from collections import Counter, defaultdict

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.calibrate import Ranges, tensor_ranges
from export.rewrite import (
    checked,
    float_tensors,
    fresh,
    heads,
    preprocessing,
    replace_nodes,
    tell_precision,
    working_copy,
)

LARGEST = 65504.0
"""Largest float16."""
MARGIN = 4.0
"""How much larger than on the calibration pictures a value may become on others."""
LOST = 2.0**-9
"""Largest error of rounding, relative to the tensor: four times that of a number that float16 holds well."""
SMALLEST = 2.0**-25 / LOST
"""A tensor below this everywhere loses more than LOST: the steps of float16 are at least 2**-24."""

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
FULL = frozenset(
    ["LayerNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization", "Softmax", "LogSoftmax"]
    + ["Pow", "Sqrt", "Exp", "Log", "Reciprocal", "CumSum", "Sum", "Mean", "GlobalAveragePool", "Einsum", "Range"]
    + [f"Reduce{kind}" for kind in _REDUCTIONS]
)
"""Operators that stay in float32: they add many terms, or turn a small error into a large one."""

MOVES = frozenset(
    ["Concat", "Expand", "Flatten", "Gather", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)
"""Operators that compute nothing: they take the type of what stands around them, so that nothing is cast twice."""

UNTYPED = frozenset({"Shape", "Size"})
"""Operators that read no values: any type is welcome."""

ADDS = frozenset({"Add", "Sub", "Concat"})
"""Operators in which a small input does not matter beside a large one."""

_WHY = {
    "preprocessing": "of the preprocessing",
    "head": "of the outputs",
    "sums": "that float16 does badly (sums, normalisation, softmax, powers)",
    "large": f"whose values exceed {LARGEST / MARGIN:,.0f} on the given pictures (float16 ends at {LARGEST:,.0f})",
    "small": f"whose values stay below {SMALLEST:.1e}, where float16 has no digits left",
    "constant": "with a constant that float16 cannot hold",
    "type": "that ONNX has no float16 for",
    "around": "that only move values of float32",
}


def to_float16(model: onnx.ModelProto, images_N1SS: NDArray[np.uint8]) -> tuple[onnx.ModelProto, list[str]]:
    """A float32 graph of ours in half precision, strongly typed; inputs and outputs keep their types.

    Args:
        model: float32 throughout; left as it is.
        images_N1SS: uint8 `[N, 1, S, S]`: what is too large or too small for float16 shows on these.

    Returns:
        The graph, and what stayed in float32 and why, a sentence each.

    Raises:
        CannotRewriteError: the graph has control flow.
    """
    model = working_copy(model)
    kept = _kept(model, tensor_ranges(model, images_N1SS))
    floats = float_tensors(model)
    computing = [node for node in model.graph.node if floats.intersection(node.output)]
    halves = {node.name for node in computing if node.name not in kept}
    _Halved(model, halves, floats).rewrite()
    tell_precision(model, "fp16")
    return checked(model), _told(computing, kept)


def _told(computing: list[onnx.NodeProto], kept: dict[str, str]) -> list[str]:
    by_reason: dict[str, Counter[str]] = defaultdict(Counter)
    for node in computing:
        if node.name in kept:
            by_reason[kept[node.name]][node.op_type] += 1
    told = [f"float16: {len(computing) - len(kept)} of the {len(computing)} operators that compute"]
    for reason in (reason for reason in _WHY if reason in by_reason):
        counts = ", ".join(f"{count} {op_type}" for op_type, count in sorted(by_reason[reason].items()))
        told.append(f"float32: {counts} {_WHY[reason]}")
    return told


def _kept(model: onnx.ModelProto, ranges: Ranges) -> dict[str, str]:
    """Name of each node with results in float32 that must keep them -> a key of _WHY."""
    floats, before, last = float_tensors(model), preprocessing(model), heads(model)
    lost = _lost_in_constants(model)
    sizes = {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}
    kept = {}
    for node in model.graph.node:
        if not floats.intersection(node.output):
            continue
        values = [sizes[name] for name in (*node.input, *node.output) if name in sizes]
        weighty = [sizes[name] for name in node.output if name in sizes] if node.op_type in ADDS else values
        if node.name in before:
            kept[node.name] = "preprocessing"
        elif node.name in last:
            kept[node.name] = "head"
        elif node.op_type in FULL:
            kept[node.name] = "sums"
        elif not _has_half(model, node, floats):
            kept[node.name] = "type"
        elif not all(value <= LARGEST / MARGIN for value in values):  # not a number counts as too large
            kept[node.name] = "large"
        elif any(0 < value < SMALLEST for value in weighty):
            kept[node.name] = "small"
        elif any(_matters(node, index, lost[name], sizes) for index, name in enumerate(node.input) if name in lost):
            kept[node.name] = "constant"
    return kept | _moves_around(model, floats, kept)


def _lost_in_constants(model: onnx.ModelProto) -> dict[str, float]:
    """Name -> largest error of each float32 constant that as float16 loses more than LOST of its size."""
    lost = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):  # an infinite error says it
                errors = np.abs(values.astype(np.float16) - values)
            # Of the whole tensor: a weight that is tiny beside its neighbours adds nothing that would be missed.
            if not np.linalg.norm(errors) <= LOST * np.linalg.norm(values):
                lost[tensor.name] = float(errors.max())
    return lost


def _matters(node: onnx.NodeProto, index: int, error: float, sizes: dict[str, float]) -> bool:
    """Whether a constant's error shows: not where it is added to values so large that they hide it."""
    added = node.op_type in ADDS or (node.op_type in ("Conv", "ConvTranspose", "Gemm") and index == 2)
    return not (added and error <= LOST * sizes.get(node.output[0], 0.0))


def _moves_around(model: onnx.ModelProto, floats: set[str], kept: dict[str, str]) -> dict[str, str]:
    """Nodes of MOVES that stay in float32 because what they read is float32 and someone reads them as float32."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    makers = {name: node for node in model.graph.node for name in node.output}
    full = set(kept)
    wide = set[str]()
    for node in reversed(model.graph.node):
        read_wide = any(
            r.name in full | wide for name in node.output for r in readers[name] if r.op_type not in UNTYPED
        )
        if node.op_type in MOVES and node.name not in full and floats.intersection(node.output) and read_wide:
            wide.add(node.name)
    for node in model.graph.node:
        made = [makers[name] for name in node.input if name in floats and name in makers]
        if node.name in wide and any(maker.name not in full for maker in made):
            wide.discard(node.name)  # its values are halves already
        elif node.name in wide:
            full.add(node.name)
    return dict.fromkeys((name for name in wide if name in full), "around")


def _has_half(model: onnx.ModelProto, node: onnx.NodeProto, floats: set[str]) -> bool:
    """Whether ONNX has this operator with float16 results."""
    results = [_may_be_half(model, node, i, of_output=True) for i, name in enumerate(node.output) if name in floats]
    return all(results) and any(_may_be_half(model, node, i) for i, name in enumerate(node.input) if name in floats)


def _may_be_half(model: onnx.ModelProto, node: onnx.NodeProto, index: int, *, of_output: bool = False) -> bool:
    """Whether this input or output of a node can be float16 as well as float32; the scales of Resize cannot."""
    version = next(entry.version for entry in model.opset_import if entry.domain == node.domain)
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    parameters = schema.outputs if of_output else schema.inputs
    types = parameters[min(index, len(parameters) - 1)].types  # the last may be repeated
    return "tensor(float16)" in types and "tensor(float)" in types


class _Halved:
    """A graph on its way to half precision; `rewrite` does it in place."""

    def __init__(self, model: onnx.ModelProto, halves: set[str], floats: set[str]) -> None:
        """
        Args:
            model: a `working_copy`.
            halves: names of the nodes that are to compute in float16.
            floats: its `float_tensors`.
        """
        graph = model.graph
        self.model, self.halves, self.floats = model, halves, floats
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.taken = {name for node in graph.node for name in (*node.input, *node.output, node.name)} | set(floats)
        self.half_values = set[str]()  # tensors that are computed as float16
        self.other: dict[str, str] = {}  # tensor -> its form in the other type
        self.nodes: list[onnx.NodeProto] = []

    def rewrite(self) -> None:
        graph = self.model.graph
        for node in graph.node:
            self._take(node)
        read = {name for node in self.nodes for name in node.input}
        left = [tensor for name, tensor in self.constants.items() if name in read]
        del graph.initializer[:]
        graph.initializer.extend(left)
        for info in graph.value_info:
            if info.name in self.half_values:
                info.type.tensor_type.elem_type = TensorProto.FLOAT16
        replace_nodes(self.model, self.nodes)

    def _take(self, node: onnx.NodeProto) -> None:
        half = node.name in self.halves
        for index, name in enumerate(node.input):
            if name not in self.floats or node.op_type in UNTYPED:
                continue
            wanted = half and _may_be_half(self.model, node, index)
            if wanted != (name in self.half_values):
                node.input[index] = self._other(name, TensorProto.FLOAT16 if wanted else TensorProto.FLOAT)
        if half:
            self.half_values.update(self.floats.intersection(node.output))
        self.nodes.append(node)

    def _other(self, name: str, wanted: int) -> str:
        """The name of a tensor's form in the other type, which is made once."""
        if name not in self.other:
            other = fresh(f"{name}_{'half' if wanted == TensorProto.FLOAT16 else 'full'}", self.taken)
            if name in self.constants:
                values = numpy_helper.to_array(self.constants[name]).astype(np.float16)
                self.constants[other] = numpy_helper.from_array(values, other)
            else:
                label = fresh(f"Cast_{other}", self.taken)
                self.nodes.append(helper.make_node("Cast", [name], [other], label, to=wanted))
            self.other[name] = other
        return self.other[name]
