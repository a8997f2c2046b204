"""What a search leaves for people: a table, the best trial's settings and weights, a picture, the line to type next."""

import csv
import io
import json
import math
import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from io import BufferedRandom
from pathlib import Path
from typing import Any

from fer_dist.config import Config, RunConfig, load_config
from fer_dist.console import say
from fer_dist.errors import printable
from tune.ledger import Trial, ranked
from tune.table import print_table
from tune.words import SCORES, scored


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `write_report` has found.

    Attributes:
        best: None where no trial has finished an epoch.
        files: those that it has written.
    """

    best: Trial | None
    files: tuple[Path, ...]


def write_report(
    folder: Path, trials: list[Trial], config: Config, axes: Sequence[str], settings: dict[str, Any]
) -> Report:
    """Write results.csv, results.json, best.yaml, best.pth and search.png into a search's folder, each atomically.

    best.yaml and best.pth are left out where no trial has finished an epoch, and where the best one has not left
    what they are made of.

    Args:
        config: what the trials have in common.
        axes: dotted names of the settings that were searched.
        settings: plain values of the search, for results.json.

    Raises:
        UserError: a file cannot be written, or the best trial's config.yaml cannot be read.
    """
    from fer_dist.engine.checkpoint import write_atomically  # torch is behind it: --help must answer at once
    from tune.pictures import search_picture

    monitor = config.train.monitor
    best = next(iter(ranked(trials, monitor)), None)
    table = _csv(trials, monitor, axes).encode()
    results = _results(trials, monitor, axes, settings)
    write_atomically(folder / "results.csv", lambda file: file.write(table))
    write_atomically(
        folder / "results.json", lambda file: file.write((json.dumps(results, indent=1, default=str) + "\n").encode())
    )
    files = [folder / "results.csv", folder / "results.json"]
    (folder / "best.yaml").unlink(missing_ok=True)  # an earlier report's may be of another trial
    if best is not None and (best.folder / "config.yaml").is_file():
        text = _best_yaml(folder, best, config).encode()
        write_atomically(folder / "best.yaml", lambda file: file.write(text))
        files.append(folder / "best.yaml")
    if _share(best.folder / "best.pth" if best and _is_of(best, monitor) else None, folder / "best.pth"):
        files.append(folder / "best.pth")
    count = f"{len(trials)} trial{'s' * (len(trials) != 1)}, {results['epochs_trained']} epochs"
    search_picture(trials, axes, monitor, folder / "search.png", f"{folder}: {count}")
    return Report(best=best, files=(*files, folder / "search.png"))


def show(trials: list[Trial], monitor: str, axes: Sequence[str], folder: Path) -> None:
    """Print the trials, the best first, and what `write_report` has left in the search's folder."""
    print_table(trials, monitor, axes)
    order = ranked(trials, monitor)
    left = {name: folder / name for name in ("best.pth", "best.yaml", "search.png") if (folder / name).is_file()}
    if not order:
        say(f"best: none, since no trial has finished an epoch; {_quoted(folder / 'results.csv')} has the reasons")
        return
    record = order[0].best(monitor)
    assert record is not None
    where = f": {_quoted(left['best.pth'])}" if "best.pth" in left else ""
    say(f"best: trial {order[0].id}, {scored(monitor, record['val'][monitor])} in epoch {record['epoch']}{where}")
    if "best.yaml" in left:
        say(f"repeat it, or train it for longer: {_command(left['best.yaml'])}")
    if "search.png" in left:
        say(f"picture: {_quoted(left['search.png'])}")


