"""The pictures of a run folder: whole PNGs at any number of epochs, that show what they are given."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fer_dist.engine import plots
from fer_dist.spec import EXPRESSIONS


def records(count: int) -> list[dict[str, Any]]:
    """A made-up run: accuracy is highest in the epoch before the last."""
    return [
        {
            "epoch": epoch,
            "lr": 1e-3 / epoch,
            "train_loss": 2 / epoch,
            "val": {"loss": 2.2 / epoch, "accuracy": 0.9 if epoch == max(1, count - 1) else 0.5, "macro_f1": 0.4},
        }
        for epoch in range(1, count + 1)
    ]


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.convert("RGB")


def drawn(axes: Any, axis: str = "y") -> dict[str, list[float]]:
    """Return the values of each line that has a label."""
    lines = {line.get_label(): getattr(line, f"get_{axis}data")() for line in axes.get_lines()}
    return {label: [float(value) for value in data] for label, data in lines.items() if not label.startswith("_")}


@pytest.mark.parametrize("count", [1, 2, 100])
def test_curves(count: int, tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "curves.png"
    plots.curves(records(count), path, "a run")
    shown = picture(path)
    assert shown.width > 2 * shown.height > 600
    loss, accuracy, rate = figures[0].axes
    one, two, more = ([times / epoch for epoch in range(1, count + 1)] for times in (1, 2, 2.2))
    assert drawn(loss) == {"training": pytest.approx(two), "validation": pytest.approx(more)}
    accuracies = [100 * record["val"]["accuracy"] for record in records(count)]
    assert drawn(accuracy) == {"accuracy": pytest.approx(accuracies), "macro-F1": pytest.approx([40] * count)}
    assert drawn(rate) == {"head": pytest.approx(one)}
    assert accuracy.get_title() == f"validation [%]: best 90.0 in epoch {max(1, count - 1)}"
    assert all(tick == int(tick) for axes in (loss, accuracy, rate) for tick in axes.get_xticks()), "half epochs"
    plots.curves(records(count + 5)[count:], path, "a run")
    picture(path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"], "replaced whole"
    assert drawn(figures[1].axes[0], "x")["training"] == list(range(count + 1, count + 6)), "of a resumed run"


def test_confusion(tmp_path: Path, figures: list[Figure]) -> None:
    counts = np.diag(np.arange(100, 800, 100)) + 10
    counts[5] = 0  # a class that does not occur
    counts[1, 2] = 33
    path = tmp_path / "confusion.png"
    plots.confusion(counts, EXPRESSIONS, path, "a run: validation")
    shown = picture(path)
    assert 1.0 < shown.width / shown.height < 1.3
    axes = figures[0].axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(EXPRESSIONS)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    texts = {(round(t.get_position()[0]), round(t.get_position()[1]), t.get_text()) for t in axes.texts}
    share = f"{100 * 110 / 170:.0f}%"
    assert texts >= {(0, 0, "110"), (0, 0, share), (2, 1, "33"), (1, 2, "10"), (5, 5, "0%")}, "column, row, text"
    red, green, blue = shown.getpixel((int(shown.width * 0.6), int(shown.height * 0.1)))  # type: ignore[misc]
    assert min(red, green, blue) > 200, "an empty cell is light"


def test_no_global_state_of_matplotlib(tmp_path: Path) -> None:
    """A notebook keeps its own figures, and hundreds of epochs leave none behind."""
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    plots.curves(records(3), tmp_path / "curves.png", "a run")
    plots.confusion(np.eye(3, dtype=np.int64), ("a", "b", "c"), tmp_path / "confusion.png", "a run")
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before
