"""`python -m export.bench`: turns, percentiles, table and JSON."""

import json
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export import bench
from fer_dist.serve import runner
from fer_dist.serve.runner import Runner
from fer_dist.spec import ModelSpec
from tests.helpers.artifacts import SIDE, SPEC, tiny_onnx, write
from tests.helpers.commands import Capture, Patch, refused
from tests.helpers.exporting import command

IMAGES = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.uint8)


class Clock:
    """Time that passes only when somebody works: what a busy machine does to real time is not tested here."""

    def __init__(self) -> None:
        self.ns = 0

    def perf_counter_ns(self) -> int:
        return self.ns

    def pass_ms(self, ms: float) -> None:
        self.ns += int(ms * 1e6)


@pytest.fixture
def clock(monkeypatch: Patch) -> Clock:
    found = Clock()
    monkeypatch.setattr(bench, "time", found)
    return found


class Slow(Runner):
    """Let time pass instead of computing, and write down each call."""

    kind = "onnx"

    def __init__(self, name: str, clock: Clock, *ms: float, log: list[str] | None = None) -> None:
        super().__init__(Path(name), SPEC, "fp32", "c" * 64)
        self.runs_on, self._clock, self._ms = "a bed", clock, cycle(ms)
        self._log = [] if log is None else log

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        self._log.append(self.path.name)
        self._clock.pass_ms(next(self._ms))
        return torch.zeros(len(images_N1SS), 7), torch.zeros(len(images_N1SS), 7)

    def _close(self) -> None: ...


def test_latency_throughput_and_ratio(clock: Clock, monkeypatch: Patch) -> None:
    """A percentile is a time that was measured; a GPU has no threads of the CPU."""
    monkeypatch.setattr(bench, "_graph_ms", lambda *_: 0.5)
    runners = [Slow("slow", clock, 10), Slow("quick", clock, 2), Slow("gpu", clock, *range(100, 0, -1))]
    runners[2].on_gpu = True
    slow, quick, gpu = bench.measure(runners, IMAGES, threads=3, seconds=0.2, warmup=2)
    assert (slow.p50_ms, slow.p95_ms, slow.p99_ms, slow.ratio, slow.calls) == (10, 10, 10, 1, 20)
    assert (quick.p50_ms, quick.p95_ms, quick.p99_ms, quick.ratio, quick.calls) == (2, 2, 2, 0.2, 100)
    assert (slow.images_per_second, quick.images_per_second) == pytest.approx((4 / 0.01, 4 / 0.002))
    assert (slow.threads, slow.batch, slow.runs_on, slow.gpu_p50_ms) == (3, 4, "a bed", None)
    assert (gpu.threads, gpu.gpu_p50_ms) == (None, 0.5)
    assert [bench._percentile([ms * 10**6 for ms in range(100, 0, -1)], part) for part in (50, 99)] == [50, 99]


def test_they_take_turns(clock: Clock) -> None:
    """Each has its time in several turns, the others' between them."""
    log: list[str] = []
    bench.measure([Slow(name, clock, 1, log=log) for name in "abc"], IMAGES, threads=1, seconds=0.05, warmup=2)
    assert log[:6] == ["a", "a", "b", "b", "c", "c"], "warm-up first"
    turns = [(name, len(list(calls))) for name, calls in groupby(log[6:])]
    assert [name for name, _ in turns] == list("abc") * bench.TURNS
    assert max(calls for _, calls in turns) < len(log) / 6, "no turn takes half of the time of its artifact"


def test_calls_that_are_timed(clock: Clock) -> None:
    """Not the first call of a turn; one that is longer than its time, once a turn."""
    times: list[int] = []
    pauses = iter([50, 1, 1])
    bench._turn(lambda: clock.pass_ms(next(pauses)), times, until=2e6)
    assert times == [1e6, 1e6]
    (found,) = bench.measure([Slow("a", clock, 5)], IMAGES, threads=1, seconds=0.001, warmup=0)
    assert found.calls == bench.TURNS


def test_the_command(tmp_path: Path, capsys: Capture) -> None:
    """Table on stdout, everything in the JSON; two files, two batch sizes, two counts of threads."""
    paths = [write(tmp_path, tiny_onnx(), name) for name in ("a.onnx", "b.onnx")]
    words = ["--batch", "1,3", "--threads", "1,2", "--seconds", "0.02", "--warmup", "1", "--provider", "cpu"]
    assert command(bench.main, *paths, *words, "--json", tmp_path / "bench.json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    kept = [(Path(r["artifact"]).name, r["batch"], r["threads"]) for r in found["results"]]
    assert kept == [(name, n, threads) for threads in (1, 2) for n in (1, 3) for name in ("a.onnx", "b.onnx")]
    assert {r["runs_on"] for r in found["results"]} == {"CPUExecutionProvider"}
    assert all(r["calls"] >= bench.TURNS and r["images_per_second"] > 0 for r in found["results"])
    assert found["machine"]["cpu"]
    assert found["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (found["settings"]["pictures"], found["settings"]["seconds"]) == ("random uint8", 0.02)
    for part in ("random uint8 pictures", "1 warm-up batches", "perf_counter_ns", "images/s", "CPUExecutionProvider"):
        assert part in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("a.onnx ", "b.onnx "))]
    assert [row[:3] for row in rows] == [[name, str(n), str(threads)] for name, n, threads in kept]
    assert [row[7] for row in rows if row[0] == "a.onnx"] == ["1.00"] * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("none.onnx", "cannot read"),
        ("--batch 0", "--batch"),
        ("--batch 1000000", "1000000 is more than 65536"),
        ("--seconds nan", "--seconds is nan"),
        ("--json /none/bench.json", "cannot be written"),
    ],
)
def test_errors_are_said_once(words: str, said: str, tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path, tiny_onnx(), "a.onnx")
    assert said in refused(capsys, bench.main, path, *words.split())


def test_pictures_of_different_sizes_are_refused(capsys: Capture, monkeypatch: Patch) -> None:
    def open_one(path: Path, **_: Any) -> Runner:
        found = Slow(path.name, Clock(), 0)
        if path.name == "b":
            found.spec = ModelSpec(arch="vit")
        return found

    monkeypatch.setattr(runner, "open_runner", open_one)
    assert "different sizes" in refused(capsys, bench.main, "a", "b")
