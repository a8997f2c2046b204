"""A process that reads hostile files, each in a child of its own, and tells what became of it, how long it took, and
by how much the child's memory grew.

A child that grows beyond LIMIT_BYTES or takes too long ends, and the tests go on.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.conftest import ROOT

LIMIT_BYTES = 6 * 2**30


class Answer(NamedTuple):
    """What became of a file.

    Attributes:
        error: the name of the error's class; "" when it was read, "signal N" when the child died.
        problem: the error's text, or that of the value.
        grown: bytes by which the child's memory grew at most.
        seconds: how long it took.
    """

    error: str
    problem: str
    grown: int
    seconds: float


class Meter:
    """Asks the process; use it in a `with`."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, reader: str, path: Path, seconds: int = 20) -> Answer:
        """Have a file read by one of READERS."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([reader, str(path), seconds]), file=self._process.stdin, flush=True)
        return Answer(*json.loads(self._process.stdout.readline()))


def _tensors(path: Path) -> object:
    from fer_dist.tensors import read_tensors

    return read_tensors(path)


def _faces(path: Path) -> object:
    from fer_dist.data.readers import read_faces
    from fer_dist.spec import LabelSet

    return len(read_faces(path, size=48, labels=LabelSet(), on_error="stop", ferplus=None))


def _photo(path: Path) -> object:
    from fer_dist.serve.photos import read_photo

    return read_photo(path).rgb_HW3.shape


READERS: dict[str, Callable[[Path], object]] = {"tensors": _tensors, "faces": _faces, "photo": _photo}


def _bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measured(reader: str, path: str, seconds: int) -> list[Any]:
    signal.alarm(seconds)  # its default is to end the process
    resource.setrlimit(resource.RLIMIT_AS, (_bytes("VmSize") + LIMIT_BYTES, -1))
    before, start = _bytes("VmRSS"), time.monotonic()
    try:
        error, problem = "", str(READERS[reader](Path(path)))[:2000]
    except BaseException as caught:
        error, problem = type(caught).__name__, str(caught)[:2000]
    return [error, problem, _bytes("VmHWM") - before, time.monotonic() - start]


def _in_child(request: list[Any]) -> str:
    """Forked: what the parent has imported is there at once, and is no part of the growth."""
    back, forth = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(forth, json.dumps(_measured(*request)).encode())
        os._exit(0)
    os.close(forth)
    with os.fdopen(back) as answer:
        told = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return told or json.dumps([f"signal {-code}", "", 0, 0])


if __name__ == "__main__":
    import pyarrow.parquet  # noqa: F401

    import fer_dist.data.readers
    import fer_dist.serve.photos
    import fer_dist.tensors  # noqa: F401

    for line in sys.stdin:
        print(_in_child(json.loads(line)), flush=True)
