"""`python -m benchmarks.app --model FILE`: many clients ask the app for a minute, on loopback.

Each client is a thread with a `gradio_client` of its own that uploads a drawn picture and asks for its faces, again and
again. Said in the end: errors, the app's memory over time, and the 95th percentile of an answer's time as a ratio to
that of a single client who has the app alone.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

from tests.helpers.synthetic_scenes import scene


def main() -> None:
    """Run it with `sys.argv`; leaves with 1 when a client got an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=7899)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        pictures = []
        for seed in range(7):
            pictures.append(Path(name) / f"{seed}.jpg")
            Image.fromarray(scene([180, 120][: 1 + seed % 2], seed).rgb_HW3).save(pictures[-1], quality=90)
        words = [
            sys.executable,
            "-m",
            "fer_dist.app",
            "--model",
            given.model,
            "--port",
            str(given.port),
            "--no-browser",
        ]
        app = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert app.stdout is not None
            address = next(found[0] for line in app.stdout if (found := re.match(r"http://\S+", line)))
            alone, errors = _load(address, pictures, 1, given.seconds / 4, app.pid)
            many, more = _load(address, pictures, given.clients, given.seconds, app.pid)
        finally:
            app.terminate()
            app.wait()
    ratio = np.percentile(many, 95) / np.percentile(alone, 95)
    print(f"p95 of {given.clients} clients is {ratio:.1f} times a single client's")
    raise SystemExit(1 if errors + more else 0)


def _load(address: str, pictures: list[Path], clients: int, seconds: float, pid: int) -> tuple[list[float], int]:
    """So many clients at the same time: seconds of each answer, and how many were none."""
    times: list[float] = []
    errors: list[str] = []
    memory: list[float] = []
    ready = threading.Barrier(clients + 1)
    until = [0.0]

    def ask(first: int) -> None:
        client = Client(address, verbose=False)
        client.predict(handle_file(pictures[0]), api_name="/predict")
        ready.wait()
        number = first
        while time.monotonic() < until[0]:
            number += 1
            began = time.monotonic()
            try:
                client.predict(handle_file(pictures[number % len(pictures)]), api_name="/predict")
            except Exception as error:  # whatever it is, it counts
                errors.append(repr(error)[:200])
            else:
                times.append(time.monotonic() - began)
        client.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    until[0] = time.monotonic() + 3600
    ready.wait()
    until[0] = time.monotonic() + seconds
    while time.monotonic() < until[0]:
        memory.append(_resident_mib(pid))
        time.sleep(seconds / 12)
    for thread in threads:
        thread.join()
    p50, p95 = np.percentile(times, [50, 95])
    print(
        f"{clients} clients, {seconds:.0f} s: {len(times):,} answers, {len(times) / seconds:.1f} a second, "
        f"{len(errors)} errors"
    )
    print(f"  answer: median {1000 * p50:.0f} ms, p95 {1000 * p95:.0f} ms")
    print(f"  memory of the app [MiB]: {' '.join(f'{value:.0f}' for value in memory)}", flush=True)
    for error in sorted(set(errors))[:5]:
        print(f"  {error}")
    return times, len(errors)


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
