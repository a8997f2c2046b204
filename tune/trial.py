"""One trial on a worker of Ray: the trainer's `fit`, told on after each epoch.

The run folder of a trial is its checkpoint: whatever dies, the next start goes on from the newest state in it,
bit for bit. Ray's own checkpoints are not used. A trial is told to stop by the answer of its hook, so that
it leaves a whole run folder; it is not killed.
"""

import asyncio
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fer_dist.config import Config
from fer_dist.errors import RankLost, UserError
from tune.ledger import RUNS, best_of, records_in
from tune.settings import Settings
from tune.words import SCORES

DESK = "fer_dist desk"
CLOCK, SCORE = "epoch", "score"
"""What a trial reports to Ray: whole epochs, and the best value of `train.monitor` so far."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every trial of a search has in common; it travels to the workers.

    Attributes:
        folder: of the search, the same on every node.
        scratch: what Ray Train writes, of no use to anybody later.
        alone: Ray runs on this machine alone.
    """

    folder: Path
    scratch: Path
    config: Config
    settings: Settings
    alone: bool = False

    def config_of(self, name: str, values: dict[str, Any]) -> Config:
        """The whole Config of a trial."""
        run = {"run.dir": str(self.folder / RUNS), "run.name": name, "run.resume": "auto"}
        return self.config.override(values).override(run | {"run.progress": "none", "run.stop_signals": "none"})


class Desk:
    """An actor between the search and its trials: what the scheduler has decided, and why a trial has failed."""

    def __init__(self) -> None:
        self._stops: dict[tuple[str, int], bool] = {}
        self._failures: dict[str, str] = {}
        self._last_words: dict[str, str] = {}
        self._news = asyncio.Condition()

    async def decide(self, name: str, epoch: int, stop: bool) -> None:
        """Say whether a trial is to stop after an epoch."""
        async with self._news:
            # A trial that dies before it has stopped tells the epoch again; ASHA decides once.
            self._stops[name, epoch] = stop or self._stops.get((name, epoch), False)
            self._news.notify_all()

    async def stops(self, name: str, epoch: int) -> bool:
        """Wait for that, and answer it."""
        async with self._news:
            await self._news.wait_for(lambda: (name, epoch) in self._stops)
            return self._stops[name, epoch]

    async def fail(self, name: str, reason: str) -> None:
        """Say why a trial ends without a model."""
        self._failures[name] = reason

    async def note(self, name: str, words: str) -> None:
        """Keep what a rank says before it ends: it may go on after that, or not."""
        self._last_words[name] = words

    async def noted(self, name: str) -> str:
        """The newest of these words; empty: there are none."""
        return self._last_words.get(name, "")

    async def failure(self, name: str) -> str:
        """That reason; empty: it has not failed."""
        return self._failures.pop(name, "")


def run_trial(given: dict[str, Any], task: Task) -> None:
    """What Ray Tune calls for each trial: trains it here, or leads the workers that train it together.

    Args:
        given: "trial", its id, and "values", dotted names with their values.
    """
    import ray.tune

    name, config = given["trial"], task.config_of(given["trial"], given["values"])
    if task.settings.workers == 1:
        return work(name, config, task, ray.tune.report)
    return lead(name, config, task)


def lead(name: str, config: Config, task: Task) -> None:
    """Train one trial as DDP through Ray Train, which makes the process group that World attaches to."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from tune.group import OnDisk

    settings = task.settings
    backend = "cpu:gloo,cuda:nccl" if settings.gpus else "gloo"
    gpus = int((settings.gpus or 0) / settings.workers)
    trainer = TorchTrainer(
        partial(work_together, name=name, config=config, task=task),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        torch_config=OnDisk(backend=backend, folder=str(task.scratch)) if task.alone else TorchConfig(backend=backend),
        run_config=RunConfig(
            # A new one each time: what Ray Train would find of an earlier start is not needed to go on.
            name=f"{name}-{os.urandom(4).hex()}",
            storage_path=str(task.scratch),
            callbacks=[TuneReportCallback()],
            failure_config=FailureConfig(max_failures=settings.retries),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        desk, times = ray.get_actor(DESK), settings.retries + 1
        words = ray.get(desk.noted.remote(name)) or f"its ranks have died {times} time{'s' * (times > 1)}"
        ray.get(desk.fail.remote(name, words))


def work_together(name: str, config: Config, task: Task) -> None:
    """What each worker of Ray Train does."""
    import ray.train

    work(name, config, task, ray.train.report)


def work(name: str, config: Config, task: Task, report: Callable[[dict[str, Any]], object]) -> None:
    """Train a trial, from where it stands; its failure is noted, and is none of Ray's.

    Args:
        report: tells Ray of an epoch; on every worker alike.
    """
    import ray

    desk = ray.get_actor(DESK)
    try:
        _train(name, config, task, report, desk)
    except RankLost:  # Ray starts the group again
        raise
    except UserError as error:  # of all ranks alike
        ray.get(desk.fail.remote(name, error.problem))
    except Exception as error:  # out of memory, or a mistake of ours: it must not end the search
        words, folder = f"{type(error).__name__}: {error}", task.folder / RUNS / name
        if folder.is_dir():
            (folder / "error.txt").write_text(traceback.format_exc())
        if task.settings.workers > 1:  # the other ranks wait for this one: it must be seen to end
            ray.get(desk.note.remote(name, words))
            raise
        ray.get(desk.fail.remote(name, words))


def _train(name: str, config: Config, task: Task, report: Callable[[dict[str, Any]], object], desk: Any) -> None:
    import ray
    import torch

    from fer_dist.engine.runlog import EpochRecord
    from fer_dist.engine.trainer import fit

    monitor, best = config.train.monitor, []

    def tell(epoch: int, val: dict[str, float]) -> None:
        best.append(val[monitor])
        report({CLOCK: epoch, SCORE: best_of(monitor)(best)} | {key: val[key] for key in SCORES})

    def on_epoch(record: EpochRecord) -> bool:
        tell(record.epoch, {key: getattr(record.val, key) for key in SCORES})
        stop: bool = ray.get(desk.stops.remote(name, record.epoch))
        return stop

    torch.set_num_threads(task.settings.cpus)
    past = records_in(task.folder / RUNS / name)  # of earlier starts; the newest may come again
    for record in past if len(past) >= config.train.epochs else past[:-1]:
        tell(record["epoch"], record["val"])
    fit(config, on_epoch=on_epoch)
