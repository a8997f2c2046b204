"""`python -m export.bench`: turns, percentiles, table and JSON."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export import bench
from fer_dist.errors import EXIT_USER_ERROR
from fer_dist.serve import runner
from fer_dist.serve.runner import Runner
from tests.helpers.artifacts import SIDE, SPEC, tiny_onnx, write
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
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(bench, "time", found)
    return found


class Slow(Runner):
    """Lets time pass instead of computing, and writes down its turns."""

    kind = "onnx"

    def __init__(self, name: str, ms: float, clock: Clock, log: list[str], gpu: bool = False) -> None:
        super().__init__(Path(name), SPEC, "fp32", "c" * 64)
        self.runs_on, self.on_gpu = "a bed", gpu
        self._ms, self._clock, self._log = ms, clock, log

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        self._log.append(self.path.name)
        self._clock.pass_ms(self._ms)
        return torch.zeros(len(images_N1SS), 7), torch.zeros(len(images_N1SS), 7)

    def _close(self) -> None: ...


def test_latency_throughput_and_ratio(clock: Clock) -> None:
    runners = [Slow("slow", 10, clock, []), Slow("quick", 2, clock, [])]
    slow, quick = bench.measure(runners, IMAGES, threads=3, seconds=0.2, warmup=2)
    assert (slow.p50_ms, slow.p95_ms, slow.p99_ms, slow.ratio, slow.calls) == (10, 10, 10, 1, 20)
    assert (quick.p50_ms, quick.p95_ms, quick.p99_ms, quick.ratio, quick.calls) == (2, 2, 2, 0.2, 100)
    assert slow.images_per_second == pytest.approx(4 / 0.01)
    assert quick.images_per_second == pytest.approx(4 / 0.002)
    assert (slow.threads, slow.batch, slow.runs_on, slow.gpu_p50_ms) == (3, 4, "a bed", None)


def test_they_take_turns(clock: Clock) -> None:
    """Each has its time in several turns, the others' between them."""
    log: list[str] = []
    bench.measure([Slow(name, 1, clock, log) for name in "abc"], IMAGES, threads=1, seconds=0.05, warmup=2)
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
    (found,) = bench.measure([Slow("a", 5, clock, [])], IMAGES, threads=1, seconds=0.001, warmup=0)
    assert found.calls == bench.TURNS


def test_a_gpu_has_no_threads(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_graph_ms", lambda *_: 0.5)
    (found,) = bench.measure([Slow("a", 1, clock, [], gpu=True)], IMAGES, threads=2, seconds=0.01, warmup=0)
    assert (found.threads, found.gpu_p50_ms) == (None, 0.5)


def test_percentiles_are_times_that_were_measured() -> None:
    times = [ms * 1_000_000 for ms in range(100, 0, -1)]
    assert [bench._percentile(times, part) for part in (50, 95, 99)] == [50, 95, 99]
    assert bench._percentile([7_000_000], 99) == 7
    assert bench._percentile([3_000_000, 1_000_000, 2_000_000], 50) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (["{}/none.onnx"], "cannot read"),
        (["{}/a.onnx", "--provider", "cuda"], "provider cuda needs a GPU|was asked for"),
        (["{}/a.onnx", "--batch", "0"], "--batch"),
        (["{}/a.onnx", "--batch", "1000000"], "1000000 is more than 65536"),
        (["{}/a.onnx", "--seconds", "nan"], "--seconds is nan"),
        (["{}/a.onnx", "--json", "{}/none/bench.json"], "cannot be written"),
        ([], "ARTIFACT"),
    ],
)
def test_errors_are_said_once(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write(tmp_path, tiny_onnx(), "a.onnx")
    assert command(bench.main, *(word.format(tmp_path) for word in words)) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert any(part in err for part in said.split("|"))


def test_pictures_of_different_sizes_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_one(path: Path, **_: Any) -> Runner:
        found = Slow(path.name, 0, Clock(), [])
        if path.name == "b":
            found.spec = type(SPEC)(arch="vit")
        return found

    monkeypatch.setattr(runner, "open_runner", open_one)
    assert command(bench.main, "a", "b") == EXIT_USER_ERROR
    assert "different sizes" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, tiny_onnx(), "a.onnx")
    assert command(bench.main, path, "--seconds", "0.1", "--batch", "1") == 0
    assert "CUDAExecutionProvider" in capsys.readouterr().out
