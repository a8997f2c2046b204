"""Engines: real builds with TensorRT for RTX, which needs no GPU; what is refused, and how the package is chosen."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import onnx
import pytest
import torch
from onnx import TensorProto

from export.engines import EngineBuilder, choose_builder
from fer_dist.errors import UserError
from fer_dist.serve.artifact import INPUT, LOGITS, PROBABILITIES
from fer_dist.spec import ModelSpec
from tests.helpers.artifacts import SIDE, SPEC, tiny_onnx
from tests.helpers.commands import Patch
from tests.helpers.exporting import graph_of, lively
from tests.helpers.onnx_graphs import half_of, int8_of

BATCH = (1, 8, 64)


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    """The package."""
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: no engine can be built here")  # type: ignore[no-any-return]


def build(
    *capabilities: str, graph: onnx.ModelProto | None = None, spec: ModelSpec = SPEC
) -> tuple[bytes, dict[str, Any], EngineBuilder]:
    """Build an engine of a tiny graph, or of another one with the same inputs and outputs."""
    builder = choose_builder("rtx", BATCH, capabilities)
    return *builder.build((graph or tiny_onnx()).SerializeToString(), "best.onnx", spec), builder


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "with attention"])
def test_an_engine_of_each_precision(precision: str, rtx: ModuleType) -> None:
    """Attention, which is an output of the graph, is no output of the engine."""
    arch = "patt_lite" if precision == "with attention" else "vit"
    graph = {"fp16": half_of("vit")[0], "int8": int8_of("vit", "int8")[0]}.get(precision, graph_of(arch))
    assert len(graph.graph.output) == (3 if precision == "with attention" else 2)
    raw, built, builder = build(graph=graph, spec=lively(arch).spec)
    assert len(raw) > 10_000
    assert built.pop("layers") > 50
    assert built == {"backend": "rtx", "tensorrt_rtx": rtx.__version__, "compute_capabilities": []}
    assert builder.told() == f"TensorRT-RTX {rtx.__version__}, for compute capability 8.0 and later"
    assert builder.executes == (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def test_named_gpus(rtx: ModuleType) -> None:
    """One engine for several; one that is named twice counts once."""
    raw, built, builder = build("8.6", "8.9", "8.6")
    assert built["compute_capabilities"] == ["8.6", "8.9"]
    assert "8.6, 8.9" in builder.told()
    assert raw != build()[0]


def test_a_gpu_that_tensorrt_does_not_build_for_is_refused(rtx: ModuleType) -> None:
    for name in ("9.9", "8", "8.6 "):
        with pytest.raises(UserError, match=f"{name} is no compute capability of TensorRT for RTX .* 8.6, 8.9"):
            choose_builder("auto", BATCH, (name,))
    # Turing has no kernel for float32 in TensorRT for RTX; the error quotes TensorRT.
    with pytest.raises(UserError, match=r"TensorRT-RTX .* builds no engine of best\.onnx: (?!.*does not say)") as found:
        build("7.5")
    assert "another --precision, or --compute-capability of 8.0, 8.6" in found.value.fix


CHANGES: dict[str, Callable[[onnx.GraphProto], object]] = {
    "no probabilities": lambda graph: graph.output.pop(),
    "outputs swapped": lambda graph: graph.output.append(graph.output.pop(0)),
    "fixed batch": lambda graph: setattr(graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 2),
    "float32 input": lambda graph: setattr(graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT),
    "unknown operator": lambda graph: setattr(graph.node[-1], "op_type", "Unheard"),
    "no graph": lambda graph: graph.Clear(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_network_is_refused(what: str, rtx: ModuleType) -> None:
    """Whatever TensorRT makes of the graph has the inputs and outputs of the contract."""
    graph = tiny_onnx()
    CHANGES[what](graph.graph)
    reason = {"unknown operator": "does not read best.onnx: .*Unheard", "no graph": r"as \[\], expected"}
    with pytest.raises(UserError, match=f"TensorRT-RTX .*{reason.get(what, 'reads best.onnx as .* expected')}"):
        build(graph=graph)


# -- which package


@pytest.fixture
def gpu(monkeypatch: Patch) -> None:
    """A GPU of compute capability 8.6, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test / 3000")


def packages(monkeypatch: Patch, *present: str) -> None:
    """These two stand for TensorRT, and no other can be imported."""
    capabilities = SimpleNamespace(SM75=0, SM86=1, SM89=2, SM120=3, NONE=4)
    for name in ("tensorrt", "tensorrt_rtx"):
        found = SimpleNamespace(__name__=name, __version__="11.0", ComputeCapability=capabilities)
        monkeypatch.setitem(sys.modules, name, found if name in present else None)


def chosen(backend: str, *capabilities: str) -> tuple[str, tuple[str, ...], bool]:
    builder = choose_builder(backend, BATCH, capabilities)
    return builder.backend, builder.compute_capabilities, builder.executes


