"""Point 5: exports that are not the model, each a mistake that others have made; the gate must see every one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from export.graph import to_onnx
from fer_dist.errors import UserError
from fer_dist.models import FaceModel
from fer_dist.serve.artifact import LOGITS, PROBABILITIES, onnx_metadata
from fer_dist.serve.onnxfile import read_onnx
from tests.helpers.exporting import SHA256, Gate, lively
from tests.helpers.onnx_graphs import copied, graph_of

Graph = onnx.ModelProto
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gate]:
    return {arch: Gate(lively(arch), tmp_path_factory.mktemp(arch)) for arch in ("vit", "patt_lite", "vit_mae")}


@pytest.mark.parametrize("arch", ["vit", "patt_lite", "vit_mae"])
def test_the_model_itself_passes(arch: str, gates: dict[str, Gate]) -> None:
    """Or the tests below would pass with a gate that rejects everything."""
    report = gates[arch].judge(graph_of(arch))
    assert report.passed, report.reasons


# -- mistakes that can be made in the graph


def node_of(graph: Graph, kind: str, output: str | None = None) -> onnx.NodeProto:
    """The first node of a kind, or the one that makes `output`."""
    nodes: list[onnx.NodeProto] = list(graph.graph.node)
    return next(n for n in nodes if n.op_type == kind and (output is None or output in n.output))


def set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def resize(**attributes: object) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        for name, value in attributes.items():
            set_attribute(node_of(graph, "Resize"), name, value)

    return change


def softmax_over_the_batch(graph: Graph) -> None:
    set_attribute(node_of(graph, "Softmax", PROBABILITIES), "axis", 0)


def log_softmax(graph: Graph) -> None:
    node_of(graph, "Softmax", PROBABILITIES).op_type = "LogSoftmax"


def probabilities_for_logits(graph: Graph) -> None:
    """The two outputs are both the softmax."""
    rename_logits(graph)
    graph.graph.node.append(helper.make_node("Identity", [PROBABILITIES], [LOGITS]))


def rename_logits(graph: Graph) -> None:
    for node in graph.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == LOGITS:
                    names[i] = "raw_logits"


def folder_order(names: tuple[str, ...]) -> list[int]:
    """Where each name of the sorted list stands in ours."""
    return [names.index(name) for name in sorted(names)]


def labels_in_folder_order(graph: Graph) -> None:
    """The answers as a reader of class folders orders them; the metadata says ours."""
    rename_logits(graph)
    order = folder_order(lively("vit").spec.labels.names)
    graph.graph.initializer.append(numpy_helper.from_array(np.array(order), "order"))
    softmax = node_of(graph, "Softmax", PROBABILITIES)
    gather = helper.make_node("Gather", ["raw_logits", "order"], [LOGITS], axis=1)
    softmax.input[0] = LOGITS
    place = list(graph.graph.node).index(softmax)
    graph.graph.node.insert(place, gather)


def labels_named_in_folder_order(graph: Graph) -> None:
    """The answers are ours, the names are sorted: no number tells."""
    spec = lively("vit").spec
    plain = spec.to_dict()
    plain["labels"] = sorted(plain["labels"])
    del graph.metadata_props[:]
    other = onnx_metadata(type(spec).from_dict(plain), precision="fp32", checkpoint_sha256=SHA256)
    for key, value in other.items():
        graph.metadata_props.add(key=key, value=value)


def another_checkpoint(graph: Graph) -> None:
    """The same numbers by accident: it says itself that it is from elsewhere."""
    del graph.metadata_props[:]
    told = onnx_metadata(lively("vit").spec, precision="fp32", checkpoint_sha256="f" * 64)
    for key, value in told.items():
        graph.metadata_props.add(key=key, value=value)


def not_a_number(graph: Graph) -> None:
    """One weight of a trained network that overflowed."""
    tensor = next(t for t in graph.graph.initializer if "classifier" in t.name and t.data_type == TensorProto.FLOAT)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(resize(mode="nearest"), id="nearest"),
        pytest.param(resize(mode="cubic"), id="bicubic"),
        pytest.param(resize(coordinate_transformation_mode="align_corners"), id="align_corners"),
        pytest.param(resize(coordinate_transformation_mode="asymmetric"), id="asymmetric"),
        softmax_over_the_batch,
        log_softmax,
        probabilities_for_logits,
        labels_in_folder_order,
        labels_named_in_folder_order,
        another_checkpoint,
        not_a_number,
    ],
)
def test_mistakes_in_the_graph(change: Callable[[Graph], None], gates: dict[str, Gate]) -> None:
    graph = copied(graph_of("vit"))
    change(graph)
    onnx.checker.check_model(graph)
    report = gates["vit"].judge(graph)
    assert not report.passed
    assert report.reasons


# -- mistakes in its numbers


def changed(graph: Graph, which: Callable[[str, tuple[int, ...]], bool], change: Callable[[Floats], Floats]) -> int:
    """Change stored float32 tensors; how many."""
    count = 0
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and which(tensor.name, tuple(tensor.dims)):
            values = change(numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
            count += 1
    return count


def mean_wrong(graph: Graph) -> int:
    """Another network's mean."""
    return changed(graph, lambda name, dims: "shift_C11" in name, lambda values: values - 0.05)


def divided_twice(graph: Graph) -> int:
    """Pixels 0..1 that are divided by 255 once more."""
    return changed(graph, lambda name, dims: "scale_C11" in name, lambda values: values / np.float32(255))


def channels_swapped(graph: Graph) -> int:
    """BGR for RGB."""
    return changed(graph, lambda name, dims: dims == (3, 1, 1), lambda values: values[::-1])


