"""The pictures of a run folder: whole PNGs at any number of epochs, that show the given numbers."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fer_dist.engine import plots
from fer_dist.spec import EXPRESSIONS


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def drawn(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each line that has a label."""
    return {str(x.get_label()): list(map(tuple, x.get_xydata())) for x in axes.get_lines() if x.get_label()[0] != "_"}


@pytest.mark.parametrize(("first", "count"), [(1, 1), (1, 2), (1, 100), (4, 5)])
def test_curves(first: int, count: int, tmp_path: Path, figures: list[Figure]) -> None:
    epochs = range(first, first + count)
    best = epochs[max(0, count - 2)]
    values = {e: {"loss": 2.2 / e, "accuracy": 0.9 if e == best else 0.5, "macro_f1": 0.4} for e in epochs}
    records = [{"epoch": e, "lr": 1e-3 / e, "train_loss": 2 / e, "val": values[e]} for e in epochs]
    plots.curves(records, tmp_path / "curves.png", "a run")
    width, height = size(tmp_path / "curves.png")
    assert width > 2 * height > 600
    loss, accuracy, rate = figures[0].axes
    assert drawn(loss) == {
        "training": [(e, 2 / e) for e in epochs],
        "validation": [(e, 2.2 / e) for e in epochs],
    }
    assert drawn(accuracy) == {
        "accuracy": [(e, 90 if e == best else 50) for e in epochs],
        "macro-F1": [(e, 40) for e in epochs],
    }
    assert drawn(rate)["head"] == [pytest.approx((e, 1 / e)) for e in epochs]
    assert accuracy.get_title() == f"validation [%]: best 90.0 in epoch {best}"
    assert all(tick == int(tick) for axes in (loss, accuracy, rate) for tick in axes.get_xticks()), "half epochs"


def test_confusion(tmp_path: Path, figures: list[Figure]) -> None:
    """It leaves no figure behind in the global state of matplotlib, as in that of a notebook."""
    before = dict(mpl.rcParams)
    counts = np.diag(np.arange(100, 800, 100)) + 10
    counts[5] = 0  # a class that does not occur
    counts[1, 2] = 33
    plots.confusion(counts, EXPRESSIONS, tmp_path / "confusion.png", "a run: validation")
    width, height = size(tmp_path / "confusion.png")
    assert 1.0 < width / height < 1.3
    axes = figures[0].axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(EXPRESSIONS)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    texts = {(round(t.get_position()[0]), round(t.get_position()[1]), t.get_text()) for t in axes.texts}
    share = f"{100 * 110 / 170:.0f}%"
    assert texts >= {(0, 0, "110"), (0, 0, share), (2, 1, "33"), (1, 2, "10"), (5, 5, "0%")}, "column, row, text"
    (image,) = axes.get_images()
    assert min(image.get_cmap()(0.0)) > 0.8, "an empty cell is light"
    assert (plt.get_fignums(), dict(mpl.rcParams)) == ([], before)
