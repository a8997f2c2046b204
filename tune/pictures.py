"""search.png: all trials of a search at a glance (an Agg canvas, no global state).

Parallel coordinates, a panel for each setting and the learning curves. The first two place values by the
same `Scale`, so that a setting looks alike in both.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from fer_dist.config import Config
from fer_dist.engine.checkpoint import write_atomically
from fer_dist.engine.plots import INK, ORANGE
from fer_dist.options import walk
from tune.ledger import Status, Trial, ranked
from tune.scale import Scale, legible
from tune.words import SCORES, scored

MOST = 12
"""So many settings are drawn."""

WIDTH, DPI = 14.5, 110
STATUS: dict[Status, tuple[str, str]] = {
    "finished": ("o", "finished"),
    "stopped": ("X", "stopped early"),
    "running": ("^", "not ended yet"),
    "failed": ("s", "failed"),
}
"""Marker and words of each status."""


def search_picture(trials: list[Trial], axes: Sequence[str], monitor: str, path: Path, title: str) -> None:
    """Draw the trials of a search as a PNG.

    Args:
        axes: dotted names of the settings that were searched; the first MOST are drawn.
        monitor: the score, see `train.monitor`.

    Raises:
        UserError: it cannot be written.
    """
    shown = ranked(trials, monitor)
    # A trial that failed is no measure of its values; the best one is shown whatever became of it later.
    shown = shown[:1] + [trial for trial in shown[1:] if trial.status != "failed"]
    drawn = list(axes)[:MOST]
    title = legible(title, 90) + (f", the first {MOST} of {len(axes)} settings" if len(axes) > MOST else "")
    if not shown:
        figure = Figure(figsize=(WIDTH, 1.2), dpi=DPI, layout="constrained")
        figure.suptitle(f"{title}: no trial has finished an epoch", color=INK, x=0.01, ha="left")
    else:
        rows = max(1, math.ceil(len(drawn) / 4))
        heights = [4.2, 2.7 * rows, 4.0]
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), dpi=DPI, layout="constrained")
        figure.suptitle(title, color=INK, x=0.01, ha="left", fontsize=14)
        parts: Any = figure.subfigures(3, 1, height_ratios=heights, hspace=0.02)
        _parallel(parts[0], shown, drawn, monitor)
        _panels(parts[1], shown, drawn, monitor, rows)
        _curves(parts[2], shown, monitor)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi="figure"))


def _name(trial: Trial) -> str:
    return f"trial {legible(trial.id, 20)}"


def _drawn(record: dict[str, Any], monitor: str) -> float:
    """The score of an epoch as it is drawn: in percent, or in nats."""
    return float(record["val"][monitor]) * (1 if monitor == "loss" else 100)


def _heading(monitor: str) -> str:
    return "validation loss [nats], lower is better" if monitor == "loss" else f"validation {SCORES[monitor]} [%]"


def _scores(shown: list[Trial], monitor: str) -> Scale:
    bests = (trial.best(monitor) for trial in shown)
    return Scale.of([_drawn(best, monitor) for best in bests if best is not None], log=monitor == "loss")


def _parallel(part: Any, shown: list[Trial], names: list[str], monitor: str) -> None:
    """One vertical axis a setting and one for the score; a line a trial."""
    axes = part.subplots()
    axes.set_axis_off()
    _title(part, f"All settings: a line is a trial, the darker the better; orange: the best, {_name(shown[0])}")
    scales = [*(Scale.of([trial.values.get(name) for trial in shown]) for name in names), _scores(shown, monitor)]
    shades = colormaps["Blues"](np.linspace(1, 0.3, len(shown)))
    for i in reversed(range(len(shown))):  # the best on top
        line = {"color": ORANGE, "linewidth": 3.2} if i == 0 else {"color": shades[i], "linewidth": 1.1, "alpha": 0.85}
        heights = [scale.places[i] for scale in scales]
        axes.plot(range(len(scales)), heights, label=shown[i].id, zorder=3 + (i == 0), **line)
    tick = 0.0014 * len(scales)
    for x, (name, scale) in enumerate(zip([*names, ""], scales, strict=True)):
        axes.plot([x, x], [0, 1], color=INK, linewidth=1, zorder=5)
        heading = _wrapped(name) if name else _heading(monitor).replace("validation ", "").replace(", ", ",\n")
        heading += "\n(log)" if scale.kind == "log" else ""
        weight = "normal" if name else "bold"
        axes.text(x, 1.05, heading, ha="center", va="bottom", color=INK, fontsize=9, weight=weight)
        for y, label in scale.ticks:
            axes.plot([x - tick, x], [y, y], color=INK, linewidth=1, zorder=5)
            box = withStroke(linewidth=3, foreground="white", alpha=0.85)
            axes.text(
                x - 1.7 * tick, y, label, ha="right", va="center", fontsize=8, color=INK, zorder=6, path_effects=[box]
            )
    axes.set_xlim(-0.25, len(scales) - 1 + 0.05)
    axes.set_ylim(-0.04, 1.04)


def _wrapped(name: str) -> str:
    """A dotted name on lines of at most 16 signs, broken behind a dot, and behind an underscore only if it must be."""
    lines = _packed(re.findall(r"[^.]+\.?", name))
    lines = [part for line in lines for part in (_packed(re.findall(r"[^_]+_?", line)) if len(line) > 16 else [line])]
    return "\n".join(legible(line, 16) for line in lines[-4:])


def _packed(pieces: list[str]) -> list[str]:
    """Pieces joined to lines of at most 16 signs."""
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1] + piece) > 16:
            lines.append("")
        lines[-1] += piece
    return lines


def _panels(part: Any, shown: list[Trial], names: list[str], monitor: str, rows: int) -> None:
    """The score against the value of each setting."""
    columns = max(1, math.ceil(len(names) / rows))
    grid = part.subplots(rows, columns, squeeze=False).flat
    _title(part, "Each setting: a point is a trial")
    meanings = {name: field.metadata["help"] for name, field in walk(Config)}
    scores = _scores(shown, monitor)
    for i, axes in enumerate(grid):
        if i >= len(names):
            axes.set_axis_off()
            continue
        scale = Scale.of([trial.values.get(names[i]) for trial in shown])
        _points(axes, shown, scale.places, scores.places)
        meaning = re.split(r"[;:\[]", meanings.get(names[i], ""))[0].strip()
        meaning = "" if meaning in ("0", "auto") else meaning  # a help text that begins with a value, not with a word
        label = legible(names[i], 40) + (" (log)" if scale.kind == "log" else "")
        axes.set_xlabel(f"{label}\n{legible(meaning, 48)}".rstrip(), color=INK, fontsize=9)
        _ticks(axes, scale.ticks, 0.8 * WIDTH / columns)
        axes.set_yticks([y for y, _ in scores.ticks], [label for _, label in scores.ticks])
        axes.set_ylim(-0.07, 1.07)
        axes.set_xlim(-0.05, 1.05)
        if i % columns == 0:
            axes.set_ylabel(_heading(monitor).replace(", ", "\n"), fontsize=9)
        _plain(axes)
    if names:
        handles, _ = grid[0].get_legend_handles_labels()
        part.legend(handles=handles, loc="upper right", ncols=5, frameon=False, fontsize=9)


def _points(axes: Any, shown: list[Trial], x: list[float], y: list[float]) -> None:
    for status, (marker, words) in STATUS.items():
        some = [i for i, trial in enumerate(shown) if trial.status == status and i > 0]
        if some:
            style = {"s": 34, "alpha": 0.6, "linewidths": 0, "color": colormaps["Blues"](0.75), "label": words}
            axes.scatter([x[i] for i in some], [y[i] for i in some], marker=marker, **style)
    marker = STATUS[shown[0].status][0]
    axes.scatter(x[:1], y[:1], marker=marker, s=80, color=ORANGE, zorder=4, label=f"the best, {_name(shown[0])}")


def _ticks(axes: Any, ticks: list[tuple[float, str]], width: float) -> None:
    """Ticks of a panel `width` inches wide, turned where their labels would touch."""
    axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
    if any((b[0] - a[0]) * width < 0.04 * (len(a[1]) + len(b[1])) + 0.1 for a, b in pairwise(ticks)):
        for label in axes.get_xticklabels():
            label.set(rotation=25, ha="right", rotation_mode="anchor")


def _curves(part: Any, shown: list[Trial], monitor: str) -> None:
    """The score of each epoch of each trial."""
    axes = part.subplots()
    axes.set_ymargin(0.14)  # for the name of the best
    for trial in reversed(shown):
        epochs = [record["epoch"] for record in trial.records]
        scores = [_drawn(record, monitor) for record in trial.records]
        ended = trial.status == "finished"
        style = {"color": colormaps["Blues"](0.75 if ended else 0.5), "linewidth": 1.6 if ended else 0.9}
        style |= {"alpha": 0.9 if len(shown) < 30 else 0.45}
        if trial is shown[0]:
            style = {"color": ORANGE, "linewidth": 3, "zorder": 4}
        axes.plot(epochs, scores, label=trial.id, marker="o" if len(epochs) == 1 else None, markersize=4, **style)
        if not ended:
            end = {"marker": STATUS[trial.status][0], "markersize": 6, "markeredgewidth": 0}
            axes.plot(epochs[-1:], scores[-1:], **{**style, **end, "alpha": 0.8})
    best = shown[0].best(monitor)
    assert best is not None
    epoch, score = best["epoch"], _drawn(best, monitor)
    axes.plot([epoch], [score], "o", markersize=11, markerfacecolor="none", markeredgecolor=ORANGE, zorder=5)
    ink = {"color": ORANGE, "weight": "bold", "path_effects": [withStroke(linewidth=3, foreground="white")]}
    away = (0, -18 if monitor == "loss" else 11)
    axes.annotate(_name(shown[0]), (epoch, score), away, textcoords="offset points", ha="center", zorder=6, **ink)
    _epochs_and_scores(axes, shown, monitor)
    legend = "thick: finished; thin, with a cross: stopped early; orange: the best"
    _title(
        part, f"Learning curves: {legend}, {_name(shown[0])}, {scored(monitor, best['val'][monitor])} in epoch {epoch}"
    )
    _plain(axes)


def _epochs_and_scores(axes: Any, shown: list[Trial], monitor: str) -> None:
    """Limits and labels of the learning curves."""
    epochs = [record["epoch"] for trial in shown for record in trial.records]
    scores = [_drawn(record, monitor) for trial in shown for record in trial.records]
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel(_heading(monitor))
    if monitor == "loss" and 0 < 20 * min(scores) < max(scores):
        axes.set_yscale("log")


def _plain(axes: Any) -> None:
    axes.grid(color="#e1e4e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _title(part: Any, text: str) -> None:
    part.suptitle(text, color=INK, x=0.01, ha="left", fontsize=11)
