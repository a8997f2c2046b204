"""Checkpoints, ONNX files and engines run behind one interface; what does not run here is refused with a reason."""

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from fer_dist.engine.checkpoint import load, write_safetensors
from fer_dist.engine.score import score
from fer_dist.errors import UserError
from fer_dist.serve import engine as engine_module
from fer_dist.serve.artifact import INPUT, LOGITS, PROBABILITIES, Precision, file_sha256, read_sidecar, sidecar
from fer_dist.serve.engine import Engine, open_engine, recording_context
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.ortsession import bound, open_session
from fer_dist.serve.runner import Outputs, Runner, open_runner
from fer_dist.spec import InputSpec
from fer_dist.world import World
from tests.helpers.artifacts import CHECKPOINT, SIDE, SPEC, engine, expected_logits, rtx_engine, tiny_onnx, write
from tests.helpers.tiny_models import pictures

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def small(count: int) -> Tensor:
    """Return random pictures for the graph made by hand."""
    return torch.randint(0, 256, (count, 1, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def refused(words: str, path: Path, **settings: Any) -> str:
    """Require that a file is not opened for this reason, and return the advice."""
    with pytest.raises(UserError, match=words) as caught:
        open_runner(path, **settings)
    return caught.value.fix


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path, tiny_onnx())


# All kinds of files


@pytest.mark.parametrize("name", ["best.pth", "best.onnx", "best.safetensors"])
def test_every_kind_of_file_runs_alike(name: str, exported: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, graph = exported
    if name == "best.safetensors":
        write_safetensors(tmp_path / name, load(checkpoint))
    path = tmp_path / name if name == "best.safetensors" else checkpoint.with_name(name)
    model = load(checkpoint).model()
    batches = [(pictures(5), torch.arange(5)), (pictures(3), torch.arange(3))]
    with open_runner(path, device="cpu", provider="cpu") as runner:
        for count in (1, 2, 3, 7, 64):
            images = pictures(count)
            with torch.no_grad():
                expected = model(images)
            found = runner.run(images)
            for part in (found.logits_NK, found.probabilities_NK):
                assert (part.shape, part.dtype, part.device.type) == ((count, 7), torch.float32, "cpu")
            torch.testing.assert_close(found.logits_NK, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.probabilities_NK, expected.softmax(1), atol=1e-6, rtol=0)
        runner.run(255 - images)
        torch.testing.assert_close(found.logits_NK, expected, atol=1e-5, rtol=0, msg="the output is a copy")
        found.logits_NK.add_(1)  # not an inference tensor
        assert score(runner, batches, World(), classes=7).confusion_KK.sum() == 8
        assert (runner.spec, runner.precision, runner.batch) == (model.spec, "fp32", ())
        assert runner.kind == ("onnx" if path == graph else "pth")
        assert runner.checkpoint_sha256 == file_sha256(checkpoint if path == graph else path)
        assert runner.capture(pictures(2)) is None, "a CPU records no graphs"
    runner.close()  # a second time
    with pytest.raises(UserError, match="is closed"):
        runner.run(pictures(1))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 1, SIDE, SIDE), dtype=np.uint8), "ndarray, expected a torch.Tensor"),
        (torch.zeros(1, 1, SIDE, SIDE), r"float32 \[1, 1, 16, 16\], expected uint8 \[N, 1, 16, 16\]"),
        (torch.zeros(1, 1, 48, 48, dtype=torch.uint8), r"uint8 \[1, 1, 48, 48\]"),
        (torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), r"uint8 \[1, 3, 16, 16\]"),
        (torch.zeros(SIDE, SIDE, dtype=torch.uint8), r"uint8 \[16, 16\]"),
        (torch.zeros(0, 1, SIDE, SIDE, dtype=torch.uint8), "no pictures"),
    ],
)
def test_invalid_pictures_are_refused(images: Any, words: str, tiny: Path) -> None:
    with open_runner(tiny) as runner, pytest.raises(UserError, match=words):
        runner.run(images)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("model.pt2", {}, "none of .pth, .safetensors, .onnx and .engine"),
        ("none.onnx", {}, "cannot read .*none.onnx"),
        ("none.pth", {}, "cannot read .*none.pth"),
        ("none.engine", {}, r"cannot read .*none.engine.json"),
        ("tiny.onnx", {"provider": "rocm"}, "provider is 'rocm', expected auto, cpu, cuda, tensorrt"),
        ("tiny.onnx", {"device": "tpu"}, "device is 'tpu'"),
        ("tiny.onnx", {"threads": 0}, "threads is 0"),
        ("tiny.onnx", {"threads": 10**6}, "threads is 1000000"),
    ],
)
def test_invalid_files_and_settings_are_refused(name: str, settings: dict[str, Any], words: str, tiny: Path) -> None:
    refused(words, tiny.with_name(name), **settings)


