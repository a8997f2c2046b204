"""Search for settings: `python -m tune.search --config vit --data fer2013.csv --trials 40`.

Without arguments: a small search on the embedded drawn faces.
"""

import shlex
import shutil
import signal
import sys
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fer_dist.commandline import Parser, parse, run
from fer_dist.config import Config
from fer_dist.errors import Stopped, UserError, printable
from tune.ledger import Ledger
from tune.settings import FILE, SCHEDULERS, SEARCHERS, Settings, read, to_yaml

PROG = "python -m tune.search"
RECIPE = "search"
ABOUT = f"""\
Searches settings with Ray Tune: each trial is a training as `python -m fer_dist.train` does it, with other values.
Without --space: the learning rate, the global batch size and the depth of freezing, around those of the recipe.

Settings of the training are given as there: --config NAME_OR_PATH (default: {RECIPE}), --data PATH,
--train.epochs 10, ...; `python -m fer_dist.train --help` lists them."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search with its folder, ready to run.

    Attributes:
        space: the tree of search.yaml; `tune.spacefile` reads it.
    """

    folder: Path
    settings: Settings
    config: Config
    space: dict[str, Any]


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, 2 after a UserError, 75 where it was stopped."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    given, rest = _parser().parse_known_args(argv)
    search = _resumed(given, rest) if given.resume else _new(given, rest)
    ledger = Ledger(search.folder)
    with ledger.hold():
        try:
            _run(search, ledger, given)
        except KeyboardInterrupt:
            _report(search, ledger, shown=False)
            ended = sum(trial.status != "running" for trial in ledger.trials())
            raise Stopped(
                f"{ended} of {search.settings.trials} trials have ended, the others keep what they have\n"
                f"  -> {again(search.folder)} goes on"
            ) from None
    _report(search, ledger, shown=True)


def _parser() -> Parser:
    parser = Parser(PROG, ABOUT)
    default = Settings()
    add = parser.add_argument
    add("--space", metavar="FILE", type=Path, help="YAML: dotted setting -> {log_uniform: [1.0e-5, 1.0e-2]}, "
        "{uniform: [LOW, HIGH]}, {integer: [LOW, HIGH]}, {choice: [A, B]} or [A, B]")  # fmt: skip
    add("--trials", metavar="N", type=int, default=SUPPRESS, help=f"default: {default.trials}; grid: all")
    add("--searcher", default=SUPPRESS, help=f"{', '.join(SEARCHERS)}; default: {default.searcher}")
    add("--scheduler", default=SUPPRESS, help=f"{', '.join(SCHEDULERS)}; default: {default.scheduler}")
    add("--search-seed", metavar="N", dest="seed", type=int, default=SUPPRESS, help="of the searcher; default: 0")
    add("--grace", metavar="N", type=int, default=SUPPRESS, help="epochs that every trial may train; default: 1")
    add("--reduction", metavar="N", type=int, default=SUPPRESS, help="asha lets one in so many go on; default: 3")
    add("--workers-per-trial", metavar="N", dest="workers", type=int, default=SUPPRESS, help="DDP; default: 1")
    add("--cpus-per-worker", metavar="N", dest="cpus", type=int, default=SUPPRESS, help="default: 1")
    add("--gpus-per-trial", metavar="F", dest="gpus", type=float, default=SUPPRESS, help="also a fraction; default: 0")
    add("--retries", metavar="N", type=int, default=SUPPRESS, help="after a process of a trial died; default: 2")
    add("--name", help="of the folder of the search; default: the architecture and the time")
    add("--dir", type=Path, default=Path("tune_runs"), help="that holds the folders; default: tune_runs")
    add("--resume", action="store_true", help="go on with --name, or else with the newest search")
    add("--concurrent", metavar="N", type=int, help="trials at once, at most; default: as many as fit")
    add("--address", default="", help="of a Ray cluster to join; default: $RAY_ADDRESS, else this machine alone")
    add("--cpus", metavar="N", dest="cores", type=int, help="cores that Ray counts on here; default: all")
    return parser


def _new(given: Namespace, rest: Sequence[str]) -> Search:
    """A search from the command line, checked, with its folder made.

    Raises:
        UserError: settings or space are wrong; the folder exists or cannot be made.
    """
    from tune.spacefile import default_space, read_space

    settings = Settings(**_asked(given))
    config = _anywhere(parse(rest, prog=PROG, about=ABOUT, recipe=RECIPE))
    space = (
        default_space(config, settings.workers)
        if given.space is None
        else read_space(given.space, config, settings.workers)
    )
    if settings.searcher == "grid":
        count = len(space.grid(settings.seed))
        settings = replace(settings, trials=min(count, getattr(given, "trials", count)))
    name = given.name or f"{config.model.arch.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if "/" in name or name in ("", ".", ".."):
        raise UserError(f"--name is {printable(name)!r}, expected the name of a folder", "--dir FOLDER --name NAME")
    folder = given.dir.absolute() / name
    text = to_yaml(settings, config, space.to_dict())
    _make(folder, text, given.dir / name)
    return Search(folder=folder, settings=settings, config=config, space=space.to_dict())


