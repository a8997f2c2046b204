"""`python -m export.bench ARTIFACT...`: latency and throughput of artifacts, measured in turns."""

import json
import os
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.console import numbers
from fer_dist.commandline import Parser, run
from fer_dist.console import say
from fer_dist.errors import UserError, printable
from fer_dist.extras import versions

if TYPE_CHECKING:  # heavy at run time: --help must answer at once
    from torch import Tensor

    from fer_dist.serve.runner import Runner

PROG = "python -m export.bench"
ABOUT = """\
Measures how long artifacts (.pth, .safetensors, .onnx, .engine) take for a batch of random pictures. They take
turns, so that a machine that slows down hits all alike. Times are those of a caller: from uint8 pictures in
memory to probabilities in memory, by time.perf_counter_ns; on a GPU, besides, the work alone (`gpu p50`): a CUDA
graph replayed between two CUDA events; "-" where the work cannot be one. The ratio is the median latency over
that of the first artifact."""
TURNS = 10
"""In how many turns each artifact takes its time."""
CLOCKS = {"pictures": "random uint8", "clock": "time.perf_counter_ns", "gpu_clock": "CUDA events, graph replay"}
SETTINGS = ("batch", "threads", "seconds", "warmup", "provider", "device")
PACKAGES = ("fer-dist", "torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What an artifact took at one batch size and thread count; latencies in milliseconds per batch.

    Attributes:
        runs_on: what really ran.
        threads: of the CPU; None where a GPU computes.
        calls: how many batches were timed; a p99 of less than 100 calls is the slowest one.
        images_per_second: pictures over the time that their batches took.
        ratio: p50_ms over that of the first artifact.
        gpu_p50_ms: median of the work alone, see ABOUT; None where there is no GPU or no graph.
    """

    artifact: str
    kind: str
    precision: str
    runs_on: str
    batch: int
    threads: int | None
    calls: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_second: float
    ratio: float
    gpu_p50_ms: float | None


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, or with 2 after a UserError."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    parser = Parser(PROG, ABOUT)
    cores = _cores()
    parser.add_argument("paths", metavar="ARTIFACT", type=Path, nargs="+", help="the first one is what others are over")
    parser.add_argument("--batch", metavar="N,N", type=numbers, default=(1, 8, 32), help="batch sizes; default: 1,8,32")
    parser.add_argument(
        "--threads",
        metavar="N,N",
        type=numbers,
        default=tuple(sorted({1, cores})),
        help=f"threads of the CPU; default: 1 and all cores that this process may use ({cores})",
    )
    parser.add_argument("--seconds", metavar="S", type=float, default=2.0, help="for each line; default: 2")
    parser.add_argument("--warmup", metavar="N", type=int, default=3, help="batches before any is timed; default: 3")
    parser.add_argument("--provider", default="auto", help="of ONNX files: auto, cpu, cuda, tensorrt; default: auto")
    parser.add_argument("--device", default="auto", help="of checkpoints: auto, cpu, cuda; default: auto")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers, with the machine, as JSON")
    given = parser.parse_args(argv)
    if not 0 < given.seconds <= 3600 or not 0 <= given.warmup <= 10_000:
        told = f"--seconds is {given.seconds}, --warmup {given.warmup}"
        parser.error(f"{told}; expected seconds in 0..3600, warmup in 0..10000")
    if given.json is not None:
        _require_writable(given.json)
    found = _bench(given)
    about = _machine()
    say("\n" + ", ".join([about["cpu"], f"{about['cores']} cores", *filter(None, [about["gpu"]])]))
    say(", ".join(f"{name} {number}" for name, number in about["versions"].items()))
    say(
        f"random uint8 pictures; {given.warmup} warm-up batches, then {given.seconds:g} s a line in {TURNS} turns; "
        "ms a batch, time.perf_counter_ns from pictures to probabilities in memory"
    )
    _print(found)
    if given.json is not None:
        settings = {name: getattr(given, name) for name in SETTINGS} | CLOCKS
        plain = {"machine": about, "settings": settings, "results": [asdict(timing) for timing in found]}
        _write(given.json, json.dumps(plain, indent=1) + "\n")
        say(f"wrote {given.json}")


def _bench(given: Namespace) -> list[Timing]:
    """Every artifact at every batch size and thread count; see SETTINGS.

    Raises:
        UserError: an artifact cannot be opened or run here, or is of other pictures than the first.
    """
    import torch

    from fer_dist.serve.runner import open_runner

    found: list[Timing] = []
    for threads in given.threads:
        with ExitStack() as stack:
            runners: list[Runner] = []
            for path in given.paths:
                runner = open_runner(path, device=given.device, provider=given.provider, threads=threads)
                runners.append(stack.enter_context(runner))
            sides = {str(runner.path): runner.spec.input.size for runner in runners}
            if len(set(sides.values())) > 1:
                raise UserError(f"the artifacts take pictures of different sizes: {sides}", "measure them one by one")
            if found and all(runner.on_gpu for runner in runners):
                break  # threads of the CPU are nothing to a GPU
            for batch in given.batch:
                side, generator = runners[0].spec.input.size, torch.Generator().manual_seed(0)
                images = torch.randint(0, 256, (batch, 1, side, side), dtype=torch.uint8, generator=generator)
                say(f"batch {batch}, {threads} thread{'s' * (threads > 1)} ...")
                found += measure(runners, images, threads=threads, seconds=given.seconds, warmup=given.warmup)
    return found


def measure(
    runners: "Sequence[Runner]", images_N1SS: "Tensor", *, threads: int, seconds: float, warmup: int
) -> list[Timing]:
    """Time the same batch on each runner in turns.

    Args:
        images_N1SS: uint8 `[N, 1, S, S]`, on the CPU.
        seconds: for each runner, besides its warm-up.
        warmup: batches of each runner that are not timed.

    Returns:
        One Timing a runner, in their order.
    """
    for runner in runners:
        for _ in range(warmup):
            runner.run(images_N1SS)
    spent: list[list[int]] = [[] for _ in runners]
    for turn in range(1, TURNS + 1):
        for runner, times in zip(runners, spent, strict=True):
            _turn(partial(runner.run, images_N1SS), times, until=seconds * 1e9 * turn / TURNS)
    medians = [_percentile(times, 50) for times in spent]
    return [
        Timing(
            artifact=str(runner.path),
            kind=runner.kind,
            precision=runner.precision,
            runs_on=runner.runs_on,
            batch=len(images_N1SS),
            threads=None if runner.on_gpu else threads,
            calls=len(times),
            p50_ms=median,
            p95_ms=_percentile(times, 95),
            p99_ms=_percentile(times, 99),
            images_per_second=len(images_N1SS) * len(times) / (sum(times) / 1e9),
            ratio=median / medians[0],
            gpu_p50_ms=_graph_ms(runner, images_N1SS, seconds) if runner.on_gpu else None,
        )
        for runner, times, median in zip(runners, spent, medians, strict=True)
    ]


def _turn(work: Callable[[], object], times: list[int], until: float) -> None:
    """Call `work` at least once, and until it has taken `until` nanoseconds in all turns; each call is noted.

    The first call is not: caches hold what the one before needed, whose threads may still spin for more work.
    """
    work()
    total = sum(times)
    while True:
        began = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - began)
        total += times[-1]
        if total >= until:
            return


def _graph_ms(runner: "Runner", images_N1SS: "Tensor", seconds: float) -> float | None:
    """The median time of the work alone on a GPU [ms]: a graph replayed between two events."""
    import torch

    replay = runner.capture(images_N1SS)
    if replay is None:
        return None
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    until = time.monotonic() + seconds
    while not times or time.monotonic() < until:
        before.record(replay.stream)
        with torch.cuda.stream(replay.stream):
            replay.work()
        after.record(replay.stream)
        after.synchronize()
        times.append(before.elapsed_time(after))
    return _percentile([int(ms * 1e6) for ms in times], 50)


def _percentile(times: Sequence[int], part: int) -> float:
    """The smallest time that `part` percent of the times do not exceed [ms, of ns]: one that was measured."""
    ordered = sorted(times)
    return ordered[max(0, -(-len(ordered) * part // 100) - 1)] / 1e6


def _print(found: Sequence[Timing]) -> None:
    """The table, and under it what each artifact ran on."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Where there is no terminal, there is no width to fit into.
    wide = None if sys.stdout.isatty() else 250
    console = Console(highlight=False, markup=False, soft_wrap=True, width=wide)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None)
    gpu = any(timing.gpu_p50_ms is not None for timing in found)
    table.add_column("artifact", overflow="fold")
    for column in ("batch", "threads", "p50", "p95", "p99", "images/s", "ratio", *["gpu p50"] * gpu, "calls"):
        table.add_column(column, justify="right")
    names = _short([timing.artifact for timing in found])
    for one in found:
        latencies = [f"{ms:.2f}" for ms in (one.p50_ms, one.p95_ms, one.p99_ms)]
        on_gpu = ["-" if one.gpu_p50_ms is None else f"{one.gpu_p50_ms:.3f}"] * gpu
        last = [f"{one.images_per_second:,.0f}", f"{one.ratio:.2f}", *on_gpu, f"{one.calls:,}"]
        threads = "-" if one.threads is None else str(one.threads)
        table.add_row(names[one.artifact], str(one.batch), threads, *latencies, *last)
    console.print(table)
    for name, timing in {names[timing.artifact]: timing for timing in found}.items():
        say(f"{name}: {timing.precision}, ran on {timing.runs_on.split(',')[0]}")


def _short(paths: Sequence[str]) -> dict[str, str]:
    """Path -> its file name; the whole path where two files have the same name. No signs that a terminal would obey."""
    names = {path: Path(path).name for path in paths}
    alike = len(set(names.values())) < len(names)
    return {path: printable(path if alike else name) for path, name in names.items()}


def _machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
    }


def _cores() -> int:
    """Cores that this process may use; Linux alone knows that they are less than all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    """The model of the CPU, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _require_writable(path: Path) -> None:
    """Find out before the long work whether the report can be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: no such folder, or not for you", "--json FILE in another folder")


def _write(path: Path, text: str) -> None:
    """Write the report whole or not at all."""
    from fer_dist.engine.checkpoint import write_atomically

    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except UserError as error:
        raise UserError(error.problem, "--json FILE in another folder") from None


if __name__ == "__main__":
    main()
