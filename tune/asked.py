"""A search as it was asked for on the command line: a new one, or one that goes on."""

import difflib
import shlex
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fer_dist.commandline import Parser, parse
from fer_dist.config import Config
from fer_dist.errors import UserError, printable
from tune.ledger import Ledger
from tune.settings import FILE, SCHEDULERS, SEARCHERS, Settings, read, to_yaml
from tune.space import Space

PROG = "python -m tune.search"
RECIPE = "search"
PATHS = ("data.path", "data.ferplus", "data.cache_dir", "model.weights")
ABOUT = f"""\
Searches settings with Ray Tune: each trial is a training as `python -m fer_dist.train` does it, with other values.
Without --space: the learning rate, the global batch size and the depth of freezing, around those of the recipe.

Settings of the training are given as there: --config NAME_OR_PATH (default: {RECIPE}), --data PATH,
--train.epochs 10, ...; `python -m fer_dist.train --help` lists them."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search with its folder, ready to run."""

    folder: Path
    settings: Settings
    config: Config
    space: Space


def parser() -> Parser:
    """The options of a search; what it does not know are settings of the training."""
    made = Parser(PROG, ABOUT)
    default = Settings()
    add = made.add_argument
    kinds = (
        "{log_uniform: [1.0e-5, 1.0e-2]}, {uniform: [LOW, HIGH]}, {integer: [LOW, HIGH]}, {choice: [A, B]} or [A, B]"
    )
    add("--space", metavar="FILE", type=Path, help=f"YAML: dotted setting -> {kinds}")
    add("--trials", metavar="N", type=int, default=SUPPRESS, help=f"default: {default.trials}; grid: all")
    add("--searcher", default=SUPPRESS, help=f"{', '.join(SEARCHERS)}; default: {default.searcher}")
    add("--scheduler", default=SUPPRESS, help=f"{', '.join(SCHEDULERS)}; default: {default.scheduler}")
    add("--search-seed", metavar="N", dest="seed", type=int, default=SUPPRESS, help="of the searcher; default: 0")
    add("--grace", metavar="N", type=int, default=SUPPRESS, help="epochs that every trial may train; default: 1")
    add("--reduction", metavar="N", type=int, default=SUPPRESS, help="asha lets one in so many go on; default: 3")
    add("--workers-per-trial", metavar="N", dest="workers", type=int, default=SUPPRESS, help="DDP; default: 1")
    add("--cpus-per-worker", metavar="N", dest="cpus", type=int, default=SUPPRESS, help="default: 1")
    gpus = "also a fraction; default: one a worker"
    add("--gpus-per-trial", metavar="F", dest="gpus", type=float, default=SUPPRESS, help=gpus)
    add("--retries", metavar="N", type=int, default=SUPPRESS, help="after a process of a trial died; default: 2")
    add("--name", help="of the folder of the search; default: the architecture and the time")
    add("--dir", type=Path, default=Path("tune_runs"), help="that holds the folders; default: tune_runs")
    add("--resume", action="store_true", help="go on with --name, or else with the newest search")
    add("--retry-failed", action="store_true", help="with --resume: trials that have failed go on, too")
    add("--concurrent", metavar="N", type=count, help="trials at once, at most; default: as many as fit")
    add("--address", default="", help="of a Ray cluster to join; default: $RAY_ADDRESS, else this machine alone")
    add("--cpus", metavar="N", dest="cores", type=count, help="cores that Ray counts on here; default: all")
    return made


def count(text: str) -> int:
    """A number of things, for argparse, which calls what it refuses by the name of this function."""
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 10**6:
        raise ValueError
    return int(text)


def require_options(rest: Sequence[str]) -> None:
    """Refuse a misspelt option of the search, which would be taken for a setting: those have dots, but for a few.

    Raises:
        UserError: it names the nearest option.
    """
    plain = ["--config", "--data", "--print-config", *(f"--{field.name}" for field in fields(Config))]
    known = [*plain, *(option for action in parser()._actions for option in action.option_strings)]
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--") and len(word) > 2):
        if "." not in flag and flag not in plain:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown option {printable(flag)!r}", f"did you mean {near!r}? {PROG} --help lists all")


