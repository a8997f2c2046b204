"""What every test gets: its own cache folder, one thread, no network, and skips that say why."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).resolve().parents[1]

# A machine that is lent for its GPU may lack ONNX Runtime: `pytest -m gpu` runs the rest there.
collect_ignore_glob = (
    []
    if find_spec("onnxruntime")
    else ["export/*.py", "serve/*.py", "faults/test_hostile_pickles.py", "test_predict_command.py"]
)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests press Ctrl-C
# Set here, before any test imports torch, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads: several ranks share few cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once, everywhere alike
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)  # pytest itself is no rank of a launcher


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of decoded data sets: a temporary folder of this session, never the user's own."""
    folder = tmp_path_factory.mktemp("fer_dist_cache")
    os.environ["FER_DIST_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real_archive() -> Path:
    """The real FER2013 as a zip: `$FER2013_ROOT` (the file or its folder), or beside the repository."""
    path = Path(os.environ.get("FER2013_ROOT") or ROOT.parent / "shared" / "fer2013")
    return _present(path / "archive.zip" if path.is_dir() else path, "FER2013_ROOT names the real data set")


@pytest.fixture(scope="session")
def real_mobilenet() -> Path:
    """torchvision's ImageNet weights of MobileNetV2."""
    path = ROOT.parent / "shared" / "weights" / "mobilenet_v2-b0353104.pth"
    return _present(path, "torchvision's file goes there")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> "list[Figure]":
    """Each matplotlib figure that is saved."""
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **keywords: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def _present(path: Path, hint: str) -> Path:
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not here ({hint})")
    return path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadFileScheduling | None":
    """With `--dist loadfile`, as `make test`: a file is one process's alone, and so is tests/slurm.

    A file's fixtures are then made once, its tests run in their order, and of SLURM's clusters there is one at a time.
    Marks for `--dist loadgroup` would say the same, but pytest-xdist 3.8 loses them under pytest 9.2 (its issue 1386).
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]  # pytest-xdist says nothing of its types
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return Files(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none; torch is imported only if there are such tests."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; none here")
