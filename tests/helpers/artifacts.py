"""Small artifacts for tests: an ONNX graph by hand, a checkpoint with its export, an engine."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fer_dist.engine.checkpoint import Checkpoint, save
from fer_dist.models import FaceModel
from fer_dist.serve.artifact import (
    INPUT,
    LOGITS,
    PROBABILITIES,
    ExportedModel,
    Precision,
    file_sha256,
    onnx_metadata,
    sidecar,
    sidecar_json,
)
from fer_dist.spec import InputSpec, ModelSpec
from tests.helpers.tiny_models import make_lively, pictures, tiny_model

SIDE, CLASSES = 16, 7  # the smallest pictures that a data set may have
SPEC = ModelSpec(arch="patt_lite", input=InputSpec(size=SIDE, image_size=SIDE))
CHECKPOINT = "c" * 64
_WEIGHT = np.random.default_rng(0).normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32)
_BIAS = np.random.default_rng(1).normal(size=CLASSES).astype(np.float32)


def expected_logits(images_N1SS: Tensor) -> Tensor:
    """Return the logits of `tiny_onnx`."""
    return images_N1SS.reshape(len(images_N1SS), -1).float() / 255 @ torch.from_numpy(_WEIGHT) + torch.from_numpy(_BIAS)


def tiny_onnx(precision: Precision = "fp32") -> ModelProto:
    """Return one linear layer on pictures of SIDE x SIDE pixels, with everything that an ONNX file of fer_dist has."""
    nodes = [
        helper.make_node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["flattened"]),
        helper.make_node("Mul", ["flattened", "scale"], ["scaled"]),
        *_in_precision(precision),
        helper.make_node("Gemm", ["scaled" if precision == "fp32" else "precise", "weight", "bias"], [LOGITS]),
        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=1),
    ]
    stored: dict[str, Any] = {
        "flat": np.array([0, SIDE * SIDE], dtype=np.int64),
        "scale": np.float32(1 / 255),
        "weight": _WEIGHT,
        "bias": _BIAS,
    }
    if precision.startswith("int8"):
        stored["zero"] = np.uint8(0)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", CLASSES]) for name in (LOGITS, PROBABILITIES)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, onnx_metadata(SPEC, precision=precision, checkpoint_sha256=CHECKPOINT))
    return model


def _in_precision(precision: Precision) -> list[NodeProto]:
    """Return nodes from `scaled` to `precise` that only a graph of that precision has."""
    if precision == "fp32":
        return []
    if precision == "fp16":
        half = helper.make_node("Cast", ["scaled"], ["half"], to=TensorProto.FLOAT16)
        return [half, helper.make_node("Cast", ["half"], ["precise"], to=TensorProto.FLOAT)]
    whole = helper.make_node("QuantizeLinear", ["scaled", "scale", "zero"], ["whole"])
    return [whole, helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["precise"])]


def write(folder: Path, model: ModelProto, name: str = "tiny.onnx") -> Path:
    """Write a graph as a file."""
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def add(graph: GraphProto, *nodes: NodeProto, **stored: Any) -> None:
    """Put nodes before those of `tiny_onnx`, and arrays to what is stored."""
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items())


def external(tensor: TensorProto, location: str) -> None:
    """Let a tensor lie in another file."""
    tensor.raw_data = b""  # onnx wants to see that there were some
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")


class _WithProbabilities(nn.Module):
    """Return logits and their softmax."""

    def __init__(self, model: FaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        logits_NK = self.model(images_N1SS)
        return logits_NK, logits_NK.softmax(1)


def _tiny_vit() -> FaceModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return make_lively(tiny_model("vit", options={**sizes, "patch_size": 16})).eval()


@cache  # the exporter takes seconds
def _tiny_vit_onnx() -> ModelProto:
    model = _tiny_vit()
    model.set_attn_implementation("eager")
    program = torch.onnx.export(
        _WithProbabilities(model).eval(),
        (pictures(2),),
        dynamo=True,
        verbose=False,
        opset_version=20,
        input_names=[INPUT],
        output_names=[LOGITS, PROBABILITIES],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        external_data=False,
    )
    assert program is not None
    graph: ModelProto = program.model_proto
    return graph


def saved(folder: Path, **fields: Any) -> Path:
    """Write best.pth of a tiny transformer; `fields` replace `config` or `record` of the checkpoint."""
    model, path = _tiny_vit(), folder / "best.pth"
    empty: dict[str, Any] = {"config": {}, "record": {}, "provenance": {}}
    save(path, Checkpoint(spec=model.spec, weights=model.state_dict(), **(empty | fields)))
    return path


def trained(folder: Path) -> tuple[Path, Path]:
    """Write best.pth of a tiny transformer, and best.onnx as torch exports it."""
    checkpoint, graph = saved(folder), _tiny_vit_onnx()
    properties = onnx_metadata(_tiny_vit().spec, precision="fp32", checkpoint_sha256=file_sha256(checkpoint))
    helper.set_model_props(graph, properties)
    return checkpoint, write(folder, graph, "best.onnx")


def rtx_engine(trt: Any, folder: Path) -> Path:
    """Build an engine of `tiny_onnx` with TensorRT for RTX, which needs no GPU, and write its sidecar."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(tiny_onnx().SerializeToString())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((size, 1, SIDE, SIDE) for size in (1, 2, 4)))
    config.add_optimization_profile(profile)
    raw = bytes(builder.build_serialized_network(network, config))
    built = {"backend": "rtx", "tensorrt_rtx": trt.__version__, "compute_capabilities": []}
    return engine(folder, raw, built_with=built)


def engine(folder: Path, raw: bytes, **values: Any) -> Path:
    """Write any bytes as an engine with a sidecar; see `describe`."""
    path = folder / "best.fp16.engine"
    path.write_bytes(raw)
    (folder / "best.onnx").touch()
    return describe(path, **({"kind": "engine", "precision": "fp16", "batch": (1, 2, 4)} | values))


def describe(path: Path, **values: Any) -> Path:
    """Write a sidecar that fits an artifact of `tiny_onnx`, unless `values` replace fields of it."""
    fields: dict[str, Any] = {
        "spec": SPEC,
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "checkpoint_sha256": CHECKPOINT,
        "parent": "best.onnx",
        "parent_sha256": "p" * 64,
    }
    sidecar(path).write_bytes(sidecar_json(ExportedModel(**(fields | values))))
    return path
