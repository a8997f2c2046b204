"""Share a checkpoint, its ONNX file and an engine between the tests of fer_dist.serve; all are to be read only."""

from pathlib import Path

import pytest

from export.engines import choose_builder
from tests.helpers.artifacts import SPEC, engine, tiny_onnx, trained


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """best.pth of a tiny transformer and its best.onnx."""
    return trained(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def rtx_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of `tiny_onnx` for TensorRT for RTX, which builds it without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx", exc_type=ImportError)
    raw, built = choose_builder("rtx", (1, 2, 4), ()).build(tiny_onnx().SerializeToString(), "best.onnx", SPEC)
    return engine(tmp_path_factory.mktemp("rtx"), raw, built_with=built)