def test_without_a_gpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    packages(monkeypatch, "tensorrt", "tensorrt_rtx")
    for backend in ("auto", "rtx"):
        assert chosen(backend) == ("rtx", (), False)
    with pytest.raises(UserError, match="only with a GPU"):
        chosen("tensorrt")
    packages(monkeypatch, "tensorrt")
    with pytest.raises(UserError, match="'tensorrt_rtx' is not installed") as found:
        chosen("auto")
    assert "'fer-dist[tensorrt-rtx]' (with or without a GPU), or 'fer-dist[tensorrt]'" in found.value.fix


def test_with_a_gpu(gpu: None, monkeypatch: Patch) -> None:
    """The native package first; engines of the other run here if they were built for this GPU as well."""
    packages(monkeypatch, "tensorrt", "tensorrt_rtx")
    for backend in ("auto", "tensorrt"):
        assert chosen(backend) == ("tensorrt", ("8.6",), True)
    assert chosen("rtx") == ("rtx", (), True)
    assert chosen("auto", "8.6", "8.9") == ("rtx", ("8.6", "8.9"), True)
    assert chosen("rtx", "8.9") == ("rtx", ("8.9",), False)
    with pytest.raises(UserError, match="TensorRT builds for this GPU"):
        chosen("tensorrt", "8.6")
    packages(monkeypatch, "tensorrt_rtx")
    assert chosen("auto") == ("rtx", (), True)
    for unknown in ((7, 5), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda unknown=unknown: unknown)
        assert chosen("rtx") == ("rtx", (), False)
    with pytest.raises(UserError, match="'tensorrt' is not installed"):
        chosen("tensorrt")
    packages(monkeypatch)
    with pytest.raises(UserError, match="'tensorrt' is not installed; the package 'tensorrt_rtx' is not"):
        chosen("auto")


# -- the native way, as far as it can be followed without a GPU


def native(strongly_typed: int) -> tuple[Any, Mock, Mock]:
    """Stand in for the package, with the calls that versions 10 and 11 have in common; its builder; a configuration."""
    shapes = {INPUT: (-1, 1, SIDE, SIDE), LOGITS: (-1, 7), PROBABILITIES: (-1, 7)}
    tensors = [
        SimpleNamespace(name=name, dtype="uint8" if name == INPUT else "float", shape=shape)
        for name, shape in shapes.items()
    ]
    network = SimpleNamespace(
        num_inputs=1, num_outputs=2, num_layers=9, get_input=lambda i: tensors[i], get_output=lambda i: tensors[i + 1]
    )
    caches = ("create_timing_cache", "set_timing_cache", "get_timing_cache")
    config = Mock(spec=["clear_flag", "add_optimization_profile", *caches])
    config.add_optimization_profile.return_value = 0
    config.create_timing_cache = lambda raw: None if raw == b"damaged" else raw
    config.set_timing_cache.side_effect = lambda cache, ignore_mismatch: cache != b"of another GPU"
    config.get_timing_cache.return_value.serialize.return_value = b"measured"
    calls = ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network")
    builder = Mock(spec=calls)
    builder.create_network.return_value = network
    builder.create_builder_config.return_value = config
    builder.build_serialized_network.return_value = b"engine"
    trt = SimpleNamespace(
        __version__="10.9",
        ILogger=type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)}),
        Builder=lambda log: builder,
        OnnxParser=lambda network, log: SimpleNamespace(parse=lambda raw: raw == b"graph"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=strongly_typed),
        BuilderFlag=SimpleNamespace(TF32="tf32"),
        DataType=SimpleNamespace(UINT8="uint8", FLOAT="float"),
    )
    return trt, builder, config


@pytest.mark.parametrize(("flag", "kept"), [(1, None), (0, b"measured"), (0, b"damaged"), (0, b"of another GPU")])
def test_a_native_build(flag: int, kept: bytes | None, gpu: None, tmp_path: Path, monkeypatch: Patch) -> None:
    """Strongly typed (flag 1 in TensorRT 10, 0 in 11), no TF32, one profile; a timing cache that fits is used."""
    monkeypatch.setenv("FER_DIST_CACHE", str(tmp_path))
    path = tmp_path / "tensorrt" / "10.9-NVIDIA-Test-3000.timing"
    if kept:
        path.parent.mkdir()
        path.write_bytes(kept)
    trt, parts, config = native(flag)
    builder = EngineBuilder(backend="tensorrt", trt=trt, batch=BATCH, compute_capabilities=("8.6",), executes=True)
    raw, built = builder.build(b"graph", "best.onnx", SPEC)
    assert raw == b"engine"
    parts.create_network.assert_called_once_with(1 << flag)
    config.clear_flag.assert_called_once_with("tf32")
    profile = config.add_optimization_profile.call_args.args[0]
    profile.set_shape.assert_called_once_with(INPUT, *((size, 1, SIDE, SIDE) for size in BATCH))
    config.set_timing_cache.assert_called_with(kept if kept == b"measured" else b"", ignore_mismatch=False)
    assert path.read_bytes() == b"measured"
    about = {"tensorrt": "10.9", "compute_capabilities": ["8.6"], "layers": 9, "gpu": "NVIDIA Test / 3000"}
    assert built == {"backend": "tensorrt", **about}
    monkeypatch.setenv("FER_DIST_CACHE", str(path))  # a cache that cannot be written only makes the next build longer
    assert builder.build(b"graph", "best.onnx", SPEC)[0] == b"engine"
