"""Engines of TensorRT: refused with the command that builds them again, or run on batches of any size."""

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fer_dist.errors import UserError
from fer_dist.serve import engine as engine_module
from fer_dist.serve import runner
from fer_dist.serve.artifact import INPUT, LOGITS, PROBABILITIES, read_sidecar, sidecar
from fer_dist.serve.engine import Engine, open_engine, quiet_log, recording_context
from fer_dist.spec import InputSpec
from tests.helpers.artifacts import CHECKPOINT, SIDE, SPEC, engine, expected_logits
from tests.helpers.tiny_models import pictures

FITS = {"backend": "tensorrt", "tensorrt": "11.0.1", "compute_capabilities": ["8.6"]}


class FakeContext:
    """Compute what `tiny_onnx` does, on the memory whose addresses it gets."""

    def __init__(self, *, works: bool = True) -> None:
        self.works = works
        self.batches: list[int] = []
        self.brightest: list[int] = []
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert (name, shape[1:]) == (INPUT, (1, SIDE, SIDE))
        self.batches.append(shape[0])
        return 1 <= shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        raw = ctypes.string_at(self.addresses[INPUT], self.batches[-1] * SIDE * SIDE)
        images = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, 1, SIDE, SIDE)
        self.brightest = images.amax((1, 2, 3)).tolist()
        logits = expected_logits(images)
        for name, output in ((LOGITS, logits), (PROBABILITIES, logits.softmax(1))):
            ctypes.memmove(self.addresses[name], output.numpy().tobytes(), 4 * output.numel())
        return self.works


def fake_engine(context: FakeContext | None = None) -> SimpleNamespace:
    """Return an engine of `tiny_onnx` for batches 1, 2, 4."""
    outputs = dict.fromkeys((LOGITS, PROBABILITIES), ("f", (-1, 7)))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {INPUT: ("uint8", (-1, 1, SIDE, SIDE)), **outputs}
    return SimpleNamespace(
        num_io_tensors=3,
        create_execution_context=lambda: context,
        get_tensor_name=list(tensors).__getitem__,
        get_tensor_dtype=lambda name: tensors[name][0],
        get_tensor_shape=lambda name: tensors[name][1],
        get_tensor_profile_shape=lambda name, profile: [(size, 1, SIDE, SIDE) for size in (1, 2, 4)],
    )


class FakeLogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Pretend a GPU of compute capability 8.6, and TensorRT 11.0.1 whose runtime makes `found` of any bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    package = SimpleNamespace(__version__="11.0.1", ILogger=FakeLogger, found=fake_engine())
    package.DataType = SimpleNamespace(UINT8="uint8", FLOAT="f")
    package.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda raw: package.found)
    monkeypatch.setattr(engine_module, "require", lambda module, extra: package)
    return package


def refused(words: str, path: Path) -> str:
    """Require that an engine is not opened for this reason, and return the advice."""
    with pytest.raises(UserError, match=words) as caught:
        open_engine(path)
    return caught.value.fix


LARGER, MORE = replace(SPEC, input=InputSpec(size=24, image_size=24)), (1, 2, 8)


@pytest.mark.parametrize(
    ("fields", "built", "words"),
    [
        ({"kind": "onnx"}, {}, "describes no engine"),
        ({"batch": ()}, {}, "describes no engine"),
        ({}, {"backend": "other"}, "of 'other', expected tensorrt or rtx"),
        ({}, {"backend": ["rtx"]}, "of \\['rtx'\\]"),
        ({}, {"tensorrt": "10.9.0"}, "TensorRT '10.9.0', here is '11.0.1'"),
        ({}, {"backend": "rtx"}, "TensorRT-RTX None, here"),
        ({}, {"compute_capabilities": ["8.9", "12.0"]}, "8.9.*this a GPU has 8.6"),
        ({}, {"compute_capabilities": "8.6"}, "has 8.6"),
        ({"spec": LARGER}, {}, r"has inputs and outputs .*-1, 1, 16, 16.* is about .*-1, 1, 24, 24"),
        ({"batch": MORE}, {}, r"for batches \(1, 2, 4\), .* \(1, 2, 8\)"),
    ],
)
@pytest.mark.usefixtures("package")
def test_an_engine_must_fit(fields: dict[str, Any], built: dict[str, Any], words: str, tmp_path: Path) -> None:
    fix = refused(words, engine(tmp_path, b"engine", built_with=FITS | built, **fields))
    assert f"python -m export.trt {tmp_path}/best.onnx --precision fp16" in fix
    assert ("--backend rtx" in fix) == ("RTX" in words)


def test_a_refusal_of_tensorrt_has_its_reason(package: SimpleNamespace, tmp_path: Path) -> None:
    package.found = None
    refused("TensorRT 11.0.1 on a GPU refuses .*: it gives no reason\n", engine(tmp_path, b"engine", built_with=FITS))
    log = quiet_log(package)
    log.log(FakeLogger.WARNING, "never mind")
    log.log(FakeLogger.ERROR, "wrong\nmagic")
    assert log.told() == "wrong magic"