def _csv(trials: list[Trial], monitor: str, axes: Sequence[str]) -> str:
    """A line a trial, in the order of their start."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    others = [name for name in SCORES if name != monitor]
    head = ["trial", "status", *axes, "epochs", "best_epoch", monitor, *others, "seconds", "reason"]
    table.writerow(map(_cell, head))
    for trial in trials:
        best = trial.best(monitor)
        values = [_cell(trial.values[axis]) if axis in trial.values else "" for axis in axes]
        scores = [""] * 4 if best is None else [best["epoch"], *(best["val"][name] for name in (monitor, *others))]
        reason = _cell(printable(" ".join(trial.reason.split())))
        table.writerow([trial.id, trial.status, *values, len(trial.records), *scores, trial.seconds, reason])
    return text.getvalue()


def _cell(value: Any) -> str:
    """A value as YAML and the command line spell it; what a spreadsheet would compute begins with an apostrophe."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    text = value if isinstance(value, str) else repr(value) if isinstance(value, float) else json.dumps(value)
    with suppress(ValueError):
        float(text)
        return text
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _results(trials: list[Trial], monitor: str, axes: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """What results.json holds."""
    best = next(iter(ranked(trials, monitor)), None)
    found = {
        "settings": settings,
        "monitor": monitor,
        "axes": list(axes),
        "best": best and {"trial": best.id, "values": best.values, **_scores(best, monitor)},
        "epochs_trained": sum(len(trial.records) for trial in trials),
        "trials": [
            {
                "trial": trial.id,
                "status": trial.status,
                "reason": trial.reason,
                "seconds": trial.seconds,
                "values": trial.values,
                "best": _scores(trial, monitor) or None,
                "curve": [
                    {"epoch": record["epoch"], **{name: record["val"][name] for name in SCORES}}
                    for record in trial.records
                ],
            }
            for trial in trials
        ],
    }
    return {key: _json_safe(value) for key, value in found.items()}


def _scores(trial: Trial, monitor: str) -> dict[str, Any]:
    """The best epoch of a trial and its scores; empty where it has finished none."""
    best = trial.best(monitor)
    return {} if best is None else {"epoch": best["epoch"], **{name: best["val"][name] for name in SCORES}}


def _json_safe(tree: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(tree, dict):
        return {key: _json_safe(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_json_safe(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _best_yaml(folder: Path, best: Trial, base: Config) -> str:
    """The whole settings of the best trial, as a run of their own that can be started anywhere."""
    config, monitor = load_config(str(best.folder / "config.yaml")), base.train.monitor
    default = {field.name: field.default for field in fields(RunConfig)}
    own = {f"run.{name}": default[name] for name in ("name", "dir", "resume")}
    own |= {f"run.{name}": getattr(base.run, name) for name in ("progress", "stop_signals")}
    record = best.best(monitor)
    assert record is not None
    lines = [
        f"The best of the search {folder}: trial {best.id}, {scored(monitor, record['val'][monitor])} "
        f"in epoch {record['epoch']}.",
        f"To repeat it: {_command(folder / 'best.yaml')}",
    ]
    return "".join(f"# {printable(line)}\n" for line in lines) + config.override(own).to_yaml()


def _is_of(best: Trial, monitor: str) -> bool:
    """Whether the trial's best.pth is of its best epoch; one that was killed may have told of an epoch before it saved.

    The trainer writes report.json after best.pth.
    """
    record = best.best(monitor)
    try:
        return record is not None and json.loads((best.folder / "report.json").read_text())["epoch"] == record["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _share(source: Path | None, target: Path) -> bool:
    """Let `target` be the same file as `source`, or a copy where there are no hard links; False: there is no source.

    The trainer replaces its files and never writes into them, so that neither name can spoil the other.
    """
    from fer_dist.engine.checkpoint import sync_folder, write_atomically

    if source is None or not source.is_file():
        target.unlink(missing_ok=True)  # an earlier report's, of another trial
        return False
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError:

        def copy(file: BufferedRandom) -> None:
            with source.open("rb") as original:
                shutil.copyfileobj(original, file)

        write_atomically(target, copy)
    finally:
        temporary.unlink(missing_ok=True)  # rename leaves it where both names are one file already
    return True


def _command(path: Path) -> str:
    return f"torchrun --standalone --nproc_per_node=1 -m fer_dist.train --config {_quoted(path)}"


def _quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
