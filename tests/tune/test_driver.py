"""Ray Tune's side of a search without a cluster: values, decisions and ends of trials."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.tune.search import Searcher as RaySearcher

from fer_dist.config import Config, load_config
from fer_dist.engine import trainer
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import EpochRecord
from fer_dist.errors import RankLost, UserError
from tests.helpers.search_folders import add_trial, epochs, write_metrics
from tune import driver
from tune.driver import Listener, Source, scheduler
from tune.ledger import Ledger, Trial
from tune.settings import Searcher, Settings
from tune.spacefile import space_of
from tune.trial import Desk, Task, work

CONFIG = load_config("search", {"train.epochs": 9})
TREE = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "optim.name": ["adam", "sgd"], "model.freeze_depth": [0, 1, 2]}
FINITE = {"optim.name": ["adam", "sgd"], "model.freeze_depth": [0, 1, 2]}


class FakeDesk:
    """The actor in this process: `.remote(...)` of each method returns the result at once."""

    def __init__(self) -> None:
        self.decided: list[tuple[str, int, bool]] = []
        self.failed: dict[str, str] = {}
        self.noted: dict[str, str] = {}
        self.stop_after = 99
        self.decide = SimpleNamespace(remote=lambda *words: self.decided.append(words))
        self.note = SimpleNamespace(remote=lambda name, words: self.noted.update({name: words}))
        self.fail = SimpleNamespace(remote=lambda name, reason: self.failed.update({name: reason}))
        self.failure = SimpleNamespace(remote=lambda name: self.failed.get(name, ""))
        self.stops = SimpleNamespace(remote=lambda name, epoch: epoch >= self.stop_after)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> FakeDesk:
    found = FakeDesk()
    monkeypatch.setattr(ray, "get", lambda result: result)
    monkeypatch.setattr(ray, "get_actor", lambda name: found)
    return found


# Values


def source(folder: Path, searcher: Searcher, trials: int, tree: dict[str, Any] | None = None) -> Source:
    settings = Settings(searcher=searcher, trials=trials)
    return Source(Ledger(folder), CONFIG, space_of(tree or TREE, CONFIG, 1, "test"), settings)


def drain(found: Source) -> list[Any]:
    """Return everything that a source suggests; each trial ends at once, with its learning rate as its score."""
    given: list[Any] = []
    for number in range(100):
        one = found.suggest(f"ray-{number}")
        if one == RaySearcher.FINISHED:
            return given
        given.append(one)
        result = {"epoch": 9, "score": one["values"].get("optim.lr", 0.5), "training_iteration": 9}
        found.on_trial_result(f"ray-{number}", result)
        found.on_trial_complete(f"ray-{number}", result)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_values_are_in_the_ledger(searcher: Searcher, tmp_path: Path) -> None:
    first = source(tmp_path, searcher, 15)
    assert first.suggest("ray")["values"] == Ledger(tmp_path).trials()[0].values, "before Ray starts the trial"
    given = drain(source(tmp_path, searcher, 15))
    found = [{"trial": one.id, "values": one.values} for one in Ledger(tmp_path).trials()]
    assert found == given
    assert len({one["values"]["optim.lr"] for one in given}) == 15
    assert {one["values"]["optim.name"] for one in given} == {"adam", "sgd"}
    for one in given:
        assert type(one["values"]["model.freeze_depth"]) is int
        CONFIG.override(one["values"])


def test_tpe_learns(tmp_path: Path) -> None:
    """The score is the learning rate: later trials have higher ones than the first, random ones."""
    rates = [one["values"]["optim.lr"] for one in drain(source(tmp_path, "tpe", 40))]
    assert sum(rates[-10:]) > 2 * sum(rates[:10])


def test_tpe_learns_from_the_trials_of_an_earlier_start(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for i in range(30):
        lr = 1e-4 * 10 ** (i / 15)
        add_trial(ledger, {"optim.lr": lr, "optim.name": "adam", "model.freeze_depth": 0}, lr)
    new = drain(source(tmp_path, "tpe", 40))
    assert [one["trial"] for one in new] == [f"{i:03d}" for i in range(31, 41)]
    assert sorted(one["values"]["optim.lr"] for one in new)[5] > 3e-3


def test_tpe_learns_once_from_resumed_trials(tmp_path: Path) -> None:
    """Optuna did not suggest them in this start."""
    first = source(tmp_path, "tpe", 6)
    begun = [first.suggest(f"old-{i}")["values"] for i in range(3)]
    again = source(tmp_path, "tpe", 6)
    given = [one["values"] for one in drain(again)]
    assert given[:3] == begun
    assert again._tpe is not None
    known = again._tpe._optuna._ot_study.trials
    lrs = [values["optim.lr"] for values in given]
    assert [(one.params["optim.lr"], one.value) for one in known] == [(lr, lr) for lr in lrs]


def test_tpe_ignores_values_outside_the_space(tmp_path: Path) -> None:
    """They occur in a search whose space was edited by hand."""
    ledger = Ledger(tmp_path)
    for values in ({"optim.lr": 0.5, "optim.name": "adam"}, {"optim.lr": 0.001, "optim.name": "adamw"}, {}):
        folder = add_trial(ledger, values, 0.5)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 2, "val": null}\n')
    assert len(drain(source(tmp_path, "tpe", 6))) == 3


@pytest.mark.parametrize("searcher", ["tpe", "random", "grid"])
def test_unfinished_trials_come_first(searcher: Searcher, tmp_path: Path) -> None:
    tree = FINITE if searcher == "grid" else TREE
    first = source(tmp_path, searcher, 6, tree)
    begun = [first.suggest(f"old-{i}") for i in range(3)]
    Ledger(tmp_path).end("002", "finished", "", 1)
    again = source(tmp_path, searcher, 99 if searcher == "grid" else 6, tree)  # a grid ends with its last combination
    assert again.left == 5
    given = drain(again)
    assert given[:2] == [begun[0], begun[2]]
    assert [one["trial"] for one in given[2:]] == ["004", "005", "006"]
    if searcher == "random":
        (tmp_path / "other").mkdir()
        straight = drain(source(tmp_path / "other", searcher, 6, tree))
        assert [one["values"] for one in straight[3:]] == [one["values"] for one in given[2:]]
    if searcher == "grid":
        values = {tuple(trial.values.items()) for trial in Ledger(tmp_path).trials()}
        assert len(values) == 6, "every combination once, over both starts"


# Decisions


def ray_trial(name: str) -> Any:
    return SimpleNamespace(trial_id=f"ray-{name}", config={"trial": name, "values": {}})


def test_a_stop_is_a_message(desk: FakeDesk) -> None:
    """Ray continues the trial, which stops itself: the worse half after the first epoch, with reduction 2."""
    asha = scheduler(Settings(reduction=2), CONFIG, [], desk)
    for name, score in (("001", 0.9), ("002", 0.5), ("003", 0.95)):
        asha.on_trial_add(object(), ray_trial(name))
        assert asha.on_trial_result(object(), ray_trial(name), {"epoch": 1, "score": score}) == "CONTINUE"
    assert desk.decided == [("001", 1, False), ("002", 1, True), ("003", 1, False)]
    none = scheduler(Settings(scheduler="none"), CONFIG, [], desk)
    assert none.on_trial_result(object(), ray_trial("004"), {"epoch": 1, "score": 0.0}) == "CONTINUE"
    assert desk.decided[-1] == ("004", 1, False)


def test_asha_compares_with_trials_that_have_ended(desk: FakeDesk, tmp_path: Path) -> None:
    """Ended trials of an earlier start count, running ones do not; the lower loss is the better one."""
    records = [{"epoch": epoch, "val": {"accuracy": 0.8, "loss": 0.2}} for epoch in range(1, 10)]
    ended = Trial(id="001", folder=tmp_path, values={}, status="finished", records=records)
    for monitor, known, score, stops in (
        ("accuracy", [ended], 0.5, True),
        ("accuracy", [replace(ended, status="running")], 0.5, False),
        ("accuracy", [], 0.5, False),
        ("loss", [ended], 0.1, False),
        ("loss", [ended], 0.3, True),
    ):
        asha = scheduler(Settings(), CONFIG.override({"train.monitor": monitor}), known, desk)
        asha.on_trial_add(object(), ray_trial("003"))
        asha.on_trial_result(object(), ray_trial("003"), {"epoch": 1, "score": score})
        assert desk.decided[-1] == ("003", 1, stops), (monitor, known, score)


def test_a_stop_is_not_revoked() -> None:
    """A trial that dies before it has stopped reports its epoch again, and ASHA does not decide a second time."""

    async def story() -> list[bool]:
        real = Desk()
        await real.decide("001", 1, False)
        await real.decide("001", 2, True)
        await real.decide("001", 2, False)
        return [await real.stops("001", 1), await real.stops("001", 2)]

    assert asyncio.run(story()) == [False, True]


def test_the_status_of_ended_trials(desk: FakeDesk, tmp_path: Path) -> None:
    ledger, lines = Ledger(tmp_path), list[str]()
    listener = Listener(ledger, CONFIG, Settings(retries=1), desk, 4, lines.append)
    for count in (9, 4, 0, 2):
        name = add_trial(ledger, {"optim.lr": 0.1}, *[i / 10 for i in range(1, count + 1)], status="running").name
        listener.on_trial_start(0, [], SimpleNamespace(config={"trial": name, "values": {"optim.lr": 0.1}}))
    desk.failed["003"] = "no memory\x1b[31m"
    for name in ("001", "002", "003"):
        listener.on_trial_complete(0, [], ray_trial(name))
    listener.on_trial_error(0, [], ray_trial("004"))
    assert [(trial.status, trial.reason) for trial in ledger.trials()] == [
        ("finished", ""),
        ("stopped", "after epoch 4 of 9"),
        ("failed", "no memory?[31m"),
        ("failed", "its process has died 2 times"),
    ]
    assert lines[-1].endswith("4 of 4 trials have ended, the best is 001 with 90.00%")


# A trial on its worker


def run_work(folder: Path, monkeypatch: pytest.MonkeyPatch, fit: Any, workers: int = 1) -> list[dict[str, Any]]:
    """Run trial 001 with another `fit`; returns its reports to Ray."""
    monkeypatch.setattr(trainer, "fit", fit)
    (folder / "trials" / "001").mkdir(parents=True, exist_ok=True)
    task = Task(folder=folder, scratch=folder, config=CONFIG, settings=Settings(workers=workers))
    reports: list[dict[str, Any]] = []
    work("001", CONFIG, task, reports.append)
    return reports


def failing(error: Exception) -> Any:
    def fit(config: Config, on_epoch: Any) -> None:
        raise error

    return fit


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("the training loss is nan in epoch 1", "a lower --optim.lr"), "the training loss is nan in epoch 1"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (ZeroDivisionError("ours"), "ZeroDivisionError: ours"),
    ],
)
def test_a_failure_is_noted_and_not_raised(
    error: Exception, reason: str, desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_work(tmp_path, monkeypatch, failing(error))
    assert desk.failed == {"001": reason}
    text = tmp_path / "trials" / "001" / "error.txt"
    assert text.exists() == (not isinstance(error, UserError))
    assert not text.exists() or type(error).__name__ in text.read_text()


def test_failures_that_ray_must_see(desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray replaces lost ranks; of several ranks the others wait for one that fails, and its reason is kept."""
    with pytest.raises(RankLost):
        run_work(tmp_path, monkeypatch, failing(RankLost("gone")))
    assert (desk.failed, desk.noted) == ({}, {})
    with pytest.raises(MemoryError):
        run_work(tmp_path, monkeypatch, failing(MemoryError("no memory")), workers=2)
    assert (desk.failed, desk.noted) == ({}, {"001": "MemoryError: no memory"})


