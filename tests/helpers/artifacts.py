"""Small artifacts for tests: an ONNX graph by hand, a checkpoint with its export, an engine."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from fer_dist.engine.checkpoint import Checkpoint, save
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
from tests.helpers.exporting import exported, lively

node = helper.make_node
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
    in_precision = {
        "fp32": [node("Identity", ["scaled"], ["precise"])],
        "fp16": [
            node("Cast", ["scaled"], ["half"], to=TensorProto.FLOAT16),
            node("Cast", ["half"], ["precise"], to=TensorProto.FLOAT),
        ],
        "int8": [
            node("QuantizeLinear", ["scaled", "scale"], ["whole"]),
            node("DequantizeLinear", ["whole", "scale"], ["precise"]),
        ],
    }
    nodes = [
        node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT),
        node("Reshape", ["float", "flat"], ["flattened"]),
        node("Mul", ["flattened", "scale"], ["scaled"]),
        *in_precision[precision.removesuffix(".cpu")],
        node("Gemm", ["precise", "weight", "bias"], [LOGITS]),
        node("Softmax", [LOGITS], [PROBABILITIES], axis=1),
    ]
    stored = {"flat": np.array([0, SIDE * SIDE]), "scale": np.float32(1 / 255), "weight": _WEIGHT, "bias": _BIAS}
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


def write(folder: Path, model: ModelProto, name: str = "tiny.onnx") -> Path:
    """Write a graph as a file."""
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def saved(folder: Path, **fields: Any) -> Path:
    """Write best.pth of a tiny transformer; `fields` replace `config` or `record` of the checkpoint."""
    model, path = lively("vit"), folder / "best.pth"
    empty: dict[str, Any] = {"config": {}, "record": {}, "provenance": {}}
    save(path, Checkpoint(spec=model.spec, weights=model.state_dict(), **(empty | fields)))
    return path


def trained(folder: Path) -> tuple[Path, Path]:
    """Write best.pth of a tiny transformer, and best.onnx as it is exported."""
    checkpoint = saved(folder)
    return checkpoint, write(folder, exported(lively("vit"), file_sha256(checkpoint)), "best.onnx")


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
