"""A model behind one interface, whatever file it is in: checkpoint, ONNX file or TensorRT engine."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fer_dist.engine.checkpoint import load
from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel
from fer_dist.serve.artifact import ATTENTION, INPUT, LOGITS, PROBABILITIES, Precision, file_sha256
from fer_dist.serve.engine import open_engine
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.ortsession import PROVIDERS, open_session, reason, record_session
from fer_dist.serve.replay import Replay, record
from fer_dist.spec import ModelSpec

DEVICES = ("auto", "cpu", "cuda")
MOST_THREADS = 1024

Kind = Literal["pth", "onnx", "engine"]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model answers.

    Attributes:
        logits_NK: float32 `[N, K]`, on the CPU.
        probabilities_NK: likewise, the softmax of the logits as the artifact computes it.
        attention_NHW: float32 `[N, h, w]`, on the CPU: the part that each patch has in the attention, sums of 1;
            None: the artifact does not say. ONNX files of patt_lite do.
    """

    logits_NK: Tensor
    probabilities_NK: Tensor
    attention_NHW: Tensor | None = None


class Runner(ABC):
    """A model that answers batches; use it in a `with`, or call `close`.

    Attributes:
        path: of the file.
        kind: what the file is.
        spec, precision: out of the file.
        checkpoint_sha256: of the checkpoint that everything began with.
        batch: smallest, best and largest batch of an engine; empty: any.
        runs_on: what really runs, e.g. "torch cpu, 2 threads", "CPUExecutionProvider", "TensorRT 11.0 on ...".
        on_gpu: whether that is a GPU.
    """

    kind: Kind
    batch: tuple[int, ...] = ()
    runs_on: str
    on_gpu: bool = False

    def __init__(self, path: Path, spec: ModelSpec, precision: Precision, checkpoint_sha256: str) -> None:
        self.path, self.spec, self.precision, self.checkpoint_sha256 = path, spec, precision, checkpoint_sha256
        self._closed = False

    def run(self, images_N1SS: Tensor) -> Outputs:
        """Answer a batch.

        An engine answers more pictures than it was built for in several batches, in their order.

        Args:
            images_N1SS: uint8 `[N, 1, S, S]` on any device, N at least 1, S of the spec.

        Raises:
            UserError: other pictures, a closed runner, or the device's memory does not suffice.
        """
        if self._closed:
            raise UserError(f"the runner of {self.path} is closed", "open_runner(path) opens it again")
        side = self.spec.input.size
        if not isinstance(images_N1SS, Tensor):
            raise UserError(
                f"pictures are a {type(images_N1SS).__name__}, expected a torch.Tensor", "torch.from_numpy(...)"
            )
        shape = tuple(images_N1SS.shape)
        if images_N1SS.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != (1, side, side):
            raise UserError(
                f"pictures are {str(images_N1SS.dtype).removeprefix('torch.')} {list(shape)}, "
                f"expected uint8 [N, 1, {side}, {side}]",
                "give grey pictures of that size, values 0..255",
            )
        if not shape[0]:
            raise UserError("there are no pictures in the batch", "give at least one")
        try:
            with torch.no_grad():
                logits_NK, probabilities_NK, *more = self._run(images_N1SS)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise UserError(
                f"{self.runs_on}: no memory for {shape[0]} pictures of {self.path}", "a smaller batch"
            ) from error
        attention_NHW = more[0] if more else None
        return Outputs(logits_NK=logits_NK, probabilities_NK=probabilities_NK, attention_NHW=attention_NHW)

    def __call__(self, images_N1SS: Tensor) -> Tensor:
        """The logits alone: `fer_dist.engine.score.Predict`."""
        return self.run(images_N1SS).logits_NK

    def capture(self, images_N1SS: Tensor) -> Replay | None:
        """The work on these pictures as a CUDA graph, for benchmarks; None where it cannot be one, as on a CPU.

        Close the runner after the last replay; no other batches in between.
        """
        return None

    def close(self) -> None:
        """Give everything back; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, ...]:
        """Logits, probabilities and, where there is one, attention, float32 on the CPU; of checked pictures."""

    @abstractmethod
    def _close(self) -> None: ...


class TorchRunner(Runner):
    """A checkpoint, computed by torch in float32; on a GPU without TF32, so that it is a reference."""

    kind = "pth"

    def __init__(self, path: Path, *, device: str, threads: int | None) -> None:
        saved = load(path)
        super().__init__(path, saved.spec, "fp32", file_sha256(path))
        gpu = torch.cuda.is_available()
        if device == "cuda" and not gpu:
            raise UserError("cuda is asked for, but no CUDA device is visible", "--device cpu, or look at nvidia-smi")
        self.on_gpu = gpu and device != "cpu"
        self._device = torch.device("cuda" if self.on_gpu else "cpu")
        self._threads, self._threads_before = threads, torch.get_num_threads()
        self._model: FaceModel | None = saved.model().to(self._device)
        count = threads or self._threads_before
        where = torch.cuda.get_device_name() if self.on_gpu else f"{count} thread{'s' * (count > 1)}"
        self.runs_on = f"torch {self._device.type}, {where}"

    @property
    def model(self) -> FaceModel:
        """The network in evaluation mode, as long as the runner is open."""
        assert self._model is not None, "the runner is closed"
        return self._model

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        # Threads are torch's own, not the runner's: another runner may have set them since.
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        logits_NK, probabilities_NK = self._answer(images_N1SS.to(self._device))
        return logits_NK.cpu(), probabilities_NK.cpu()

    def _answer(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        assert self._model is not None
        if self.on_gpu:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                logits_NK = self._model(images_N1SS)
        else:
            logits_NK = self._model(images_N1SS)
        logits_NK = logits_NK.float()
        return logits_NK, logits_NK.softmax(1)

    def capture(self, images_N1SS: Tensor) -> Replay | None:
        """See Runner."""
        if not self.on_gpu:
            return None
        fixed_N1SS = images_N1SS.to(self._device)
        return record(lambda: self._answer(fixed_N1SS)[0], torch.cuda.Stream())  # type: ignore[no-untyped-call]

    def _close(self) -> None:
        self._model = None
        if self._threads is not None:
            torch.set_num_threads(self._threads_before)


class OnnxRunner(Runner):
    """An ONNX file, computed by ONNX Runtime; on a GPU without TF32, as the checkpoint is."""

    kind = "onnx"

    def __init__(self, path: Path, *, provider: str, threads: int | None) -> None:
        opened = read_onnx(path)
        super().__init__(path, opened.spec, opened.precision, opened.checkpoint_sha256)
        raw = opened.serialized()
        self._attention = opened.attention
        del opened  # the weights are in memory once more in the session
        self._session: Any = open_session(raw, self.precision, path, provider, threads)
        self.runs_on = self._session.get_providers()[0]
        self.on_gpu = self.runs_on != PROVIDERS["cpu"]

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, ...]:
        feeds = {INPUT: images_N1SS.contiguous().cpu().numpy()}
        names = [LOGITS, PROBABILITIES, *([ATTENTION] if self._attention else [])]
        try:
            found = self._session.run(names, feeds)
        except Exception as error:  # ONNX Runtime raises kinds of its own for a graph that fails half-way
            raise UserError(
                f"{self.runs_on} fails on {self.path} with {len(images_N1SS)} pictures: {reason(error)}",
                "a smaller batch if it is memory, else export it again: python -m export.onnx best.pth",
            ) from None
        count, classes = len(images_N1SS), len(self.spec.labels)
        expected = [(count, classes)] * 2 + ([(count, *self._attention)] if self._attention else [])
        shapes = [answer.shape for answer in found]
        if shapes != expected:
            told = [" and ".join(str(list(sides)) for sides in some) for some in (shapes, expected)]
            raise UserError(
                f"{self.path} answers {told[0]}, expected {told[1]}", "export it again: python -m export.onnx best.pth"
            )
        return tuple(map(torch.from_numpy, found))

    def capture(self, images_N1SS: Tensor) -> Replay | None:
        """See Runner. It is a session of its own: one that records graphs answers one batch size only."""
        if not self.on_gpu:
            return None
        provider = next(name for name, title in PROVIDERS.items() if title == self.runs_on)
        raw = read_onnx(self.path).serialized()
        return record_session(raw, self.precision, self.path, provider, images_N1SS, len(self.spec.labels))

    def _close(self) -> None:
        self._session = None


class EngineRunner(Runner):
    """A TensorRT engine of either flavour; batches beyond its largest are split."""

    kind = "engine"
    on_gpu = True

    def __init__(self, path: Path) -> None:
        self._engine = open_engine(path)
        exported = self._engine.exported
        super().__init__(path, exported.spec, exported.precision, exported.checkpoint_sha256)
        self.batch, self.runs_on = exported.batch, self._engine.name

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        return self._engine.infer(images_N1SS)

    def capture(self, images_N1SS: Tensor) -> Replay | None:
        """See Runner."""
        return self._engine.capture(images_N1SS)

    def _close(self) -> None:
        self._engine.close()


def open_runner(
    path: str | Path, *, device: str = "auto", provider: str = "auto", threads: int | None = None
) -> Runner:
    """Open a checkpoint (`.pth`, `.safetensors`), an ONNX file of fer_dist (`.onnx`) or an engine (`.engine`).

    Args:
        device: of a checkpoint: cpu, cuda, or auto, which takes a GPU where there is one.
        provider: of an ONNX file: cpu, cuda, tensorrt, or auto, which takes CUDA where it really starts.
        threads: of the CPU; None: as many as torch or ONNX Runtime choose.

    Raises:
        UserError: the file is missing, damaged, none of these or not for this machine; the device or the provider
            that was asked for does not run here.
    """
    path = Path(path)
    for name, value, known in (("device", device, DEVICES), ("provider", provider, ("auto", *PROVIDERS))):
        if value not in known:
            raise UserError(f"{name} is {value!r}, expected {', '.join(known)}", f"--{name} auto")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UserError(f"threads is {threads}, expected 1..{MOST_THREADS}", "--threads 1")
    match path.suffix:
        case ".pth" | ".safetensors":
            return TorchRunner(path, device=device, threads=threads)
        case ".onnx":
            return OnnxRunner(path, provider=provider, threads=threads)
        case ".engine":
            return EngineRunner(path)
    raise UserError(
        f"{path} ends in none of .pth, .safetensors, .onnx and .engine", "name a checkpoint or an exported artifact"
    )
