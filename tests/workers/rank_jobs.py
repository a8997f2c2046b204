"""Jobs that every rank of a launch does; each rank leaves what it found in OUT/<rank>.json.

    torchrun --standalone --nproc_per_node=4 tests/workers/rank_jobs.py OUT NAME...

A launch costs seconds, so one launch does several jobs. A job is a function of (world, folder).
"""

import errno
import faulthandler
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fer_dist.commandline import leave
from fer_dist.config import Config
from fer_dist.data.faces import TRAIN, VAL
from fer_dist.data.feed import TrainFeed, evaluation_batches
from fer_dist.engine import trainer
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import EpochRecord
from fer_dist.engine.score import score
from fer_dist.engine.state import TrainState
from fer_dist.engine.step import settle
from fer_dist.engine.trainer import OnEpoch, fit
from fer_dist.errors import UserError
from fer_dist.world import World, join
from tests.helpers.processes import TIMEOUT_S
from tests.helpers.small_runs import (
    AUGMENTED,
    CLASSES,
    broken_run,
    fake_metrics,
    message,
    no_pictures,
    numbered_faces,
    tiny,
)

COUNTS = (1, 2, 3, 17, 3589)


ADAMW, MIXED = "vit", "vit_mae augmented accumulated"
LOSS_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    ADAMW: ("vit", {}),
    "vit accumulated": ("vit", {"train__micro_batch": 3}),
    "vit_mae": ("vit_mae", {}),
    "vit_mae sgd": ("vit_mae", {"optim__name": "sgd", "optim__lr": 0.1}),
    "vit augmented": ("vit", {**AUGMENTED, "train__label_smoothing": 0.1, "train__class_weights": "balanced"}),
    MIXED: (
        "vit_mae",
        {**AUGMENTED, "train__micro_batch": 3, "optim__clip_norm": 1.0, "model__freeze_depth": 1},
    ),
}
LOSS_RUNS = [*((case, "float64", 16) for case in LOSS_CASES), (ADAMW, "float32", 50), (MIXED, "float32", 50)]
"""Case, precision and number of steps of each run of `losses`."""


