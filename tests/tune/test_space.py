"""The search space: its file, with errors before anything starts; valid values, equal in every process; grids."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fer_dist.config import Config, load_config
from fer_dist.errors import UserError
from fer_dist.models import build_model
from fer_dist.spec import LabelSet
from tests.helpers.tiny_models import ALL, tiny_config
from tune import space as space_module
from tune.space import Axis, Space, depth_of
from tune.spacefile import FIXED, default_space, read_space, space_of

EVERY_KIND: dict[str, Any] = {
    "optim.lr": {"log_uniform": ["1e-5", 1.0e-2]},
    "data.augment.mixup": {"uniform": [0, 0.4]},
    "optim.plateau_patience": {"integer": [0, 4]},
    "train.global_batch": {"choice": [32, 64, 128]},
    "model.options.cut": [8, 10],
    "train.compile": [True, False],
}
LARGEST_PART = 1 - 2**-53
"""The largest number below 1: no larger part of an axis is drawn."""


def space(tree: Any, config: Config | None = None, workers: int = 1) -> Space:
    return space_of(tree, config or Config(), workers, "here.yaml")


def axis(name: str, item: Any) -> Axis:
    (made,) = space({name: item}).axes
    return made


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"uniform": [0.1, 0.5]}, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"log_uniform": [1e-4, 1]}, [1e-4, 1e-3, 1e-2, 1e-1, 1]),
        ([0.4, 0.1, 0.3, 0.2], [0.4, 0.1, 0.3, 0.2, 0.2]),
    ],
)
def test_values_at_each_quarter_of_an_axis(item: Any, expected: list[float]) -> None:
    made = axis("optim.lr", item)
    assert [made.at(part) for part in (0, 0.25, 0.5, 0.75, LARGEST_PART)] == pytest.approx(expected)


def test_ends_are_reached_and_never_left() -> None:
    """Also where exp(log(x)) differs from x."""
    for low, high in itertools.pairwise([1e-7, 3e-5, 1e-3, 0.1, 0.3, 7.0]):
        made = axis("optim.lr", {"log_uniform": [low, high]})
        assert low <= made.at(0.0) <= made.at(LARGEST_PART) <= high
    for count in (1, 3, 7, 999_999):
        made = axis("seed", {"integer": [5, 4 + count]})
        assert [made.at(part) for part in (0.0, 0.5, LARGEST_PART)] == [5, 5 + count // 2, 4 + count]


def test_a_sample_is_a_function_of_seed_and_number() -> None:
    """Fixed values: a resumed search, in another process, draws what the first one would have drawn."""
    made = space(EVERY_KIND)
    samples = [made.sample(7, number) for number in range(20)]
    assert [made.sample(7, number) for number in reversed(range(20))] == samples[::-1]
    assert len({made.sample(seed, number)["optim.lr"] for seed in range(5) for number in range(20)}) == 100
    assert samples[0] == {
        "optim.lr": pytest.approx(0.0007617453977168089),
        "data.augment.mixup": pytest.approx(0.32296497468428254),
        "optim.plateau_patience": 3,
        "train.global_batch": 128,
        "model.options.cut": 8,
        "train.compile": False,
    }


def test_axes_are_uniform_and_independent() -> None:
    """The order and the presence of other settings do not change a value, and no two are correlated."""
    tree = {"optim.lr": {"uniform": [1, 5]}, "optim.weight_decay": {"uniform": [1, 5]}}
    made = space(tree)
    both = made.sample(0, 9)
    assert space(dict(reversed(tree.items()))).sample(0, 9) == both
    assert space({"optim.lr": tree["optim.lr"]}).sample(0, 9) == {"optim.lr": both["optim.lr"]}
    drawn = Counter(tuple(map(int, made.sample(0, number).values())) for number in range(3200))
    assert len(drawn) == 16
    assert all(140 < count < 260 for count in drawn.values()), "200 expected"


def test_a_sample_is_its_own_copy() -> None:
    made = space({"model.options": [{"cut": 8}]})
    for values in (made.sample(0, 0), made.grid(0)[0]):
        values["model.options"]["cut"] = 3
    assert made.sample(0, 0) == {"model.options": {"cut": 8}}


def test_a_grid_has_each_combination_once_in_an_order_of_the_seed() -> None:
    made = space({"optim.name": ["adam", "sgd"], "train.global_batch": [32, 64, 96], "seed": {"integer": [0, 3]}})
    grid = made.grid(0)
    ordered = [*itertools.product(["adam", "sgd"], [32, 64, 96], range(4))]
    assert sorted(tuple(one.values()) for one in grid) == ordered != [tuple(one.values()) for one in grid]
    assert made.grid(0) == grid != made.grid(1)
    assert list(grid[0]) == ["optim.name", "train.global_batch", "seed"]
    endless = r"optim\.lr is log_uniform: a grid would have no end\n.*optim\.lr: \[1e-05, 0\.01\]"
    with pytest.raises(UserError, match=endless):
        space(EVERY_KIND).grid(0)
    with pytest.raises(UserError, match="1000000 combinations, expected at most 100000"):
        space({"seed": {"integer": [0, 999_999]}}).grid(0)


@pytest.mark.parametrize(
    ("name", "item", "expected"),
    [
        ("train.global_batch", [64.0, "32", "1e2"], (64, 32, 100)),
        ("optim.weight_decay", [1, "1e-5", 0], (1.0, 1e-5, 0.0)),
        ("train.compile", ["true", False], (True, False)),
        ("model.image_size", [None, "96"], (None, 96)),
        ("model.options.cut", ["8", 10], (8, 10)),
        ("model.options", [{"cut": 8}, {"cut": 10, "heads": 4}], ({"cut": 8}, {"cut": 10, "heads": 4})),
        ("optim.plateau_patience", {"integer": ["1e0", 3.0]}, (1, 2, 3)),
        ("optim.plateau_patience", {"integer": [3, 3]}, (3,)),
        ("model.options.cut", {"integer": [8.0, "9"]}, (8, 9)),
        ("optim.lr", {"log_uniform": ["1e-5", 1]}, (1e-5, 1.0)),
        ("model.options.attention_dropout", {"uniform": [0, 0.5]}, (0.0, 0.5)),
    ],
)
def test_values_are_those_that_the_config_holds(name: str, item: Any, expected: tuple[Any, ...]) -> None:
    made = axis(name, item)
    values = made.values or (made.low, made.high)
    assert values == expected
    assert [type(value) for value in values] == [type(value) for value in expected]


def test_true_is_not_one() -> None:
    """Options of timm's constructors have no declared type."""
    (made,) = space({"model.options.zero_init_last": [True, 1]}, Config().override(ALL["timm:resnet18"])).axes
    assert [type(value) for value in made.choices] == [bool, int]


