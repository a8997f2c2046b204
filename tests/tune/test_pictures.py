"""search.png: drawn without a warning whatever was searched, and showing what it is given."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.text
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from PIL import Image

from fer_dist.engine.plots import ORANGE
from fer_dist.errors import UserError
from tune.ledger import Status, Trial
from tune.pictures import search_picture
from tune.scale import Scale, legible
from tune.words import scored, spelt

MANY = [f"model.options.a_rather_long_name_of_a_setting_{i}" for i in range(13)]


def trial(number: int, values: dict[str, Any], scores: list[float], status: Status = "finished") -> Trial:
    records = [
        {"epoch": epoch, "val": {"accuracy": score, "macro_f1": score / 2, "loss": 2 - score}}
        for epoch, score in enumerate(scores, 1)
    ]
    return Trial(id=f"{number:03d}", folder=Path(), values=values, status=status, records=records)


def trials(count: int, axes: list[str]) -> list[Trial]:
    """The settings take turns in being fractions, whole numbers, texts, and numbers or none."""
    source = random.Random(0)
    draw: list[Callable[[], Any]] = [
        lambda: 10 ** source.uniform(-5, -1),
        lambda: source.randint(0, 9),
        lambda: source.choice(
            ["adam", "a very long name of something, longer than any", "数据 $x_{", "tab\tand\nline"]
        ),
        lambda: source.choice([None, 8, 16]),
        lambda: source.choice([True, False]),
    ]
    found = []
    for number in range(1, count + 1):
        values = {name: draw[i % len(draw)]() for i, name in enumerate(axes)}
        scores = [source.uniform(0.3, 0.9) for _ in range(source.randint(1, 8))]
        status: Status = source.choice(["finished", "stopped", "failed", "running"])
        found.append(trial(number, values, scores, status))
    return found


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def texts(figure: Any) -> list[str]:
    """Every text of a picture."""
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def lines(axes: Any) -> dict[str, Any]:
    """Label -> line."""
    return {line.get_label(): line for line in axes.get_lines()}


THREE = [
    trial(1, {"optim.lr": 1e-4, "optim.name": "sgd"}, [0.2, 0.4], "stopped"),
    trial(2, {"optim.lr": 1e-2, "optim.name": "adam"}, [0.3, 0.9, 0.8]),
    trial(3, {"optim.lr": 1e-3, "optim.name": "sgd"}, [0.95 / 2, 0.5, 0.65]),
    trial(4, {"optim.lr": 1e-1, "optim.name": "adam"}, [0.1, 0.1], "failed"),
    trial(5, {"optim.lr": 1e-1, "optim.name": "adam"}, [], "failed"),
]
AXES = ["optim.lr", "optim.name"]


@pytest.mark.parametrize("count", [0, 1, 3, 200])
@pytest.mark.parametrize("number", [1, 3, 13])
@pytest.mark.parametrize("monitor", ["accuracy", "loss"])
def test_any_search_is_drawn(count: int, number: int, monitor: str, tmp_path: Path) -> None:
    """Warnings are errors: a sign that the font lacks, a formula that is none, a limit that is no number."""
    path = tmp_path / "search.png"
    axes = MANY[:number]
    search_picture(trials(count, axes), axes, monitor, path, "runs of $mine_{ 数据")
    width, height = size(path)
    assert 1580 <= width <= 1620
    assert height > 1000 or count == 0
    assert [file.name for file in tmp_path.iterdir()] == ["search.png"]


@pytest.mark.parametrize("monitor", ["accuracy", "macro_f1", "loss"])
def test_all_alike(monitor: str, tmp_path: Path) -> None:
    same = [trial(number, {"optim.lr": 0.1, "optim.name": "sgd"}, [0.5]) for number in range(1, 6)]
    search_picture(same, AXES, monitor, tmp_path / "search.png", "a search")
    search_picture(same, [], monitor, tmp_path / "search.png", "a search of nothing")


def test_parallel_coordinates(tmp_path: Path, figures: list[Figure]) -> None:
    search_picture(THREE, AXES, "accuracy", tmp_path / "search.png", "a search")
    axes = figures[0].axes[0]
    drawn = {label: line for label, line in lines(axes).items() if not label.startswith("_")}
    assert sorted(drawn) == ["001", "002", "003"], "failed ones are left out"
    assert list(drawn["001"].get_ydata()) == pytest.approx([0, 0.75, 0]), "the least rate, sgd, the lowest score"
    assert list(drawn["002"].get_ydata()) == pytest.approx([1, 0.25, 1])
    assert list(drawn["003"].get_ydata()) == pytest.approx([0.5, 0.75, 0.5]), "0.001 is half way on a log scale"
    best = drawn["002"]
    assert same_color(best.get_color(), ORANGE)
    others = [drawn["001"], drawn["003"]]
    assert all(best.get_zorder() > line.get_zorder() for line in others)
    assert all(best.get_linewidth() > 2 * line.get_linewidth() for line in others)
    dark = {name: sum(drawn[name].get_color()[:3]) for name in ("001", "003")}
    assert dark["003"] < dark["001"], "the better, the darker"
    labels = [text.get_text() for text in axes.texts]
    for word in ("optim.lr\n(log)", "optim.name", "accuracy [%]", "adam", "sgd", "0.0001", "0.001", "0.01", "90"):
        assert word in labels
    assert any("trial 002" in text for text in texts(figures[0]))


@pytest.mark.parametrize(("monitor", "best"), [("accuracy", "002"), ("macro_f1", "002"), ("loss", "002")])
def test_the_best_is_that_of_the_monitored_score(
    monitor: str, best: str, tmp_path: Path, figures: list[Figure]
) -> None:
    search_picture(THREE, AXES, monitor, tmp_path / "search.png", "a search")
    orange = [label for label, line in lines(figures[0].axes[0]).items() if same_color(line.get_color(), ORANGE)]
    assert orange == [best]
    assert [label for label, line in lines(figures[0].axes[-1]).items() if label == best and line.get_linewidth() > 2]
    unit = "nats" if monitor == "loss" else "%"
    assert all(unit in axes.get_ylabel() for axes in (figures[0].axes[1], figures[0].axes[-1]))


def test_a_best_trial_that_failed_later_is_shown(tmp_path: Path, figures: list[Figure]) -> None:
    late = trial(9, {"optim.lr": 1e-3, "optim.name": "sgd"}, [0.99], "failed")
    search_picture([*THREE, late], AXES, "accuracy", tmp_path / "search.png", "a search")
    assert same_color(lines(figures[0].axes[0])["009"].get_color(), ORANGE)


def test_panels(tmp_path: Path, figures: list[Figure]) -> None:
    search_picture(THREE, AXES, "accuracy", tmp_path / "search.png", "a search")
    lr: Any
    name: Any
    lr, name = figures[0].axes[1:3]
    assert lr.get_xlabel() == "optim.lr (log)\nlearning rate of the head"
    assert name.get_xlabel() == "optim.name\noptimizer"
    assert [label.get_text() for label in name.get_xticklabels()] == ["adam", "sgd"]
    points = {
        str(group.get_label()): [tuple(point) for point in group.get_offsets().tolist()] for group in lr.collections
    }
    assert points == {
        "finished": [pytest.approx((0.5, 0.5))],
        "stopped early": [pytest.approx((0, 0))],
        "the best, trial 002": [pytest.approx((1, 1))],
    }
    legend = [text.get_text() for part in figures[0].subfigs for box in part.legends for text in box.get_texts()]
    assert legend == ["finished", "stopped early", "the best, trial 002"]


@pytest.mark.parametrize(("number", "panels"), [(1, 1), (4, 4), (5, 5), (12, 12), (13, 12)])
def test_as_many_panels_as_settings(number: int, panels: int, tmp_path: Path, figures: list[Figure]) -> None:
    axes = MANY[:number]
    search_picture(trials(7, axes), axes, "accuracy", tmp_path / "search.png", "a search")
    labelled = [one for one in figures[0].axes[1:-1] if one.get_xlabel()]
    assert len(labelled) == panels
    assert ("the first 12 of 13 settings" in " ".join(texts(figures[0]))) == (number > panels)
    assert len({round(one.get_position().y0, 2) for one in labelled}) == -(-panels // 4), "four in a row"


def test_learning_curves(tmp_path: Path, figures: list[Figure]) -> None:
    search_picture(THREE, AXES, "accuracy", tmp_path / "search.png", "a search")
    axes: Any = figures[0].axes[-1]
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
    assert any("accuracy 90.00% in epoch 2" in text for text in texts(figures[0]))


def test_no_label_is_cut_off_and_no_names_touch(tmp_path: Path, figures: list[Figure]) -> None:
    search_picture(trials(40, MANY), MANY, "loss", tmp_path / "search.png", "a search " * 30)
    figure: Any = figures[0]
    top: Any = figure.axes[0]
    box = figure.get_tightbbox()  # [inches]
    width, height = figure.get_size_inches()
    assert -0.02 < box.x0 < box.x1 < width + 0.02
    assert -0.02 < box.y0 < box.y1 < height + 0.02
    heads = [text.get_window_extent() for text in top.texts if text.get_va() == "bottom"]
    assert len(heads) == 13
    assert not any(a.overlaps(b) for i, a in enumerate(heads) for b in heads[:i])


def test_the_old_picture_stays_where_a_new_one_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        search_picture(THREE, AXES, "accuracy", tmp_path / "missing" / "search.png", "a search")


def test_no_global_state_of_matplotlib(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    search_picture(THREE, AXES, "accuracy", tmp_path / "search.png", "a search")
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before


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


def test_a_score_has_no_log_scale_but_a_loss() -> None:
    assert Scale.of([4.0, 90.0], log=False).kind == "linear"


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
    ],
)
def test_ticks_are_few_in_order_and_different(values: list[float]) -> None:
    ticks = Scale.of(values).ticks
    assert 1 <= len(ticks) <= 7
    assert [place for place, _ in ticks] == sorted({place for place, _ in ticks})
    assert len({label for _, label in ticks}) == len(ticks)


def test_many_categories_have_few_labels() -> None:
    scale = Scale.of([f"name {i}" for i in range(95)])
    assert len(set(scale.places)) == 95
    assert len(scale.ticks) <= 10


def test_values_in_words() -> None:
    assert [spelt(value) for value in (None, True, 1e-5, 0.00031416, 3, "x", 1e20, 2e-10)] == [
        "none", "true", "1e-5", "0.0003142", "3", "x", "1e20", "2e-10",
    ]  # fmt: skip
    assert scored("accuracy", 0.93214) == "accuracy 93.21%"
    assert scored("macro_f1", 0.5) == "macro-F1 50.00%"
    assert scored("loss", 0.23104) == "loss 0.2310"
    assert legible("abc\n$x 数", 20) == r"abc?\$x ?"
    assert legible("0123456789", 5) == "01…89"
