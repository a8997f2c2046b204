"""What Ray Tune asks, without a cluster: values, decisions, ends of trials."""

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
from tune import driver
from tune.driver import Listener, Source, scheduler
from tune.ledger import Ledger, Trial
from tune.settings import Searcher, Settings
from tune.spacefile import space_of
from tune.trial import Desk, Task, work

CONFIG = load_config("search", {"train.epochs": 9})
TREE = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "optim.name": ["adam", "sgd"], "model.freeze_depth": [0, 1, 2]}
FINITE = {"optim.name": ["adam", "sgd"], "model.freeze_depth": [0, 1, 2]}


class Call:
    """What `actor.method` is: `.remote(...)` here answers at once."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def remote(self, *words: Any) -> Any:
        return self.answer(*words)


class FakeDesk:
    def __init__(self) -> None:
        self.decided: list[tuple[str, int, bool]] = []
        self.failed: dict[str, str] = {}
        self.stop_after = 99
        self.decide = Call(lambda *words: self.decided.append(words))
        self.noted: dict[str, str] = {}
        self.note = Call(lambda name, words: self.noted.update({name: words}))
        self.fail = Call(lambda name, reason: self.failed.update({name: reason}))
        self.failure = Call(lambda name: self.failed.get(name, ""))
        self.stops = Call(lambda name, epoch: epoch >= self.stop_after)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> FakeDesk:
    found = FakeDesk()
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(ray, "get_actor", lambda name: found)
    return found


def source(folder: Path, searcher: Searcher, trials: int, tree: dict[str, Any] | None = None) -> Source:
    settings = Settings(searcher=searcher, trials=trials)
    return Source(Ledger(folder), CONFIG, space_of(tree or TREE, CONFIG, 1, "test"), settings)


def drain(found: Source) -> list[Any]:
    """Everything that it hands out; each trial ends at once."""
    given: list[Any] = []
    for number in range(100):
        answer = found.suggest(f"ray-{number}")
        if answer == RaySearcher.FINISHED:
            return given
        given.append(answer)
        result = {"epoch": 9, "score": answer["values"].get("optim.lr", 0.5), "training_iteration": 9}
        found.on_trial_result(f"ray-{number}", result)
        found.on_trial_complete(f"ray-{number}", result)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_values_are_in_the_ledger_before_ray_hears_of_them(searcher: Searcher, tmp_path: Path) -> None:
    given = drain(source(tmp_path, searcher, 15))
    assert [(trial.id, trial.values) for trial in Ledger(tmp_path).trials()] == [
        (one["trial"], one["values"]) for one in given
    ]
    assert len({one["values"]["optim.lr"] for one in given}) == 15
    assert {one["values"]["optim.name"] for one in given} == {"adam", "sgd"}
    for one in given:
        assert type(one["values"]["model.freeze_depth"]) is int
        CONFIG.override(one["values"])


def test_tpe_learns(tmp_path: Path) -> None:
    """The score is the learning rate itself: later trials are higher than the first ones, which are random."""
    rates = [one["values"]["optim.lr"] for one in drain(source(tmp_path, "tpe", 40))]
    assert sum(rates[-10:]) > 2 * sum(rates[:10])


def test_tpe_goes_on_with_what_was_found(tmp_path: Path) -> None:
    """A second start knows the trials of the first, so that it does not begin at random."""
    ledger = Ledger(tmp_path)
    for i in range(30):
        lr = 1e-4 * 10 ** (i / 15)
        name = ledger.give({"optim.lr": lr, "optim.name": "adam", "model.freeze_depth": 0})
        run = tmp_path / "trials" / name
        run.mkdir(parents=True)
        val = f'{{"accuracy": {lr}, "loss": 1, "macro_f1": 1}}'
        (run / "metrics.jsonl").write_text(f'{{"epoch": 1, "val": {val}}}\n')
        ledger.end(name, "finished", "", 1)
    new = drain(source(tmp_path, "tpe", 40))
    assert [one["trial"] for one in new] == [f"{i:03d}" for i in range(31, 41)]
    assert sorted(one["values"]["optim.lr"] for one in new)[5] > 3e-3


@pytest.mark.parametrize("searcher", ["tpe", "random", "grid"])
def test_what_was_left_unfinished_comes_first(searcher: Searcher, tmp_path: Path) -> None:
    tree = FINITE if searcher == "grid" else TREE
    first = source(tmp_path, searcher, 6, tree)
    begun = [first.suggest(f"old-{i}") for i in range(3)]
    Ledger(tmp_path).end("002", "finished", "", 1)
    again = source(tmp_path, searcher, 6, tree)
    assert again.left == 5
    given = drain(again)
    assert given[:2] == [begun[0], begun[2]]
    assert [one["trial"] for one in given[2:]] == ["004", "005", "006"]
    if searcher == "random":
        (tmp_path / "other").mkdir()
        straight = drain(source(tmp_path / "other", searcher, 6, tree))
        assert [one["values"] for one in straight[3:]] == [one["values"] for one in given[2:]]
    if searcher == "grid":
        values = [tuple(trial.values.items()) for trial in Ledger(tmp_path).trials()]
        assert len(set(values)) == 6, "every combination once, over both starts"


def test_tpe_learns_from_trials_that_went_on(tmp_path: Path) -> None:
    """It has not asked for them in this start; each is told once, with its own values and score."""
    first = source(tmp_path, "tpe", 6)
    begun = [first.suggest(f"old-{i}")["values"] for i in range(3)]
    again = source(tmp_path, "tpe", 6)
    given = [one["values"] for one in drain(again)]
    assert given[:3] == begun
    assert again._tpe is not None
    told = again._tpe._optuna._ot_study.trials
    assert [trial.params["optim.lr"] for trial in told] == [values["optim.lr"] for values in given]
    assert [trial.value for trial in told] == [values["optim.lr"] for values in given]


def test_a_grid_ends_where_there_are_no_more(tmp_path: Path) -> None:
    assert len(drain(source(tmp_path, "grid", 99, FINITE))) == 6


def ray_trial(name: str) -> Any:
    return SimpleNamespace(trial_id=f"ray-{name}", config={"trial": name, "values": {}})


def test_a_stop_is_a_message(desk: FakeDesk) -> None:
    """Ray is told to go on, the trial is told to stop: the worse half after the first epoch, with reduction 2."""
    asha = scheduler(Settings(reduction=2), CONFIG, [], desk)
    for name, score in (("001", 0.9), ("002", 0.5), ("003", 0.95)):
        asha.on_trial_add(object(), ray_trial(name))
        assert asha.on_trial_result(object(), ray_trial(name), {"epoch": 1, "score": score}) == "CONTINUE"
    assert desk.decided == [("001", 1, False), ("002", 1, True), ("003", 1, False)]
    none = scheduler(Settings(scheduler="none"), CONFIG, [], desk)
    assert none.on_trial_result(object(), ray_trial("004"), {"epoch": 1, "score": 0.0}) == "CONTINUE"
    assert desk.decided[-1] == ("004", 1, False)


def test_asha_knows_the_trials_of_an_earlier_start(desk: FakeDesk, tmp_path: Path) -> None:
    """Without them, the first new trial would go on whatever its score."""
    records = [{"epoch": epoch, "val": {"accuracy": 0.8, "loss": 0.2}} for epoch in range(1, 10)]
    ended = Trial(id="001", folder=tmp_path, values={}, status="finished", records=records)
    running = Trial(id="002", folder=tmp_path, values={}, status="running", records=records)
    for known, stops in (([ended], True), ([running], False), ([], False)):
        asha = scheduler(Settings(), CONFIG, known, desk)
        asha.on_trial_add(object(), ray_trial("003"))
        asha.on_trial_result(object(), ray_trial("003"), {"epoch": 1, "score": 0.5})
        assert desk.decided[-1] == ("003", 1, stops)


def test_lower_is_better_for_a_loss(desk: FakeDesk, tmp_path: Path) -> None:
    records = [{"epoch": 1, "val": {"accuracy": 0.8, "loss": 0.2}}]
    ended = Trial(id="001", folder=tmp_path, values={}, status="finished", records=records)
    for loss, stops in ((0.1, False), (0.3, True)):
        asha = scheduler(Settings(), CONFIG.override({"train.monitor": "loss"}), [ended], desk)
        asha.on_trial_add(object(), ray_trial("002"))
        asha.on_trial_result(object(), ray_trial("002"), {"epoch": 1, "score": loss})
        assert desk.decided[-1] == ("002", 1, stops)


def test_how_trials_end(desk: FakeDesk, tmp_path: Path) -> None:
    ledger, lines = Ledger(tmp_path), list[str]()
    listener = Listener(ledger, CONFIG, Settings(retries=1), desk, 4, lines.append)
    for epochs in (9, 4, 0, 2):
        name = ledger.give({"optim.lr": 0.1})
        folder = tmp_path / "trials" / name
        folder.mkdir(parents=True)
        text = "".join(f'{{"epoch": {i + 1}, "val": {{"accuracy": 0.{i + 1}}}}}\n' for i in range(epochs))
        (folder / "metrics.jsonl").write_text(text)
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


def record(epoch: int) -> EpochRecord:
    val = Metrics(confusion_KK=np.eye(7, dtype=np.int64), loss_sum=1.0 / epoch, count=7)
    return EpochRecord(
        epoch=epoch, step=epoch, lr=1, train_loss=1, val=val, images_per_second=1, seconds=1, peak_memory=1
    )


def task(folder: Path) -> Task:
    (folder / "trials" / "001").mkdir(parents=True)
    return Task(folder=folder, scratch=folder, config=CONFIG, settings=Settings())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("the training loss is nan in epoch 1", "a lower --optim.lr"), "the training loss is nan in epoch 1"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (MemoryError(), "MemoryError: "),
        (ZeroDivisionError("ours"), "ZeroDivisionError: ours"),
    ],
)
def test_a_failure_is_told_and_not_raised(
    error: Exception, told: str, desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(config: Config, on_epoch: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "fit", fit)
    work("001", CONFIG, task(tmp_path), lambda told: None)
    assert desk.failed == {"001": told}
    text = tmp_path / "trials" / "001" / "error.txt"
    assert text.exists() == (not isinstance(error, UserError))
    assert not text.exists() or type(error).__name__ in text.read_text()


def test_one_of_several_ranks_fails_aloud(desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it: it must be seen to end. What it said is the reason if the group is given up."""

    def fit(config: Config, on_epoch: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(trainer, "fit", fit)
    one = replace(task(tmp_path), settings=Settings(workers=2))
    with pytest.raises(MemoryError):
        work("001", CONFIG, one, lambda told: None)
    assert (desk.failed, desk.noted) == ({}, {"001": "MemoryError: no memory"})


def test_a_stop_is_kept() -> None:
    """A trial that dies before it has stopped tells its epoch again, and ASHA does not decide a second time."""

    async def story() -> list[bool]:
        real = Desk()
        await real.decide("001", 1, False)
        await real.decide("001", 2, True)
        await real.decide("001", 2, False)
        return [await real.stops("001", 1), await real.stops("001", 2)]

    assert asyncio.run(story()) == [False, True]


def test_a_space_that_was_changed_by_hand(tmp_path: Path) -> None:
    """TPE leaves out what it cannot place."""
    ledger = Ledger(tmp_path)
    for values in ({"optim.lr": 0.5, "optim.name": "adam"}, {"optim.lr": 0.001, "optim.name": "adamw"}, {}):
        name = ledger.give(values)
        (tmp_path / "trials" / name).mkdir(parents=True)
        line = '{"epoch": 1, "val": {"accuracy": 0.5, "loss": 1, "macro_f1": 1}}\n{"epoch": 2, "val": null}\n'
        (tmp_path / "trials" / name / "metrics.jsonl").write_text(line)
        ledger.end(name, "finished", "", 1)
    assert len(drain(source(tmp_path, "tpe", 6))) == 3


def test_a_lost_rank_is_ray_s_to_replace(desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(config: Config, on_epoch: Any) -> None:
        raise RankLost("gone")

    monkeypatch.setattr(trainer, "fit", fit)
    with pytest.raises(RankLost):
        work("001", CONFIG, task(tmp_path), lambda told: None)
    assert not desk.failed


def test_a_trial_reports_each_epoch_and_stops_when_told(
    desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of an earlier start are told again, but for the newest, which the trainer may ask about once more."""
    desk.stop_after = 4
    answers: list[bool] = []

    def fit(config: Config, on_epoch: Any) -> None:
        answers.extend(on_epoch(record(epoch)) for epoch in (3, 4))

    monkeypatch.setattr(trainer, "fit", fit)
    told: list[dict[str, Any]] = []
    one = task(tmp_path)
    line = '{"epoch": %d, "val": {"accuracy": 0.%d, "macro_f1": 0.1, "loss": 1.5}}\n'
    (tmp_path / "trials" / "001" / "metrics.jsonl").write_text("".join(line % (e, 5 - e) for e in (1, 2, 3)))
    work("001", CONFIG, one, told.append)
    assert answers == [False, True]
    assert [(one["epoch"], one["accuracy"], one["score"]) for one in told] == [
        (1, 0.4, 0.4),
        (2, 0.3, 0.4),
        (3, 1.0, 1.0),
        (4, 1.0, 1.0),
    ]


def test_the_config_of_a_trial(tmp_path: Path) -> None:
    config = task(tmp_path).config_of("007", {"optim.lr": 0.5})
    assert (config.optim.lr, config.run.name, config.run.resume) == (0.5, "007", "auto")
    assert config.run.dir == str(tmp_path / "trials")
    assert driver.shown({"optim.lr": 0.00012345, "model.freeze_depth": 3}) == "optim.lr 0.000123, model.freeze_depth 3"
