"""What a search was asked for: kept in its folder, so that going on needs no second telling."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fer_dist.config import Config
from fer_dist.errors import UserError

Searcher = Literal["tpe", "random", "grid"]
Scheduler = Literal["asha", "none"]
SEARCHERS: tuple[Searcher, ...] = get_args(Searcher)
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)
FILE = "search.yaml"
MOST = 999_999


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A search, but for the Config and the space.

    Attributes:
        searcher: where the values of the next trial come from.
        scheduler: asha stops trials whose score is not among the best 1/`reduction` of those that came so far.
        trials: how many are given values.
        seed: of the searcher.
        grace: epochs that every trial may train.
        workers: processes that train one trial together.
        cpus: cores of each of them, which are its threads, too.
        gpus: of a trial, shared by its workers; a fraction where several trials share one. None: one a worker, where
            there are so many.
        retries: how often a trial goes on after one of its processes has died.
    """

    searcher: Searcher = "tpe"
    scheduler: Scheduler = "asha"
    trials: int = 12
    seed: int = 0
    grace: int = 1
    reduction: int = 3
    workers: int = 1
    cpus: int = 1
    gpus: float | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        least = {"trials": 1, "seed": 0, "grace": 1, "reduction": 2, "workers": 1, "cpus": 1, "retries": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= MOST:
                raise UserError(
                    f"{name} is {value!r}, expected a whole number {low}..{MOST}", f"--{flag(name)} {max(low, 1)}"
                )
        if self.gpus is not None and (type(self.gpus) not in (int, float) or not 0 <= self.gpus <= MOST):
            raise UserError(f"gpus is {self.gpus!r}, expected a number 0..{MOST}", "--gpus-per-trial 1")
        for name, known in (("searcher", SEARCHERS), ("scheduler", SCHEDULERS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}, expected {', '.join(known)}", f"--{name} {known[0]}"
                )
        share = (self.gpus or 0) / self.workers
        if self.workers > 1 and share != int(share):
            raise UserError(
                f"{self.workers} workers share {self.gpus:g} GPUs: {share:g} each; NCCL needs whole ones",
                f"--gpus-per-trial {self.workers}, or --workers-per-trial 1 for a fraction",
            )
        if share > 1 and share != int(share):
            raise UserError(f"--gpus-per-trial is {self.gpus:g}: above 1, GPUs are whole", "--gpus-per-trial 1")


def flag(name: str) -> str:
    """What to type for a field, without the dashes."""
    return {
        "workers": "workers-per-trial",
        "cpus": "cpus-per-worker",
        "gpus": "gpus-per-trial",
        "seed": "search-seed",
    }.get(name, name)


def to_yaml(settings: Settings, config: Config, space: dict[str, Any]) -> str:
    """The content of search.yaml."""
    tree = {"search": asdict(settings), "space": space, "config": config.to_dict()}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def read(folder: Path) -> tuple[Settings, Config, dict[str, Any]]:
    """What `to_yaml` wrote into the folder of a search.

    Raises:
        UserError: there is no such file, or it has been damaged.
    """
    path = folder / FILE
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Settings)}
        settings = Settings(**{str(name): value for name, value in tree["search"].items() if name in known})
        return settings, Config().override(tree["config"]), dict(tree["space"])
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no search: there is no {FILE}", "--name of one, or leave --resume out"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, UserError) as error:
        raise UserError(
            f"{path} cannot be read: {' '.join(str(error).split())}", "put it back, or begin anew"
        ) from None
