"""One interface to checkpoint, ONNX file and engine; what does not run here says so."""

import ctypes
import shutil
from collections.abc import Callable
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
from fer_dist.serve import ortsession
from fer_dist.serve.artifact import INPUT, LOGITS, PROBABILITIES, Precision, file_sha256, read_sidecar, sidecar
from fer_dist.serve.engine import Engine, open_engine, recording_context
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.ortsession import bound, open_session
from fer_dist.serve.runner import Outputs, Runner, open_runner
from fer_dist.world import World
from tests.helpers.artifacts import (
    CHECKPOINT,
    CLASSES,
    SIDE,
    SPEC,
    engine,
    expected_logits,
    rtx_engine,
    tiny_onnx,
    write,
)
from tests.helpers.tiny_models import pictures

CPU = "CPUExecutionProvider"


def small(count: int) -> Tensor:
    """Random pictures for the graph made by hand."""
    return torch.randint(0, 256, (count, 1, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path, tiny_onnx())


# What all kinds have in common


def test_checkpoint_and_its_onnx_file_answer_alike(exported: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, graph = exported
    shared = tmp_path / "best.safetensors"
    write_safetensors(shared, load(checkpoint))
    model = load(checkpoint).model()
    with open_runner(checkpoint) as a, open_runner(graph) as b, open_runner(shared) as c:
        for count in (1, 2, 3, 7, 64):
            images = pictures(count)
            with torch.no_grad():
                expected = model(images)
            for runner in (a, b, c):
                found = runner.run(images)
                for part in (found.logits_NK, found.probabilities_NK):
                    assert (part.shape, part.dtype, part.device.type) == ((count, 7), torch.float32, "cpu")
                torch.testing.assert_close(found.logits_NK, expected, atol=1e-5, rtol=0)
                torch.testing.assert_close(found.probabilities_NK, expected.softmax(1), atol=1e-6, rtol=0)
        assert [runner.kind for runner in (a, b, c)] == ["pth", "onnx", "pth"]
        assert a.spec == b.spec == c.spec == model.spec
        assert a.checkpoint_sha256 == b.checkpoint_sha256 == file_sha256(checkpoint)
        assert {runner.precision for runner in (a, b, c)} == {"fp32"}
        assert {runner.batch for runner in (a, b, c)} == {()}


def test_the_one_score_takes_any_runner(exported: tuple[Path, Path]) -> None:
    batches = [(pictures(5), torch.arange(5)), (pictures(3), torch.arange(3))]
    counted = []
    for path in exported:
        with open_runner(path) as runner:
            counted.append(score(runner, batches, World(), classes=7))
    assert counted[0].count == 8
    assert counted[0].confusion_KK.tolist() == counted[1].confusion_KK.tolist()


def test_answers_can_be_changed_in_place(exported: tuple[Path, Path], tiny: Path) -> None:
    """They are the caller's own: neither inference tensors nor the session's memory."""
    for path, images in ((exported[0], pictures(2)), (tiny, small(2))):
        with open_runner(path) as runner:
            first = runner.run(images)
            kept = first.logits_NK.clone()
            runner.run(255 - images)
            assert torch.equal(first.logits_NK, kept)
            first.logits_NK.add_(1)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 1, SIDE, SIDE), dtype=np.uint8), "ndarray, expected a torch.Tensor"),
        (torch.zeros(1, 1, SIDE, SIDE), r"float32 \[1, 1, 8, 8\], expected uint8 \[N, 1, 8, 8\]"),
        (torch.zeros(1, 1, 48, 48, dtype=torch.uint8), r"uint8 \[1, 1, 48, 48\]"),
        (torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), r"uint8 \[1, 3, 8, 8\]"),
        (torch.zeros(SIDE, SIDE, dtype=torch.uint8), r"uint8 \[8, 8\]"),
        (torch.zeros(0, 1, SIDE, SIDE, dtype=torch.uint8), "no pictures"),
    ],
)
def test_other_pictures_are_refused(images: Any, words: str, tiny: Path) -> None:
    with open_runner(tiny) as runner, pytest.raises(UserError, match=words):
        runner.run(images)


