"""Fixtures of the tests of the export."""

import shutil
from pathlib import Path

import pytest

from export import maker, trt
from fer_dist.config import Config
from fer_dist.serve import dataset
from tests.helpers.exporting import DRAWN, command, exported, saved


@pytest.fixture
def exported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands take the graph of `lively(arch)` as it was exported before: the exporter takes seconds."""
    monkeypatch.setattr(maker, "to_onnx", exported)


@pytest.fixture
def few_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is known of the data, a small set of drawn faces instead of thousands."""
    monkeypatch.setattr(dataset, "Config", lambda: Config().override(DRAWN))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after `python -m export.trt best.pth`; to be read only."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: no engine can be built here")
    folder = tmp_path_factory.mktemp("whole")
    saved(folder, "vit")
    assert command(trt.main, folder / "best.pth", "--backend", "rtx") == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same, to be changed: best.pth, best.onnx and its JSON file."""
    for name in ("best.pth", "best.onnx", "best.onnx.json"):
        shutil.copy(whole / name, tmp_path)
    return tmp_path
