"""Jobs that every rank of a launch does; each rank writes its results to OUT/<rank>.json.

    torchrun --standalone --nproc_per_node=4 tests/workers/rank_jobs.py OUT NAME...

A launch takes seconds, so one launch does several jobs.
"""

import errno
import faulthandler
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fer_dist.commandline import leave
from fer_dist.config import Config
from fer_dist.data.faces import VAL
from fer_dist.data.feed import evaluation_batches
from fer_dist.engine import trainer
from fer_dist.engine.checkpoint import digest
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import EpochRecord
from fer_dist.engine.score import score
from fer_dist.engine.state import TrainState
from fer_dist.engine.step import settle
from fer_dist.engine.trainer import OnEpoch, fit
from fer_dist.errors import UserError
from fer_dist.world import World, join
from tests.helpers.processes import TIMEOUT_S
from tests.helpers.small_runs import AUGMENTED, broken_run, fake_metrics, message, no_pictures, numbered_faces, tiny

COUNTS = (1, 2, 3, 17, 3589)
MIXED = {**AUGMENTED, "train__micro_batch": 3, "optim__clip_norm": 1.0, "model__freeze_depth": 1}
LOSS_RUNS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "vit": ("vit", "float64", 16, {}),
    "accumulated": ("vit", "float64", 16, {"train__micro_batch": 3}),
    "sgd": ("vit_mae", "float64", 16, {"optim__name": "sgd", "optim__lr": 0.1}),
    "weighted": ("vit", "float64", 16, {"train__label_smoothing": 0.1, "train__class_weights": "balanced"}),
    "mixed": ("vit_mae", "float64", 16, MIXED),
    "vit float32": ("vit", "float32", 50, {}),
    "mixed float32": ("vit_mae", "float32", 50, MIXED),
}
"""Architecture, precision, number of steps and settings of each run of `losses`; AdamW unless another is named."""


