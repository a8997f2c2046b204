"""The search space: values that a Config takes, the same everywhere, and every combination once."""

import itertools
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from fer_dist.config import Config, load_config
from fer_dist.errors import UserError
from fer_dist.models import build_model
from fer_dist.spec import LabelSet
from tests.conftest import ROOT
from tests.helpers.search_spaces import EVERY_KIND, axis, space
from tests.helpers.tiny_models import ALL, tiny_config
from tune.space import depth_of, value_of


@pytest.mark.parametrize("name", list(EVERY_KIND))
def test_samples_lie_in_the_range_and_reach_all_of_it(name: str) -> None:
    made = space(EVERY_KIND)
    (one,) = (one for one in made.axes if one.name == name)
    drawn = [made.sample(3, number)[name] for number in range(2000)]
    if one.values is not None:
        assert len(one.values) > 1
        for value in one.values:  # equally likely
            share = sum(other == value for other in drawn) / len(drawn) * len(one.values)
            assert 0.75 < share < 1.25, value
        assert all(value in one.values for value in drawn)
        return
    assert one.low is not None
    assert one.high is not None
    low, high, scaled = one.low, one.high, drawn
    assert all(low <= value <= high for value in drawn)
    if one.kind == "log_uniform":
        low, high, scaled = math.log(low), math.log(high), [math.log(value) for value in drawn]
    for quarter in (1, 2, 3):
        below = sum(value < low + (high - low) * quarter / 4 for value in scaled) / len(scaled)
        assert below == pytest.approx(quarter / 4, abs=0.04)


def test_ends_are_never_left() -> None:
    """Also where exp(log(x)) is not x, and for the largest part that is drawn."""
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
    made = space(EVERY_KIND)
    forward = [made.sample(7, number) for number in range(20)]
    assert [made.sample(7, number) for number in reversed(range(20))] == forward[::-1]
    lrs = {made.sample(seed, number)["optim.lr"] for seed in range(5) for number in range(20)}
    assert len(lrs) == 100
    code = (
        "import json, sys; from fer_dist.config import Config; from tune.spacefile import space_of\n"
        "made = space_of(json.loads(sys.argv[1]), Config(), 1, '')\n"
        "print(json.dumps([made.sample(7, number) for number in range(20)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(EVERY_KIND)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == forward


def test_axes_are_drawn_apart() -> None:
    """A setting that comes first, last or not at all leaves the values of the others; no two go together."""
    tree = {"optim.lr": {"uniform": [0.1, 1]}, "optim.weight_decay": {"uniform": [0.1, 1]}}
    made = space(tree)
    for number in range(10):
        both = made.sample(0, number)
        assert space(dict(reversed(tree.items()))).sample(0, number) == both
        assert space({"optim.lr": tree["optim.lr"]}).sample(0, number) == {"optim.lr": both["optim.lr"]}
    drawn = [made.sample(0, number).values() for number in range(2000)]
    assert sum((a > 0.55) == (b > 0.55) for a, b in drawn) / len(drawn) == pytest.approx(0.5, abs=0.05)


def test_every_sample_survives_the_config() -> None:
    made = space(EVERY_KIND)
    for number in range(50):
        values = made.sample(0, number)
        config = Config().override(values)
        held = {name: value_of(config, name) for name in values}
        assert held == values
        assert [type(value) for value in held.values()] == [type(value) for value in values.values()]


def test_a_sample_is_its_own_copy() -> None:
    made = space({"model.options": [{"cut": 8}]})
    made.sample(0, 0)["model.options"]["cut"] = 3
    made.grid(0)[0]["model.options"]["cut"] = 3
    assert made.sample(0, 0) == {"model.options": {"cut": 8}}


def test_grid_has_each_combination_once_in_an_order_of_the_seed() -> None:
    made = space({"optim.name": ["adam", "sgd"], "train.global_batch": [32, 64, 96], "seed": {"integer": [0, 3]}})
    grid = made.grid(0)
    wanted = [*itertools.product(["adam", "sgd"], [32, 64, 96], range(4))]
    assert sorted(tuple(one.values()) for one in grid) == sorted(wanted)
    assert [tuple(one.values()) for one in grid] != wanted
    assert made.grid(0) == grid
    assert made.grid(1) != grid
    assert list(grid[0]) == ["optim.name", "train.global_batch", "seed"]


def test_grid_needs_an_end() -> None:
    with pytest.raises(
        UserError, match=r"optim\.lr is log_uniform: a grid would have no end\n.*optim\.lr: \[1e-05, 0\.01\]"
    ):
        space(EVERY_KIND).grid(0)
    with pytest.raises(UserError, match="1000000 combinations, expected at most 100000"):
        space({"seed": {"integer": [0, 999_999]}}).grid(0)


# Networks and their depth


@pytest.mark.parametrize("arch", list(ALL))
def test_depth_is_that_of_the_network(arch: str) -> None:
    config = tiny_config(arch)
    before = torch.random.get_rng_state()
    depth = depth_of(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    model = build_model(config.model, config.data.size, LabelSet())
    assert depth == model.depth >= 2


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
