"""Settings: defaults, overrides of every type, bounds, names, YAML in and out."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fer_dist.config import Config, ModelConfig, OptimConfig, load_config
from fer_dist.errors import UserError
from fer_dist.options import Section, bounds, option, recipes, section, walk


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


def test_every_option_says_what_it_means() -> None:
    for name, f in walk(Config):
        assert len(f.metadata["help"]) > 8, name


def test_numbers_say_their_unit() -> None:
    """In brackets, at the end; these few have none."""
    pure = {"seed", "data.embedded_seed", "data.augment.mixup", "data.augment.cutmix"}
    pure |= {"optim.lr", "optim.weight_decay", "optim.momentum", "train.ema"}
    numbers = {name: f for name, f in walk(Config) if f.type in (int, float, int | None, float | None)}
    assert {name for name, f in numbers.items() if not f.metadata["help"].endswith("]")} == pure


@pytest.mark.parametrize("recipe", [None, *recipes()])
def test_yaml_out_and_in_is_the_same(recipe: str | None, tmp_path: Path) -> None:
    config = load_config(recipe) if recipe else Config()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(path)) == config


def test_yaml_keeps_what_is_hard_to_write(tmp_path: Path) -> None:
    options = {"a": {"b": [1, 2.5, "x"]}, "empty": {}, "dotted.key": "1", "none": None, "word": "true"}
    config = Config().override({"model.options": options, "run.name": "2026", "data.path": "ä # b: c"})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(str(path))
    assert again == config
    assert again.model.options == options


def test_the_recipes_are_there() -> None:
    assert set(recipes()) >= {"demo", "vit", "patt_lite", "patt_lite_plus", "vit_mae"}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("count", "7", Outer(count=7)),
        ("count", 7.0, Outer(count=7)),
        ("count", "1e1", Outer(count=10)),
        ("ratio", "3e-4", Outer(ratio=3e-4)),
        ("ratio", 2, Outer(ratio=2.0)),
        ("name", "x", Outer(name="x")),
        ("name", Path("a/b"), Outer(name="a/b")),
        ("name", "none", Outer(name=None)),
        ("name", None, Outer(name=None)),
        ("place", "none", Outer(place="none")),
        ("limit", "4", Outer(limit=4)),
        ("limit", "None", Outer(limit=None)),
        ("fast", "true", Outer(fast=True)),
        ("fast", "False", Outer(fast=False)),
        ("fast", True, Outer(fast=True)),
        ("inner.rate", "1", Outer(inner=Inner(rate=1.0))),
        ("inner.kind", "square", Outer(inner=Inner(kind="square"))),
        ("inner", {"kind": "square"}, Outer(inner=Inner(kind="square"))),
        ("inner", None, Outer()),
        ("extra", "{a: 1}", Outer(extra={"a": 1})),
        ("extra", {"a": (1, 2)}, Outer(extra={"a": [1, 2]})),
        ("extra.a", "3e-4", Outer(extra={"a": 3e-4})),
        ("extra.a", "64", Outer(extra={"a": 64})),
        ("extra.a", "[1, 2]", Outer(extra={"a": [1, 2]})),
        ("extra.a", "true", Outer(extra={"a": True})),
        ("extra.a", "text: : x", Outer(extra={"a": "text: : x"})),
        ("extra.a", "2026-01-02", Outer(extra={"a": "2026-01-02"})),
        ("extra.a.b", "1", Outer(extra={"a": {"b": 1}})),
    ],
)
def test_override_converts(name: str, value: Any, wanted: Outer) -> None:
    changed = Outer(name="before", limit=9).override({name: value}).override({} if name == "name" else {"name": None})
    changed = changed.override({} if name == "limit" else {"limit": None})
    assert changed == wanted
    assert changed.to_yaml() == wanted.to_yaml()  # 7 and 7.0 are equal, but not the same


def test_override_makes_a_copy_and_the_last_wins() -> None:
    before = Outer()
    after = before.override({"extra.a": 1, "inner.rate": 0.1, "extra.b": 2}).override({"inner.rate": 0.2})
    assert before == Outer()
    assert (after.extra, after.inner.rate) == ({"a": 1, "b": 2}, 0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.count = 4  # type: ignore[misc]


def test_numbers_of_numpy_become_plain() -> None:
    numpy = pytest.importorskip("numpy")
    drawn = {"count": numpy.int64(4), "ratio": numpy.float32(0.5), "fast": numpy.True_, "extra.n": numpy.int32(8)}
    config = Outer().override(drawn)
    assert config == Outer(count=4, ratio=0.5, fast=True, extra={"n": 8})
    assert type(config.count) is type(config.extra["n"]) is int
    config.to_yaml()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", "3.5", "count is '3.5', expected a whole number"),
        ("count", True, "expected a whole number"),
        ("count", "many", "expected a whole number"),
        ("count", "0", "count is 0, expected >= 1 and <= 10"),
        ("count", 11, "expected >= 1 and <= 10"),
        ("count", "1e400", "expected a whole number"),
        ("limit", "0", "expected >= 1"),
        ("ratio", "0", "ratio is 0.0, expected > 0"),
        ("ratio", "nan", "ratio is nan"),
        ("ratio", "inf", "ratio is inf"),
        ("ratio", [1], "expected a number"),
        ("ratio", "", "ratio is '', expected a number"),
        ("inner.rate", "-0.1", "inner.rate is -0.1, expected >= 0 and <= 1"),
        ("inner.kind", "sqare", "expected one of round, square\n  -> inner.kind square"),
        ("fast", "yes", "fast is 'yes', expected true or false"),
        ("fast", 1, "expected true or false"),
        ("name", "", "name is '', expected a text"),
        ("name", 5, "expected a text"),
        ("place", None, "place is None, expected a text"),
        ("extra", "3", "expected a mapping"),
        ("inner", "3", "inner is a section, not a value\n  -> name one of its fields: inner.rate, inner.kind"),
        ("inner", {"rate": 7}, "inner.rate is 7.0"),
        ("inner.", "3", "unknown setting 'inner.'"),
        ("extra.", "3", "unknown setting 'extra.'"),
        ("count.x", "3", "unknown setting 'count.x'"),
        ("", "3", "unknown setting ''"),
    ],
)
def test_override_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Outer().override({name: value})
    assert message in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("digits", [400, 5000])  # Python itself prints 4300
@pytest.mark.parametrize("name", ["count", "ratio", "limit", "extra", "extra.n", "inner.rate"])
def test_a_number_that_no_float_can_hold_is_refused(name: str, digits: int) -> None:
    for number in (10**digits, -(10**digits)):
        with pytest.raises(UserError, match=rf"^{name}: a number is too large\n  -> write a smaller one"):
            Outer().override({name: {"a": [number]} if name == "extra" else number})


def test_bounds_hold_wherever_the_value_comes_from() -> None:
    with pytest.raises(UserError, match=r"lr is -1\.0, expected > 0"):
        OptimConfig(lr=-1)
    with pytest.raises(UserError, match=r"lr is -1\.0"):
        dataclasses.replace(OptimConfig(), lr=-1)
    assert [bounds(f) for name, f in walk(Outer) if name in ("count", "ratio", "place")] == [
        ">= 1 and <= 10",
        "> 0",
        "",
    ]


@pytest.mark.parametrize("f", [pytest.param(f, id=name) for name, f in walk(Config)])
def test_every_bound_is_kept(f: "dataclasses.Field[Any]") -> None:
    """Each default is allowed, each bound itself too, and what lies beyond is refused."""
    owner = next(kind for kind in _sections(Config) if f.name in {g.name for g in dataclasses.fields(kind) if g is f})
    for key, beyond in (("low", -1), ("above", 0), ("high", 1)):
        if (bound := f.metadata[key]) is None:
            continue
        if key != "above":
            assert getattr(owner(**{f.name: bound}), f.name) == bound
        with pytest.raises(UserError, match=f.name):
            owner(**{f.name: bound + beyond})


def _sections(kind: Any) -> list[Any]:
    inner = [f.type for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.type)]
    return [kind, *(below for part in inner for below in _sections(part))]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("model.lr", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("learning-rate", "optim.lr"),
        ("batch_size", "train.global_batch"),
        ("train.global-batch", "train.global_batch"),
        ("epochs", "train.epochs"),
        ("num_epochs", "train.epochs"),
        ("augment.flip", "data.augment.flip"),
        ("data.augment.rotate", "data.augment.rotation"),
        ("optim.weightdecay", "optim.weight_decay"),
        ("freeze", "model.freeze_depth"),
        ("model.architecture", "model.arch"),
        ("optimizer", "optim.name"),
        ("early_stopping", "train.patience"),
        ("output_dir", "run.dir"),
    ],
)
def test_the_nearest_name_is_shown(typed: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        Config().override({typed: 1})
    assert str(caught.value) == f"unknown setting {typed!r}\n  -> did you mean {meant!r}? --help lists all"


def test_a_section_alone_suggests_its_own_names() -> None:
    with pytest.raises(UserError, match="did you mean 'freeze_depth'"):
        ModelConfig().override({"freeze_dept": 1})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optim: {lr: [}", "is not YAML: while parsing"),
        ("- a\n- b\n", "holds a list, expected a mapping"),
        ("just words\n", "holds a str, expected a mapping"),
        ("optim:\n  lrr: 1\n", "unknown setting 'optim.lrr'"),
        ("optim: 3\n", "optim is a section, not a value"),
        ("optim:\n  lr: fast\n", "optim.lr is 'fast', expected a number"),
        ("on: 1\n", "unknown setting 'True'"),
        ("run: {name: 2026}\n", "run.name is 2026, expected a text"),
    ],
)
def test_a_wrong_file_is_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert str(path) in caught.value.problem
    assert problem in caught.value.problem


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "optim:\n", "data:\n  augment:\n"])
def test_an_empty_file_changes_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(str(path)) == Config()


@pytest.mark.parametrize("name", ["demoo", "", "no/such.yaml", ".", "\0"])
def test_an_unknown_recipe_shows_the_known(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert f"no recipe and no readable file is called {name!r}" in caught.value.problem
    assert ", ".join(recipes()) in caught.value.fix
    assert ("did you mean 'demo'?" in caught.value.fix) == (name == "demoo")


def test_bytes_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00lr")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(str(path))


def test_overrides_come_after_the_recipe() -> None:
    assert load_config("vit", {"optim.lr": "0.5"}).optim.lr == 0.5
    with pytest.raises(UserError, match=r"^unknown setting 'x'"):  # the command line's, not the file's
        load_config("vit", {"x": 1})
