"""Checkpoints, ONNX files and engines run behind one interface; what does not run here is refused with a reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch

from fer_dist.engine.checkpoint import load, write_safetensors
from fer_dist.errors import UserError
from fer_dist.serve.artifact import Precision, file_sha256
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.ortsession import bound, open_session
from fer_dist.serve.runner import open_runner
from tests.helpers.artifacts import SIDE, expected_logits, tiny_onnx, write
from tests.helpers.tiny_models import pictures

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path, tiny_onnx())


@pytest.mark.parametrize("name", ["best.pth", "best.onnx", "best.safetensors"])
def test_every_kind_of_file_runs_alike(name: str, exported: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, graph = exported
    path, model = checkpoint.with_name(name), load(checkpoint).model()
    if name == "best.safetensors":
        path = tmp_path / name
        write_safetensors(path, load(checkpoint))
    with open_runner(path, device="cpu", provider="cpu") as runner:
        for count in (1, 3, 64):
            with torch.no_grad():
                expected = model(pictures(count))
            found = runner.run(pictures(count))
            for part in (found.logits_NK, found.probabilities_NK):
                assert (part.shape, part.dtype, part.device.type) == ((count, 7), torch.float32, "cpu")
            torch.testing.assert_close(found.logits_NK, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.probabilities_NK, expected.softmax(1), atol=1e-6, rtol=0)
        runner.run(255 - pictures(count))
        torch.testing.assert_close(found.logits_NK, expected, atol=1e-5, rtol=0, msg="the output is a copy")
        found.logits_NK.add_(1)  # not an inference tensor
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
        ("best.pt2", {}, "none of .pth, .safetensors, .onnx and .engine"),
        ("best.onnx", {"provider": "rocm"}, "provider is 'rocm', expected auto, cpu, cuda, tensorrt"),
        ("best.onnx", {"device": "tpu"}, "device is 'tpu'"),
        ("best.onnx", {"threads": 0}, "threads is 0"),
        ("best.onnx", {"threads": 10**6}, "threads is 1000000"),
        ("best.onnx", {"provider": "cuda"}, "provider cuda needs a GPU"),
        ("best.onnx", {"provider": "tensorrt"}, "provider tensorrt needs a GPU"),
        ("best.pth", {"device": "cuda"}, "no CUDA device"),
    ],
)
def test_invalid_settings_are_refused(
    name: str, settings: dict[str, Any], words: str, exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        open_runner(exported[0].with_name(name), **settings)


def test_a_runner_sets_the_threads_of_torch_while_it_is_open(exported: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    with open_runner(exported[0], threads=before + 1) as runner:
        for _ in range(2):
            runner.run(pictures(1))
            assert torch.get_num_threads() == before + 1
            torch.set_num_threads(before)  # as another runner does
        assert runner.runs_on == f"torch cpu, {before + 1} threads"
        runner.run(pictures(1))
    assert torch.get_num_threads() == before


# ONNX Runtime


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Pretend a GPU that ONNX Runtime does not find: every session runs on the CPU without a word."""
    real = onnxruntime.InferenceSession
    found = mock.Mock(side_effect=lambda *words, providers, **more: real(*words, providers=providers[-1:], **more))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", found)
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_a_provider_that_does_not_start_is_noticed(fails: bool, sessions: mock.Mock, tiny: Path) -> None:
    """ONNX Runtime lists CUDA as available and takes the CPU: an error if it was requested by name."""
    words = f"cuda was asked for, but ONNX Runtime runs {CPU}"
    if fails:
        words, error = f"{CUDA} does not take .*no libcudnn.so\n", RuntimeError("no libcudnn.so\n(and more)")
        sessions.side_effect = [error, error, sessions(str(tiny), providers=[CPU])]
    with pytest.raises(UserError, match=words):
        open_runner(tiny, provider="cuda")
    with open_runner(tiny) as runner:
        assert (runner.runs_on, runner.on_gpu) == (CPU, False)
        torch.testing.assert_close(runner(pictures(2, SIDE)), expected_logits(pictures(2, SIDE)))


@pytest.mark.parametrize(
    ("precision", "provider", "disabled"),
    [("fp32", CUDA, []), ("fp16", CUDA, ["NchwcTransformer"]), ("int8", CUDA, []), ("int8.cpu", CPU, [])],
)
def test_how_a_session_is_made(
    precision: Precision, provider: str, disabled: list[str], sessions: mock.Mock, tmp_path: Path
) -> None:
    """On a machine with a GPU: int8.cpu was judged on a CPU, and on float16 one optimizer crashes the process."""
    with open_runner(write(tmp_path, tiny_onnx(precision)), threads=2) as runner:
        assert runner.precision == precision
    sessions.assert_called_once()
    (raw, options), more = sessions.call_args
    assert isinstance(raw, bytes), "a path could lead to another file by now"
    assert more["providers"][0] == (provider if provider == CPU else (provider, {"use_tf32": "0"}))
    assert options.intra_op_num_threads == 2
    assert (more["disabled_optimizers"], more["enable_fallback"]) == (disabled, 0)


def test_errors_of_a_batch_are_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = [np.zeros((1, 7), dtype=np.float32), np.zeros((2, 7), dtype=np.float32)]
    with open_runner(tiny) as runner:
        for name, stand_in, words in (
            ("_session", mock.Mock(**{"run.side_effect": RuntimeError("no\nkernel")}), r"with 2 pictures: no\n"),
            ("_session", mock.Mock(**{"run.return_value": odd}), r"answers \[1, 7\] and \[2, 7\]"),
            ("_run", mock.Mock(side_effect=torch.OutOfMemoryError), "no memory for 2 pictures"),
        ):
            monkeypatch.setattr(runner, name, stand_in)
            with pytest.raises(UserError, match=words):
                runner.run(pictures(2, SIDE))


def test_a_session_on_fixed_memory_reads_that_memory(tiny: Path) -> None:
    """CUDA graphs are recorded so; on a CPU, the memory of the pictures is the CPU's."""
    images = pictures(5, SIDE)
    session = open_session(read_onnx(tiny).serialized(), "fp32", tiny, "cpu", None)
    work = bound(session, images, 7)
    torch.testing.assert_close(work(), expected_logits(images))
    images.copy_(images.flip(0))
    torch.testing.assert_close(work(), expected_logits(images))


# With a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "provider"), [("best.pth", "auto"), ("best.onnx", "cuda"), ("best.onnx", "tensorrt"), ("engine", "auto")]
)
def test_every_kind_of_file_runs_on_a_gpu(
    name: str, provider: str, exported: tuple[Path, Path], request: pytest.FixtureRequest
) -> None:
    if provider == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs the extra tensorrt", exc_type=ImportError)
    path, tolerance = exported[0].with_name(name), 1e-4
    expected_of: Callable[[torch.Tensor], torch.Tensor] = load(exported[0]).model()
    if name == "engine":
        path, expected_of, tolerance = request.getfixturevalue("rtx_engine"), expected_logits, 1e-3
    with open_runner(path, provider=provider) as runner:
        assert runner.on_gpu
        images = pictures(3, runner.spec.input.size)
        with torch.no_grad():
            expected = expected_of(images)
        for batch in (images, images.cuda()):
            torch.testing.assert_close(runner.run(batch).logits_NK, expected, atol=tolerance, rtol=0)
        replay = runner.capture(images)
        assert replay is not None
        replay.logits_NK.zero_()
        torch.cuda.synchronize()
        replay.work()
        replay.stream.synchronize()
        for logits in (replay.logits_NK.cpu(), runner(images)):
            torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