def test_a_file_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        """
        optim.lr: {log_uniform: [1e-5, 1.0e-2]}   # 1e-5 is a text to YAML 1.1
        optim: {name: [adam, adamw], weight_decay: &small {uniform: [0, 1e-1]}}
        data:
          augment: {mixup: *small}
        train.global_batch: {choice: [32, 64, 128]}
        model: {freeze_depth: {integer: [0, null]}, options: {cut: [8, 10]}, image_size: [null, 64]}
        """
    )
    made = read_space(path, Config(), 4)
    assert made.axes == (
        Axis(name="optim.lr", kind="log_uniform", low=1e-5, high=1e-2),
        Axis(name="optim.name", kind="choice", choices=("adam", "adamw")),
        Axis(name="optim.weight_decay", kind="uniform", low=0.0, high=0.1),
        Axis(name="data.augment.mixup", kind="uniform", low=0.0, high=0.1),
        Axis(name="train.global_batch", kind="choice", choices=(32, 64, 128)),
        Axis(name="model.freeze_depth", kind="integer", low=0, high=8),
        Axis(name="model.options.cut", kind="choice", choices=(8, 10)),
        Axis(name="model.image_size", kind="choice", choices=(None, 64)),
    )
    for written in (made, space({"model.options": [{"cut": 8, "width_mult": 0.5}, {}]})):
        path.write_text(yaml.safe_dump(written.to_dict(), sort_keys=False))
        assert read_space(path, Config(), 4) == written == space(written.to_dict(), workers=4)
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_space(tmp_path, Config(), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "found nothing, expected a mapping"),
        ("- optim.lr\n", "found a list, expected a mapping"),
        ("optim.lr: [1e-3", "is not YAML"),
        ("optim.lr: !!python/name:os.system", "is not YAML"),
        ("seed: [2020-13-45]", "is not YAML"),
        ("[" * 1500, "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("seed: [1]\n\noptim.lr: [1]\nseed: [2]\n", "seed is there twice, in lines 1 and 4"),
        ("model.options: [{cut: 8, 'cut': 9}]", "cut is there twice"),
        ("optim.lr: [1]\noptim: {lr: [2]}", "optim.lr is there twice"),
        ("model.options: [{}]\nmodel.options.cut: [2]", "model.options and model.options.cut overlap"),
        ("model.options: [&all {cut: *all}]", "model.options: a value holds itself"),
    ],
)
def test_a_bad_file_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_space(path, Config(), 1)
    assert caught.value.problem.startswith(str(path))
    assert message in caught.value.problem
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "item", "problem", "fix"),
    [
        # the name
        ("optim.lrr", [1], "unknown setting 'optim.lrr'", "'optim.lr'"),
        ("optim", [1], "optim is a section, not a value", "optim.lr"),
        ("optim", {"uniform": [0, 1]}, "optim is a section", "optim.lr"),
        ("optim", {"lrr": [1]}, "unknown setting 'optim.lrr'", "'optim.lr'"),
        ("run.kep", [1, 2], "unknown setting 'run.kep'", "run.keep"),
        # the kind
        ("optim.lr", {"log_unform": [1, 2]}, "unknown kind 'log_unform', expected one of uniform", "'log_uniform'"),
        ("optim.lr", {7: [1, 2]}, "unknown kind 7", "did you mean"),
        ("optim.lr", 0.1, "optim.lr is 0.1, expected a list of values, or one of", "uniform: [LOW, HIGH]"),
        ("optim.name", "adam", "optim.name is 'adam', expected a list", "optim.name: [VALUE, VALUE]"),
        ("optim.lr", {"uniform": [1, 2], "choice": [1]}, "expected a list of values, or one of", "uniform"),
        ("optim.lr", {"uniform": 0.1}, "uniform of 0.1, expected a list", "{uniform: [LOW, HIGH]}"),
        ("optim.lr", {"choice": 0.1}, "choice of 0.1, expected a list", "[VALUE, VALUE]"),
        ("optim.lr", {"uniform": [0.1]}, "uniform of 1 number", "{uniform: [LOW, HIGH]}"),
        ("train.global_batch", {"uniform": [8, 16]}, "uniform draws fractions", "{integer: [LOW, HIGH]}"),
        ("optim.name", {"uniform": [0, 1]}, "uniform draws fractions", "[VALUE, VALUE]"),
        ("train.compile", {"integer": [0, 1]}, "integer draws whole numbers", "[VALUE, VALUE]"),
        ("optim.lr", {"integer": [1, 2]}, "integer draws whole numbers", "{uniform: [LOW, HIGH]}"),
        # the values: the Config's own bounds, in a list and at the ends of a range
        ("optim.lr", [0.1, "abc"], "optim.lr is 'abc', expected a number", "0.001"),
        ("optim.lr", {"uniform": [0, 1]}, "optim.lr is 0.0, expected > 0", "learning rate"),
        ("model.image_size", {"integer": [None, 96]}, "integer with an end None, expected a whole number", "integer"),
        ("model.options.cut", {"integer": [8, True]}, "integer with an end True", "[LOW, HIGH]"),
        ("model.options.cut", {"integer": [8, 9.5]}, "integer with an end 9.5, expected a whole number", "[LOW, HIGH]"),
        ("model.options.width_mult", {"uniform": [0, "x"]}, "uniform with an end 'x', expected a number", "[LOW,"),
        ("optim.weight_decay", {"uniform": [0, math.inf]}, "optim.weight_decay is inf", "weight decay"),
        ("model.options.width_mult", ["nan"], "expected a finite number", "VALUE"),
        ("model.options", [{"width_mult": [math.nan]}], "expected a finite number", "VALUE"),
        ("model.options.cut", [10**400], "a number is too large", "smaller"),
        ("model.options.hidden_act", ["'8'"], "quotes inside of quotes", "write 8"),
        # the range
        ("optim.lr", {"uniform": [0.2, 0.1]}, "uniform from 0.2 to 0.1, expected the lowest below", "[0.1, 0.2]"),
        ("optim.lr", {"log_uniform": [0.2, "2e-1"]}, "log_uniform from 0.2 to 0.2", "optim.lr: [0.2]"),
        ("seed", {"integer": [3, 2]}, "integer from 3 to 2", "[2, 3]"),
        ("seed", {"integer": [1, 1_000_001]}, "1000001 whole numbers, expected at most 1000000", "closer"),
        ("optim.weight_decay", {"log_uniform": [0, 0.1]}, "log_uniform from 0.0, expected more than 0", "0.0001"),
        # the choice
        ("optim.lr", [], "optim.lr has no value to choose from", "uniform"),
        ("model.image_size", [None, "96", "none"], "model.image_size has the value None twice", "leave one"),
        ("train.global_batch", [64, "64.0"], "train.global_batch has the value 64 twice", "leave one"),
        ("model.options.cut", [8, 8.0], "model.options.cut has the value 8.0 twice", "leave one"),
        ("model.options", [{"cut": 8}, {"cut": 8}], "model.options has the value {'cut': 8} twice", "leave one"),
    ],
)
def test_a_bad_axis_is_refused(name: str, item: Any, problem: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        space({"optim.momentum": [0.9], name: item})
    assert caught.value.problem.startswith("here.yaml: ")
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_settings_that_all_trials_share_cannot_be_searched() -> None:
    fixed = (
        "train.epochs", "train.monitor", "train.flip_tta", "data.path", "data.ferplus", "data.cache_dir",
        "data.val_fraction", "data.embedded_val", "data.embedded_seed",
    )  # fmt: skip
    assert set(fixed) == set(FIXED)
    for name in (*fixed, "run.dir", "run.keep"):
        section, _, field = name.partition(".")
        for tree in ({name: [1, 2]}, {section: {field: [1, 2]}}):
            with pytest.raises(UserError, match=f"{name} is the same for all trials .*\n.*--{name} VALUE"):
                space(tree)


@pytest.mark.parametrize(
    ("item", "shown", "fits"),
    [
        ([32, 30, 50], "4 workers of a trial do not divide 30, 50", "train.global_batch: [32, 48]"),
        ([1], "do not divide 1", "train.global_batch: [4]"),
        ({"integer": [32, 36]}, "do not divide 33, 34, 35", "train.global_batch: [32, 36]"),
        ({"integer": [8, 108]}, "do not divide 9, 10, 11, 13, 14, ...", "train.global_batch: [8, 32, 56, 80, 104]"),
    ],
)
def test_workers_share_every_batch(item: Any, shown: str, fits: str) -> None:
    with pytest.raises(UserError) as caught:
        space({"train.global_batch": item}, workers=4)
    assert shown in caught.value.problem
    assert fits in caught.value.fix
    assert space({"train.global_batch": item})
    assert space(yaml.safe_load(caught.value.fix.partition("; ")[2]), workers=4)
    with pytest.raises(UserError, match=r"4 workers of a trial do not divide 66\n  -> --train.global_batch 64"):
        space({"optim.lr": [0.1]}, Config().override({"train.global_batch": 66}), workers=4)


def test_freeze_depth_ends_at_the_depth() -> None:
    """Null is the depth of the network, but only as the second of two ends."""
    config = tiny_config("vit")
    for item in ({"integer": [0, 3]}, {"integer": [3, 3]}, [0, 3], [3]):
        with pytest.raises(UserError, match=r"goes up to 3, but the network has 2 blocks\n.*\{integer: \[0, 2\]\}"):
            space({"model.freeze_depth": item}, config)
    (made,) = space({"model.freeze_depth": {"integer": [1, None]}}, config).axes
    assert made.values == (1, 2)
    for bad in ({"integer": [None, 1]}, {"integer": [0, None, 1]}, {"integer": [3, None]}, [None]):
        with pytest.raises(UserError, match=r"model\.freeze_depth"):
            space({"model.freeze_depth": bad}, config)


@pytest.mark.parametrize("item", [[13, 5, 8], {"integer": [5, 13]}])
def test_depth_is_that_of_the_smallest_network_searched(item: Any) -> None:
    tree = {"model.freeze_depth": {"integer": [0, None]}, "model.options.cut": item}
    assert space(tree).axes[0].high == 5
    with pytest.raises(UserError, match="goes up to 6, but the smallest network has 5 blocks"):
        space({**tree, "model.freeze_depth": [0, 6]})
    with pytest.raises(UserError, match="goes up to 6, but the smallest network has 5 blocks"):
        space({"model.options.cut": item}, Config().override({"model.freeze_depth": 6}))


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"model.options.cutt": [8, 9]}, "patt_lite has no option model.options.cutt (with model.options.cutt 8)"),
        ({"model.options.cut": {"choise": [8]}}, "unknown kind 'choise'"),
        ({"model.options.cut": {"uniform": [8, 9]}}, "model.options.cut is 8.0, expected int"),
        ({"model.options.cut": [8, 18]}, "MobileNetV2 has 17 blocks"),
        ({"model.arch": ["patt_lite", "vitt"]}, "unknown architecture 'vitt'"),
        ({"model.options.channels": {"integer": [64, 128]}}, "channels is 65, not a multiple of heads = 8"),
        ({"model.options.channels": [64, 96], "model.options.heads": [8, 12]}, "channels is 64, not a multiple of"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(tree: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        space(tree)
    assert problem in caught.value.problem


def test_many_networks_are_not_all_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Config] = []

    def depth(config: Config) -> int:
        built.append(config)
        return 9

    monkeypatch.setattr(space_module, "depth_of", depth)
    tree = {"model.options.cut": list(range(1, 18)), "model.options.channels": [8 * n for n in range(1, 33)]}
    assert len(space(tree).grid(0)) == 17 * 32
    assert len(built) == 64


def test_depth_is_that_of_the_network() -> None:
    for arch in ALL:
        config = tiny_config(arch)
        before = torch.random.get_rng_state()
        depth = depth_of(config)
        assert torch.equal(torch.random.get_rng_state(), before), arch
        assert depth == build_model(config.model, config.data.size, LabelSet()).depth >= 2, arch


def test_depth_of_a_large_network_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    plain = torch.nn.Parameter.__new__

    def noted(cls: Any, data: torch.Tensor, *rest: Any, **named: Any) -> Any:
        made.append(data.device.type)
        return plain(cls, data, *rest, **named)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", noted)
    assert depth_of(load_config("vit")) == 12
    assert len(made) > 100
    assert set(made) == {"meta"}


def test_default_space_is_around_the_config() -> None:
    config = tiny_config("vit").override({"optim.lr": 3e-4, "train.global_batch": 48})
    made = default_space(config, 4)
    assert made.to_dict() == {
        "optim.lr": {"log_uniform": [3e-5, 3e-3]},
        "train.global_batch": {"choice": [24, 48, 96]},
        "model.freeze_depth": {"integer": [0, 2]},
    }
    assert space_of(made.to_dict(), config, 4, "") == made


def test_default_batches_fit_the_workers() -> None:
    for batch, workers, wanted in (
        (64, 1, [32, 64, 128]), (1, 1, [1, 2]), (1, 2, [2]), (6, 4, [12]), (5, 5, [5, 10]), (12, 8, [24]),
    ):  # fmt: skip
        config = tiny_config("vit").override({"train.global_batch": batch})
        assert default_space(config, workers).to_dict()["train.global_batch"] == {"choice": wanted}
    config = tiny_config("vit").override({"train.global_batch": 30})
    with pytest.raises(UserError, match=r"train\.global_batch is 30, and 8 workers.*\n  -> --train\.global_batch 32"):
        default_space(config, 8)