def _anywhere(config: Config) -> Config:
    """With whole paths: Ray runs a trial in a folder of its own."""
    paths = ("data.path", "data.ferplus", "data.cache_dir", "model.weights")
    tree = config.to_dict()
    given = {name: tree[name.split(".")[0]][name.split(".")[1]] for name in paths}
    return config.override({name: str(Path(value).absolute()) for name, value in given.items() if value})


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


def _resumed(given: Namespace, rest: Sequence[str]) -> Search:
    """The search of a folder, as it was asked for when it began; more --trials may be asked for.

    Raises:
        UserError: there is none, or other settings are given.
    """
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
    settings, config, space = read(folder)
    settings = replace(settings, trials=getattr(given, "trials", settings.trials))
    return Search(folder=folder, settings=settings, config=config, space=space)


def _asked(given: Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if name in Settings.__dataclass_fields__}


def _run(search: Search, ledger: Ledger, given: Namespace) -> None:
    """Everything that needs Ray.

    Raises:
        UserError: the cluster, the nodes or the data will not do.
        KeyboardInterrupt: Ctrl-C, or a SIGTERM.
    """
    from tune.cluster import connected, open_desk, prepare_nodes, require_resources
    from tune.trial import Task

    scratch = search.folder / ".ray"
    shutil.rmtree(scratch, ignore_errors=True)
    task = Task(folder=search.folder, scratch=scratch, config=search.config, settings=search.settings)
    try:
        with connected(given.address, given.cores), _interruptible():
            at_once = require_resources(search.settings, given.concurrent)
            for line in prepare_nodes(task):
                say(line)
            _tune(search, ledger, task, open_desk(), at_once)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tune(search: Search, ledger: Ledger, task: Any, desk: Any, at_once: int) -> None:
    """Give trials their values until there are enough, and wait for the last one."""
    from ray import tune
    from ray.exceptions import RayError

    from tune.board import Board
    from tune.driver import Listener, Source, scheduler
    from tune.spacefile import space_of
    from tune.trial import run_trial

    settings, config = search.settings, search.config
    space = space_of(search.space, config, settings.workers, str(search.folder / FILE))
    source = Source(ledger, config, space, settings)
    if not source.left:
        return
    say(
        f"search {search.folder}: {source.left} trials, {at_once} at once, each {settings.workers} "
        f"worker{'s' * (settings.workers > 1)}; {settings.searcher}, {settings.scheduler}"
    )
    alone = {"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {})
    # The leader of several workers computes nothing, but a bundle of nothing is none to Ray.
    needs = alone if settings.workers == 1 else {"CPU": 0, "memory": 2**20}
    board = Board(ledger.trials, config.train.monitor, list(search.space))
    listener = Listener(ledger, config, settings, desk, settings.trials, board.tell)
    tuner = tune.Tuner(
        tune.with_resources(partial(run_trial, task=task), needs),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler(settings, config, ledger.trials(), desk),
            num_samples=source.left,
            max_concurrent_trials=at_once,
            reuse_actors=settings.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(task.scratch),
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            callbacks=[listener],
            verbose=0,
        ),
    )
    try:
        with board:
            tuner.fit()
    except (RayError, tune.TuneError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
        raise UserError(f"Ray has ended the search: {told}", f"{again(search.folder)} goes on") from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, also after Ray has taken it for itself."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(search: Search, ledger: Ledger, *, shown: bool) -> None:
    """Write the tables, the pictures and the best model; show them.

    Raises:
        UserError: not one trial has finished an epoch.
    """
    from tune.report import show, write_report

    trials, monitor = ledger.trials(), search.config.train.monitor
    write_report(search.folder, trials, search.config, list(search.space), asdict(search.settings))
    if not shown:
        return
    show(trials, monitor, list(search.space), search.folder)
    if trials and not any(trial.records for trial in trials):
        raise UserError(f"no trial has finished an epoch; the first: {trials[0].reason}", "put that right first")


def again(folder: Path) -> str:
    """What to type to go on with a search."""
    where = "" if folder.parent == Path("tune_runs").absolute() else f" --dir {shlex.quote(str(folder.parent))}"
    return f"{PROG}{where} --name {shlex.quote(folder.name)} --resume"


def say(line: str) -> None:
    """A line on what happens."""
    print(printable(line), flush=True)


if __name__ == "__main__":
    main()
