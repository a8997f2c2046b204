"""`python -m fer_dist.launch`: torchrun with exit codes that say something."""

import signal
import sys
import time
from pathlib import Path

import pytest

from fer_dist.launch import summary
from tests.helpers.processes import Process, python

LAUNCH = ["-m", "fer_dist.launch", "--standalone", "--nproc_per_node=2", "--shutdown-timeout=60"]
LAUNCH += ["--signals-to-handle=SIGTERM,SIGUSR1"]
SAVES = """\
import os, pathlib, signal, sys, time
told = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: told.append(1))
here = pathlib.Path(sys.argv[1])
(here / f"up-{os.environ['RANK']}").touch()
while not told:
    time.sleep(0.05)
time.sleep(3)
(here / f"saved-{os.environ['RANK']}").touch()
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("codes", "code"),
    [({75, 69}, 75), ({75, 1}, 75), ({2, -15}, 2), ({69}, 69), ({69, 1}, 1), ({-9, 69}, 1), ({1}, 1), ({3}, 1)],
)
def test_one_code_for_all(codes: set[int], code: int) -> None:
    assert summary(codes) == code


def test_an_error_of_the_user() -> None:
    done = python(*LAUNCH, "-m", "fer_dist.train", "--optim.lr", "-1")
    assert done.code == 2
    assert done.err.count("expected > 0") == 1
    assert "Traceback" not in done.err


def test_many_signals_during_the_save(tmp_path: Path) -> None:
    """Preemption alone sends two; the ranks are not left alone in the middle of their save."""
    script = tmp_path / "saves.py"
    script.write_text(SAVES)
    process = Process([sys.executable, *LAUNCH, str(script), str(tmp_path)])
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"up-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.send(number)
        time.sleep(0.3)
    done = process.wait()
    assert done.code == 75, done.err
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))
    assert process.alive() == []
