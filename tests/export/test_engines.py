"""Engines: real builds with TensorRT for RTX, which needs no GPU; what is refused, and how the package is chosen."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from export import engines, trt
from export.engines import EngineBuilder, choose_builder
from export.precision import to_float16, to_int8
from fer_dist.errors import EXIT_USER_ERROR, UserError
from fer_dist.serve.artifact import LOGITS, PROBABILITIES
from fer_dist.spec import ModelSpec
from tests.helpers.exporting import command, lively, names, nothing_changes, saved
from tests.helpers.onnx_graphs import copied, graph_of, images

BATCH = (1, 8, 64)


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    """The package."""
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: no engine can be built here")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return lively("vit").spec


def graph_in(precision: str) -> onnx.ModelProto:
    """The tiny ViT."""
    graph = graph_of("vit")
    if precision == "fp16":
        return to_float16(graph, images(8))[0]
    if precision == "int8":
        passes = SimpleNamespace(passed=True, top1_agreement=1.0)
        return to_int8(graph, images(8), form="int8", judge=lambda candidate: passes)[0]
    return graph


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_of_each_precision(precision: str, rtx: ModuleType, spec: ModelSpec) -> None:
    builder = choose_builder("rtx", BATCH, ())
    raw, built = builder.build(graph_in(precision).SerializeToString(), "best.onnx", spec)
    assert len(raw) > 10_000
    assert built.pop("layers") > 50
    assert built == {"backend": "rtx", "tensorrt_rtx": rtx.__version__, "compute_capabilities": []}
    assert builder.told() == f"TensorRT-RTX {rtx.__version__}, for compute capability 8.0 and later"
    assert builder.executes == (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def test_named_gpus(rtx: ModuleType, spec: ModelSpec) -> None:
    """One engine for several; named twice is named once; fewer GPUs make a smaller file, or none does."""
    builder = choose_builder("rtx", (1, 1, 1), ("8.6", "8.9", "8.6"))
    raw, built = builder.build(graph_of("vit").SerializeToString(), "best.onnx", spec)
    assert built["compute_capabilities"] == ["8.6", "8.9"]
    assert "8.6, 8.9" in builder.told()
    assert raw != choose_builder("rtx", (1, 1, 1), ()).build(graph_of("vit").SerializeToString(), "x", spec)[0]


def test_an_unknown_gpu_is_refused(rtx: ModuleType) -> None:
    for name in ("9.9", "8", "sm86", "8.6 ", "nan"):
        with pytest.raises(UserError, match=f"{name} is no compute capability of TensorRT for RTX .* 8.6, 8.9") as told:
            choose_builder("auto", BATCH, (name,))
        assert told.value.fix == "--compute-capability 8.6,8.9"


def test_a_gpu_that_cannot_do_float32(rtx: ModuleType, spec: ModelSpec) -> None:
    """Turing has no kernel for it in TensorRT for RTX: an error that says what TensorRT says, not a crash."""
    builder = choose_builder("rtx", BATCH, ("7.5",))
    with pytest.raises(UserError, match=r"TensorRT-RTX .* builds no engine of best\.onnx: ") as told:
        builder.build(graph_of("vit").SerializeToString(), "best.onnx", spec)
    assert "does not say why" not in told.value.problem
    assert "another --precision, or --compute-capability of 8.0, 8.6" in told.value.fix


def no_probabilities(graph: onnx.ModelProto) -> None:
    del graph.graph.output[1]


def swapped(graph: onnx.ModelProto) -> None:
    first = copied_value(graph.graph.output[0])
    del graph.graph.output[0]
    graph.graph.output.append(first)


def fixed_batch(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def float_input(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def half_output(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("Cast", [PROBABILITIES], ["half"], to=TensorProto.FLOAT16))
    graph.graph.output[1].name = "half"
    graph.graph.output[1].type.tensor_type.elem_type = TensorProto.FLOAT16


def one_more_output(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("Identity", [LOGITS], ["more"]))
    graph.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 7]))


def copied_value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    found = onnx.ValueInfoProto()
    found.CopyFrom(value)
    return found


@pytest.mark.parametrize(
    "change", [no_probabilities, swapped, fixed_batch, float_input, half_output, one_more_output, None]
)
def test_another_network_is_refused(
    change: Callable[[onnx.ModelProto], None] | None, rtx: ModuleType, spec: ModelSpec
) -> None:
    """Whatever TensorRT makes of the graph has the inputs and outputs of the contract, or is none."""
    graph = copied(graph_of("vit"))
    builder = choose_builder("rtx", BATCH, ())
    if change is None:
        assert builder.build(graph.SerializeToString(), "best.onnx", spec)
        return
    change(graph)
    with pytest.raises(UserError, match=r"TensorRT-RTX .* (reads best\.onnx as|does not read best\.onnx)"):
        builder.build(graph.SerializeToString(), "best.onnx", spec)


def test_attention_stays_in_the_onnx_file(rtx: ModuleType) -> None:
    """An engine answers what it always did; the graph that it is built from has one output more."""
    graph = graph_of("patt_lite")
    assert len(graph.graph.output) == 3
    builder = choose_builder("rtx", BATCH, ())
    raw, _ = builder.build(graph.SerializeToString(), "best.onnx", lively("patt_lite").spec)
    assert len(raw) > 10_000


def test_what_tensorrt_does_not_read(rtx: ModuleType, spec: ModelSpec) -> None:
    """Bytes that are no graph are an empty network to it; an operator that it has not is an error that names it."""
    builder = choose_builder("rtx", BATCH, ())
    with pytest.raises(UserError, match=r"reads best\.onnx as \[\], expected"):
        builder.build(b"hello" * 100, "best.onnx", spec)
    graph = copied(graph_of("vit"))
    graph.graph.node.append(helper.make_node("Unheard", [LOGITS], ["more"], domain="of"))
    graph.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 7]))
    graph.opset_import.append(helper.make_opsetid("of", 1))
    with pytest.raises(UserError, match=r"does not read best\.onnx: .*Unheard") as told:
        builder.build(graph.SerializeToString(), "best.onnx", spec)
    assert told.value.fix == "another --precision or --backend"


# -- which package


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.6, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test / 3000")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def packages(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    """These two stand for TensorRT, and no other can be imported."""
    for name in ("tensorrt", "tensorrt_rtx"):
        capabilities = SimpleNamespace(SM75=0, SM86=1, SM89=2, SM120=3, NONE=4)
        found = SimpleNamespace(__name__=name, __version__="11.0", ComputeCapability=capabilities)
        monkeypatch.setitem(sys.modules, name, found if name in present else None)


def test_neither_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packages(monkeypatch)
    path = saved(tmp_path, "vit")
    with nothing_changes(tmp_path):
        assert command(trt.main, path) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert "fer-dist[tensorrt-rtx]" in err
    assert "fer-dist[tensorrt]" in err
    assert names(tmp_path) == ["best.pth"]


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, "tensorrt", "tensorrt_rtx")
    for backend in ("auto", "rtx"):
        assert chosen(choose_builder(backend, BATCH, ())) == ("rtx", (), False)
    with pytest.raises(UserError, match="only with a GPU") as told:
        choose_builder("tensorrt", BATCH, ())
    assert told.value.fix == "--backend rtx, which needs none"
    packages(monkeypatch, "tensorrt")
    with pytest.raises(UserError, match="'tensorrt_rtx' is not installed") as told:
        choose_builder("auto", BATCH, ())
    assert "tensorrt-rtx" in told.value.fix
    assert "fer-dist[tensorrt]" in told.value.fix


@pytest.mark.usefixtures("gpu")
def test_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native package first; engines of the other run here if they were built for this GPU as well."""
    packages(monkeypatch, "tensorrt", "tensorrt_rtx")
    for backend in ("auto", "tensorrt"):
        assert chosen(choose_builder(backend, BATCH, ())) == ("tensorrt", ("8.6",), True)
    assert chosen(choose_builder("rtx", BATCH, ())) == ("rtx", (), True)
    assert chosen(choose_builder("auto", BATCH, ("8.6", "8.9"))) == ("rtx", ("8.6", "8.9"), True)
    assert chosen(choose_builder("rtx", BATCH, ("8.9",))) == ("rtx", ("8.9",), False)
    with pytest.raises(UserError, match="TensorRT builds for this GPU"):
        choose_builder("tensorrt", BATCH, ("8.6",))
    packages(monkeypatch, "tensorrt_rtx")
    assert chosen(choose_builder("auto", BATCH, ())) == ("rtx", (), True)
    with pytest.raises(UserError, match="'tensorrt' is not installed"):
        choose_builder("tensorrt", BATCH, ())
    packages(monkeypatch)
    with pytest.raises(UserError, match="'tensorrt' is not installed; the package 'tensorrt_rtx' is not"):
        choose_builder("auto", BATCH, ())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("here", [(7, 5), (9, 0)])
