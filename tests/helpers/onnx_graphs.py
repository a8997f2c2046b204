"""Exported graphs in each precision, each made once per session, and what tests measure on them."""

from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.precision import Form, to_float16, to_int8
from export.rewrite import cpu_session
from fer_dist.serve.artifact import ATTENTION, INPUT, LOGITS, PROBABILITIES
from tests.helpers.exporting import graph_of
from tests.helpers.tiny_models import pictures

ARCHS = ("vit", "vit_mae", "patt_lite", "timm:convnext_atto")
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Found:
    """The verdict of a judge in a test."""

    passed: bool
    top1_agreement: float = 1.0


@cache
def half_of(arch: str) -> tuple[onnx.ModelProto, list[str]]:
    """Rewrite `graph_of(arch)` in float16. The graph must not be changed."""
    return to_float16(graph_of(arch), images(8))


@cache
def int8_of(arch: str, form: Form) -> tuple[onnx.ModelProto, list[str], dict[str, Any]]:
    """Quantise `graph_of(arch)` at the first attempt. The graph must not be changed."""
    return to_int8(graph_of(arch), images(16), form=form, judge=lambda candidate: Found(passed=True))


def images(count: int) -> NDArray[np.uint8]:
    """`pictures` as an array."""
    array: NDArray[np.uint8] = pictures(count).numpy()
    return array


def logits(model: onnx.ModelProto, images_N1SS: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a graph answers in ONNX Runtime, all pictures at once, float32 `[N, K]`."""
    found, probabilities = cpu_session(model).run([LOGITS, PROBABILITIES], {INPUT: images_N1SS})
    assert found.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    answers: NDArray[np.float32] = found
    return answers


def agreement(first_NK: NDArray[np.float32], second_NK: NDArray[np.float32]) -> float:
    """Share of pictures with the same top class."""
    return float((first_NK.argmax(axis=1) == second_NK.argmax(axis=1)).mean())


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return the stored tensors of a graph by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def weight_bytes(model: onnx.ModelProto) -> int:
    """Size of all constants; the rest of a tiny graph says nothing about a large one."""
    return sum(values.nbytes for values in constants(model).values())


def set_constant(model: onnx.ModelProto, name: str, values: NDArray[Any]) -> None:
    """Replace a stored float32 tensor."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Name of each tensor -> its element type."""
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    found = {info.name: info.type.tensor_type.elem_type for info in infos}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def check_batches(model: onnx.ModelProto) -> None:
    """Raise AssertionError unless a picture gets the same answer in batches of 1, 2, 3 and 7."""
    session, together_NK = cpu_session(model), logits(model, images(7))
    for count in (1, 2, 3, 7):
        (found_NK,) = session.run([LOGITS], {INPUT: images(7)[:count]})
        # In half precision other batches may add in another order.
        np.testing.assert_allclose(found_NK, together_NK[:count], atol=2e-3)


def check_tensorrt(model: onnx.ModelProto) -> None:
    """Raise AssertionError unless TensorRT for RTX reads the graph as a strongly typed network; skips without it."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: nothing here parses for it")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    found = [(network.get_output(i).name, network.get_output(i).dtype) for i in range(network.num_outputs)]
    assert [pair for pair in found if pair[0] != ATTENTION] == [(LOGITS, trt.float32), (PROBABILITIES, trt.float32)]
    assert network.get_input(0).dtype == trt.uint8


def chain(*matrices: NDArray[np.float32]) -> onnx.ModelProto:
    """A graph with products by these matrices between pictures of 2 x 2 and the head."""
    width = matrices[-1].shape[1] if matrices else 4
    stored = {"scale": np.array([1 / 255], np.float32), "head": np.eye(width, 7, dtype=np.float32)}
    nodes = [
        helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["hidden0"]),
    ]
    for i, matrix in enumerate(matrices):
        stored[f"matrix{i}"] = matrix
        nodes.append(helper.make_node("MatMul", [f"hidden{i}", f"matrix{i}"], [f"hidden{i + 1}"]))
    nodes.append(helper.make_node("MatMul", [f"hidden{len(matrices)}", "head"], [LOGITS]))
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["N", 1, 2, 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 7]) for name in (LOGITS, PROBABILITIES)],
        [numpy_helper.from_array(np.asarray(values, np.float32), name) for name, values in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
