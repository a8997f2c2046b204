"""Exports that are not the model, each by a mistake that exporters have made: the gate must reject every one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from fer_dist.serve.artifact import LOGITS, PROBABILITIES, onnx_metadata
from tests.helpers.exporting import SHA256, Gate, copied, graph_of, lively
from tests.helpers.onnx_graphs import constants, set_constant

Graph = onnx.ModelProto
Floats = NDArray[np.float32]


# -- mistakes in the graph of a ViT


def set_attribute(kind: str, **attributes: object) -> Callable[[Graph], None]:
    """Return a change of the last node of a kind: the only Resize, and the softmax of the outputs."""

    def change(graph: Graph) -> None:
        *_, node = (node for node in graph.graph.node if node.op_type == kind)
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(*pair) for pair in attributes.items())])

    return change


def log_softmax(graph: Graph) -> None:
    *_, node = (node for node in graph.graph.node if node.op_type == "Softmax")
    node.op_type = "LogSoftmax"


def probabilities_for_logits(graph: Graph) -> None:
    """Return the softmax as both outputs."""
    rename_logits(graph)
    graph.graph.node.append(helper.make_node("Identity", [PROBABILITIES], [LOGITS]))


def rename_logits(graph: Graph) -> None:
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = ["raw_logits" if name == LOGITS else name for name in names]


def outputs_in_folder_order(graph: Graph) -> None:
    """Sort the outputs by class name, as a reader of class folders does; the metadata keeps our order."""
    rename_logits(graph)
    names = lively("vit").spec.labels.names
    order = np.array([names.index(name) for name in sorted(names)])
    graph.graph.initializer.append(numpy_helper.from_array(order, "order"))
    softmax = graph.graph.node.pop()
    softmax.input[0] = LOGITS
    graph.graph.node.extend([helper.make_node("Gather", ["raw_logits", "order"], [LOGITS], axis=1), softmax])


def names_in_folder_order(graph: Graph) -> None:
    """Sort the class names but not the outputs: the numbers alone do not show it."""
    spec = lively("vit").spec
    plain = spec.to_dict()
    plain["labels"] = sorted(plain["labels"])
    describe(graph, onnx_metadata(type(spec).from_dict(plain), precision="fp32", checkpoint_sha256=SHA256))


def another_checkpoint(graph: Graph) -> None:
    """Name another checkpoint as the origin of the same numbers."""
    describe(graph, onnx_metadata(lively("vit").spec, precision="fp32", checkpoint_sha256="f" * 64))


def describe(graph: Graph, properties: dict[str, str]) -> None:
    del graph.metadata_props[:]
    helper.set_model_props(graph, properties)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_attribute("Resize", mode="nearest"), id="nearest"),
        pytest.param(set_attribute("Resize", mode="cubic"), id="bicubic"),
        pytest.param(set_attribute("Resize", coordinate_transformation_mode="align_corners"), id="align_corners"),
        pytest.param(set_attribute("Resize", coordinate_transformation_mode="asymmetric"), id="asymmetric"),
        pytest.param(set_attribute("Softmax", axis=0), id="softmax_over_the_batch"),
        *(log_softmax, probabilities_for_logits, outputs_in_folder_order, names_in_folder_order, another_checkpoint),
    ],
)
def test_a_mistake_in_the_graph_is_rejected(change: Callable[[Graph], None], gate_of: Callable[[str], Gate]) -> None:
    graph = copied(graph_of("vit"))
    change(graph)
    onnx.checker.check_model(graph)
    assert not gate_of("vit").judge(graph).passed


# -- mistakes in the stored numbers of a PAtt-Lite


def one_weight(values: Floats) -> Floats:
    """Change the largest weight by a tenth."""
    values = values.copy()
    values.flat[np.abs(values).argmax()] *= np.float32(1.1)
    return values


def one_nan(values: Floats) -> Floats:
    values = values.copy()
    values.flat[0] = np.nan
    return values


def dropout_left_on(values: Floats) -> Floats:
    """Apply a fixed dropout mask, as exporters do with a network in training mode."""
    values = values.copy()
    values[:, ::7] = 0
    return values


def another_epoch(values: Floats) -> Floats:
    """Change all weights by a thousandth."""
    return values * (1 + 1e-3 * np.random.default_rng(0).normal(size=values.shape).astype(np.float32))


NUMBERS: dict[str, tuple[Callable[[str, tuple[int, ...]], bool], Callable[[Floats], Floats]]] = {
    "another mean": (lambda name, shape: "shift_C11" in name, lambda values: values - np.float32(0.05)),
    "divided by 255 twice": (lambda name, shape: "scale_C11" in name, lambda values: values / np.float32(255)),
    "BGR for RGB": (lambda name, shape: shape == (3, 1, 1), lambda values: values[::-1]),
    "another epoch": (lambda name, shape: len(shape) > 1 and shape != (3, 1, 1), another_epoch),
    "one weight of the attention": (lambda name, shape: shape == (32, 32), one_weight),
    "dropout left on": (lambda name, shape: "classifier" in name and len(shape) == 2, dropout_left_on),
    "one output for all pictures": (lambda name, shape: "classifier" in name and len(shape) == 2, np.zeros_like),
    "NaN": (lambda name, shape: "classifier" in name, one_nan),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_mistake_in_the_numbers_is_rejected(what: str, gate_of: Callable[[str], Gate]) -> None:
    which, change = NUMBERS[what]
    graph = copied(graph_of("patt_lite"))
    chosen = {
        name: values
        for name, values in constants(graph).items()
        if values.dtype == np.float32 and which(name, values.shape)
    }
    assert chosen
    for name, values in chosen.items():
        set_constant(graph, name, change(values))
    assert not gate_of("patt_lite").judge(graph).passed


# -- mistakes in the model before it is exported


class NoPreprocessing(nn.Module):
    """Return three channels of the picture as it is."""

    def forward(self, images_N1SS: Tensor) -> Tensor:
        return images_N1SS.float().expand(-1, 3, -1, -1)


def test_missing_preprocessing_is_rejected(gate_of: Callable[[str], Gate]) -> None:
    model = lively("patt_lite")
    model.preprocess = NoPreprocessing()  # type: ignore[assignment]
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
