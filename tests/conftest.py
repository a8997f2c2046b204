"""Prepare every test: a cache folder of its own, one thread, no network, a time limit, and skips with a reason."""

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
TIME_FACTOR = float(os.environ.get("TEST_TIME_FACTOR", "1"))
"""Multiplies the time limits below, for a slow or a busy machine."""
LIMIT_S, SLOW_LIMIT_S = 60 * TIME_FACTOR, 300 * TIME_FACTOR
"""How long a test of the first and of the second tier may take, its fixtures excluded."""
LONG_FILES = ["tune/test_faults", "slurm/test_train", "slurm/test_tune", "test_readme", "faults/test_resume"]
"""They begin first, in this order, so that at the end no process of pytest-xdist waits for one that has begun late."""
LONG_S = 10 * TIME_FACTOR
"""A test of the first tier that takes longer is reported, and makes the session fail where the factor is set, as in CI:
elsewhere nothing is known of the processor."""

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


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder that the processes of pytest-xdist share, and in it the cache of decoded data sets."""
    if not hasattr(config, "workerinput"):
        folder = os.environ[SHARED] = tempfile.mkdtemp(prefix="fer_dist_tests_")
        os.environ["FER_DIST_CACHE"] = f"{folder}/cache"  # never the user's own
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first, and give each test the time limit of its tier; soak tests have none."""
    order = {f"tests/{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
    for item in items:
        if item.get_closest_marker("soak") is None and item.get_closest_marker("timeout") is None:
            slow = item.get_closest_marker("slow") is not None
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT_S if slow else LIMIT_S))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server of warm processes while the first tests run, if a test uses it."""
    processes = sys.modules.get("tests.helpers.processes")
    if processes and session.items and not session.config.option.collectonly:
        processes.start_server()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the session for a long test of the first tier in CI, and end processes that a failed test has left."""
    if processes := sys.modules.get("tests.helpers.processes"):
        processes.kill_leftovers()
    if exitstatus == pytest.ExitCode.OK and _long_tests and "TEST_TIME_FACTOR" in os.environ:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_long_tests: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note each test of the first tier that is too long for it."""
    if report.when == "call" and report.duration > LONG_S and not {"slow", "soak", "gpu"} & set(report.keywords):
        _long_tests.append(f"{report.duration:5.1f} s  {report.nodeid}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one line for each reason of a skip, and the tests that are too long for the first tier."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.most_common():
        terminalreporter.line(f"skipped {count}: {reason.removeprefix('Skipped: ')}")
    for line in sorted(_long_tests, reverse=True):
        terminalreporter.line(f"over {LONG_S:.0f} s, too long for a test without the mark `slow`: {line}", red=True)


@pytest.fixture(scope="session", autouse=True)
def warm_server() -> None:
    """Wait until a warm process starts at once, so that this is not in the time of a test."""
    if processes := sys.modules.get("tests.helpers.processes"):
        processes.python("-c", "")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` on a machine without a CUDA device."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; none here")