def losses(world: World, folder: Path) -> dict[str, list[float]]:
    """Return the loss of each step of LOSS_RUNS."""
    found = {}
    for name, (arch, precision, steps, values) in LOSS_RUNS.items():
        config = tiny(arch, folder / name, train__precision=precision, train__steps_per_epoch=steps // 2, **values)
        found[name] = fit(config, world).losses
    return found


def counts(world: World, folder: Path) -> dict[str, Any]:
    """Evaluate parts of several sizes; return the joint confusion matrix and which pictures this rank saw."""
    found = {}
    for count in COUNTS:
        faces = numbered_faces(count)
        seen: list[int] = []

        def predict(images_N1SS: Tensor, seen: list[int] = seen) -> Tensor:
            pixels_NP = images_N1SS.flatten(1).long()
            seen.extend((256 * pixels_NP[:, 0] + pixels_NP[:, 1]).tolist())
            return nn.functional.one_hot(pixels_NP.sum(1) % 7, 7).float()

        where: dict[str, Any] = {"rank": world.rank, "size": world.size, "device": world.device}
        metrics = score(predict, evaluation_batches(faces, faces.part(VAL), batch=64, **where), world, classes=7)
        found[str(count)] = [metrics.confusion_KK.tolist(), metrics.count, metrics.loss, seen]
    return found


def states(world: World, folder: Path) -> dict[str, list[str]]:
    """Train with live batch norm, EMA, mixup and dropout; return digests of all weights and buffers.

    Of the live and of the deployed model at each evaluation; of the live one before and after `settle`.
    """
    found: dict[str, list[str]] = {"live": [], "deployed": [], "settled": []}
    evaluate = trainer.evaluate

    def watched_evaluate(config: Config, state: TrainState, *rest: Any) -> Metrics:
        found["live"].append(digest(state.model.state_dict()))
        found["deployed"].append(digest(state.deployed.state_dict()))
        return evaluate(config, state, *rest)

    def watched_settle(config: Config, state: TrainState, *rest: Any) -> None:
        found["settled"].append(digest(state.model.state_dict()))
        settle(config, state, *rest)
        found["settled"].append(digest(state.model.state_dict()))
        assert all(p.grad is None for p in state.model.parameters())

    with mock.patch.multiple(trainer, evaluate=watched_evaluate, settle=watched_settle):
        fit(broken_run(folder), world)
    return found


def decisions(world: World, folder: Path) -> dict[str, Any]:
    """Train with metrics that rise on rank 0 for three epochs, and on the other ranks never, or always."""
    heard = []

    def evaluate(config: Config, state: TrainState, *rest: Any) -> Metrics:
        if world.first:
            return fake_metrics([0.5, 0.6, 0.7][state.epoch] if state.epoch < 3 else 0.6)
        return fake_metrics(0.9 - 0.05 * state.epoch if world.rank % 2 else 0.05 * state.epoch)

    train = {"train__epochs": 12, "train__steps_per_epoch": 2, "train__global_batch": 12, "train__patience": 5}
    config = tiny("vit", folder, **train, optim__schedule="plateau", optim__plateau_patience=1)
    with mock.patch.object(trainer, "evaluate", evaluate):
        result = fit(config, world, on_epoch=lambda record: heard.append(record.val.accuracy))
    return {"heard": heard, "lr": [record["lr"] for record in result.records], "best": result.best.accuracy}


def stop_on_last_rank(world: World, folder: Path) -> dict[str, Any]:
    """Train in the process group of this launch until the hook of the last rank ends it after two epochs."""
    with join("cpu") as inner:
        found = {"rank": inner.rank, "size": inner.size}
    config = tiny("vit", folder, train__epochs=5, train__steps_per_epoch=10)
    result = fit(config, on_epoch=lambda record: world.rank == world.size - 1 and record.epoch == 2)
    return {**found, "losses": result.losses, "open": torch.distributed.is_initialized()}


def faults(world: World, folder: Path) -> dict[str, str]:
    """Return the error message of each trial on this rank; empty: there was no error."""

    def trial(name: str, on_epoch: OnEpoch | None = None, **values: Any) -> str:
        values = {"train__steps_per_epoch": 1, "run__tensorboard": True, **values}
        return message(lambda: fit(tiny("vit", folder, run__name=name, **values), world, on_epoch))

    diverging: dict[str, Any] = {"optim__name": "sgd", "optim__lr": 1e38}
    diverging |= {"train__steps_per_epoch": 5, "train__max_skipped": 2}
    found = {
        "global batch": trial("global batch", train__global_batch=7),
        "nan": trial("nan", **diverging),
        "nan after the last step": trial("last", **diverging | {"train__epochs": 1, "train__steps_per_epoch": 1}),
    }
    replace = Path.replace
    for name in ("config.yaml", "report.json", "best.pth", "step-00000001.pth"):

        def full(self: Path, target: Path, name: str = name) -> Path:
            if target.name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return replace(self, target)

        with mock.patch.object(Path, "replace", full):
            found[name] = trial(name)

    def block(record: EpochRecord) -> None:
        if world.first:
            (folder / "metrics" / "metrics.jsonl").unlink()
            (folder / "metrics" / "metrics.jsonl").mkdir()

    found["metrics.jsonl"] = trial("metrics", block)
    if world.first:
        (folder / "exists").mkdir()
        (folder / "exists" / "tensorboard").write_text("a file in the place of a folder")
    found["exists"] = trial("exists")
    found["tensorboard"] = trial("exists", run__resume="auto")

    def fail_on_last_rank() -> None:
        if world.rank == world.size - 1:
            raise UserError("the last rank failed", "try again")

    found["last rank"] = message(lambda: world.together(fail_on_last_rank))
    found["node first"] = message(lambda: world.node_first(fail_on_last_rank))
    found["only first"] = message(lambda: world.only_first(fail_on_last_rank))
    return found


def collectives(world: World, folder: Path) -> dict[str, Any]:
    """Return what each method of a World returns on this rank."""

    def tree(rank: int) -> dict[str, Any]:
        image = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last) + rank
        return {"image": image, "list": [torch.tensor(rank), image[0, 0].t()], "empty": torch.zeros(0), "n": rank}

    a, b = torch.full((2, 2), float(world.rank)), torch.tensor([10.0 * world.rank])
    world.mean_([a, b])
    shared = world.share(tree(world.rank))
    torch.testing.assert_close(shared, tree(0), rtol=0, atol=0)
    return {
        "rank": world.rank,
        "size": world.size,
        "sum": world.sum_(torch.full((2,), float(world.rank + 1))).tolist(),
        "means": [a.tolist(), b.tolist()],
        "gather": world.gather(f"rank {world.rank}"),
        "from_first": world.from_first(world.rank + 100),
        "stride": list(shared["image"].stride()),
        "agree": [world.agree(world.rank == 1), world.agree(False), world.agree(True)],
        "together": world.together(lambda: world.rank),
        "node_first": world.node_first(lambda: world.rank),
    }


JOBS = (losses, counts, states, decisions, stop_on_last_rank, faults, collectives)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    faulthandler.dump_traceback_later(0.9 * TIMEOUT_S, exit=True)  # a rank that hangs prints where
    with join("cpu") as world, no_pictures():
        found = {job.__name__: job(world, folder / job.__name__) for job in JOBS if job.__name__ in names}
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
