"""A TensorRT engine on the GPU of this machine, once its sidecar says that it fits.

Both flavours, `tensorrt` and TensorRT for RTX, have the same calls; torch's CUDA tensors are their memory.
An engine is code for a GPU: open only those that you or somebody you trust has built. The hash in the
sidecar shows damage, it is no signature.
"""

import hashlib
import shlex
import stat
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fer_dist.errors import UserError, printable
from fer_dist.extras import require
from fer_dist.serve.artifact import INPUT, LOGITS, PROBABILITIES, ExportedModel, read_sidecar, sidecar
from fer_dist.serve.replay import Replay, record, warm

FLAVOURS = {"tensorrt": ("tensorrt", "tensorrt", "TensorRT"), "rtx": ("tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX")}
"""`built_with["backend"]` -> the module, the extra that brings it, and its name for people."""
MOST_BYTES = 2**36
"""Largest engine that is read."""


class Engine:
    """A deserialised engine with its memory; answers batches of any size, one at a time.

    Attributes:
        exported: its sidecar.
        name: the flavour with its version, and the GPU.
    """

    def __init__(
        self, exported: ExportedModel, name: str, found: Any, keep: tuple[Any, ...], device: torch.device
    ) -> None:
        """
        Args:
            found: TensorRT's `ICudaEngine`, of which inputs and outputs have been checked.
            keep: what must live as long as it does: runtime and logger.
            device: of its memory; the CPU is for tests, which bring an engine of their own.

        Raises:
            UserError: the GPU has too little memory.
        """
        self.exported, self.name = exported, name
        self._lock = threading.Lock()
        side, classes, self._most = exported.spec.input.size, len(exported.spec.labels), exported.batch[2]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        try:
            self._images_N1SS = torch.zeros(self._most, 1, side, side, dtype=torch.uint8, device=device)
            self._logits_NK = torch.zeros(self._most, classes, device=device)
            self._probabilities_NK = torch.zeros(self._most, classes, device=device)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(name) from error
        self._context = found.create_execution_context()
        if self._context is None:
            raise _out_of_memory(name)
        self._keep: tuple[Any, ...] = (found, *keep)

    def infer(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `[N, 1, S, S]` on any device -> logits and probabilities, float32 `[N, K]` on the CPU.

        More pictures than the engine was built for go in several batches; where it was built for several at
        least, fewer are filled up with black ones, whose answers are dropped.

        Raises:
            UserError: TensorRT does not take the batch.
        """
        if self._stream is not None and images_N1SS.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream())  # which may still be making the pictures
        with self._lock, torch.cuda.stream(self._stream):
            begins = range(0, len(images_N1SS), self._most)
            parts = [self._answer(images_N1SS[begin : begin + self._most]) for begin in begins]
        logits, probabilities = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(probabilities)

    def capture(self, images_N1SS: Tensor) -> Replay | None:
        """A CUDA graph of one batch of the images' size, on the engine's memory; None: it cannot be one, or the batch
        is larger than those of the engine.

        Other batches must not be asked in between.
        """
        if self._stream is None or len(images_N1SS) > self._most:
            return None
        with self._lock, torch.cuda.stream(self._stream):
            own = recording_context(self._keep[0])
            context, logits_NK = own or self._context, self._logits_NK[: len(images_N1SS)]
            self._fill(images_N1SS, context)

            def work() -> Tensor:
                self._enqueue(context)
                return logits_NK

            replay = (warm if own else record)(work, self._stream)
            capturable = getattr(own, "is_stream_capturable", None)
            return replay if capturable is None or capturable(self._stream.cuda_stream) else None

    def close(self) -> None:
        """Give the memory back: the context first, then the engine, its runtime and its logger."""
        with self._lock:
            del self._context
            self._keep = ()
            del self._images_N1SS, self._logits_NK, self._probabilities_NK

    def _answer(self, part_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        """One batch of at most `_most`, on the current stream."""
        count = len(part_N1SS)
        self._fill(part_N1SS, self._context)
        self._enqueue(self._context)
        # Copies wait for the stream, as their target is ordinary memory.
        return self._logits_NK[:count].to("cpu", copy=True), self._probabilities_NK[:count].to("cpu", copy=True)

    def _fill(self, part_N1SS: Tensor, context: Any) -> None:
        """Put pictures where the engine reads them, and tell it how many they are."""
        count, least = len(part_N1SS), self.exported.batch[0]
        self._images_N1SS[:count].copy_(part_N1SS)
        self._images_N1SS[count:least].zero_()
        shape = (max(count, least), *self._images_N1SS.shape[1:])
        memory = {INPUT: self._images_N1SS, LOGITS: self._logits_NK, PROBABILITIES: self._probabilities_NK}
        taken = context.set_input_shape(INPUT, shape)
        taken = taken and all(context.set_tensor_address(name, t.data_ptr()) for name, t in memory.items())
        if not taken:
            raise UserError(f"{self.name} does not take a batch of {shape[0]}", "another batch size")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream if self._stream else 0):
            raise UserError(
                f"{self.name} could not execute the engine", "see whether the GPU's memory is full: nvidia-smi"
            )


def recording_context(found: Any) -> Any:
    """A context that records CUDA graphs by itself, of TensorRT for RTX; None: TensorRT is recorded from outside.

    RTX compiles kernels for the shape at hand while it runs already; here it waits for them, and a recording
    from outside could hold those that are for any shape (NVIDIA's "Working with RTX CUDA Graphs").
    """
    config: Any = found.create_runtime_config() if hasattr(found, "create_runtime_config") else None
    if config is None or not hasattr(config, "cuda_graph_strategy"):  # TensorRT has the call, too, but not the setting
        return None
    config.cuda_graph_strategy = type(config.cuda_graph_strategy).WHOLE_GRAPH_CAPTURE
    config.dynamic_shapes_kernel_specialization_strategy = type(
        config.dynamic_shapes_kernel_specialization_strategy
    ).EAGER
    return found.create_execution_context(config)


def open_engine(path: Path) -> Engine:
    """Deserialise the engine at `path` for this machine's current GPU.

    Raises:
        UserError: there is no sidecar, or it does not fit: another file, flavour, version or GPU, no GPU; TensorRT
            refuses the engine. Each says how it is built again.
    """
    exported = read_sidecar(path)
    again = rebuild(path, exported)
    raw = _verified(path, exported, again)
    trt, name = _flavour(path, exported, again)
    if not torch.cuda.is_available():
        raise UserError(
            f"{path} needs an NVIDIA GPU, and none is visible to torch",
            f"run the ONNX file instead, or use a machine with a GPU; to build it there again: {again}",
        )
    name = f"{name} on {torch.cuda.get_device_name()}"
    _require_capability(path, exported, again)
    log = quiet_log(trt)
    runtime = trt.Runtime(log)
    found = runtime.deserialize_cuda_engine(raw)
    if found is None:
        raise UserError(f"{name} refuses {path}: {log.told()}", f"build it again here: {again}")
    _require_contract(trt, found, exported, path, again)
    return Engine(exported, name, found, (runtime, log), torch.device("cuda", torch.cuda.current_device()))


def rebuild(path: Path, exported: ExportedModel) -> str:
    """What to type for an engine like the one at `path`, for this machine."""
    parent = path.with_name(exported.parent)
    named = str(parent if parent.exists() else exported.parent)
    words = ["python", "-m", "export.trt", named, "--precision", exported.precision]
    words += ["--batch", ",".join(map(str, exported.batch))] if len(exported.batch) == 3 else []
    words += ["--backend", "rtx"] if exported.built_with.get("backend") == "rtx" else []
    return printable(shlex.join(words))


def _verified(path: Path, exported: ExportedModel, again: str) -> bytes:
    """The bytes of the engine, which are those that the sidecar is about."""
    beside = sidecar(path)
    if exported.kind != "engine" or len(exported.batch) != 3:
        raise UserError(f"{beside} describes no engine but an {exported.kind}", f"build it again: {again}")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is no regular file", f"build it again: {again}")
        if found.st_size != exported.bytes or found.st_size > MOST_BYTES:
            raise UserError(
                f"{path} has {found.st_size:,} bytes, {beside} is about {exported.bytes:,}", f"build it again: {again}"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "name an engine, e.g. best.engine") from None
    if hashlib.sha256(raw).hexdigest() != exported.sha256:
        raise UserError(
            f"{path} is not the file that {beside} is about: their SHA-256 differ", f"build it again: {again}"
        )
    return raw


def _flavour(path: Path, exported: ExportedModel, again: str) -> tuple[Any, str]:
    """The TensorRT package that the engine was built with, and its name with the version."""
    backend = exported.built_with.get("backend")
    if not isinstance(backend, str) or backend not in FLAVOURS:
        raise UserError(
            f"{sidecar(path)} says that the engine is of {backend!r:.40}, expected {' or '.join(FLAVOURS)}",
            f"build it again: {again}",
        )
    module, extra, name = FLAVOURS[backend]
    try:
        trt = require(module, extra=extra)
    except UserError as error:
        raise UserError(
            f"{path} was built with {name}: {error.problem}",
            f"{error.fix}; or build it with what is here: {again.removesuffix(' --backend rtx')}",
        ) from None
    built, here = exported.built_with.get(module), trt.__version__
    if built != here:
        raise UserError(
            f"{path} was built with {name} {built!r:.40}, here is {here!r}: engines fit one version only",
            f"build it again: {again}",
        )
    return trt, f"{name} {here}"


def _require_capability(path: Path, exported: ExportedModel, again: str) -> None:
    capabilities = exported.built_with.get("compute_capabilities", [])
    here = ".".join(map(str, torch.cuda.get_device_capability()))
    if not isinstance(capabilities, list) or (capabilities and here not in capabilities):
        more = f" --compute-capability {here}" if "--backend" in again else ""
        raise UserError(
            f"{path} was built for GPUs of compute capability {capabilities!r:.120}, "
            f"this {torch.cuda.get_device_name()} has {here}",
            f"build it again: {again}{more}",
        )


def _require_contract(trt: Any, found: Any, exported: ExportedModel, path: Path, again: str) -> None:
    """Inputs, outputs and batch sizes of the engine are those of its sidecar: memory is made after these."""
    side, classes = exported.spec.input.size, len(exported.spec.labels)
    expected = {
        INPUT: (trt.DataType.UINT8, (-1, 1, side, side)),
        LOGITS: (trt.DataType.FLOAT, (-1, classes)),
        PROBABILITIES: (trt.DataType.FLOAT, (-1, classes)),
    }
    names = [found.get_tensor_name(place) for place in range(found.num_io_tensors)]
    has = {name: (found.get_tensor_dtype(name), tuple(found.get_tensor_shape(name))) for name in names}
    batch = tuple(shape[0] for shape in found.get_tensor_profile_shape(INPUT, 0)) if INPUT in has else ()
    if has != expected or batch != exported.batch:
        raise UserError(
            f"{path} has inputs and outputs {has} for batches {batch}, "
            f"{sidecar(path)} is about {expected} for batches {exported.batch}",
            f"build it again: {again}",
        )


def quiet_log(trt: Any) -> Any:
    """A logger of TensorRT that keeps the newest errors, for one message of ours, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.lines = [*self.lines[-2:], " ".join(message.split())[:300]]

        def told(self) -> str:
            return "; ".join(self.lines) or "it gives no reason"

    return Log()


def _out_of_memory(name: str) -> UserError:
    return UserError(
        f"{name}: the GPU has too little memory for the engine",
        "free some (nvidia-smi), or build it again with a smaller --batch",
    )