def test_a_gpu_that_engines_for_rtx_are_not_for(here: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, "tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here)
    assert chosen(choose_builder("rtx", BATCH, ())) == ("rtx", (), False)


def chosen(builder: EngineBuilder) -> tuple[str, tuple[str, ...], bool]:
    return builder.backend, builder.compute_capabilities, builder.executes


# -- the native way, as far as it can be followed without a GPU


class Config:
    """Of a builder of TensorRT: notes what it is told."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse, self.told = refuse, list[Any]()

    def clear_flag(self, flag: Any) -> None:
        self.told.append(("clear", flag))

    def create_timing_cache(self, raw: bytes) -> bytes | None:
        return None if raw == b"damaged" else raw

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if self.refuse and cache:
            return False
        self.told.append(("cache", cache, ignore_mismatch))
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"measured")

    def add_optimization_profile(self, profile: Any) -> int:
        self.told.append(("profile", profile))
        return 0


def native(config: Config, strongly_typed: int) -> Any:
    """A stand-in for the package, with the calls that versions 10 and 11 have in common."""
    shapes = {"images": (-1, 1, 48, 48), "logits": (-1, 7), "probabilities": (-1, 7)}
    kinds = {"images": "uint8", "logits": "float", "probabilities": "float"}
    tensors = [SimpleNamespace(name=name, dtype=kinds[name], shape=shape) for name, shape in shapes.items()]
    network = SimpleNamespace(
        num_inputs=1, num_outputs=2, num_layers=9, get_input=lambda i: tensors[i], get_output=lambda i: tensors[i + 1]
    )
    asked: list[int] = []

    def create_network(flags: int) -> Any:
        asked.append(flags)
        return network

    builder = SimpleNamespace(
        create_network=create_network,
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *shapes: config.told.append(shapes)),
        build_serialized_network=lambda network, config: memoryview(b"engine"),
    )
    severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)
    return SimpleNamespace(
        __version__="10.9",
        asked=asked,
        ILogger=type("ILogger", (), {"Severity": severity}),
        Builder=lambda log: builder,
        OnnxParser=lambda network, log: SimpleNamespace(parse=lambda raw: raw == b"graph"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=strongly_typed),
        BuilderFlag=SimpleNamespace(TF32="tf32"),
        DataType=SimpleNamespace(UINT8="uint8", FLOAT="float"),
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("version", "flag"), [("10", 1), ("11", 0)])
@pytest.mark.parametrize("kept", ["nothing", "measured", "damaged", "of another GPU"])
def test_a_native_build(
    version: str, flag: int, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ModelSpec
) -> None:
    """Strongly typed by each version's own number; no TF32; one profile; measurements kept, damaged ones left."""
    monkeypatch.setenv("FER_DIST_CACHE", str(tmp_path))
    path = engines.timing_cache("10.9")
    assert path == tmp_path / "tensorrt" / "10.9-NVIDIA-Test-3000.timing"
    if kept != "nothing":
        path.parent.mkdir()
        path.write_bytes(kept.encode())
    config = Config(refuse=kept == "of another GPU")
    package = native(config, flag)
    builder = EngineBuilder(backend="tensorrt", trt=package, batch=BATCH, compute_capabilities=("8.6",), executes=True)
    raw, built = builder.build(b"graph", "best.onnx", spec)
    assert raw == b"engine"
    assert package.asked == [1 << flag]
    assert config.told[0] == ("clear", "tf32")
    assert config.told[1] == ("images", (1, 1, 48, 48), (8, 1, 48, 48), (64, 1, 48, 48))
    assert config.told[-1] == ("cache", b"measured" if kept == "measured" else b"", False)
    assert path.read_bytes() == b"measured"
    assert built == {
        "backend": "tensorrt",
        "tensorrt": "10.9",
        "compute_capabilities": ["8.6"],
        "layers": 9,
        "gpu": "NVIDIA Test / 3000",
    }


@pytest.mark.usefixtures("gpu")
def test_measurements_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> None:
    """The engine is there; the next build takes longer, that is all."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FER_DIST_CACHE", str(tmp_path / "file"))
    builder = EngineBuilder(
        backend="tensorrt", trt=native(Config(), 0), batch=BATCH, compute_capabilities=("8.6",), executes=True
    )
    assert builder.build(b"graph", "best.onnx", spec)[0] == b"engine"
