"""ONNX Runtime's session on the provider that was asked for, and on no other."""

import os
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from fer_dist.errors import UserError, printable
from fer_dist.extras import require
from fer_dist.serve.artifact import Precision

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""What to type -> what ONNX Runtime calls it; besides `auto`."""


def open_session(raw: bytes, precision: Precision, path: Path, provider: str, threads: int | None) -> Any:
    """A session on the provider asked for, which is checked: ONNX Runtime falls back to the CPU without a word.

    Nodes that a GPU provider has no kernel for are computed on the CPU, as ONNX Runtime decides.

    Args:
        raw: a model that `read_onnx` has passed.
        path: its file, for messages; it is not read.
        provider: one of PROVIDERS; or auto, which takes CUDA where it really starts, else the CPU, and the CPU
            for what is made for CPUs.

    Raises:
        UserError: the provider does not start here, or does not take the model.
    """
    gpu = torch.cuda.is_available()
    if provider in ("cuda", "tensorrt") and not gpu:
        raise UserError(f"provider {provider} needs a GPU, and none is visible", "--provider cpu")
    best = "cuda" if gpu and precision != "int8.cpu" else "cpu"
    wanted = best if provider == "auto" else provider
    try:
        session = _start(raw, precision, wanted, threads)
        found = session.get_providers()[0]
        if found != PROVIDERS[wanted] and provider != "auto":
            raise UserError(
                f"provider {wanted} was asked for, but ONNX Runtime runs {found}: {PROVIDERS[wanted]} does not start",
                "see that onnxruntime-gpu fits the CUDA and cuDNN (or TensorRT) that are installed; or --provider cpu",
            )
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime raises kinds of its own for a graph or a provider that it does not take
        if provider == "auto" and wanted != "cpu":
            return open_session(raw, precision, path, "cpu", threads)
        raise UserError(
            f"ONNX Runtime's {PROVIDERS[wanted]} does not take {path}: {reason(error)}",
            "export it again: python -m export.onnx best.pth" if wanted == "cpu" else "--provider cpu",
        ) from None
    return session


def _start(raw: bytes, precision: Precision, wanted: str, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if threads is not None:
        options.intra_op_num_threads = threads
    gpu: list[Any] = [(PROVIDERS["cuda"], {"use_tf32": "0"})] if wanted != "cpu" else []
    if wanted == "tensorrt":
        require("tensorrt", extra="tensorrt")  # its import loads the libraries that the provider looks for
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # the provider has no option for it
        gpu = [PROVIDERS["tensorrt"], *gpu]
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


def reason(error: Exception) -> str:
    """What a library says, short, without what a terminal would obey."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return printable(text)
