"""From a model to one ONNX graph: stored pictures in, logits, probabilities and, of some, attention out."""

import warnings
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel
from fer_dist.serve.artifact import ATTENTION, INPUT, LOGITS, PROBABILITIES, onnx_metadata
from fer_dist.spec import ModelSpec
from fer_dist.tensors import first_line

OPSET = 20
"""From 23 on `Attention` nodes appear, which ONNX Runtime's int8 and TensorRT for RTX's fp32 do not take."""
EXAMPLES = 2
"""Pictures that the exporter traces with: with one, a batch of one may be written into the graph."""


class Exported(nn.Module):
    """A model as it is exported: uint8 `[N, 1, S, S]` -> float32 logits and probabilities, `[N, K]` each.

    And where the architecture has one to show, the attention over its patches, `[N, h, w]`.
    """

    def __init__(self, model: FaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if not self.model.shows_attention:
            logits_NK = self.model(images).float()
            return logits_NK, logits_NK.softmax(1)
        logits_NK, attention_NHW = self.model.with_attention(images)
        logits_NK = logits_NK.float()
        return logits_NK, logits_NK.softmax(1), attention_NHW.float()


def to_onnx(model: FaceModel, checkpoint_sha256: str) -> onnx.ModelProto:
    """The float32 graph of a model, with a free batch size, checked, and with our contract in its metadata.

    Args:
        model: left in evaluation mode, in float32, with plain attention.
        checkpoint_sha256: of the file that the weights came from.

    Raises:
        UserError: torch's exporter does not take the network.
    """
    model.float().set_attn_implementation("eager")
    attends = model.shows_attention
    graph = trace(Exported(model).eval(), model.spec, attends=attends)
    properties = onnx_metadata(model.spec, precision="fp32", checkpoint_sha256=checkpoint_sha256, attends=attends)
    onnx.helper.set_model_props(graph, properties)
    check(graph, model.spec)
    return graph


def trace(exported: nn.Module, spec: ModelSpec, *, attends: bool = False) -> onnx.ModelProto:
    """What torch's exporter makes of pictures -> (logits, probabilities), or with attention as the third.

    Raises:
        UserError: it does not take the network.
    """
    side = spec.input.size
    images_N1SS = torch.zeros(EXAMPLES, 1, side, side, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            program = torch.onnx.export(
                exported,
                (images_N1SS,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[LOGITS, PROBABILITIES, *([ATTENTION] if attends else [])],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
            )
    except Exception as error:  # a thousand networks of timm, and whatever the exporter makes of them
        raise UserError(
            f"torch's ONNX exporter does not take {spec.arch}: {first_line(error)}", "another architecture"
        ) from error
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    _strip(graph)
    return graph


def check(graph: onnx.ModelProto, spec: ModelSpec) -> None:
    """onnx.checker with shape inference, and the shapes that the contract promises."""
    onnx.checker.check_model(graph, full_check=True)
    found = [_shape(value) for value in (*graph.graph.input, *graph.graph.output)]
    side, classes = spec.input.size, len(spec.labels)
    expected: list[tuple[str, list[Any]]] = [(INPUT, [1, side, side]), (LOGITS, [classes]), (PROBABILITIES, [classes])]
    if has_attention(graph):
        *_, (_, (_, *grid)) = found
        expected.append((ATTENTION, grid if [type(side) for side in grid] == [int, int] else ["h", "w"]))
    if [(name, dims[1:]) for name, dims in found] != expected or not all(isinstance(d[0], str) for _, d in found):
        raise UserError(
            f"torch's exporter made {found} of {spec.arch}, not {expected} with a free batch",
            "another architecture, or another version of torch",
        )


def has_attention(graph: onnx.ModelProto) -> bool:
    """Whether a graph has the output `attention`."""
    return any(output.name == ATTENTION for output in graph.graph.output)


def _shape(value: onnx.ValueInfoProto) -> tuple[str, list[Any]]:
    dims = value.type.tensor_type.shape.dim
    return value.name, [dim.dim_param if dim.HasField("dim_param") else dim.dim_value for dim in dims]


def _strip(graph: onnx.ModelProto) -> None:
    """Take the exporter's notes out: paths of this machine and lines of source, most of a small file."""
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    for tensor in graph.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del graph.graph.metadata_props[:]
