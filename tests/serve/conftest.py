"""Share a checkpoint and its ONNX file between the tests of fer_dist.serve."""

from pathlib import Path

import pytest

from tests.helpers.artifacts import trained


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """best.pth of a tiny transformer and best.onnx as torch exports it; to be read only."""
    return trained(tmp_path_factory.mktemp("exported"))