def losses(world: World, folder: Path) -> dict[str, list[float]]:
    """Return the loss of each step of LOSS_RUNS (optimizer AdamW unless the case says otherwise)."""
    found = {}
    for case, precision, steps in LOSS_RUNS:
        arch, values = LOSS_CASES[case]
        name = f"{case} {precision}"
        config = tiny(arch, folder, run__name=name.replace(" ", "-"), train__precision=precision, **values)
        found[name] = fit(config.override({"train.steps_per_epoch": steps // 2}), world).losses
    return found


def losses_unshared(world: World, folder: Path) -> list[float]:
    """The losses of `vit` when the ranks do not share their gradients: the comparison must tell."""
    with mock.patch.object(World, "wrap", lambda self, model: model):
        return one_loss(world, folder)


def one_loss(world: World, folder: Path) -> list[float]:
    """Each step's loss of one case alone."""
    return fit(tiny("vit", folder, run__name="one"), world).losses


def counts(world: World, folder: Path) -> dict[str, Any]:
    """Evaluation of parts of several sizes: the joint confusion, and which pictures this rank saw."""
    found = {}
    for count in COUNTS:
        faces = numbered_faces(count)
        seen: list[int] = []

        def predict(images_N1SS: Tensor, seen: list[int] = seen) -> Tensor:
            pixels_NP = images_N1SS.flatten(1).long()
            seen.extend((256 * pixels_NP[:, 0] + pixels_NP[:, 1]).tolist())
            return nn.functional.one_hot(pixels_NP.sum(1) % CLASSES, CLASSES).float()

        batches = evaluation_batches(
            faces, faces.part(VAL), batch=64, rank=world.rank, size=world.size, device=world.device
        )
        metrics = score(predict, batches, world, classes=CLASSES)
        found[str(count)] = {
            "confusion": metrics.confusion_KK.tolist(),
            "count": metrics.count,
            "loss": metrics.loss,
            "seen": seen,
        }
    return found


def ledger(world: World, folder: Path) -> list[list[list[int]]]:
    """The rows that this rank trains on: epoch -> step -> rows. 100 pictures, batches of 12."""
    faces = replace(numbered_faces(100), usage_N=np.full(100, TRAIN, np.int64))
    config = Config().override({"train.global_batch": 12})
    feed = TrainFeed(config, faces, faces.part(TRAIN), CLASSES, world.device)
    return [
        [batch.rows_N.tolist() for batch in feed.epoch(epoch, rank=world.rank, size=world.size)] for epoch in range(3)
    ]


def digest(module: nn.Module) -> str:
    """A hash of every weight and buffer."""
    hashed = hashlib.sha256()
    for name, value in module.state_dict().items():
        hashed.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
    return hashed.hexdigest()


def states(world: World, folder: Path) -> list[tuple[str, str]]:
    """Hashes of the live and the deployed model at each evaluation: live batch norm, EMA, mixup, dropout."""
    found = []
    evaluate = trainer.evaluate

    def watched(config: Config, state: TrainState, *rest: Any) -> Metrics:
        found.append((digest(state.model), digest(state.deployed)))
        return evaluate(config, state, *rest)

    with mock.patch.object(trainer, "evaluate", watched):
        fit(broken_run(folder), world)
    return found


def states_unaveraged(world: World, folder: Path) -> list[tuple[str, str]]:
    """The same with a World that does not average the running statistics: the hashes must tell."""
    with mock.patch.object(World, "mean_"):
        return states(world, folder / "unaveraged")


def settled(world: World, folder: Path) -> list[str]:
    """Hashes of the model before and after the backward pass that DDP's groups are found by."""
    found = []

    def watched(config: Config, state: TrainState, *rest: Any) -> None:
        found.append(digest(state.model))
        settle(config, state, *rest)
        found.append(digest(state.model))
        assert all(p.grad is None for p in state.model.parameters())

    with mock.patch.object(trainer, "settle", watched):
        fit(broken_run(folder).override({"train.epochs": 1}), world)
    return found


def decisions(world: World, folder: Path) -> dict[str, Any]:
    """Training with metrics that rise on rank 0 for three epochs, and on the other ranks never, or always."""
    on_rank_0 = (0.5, 0.6, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)

    def evaluate(config: Config, state: TrainState, *rest: Any) -> Metrics:
        if world.first:
            return fake_metrics(on_rank_0[state.epoch])
        return fake_metrics(0.9 - 0.05 * state.epoch if world.rank % 2 else 0.05 * state.epoch)

    heard = []
    config = tiny(
        "vit",
        folder,
        run__name="decisions",
        train__epochs=12,
        train__steps_per_epoch=2,
        train__global_batch=12,
        train__patience=5,
        optim__schedule="plateau",
        optim__plateau_patience=1,
    )
    with mock.patch.object(trainer, "evaluate", evaluate):
        result = fit(config, world, on_epoch=lambda record: heard.append(record.val.accuracy))
    return {
        "accuracies": [record["val"]["accuracy"] for record in result.records],
        "heard": heard,
        "lr": [record["lr"] for record in result.records],
        "best": result.best.accuracy,
    }


def stop_on_last_rank(world: World, folder: Path) -> int:
    """Epochs of a run that the hook of the last rank alone wants to end after its second."""
    config = tiny("vit", folder, run__name="stop", train__epochs=5, train__steps_per_epoch=1)
    result = fit(config, world, on_epoch=lambda record: world.rank == world.size - 1 and record.epoch == 2)
    return len(result.records)


def faults(world: World, folder: Path) -> dict[str, str]:
    """What each rank says of trouble that all have, or that one has."""
    found = {}

    def trial(name: str, on_epoch: OnEpoch | None = None, **values: Any) -> None:
        config = tiny(
            "vit", folder, run__name=name, **{"train__steps_per_epoch": 1, "run__tensorboard": True, **values}
        )
        found[name] = message(lambda: fit(config, world, on_epoch))

    trial("nan", optim__lr=1e30, optim__name="sgd", train__steps_per_epoch=5, train__max_skipped=2)
    trial("nan after the last step", optim__lr=1e38, optim__name="sgd", train__epochs=1)

    replace_file = Path.replace
    for name in ("config.yaml", "report.json", "best.pth", "step-00000001.pth"):

        def full(self: Path, target: Path, name: str = name) -> Path:
            if target.name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return replace_file(self, target)

        with mock.patch.object(Path, "replace", full):
            trial(name)

    def blocked(record: EpochRecord) -> None:
        if world.first:
            path = folder / "metrics.jsonl" / "metrics.jsonl"
            path.unlink()
            path.mkdir()

    trial("metrics.jsonl", on_epoch=blocked)
    if world.first:
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "tensorboard").write_text("a file in the place of a folder")
    trial("tensorboard", run__resume="auto")
    trial("tensorboard", run__resume="never")
    found["exists"] = found.pop("tensorboard")
    trial("tensorboard", run__resume="auto")

    def stumble() -> None:
        if world.rank == world.size - 1:
            raise UserError("the last rank stumbles", "lend it a hand")

    found["last rank"] = message(lambda: world.together(stumble))
    found["node first"] = message(lambda: world.node_first(stumble))
    found["only first, never done elsewhere"] = message(lambda: world.only_first(stumble))
    world.gather(None)
    return found


def attach(world: World, folder: Path) -> list[int]:
    """A World and a training inside of a process group that somebody else made: it stays open."""
    if world.size == 1:
        folder.mkdir()
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    with join("cpu") as inner:
        found = [inner.rank, inner.size, inner.local_rank]
    result = fit(tiny("vit", folder, run__name="attached", train__steps_per_epoch=1))
    found += [len(result.records), len(World(rank=inner.rank, size=inner.size).gather(0))]
    found += [int(torch.distributed.is_initialized())]
    if world.size == 1:
        torch.distributed.destroy_process_group()
    return found


def unbroken(world: World, folder: Path) -> None:
    """The run that `restart.py` does with a break."""
    fit(broken_run(folder), world)


def parts(world: World, folder: Path) -> dict[str, Any]:
    """What a World says and adds up."""
    x = torch.full((2,), float(world.rank + 1))
    a, b = torch.full((2, 2), float(world.rank)), torch.tensor([10.0 * world.rank])
    world.mean_([a, b])
    image = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last) + world.rank
    mine: dict[str, Any] = {
        "image": image,
        "list": [torch.tensor(7 + world.rank), image[0, 0].t()],
        "none": torch.zeros(0),
        "n": 3,
    }
    shared = world.share(mine)
    return {
        "share": [
            shared["image"].equal(image - world.rank),
            list(shared["image"].stride()),
            int(shared["list"][0]),
            shared["list"][1].equal(image[0, 0].t() - world.rank),
            list(shared["none"].shape),
            shared["n"],
        ],
        "rank": world.rank,
        "size": world.size,
        "sum": world.sum_(x).tolist(),
        "means": [a.tolist(), b.tolist()],
        "gather": world.gather(f"rank {world.rank}"),
        "from_first": world.from_first(world.rank + 100),
        "any": [world.agree(world.rank == 1), world.agree(False), world.agree(True)],
        "together": world.together(lambda: world.rank),
        "node_first": world.node_first(lambda: world.rank),
    }


def check_batch(world: World, folder: Path) -> str:
    """A global batch that the ranks do not divide."""
    return message(lambda: fit(tiny("vit", folder, train__global_batch=7), world))


JOBS: dict[str, Callable[[World, Path], Any]] = {
    job.__name__: job
    for job in (
        losses,
        losses_unshared,
        one_loss,
        counts,
        ledger,
        states,
        states_unaveraged,
        settled,
        decisions,
        stop_on_last_rank,
        faults,
        parts,
        check_batch,
        attach,
        unbroken,
    )
}


def do(world: World, folder: Path, names: list[str]) -> dict[str, Any]:
    """The findings of this rank, as they come back from JSON."""
    with no_pictures():
        return {name: json.loads(json.dumps(JOBS[name](world, folder / name))) for name in names}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    faulthandler.dump_traceback_later(0.9 * TIMEOUT_S, exit=True)  # who hangs says where
    with join("cpu") as world:
        found = do(world, folder, names)
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
