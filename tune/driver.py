"""What Ray Tune asks while a search runs: values for the next trial, whether one stops, and who listens.

The ledger is ahead of Ray: a trial is in it before Ray hears of it. So the state of a search is the
ledger's, and an interrupted one is a new experiment of Ray with what the ledger knows.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import ray
from ray.tune import Callback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from fer_dist.config import Config
from fer_dist.errors import UserError, printable
from tune.ledger import Ledger, Status, Trial, ranked
from tune.settings import Settings
from tune.space import Axis, Space, value_of

CLOCK, SCORE = "epoch", "score"
"""What a trial reports: whole epochs, and the best value of `train.monitor` so far."""


def mode(config: Config) -> str:
    """Ray's word for which scores are better."""
    return "min" if config.train.monitor == "loss" else "max"


class Source(Searcher):  # type: ignore[misc]
    """Hands out the trials that an earlier start has left unfinished, then new ones, each noted in the ledger."""

    def __init__(self, ledger: Ledger, config: Config, space: Space, settings: Settings) -> None:
        super().__init__(metric=SCORE, mode=mode(config))
        known = ledger.trials()
        self._ledger, self._config, self._space, self._settings = ledger, config, space, settings
        self._waiting = [trial for trial in known if trial.status == "running"]
        self._given = len(known)
        self._grid = space.grid(settings.seed) if settings.searcher == "grid" else []
        self._tpe: Any = _tpe(space, config, settings, known) if settings.searcher == "tpe" else None
        self._asked: set[str] = set()
        self._went_on: dict[str, dict[str, Any]] = {}

    @property
    def left(self) -> int:
        """How many trials this start has to run."""
        total = min(self._settings.trials, len(self._grid)) if self._grid else self._settings.trials
        return len(self._waiting) + max(0, total - self._given)

    def suggest(self, trial_id: str) -> Any:
        """What Ray passes to the trial: its id in the ledger, and its values."""
        if self._waiting:
            trial = self._waiting.pop(0)
            self._went_on[trial_id] = trial.values
            return {"trial": trial.id, "values": trial.values}
        if not self.left:
            return Searcher.FINISHED
        values = self._config_values(self._drawn(trial_id))
        self._given += 1
        return {"trial": self._ledger.give(values), "values": values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna."""
        if trial_id in self._asked and SCORE in result:
            self._tpe.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna; one without a score has failed."""
        if trial_id in self._asked:
            self._tpe.on_trial_complete(trial_id, result, error or SCORE not in (result or {}))
        elif self._tpe is not None and trial_id in self._went_on and SCORE in (result or {}):
            assert result is not None
            _learn(self._tpe, self._space, self._went_on[trial_id], result[SCORE])

    def _drawn(self, trial_id: str) -> dict[str, Any]:
        if self._tpe is not None:
            self._asked.add(trial_id)
            found = self._tpe.suggest(trial_id)
            return {
                axis.name: axis.choices[found[axis.name]] if axis.kind == "choice" else found[axis.name]
                for axis in self._space.axes
            }
        return self._grid[self._given] if self._grid else self._space.sample(self._settings.seed, self._given)

    def _config_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values as the Config of the trial will hold them: none may be dropped or changed on the way."""
        return {name: value_of(self._config.override(values), name) for name in values}


def _tpe(space: Space, config: Config, settings: Settings, known: list[Trial]) -> Any:
    """Optuna's TPE through Ray's integration, told of what an earlier start has found."""
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
        from optuna.logging import WARNING, set_verbosity
        from optuna.samplers import TPESampler
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise UserError(f"the searcher tpe needs the package optuna: {error}", "pip install optuna") from None

    def distribution(axis: Axis) -> Any:
        if axis.kind == "choice":  # by number: Optuna's own choices are texts and numbers only
            return CategoricalDistribution(range(len(axis.choices)))
        assert axis.low is not None
        assert axis.high is not None
        if axis.kind == "integer":
            return IntDistribution(int(axis.low), int(axis.high))
        return FloatDistribution(axis.low, axis.high, log=axis.kind == "log_uniform")

    set_verbosity(WARNING)
    # Going on with the seed of the start would draw the first trials once more.
    sampler = TPESampler(seed=settings.seed + len(known))
    found = OptunaSearch(
        {axis.name: distribution(axis) for axis in space.axes}, metric=SCORE, mode=mode(config), sampler=sampler
    )
    for trial in known:
        best = trial.best(config.train.monitor)
        if best is not None and trial.status != "running":
            _learn(found, space, trial.values, best["val"][config.train.monitor])
    return found


def _learn(tpe: Any, space: Space, values: dict[str, Any], score: float) -> None:
    """Tell Optuna of a trial that it has not asked for; not of one outside a space that was changed by hand."""
    with suppress(KeyError, ValueError):
        numbered = {
            axis.name: axis.choices.index(values[axis.name]) if axis.kind == "choice" else values[axis.name]
            for axis in space.axes
        }
        tpe.add_evaluated_point(numbered, score)


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
            mode=mode(config),
            max_t=config.train.epochs,
            grace_period=min(settings.grace, config.train.epochs),
            reduction_factor=settings.reduction,
            stop_last_trials=False,
        )
    found.desk = desk
    if settings.scheduler == "asha":
        better: Callable[..., float] = min if config.train.monitor == "loss" else max
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
        self._say(
            f"trial {trial.config['trial']} epoch {epoch}/{epochs}: {monitor} {percent(monitor, result[monitor])}"
        )

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
        found = next(one for one in self._ledger.trials() if one.id == name)
        done, epochs = len(found.records), self._config.train.epochs
        status: Status = "failed" if failure else "finished" if done >= epochs else "stopped"
        reason = failure if failure else "" if status == "finished" else f"after epoch {done} of {epochs}"
        self._ledger.end(name, status, reason, time.monotonic() - self._began.get(name, time.monotonic()))
        known, monitor = self._ledger.trials(), self._config.train.monitor
        ended = sum(one.status != "running" for one in known)
        line = f"trial {name} {status}{': ' * bool(reason)}{reason}; {ended} of {self._total} trials have ended"
        for first in ranked(known, monitor)[:1]:
            best = first.best(monitor)
            line += f", the best is {first.id} with {percent(monitor, best['val'][monitor])}" if best else ""
        self._say(line)


def shown(values: dict[str, Any]) -> str:
    """Values of a trial for people."""
    texts = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
    return printable(", ".join(texts))


def percent(monitor: str, value: float) -> str:
    """A score for people."""
    return f"{value:.4f}" if monitor == "loss" else f"{100 * value:.2f}%"
