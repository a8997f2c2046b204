"""What a training took and what it made: epochs, CPU-hours, parameters, multiply-adds, settings.

    python -m benchmarks.training_record runs/NAME --json training.json
    python -m benchmarks.training_record runs/FIRST runs/NAME           NAME went on from the best model of FIRST

CPU-hours are seconds of the epochs that stand in metrics.jsonl, times the ranks that trained each, one thread a rank;
the part of an epoch that was done before a break, and done again after it, is not in them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fer_dist.engine.checkpoint import Checkpoint, load, write_atomically
from fer_dist.errors import UserError


def main() -> None:
    """Print the record; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder, after those it went on from")
    parser.add_argument("--json", metavar="FILE", type=Path)
    given = parser.parse_args()
    text = json.dumps(record(given.runs), indent=1) + "\n"
    print(text, end="")
    if given.json:
        write_atomically(given.json, lambda file: file.write(text.encode()))


def record(runs: Sequence[Path]) -> dict[str, Any]:
    """Plain values, each read from the runs' own files or counted.

    Args:
        runs: run folders in the order of the training; the last made the model.

    Raises:
        UserError: a folder is not that of a run.
    """
    stages = [_stage(run) for run in runs]
    best = load(runs[-1] / "best.pth")
    return {
        "arch": best.spec.arch,
        "image_size": best.spec.input.image_size,
        "options": best.spec.options,
        "parameters": sum(p.numel() for p in best.model().parameters()),
        "multiply_adds": multiply_adds(best),
        "epochs": sum(stage["epochs"] for stage in stages),
        "cpu_hours": sum(stage["cpu_hours"] for stage in stages),
        "stages": stages,
    }


def _stage(run: Path) -> dict[str, Any]:
    """What one run folder says of itself."""
    best = load(run / "best.pth")
    try:
        epochs, starts = _lines(run / "metrics.jsonl"), _lines(run / "starts.jsonl")
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no run folder: {error}", "name one such as runs/NAME") from None
    return {
        "seed": best.config["seed"],
        "epochs": len(epochs),
        "best_epoch": best.record["epoch"],
        "best_accuracy": best.record["val"]["accuracy"],
        "ranks": max(start["world_size"] for start in starts),
        "cpu_hours": sum(one["seconds"] * _ranks(one["epoch"], starts) for one in epochs) / 3600,
        "device": best.provenance["device"],
        "torch": best.provenance["torch"],
        "commit": best.provenance["commit"],
        "config": {part: best.config[part] for part in ("optim", "train")}
        | {"model": {name: value for name, value in best.config["model"].items() if name != "weights"}}
        | {"augment": best.config["data"]["augment"]},
    }


def multiply_adds(checkpoint: Checkpoint) -> int:
    """Of one picture: convolutions and matrix products, as `torch.utils.flop_counter` counts them, two operations each.

    Attention is computed step by step: fused kernels of CPUs are not counted, and without gradients there is another.
    """
    model, side = checkpoint.model(), checkpoint.spec.input.size
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 1, side, side, dtype=torch.uint8))
    operations: int = counter.get_total_flops()
    return operations // 2


def _ranks(epoch: int, starts: list[dict[str, Any]]) -> int:
    """How many ranks finished an epoch: those of the last start before its end."""
    ranks: int = [start["world_size"] for start in starts if start["epochs"] < epoch][-1]
    return ranks


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
