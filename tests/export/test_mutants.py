"""Exports that are not the model, each by a mistake that exporters have made: the gate must reject every one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from fer_dist.serve.artifact import LOGITS, PROBABILITIES, onnx_metadata
from fer_dist.spec import LabelSet
from tests.helpers.exporting import SHA256, Gate, copied, graph_of, lively
from tests.helpers.onnx_graphs import constants, set_constant

Graph = onnx.ModelProto
Floats = NDArray[np.float32]


# -- mistakes in the graph of a ViT


def last(graph: Graph, kind: str) -> onnx.NodeProto:
    """Return the last node of a kind: the only Resize, and the softmax of the outputs."""
    node: onnx.NodeProto = [node for node in graph.graph.node if node.op_type == kind][-1]
    return node


def set_attribute(kind: str, name: str, value: object) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        node = last(graph, kind)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def log_softmax(graph: Graph) -> None:
    last(graph, "Softmax").op_type = "LogSoftmax"


def probabilities_for_logits(graph: Graph) -> None:
    """Return the softmax as both outputs."""
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = ["raw_logits" if name == LOGITS else name for name in names]
    graph.graph.node.append(helper.make_node("Identity", [PROBABILITIES], [LOGITS]))


def names_in_folder_order(graph: Graph) -> None:
    """Sort the class names but not the outputs: the numbers alone do not show it."""
    spec = lively("vit").spec
    labels = LabelSet(names=tuple(sorted(spec.labels.names)))
    describe(graph, onnx_metadata(replace(spec, labels=labels), precision="fp32", checkpoint_sha256=SHA256))


def another_checkpoint(graph: Graph) -> None:
    """Name another checkpoint as the origin of the same numbers."""
    describe(graph, onnx_metadata(lively("vit").spec, precision="fp32", checkpoint_sha256="f" * 64))


def describe(graph: Graph, properties: dict[str, str]) -> None:
    del graph.metadata_props[:]
    helper.set_model_props(graph, properties)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_attribute("Resize", "mode", "nearest"), id="nearest"),
        pytest.param(set_attribute("Resize", "mode", "cubic"), id="bicubic"),
        pytest.param(set_attribute("Resize", "coordinate_transformation_mode", "align_corners"), id="align_corners"),
        pytest.param(set_attribute("Resize", "coordinate_transformation_mode", "asymmetric"), id="asymmetric"),
        pytest.param(set_attribute("Softmax", "axis", 0), id="softmax_over_the_batch"),
        *(log_softmax, probabilities_for_logits, names_in_folder_order, another_checkpoint),
    ],
)
def test_a_mistake_in_the_graph_is_rejected(change: Callable[[Graph], None], gate_of: Callable[[str], Gate]) -> None:
    graph = copied(graph_of("vit"))
    change(graph)
    onnx.checker.check_model(graph)
    assert not gate_of("vit").judge(graph).passed


# -- mistakes in the stored numbers of a PAtt-Lite


def one_weight(values: Floats) -> None:
    """Change the largest weight by a tenth."""
    values.flat[np.abs(values).argmax()] *= np.float32(1.1)


def dropout_left_on(values: Floats) -> None:
    """Apply a fixed dropout mask, as exporters do with a network in training mode."""
    values[:, ::7] = 0


def another_epoch(values: Floats) -> None:
    """Change all weights by a thousandth."""
    values *= 1 + 1e-3 * np.random.default_rng(0).normal(size=values.shape).astype(np.float32)


def outputs_in_folder_order(values: Floats) -> None:
    """Sort the outputs by class name, as a reader of class folders does; the metadata keeps our order."""
    names = lively("patt_lite").spec.labels.names
    values[:] = values[sorted(range(7), key=lambda i: names[i])]


def bgr_for_rgb(values: Floats) -> None:
    values[:] = values[::-1].copy()


NUMBERS: dict[str, tuple[Callable[[str, tuple[int, ...]], bool], Callable[[Floats], object]]] = {
    "another mean": (lambda name, shape: "shift_C11" in name, lambda values: np.subtract(values, 0.05, out=values)),
    "divided by 255 twice": (
        lambda name, shape: "scale_C11" in name,
        lambda values: np.divide(values, 255, out=values),
    ),
    "BGR for RGB": (lambda name, shape: shape == (3, 1, 1), bgr_for_rgb),
    "another epoch": (lambda name, shape: len(shape) > 1 and shape != (3, 1, 1), another_epoch),
    "one weight of the attention": (lambda name, shape: shape == (32, 32), one_weight),
    "dropout left on": (lambda name, shape: "classifier" in name and len(shape) == 2, dropout_left_on),
    "outputs in folder order": (lambda name, shape: "classifier" in name, outputs_in_folder_order),
    "one output for all pictures": (lambda name, shape: "classifier" in name, lambda values: values.fill(0)),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_mistake_in_the_numbers_is_rejected(what: str, gate_of: Callable[[str], Gate]) -> None:
    which, change = NUMBERS[what]
    graph = copied(graph_of("patt_lite"))
    chosen = {name: values.copy() for name, values in constants(graph).items() if which(name, values.shape)}
    assert chosen
    for name, values in chosen.items():
        change(values)
        set_constant(graph, name, values)
    assert not gate_of("patt_lite").judge(graph).passed


# -- mistakes in the model before it is exported


def test_missing_preprocessing_is_rejected(gate_of: Callable[[str], Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    """The network gets three channels of the picture as it is."""
    model = lively("patt_lite")
    monkeypatch.setattr(model.preprocess, "forward", lambda images_N1SS: images_N1SS.float().expand(-1, 3, -1, -1))
    assert not gate_of("patt_lite").judge(model).passed


def test_masking_left_on_is_rejected(gate_of: Callable[[str], Gate]) -> None:
    """Hugging Face's own masking hides three of four patches at random."""
    model = lively("vit_mae")
    embeddings: Any = model.network.get_submodule("encoder.embeddings")
    del embeddings.random_masking
    assert type(embeddings).random_masking is ViTMAEEmbeddings.random_masking
    assert not gate_of("vit_mae").judge(model).passed


def test_attention_across_the_batch_is_rejected(gate_of: Callable[[str], Gate]) -> None:
    """The paper's code takes the batch for the sequence."""
    model = lively("patt_lite")
    network: Any = model.network
    network.attention.batch_first = False
    attend = network._attend  # the same layer, as it is exported

    def across(patches_NPD: Tensor) -> tuple[Tensor, Tensor]:
        attended_PND, parts_PN = attend(patches_NPD.transpose(0, 1))
        return attended_PND.transpose(0, 1), parts_PN.transpose(0, 1)

    network._attend = across
    report = gate_of("patt_lite").judge(model)
    assert not report.passed
    assert report.by_batch[1] > 1e-3, "of a batch of one it makes one patch"
