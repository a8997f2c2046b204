"""What Ray Tune asks while a search runs: values for the next trial, whether one stops, and who listens.

The ledger is ahead of Ray: a trial is in it before Ray hears of it. So the state of a search is the
ledger's, and an interrupted one is a new experiment of Ray with what the ledger knows.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray
from ray.tune import Callback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from fer_dist.config import Config
from fer_dist.errors import printable
from tune.ledger import RUNS, Ledger, Status, Trial, best_of, ranked, records_in
from tune.settings import Settings
from tune.space import Space, value_of
from tune.tpe import Tpe
from tune.trial import CLOCK, SCORE
from tune.words import number, spelt


class Source(Searcher):  # type: ignore[misc]
    """Hands out the trials that an earlier start has left unfinished, then new ones, each noted in the ledger."""

    def __init__(self, ledger: Ledger, config: Config, space: Space, settings: Settings) -> None:
        super().__init__(metric=SCORE, mode=best_of(config.train.monitor).__name__)
        known = ledger.trials()
        self._ledger, self._config, self._space, self._settings = ledger, config, space, settings
        self._waiting = [trial for trial in known if trial.status == "running"]
        self._given = len(known)
        self._grid = space.grid(settings.seed) if settings.searcher == "grid" else []
        self._tpe = Tpe(space, config, settings, known) if settings.searcher == "tpe" else None
        self._values: dict[str, dict[str, Any]] = {}

    @property
    def left(self) -> int:
        """How many trials this start has to run."""
        total = min(self._settings.trials, len(self._grid)) if self._grid else self._settings.trials
        return len(self._waiting) + max(0, total - self._given)

    def suggest(self, trial_id: str) -> Any:
        """What Ray passes to the trial: its id in the ledger, and its values."""
        if self._waiting:
            trial = self._waiting.pop(0)
            name, values = trial.id, trial.values
        elif self.left:
            values = self._config_values(self._drawn(trial_id))
            self._given += 1
            name = self._ledger.give(values)
        else:
            return Searcher.FINISHED
        self._values[trial_id] = values
        return {"trial": name, "values": values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna."""
        if self._tpe is not None:
            self._tpe.hears(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna."""
        if self._tpe is not None:
            self._tpe.ends(trial_id, self._values[trial_id], result or {}, error)

    def _drawn(self, trial_id: str) -> dict[str, Any]:
        if self._tpe is not None:
            return self._tpe.draw(trial_id)
        return self._grid[self._given] if self._grid else self._space.sample(self._settings.seed, self._given)

    def _config_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values as the Config of the trial will hold them: none may be dropped or changed on the way."""
        return {name: value_of(self._config.override(values), name) for name in values}


class _Asking:
    """Makes a scheduler's STOP a message to the trial, which then ends by itself, its run folder whole."""

    desk: Any

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if tune_controller is not None and CLOCK in result:  # else it is told of the past, or the trial has failed
            stop = decision == TrialScheduler.STOP
            ray.get(self.desk.decide.remote(trial.config["trial"], result[CLOCK], stop))
        return str(TrialScheduler.CONTINUE)


class Asha(_Asking, AsyncHyperBandScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934), of Ray."""


class NoScheduler(_Asking, FIFOScheduler):  # type: ignore[misc]
    """Every trial trains to its end."""


def scheduler(settings: Settings, config: Config, known: list[Trial], desk: Any) -> Any:
    """The scheduler, told of the trials that an earlier start has ended."""
    if settings.scheduler == "none":
        found: Any = NoScheduler()
    else:
        found = Asha(
            time_attr=CLOCK,
            metric=SCORE,
            mode=best_of(config.train.monitor).__name__,
            max_t=config.train.epochs,
            grace_period=min(settings.grace, config.train.epochs),
            reduction_factor=settings.reduction,
            stop_last_trials=False,
        )
    found.desk = desk
    if settings.scheduler == "asha":
        better = best_of(config.train.monitor)
        for trial in (trial for trial in known if trial.status != "running"):
            past = SimpleNamespace(trial_id=f"ended {trial.id}")
            found.on_trial_add(None, past)
            scores = [record["val"][config.train.monitor] for record in trial.records]
            for i, record in enumerate(trial.records):
                found.on_trial_result(None, past, {CLOCK: record["epoch"], SCORE: better(scores[: i + 1])})
    return found


class Listener(Callback):  # type: ignore[misc]
    """Notes in the ledger how trials end, and says what happens, a line at a time."""

    def __init__(
        self, ledger: Ledger, config: Config, settings: Settings, desk: Any, total: int, say: Callable[[str], None]
    ) -> None:
        self._ledger, self._config, self._settings = ledger, config, settings
        self._desk, self._total, self._say = desk, total, say
        self._began: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray has started the process of a trial, or started it again."""
        name, values = trial.config["trial"], trial.config["values"]
        again = name in self._began
        self._began.setdefault(name, time.monotonic())
        self._say(f"trial {name} {'goes on' if again else 'starts'}: {shown(values)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported an epoch."""
        monitor = self._config.train.monitor
        epoch, epochs = result[CLOCK], self._config.train.epochs
        self._say(f"trial {trial.config['trial']} epoch {epoch}/{epochs}: {monitor} {number(monitor, result[monitor])}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself."""
        reason = ray.get(self._desk.failure.remote(trial.config["trial"]))
        self._ends(trial, printable(reason))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray has given a trial up: its processes died more often than they are started again."""
        times = self._settings.retries + 1
        reason = ray.get(self._desk.failure.remote(trial.config["trial"]))
        self._ends(trial, printable(reason) or f"its process has died {times} time{'s' * (times > 1)}")

    def _ends(self, trial: Any, failure: str) -> None:
        name = trial.config["trial"]
        done, epochs = len(records_in(self._ledger.folder / RUNS / name)), self._config.train.epochs
        status: Status = "failed" if failure else "finished" if done >= epochs else "stopped"
        reason = failure if failure else "" if status == "finished" else f"after epoch {done} of {epochs}"
        self._ledger.end(name, status, reason, time.monotonic() - self._began.get(name, time.monotonic()))
        known, monitor = self._ledger.trials(), self._config.train.monitor
        ended = sum(one.status != "running" for one in known)
        line = f"trial {name} {status}{': ' * bool(reason)}{reason}; {ended} of {self._total} trials have ended"
        for first in ranked(known, monitor)[:1]:
            best = first.best(monitor)
            line += f", the best is {first.id} with {number(monitor, best['val'][monitor])}" if best else ""
        self._say(line)


def shown(values: dict[str, Any]) -> str:
    """Values of a trial for people."""
    return printable(", ".join(f"{name} {spelt(value, 3)}" for name, value in values.items()))