@pytest.mark.usefixtures("package")
def test_an_engine_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice is one harmless command, though the name of the parent comes from a file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built = {"backend": "rtx", "tensorrt_rtx": "11.0.1"}
    path = engine(tmp_path, b"engine", parent="a; rm -rf ~ \x1b[31m.onnx", built_with=built)
    fix = refused("needs an NVIDIA GPU, and none is visible", path)
    assert "export.trt 'a; rm -rf ~ ?[31m.onnx' --precision fp16 --batch 1,2,4 --backend rtx" in fix


@pytest.mark.parametrize(("backend", "extra"), [("tensorrt", "tensorrt"), ("rtx", "tensorrt-rtx")])
def test_a_missing_package_is_named(backend: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, extra.replace("-", "_"), None)  # its import fails
    fix = refused("is not installed", engine(tmp_path, b"engine", built_with={"backend": backend}))
    assert f"fer-dist[{extra}]" in fix
    assert "python -m export.trt" in fix


def test_a_damaged_engine_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "require", lambda module, extra: pytest.fail("TensorRT was loaded"))
    path = engine(tmp_path, b"engine", built_with=FITS)
    for raw, words in ((b"engin", "has 5 bytes, .* is about 6"), (b"Engine", "SHA-256 differ")):
        path.write_bytes(raw)
        assert "python -m export.trt" in refused(words, path)
    path.unlink()
    refused("cannot read", path)
    path.mkdir()
    refused("no regular file", path)
    sidecar(path).unlink()
    refused(r"cannot read .*best.fp16.engine.json", path)


def opened(folder: Path, context: FakeContext | None, batch: tuple[int, int, int] = (1, 2, 4)) -> Engine:
    """Return an engine that computes on the CPU."""
    exported = read_sidecar(engine(folder, b"engine", batch=batch, built_with=FITS))
    return Engine(exported, "TensorRT on a stand-in", fake_engine(context), (), torch.device("cpu"))


def test_batches_of_any_size_fit_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the largest are split, those below the smallest are filled up with black pictures."""
    context = FakeContext()
    monkeypatch.setattr(runner, "open_engine", lambda path: opened(tmp_path, context))
    with runner.open_runner("best.engine") as found:
        assert (found.kind, found.runs_on, found.on_gpu) == ("engine", "TensorRT on a stand-in", True)
        assert (found.spec, found.precision, found.batch) == (SPEC, "fp16", (1, 2, 4))
        assert found.checkpoint_sha256 == CHECKPOINT
        for count in (1, 3, 4, 5, 11):
            images = pictures(count, SIDE)
            outputs = found.run(images)
            torch.testing.assert_close(outputs.logits_NK, expected_logits(images))
            torch.testing.assert_close(outputs.probabilities_NK, expected_logits(images).softmax(1))
        assert context.batches == [1, 3, 4, 4, 1, 4, 4, 3]
    context = FakeContext()
    stand_in = opened(tmp_path, context, (3, 3, 4))
    stand_in.infer(pictures(4, SIDE))  # leaves pictures in the memory
    torch.testing.assert_close(stand_in.infer(pictures(5, SIDE))[0], expected_logits(pictures(5, SIDE)))
    assert context.batches == [4, 4, 3]
    assert context.brightest[1:] == [0, 0], "filled up with black"


def test_what_tensorrt_does_not_execute_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not execute"):
        opened(tmp_path, FakeContext(works=False)).infer(pictures(1, SIDE))
    with pytest.raises(UserError, match="does not take a batch of 5"):
        opened(tmp_path, FakeContext(), (1, 5, 5)).infer(pictures(5, SIDE))
    with pytest.raises(UserError, match="too little memory"):
        opened(tmp_path, None)


# TensorRT for RTX, which needs no GPU for these


@pytest.mark.usefixtures("package")
def test_an_engine_that_cannot_be_deserialized(rtx_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real runtime without a GPU returns None, and its log goes into the error."""
    if torch.cuda.device_count():
        pytest.skip("there is a GPU: it would be deserialized")
    monkeypatch.setattr(engine_module, "require", lambda module, extra: pytest.importorskip(module))
    refused(r"TensorRT-RTX [\d.]+ on a GPU refuses .*: (?!it gives no reason)\S+", rtx_engine)


def test_tensorrt_for_rtx_records_by_itself() -> None:
    """The settings are those of the real package; the engine is a stand-in."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx", exc_type=ImportError)

    class Config:
        cuda_graph_strategy = rtx.CudaGraphStrategy.DISABLED
        dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.LAZY

    found = SimpleNamespace(create_runtime_config=Config, create_execution_context=lambda config: config)
    config = recording_context(found)
    assert config.cuda_graph_strategy == rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert config.dynamic_shapes_kernel_specialization_strategy == rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert {"cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"} <= set(dir(rtx.IRuntimeConfig))
    assert recording_context(SimpleNamespace(create_runtime_config=SimpleNamespace)) is None, "TensorRT"
    assert recording_context(SimpleNamespace()) is None, "TensorRT 10"
