"""Settings: defaults, overrides of every type, bounds, names, YAML in and out."""

import dataclasses
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest

from fer_dist.config import Config, ModelConfig, load_config
from fer_dist.errors import UserError
from fer_dist.options import Section, option, recipes, section, walk


@dataclass(frozen=True, kw_only=True)
class Inner(Section):
    rate: float = option(0.5, "rate [fraction]", low=0, high=1)
    kind: Literal["round", "square"] = option("round", "shape")


@dataclass(frozen=True, kw_only=True)
class Outer(Section):
    """One field of every type that settings have."""

    count: int = option(3, "how many", low=1, high=10)
    ratio: float = option(1.0, "ratio", above=0)
    name: str | None = option(None, "its name")
    place: str = option("here", "where")
    limit: int | None = option(None, "at most", low=1)
    fast: bool = option(False, "hurry")
    extra: dict[str, Any] = option(dict, "anything")
    inner: Inner = section(Inner)


def test_every_option_says_what_it_means_and_numbers_their_unit() -> None:
    """In brackets, at the end; these few have none."""
    pure = {"seed", "data.embedded_seed", "data.augment.mixup", "data.augment.cutmix"}
    pure |= {"optim.lr", "optim.weight_decay", "optim.momentum", "train.ema"}
    helps = {name: f.metadata["help"] for name, f in walk(Config)}
    assert {name for name, text in helps.items() if len(text) <= 8} == set()
    numbers = {name for name, f in walk(Config) if f.type in (int, float, int | None, float | None)}
    assert {name for name in numbers if not helps[name].endswith("]")} == pure


def test_yaml_out_and_in_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    options = {"a": {"b": [1, 2.5, "x"]}, "empty": {}, "dotted.key": "1", "none": None, "word": "true"}
    odd = Config().override({"model.options": options, "run.name": "2026", "data.path": "ä # b: c"})
    assert odd.model.options == options
    for config in (odd, *map(load_config, recipes())):
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(str(path)) == config
    for text in ("", "# nothing yet\n", "optim:\n", "data:\n  augment:\n"):
        path.write_text(text, encoding="utf-8")
        assert load_config(str(path)) == Config()


def test_override_converts() -> None:
    before = Outer(name="before", limit=9)
    conversions: dict[str, list[tuple[Any, Any]]] = {
        "count": [("7", 7), (7.0, 7), ("1e1", 10), (numpy.int64(4), 4)],
        "ratio": [("3e-4", 3e-4), (2, 2.0), (numpy.float32(0.5), 0.5)],
        "name": [("x", "x"), (Path("a/b"), "a/b"), ("none", None), (None, None)],
        "place": [("none", "none")],
        "limit": [("4", 4), ("None", None)],
        "fast": [("true", True), ("False", False), (True, True), (numpy.True_, True)],
        "inner.rate": [("1", {"rate": 1.0, "kind": "round"})],
        "inner.kind": [("square", {"rate": 0.5, "kind": "square"})],
        "inner": [({"kind": "square"}, {"rate": 0.5, "kind": "square"}), (None, {"rate": 0.5, "kind": "round"})],
        "extra": [("{a: 1}", {"a": 1}), ({"a": (1, 2)}, {"a": [1, 2]})],
        "extra.a": [
            *(("3e-4", {"a": 3e-4}), ("64", {"a": 64}), ("[1, 2]", {"a": [1, 2]}), ("true", {"a": True})),
            *(("text: : x", {"a": "text: : x"}), ("2026-01-02", {"a": "2026-01-02"})),
            (numpy.int32(8), {"a": 8}),
        ],
        "extra.a.b": [("1", {"a": {"b": 1}})],
    }
    for name, pairs in conversions.items():
        for value, wanted in pairs:
            expected = before.to_dict() | {name.partition(".")[0]: wanted}
            found = before.override({name: value})
            # 7, 7.0 and numpy's 7 are equal, but not the same
            assert repr(found.to_dict()) == repr(expected), (name, value)


