"""What needs a CUDA device: engines that run, ONNX Runtime on the GPU. Skipped elsewhere, with the reason."""

import json
from pathlib import Path

import pytest
import torch

from export import bench, parity, trt
from export import onnx as onnx_command
from export.answers import ask
from export.engines import choose_builder
from export.gate import compare, tolerance_of
from fer_dist.serve.artifact import Precision, read_sidecar
from fer_dist.serve.ortsession import PROVIDERS
from fer_dist.serve.runner import open_runner
from tests.helpers.exporting import command, saved, truth_of
from tests.helpers.tiny_models import pictures

pytestmark = pytest.mark.gpu

ARCHS = ("vit", "patt_lite", "vit_mae")
# Random weights: classes lie closer together than int8 and float16 are exact. Probabilities keep their bound.
LOOSE: dict[Precision, tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("--tolerance", "agreement=0,accuracy=0.05"),
    "int8": ("--tolerance", "agreement=0,accuracy=0.3"),
}


def require(backend: str) -> None:
    """Skip where the package of a backend is missing, or is not for this GPU."""
    module = "tensorrt_rtx" if backend == "rtx" else "tensorrt"
    pytest.importorskip(module, reason=f"{module} is not installed")
    if backend == "rtx" and not choose_builder("rtx", (1, 8, 64), ()).executes:
        pytest.skip(f"TensorRT for RTX is not for GPUs of compute capability {torch.cuda.get_device_capability()}")


@pytest.mark.parametrize("precision", LOOSE)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("backend", ["tensorrt", "rtx"])
def test_an_engine_is_built_and_executed(backend: str, arch: str, precision: Precision, tmp_path: Path) -> None:
    require(backend)
    path = saved(tmp_path, arch)
    words = [path, "--backend", backend, "--precision", precision, "--batch", "1,8,64", *LOOSE[precision]]
    assert command(trt.main, *words) == 0
    (engine,) = tmp_path.glob("*.engine")
    report = read_sidecar(engine).parity
    assert report["executed"] is True
    assert set(report["by_batch"]) >= {"1", "2", "3", "7", "64"}
    assert report["candidate"].startswith(f"{engine.name} (TensorRT")
    assert command(parity.main, path, engine, *LOOSE[precision]) == 0
    with open_runner(engine) as runner:
        images_N1SS = pictures(200)  # beyond its largest batch
        found, again = runner.run(images_N1SS), runner.run(images_N1SS[:3])
    torch.testing.assert_close(found.logits_NK[:3], again.logits_NK, atol=2e-2, rtol=0)
    torch.testing.assert_close(found.probabilities_NK, found.logits_NK.softmax(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", LOOSE)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_providers_of_onnx_runtime(provider: str, arch: str, precision: Precision, tmp_path: Path) -> None:
    """The requested provider really runs, and its outputs pass the gate."""
    if provider == "tensorrt":
        require("tensorrt")
    assert command(onnx_command.main, saved(tmp_path, arch), "--precision", precision, *LOOSE[precision]) == 0
    artifact = tmp_path / f"best{'' if precision == 'fp32' else f'.{precision}'}.onnx"
    with open_runner(artifact, provider=provider) as runner:
        assert runner.runs_on == PROVIDERS[provider]
        reference, faces = truth_of(arch)
        found = ask(runner, faces)
    bounds = tolerance_of(precision, "".join(LOOSE[precision][1:]))
    report = compare(reference, found, faces, bounds, names=("torch", provider))
    assert report.passed, report.reasons


@pytest.mark.parametrize("kind", ["pth", "onnx", "tensorrt", "rtx"])
def test_bench(kind: str, tmp_path: Path) -> None:
    """The work alone, by CUDA events and a replayed graph, stands beside the time of a caller, and is less."""
    path = saved(tmp_path, "vit")
    if kind == "onnx":
        assert command(onnx_command.main, path) == 0
    elif kind != "pth":
        require(kind)
        assert command(trt.main, path, "--backend", kind) == 0
    artifact = tmp_path / f"best.{kind if kind in ('pth', 'onnx') else 'engine'}"
    words = [artifact, "--batch", "8", "--seconds", "0.5", "--json", tmp_path / "bench.json"]
    assert command(bench.main, *words) == 0
    (line,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert 0 < line["gpu_p50_ms"] < line["p50_ms"]
    if kind == "onnx":
        assert line["runs_on"] == PROVIDERS["cuda"]


def test_the_timing_cache_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("tensorrt")
    monkeypatch.setenv("FER_DIST_CACHE", str(tmp_path / "cache"))
    path = saved(tmp_path, "patt_lite")
    for _ in range(2):
        assert command(trt.main, path, "--backend", "tensorrt") == 0
        (kept,) = (tmp_path / "cache" / "tensorrt").iterdir()
        assert kept.stat().st_size > 100
