"""TensorRT engines from ONNX graphs: TensorRT 10 and 11 with a GPU, TensorRT for RTX with or without one.

All three are strongly typed: what a layer computes in stands in the graph (`export/precision.py`), and
there is no flag for it. TensorRT 10 has to be told so.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from fer_dist.config import DataConfig
from fer_dist.data.cache import cache_dir
from fer_dist.engine.checkpoint import write_atomically
from fer_dist.errors import UserError
from fer_dist.extras import require
from fer_dist.serve.artifact import ATTENTION, INPUT, LOGITS, PROBABILITIES
from fer_dist.serve.engine import FLAVOURS, quiet_log
from fer_dist.spec import ModelSpec

RTX_DEFAULT = "8.0 and later"
"""GPUs that an engine of TensorRT for RTX is built for unless others are named (NVIDIA's guide, "CPU-Only AOT")."""

Backend = Literal["tensorrt", "rtx"]


@dataclass(frozen=True, kw_only=True)
class EngineBuilder:
    """Builds engines with one of the TensorRT packages.

    Attributes:
        trt: the package.
        batch: smallest, best and largest batch.
        compute_capabilities: GPUs to build for, such as "8.6"; empty: RTX_DEFAULT. For `tensorrt` that of this GPU.
        executes: whether engines of it run on this machine.
    """

    backend: Backend
    trt: ModuleType
    batch: tuple[int, ...]
    compute_capabilities: tuple[str, ...]
    executes: bool

    def build(self, raw: bytes, name: str, spec: ModelSpec) -> tuple[bytes, dict[str, Any]]:
        """The engine of an ONNX file, and what it was built with.

        Args:
            raw: the file's bytes; all weights are inside.
            name: of the file, for messages.
            spec: the contract that the parsed network is held to.

        Raises:
            UserError: TensorRT does not take the graph, or builds no engine of it; says what it said.
        """
        trt, log = self.trt, quiet_log(self.trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(raw):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            said = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
            raise UserError(f"{self.title} does not read {name}: {said[:500]}", "another --precision or --backend")
        self._check(network, spec, name)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is to be float32: TF32 has ten bits
        side = spec.input.size
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, *((size, 1, side, side) for size in self.batch))
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"{self.title} refuses batches of {self.batch}: {log.told()}", "--batch 1,8,64")
        self._target(config)
        cache = self._timing_cache(config)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise UserError(f"{self.title} builds no engine of {name}: {log.told()}", self._fix())
        if cache is not None:
            _keep(cache, bytes(config.get_timing_cache().serialize()))
        return bytes(engine), self._built_with(network)

    def told(self) -> str:
        """What it builds with and for, for people."""
        return f"{self.title}, for compute capability {', '.join(self.compute_capabilities) or RTX_DEFAULT}"

    @property
    def title(self) -> str:
        """The package with its version."""
        return f"{FLAVOURS[self.backend][2]} {self.trt.__version__}"

    def _check(self, network: Any, spec: ModelSpec, name: str) -> None:
        """The parsed network has the contract's inputs and outputs. Raises UserError where it has not."""
        trt, side, classes = self.trt, spec.input.size, len(spec.labels)
        for output in [network.get_output(i) for i in range(network.num_outputs)]:
            if output.name == ATTENTION:  # what it takes is for the classes: TensorRT drops what is only for this
                network.unmark_output(output)
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        found = [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        expected = [
            (INPUT, trt.DataType.UINT8, (-1, 1, side, side)),
            (LOGITS, trt.DataType.FLOAT, (-1, classes)),
            (PROBABILITIES, trt.DataType.FLOAT, (-1, classes)),
        ]
        if found != expected:
            raise UserError(f"{self.title} reads {name} as {found}, expected {expected}", "another --backend")

    def _target(self, config: Any) -> None:
        """Say which GPUs the engine is for; TensorRT builds for the one that is here."""
        if self.backend == "tensorrt" or not self.compute_capabilities:
            return
        config.num_compute_capabilities = len(self.compute_capabilities)
        for i, name in enumerate(self.compute_capabilities):
            kind = getattr(self.trt.ComputeCapability, f"SM{name.replace('.', '')}")
            if not config.set_compute_capability(kind, i):
                raise UserError(f"{self.title} refuses compute capability {name}", self._fix())

    def _timing_cache(self, config: Any) -> Path | None:
        """Measurements of earlier builds on this GPU, which the next build need not repeat; None: not for RTX."""
        if self.backend == "rtx":
            return None
        path = timing_cache(self.trt.__version__)
        old = b""
        with suppress(OSError):
            old = path.read_bytes()
        cache = config.create_timing_cache(old)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # damaged
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        return path

    def _built_with(self, network: Any) -> dict[str, Any]:
        found = {
            "backend": self.backend,
            FLAVOURS[self.backend][0]: self.trt.__version__,
            "compute_capabilities": list(self.compute_capabilities),
            "layers": network.num_layers,
        }
        if self.backend == "tensorrt":
            found["gpu"] = torch.cuda.get_device_name()
        return found

    def _fix(self) -> str:
        if self.backend == "tensorrt":
            return "--backend rtx, or another --precision"
        others = [name for name in _known(self.trt) if name not in self.compute_capabilities]
        return f"another --precision, or --compute-capability of {', '.join(others)}"


def choose_builder(backend: str, batch: tuple[int, ...], compute_capabilities: tuple[str, ...]) -> EngineBuilder:
    """The builder that was asked for.

    Args:
        backend: tensorrt, rtx, or auto: TensorRT where there is a GPU, else TensorRT for RTX.
        batch: smallest, best and largest batch.
        compute_capabilities: of TensorRT for RTX, such as "8.6"; empty: RTX_DEFAULT.

    Raises:
        UserError: the package is not there (auto: neither is), there is no GPU for `tensorrt`, or a compute
            capability is none of the package's.
    """
    gpu = torch.cuda.is_available()
    if backend == "tensorrt" and compute_capabilities:
        raise UserError("--compute-capability is for TensorRT for RTX; TensorRT builds for this GPU", "--backend rtx")
    if backend == "tensorrt" and not gpu:
        raise UserError("TensorRT builds engines only with a GPU, and there is none", "--backend rtx, which needs none")
    chosen, trt = _import(backend, gpu and not compute_capabilities)
    here = "{}.{}".format(*torch.cuda.get_device_capability()) if gpu else ""
    if chosen == "tensorrt":
        return EngineBuilder(backend=chosen, trt=trt, batch=batch, compute_capabilities=(here,), executes=True)
    known = _known(trt)
    for name in compute_capabilities:
        if name not in known:
            raise UserError(
                f"{name} is no compute capability of TensorRT for RTX {trt.__version__}; it knows {', '.join(known)}",
                "--compute-capability 8.6,8.9",
            )
    mine = tuple(dict.fromkeys(compute_capabilities))
    executes = here in (mine or [name for name in known if float(name) >= 8])
    return EngineBuilder(backend=chosen, trt=trt, batch=batch, compute_capabilities=mine, executes=executes)


def timing_cache(version: str) -> Path:
    """Where measurements of builds are kept: per TensorRT and GPU, in the user's cache."""
    gpu = re.sub(r"[^\w.-]+", "-", torch.cuda.get_device_name())
    return cache_dir(DataConfig()) / "tensorrt" / f"{version}-{gpu}.timing"


def _keep(path: Path, raw: bytes) -> None:
    """Write the measurements; without them the next build takes longer, that is all."""
    with suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(raw))


def _known(trt: ModuleType) -> list[str]:
    """The compute capabilities that TensorRT for RTX has names for: "7.5", ..., "12.0"."""
    found = [name[2:] for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return sorted((f"{name[:-1]}.{name[-1]}" for name in found), key=float)


def _import(backend: str, native: bool) -> tuple[Backend, ModuleType]:
    """The package of a backend; of `auto` the first that loads."""
    order: tuple[Backend, ...] = ("tensorrt", "rtx") if native else ("rtx",)
    if backend != "auto":
        order = ("rtx" if backend == "rtx" else "tensorrt",)
    problems = []
    for name in order:
        module, extra, _ = FLAVOURS[name]
        try:
            return name, require(module, extra=extra)
        except UserError as error:
            if backend != "auto":
                raise
            problems.append(error.problem)
    raise UserError(
        f"no TensorRT that builds here: {'; '.join(problems)}",
        "pip install 'fer-dist[tensorrt-rtx]' (with or without a GPU), or 'fer-dist[tensorrt]' (with one)",
    )