@pytest.mark.parametrize("which", [0, 1])
def test_closed_is_closed(which: int, exported: tuple[Path, Path]) -> None:
    with open_runner(exported[which]) as runner:
        runner.run(pictures(1))
    runner.close()
    with pytest.raises(UserError, match="is closed"):
        runner.run(pictures(1))


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
def test_what_cannot_be_opened(name: str, settings: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(UserError, match=words):
        open_runner(tiny.with_name(name), **settings)


def test_no_memory_is_an_error_of_the_batch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runner(tiny) as runner:
        monkeypatch.setattr(type(runner), "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(UserError, match="no memory for 2 pictures"):
            runner.run(small(2))


# Checkpoints


def test_threads_are_torchs_while_it_is_open(exported: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    with open_runner(exported[0], threads=before + 1) as runner:
        runner.run(pictures(1))
        assert torch.get_num_threads() == before + 1
        assert runner.runs_on == f"torch cpu, {before + 1} threads"
        torch.set_num_threads(before)
        runner.run(pictures(1))  # another runner has set them since
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_cuda_by_name_is_cuda(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        open_runner(exported[0], device="cuda")


# ONNX files


def test_a_provider_by_name_is_that_provider(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists CUDA as available and takes the CPU without a word: a GPU is pretended, and none is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "tensorrt"):
        with pytest.raises(UserError, match=f"provider {name} needs a GPU"):
            open_runner(tiny, provider=name)
    if torch.cuda.device_count():
        pytest.skip("there is a GPU: nothing to pretend")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    for name in ("cuda", "tensorrt"):
        with pytest.raises(
            UserError, match=f"{name} was asked for, but ONNX Runtime runs {CPU}|does not take|is not installed"
        ):
            open_runner(tiny, provider=name)
    with open_runner(tiny) as runner:
        assert (runner.runs_on, runner.on_gpu) == (CPU, False)
        torch.testing.assert_close(runner(small(2)), expected_logits(small(2)))


def test_a_silent_fall_back_is_noticed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine: the session says what it runs on, and that is believed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    made = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda raw, options, providers, **more: made(raw, options, providers=providers[-1:], **more),
    )
    with pytest.raises(UserError, match=f"cuda was asked for, but ONNX Runtime runs {CPU}"):
        open_runner(tiny, provider="cuda")
    with open_runner(tiny, provider="auto") as runner:
        assert runner.runs_on == CPU


def test_auto_takes_the_cpu_where_cuda_does_not_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of another CUDA than ONNX Runtime's: an error for who named it, the CPU for who did not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    made = onnxruntime.InferenceSession

    def session(raw: Any, options: Any, providers: list[Any], **more: Any) -> Any:
        if len(providers) > 1:
            raise RuntimeError("no libcudnn.so")
        return made(raw, options, providers=providers, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(UserError, match=r"CUDAExecutionProvider does not take .*no libcudnn.so"):
        open_runner(tiny, provider="cuda")
    with open_runner(tiny) as runner:
        assert runner.runs_on == CPU


def test_how_a_session_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 without the transformer that crashes; threads as asked; bytes, never a path."""
    asked: list[tuple[Any, Any, dict[str, Any]]] = []
    made = onnxruntime.InferenceSession

    def session(raw: Any, options: Any, **more: Any) -> Any:
        asked.append((raw, options, more))
        return made(raw, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    for precision, without in (("fp32", []), ("fp16", ["NchwcTransformer"]), ("int8", []), ("int8.cpu", [])):
        path = write(tmp_path, tiny_onnx(precision))  # type: ignore[arg-type]
        with open_runner(path, provider="cpu", threads=2) as runner:
            assert runner.precision == precision
        raw, options, more = asked.pop()
        assert isinstance(raw, bytes)
        assert options.intra_op_num_threads == 2
        assert more["disabled_optimizers"] == without
        assert more["enable_fallback"] == 0


@pytest.mark.parametrize(("precision", "taken"), [("fp32", "cuda"), ("int8", "cuda"), ("int8.cpu", "cpu")])
def test_what_is_made_for_cpus_runs_on_one(
    precision: Precision, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a GPU as well, and nothing else is asked for: its arithmetic is what was judged."""
    asked: list[str] = []

    def start(raw: bytes, precision: Precision, wanted: str, threads: int | None, stream: int) -> Any:
        asked.append(wanted)
        return made(raw, precision, "cpu", threads, stream)

    made = ortsession._start
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ortsession, "_start", start)
    open_runner(write(tmp_path, tiny_onnx(precision))).close()
    assert asked == [taken]


def test_what_onnx_runtime_does_not_take(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own kinds of errors are told in one line: when a session is made, and when it fails half-way."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\nkernel")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", fail)
        with pytest.raises(UserError, match=f"{CPU} does not take .*tiny.onnx: no\n"):
            open_runner(tiny, provider="cpu")
    with open_runner(tiny) as runner:
        monkeypatch.setattr(runner, "_session", SimpleNamespace(run=fail))
        with pytest.raises(UserError, match=r"fails on .*tiny.onnx with 2 pictures: no\n"):
            runner.run(small(2))
        odd = [np.zeros((1, 7), dtype=np.float32), np.zeros((2, 7), dtype=np.float32)]
        monkeypatch.setattr(runner, "_session", SimpleNamespace(run=lambda *_: odd))
        with pytest.raises(UserError, match=r"answers \[1, 7\] and \[2, 7\]"):
            runner.run(small(2))


# Engines: what does not fit


def _change(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields.update(values)


def _built(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["built_with"].update(values)


class FakeLogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class FakeContext:
    """Answers as `tiny_onnx` does, on the memory that it is given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.seen: list[list[int]] = []
        self.addresses: dict[str, int] = {}
        self.works = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == INPUT
        self.shapes.append(shape)
        return 1 <= shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shape = self.shapes[-1]
        images = self._at(INPUT, ctypes.c_uint8, shape)
        logits = expected_logits(torch.from_numpy(images.copy()))
        self.seen.append(images.reshape(len(images), -1).max(1).tolist())
        self._at(LOGITS, ctypes.c_float, logits.shape)[:] = logits.numpy()
        self._at(PROBABILITIES, ctypes.c_float, logits.shape)[:] = logits.softmax(1).numpy()
        return self.works

    def _at(self, name: str, kind: Any, shape: tuple[int, ...]) -> Any:
        count = int(np.prod(shape))
        array = np.ctypeslib.as_array((kind * count).from_address(self.addresses[name]))
        return array.reshape(shape)


class FakeEngine:
    """An engine of `tiny_onnx` for batches 1, 2, 4."""

    num_io_tensors = 3

    def __init__(self, context: FakeContext | None = None, classes: int = CLASSES) -> None:
        self.context = context
        self.tensors = {
            INPUT: ("uint8", (-1, 1, SIDE, SIDE)),
            LOGITS: ("f", (-1, classes)),
            PROBABILITIES: ("f", (-1, CLASSES)),
        }

    def create_execution_context(self) -> FakeContext | None:
        return self.context

    def get_tensor_name(self, place: int) -> str:
        return list(self.tensors)[place]

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, 1, SIDE, SIDE) for size in (1, 2, 4)]


def fake_tensorrt(found: FakeEngine | None, version: str = "11.0.1") -> SimpleNamespace:
    """A package whose runtime makes `found` of any bytes."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, raw: bytes) -> FakeEngine | None:
            if found is None:
                self.logger.log(FakeLogger.WARNING, "never mind")
                self.logger.log(FakeLogger.ERROR, "wrong\nmagic")
            return found

    types = SimpleNamespace(UINT8="uint8", FLOAT="f")
    return SimpleNamespace(__version__=version, ILogger=FakeLogger, Runtime=Runtime, DataType=types)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.6 is pretended, and TensorRT 11.0.1, whose engine has other inputs than ours."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(engine_module, "require", lambda module, extra: fake_tensorrt(FakeEngine(classes=8)))


FITS = {"backend": "tensorrt", "tensorrt": "11.0.1", "compute_capabilities": ["8.6"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change(kind="onnx"), "describes no engine"),
        (_change(batch=()), "describes no engine"),
        (_change(sha256="0" * 64), "SHA-256 differ"),
        (_change(bytes=5), "has 6 bytes, .* is about 5"),
        (_built(backend="other"), "of 'other', expected tensorrt or rtx"),
        (_built(backend=["rtx"]), "of \\['rtx'\\]"),
        (_built(tensorrt="10.9.0"), "TensorRT '10.9.0', here is '11.0.1'"),
        (_built(tensorrt=None), "TensorRT None"),
        (_built(backend="rtx"), "TensorRT-RTX None, here"),
        (_built(compute_capabilities=["8.9", "12.0"]), "8.9.*this a GPU has 8.6"),
        (_built(compute_capabilities="8.6"), "has 8.6"),
        (_change(), r"has inputs and outputs .*-1, 8.* is about .*-1, 7"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_an_engine_that_does_not_fit(change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path) -> None:
    path = engine(tmp_path, b"engine", change, built_with=dict(FITS))
    with pytest.raises(UserError, match=words) as caught:
        open_runner(path)
    assert f"python -m export.trt {tmp_path}/best.onnx --precision fp16" in caught.value.fix
    assert ("--backend rtx" in caught.value.fix) == ("RTX" in words)


@pytest.mark.usefixtures("gpu")
def test_an_engine_for_other_batches_than_its_sidecar_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is made for the sidecar's."""
    monkeypatch.setattr(engine_module, "require", lambda module, extra: fake_tensorrt(FakeEngine()))
    path = engine(tmp_path, b"engine", _change(batch=(1, 2, 8)), built_with=dict(FITS))
    with pytest.raises(UserError, match=r"for batches \(1, 2, 4\), .* \(1, 2, 8\)"):
        open_runner(path)


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_tensorrt_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = engine(tmp_path, b"engine", built_with=dict(FITS))
    monkeypatch.setattr(engine_module, "require", lambda module, extra: fake_tensorrt(None))
    with pytest.raises(UserError, match=r"TensorRT 11.0.1 on a GPU refuses .*: wrong magic\n") as caught:
        open_runner(path)
    assert "python -m export.trt" in caught.value.fix


@pytest.mark.parametrize("backend", ["tensorrt", "rtx"])
def test_a_package_that_is_missing(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, *, extra: str) -> Any:
        raise UserError(f"the package {module!r} is not installed", f"pip install 'fer-dist[{extra}]'")

    monkeypatch.setattr(engine_module, "require", missing)
    path = engine(tmp_path, b"engine", built_with={"backend": backend})
    with pytest.raises(UserError, match="is not installed") as caught:
        open_runner(path)
    extra = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}[backend]
    assert f"fer-dist[{extra}]" in caught.value.fix
    assert "python -m export.trt" in caught.value.fix


def test_an_engine_without_its_sidecar_or_bytes(tmp_path: Path) -> None:
    path = engine(tmp_path, b"engine", built_with=dict(FITS))
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        open_runner(path)
    path.mkdir()
    with pytest.raises(UserError, match="no regular file"):
        open_runner(path)
    sidecar(path).unlink()
    with pytest.raises(UserError, match=r"cannot read .*best.fp16.engine.json"):
        open_runner(path)


def test_what_is_told_to_type_is_one_harmless_command(tmp_path: Path) -> None:
    """The name of the parent comes from a file."""
    path = engine(tmp_path, b"engine", _change(parent="a; rm -rf ~ \x1b[31m.onnx", kind="onnx"), built_with={})
    with pytest.raises(UserError, match="no engine") as caught:
        open_runner(path)
    assert "export.trt 'a; rm -rf ~ ?[31m.onnx' --precision" in caught.value.fix


# Engines: a real one of TensorRT for RTX, which is built without a GPU


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of TensorRT for RTX; to be read only."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx", exc_type=ImportError)
    return rtx_engine(trt, tmp_path_factory.mktemp("rtx"))


def test_without_a_gpu_an_engine_says_what_it_needs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and none is visible") as caught:
        open_runner(built)
    assert "--precision fp16 --batch 1,2,4 --backend rtx" in caught.value.fix


def test_an_engine_that_cannot_be_deserialised(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real runtime without a GPU gives None, and its log goes into the error."""
    if torch.cuda.device_count():
        pytest.skip("there is a GPU: it would be deserialised")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    with pytest.raises(UserError, match=r"TensorRT-RTX [\d.]+ on no GPU refuses .*: \S+") as caught:
        open_runner(built)
    assert "gives no reason" not in caught.value.problem


@pytest.mark.parametrize("how", ["cut", "changed", "another"])
def test_a_damaged_engine_is_refused_before_it_is_loaded(how: str, built: Path, tmp_path: Path) -> None:
    path = tmp_path / built.name
    raw = built.read_bytes()
    path.write_bytes({"cut": raw[:-1], "changed": raw[:-1] + b"\1", "another": b"x" * len(raw)}[how])
    shutil.copy(sidecar(built), sidecar(path))
    with pytest.raises(UserError, match="has .* bytes" if how == "cut" else "SHA-256 differ"):
        open_runner(path)


# Engines: how batches are answered, on a stand-in that computes on the CPU


def stand_in(tmp_path: Path, context: FakeContext | None, batch: tuple[int, int, int] = (1, 2, 4)) -> Engine:
    path = engine(tmp_path, b"engine", _change(batch=batch), built_with=dict(FITS))
    exported = read_sidecar(path)
    return Engine(exported, "TensorRT on a stand-in", FakeEngine(context), (), torch.device("cpu"))


def test_batches_beyond_the_largest_are_split(tmp_path: Path) -> None:
    context = FakeContext()
    found = stand_in(tmp_path, context)
    for count in (1, 3, 4, 5, 11):
        images = small(count)
        logits, probabilities = found.infer(images)
        torch.testing.assert_close(logits, expected_logits(images))
        torch.testing.assert_close(probabilities, expected_logits(images).softmax(1))
    assert [shape[0] for shape in context.shapes] == [1, 3, 4, 4, 1, 4, 4, 3]
    found.close()


def test_batches_below_the_smallest_are_filled_up(tmp_path: Path) -> None:
    context = FakeContext()
    found = stand_in(tmp_path, context, (3, 3, 4))
    found.infer(small(4))  # leaves pictures in the memory
    logits, _ = found.infer(small(5))
    torch.testing.assert_close(logits, expected_logits(small(5)))
    assert [shape[0] for shape in context.shapes] == [4, 4, 3]
    assert context.seen[-1][1:] == [0, 0], "filled up with black"


def test_what_tensorrt_does_not_execute(tmp_path: Path) -> None:
    context = FakeContext()
    found = stand_in(tmp_path, context)
    context.works = False
    with pytest.raises(UserError, match="could not execute"):
        found.infer(small(1))
    with pytest.raises(UserError, match="does not take a batch of 5"):
        stand_in(tmp_path, FakeContext(), (1, 5, 5)).infer(small(5))
    with pytest.raises(UserError, match="too little memory"):
        stand_in(tmp_path, None)


# Graphs of CUDA


def test_a_session_on_fixed_memory_answers_what_it_answers_else(exported: tuple[Path, Path]) -> None:
    """It is how graphs are recorded; on a CPU, the memory of the pictures is the CPU's."""
    with open_runner(exported[1], provider="cpu") as runner:
        images = pictures(5)
        session = open_session(read_onnx(exported[1]).serialized(), "fp32", exported[1], "cpu", None)
        work = bound(session, images, len(runner.spec.labels))
        before = work().clone()
        torch.testing.assert_close(before, runner(images))
        images.copy_(pictures(5).flip(0))
        torch.testing.assert_close(work(), before.flip(0), msg="it reads the memory, not a copy of it")


def test_nothing_is_recorded_on_a_cpu(exported: tuple[Path, Path]) -> None:
    for path in exported:
        with open_runner(path, device="cpu", provider="cpu") as runner:
            assert runner.capture(pictures(2)) is None


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
