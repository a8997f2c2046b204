"""search.png: drawn without a warning for any search, with the values of its trials."""

import random
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
import matplotlib.text
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from PIL import Image

from fer_dist.engine.plots import ORANGE
from fer_dist.errors import UserError
from tests.helpers.search_folders import epochs
from tune.ledger import Status, Trial
from tune.pictures import search_picture
from tune.scale import Scale, legible
from tune.words import scored, spelt

MANY = [f"model.options.a_rather_long_name_of_a_setting_{i}" for i in range(13)]
AXES = ["optim.lr", "optim.name"]


def trial(number: int, lr: float, optimizer: str, scores: list[float], status: Status = "finished") -> Trial:
    values = {"optim.lr": lr, "optim.name": optimizer}
    return Trial(id=f"{number:03d}", folder=Path(), values=values, status=status, records=epochs(*scores))


def trials(count: int, axes: list[str]) -> list[Trial]:
    """Return trials with random values: fractions, whole numbers, texts, numbers or none, and booleans in turn."""
    source = random.Random(0)
    rates = [10 ** source.uniform(-5, -1) for _ in range(50)]
    texts = ["adam", "a very long name of something, longer than any", "数据 $x_{", "tab\tand\nline"]
    pools: list[list[Any]] = [rates, [*range(10)], texts, [None, 8, 16], [True, False]]
    found = []
    for number in range(1, count + 1):
        values = {name: source.choice(pools[i % len(pools)]) for i, name in enumerate(axes)}
        records = epochs(*[source.uniform(0.3, 0.9) for _ in range(source.randint(1, 8))])
        status = source.choice(get_args(Status))
        found.append(Trial(id=f"{number:03d}", folder=Path(), values=values, status=status, records=records))
    return found


def texts(figure: Any) -> str:
    """Return all texts of a figure, one a line."""
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def lines(axes: Any) -> dict[str, Any]:
    """Return the lines of the axes by their labels."""
    return {line.get_label(): line for line in axes.get_lines()}


