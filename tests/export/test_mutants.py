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

from fer_dist.serve.artifact import onnx_metadata
from fer_dist.spec import LabelSet
from tests.helpers.exporting import copied, graph_of, judge, lively
from tests.helpers.onnx_graphs import constants, set_constant


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("Resize", "mode", "nearest"),
        ("Resize", "mode", "cubic"),
        ("Resize", "coordinate_transformation_mode", "align_corners"),
        ("Resize", "coordinate_transformation_mode", "asymmetric"),
        ("Softmax", "axis", 0),
    ],
)
def test_another_attribute_is_rejected(kind: str, name: str, value: object) -> None:
    """Of the only Resize, or of the softmax of the outputs."""
    graph = copied(graph_of("vit"))
    node = [node for node in graph.graph.node if node.op_type == kind][-1]
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    onnx.checker.check_model(graph)
    assert not judge("vit", graph).passed


def test_labels_in_folder_order_and_another_checkpoint_are_rejected() -> None:
    """Only the metadata names them: the numbers are the same."""
    graph, spec = copied(graph_of("vit")), lively("vit").spec
    spec = replace(spec, labels=LabelSet(names=tuple(sorted(spec.labels.names))))
    helper.set_model_props(graph, onnx_metadata(spec, precision="fp32", checkpoint_sha256="f" * 64))
    labels, checkpoint = judge("vit", graph).reasons
    assert labels.startswith("its labels are angry, ")
    assert checkpoint == f"it was made from checkpoint {'f' * 12}, not {'0' * 12}"


NAMES = lively("patt_lite").spec.labels.names
NUMBERS: dict[str, tuple[Callable[[str, tuple[int, ...]], bool], Callable[[NDArray[Any]], NDArray[Any]]]] = {
    "another_mean": (lambda name, shape: "shift_C11" in name, lambda values: values - 0.05),
    "bgr_for_rgb": (lambda name, shape: shape == (3, 1, 1), lambda values: values[::-1]),
    "another_epoch": (
        lambda name, shape: len(shape) > 1 and shape != (3, 1, 1),
        lambda values: values * (1 + 1e-3 * np.random.default_rng(0).normal(size=values.shape)),
    ),
    "largest_weight_of_the_attention": (
        lambda name, shape: shape == (32, 32),
        lambda values: np.where(np.abs(values) == np.abs(values).max(), 1.1 * values, values),
    ),
    "dropout_left_on": (
        lambda name, shape: "classifier" in name and len(shape) == 2,
        lambda values: values * (np.arange(values.shape[1]) % 7 > 0),
    ),
    "outputs_in_folder_order": (
        lambda name, shape: "classifier" in name,
        lambda values: values[sorted(range(7), key=lambda i: NAMES[i])],
    ),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_other_constants_are_rejected(what: str) -> None:
    chosen, change = NUMBERS[what]
    graph = copied(graph_of("patt_lite"))
    found = {name: values for name, values in constants(graph).items() if chosen(name, values.shape)}
    assert found
    for name, values in found.items():
        set_constant(graph, name, change(values))
    assert not judge("patt_lite", graph).passed


def test_masking_left_on_is_rejected() -> None:
    """Hugging Face's own masking hides three of four patches at random."""
    model = lively("vit_mae")
    embeddings: Any = model.network.get_submodule("encoder.embeddings")
    del embeddings.random_masking
    assert type(embeddings).random_masking is ViTMAEEmbeddings.random_masking
    assert not judge("vit_mae", model).passed


def test_attention_across_the_batch_is_rejected() -> None:
    """The paper's code takes the batch for the sequence."""
    model = lively("patt_lite")
    network: Any = model.network
    network.attention.batch_first = False
    attend = network._attend  # the same layer, as it is exported

    def across(patches_NPD: Tensor) -> tuple[Tensor, Tensor]:
        attended_PND, parts_PN = attend(patches_NPD.transpose(0, 1))
        return attended_PND.transpose(0, 1), parts_PN.transpose(0, 1)

    network._attend = across
    report = judge("patt_lite", model)
    assert not report.passed
    assert report.by_batch[1] > 1e-3, "of a batch of one it makes one patch"
