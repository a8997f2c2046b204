"""Parameter groups, optimizers and schedules; the moving average is in test_train_step.py."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from fer_dist.config import Config, OptimConfig
from fer_dist.engine.optim import Schedule, build_optimizer, parameter_groups
from fer_dist.models import FaceModel
from tests.helpers.tiny_models import ALL, tiny_model


def optim(**values: Any) -> OptimConfig:
    return Config().override({f"optim.{name}": value for name, value in values.items()}).optim


def by_name(model: FaceModel, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return parameter name -> the group that holds it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len(placed) == len(dict(placed)), "a parameter is in two groups"
    return dict(placed)


@pytest.mark.parametrize("arch", ALL)
def test_every_trained_parameter_is_in_one_group(arch: str) -> None:
    """Decay is for the weights of linear layers, convolutions and attention, which are found from the modules."""
    model = tiny_model(arch)
    placed = by_name(model, parameter_groups(model, optim(lr=0.5, backbone_lr_scale=0.1, weight_decay=0.1)))
    assert set(placed) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, group in placed.items():
        assert group["peak_lr"] == (0.5 if name in model.head_names else 0.5 * 0.1)
    expected = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            expected.add(f"{prefix}.weight")
        elif isinstance(module, nn.MultiheadAttention):
            expected.add(f"{prefix}.in_proj_weight")
    assert {name for name, group in placed.items() if group["weight_decay"] == 0.1} == expected
    assert {name for name, group in placed.items() if group["weight_decay"] == 0} == set(placed) - expected
    model.freeze(2)
    placed = by_name(model, parameter_groups(model, optim()))
    assert set(placed) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not set(placed) & {name for stage in model.stages[:3] for name in stage}


def test_optimizer_is_the_named_one_and_fused() -> None:
    for name, momentum, kind, options in (
        ("sgd", 0.8, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("sgd", 0.0, torch.optim.SGD, {"momentum": 0.0, "nesterov": False}),
        ("adam", 0.8, torch.optim.Adam, {"betas": (0.8, 0.999)}),
        ("adamw", 0.8, torch.optim.AdamW, {"betas": (0.8, 0.999)}),
    ):
        config = optim(name=name, weight_decay=0.1, momentum=momentum)
        optimizer = build_optimizer(parameter_groups(tiny_model("patt_lite"), config), config)
        assert type(optimizer) is kind
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
        for group in optimizer.param_groups:
            assert {**options, "fused": True}.items() <= group.items()


def factors(steps: int, **values: Any) -> list[float]:
    schedule = Schedule(optim(**values), steps)
    return [schedule.factor(step) for step in range(steps)]


def test_schedules_by_hand() -> None:
    assert factors(5, schedule="constant") == [1.0] * 5
    assert factors(10, schedule="constant", warmup=0.5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])
    assert factors(5, schedule="cosine", final_lr_scale=0.0) == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    warmed = factors(10, schedule="cosine", warmup=0.5, final_lr_scale=0.2)
    assert warmed == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.8828427, 0.6, 0.3171573, 0.2])
    # torch's OneCycleLR of 10 steps with pct_start=0.6 and final_div_factor=4, which rises until step 0.6 * 10 - 1
    cycle = factors(10, schedule="one_cycle", warmup=0.5, final_lr_scale=0.01)
    theirs = [0.04, 0.13167, 0.37167, 0.66833, 0.90833, 1.0, 0.85502, 0.505, 0.15498, 0.01]
    assert cycle == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(("schedule", "scaled"), [("constant", 1), ("cosine", 1), ("one_cycle", 1), ("plateau", 0.5)])
def test_factors_are_in_0_to_1_and_only_plateau_depends_on_scores(schedule: str, scaled: float) -> None:
    """In short runs, too, and in a run that has more steps than the schedule."""
    for steps, warmup in itertools.product([1, 2, 3, 10], [0.0, 0.25, 0.9]):
        made = Schedule(optim(schedule=schedule, warmup=warmup, plateau_factor=0.5, plateau_patience=0), steps)
        before = [made.factor(step) for step in range(steps + 5)]
        assert all(0 < factor <= 1 for factor in before), (steps, warmup)
        made.epoch_end(False)
        assert [made.factor(step) for step in range(steps + 5)] == [scaled * factor for factor in before]


@pytest.mark.parametrize("patience", [0, 3])
def test_plateau_against_torch(patience: int) -> None:
    """Through a checkpoint after each epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=0)
    config = optim(schedule="plateau", plateau_factor=0.5, plateau_patience=patience)
    ours, best = Schedule(config, 100), math.inf
    for loss in (5.0, 4.0, 4.5, 4.4, 4.3, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.0, 3.1):
        theirs.step(loss)
        ours.epoch_end(loss < best)
        best = min(best, loss)
        resumed = Schedule(config, 100)
        resumed.load(copy.deepcopy(ours.state()))
        ours = resumed
        assert ours.factor(0) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.factor(0) < 1