def test_out_of_memory_is_an_error_of_the_batch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runner(tiny) as runner:
        monkeypatch.setattr(type(runner), "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(UserError, match="no memory for 2 pictures"):
            runner.run(small(2))


def test_a_runner_sets_the_threads_of_torch_while_it_is_open(exported: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    with open_runner(exported[0], threads=before + 1) as runner:
        runner.run(pictures(1))
        assert torch.get_num_threads() == before + 1
        assert runner.runs_on == f"torch cpu, {before + 1} threads"
        torch.set_num_threads(before)
        runner.run(pictures(1))  # another runner has set them since
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# Providers of ONNX Runtime


def test_a_requested_gpu_is_required(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("no CUDA device", exported[0], device="cuda")
    for name in ("cuda", "tensorrt"):
        refused(f"provider {name} needs a GPU", exported[1], provider=name)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("real", f"cuda was asked for, but ONNX Runtime runs {CPU}|does not take|is not installed"),
        ("falls back", f"cuda was asked for, but ONNX Runtime runs {CPU}"),
        ("fails", rf"{CUDA} does not take .*no libcudnn.so"),
    ],
)
def test_a_provider_that_does_not_start_is_noticed(
    how: str, words: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists CUDA as available and takes the CPU without a word: an error if it was requested by name."""
    if how == "real" and torch.cuda.device_count():
        pytest.skip("there is a GPU: nothing to pretend")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    made = onnxruntime.InferenceSession

    def session(raw: Any, options: Any, providers: list[Any], **more: Any) -> Any:
        if how == "fails" and len(providers) > 1:
            raise RuntimeError("no libcudnn.so")
        return made(raw, options, providers=providers if how == "real" else providers[-1:], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    refused(words, tiny, provider="cuda")
    if how == "real":
        refused(words.replace("cuda was", "tensorrt was"), tiny, provider="tensorrt")
    with open_runner(tiny) as runner:
        assert (runner.runs_on, runner.on_gpu) == (CPU, False)
        torch.testing.assert_close(runner(small(2)), expected_logits(small(2)))


@pytest.mark.parametrize(
    ("precision", "provider", "disabled"),
    [("fp32", CUDA, []), ("fp16", CUDA, ["NchwcTransformer"]), ("int8", CUDA, []), ("int8.cpu", CPU, [])],
)
def test_how_a_session_is_made(
    precision: Precision, provider: str, disabled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU: int8.cpu was judged on a CPU, and on float16 one optimizer crashes the process."""
    seen: list[tuple[Any, Any, Any, dict[str, Any]]] = []
    made = onnxruntime.InferenceSession

    def session(raw: Any, options: Any, providers: list[Any], **more: Any) -> Any:
        seen.append((raw, options, providers[0], more))
        return made(raw, options, providers=providers[-1:], **more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with open_runner(write(tmp_path, tiny_onnx(precision)), threads=2) as runner:
        assert runner.precision == precision
    ((raw, options, first, more),) = seen
    assert isinstance(raw, bytes), "a path could lead to another file by now"
    assert first == (provider if provider == CPU else (provider, {"use_tf32": "0"}))
    assert options.intra_op_num_threads == 2
    assert (more["disabled_optimizers"], more["enable_fallback"]) == (disabled, 0)


def test_errors_of_onnx_runtime_are_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\nkernel")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", fail)
        refused(f"{CPU} does not take .*tiny.onnx: no\n", tiny, provider="cpu")
    odd = [np.zeros((1, 7), dtype=np.float32), np.zeros((2, 7), dtype=np.float32)]
    with open_runner(tiny) as runner:
        for run, words in ((fail, r"with 2 pictures: no\n"), (lambda *_: odd, r"answers \[1, 7\] and \[2, 7\]")):
            monkeypatch.setattr(runner, "_session", SimpleNamespace(run=run))
            with pytest.raises(UserError, match=words):
                runner.run(small(2))


def test_a_session_on_fixed_memory_reads_that_memory(exported: tuple[Path, Path]) -> None:
    """CUDA graphs are recorded so; on a CPU, the memory of the pictures is the CPU's."""
    with open_runner(exported[1], provider="cpu") as runner:
        images = pictures(5)
        session = open_session(read_onnx(exported[1]).serialized(), "fp32", exported[1], "cpu", None)
        work = bound(session, images, len(runner.spec.labels))
        before = work().clone()
        torch.testing.assert_close(before, runner(images))
        images.copy_(pictures(5).flip(0))
        torch.testing.assert_close(work(), before.flip(0))


# Engines


class FakeContext:
    """Compute what `tiny_onnx` does, on the memory whose addresses it gets."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seen: list[list[int]] = []
        self.addresses: dict[str, int] = {}
        self.works = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert (name, shape[1:]) == (INPUT, (1, SIDE, SIDE))
        self.batches.append(shape[0])
        return 1 <= shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        count = self.batches[-1]
        images = self._at(INPUT, ctypes.c_uint8, (count, 1, SIDE, SIDE))
        logits = expected_logits(torch.from_numpy(images.copy()))
        self.seen.append(images.reshape(count, -1).max(1).tolist())
        self._at(LOGITS, ctypes.c_float, logits.shape)[:] = logits.numpy()
        self._at(PROBABILITIES, ctypes.c_float, logits.shape)[:] = logits.softmax(1).numpy()
        return self.works

    def _at(self, name: str, kind: Any, shape: tuple[int, ...]) -> Any:
        array = np.ctypeslib.as_array((kind * int(np.prod(shape))).from_address(self.addresses[name]))
        return array.reshape(shape)


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


def fake_tensorrt(found: SimpleNamespace | None) -> SimpleNamespace:
    """Return a package whose runtime makes `found` of any bytes."""
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda raw: found)
    types = SimpleNamespace(UINT8="uint8", FLOAT="f")
    return SimpleNamespace(__version__="11.0.1", ILogger=FakeLogger, Runtime=lambda log: runtime, DataType=types)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a GPU of compute capability 8.6, and TensorRT 11.0.1 with an engine of `tiny_onnx`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(engine_module, "require", lambda module, extra: fake_tensorrt(fake_engine()))


FITS = {"backend": "tensorrt", "tensorrt": "11.0.1", "compute_capabilities": ["8.6"]}
LARGER, MORE = (replace(SPEC, input=InputSpec(size=24, image_size=24)), (1, 2, 8))


@pytest.mark.parametrize(
    ("fields", "built", "words"),
    [
        ({"kind": "onnx"}, {}, "describes no engine"),
        ({"batch": ()}, {}, "describes no engine"),
        ({"sha256": "0" * 64}, {}, "SHA-256 differ"),
        ({"bytes": 5}, {}, "has 6 bytes, .* is about 5"),
        ({}, {"backend": "other"}, "of 'other', expected tensorrt or rtx"),
        ({}, {"backend": ["rtx"]}, "of \\['rtx'\\]"),
        ({}, {"tensorrt": "10.9.0"}, "TensorRT '10.9.0', here is '11.0.1'"),
        ({}, {"tensorrt": None}, "TensorRT None"),
        ({}, {"backend": "rtx"}, "TensorRT-RTX None, here"),
        ({}, {"compute_capabilities": ["8.9", "12.0"]}, "8.9.*this a GPU has 8.6"),
        ({}, {"compute_capabilities": "8.6"}, "has 8.6"),
        ({"spec": LARGER}, {}, r"has inputs and outputs .*-1, 1, 16, 16.* is about .*-1, 1, 24, 24"),
        ({"batch": MORE}, {}, r"for batches \(1, 2, 4\), .* \(1, 2, 8\)"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_an_engine_must_fit(fields: dict[str, Any], built: dict[str, Any], words: str, tmp_path: Path) -> None:
    fix = refused(words, engine(tmp_path, b"engine", built_with=FITS | built, **fields))
    assert f"python -m export.trt {tmp_path}/best.onnx --precision fp16" in fix
    assert ("--backend rtx" in fix) == ("RTX" in words)


@pytest.mark.usefixtures("gpu")
def test_a_refusal_of_tensorrt_has_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "require", lambda module, extra: fake_tensorrt(None))
    path = engine(tmp_path, b"engine", built_with=FITS)
    assert "python -m export.trt" in refused("TensorRT 11.0.1 on a GPU refuses .*: it gives no reason\n", path)
    log = engine_module.quiet_log(SimpleNamespace(ILogger=FakeLogger))
    log.log(FakeLogger.WARNING, "never mind")
    log.log(FakeLogger.ERROR, "wrong\nmagic")
    assert log.told() == "wrong magic"


@pytest.mark.usefixtures("gpu")
def test_an_engine_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = engine(tmp_path, b"engine", built_with={"backend": "rtx", "tensorrt_rtx": "11.0.1"})
    fix = refused("needs an NVIDIA GPU, and none is visible", path)
    assert "--precision fp16 --batch 1,2,4 --backend rtx" in fix


@pytest.mark.parametrize(("backend", "extra"), [("tensorrt", "tensorrt"), ("rtx", "tensorrt-rtx")])
def test_a_missing_package_is_named(backend: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, *, extra: str) -> Any:
        raise UserError(f"the package {module!r} is not installed", f"pip install 'fer-dist[{extra}]'")

    monkeypatch.setattr(engine_module, "require", missing)
    fix = refused("is not installed", engine(tmp_path, b"engine", built_with={"backend": backend}))
    assert f"fer-dist[{extra}]" in fix
    assert "python -m export.trt" in fix


def test_a_damaged_engine_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "require", lambda module, extra: pytest.fail("TensorRT was loaded"))
    path = engine(tmp_path, b"engine", built_with=FITS)
    for raw, words in ((b"engin", "has 5 bytes"), (b"Engine", "SHA-256 differ")):
        path.write_bytes(raw)
        refused(words, path)
    path.unlink()
    refused("cannot read", path)
    path.mkdir()
    refused("no regular file", path)
    sidecar(path).unlink()
    refused(r"cannot read .*best.fp16.engine.json", path)


def test_the_advice_is_one_harmless_command(tmp_path: Path) -> None:
    """The name of the parent comes from a file."""
    path = engine(tmp_path, b"engine", parent="a; rm -rf ~ \x1b[31m.onnx", kind="onnx", built_with={})
    assert "export.trt 'a; rm -rf ~ ?[31m.onnx' --precision" in refused("no engine", path)


def opened(folder: Path, context: FakeContext | None, batch: tuple[int, int, int] = (1, 2, 4)) -> Engine:
    """Return an engine that computes on the CPU."""
    exported = read_sidecar(engine(folder, b"engine", batch=batch, built_with=FITS))
    return Engine(exported, "TensorRT on a stand-in", fake_engine(context), (), torch.device("cpu"))


def test_batches_of_any_size_fit_an_engine(tmp_path: Path) -> None:
    """Those beyond the largest are split, those below the smallest are filled up with black pictures."""
    context = FakeContext()
    found = opened(tmp_path, context)
    for count in (1, 3, 4, 5, 11):
        logits, probabilities = found.infer(small(count))
        torch.testing.assert_close(logits, expected_logits(small(count)))
        torch.testing.assert_close(probabilities, expected_logits(small(count)).softmax(1))
    assert context.batches == [1, 3, 4, 4, 1, 4, 4, 3]
    found.close()
    context = FakeContext()
    found = opened(tmp_path, context, (3, 3, 4))
    found.infer(small(4))  # leaves pictures in the memory
    torch.testing.assert_close(found.infer(small(5))[0], expected_logits(small(5)))
    assert context.batches == [4, 4, 3]
    assert context.seen[-1][1:] == [0, 0], "filled up with black"


def test_what_tensorrt_does_not_execute_is_an_error(tmp_path: Path) -> None:
    context = FakeContext()
    context.works = False
    with pytest.raises(UserError, match="could not execute"):
        opened(tmp_path, context).infer(small(1))
    with pytest.raises(UserError, match="does not take a batch of 5"):
        opened(tmp_path, FakeContext(), (1, 5, 5)).infer(small(5))
    with pytest.raises(UserError, match="too little memory"):
        opened(tmp_path, None)


# Engines of TensorRT for RTX, which is built without a GPU


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of TensorRT for RTX; to be read only."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx", exc_type=ImportError)
    return rtx_engine(trt, tmp_path_factory.mktemp("rtx"))


def test_an_engine_that_cannot_be_deserialized(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real runtime without a GPU returns None, and its log goes into the error."""
    if torch.cuda.device_count():
        pytest.skip("there is a GPU: it would be deserialized")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    refused(r"TensorRT-RTX [\d.]+ on no GPU refuses .*: (?!it gives no reason)\S+", built)


def test_tensorrt_for_rtx_records_by_itself() -> None:
    """The settings are those of the real package, without a GPU; the engine is a stand-in."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")

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


# With a GPU


def on_gpu(path: Path, images: Tensor, **settings: Any) -> tuple[Outputs, Runner]:
    with open_runner(path, **settings) as runner:
        found = runner.run(images)
        replay = runner.capture(images)
        assert (replay is not None) == runner.on_gpu
        if replay is not None:
            replay.logits_NK.zero_()
            torch.cuda.synchronize()
            replay.work()
            replay.stream.synchronize()
            torch.testing.assert_close(replay.logits_NK.cpu(), found.logits_NK, atol=1e-4, rtol=1e-4)
            again = runner.run(images)
            torch.testing.assert_close(again.logits_NK, found.logits_NK)
        return found, runner


@pytest.mark.gpu
def test_a_checkpoint_on_the_gpu(exported: tuple[Path, Path]) -> None:
    cpu, _ = on_gpu(exported[0], pictures(7), device="cpu")
    for device in ("auto", "cuda"):
        found, runner = on_gpu(exported[0], pictures(7), device=device)
        assert runner.on_gpu
        torch.testing.assert_close(found.logits_NK, cpu.logits_NK, atol=1e-4, rtol=0)
        with open_runner(exported[0]) as runner:
            torch.testing.assert_close(runner(pictures(7).cuda()), cpu.logits_NK, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnx_runtimes_providers_of_gpus(provider: str, exported: tuple[Path, Path]) -> None:
    if provider == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs the extra tensorrt", exc_type=ImportError)
    cpu, _ = on_gpu(exported[1], pictures(7), provider="cpu")
    found, runner = on_gpu(exported[1], pictures(7), provider=provider)
    assert runner.runs_on == {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    torch.testing.assert_close(found.logits_NK, cpu.logits_NK, atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_an_engine_of_rtx_is_executed(built: Path) -> None:
    for count in (1, 3, 4, 9):
        found, runner = on_gpu(built, small(count))
        torch.testing.assert_close(found.logits_NK, expected_logits(small(count)), atol=1e-3, rtol=0)
        torch.testing.assert_close(found.probabilities_NK, found.logits_NK.softmax(1), atol=1e-5, rtol=0)
        assert runner.batch == (1, 2, 4)
        assert runner.runs_on.startswith("TensorRT-RTX")
    assert runner.spec == SPEC
    assert runner.checkpoint_sha256 == CHECKPOINT
    first = open_engine(built)
    torch.testing.assert_close(first.infer(small(2).cuda())[0], expected_logits(small(2)), atol=1e-3, rtol=0)
    assert first.capture(small(5)) is None
    first.close()