THREE = [
    trial(1, 1e-4, "sgd", [0.2, 0.4], "stopped"),
    trial(2, 1e-2, "adam", [0.3, 0.9, 0.8]),
    trial(3, 1e-3, "sgd", [0.475, 0.5, 0.65]),
    trial(4, 1e-1, "adam", [0.1, 0.1], "failed"),
    trial(5, 1e-1, "adam", [], "failed"),
]


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The picture of THREE; drawing it leaves the global state of matplotlib alone."""
    import matplotlib.pyplot as plt

    saved: list[Figure] = []
    save, before = Figure.savefig, dict(mpl.rcParams)

    def keep(figure: Figure, *arguments: Any, **keywords: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        search_picture(THREE, AXES, "accuracy", tmp_path_factory.mktemp("three") / "search.png", "a search")
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before
    return saved[0]


@pytest.mark.parametrize(
    ("count", "number", "monitor"),
    [(0, 3, "accuracy"), (1, 13, "loss"), (1, 1, "accuracy"), (3, 3, "macro_f1"), (60, 6, "loss")],
)
def test_any_search_is_drawn(count: int, number: int, monitor: str, tmp_path: Path) -> None:
    """Warnings are errors: a glyph that the font lacks, invalid mathtext, a limit that is not finite."""
    path, axes = tmp_path / "search.png", MANY[:number]
    search_picture(trials(count, axes), axes, monitor, path, "runs of $mine_{ 数据")
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert 1580 <= image.width <= 1620
        assert image.height > 1000 or count == 0
    assert [file.name for file in tmp_path.iterdir()] == ["search.png"]


@pytest.mark.parametrize(("monitor", "axes"), [("accuracy", AXES), ("loss", AXES), ("macro_f1", [])])
def test_equal_trials_are_drawn(monitor: str, axes: list[str], tmp_path: Path) -> None:
    same = [trial(number, 0.1, "sgd", [0.5]) for number in range(1, 6)]
    search_picture(same, axes, monitor, tmp_path / "search.png", "a search")


def test_parallel_coordinates(figure: Any) -> None:
    axes = figure.axes[0]
    drawn = {label: line for label, line in lines(axes).items() if not label.startswith("_")}
    assert sorted(drawn) == ["001", "002", "003"], "failed trials are left out"
    assert list(drawn["001"].get_ydata()) == pytest.approx([0, 0.75, 0]), "the lowest rate, sgd, the lowest score"
    assert list(drawn["002"].get_ydata()) == pytest.approx([1, 0.25, 1])
    assert list(drawn["003"].get_ydata()) == pytest.approx([0.5, 0.75, 0.5]), "0.001 is half way on a log scale"
    best = drawn["002"]
    assert same_color(best.get_color(), ORANGE)
    for other in (drawn["001"], drawn["003"]):
        assert best.get_zorder() > other.get_zorder()
        assert best.get_linewidth() > 2 * other.get_linewidth()
    dark = {name: sum(drawn[name].get_color()[:3]) for name in ("001", "003")}
    assert dark["003"] < dark["001"], "the better, the darker"
    labels = [text.get_text() for text in axes.texts]
    for word in ("optim.lr\n(log)", "optim.name", "accuracy [%]", "adam", "sgd", "0.0001", "0.001", "0.01", "90"):
        assert word in labels
    assert "trial 002" in texts(figure)


def test_panels(figure: Any) -> None:
    lr, name = figure.axes[1:3]
    assert lr.get_xlabel() == "optim.lr (log)\nlearning rate of the head"
    assert name.get_xlabel() == "optim.name\noptimizer"
    assert [label.get_text() for label in name.get_xticklabels()] == ["adam", "sgd"]
    assert {group.get_label(): [tuple(point) for point in group.get_offsets()] for group in lr.collections} == {
        "finished": [pytest.approx((0.5, 0.5))],
        "stopped early": [pytest.approx((0, 0))],
        "the best, trial 002": [pytest.approx((1, 1))],
    }
    legend = [text.get_text() for part in figure.subfigs for box in part.legends for text in box.get_texts()]
    assert legend == ["finished", "stopped early", "the best, trial 002"]


def test_learning_curves(figure: Any) -> None:
    axes = figure.axes[-1]
    drawn = lines(axes)
    assert list(drawn["003"].get_ydata()) == pytest.approx([47.5, 50, 65])
    assert list(drawn["001"].get_xdata()) == [1, 2]
    widths = [drawn[name].get_linewidth() for name in ("001", "003", "002")]
    assert widths == sorted(set(widths)), "stopped: thin, finished: thicker, the best: thickest"
    ends = [line for line in axes.get_lines() if line.get_marker() == "X"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in ends] == [([2], [pytest.approx(40)])]
    assert "004" not in drawn
    assert [text.get_text() for text in axes.texts] == ["trial 002"]
    assert axes.texts[0].xy == (2, pytest.approx(90))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation accuracy [%]")
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert "accuracy 90.00% in epoch 2" in texts(figure)


@pytest.mark.parametrize(("monitor", "best", "unit"), [("macro_f1", "006", "%"), ("loss", "001", "nats")])
def test_the_best_is_that_of_the_monitor(
    monitor: str, best: str, unit: str, tmp_path: Path, figures: list[Figure]
) -> None:
    """A trial that failed later may be the best."""
    late = trial(6, 1e-3, "sgd", [0.99], "failed")
    search_picture([*THREE, late], AXES, monitor, tmp_path / "search.png", "a search")
    first, *panels, curves = figures[0].axes
    assert [label for label, line in lines(first).items() if same_color(line.get_color(), ORANGE)] == [best]
    assert lines(curves)[best].get_linewidth() > 2
    assert all(unit in axes.get_ylabel() for axes in (panels[0], curves))


def test_many_settings(tmp_path: Path, figures: list[Figure]) -> None:
    """Twelve panels, four in a row; no label is cut off and no names overlap."""
    for number, panels in ((5, 5), (13, 12)):
        axes = MANY[:number]
        search_picture(trials(7, axes), axes, "loss", tmp_path / "search.png", "a search " * 30)
        figure: Any = figures[-1]
        labelled = [one for one in figure.axes[1:-1] if one.get_xlabel()]
        assert len(labelled) == panels
        assert ("the first 12 of 13 settings" in texts(figure)) == (number > panels)
        assert len({round(one.get_position().y0, 2) for one in labelled}) == -(-panels // 4)
    box = figure.get_tightbbox()  # [inches]
    width, height = figure.get_size_inches()
    assert -0.02 < box.x0 < box.x1 < width + 0.02
    assert -0.02 < box.y0 < box.y1 < height + 0.02
    heads = [text.get_window_extent() for text in figure.axes[0].texts if text.get_va() == "bottom"]
    assert len(heads) == 13
    assert not any(a.overlaps(b) for i, a in enumerate(heads) for b in heads[:i])


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        search_picture([], AXES, "accuracy", tmp_path / "missing" / "search.png", "a search")


@pytest.mark.parametrize(
    ("values", "kind", "places"),
    [
        ([1e-4, 1e-2, 1e-3], "log", [0, 1, 0.5]),
        ([1, 20], "linear", [0, 1]),
        ([1, 20.5], "log", [0, 1]),
        ([0, 50, 100], "linear", [0, 0.5, 1]),
        ([-1, 1000], "linear", [0, 1]),
        ([3, 3], "linear", [0.5, 0.5]),
        (["b", "a", "b"], "category", [0.75, 0.25, 0.75]),
        ([16, None, 8], "category", [5 / 6, 1 / 6, 0.5]),
        ([True, False], "category", [0.75, 0.25]),
        ([[2, 1], [1]], "category", [0.75, 0.25]),
    ],
)
def test_scale(values: list[Any], kind: str, places: list[float]) -> None:
    scale = Scale.of(values)
    assert scale.places == pytest.approx(places)
    assert scale.kind == kind
    assert all(0 <= place <= 1 for place, _ in scale.ticks)
    assert kind != "log" or Scale.of(values, log=False).kind == "linear"


@pytest.mark.parametrize(
    "values",
    [
        [0.9, 0.9000001, 0.90000005],
        [i / 7 for i in range(40)],
        [10.0**-i for i in range(30)],
        [1e-300, 1e300],
        list(range(100)),
        [2**31 - 1, 0],
        [5.0, 5.000000000000001],
        [f"name {i}" for i in range(95)],
    ],
)
def test_ticks_are_few_sorted_and_different(values: list[Any]) -> None:
    scale = Scale.of(values)
    assert 1 <= len(scale.ticks) <= (10 if scale.kind == "category" else 7)
    assert [place for place, _ in scale.ticks] == sorted({place for place, _ in scale.ticks})
    assert len({label for _, label in scale.ticks}) == len(scale.ticks)
    assert len(set(scale.places)) == len(set(values))


def test_values_as_text() -> None:
    assert [spelt(value) for value in (None, True, 1e-5, 0.00031416, 3, "x", 1e20, 2e-10)] == [
        "none", "true", "1e-5", "0.0003142", "3", "x", "1e20", "2e-10",
    ]  # fmt: skip
    assert scored("accuracy", 0.93214) == "accuracy 93.21%"
    assert scored("macro_f1", 0.5) == "macro-F1 50.00%"
    assert scored("loss", 0.23104) == "loss 0.2310"
    assert legible("abc\n$x 数", 20) == r"abc?\$x ?"
    assert legible("0123456789", 5) == "01…89"
