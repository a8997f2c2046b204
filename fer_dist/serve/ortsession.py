"""ONNX Runtime's session on the provider that was asked for, and on no other."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from fer_dist.errors import UserError, printable
from fer_dist.extras import require
from fer_dist.serve.artifact import INPUT, LOGITS, PROBABILITIES, Precision
from fer_dist.serve.replay import Replay, warm

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""What to type -> what ONNX Runtime calls it; besides `auto`."""
_ON_CPU = "--provider cpu (predict and app: --device cpu)"


def open_session(
    raw: bytes, precision: Precision, path: Path, provider: str, threads: int | None, stream: int = 0
) -> Any:
    """A session on the provider asked for, which is checked: ONNX Runtime falls back to the CPU without a word.

    Nodes that a GPU provider has no kernel for are computed on the CPU, as ONNX Runtime decides.

    Args:
        raw: a model that `read_onnx` has passed.
        path: its file, for messages; it is not read.
        provider: one of PROVIDERS; or auto, which takes CUDA where it really starts, else the CPU, and the CPU
            for what is made for CPUs.
        stream: the CUDA stream to record a CUDA graph on, see `record_session`; 0: no graph.

    Raises:
        UserError: the provider does not start here, or does not take the model.
    """
    gpu = torch.cuda.is_available()
    if provider in ("cuda", "tensorrt") and not gpu:
        raise UserError(f"provider {provider} needs a GPU, and none is visible", _ON_CPU)
    best = "cuda" if gpu and precision != "int8.cpu" else "cpu"
    wanted = best if provider == "auto" else provider
    try:
        session = _start(raw, precision, wanted, threads, stream)
        found = session.get_providers()[0]
        if found != PROVIDERS[wanted] and provider != "auto":
            raise UserError(
                f"provider {wanted} was asked for, but ONNX Runtime runs {found}: {PROVIDERS[wanted]} does not start",
                f"see that onnxruntime-gpu fits the CUDA and cuDNN (or TensorRT) that are installed; or {_ON_CPU}",
            )
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime raises kinds of its own for a graph or a provider that it does not take
        if provider == "auto" and wanted != "cpu":
            return open_session(raw, precision, path, "cpu", threads)
        raise UserError(
            f"ONNX Runtime's {PROVIDERS[wanted]} does not take {path}: {reason(error)}",
            "export it again: python -m export.onnx best.pth" if wanted == "cpu" else _ON_CPU,
        ) from None
    return session


def _start(raw: bytes, precision: Precision, wanted: str, threads: int | None, stream: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if threads is not None:
        options.intra_op_num_threads = threads
    graph = {"user_compute_stream": str(stream)} if stream else {}
    cuda = {"use_tf32": "0"} | graph | ({"enable_cuda_graph": "1"} if stream and wanted == "cuda" else {})
    gpu: list[Any] = [(PROVIDERS["cuda"], cuda)] if wanted != "cpu" else []
    if wanted == "tensorrt":
        require("tensorrt", extra="tensorrt")  # its import loads the libraries that the provider looks for
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # the provider has no option for it
        gpu = [(PROVIDERS["tensorrt"], graph | ({"trt_cuda_graph_enable": "1"} if stream else {})), *gpu]
    if gpu and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN as torch has brought them
    # On a float16 graph of patt_lite this one has crashed the process, without an exception (ONNX Runtime 1.32).
    without = ["NchwcTransformer"] if precision == "fp16" else []
    return onnxruntime.InferenceSession(
        raw,
        options,
        providers=[*gpu, PROVIDERS["cpu"]],
        disabled_optimizers=without,
        enable_fallback=0,
        read_config_from_model=0,
    )


def record_session(
    raw: bytes, precision: Precision, path: Path, provider: str, images_N1SS: Tensor, classes: int
) -> Replay | None:
    """A session that has recorded its work on a batch as a CUDA graph; None where ONNX Runtime cannot.

    It cannot where a node has no kernel on the GPU. The graph works on fixed memory, so inputs and outputs are
    bound to CUDA tensors, and on a stream of torch, so that events of torch tell how long it takes.

    Args:
        provider: cuda or tensorrt.
        images_N1SS: uint8 `[N, 1, S, S]` on any device; they are copied.
        classes: width of the outputs.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    try:
        session = open_session(raw, precision, path, provider, None, stream.cuda_stream)
        work = bound(session, images_N1SS.to("cuda", copy=True), classes)
        torch.cuda.synchronize()  # the pictures were copied on another stream
        return warm(work, stream)
    except Exception:  # the provider had started before: it is the graph that is refused, with kinds of its own
        return None


def bound(session: Any, images_N1SS: Tensor, classes: int) -> Callable[[], Tensor]:
    """Fix a session's inputs and outputs to memory on the device of the images.

    Returns:
        What runs the session once, does not wait for a GPU, and answers with the logits, float32 `[N, classes]`:
        the same memory at each call.
    """
    device, shape = images_N1SS.device, (len(images_N1SS), classes)
    outputs = {name: torch.zeros(shape, device=device) for name in (LOGITS, PROBABILITIES)}
    binding, place = session.io_binding(), (device.type, device.index or 0)
    binding.bind_input(INPUT, *place, np.uint8, tuple(images_N1SS.shape), images_N1SS.data_ptr())
    for name, output in outputs.items():
        binding.bind_output(name, *place, np.float32, shape, output.data_ptr())
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def work(kept: Tensor = images_N1SS) -> Tensor:  # the session knows no more than their addresses
        session.run_with_iobinding(binding, options)
        return outputs[LOGITS]

    return work


def reason(error: Exception) -> str:
    """What a library says, short, without what a terminal would obey."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return printable(text)