def weights_of_another_epoch(graph: Graph) -> int:
    """They differ by a thousandth."""
    random = np.random.default_rng(0)

    def change(values: Floats) -> Floats:
        return (values * (1 + 1e-3 * random.normal(size=values.shape))).astype(np.float32)

    return changed(graph, lambda name, dims: len(dims) > 1 and dims != (3, 1, 1), change)


def one_weight(graph: Graph) -> int:
    """A single one of a layer in the middle, by a tenth."""

    def change(values: Floats) -> Floats:
        values = values.copy()
        values.flat[np.abs(values).argmax()] *= 1.1
        return values

    return changed(graph, lambda name, dims: dims == (32, 32), change)  # the attention's output projection


def dropout_left_on(graph: Graph) -> int:
    """A fixed mask: what exporters make of a network in training mode."""

    def change(values: Floats) -> Floats:
        values = values.copy()
        values[:, ::7] = 0
        return values

    return changed(graph, lambda name, dims: "classifier" in name and len(dims) == 2, change)


def blind(graph: Graph) -> int:
    """It answers the same to every picture, whatever it shows."""
    return changed(graph, lambda name, dims: "classifier" in name and len(dims) == 2, np.zeros_like)


@pytest.mark.parametrize(
    "change",
    [mean_wrong, divided_twice, channels_swapped, weights_of_another_epoch, one_weight, dropout_left_on, blind],
)
def test_mistakes_in_the_numbers(change: Callable[[Graph], int], gates: dict[str, Gate]) -> None:
    graph = copied(graph_of("patt_lite"))
    assert change(graph), "nothing was changed"
    report = gates["patt_lite"].judge(graph)
    assert not report.passed
    assert report.reasons


# -- mistakes that can be made in the model before it is exported


class NoPreprocessing(nn.Module):
    """Three channels of the picture as it is."""

    def forward(self, images_N1SS: Tensor) -> Tensor:
        return images_N1SS.float().expand(-1, 3, -1, -1)


def preprocessing_left_out(model: FaceModel) -> None:
    model.preprocess = NoPreprocessing()  # type: ignore[assignment]


def attention_across_the_batch(model: FaceModel) -> None:
    """As in the paper's code: the batch is taken for the sequence."""
    network: Any = model.network
    network.attention.batch_first = False
    attend = network._attend  # the same layer, as it is exported

    def across(patches_NPD: Tensor) -> tuple[Tensor, Tensor]:
        attended_PND, parts_PN = attend(patches_NPD.transpose(0, 1))
        return attended_PND.transpose(0, 1), parts_PN.transpose(0, 1)

    network._attend = across


@pytest.mark.parametrize("change", [preprocessing_left_out, attention_across_the_batch])
def test_mistakes_in_the_model(change: Callable[[FaceModel], None], gates: dict[str, Gate], tmp_path: Path) -> None:
    model = lively("patt_lite")
    change(model)
    report = gates["patt_lite"].judge_model(model.eval())
    assert not report.passed
    assert report.reasons
    if change is attention_across_the_batch:
        assert report.by_batch[1] > 1e-3, "of a batch of one it makes one patch"
        (tmp_path / "best.onnx").write_bytes(to_onnx(model, SHA256).SerializeToString())
        with pytest.raises(UserError, match="grows faster than the batch"):  # it need not even be asked
            read_onnx(tmp_path / "best.onnx")
    else:
        assert not gates["patt_lite"].judge(to_onnx(model, SHA256)).passed


def swap_channels(model: FaceModel) -> None:
    """BGR for RGB."""
    model.preprocess.scale_C11 = model.preprocess.scale_C11.flip(0)
    model.preprocess.shift_C11 = model.preprocess.shift_C11.flip(0)


def test_swapped_channels_of_equal_means_are_the_same_function(tmp_path: Path) -> None:
    """vit's three means and deviations are equal: three equal channels, and nothing to see."""
    model = lively("vit")
    assert len(set(model.spec.input.mean)) == len(set(model.spec.input.std)) == 1
    before_N3HW = model.preprocess(torch.arange(48 * 48).reshape(1, 1, 48, 48) % 256)
    swap_channels(model)
    after_N3HW = model.preprocess(torch.arange(48 * 48).reshape(1, 1, 48, 48) % 256)
    assert torch.equal(before_N3HW, after_N3HW)
    assert len(set(lively("patt_lite").spec.input.mean)) == 3, "the test above has three"


def mask(model: FaceModel) -> None:
    """Hugging Face's own masking: random noise hides three of four patches."""
    embeddings: Any = model.network.get_submodule("encoder.embeddings")
    del embeddings.random_masking
    assert type(embeddings).random_masking is ViTMAEEmbeddings.random_masking


def test_masking_left_on(gates: dict[str, Gate]) -> None:
    model = lively("vit_mae")
    mask(model)
    report = gates["vit_mae"].judge(to_onnx(model, SHA256))
    assert not report.passed


def test_another_enlargement_in_the_model(gates: dict[str, Gate]) -> None:
    """antialias of the other sort, float16 weights of pixels: whatever differs before the network."""

    class Enlarged(nn.Module):
        def __init__(self, before: nn.Module) -> None:
            super().__init__()
            self.before = before

        def forward(self, images_N1SS: Tensor) -> Tensor:
            small = F.interpolate(images_N1SS.float(), size=(32, 32), mode="bilinear")
            pixels: Tensor = self.before(F.interpolate(small, size=(48, 48), mode="bilinear"))
            return pixels

    model = lively("vit")
    model.preprocess = Enlarged(model.preprocess)  # type: ignore[assignment]
    assert not gates["vit"].judge(to_onnx(model, SHA256)).passed
