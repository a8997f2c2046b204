"""Read an untrusted file in a process of its own, and measure by how much its memory grows."""

import multiprocessing
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from fer_dist.data.faces import Faces
from fer_dist.data.readers import read_faces
from fer_dist.serve.photos import read_photo
from fer_dist.spec import LabelSet
from fer_dist.tensors import read_tensors

LIMIT_BYTES, LIMIT_S = 6 * 2**30, 20
"""A process that takes more ends, and the tests continue."""


def read_set(path: Path, on_error: Literal["stop", "skip"] = "stop", ferplus: Path | None = None) -> Faces:
    """Read a data set with the default settings."""
    return read_faces(path, size=48, labels=LabelSet(), on_error=on_error, ferplus=ferplus)


READERS: dict[str, Callable[[Path], object]] = {
    "tensors": read_tensors,
    "faces": lambda path: len(read_set(path)),
    "photo": lambda path: read_photo(path).rgb_HW3.shape,
}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "pyarrow.parquet", __name__])  # shared by its children: not a growth


def read_within(reader: str, path: Path, expected: str, *, max_mib: int) -> None:
    """Read a file by one of READERS; require a result, in bounded memory and 10 s of CPU time.

    Args:
        expected: a part of the error, or of `read: value`.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_measure, args=(sender, reader, path))
    process.start()
    sender.close()
    outcome, grown, seconds = receiver.recv()  # EOFError: it has ended without a result
    process.join()
    assert grown < max_mib * 2**20, f"{path}: {grown / 2**20:.0f} MiB: {outcome}"
    assert seconds < 10, f"{path}: {seconds:.1f} s: {outcome}"
    assert outcome.startswith(("read: ", "UserError: ", "NotTensors: "))
    assert expected in outcome


def _measure(sender: Connection, reader: str, path: Path) -> None:
    signal.alarm(20 * LIMIT_S)  # its default is to end the process; a busy machine takes longer than its CPU time
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + LIMIT_BYTES, -1))
    before = _status_bytes("VmRSS")
    try:
        outcome = f"read: {READERS[reader](path)}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    sender.send((outcome[:2000], _status_bytes("VmHWM") - before, time.process_time()))


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