def new(given: Namespace, rest: Sequence[str]) -> Search:
    """A search from the command line, checked, with its folder made.

    Raises:
        UserError: settings or space are wrong; the folder exists or cannot be made.
    """
    from tune.spacefile import default_space, read_space

    require_options(rest)
    settings = Settings(**_asked(given))
    config = _anywhere(parse(rest, prog=PROG, about=ABOUT, recipe=RECIPE))
    if (config.run.name, config.run.dir, config.run.resume) != (None, "runs", "restart"):
        raise UserError("run.name, run.dir and run.resume are the search's own", "--name and --dir name its folder")
    space = (
        default_space(config, settings.workers)
        if given.space is None
        else read_space(given.space, config, settings.workers)
    )
    space = replace(space, axes=tuple(replace(axis, choices=_whole(axis.name, axis.choices)) for axis in space.axes))
    if settings.searcher == "grid":
        every = len(space.grid(settings.seed))
        settings = replace(settings, trials=min(every, getattr(given, "trials", every)))
    name = given.name or f"{config.model.arch.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if "/" in name or name in ("", ".", "..") or not f"{given.dir}/{name}".isprintable():
        told = printable(f"{given.dir}/{name}")
        raise UserError(
            f"{told!r} is to hold the search, expected a printable name of a folder", "--dir FOLDER --name NAME"
        )
    folder = given.dir.absolute() / name
    _make(folder, to_yaml(settings, config, space.to_dict()), given.dir / name)
    return Search(folder=folder, settings=settings, config=config, space=space)


def _anywhere(config: Config) -> Config:
    """With whole paths: Ray runs a trial in a folder of its own."""
    tree = config.to_dict()
    given = {name: tree[name.split(".")[0]][name.split(".")[1]] for name in PATHS}
    return config.override({name: _whole(name, (value,))[0] for name, value in given.items()})


def _whole(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of a setting, whole paths where they are paths."""
    if name not in PATHS:
        return values
    return tuple(value and str(Path(value).expanduser().absolute()) for value in values)


def _make(folder: Path, text: str, shown: Path) -> None:
    from fer_dist.engine.checkpoint import write_atomically

    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"cannot make the folder {shown}: {error.strerror}", "--dir FOLDER, or another --name"
        ) from None
    if used:
        raise UserError(f"the folder {shown} is in use", f"{again(folder)} goes on; or another --name")
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))


def resumed(given: Namespace, rest: Sequence[str]) -> Search:
    """The search of a folder, as it was asked for when it began; more --trials may be asked for.

    Raises:
        UserError: there is none, or other settings are given.
    """
    from fer_dist.engine.checkpoint import write_atomically
    from tune.spacefile import space_of

    asked = {name: value for name, value in _asked(given).items() if name != "trials"}
    others = [*rest, *asked, *(["--space"] if given.space else [])]
    if others:
        raise UserError(
            f"{printable(' '.join(map(str, others)))}: a search goes on with the settings that it began with",
            "leave these out (--trials, --concurrent, --address and --cpus may change), or begin one without --resume",
        )
    if given.name is None:
        found = sorted(given.dir.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"there is no search in {given.dir}", "--dir FOLDER, or leave --resume out")
        folder = found[-1].parent.absolute()
    else:
        folder = given.dir.absolute() / given.name
    settings, config, tree = read(folder)
    space = space_of(tree, config, settings.workers, str(folder / FILE))
    ledger = Ledger(folder)
    unknown = set(ledger.runs()) - {trial.id for trial in ledger.trials()}
    if unknown:
        raise UserError(
            f"{ledger.path} does not know of the run folders {', '.join(sorted(unknown))} beside it",
            "put it back, or begin another search",
        )
    if hasattr(given, "trials"):
        settings = replace(settings, trials=given.trials)
        text = to_yaml(settings, config, tree)
        write_atomically(folder / FILE, lambda file: file.write(text.encode()))
    if given.retry_failed:
        for trial in ledger.trials():
            if trial.status == "failed":
                ledger.end(trial.id, "running", "", 0)
    return Search(folder=folder, settings=settings, config=config, space=space)


def _asked(given: Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if name in Settings.__dataclass_fields__}


def again(folder: Path) -> str:
    """What to type to go on with a search."""
    where = "" if folder.parent == Path("tune_runs").absolute() else f" --dir {shlex.quote(str(folder.parent))}"
    return printable(f"{PROG}{where} --name {shlex.quote(folder.name)} --resume")


def near(folder: Path) -> Path:
    """A folder as a person would name it from here."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
