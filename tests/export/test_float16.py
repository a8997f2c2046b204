"""Half precision: half inside, float32 where it must be, and the same answers."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import float16
from export.precision import to_float16
from export.rewrite import heads
from fer_dist.serve.artifact import read_onnx_metadata
from tests.helpers.exporting import copied, graph_of
from tests.helpers.onnx_graphs import (
    ARCHS,
    agreement,
    chain,
    check_batches,
    check_tensorrt,
    constants,
    half_of,
    images,
    logits,
    set_constant,
    types,
    weight_bytes,
)

SAMPLE = images(8)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_outputs_hardly_change(arch: str) -> None:
    half = half_of(arch)[0]
    truth_NK, found_NK = logits(graph_of(arch), images(40)), logits(half, images(40))
    assert 0 < np.abs(found_NK - truth_NK).max() < 0.02 * truth_NK.std(axis=0).max()
    assert agreement(truth_NK, found_NK) == 1
    check_batches(half)


@pytest.mark.parametrize("arch", ARCHS)
def test_half_inside_and_float32_where_it_must_be(arch: str) -> None:
    half = half_of(arch)[0]
    found, spared = types(half), heads(half)
    layers = [n for n in half.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.name not in spared]
    assert len(layers) > 10
    assert {found[name] for node in layers for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}
    kinds = [tensor.data_type for tensor in half.graph.initializer]
    assert kinds.count(TensorProto.FLOAT16) > kinds.count(TensorProto.FLOAT)
    assert weight_bytes(half) < 0.6 * weight_bytes(graph_of(arch))
    full = [n for n in half.graph.node if n.op_type in ("LayerNormalization", "Softmax", "ReduceMean", "Resize")]
    assert len(full) > 2
    used = {found[name] for node in full for name in (*node.input, *node.output) if name}
    assert used & {TensorProto.FLOAT, TensorProto.FLOAT16} == {TensorProto.FLOAT}
    pixels = [node for node in half.graph.node if "images" in node.input and node.op_type == "Cast"]
    normalised = [node for node in half.graph.node if any("preprocess" in name for name in node.input)]
    assert [found[node.output[0]] for node in (*pixels, *normalised)] == [TensorProto.FLOAT] * 3


@pytest.mark.parametrize("arch", ARCHS)
def test_valid_described_and_without_waste(arch: str) -> None:
    """Nothing is cast twice or stored for nobody; TensorRT reads it."""
    half, notes = half_of(arch)
    onnx.checker.check_model(half, full_check=True)
    onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True)
    assert read_onnx_metadata({entry.key: entry.value for entry in half.metadata_props})[1] == "fp16"
    assert notes[0].startswith("float16: ")
    assert any("preprocessing" in line for line in notes)
    assert any("LayerNormalization" in line for line in notes)
    casts = [(node.input[0], node.attribute[0].i) for node in half.graph.node if node.op_type == "Cast"]
    assert len(set(casts)) == len(casts)
    assert constants(half).keys() <= {name for node in half.graph.node for name in node.input}
    back = {node.output[0] for node in half.graph.node if node.op_type == "Cast"} - {"_to_copy"}
    assert not [name for name, _ in casts if name in back], "a cast of a cast"
    check_tensorrt(half)


def test_the_given_graph_is_left_alone() -> None:
    before = graph_of("vit").SerializeToString(deterministic=True)
    again = to_float16(graph_of("vit"), SAMPLE)[0].SerializeToString(deterministic=True)
    assert again == half_of("vit")[0].SerializeToString(deterministic=True)
    assert graph_of("vit").SerializeToString(deterministic=True) == before


def test_what_overflows_stays_in_float32() -> None:
    """The same function with values of 1e6 before the output of the first attention."""
    model, stored = copied(graph_of("vit")), constants(graph_of("vit"))
    products = [node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in stored]
    for name, factor in ((products[2], 1e7), (products[3], 1e-7)):
        set_constant(model, name, stored[name] * np.float32(factor))
    truth_NK = logits(model, images(20))
    held, notes = to_float16(model, SAMPLE)
    assert np.abs(logits(held, images(20)) - truth_NK).max() < 0.02 * truth_NK.std(axis=0).max()
    assert any("MatMul" in line and "exceed" in line for line in notes), notes


def test_margin() -> None:
    """A value that float16 just holds on these pictures may be too large on the next."""
    generator = np.random.default_rng(0)
    first, second = (generator.uniform(0.5, 1, shape).astype(np.float32) for shape in ((4, 8), (8, 8)))
    pixels = np.full((1, 1, 2, 2), 255, np.uint8)
    for factor, kept in ((4e3, False), (1.6e4, True)):  # sums of four products: below 16,000 and below 64,000
        _, notes = to_float16(chain(first * factor, second / factor * 100), pixels)
        assert any("exceed" in line for line in notes) == kept, notes


def test_constants_without_digits_stay_in_float32() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.normal(size=shape).astype(np.float32) for shape in ((4, 8), (8, 8)))
    model = chain(first * np.float32(3e-7), second * np.float32(1e4))
    pixels = generator.integers(0, 256, (20, 1, 2, 2), np.uint8)
    truth_NK = logits(model, pixels)
    assert np.abs(logits(to_float16(model, pixels)[0], pixels) - truth_NK).max() < 2e-3 * np.abs(truth_NK).max()


def test_a_small_bias_added_to_large_sums_is_half() -> None:
    """Tiny biases lose digits too, but nobody would see it."""
    model = copied(graph_of("patt_lite"))
    (bias,) = (name for name in constants(model) if name.endswith("features.0.0.weight_bias"))
    set_constant(model, bias, np.full_like(constants(model)[bias], 1e-7))
    held, notes = to_float16(model, SAMPLE)
    assert types(held)[f"{bias}_half"] == TensorProto.FLOAT16
    assert not any("constant" in line for line in notes)


def test_inputs_that_have_no_half_stay() -> None:
    """The values of Resize may be float16, its scales may not."""
    model = chain(np.eye(4, 8, dtype=np.float32), np.eye(8, 8, dtype=np.float32))
    resize = helper.make_node("Resize", ["hidden1", "", "scales"], ["doubled"], mode="nearest")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.float32), "scales"))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(16, 8, dtype=np.float32), "narrow"))
    model.graph.node[4].input[:] = ["doubled", "narrow"]
    model.graph.node.insert(4, resize)
    found = types(to_float16(model, SAMPLE[:, :, :2, :2])[0])
    assert (found["doubled"], found["scales"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_values_are_not_rounded_on_the_way_between_float32() -> None:
    """What only moves from one operator in float32 to another is not cast to float16 and back."""
    half = half_of("timm:convnext_atto")[0]
    makers, found = {name: node for node in half.graph.node for name in node.output}, types(half)
    moves = [node for node in half.graph.node if node.op_type in float16.MOVES]
    for node in (node for node in moves if found[node.output[0]] == TensorProto.FLOAT16):
        before = makers[node.input[0]]
        while before.op_type in float16.MOVES:
            before = makers[before.input[0]]
        readers = [other.op_type for other in half.graph.node if node.output[0] in other.input]
        assert not (before.op_type == "Cast" and "Cast" in readers), node.name
    assert len({found[node.output[0]] for node in moves}) > 1, "there is nothing to see here"


def test_control_flow_is_refused() -> None:
    model = chain()
    branch = helper.make_graph([], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["flag"], ["x"], then_branch=branch, else_branch=branch))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    with pytest.raises((ValueError, onnx.shape_inference.InferenceError)):
        to_float16(model, SAMPLE)
