"""Does stopping trials early pay? ASHA against the whole grid, over the same 27 configurations.

    python -m benchmarks.asha                  three seeds, both searches for real: about 45 minutes on 2 cores
    python -m benchmarks.asha --seeds 0        one of them

Each seed draws other faces, other first weights and another order of the configurations. Both searches are
`python -m tune.search` with the searcher grid; one has the scheduler none, the other asha. Measured are the best
validation accuracy, the epochs trained in all trials, the wall time, and what a trial costs beside its epochs:
(wall time x trials at once - seconds in epochs) / trials.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SPACE = """\
optim.lr: [5.0e-4, 1.5e-3, 4.5e-3]
train.global_batch: [16, 32, 64]
model.freeze_depth: [0, 3, 6]
"""
EPOCHS, REDUCTION = 9, 3
FIXED = (
    "--data.embedded_train", "3000", "--data.embedded_val", "2100", "--model.image_size", "32", "--train.epochs",
    str(EPOCHS), "--optim.schedule", "cosine", "--optim.warmup", "0", "--run.tensorboard", "false",
)  # fmt: skip


def main() -> None:
    """Run the searches of each seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dir", type=Path, help="where searches are kept, and found by a second run; default: nowhere")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.processor() or platform.machine()}, {cores} cores, torch {torch.__version__}, {EPOCHS} epochs")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "space.yaml").write_text(SPACE)
        rows = [(seed, search(folder, seed, "none"), search(folder, seed, "asha")) for seed in given.seeds]
    print(
        "seed  best of the grid  best of ASHA  points lost  epochs of the grid  of ASHA  share  s a trial beside epochs"
    )
    for seed, grid, asha in rows:
        lost, share = 100 * (grid["best"] - asha["best"]), asha["epochs"] / grid["epochs"]
        print(
            f"{seed:>4}  {100 * grid['best']:>15.2f}%  {100 * asha['best']:>11.2f}%  {lost:>11.2f}  "
            f"{grid['epochs']:>18}  {asha['epochs']:>7}  {100 * share:>4.0f}%  "
            f"{grid['beside']:.2f} grid, {asha['beside']:.2f} ASHA"
        )
    lost = sum(100 * (grid["best"] - asha["best"]) for _, grid, asha in rows) / len(rows)
    share = sum(asha["epochs"] / grid["epochs"] for _, grid, asha in rows) / len(rows)
    wall = sum(asha["wall"] / grid["wall"] for _, grid, asha in rows) / len(rows)
    print(f"mean of {len(rows)}: {lost:.2f} points lost, {100 * share:.0f}% of the epochs, {100 * wall:.0f}% of time")


def search(folder: Path, seed: int, scheduler: str) -> dict[str, Any]:
    """One search, or what an earlier run has kept of it."""
    name = f"{scheduler}-{seed}"
    kept = folder / f"{name}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    words = ["--dir", str(folder), "--name", name, "--space", str(folder / "space.yaml"), "--searcher", "grid"]
    words += ["--scheduler", scheduler, "--reduction", str(REDUCTION), "--search-seed", str(seed), *FIXED]
    words += ["--seed", str(seed), "--data.embedded_seed", str(seed)]
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "tune.search", *words], check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - begun
    runs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in sorted((folder / name / "trials").iterdir())
    ]
    assert len(runs) == 27
    at_once = len(os.sched_getaffinity(0))
    trained = sum(record["seconds"] for records in runs for record in records)
    found = {
        "best": max(record["val"]["accuracy"] for records in runs for record in records),
        "validated": runs[0][0]["val"]["count"],
        "epochs": sum(map(len, runs)),
        "wall": wall,
        "beside": (wall * at_once - trained) / len(runs),
    }
    kept.write_text(json.dumps(found))
    print(f"{name}: {found}", flush=True)
    return found


if __name__ == "__main__":
    main()