def test_a_trial_reports_each_epoch_and_stops_on_request(
    desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of an earlier start are reported again, except for the newest, which the trainer may repeat."""
    desk.stop_after, stops = 4, list[bool]()

    def fit(config: Config, on_epoch: Any) -> None:
        for epoch in (3, 4):
            val = Metrics(confusion_KK=np.eye(7, dtype=np.int64), loss_sum=1.0 / epoch, count=7)
            rest = {"lr": 1, "train_loss": 1, "images_per_second": 1, "seconds": 1, "peak_memory": 1}
            stops.append(on_epoch(EpochRecord(epoch=epoch, step=epoch, val=val, **rest)))

    write_metrics(tmp_path / "trials" / "001", epochs(0.4, 0.3, 0.2))
    reports = run_work(tmp_path, monkeypatch, fit)
    assert stops == [False, True]
    shown = [(one["epoch"], one["accuracy"], one["score"]) for one in reports]
    assert shown == [(1, 0.4, 0.4), (2, 0.3, 0.4), (3, 1.0, 1.0), (4, 1.0, 1.0)]


def test_the_config_of_a_trial(tmp_path: Path) -> None:
    task = Task(folder=tmp_path, scratch=tmp_path, config=CONFIG, settings=Settings())
    config = task.config_of("007", {"optim.lr": 0.5})
    assert (config.optim.lr, config.run.name, config.run.resume) == (0.5, "007", "auto")
    assert config.run.dir == str(tmp_path / "trials")
    assert driver.shown({"optim.lr": 0.00012345, "model.freeze_depth": 3}) == "optim.lr 0.000123, model.freeze_depth 3"
