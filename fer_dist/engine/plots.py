"""The pictures of runs and reports: curves, confusion matrix, reliability (Agg canvases, no global state)."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fer_dist.engine.calibration import Calibration
from fer_dist.engine.checkpoint import write_atomically

INK, BLUE, ORANGE = "#1b1f24", "#1f6feb", "#d9730d"


def curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, accuracy and learning rate over the epochs, as a PNG."""
    figure = curves_figure(records)
    figure.suptitle(title, color=INK, x=0.01, ha="left")
    _save(figure, path)


def curves_figure(records: list[dict[str, Any]]) -> Figure:
    """The same without a title, to be shown elsewhere; see `png`."""
    epochs = [record["epoch"] for record in records]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    _line(loss, epochs, [record["train_loss"] for record in records], "training", ORANGE)
    _line(loss, epochs, [record["val"]["loss"] for record in records], "validation", BLUE)
    loss.set_title("loss [nats]")
    _line(accuracy, epochs, [100 * record["val"]["accuracy"] for record in records], "accuracy", BLUE)
    _line(accuracy, epochs, [100 * record["val"]["macro_f1"] for record in records], "macro-F1", ORANGE)
    best = max(records, key=lambda record: record["val"]["accuracy"])
    score = 100 * best["val"]["accuracy"]
    accuracy.plot([best["epoch"]], [score], "o", markersize=9, markerfacecolor="none", markeredgecolor=BLUE)
    accuracy.set_title(f"validation [%]: best {score:.1f} in epoch {best['epoch']}")
    _line(rate, epochs, [1000 * record["lr"] for record in records], "head", BLUE)
    rate.set_title("learning rate at the end [1/1000]")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.grid(color="#e1e4e8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    loss.legend(frameon=False)
    accuracy.legend(frameon=False, loc="lower right")
    return figure


def reliability_figure(found: Calibration) -> Figure:
    """How often answers are right, by how sure they are, and how many are how sure."""
    bins = len(found.count_B)
    centre_B = (np.arange(bins) + 0.5) / bins
    there_B = found.count_B > 0
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    right, many = figure.subplots(1, 2)
    width = 0.92 / bins
    right.bar(centre_B[there_B], found.accuracy_B[there_B], width, color=BLUE, label="accuracy")
    right.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="as sure as right")
    right.plot(found.confidence_B[there_B], found.accuracy_B[there_B], "o", color=ORANGE, markersize=4, label="bins")
    right.set_ylim(0, 1)
    right.set_title(f"share that is right; expected calibration error {100 * found.ece:.1f}%", loc="left", fontsize=10)
    right.legend(frameon=False, loc="upper left")
    many.bar(centre_B, found.count_B, width, color=BLUE)
    many.set_title("pictures", loc="left", fontsize=10)
    for axes in (right, many):
        axes.set_xlabel("confidence: probability of the answer")
        axes.set_xlim(0, 1)
        axes.grid(axis="y", color="#e1e4e8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=110)
    return memory.getvalue()


def confusion(confusion_KK: NDArray[np.int64], names: tuple[str, ...], path: Path, title: str) -> None:
    """The confusion matrix as a PNG: counts, shaded by the share of the true class."""
    share_KK = confusion_KK / np.maximum(1, confusion_KK.sum(1, keepdims=True))
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion_KK):
        ink = "white" if share_KK[i, j] > 0.55 else INK
        axes.text(j, i - 0.1, f"{100 * share_KK[i, j]:.0f}%", ha="center", va="center", color=ink, fontsize=10)
        axes.text(j, i + 0.22, str(count), ha="center", va="center", color=ink, fontsize=7, alpha=0.8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    _save(figure, path)


def _line(axes: Any, x: list[int], y: list[float], label: str, colour: str) -> None:
    axes.plot(x, y, label=label, color=colour, linewidth=1.8, marker="o" if len(x) < 30 else None, markersize=3.5)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