def test_override_makes_a_copy_and_the_last_wins() -> None:
    before = Outer()
    after = before.override({"extra.a": 1, "inner.rate": 0.1, "extra.b": 2}).override({"inner.rate": 0.2})
    assert before == Outer()
    assert (after.extra, after.inner.rate) == ({"a": 1, "b": 2}, 0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.count = 4  # type: ignore[misc]


def test_override_refuses() -> None:
    refusals: dict[str, list[tuple[Any, str]]] = {
        "count": [
            ("3.5", "count is '3.5', expected a whole number"),
            *((value, "expected a whole number") for value in (True, "many", "1e400")),
            ("0", "count is 0, expected >= 1 and <= 10"),
            (11, "expected >= 1 and <= 10"),
        ],
        "limit": [("0", "expected >= 1")],
        "ratio": [
            *(("0", "ratio is 0.0, expected > 0"), ("nan", "ratio is nan"), ("inf", "ratio is inf")),
            *(([1], "expected a number"), ("", "ratio is '', expected a number")),
        ],
        "inner.rate": [("-0.1", "inner.rate is -0.1, expected >= 0 and <= 1")],
        "inner.kind": [("sqare", "expected one of round, square\n  -> inner.kind square")],
        "fast": [("yes", "fast is 'yes', expected true or false"), (1, "expected true or false")],
        "name": [("", "name is '', expected a text"), (5, "expected a text")],
        "place": [(None, "place is None, expected a text")],
        "extra": [("3", "expected a mapping")],
        "inner": [
            ("3", "inner is a section, not a value\n  -> name one of its fields: inner.rate, inner.kind"),
            ({"rate": 7}, "inner.rate is 7.0"),
        ],
        **{name: [("3", f"unknown setting {name!r}")] for name in ("inner.", "extra.", "count.x", "")},
    }
    for name, pairs in refusals.items():
        for value, message in pairs:
            with pytest.raises(UserError) as caught:
                Outer().override({name: value})
            assert message in str(caught.value)
            assert caught.value.fix


def test_a_number_that_no_float_can_hold_is_refused() -> None:
    for name in ("count", "ratio", "limit", "extra", "extra.n", "inner.rate"):
        for number in (10**400, -(10**5000)):  # Python itself prints 4300 digits
            with pytest.raises(UserError, match=rf"^{name}: a number is too large\n  -> write a smaller one"):
                Outer().override({name: {"a": [number]} if name == "extra" else number})


def test_every_bound_is_kept() -> None:
    """Each bound itself is allowed, and what lies beyond is refused."""
    for name, f in walk(Config):
        for key, beyond in (("low", -1), ("above", 0), ("high", 1)):
            if (bound := f.metadata[key]) is None:
                continue
            if key != "above":
                assert attrgetter(name)(Config().override({name: bound})) == bound
            with pytest.raises(UserError, match=name):
                Config().override({name: bound + beyond})


def test_the_nearest_name_is_shown() -> None:
    nearest = {
        "optim.lr": ("optim.lrr", "lr", "model.lr", "optim.learning_rate", "learning-rate"),
        "train.global_batch": ("batch_size", "train.global-batch"),
        "train.epochs": ("num_epochs",),
        "train.patience": ("early_stopping",),
        "data.augment.flip": ("augment.flip",),
        "data.augment.rotation": ("data.augment.rotate",),
        "optim.name": ("optimizer",),
        "model.freeze_depth": ("freeze",),
        "run.dir": ("output_dir",),
    }
    for meant, words in nearest.items():
        for typed in words:
            with pytest.raises(UserError) as caught:
                Config().override({typed: 1})
            assert str(caught.value) == f"unknown setting {typed!r}\n  -> did you mean {meant!r}? --help lists all"
    with pytest.raises(UserError, match="did you mean 'freeze_depth'"):  # of a section alone
        ModelConfig().override({"freeze_dept": 1})


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, problem in (
        (b"optim: {lr: [}", "is not YAML: while parsing"),
        (b"\xff\xfe\x00lr", "is not YAML"),
        (b"- a\n- b\n", "holds a list, expected a mapping"),
        (b"optim:\n  lrr: 1\n", "unknown setting 'optim.lrr'"),
        (b"optim: 3\n", "optim is a section, not a value"),
        (b"optim:\n  lr: fast\n", "optim.lr is 'fast', expected a number"),
        (b"on: 1\n", "unknown setting 'True'"),
        (b"run: {name: 2026}\n", "run.name is 2026, expected a text"),
    ):
        path.write_bytes(text)
        with pytest.raises(UserError) as caught:
            load_config(str(path))
        assert str(path) in caught.value.problem
        assert problem in caught.value.problem


def test_an_unknown_recipe_shows_the_known() -> None:
    for name in ("demoo", "", "no/such.yaml", ".", "\0"):
        with pytest.raises(UserError) as caught:
            load_config(name)
        assert f"no recipe and no readable file is called {name!r}" in caught.value.problem
        assert ", ".join(recipes()) in caught.value.fix
        assert ("did you mean 'demo'?" in caught.value.fix) == (name == "demoo")
