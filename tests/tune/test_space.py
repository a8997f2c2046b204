"""The search space: valid values, equal in every process, and every combination of a grid once."""

import itertools
import math
from typing import Any

import pytest
import torch

from fer_dist.config import Config, load_config
from fer_dist.errors import UserError
from fer_dist.models import build_model
from fer_dist.spec import LabelSet
from tests.helpers.search_spaces import EVERY_KIND, axis, space
from tests.helpers.tiny_models import ALL, tiny_config
from tune.space import depth_of, value_of


def test_samples_lie_in_the_range_and_reach_all_of_it() -> None:
    made = space(EVERY_KIND)
    samples = [made.sample(3, number) for number in range(2000)]
    for one in made.axes:
        drawn = [sample[one.name] for sample in samples]
        if one.values is not None:
            assert len(one.values) > 1
            assert all(value in one.values for value in drawn)
            for value in one.values:  # equally likely
                share = sum(other == value for other in drawn) / len(drawn) * len(one.values)
                assert 0.75 < share < 1.25, (one.name, value)
            continue
        assert one.low is not None
        assert one.high is not None
        assert all(one.low <= value <= one.high for value in drawn)
        scale = math.log if one.kind == "log_uniform" else float
        low, high = scale(one.low), scale(one.high)
        for quarter in (1, 2, 3):
            below = sum(scale(value) < low + (high - low) * quarter / 4 for value in drawn) / len(drawn)
            assert below == pytest.approx(quarter / 4, abs=0.04), one.name


def test_ends_are_never_left() -> None:
    """Also where exp(log(x)) differs from x, and for the largest part that is drawn."""
    largest = 1 - 2**-53
    for low, high in itertools.pairwise([1e-7, 3e-5, 1e-3, 0.1, 0.3, 7.0]):
        made = axis({"log_uniform": [low, high]}, "optim.lr")
        assert low <= made.at(0.0) <= made.at(largest) <= high
        assert made.at(0.0) == pytest.approx(low)
        assert made.at(largest) == pytest.approx(high)
    for count in (1, 2, 3, 7, 1000, 999_999):
        assert axis({"integer": [5, 4 + count]}, "seed").at(largest) == 4 + count
        assert axis({"integer": [5, 4 + count]}, "seed").at(0.0) == 5


def test_a_sample_is_a_function_of_seed_and_number() -> None:
    """Fixed values: a resumed search, in another process, draws what the first one would have drawn."""
    made = space(EVERY_KIND)
    forward = [made.sample(7, number) for number in range(20)]
    assert [made.sample(7, number) for number in reversed(range(20))] == forward[::-1]
    assert len({made.sample(seed, number)["optim.lr"] for seed in range(5) for number in range(20)}) == 100
    assert forward[0] == {
        "optim.lr": pytest.approx(0.0007617453977168089), "data.augment.mixup": pytest.approx(0.32296497468428254),
        "optim.plateau_patience": 3, "train.global_batch": 128, "optim.name": "adamw", "model.image_size": 96,
        "model.options.cut": 8, "train.compile": False,
    }  # fmt: skip
    for number, values in enumerate(forward):
        config = Config().override(values)
        held = {name: value_of(config, name) for name in values}
        assert held == values, number
        assert [type(value) for value in held.values()] == [type(value) for value in values.values()]


def test_axes_are_independent() -> None:
    """The order and the presence of other settings do not change a value, and no two are correlated."""
    tree = {"optim.lr": {"uniform": [0.1, 1]}, "optim.weight_decay": {"uniform": [0.1, 1]}}
    made = space(tree)
    for number in range(10):
        both = made.sample(0, number)
        assert space(dict(reversed(tree.items()))).sample(0, number) == both
        assert space({"optim.lr": tree["optim.lr"]}).sample(0, number) == {"optim.lr": both["optim.lr"]}
    drawn = [made.sample(0, number).values() for number in range(2000)]
    assert sum((a > 0.55) == (b > 0.55) for a, b in drawn) / len(drawn) == pytest.approx(0.5, abs=0.05)


def test_a_sample_is_its_own_copy() -> None:
    made = space({"model.options": [{"cut": 8}]})
    made.sample(0, 0)["model.options"]["cut"] = 3
    made.grid(0)[0]["model.options"]["cut"] = 3
    assert made.sample(0, 0) == {"model.options": {"cut": 8}}


def test_a_grid_has_each_combination_once_in_an_order_of_the_seed() -> None:
    made = space({"optim.name": ["adam", "sgd"], "train.global_batch": [32, 64, 96], "seed": {"integer": [0, 3]}})
    grid = made.grid(0)
    wanted = [*itertools.product(["adam", "sgd"], [32, 64, 96], range(4))]
    assert sorted(tuple(one.values()) for one in grid) == sorted(wanted)
    assert [tuple(one.values()) for one in grid] != wanted
    assert made.grid(0) == grid != made.grid(1)
    assert list(grid[0]) == ["optim.name", "train.global_batch", "seed"]
    endless = r"optim\.lr is log_uniform: a grid would have no end\n.*optim\.lr: \[1e-05, 0\.01\]"
    with pytest.raises(UserError, match=endless):
        space(EVERY_KIND).grid(0)
    with pytest.raises(UserError, match="1000000 combinations, expected at most 100000"):
        space({"seed": {"integer": [0, 999_999]}}).grid(0)


# Networks and their depth


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
