"""Small artifacts for tests: an ONNX graph by hand, a checkpoint with its export, an engine."""

from collections.abc import Callable
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

SIDE, CLASSES = 8, 7
SPEC = ModelSpec(arch="patt_lite", input=InputSpec(size=SIDE, image_size=SIDE))
CHECKPOINT = "c" * 64


def weights() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of the graph below: float32 `[64, 7]` and `[7]`, the same at every call."""
    generator = np.random.default_rng(0)
    return (
        generator.normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32),
        generator.normal(size=CLASSES).astype(np.float32),
    )


def expected_logits(images_N1SS: Tensor) -> Tensor:
    """What the graph below answers."""
    weight, bias = weights()
    return images_N1SS.reshape(len(images_N1SS), -1).float() / 255 @ torch.from_numpy(weight) + torch.from_numpy(bias)


def tiny_onnx(precision: Precision = "fp32") -> ModelProto:
    """One linear layer on 8 pixels, with everything that an ONNX file of ours has."""
    weight, bias = weights()
    nodes = [
        helper.make_node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["flattened"]),
        helper.make_node("Mul", ["flattened", "scale"], ["scaled"]),
        *_in_precision(precision),
        helper.make_node("Gemm", ["scaled" if precision == "fp32" else "precise", "weight", "bias"], [LOGITS]),
        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=1),
    ]
    stored = {
        "flat": np.array([0, SIDE * SIDE], dtype=np.int64),
        "scale": np.float32(1 / 255),
        "weight": weight,
        "bias": bias,
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
    """From `scaled` to `precise`: a pair of nodes that only a graph of that precision has."""
    if precision == "fp16":
        half = helper.make_node("Cast", ["scaled"], ["half"], to=TensorProto.FLOAT16)
        return [half, helper.make_node("Cast", ["half"], ["precise"], to=TensorProto.FLOAT)]
    if precision == "fp32":
        return []
    whole = helper.make_node("QuantizeLinear", ["scaled", "scale", "zero"], ["whole"])
    return [whole, helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["precise"])]


def write(folder: Path, model: ModelProto, name: str = "tiny.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def add(graph: GraphProto, *nodes: NodeProto, **stored: Any) -> None:
    """Put nodes before those of `tiny_onnx`, and arrays to what is stored."""
    kept = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items())


class Both(nn.Module):
    """A model whose second answer is the softmax of the first."""

    def __init__(self, model: FaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        logits_NK = self.model(images_N1SS)
        return logits_NK, logits_NK.softmax(1)


def trained(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of a tiny transformer, and the ONNX file of it as torch exports it."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = make_lively(tiny_model("vit", options={**sizes, "patch_size": 16})).eval()
    checkpoint, path = folder / "best.pth", folder / "best.onnx"
    save(checkpoint, Checkpoint(spec=model.spec, weights=model.state_dict(), config={}, record={}, provenance={}))
    model.set_attn_implementation("eager")
    program = torch.onnx.export(
        Both(model).eval(),
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
    properties = onnx_metadata(model.spec, precision="fp32", checkpoint_sha256=file_sha256(checkpoint))
    helper.set_model_props(graph, properties)
    path.write_bytes(graph.SerializeToString())
    return checkpoint, path


def rtx_engine(trt: Any, folder: Path, change: Callable[[dict[str, Any]], object] = lambda values: None) -> Path:
    """An engine of `tiny_onnx`, built without a GPU, with its sidecar."""
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
    return engine(folder, raw, change, built_with=built)


def engine(
    folder: Path, raw: bytes, change: Callable[[dict[str, Any]], object] = lambda values: None, **values: Any
) -> Path:
    """Any bytes as an engine, with a sidecar that fits; `change` makes it fit no more."""
    path = folder / "best.fp16.engine"
    path.write_bytes(raw)
    (folder / "best.onnx").touch()
    fields = {
        "kind": "engine",
        "precision": "fp16",
        "spec": SPEC,
        "batch": (1, 2, 4),
        "sha256": file_sha256(path),
        "bytes": len(raw),
        "checkpoint_sha256": CHECKPOINT,
        "parent": "best.onnx",
        "parent_sha256": "p" * 64,
        **values,
    }
    change(fields)
    sidecar(path).write_bytes(sidecar_json(ExportedModel(**fields)))
    return path


def external(tensor: TensorProto, location: str) -> None:
    """Let a tensor lie in another file."""
    tensor.raw_data = b""  # onnx wants to see that there were some
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
