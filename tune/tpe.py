"""Optuna's TPE through Ray's integration, told also of trials that it has not asked for."""

from contextlib import suppress
from typing import Any

from fer_dist.config import Config
from fer_dist.errors import UserError
from tune.ledger import Trial, best_of
from tune.settings import Settings
from tune.space import Axis, Space
from tune.trial import SCORE


class Tpe:
    """Draws values, and learns from every trial that has a score.

    Choices go to Optuna by their number: its own are texts and numbers only.
    """

    def __init__(self, space: Space, config: Config, settings: Settings, known: list[Trial]) -> None:
        """
        Args:
            known: the trials of earlier starts.

        Raises:
            UserError: optuna is not installed.
        """
        try:
            from optuna.logging import WARNING, set_verbosity
            from optuna.samplers import TPESampler
            from ray.tune.search.optuna import OptunaSearch
        except ImportError as error:
            raise UserError(f"the searcher tpe needs the package optuna: {error}", "pip install optuna") from None
        set_verbosity(WARNING)
        monitor = config.train.monitor
        self._space = space
        self._asked: set[str] = set()
        self._optuna: Any = OptunaSearch(
            {axis.name: _distribution(axis) for axis in space.axes},
            metric=SCORE,
            mode=best_of(monitor).__name__,
            # Going on with the seed of the start would draw the first trials once more.
            sampler=TPESampler(seed=settings.seed + len(known)),
        )
        for trial in known:
            best = trial.best(monitor)
            if best is not None and trial.status != "running":
                self._learn(trial.values, best["val"][monitor])

    def draw(self, trial_id: str) -> dict[str, Any]:
        """Values for a trial; the id is Ray's."""
        self._asked.add(trial_id)
        found = self._optuna.suggest(trial_id)
        return {
            axis.name: axis.choices[found[axis.name]] if axis.kind == "choice" else found[axis.name]
            for axis in self._space.axes
        }

    def hears(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial has reported an epoch, or that it has none."""
        if trial_id in self._asked and SCORE in result:
            self._optuna.on_trial_result(trial_id, result)

    def ends(self, trial_id: str, values: dict[str, Any], result: dict[str, Any], error: bool) -> None:
        """A trial has ended; one without a score has failed."""
        if trial_id in self._asked:
            self._optuna.on_trial_complete(trial_id, result, error or SCORE not in result)
        elif SCORE in result:
            self._learn(values, result[SCORE])

    def _learn(self, values: dict[str, Any], score: float) -> None:
        """Tell of a trial that was not asked for; not of one outside a space that was changed by hand."""
        with suppress(KeyError, ValueError):
            numbered = {
                axis.name: axis.choices.index(values[axis.name]) if axis.kind == "choice" else values[axis.name]
                for axis in self._space.axes
            }
            self._optuna.add_evaluated_point(numbered, score)


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "choice":
        return CategoricalDistribution(range(len(axis.choices)))
    assert axis.low is not None
    assert axis.high is not None
    if axis.kind == "integer":
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(axis.low, axis.high, log=axis.kind == "log_uniform")
