"""Parameter groups, optimizers, schedules and the moving average, without training anything long."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from fer_dist.config import Config, OptimConfig
from fer_dist.engine.optim import Ema, Schedule, build_optimizer, parameter_groups
from fer_dist.models import FaceModel
from tests.helpers.tiny_models import ALL, pictures, tiny_model


def optim(**values: Any) -> OptimConfig:
    return Config().override({f"optim.{name}": value for name, value in values.items()}).optim


def optimizer_of(model: FaceModel, **values: Any) -> torch.optim.Optimizer:
    config = optim(**values)
    return build_optimizer(parameter_groups(model, config), config)


def by_name(model: FaceModel, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Parameter name -> the group that holds it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len(placed) == len(dict(placed)), "a parameter is in two groups"
    return dict(placed)


# -- groups


@pytest.mark.parametrize("arch", ALL)
def test_every_trained_parameter_is_in_one_group_at_its_rate(arch: str) -> None:
    model = tiny_model(arch)
    placed = by_name(model, parameter_groups(model, optim(lr=0.5, backbone_lr_scale=0.1)))
    assert set(placed) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {name: group["peak_lr"] for name, group in placed.items()}
    assert {name for name, rate in rates.items() if rate == 0.5} == model.head_names
    assert {rate for name, rate in rates.items() if name not in model.head_names} == {0.5 * 0.1}


@pytest.mark.parametrize("arch", ALL)
def test_norms_biases_positions_and_class_tokens_are_not_decayed(arch: str) -> None:
    """Which are decayed is found from the modules: the weights of linear layers, convolutions and attention."""
    model = tiny_model(arch)
    placed = by_name(model, parameter_groups(model, optim(weight_decay=0.1)))
    decayed = {name for name, group in placed.items() if group["weight_decay"]}
    assert {group["weight_decay"] for group in placed.values()} == {0.0, 0.1}
    expected = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            expected.add(f"{prefix}.weight")
        elif isinstance(module, nn.MultiheadAttention):
            expected.add(f"{prefix}.in_proj_weight")
    assert decayed == expected


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("vit", ["model.vit.embeddings.cls_token", "model.vit.embeddings.position_embeddings"]),
        ("vit_mae", ["encoder.embeddings.cls_token"]),
        ("timm:vit_tiny_patch16_224", ["cls_token", "pos_embed"]),
    ],
)
def test_embeddings_of_many_dimensions_are_not_decayed(arch: str, names: list[str]) -> None:
    """The test above would be blind to a name that has gone."""
    model = tiny_model(arch)
    placed = by_name(model, parameter_groups(model, optim(weight_decay=0.1)))
    for name in names:
        assert model.network.get_parameter(name).ndim == 3
        assert placed[f"network.{name}"]["weight_decay"] == 0


@pytest.mark.parametrize("arch", ALL)
def test_frozen_parameters_are_in_no_group(arch: str) -> None:
    model = tiny_model(arch, freeze_depth=2)
    placed = by_name(model, parameter_groups(model, optim()))
    assert not set(placed) & {name for stage in model.stages[:3] for name in stage}
    assert set(placed) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_the_head_is_left_when_all_blocks_are_frozen() -> None:
    model = tiny_model("timm:resnet18", freeze_depth=8)
    assert set(by_name(model, parameter_groups(model, optim()))) == model.head_names


# -- optimizers


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizer_is_the_one_named_and_fused(name: str, kind: type) -> None:
    optimizer = optimizer_of(tiny_model("patt_lite"), name=name, weight_decay=0.1, momentum=0.8)
    assert type(optimizer) is kind
    assert all(group["fused"] is True for group in optimizer.param_groups)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    if name == "sgd":
        assert all((group["momentum"], group["nesterov"]) == (0.8, True) for group in optimizer.param_groups)
    else:
        assert all(group["betas"] == (0.8, 0.999) for group in optimizer.param_groups)


def test_sgd_without_momentum() -> None:
    optimizer = optimizer_of(tiny_model("patt_lite"), name="sgd", momentum=0.0)
    assert all((group["momentum"], group["nesterov"]) == (0.0, False) for group in optimizer.param_groups)


def moved(name: str, **values: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The head's weight before and after one step with a gradient of ones, and the rate."""
    model = tiny_model("patt_lite")
    config = optim(name=name, lr=0.01, schedule="constant", **values)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    rate = Schedule(config, 10).set(optimizer, 0)
    weight = model.network.get_parameter("classifier.weight")
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return before, weight.detach(), rate


def test_step_of_each_optimizer_by_hand() -> None:
    before, after, rate = moved("sgd", momentum=0.9, weight_decay=0.1)
    gradient = 1 + 0.1 * before  # coupled decay; Nesterov's first step is (1 + momentum) of it
    assert torch.allclose(after, before - rate * 1.9 * gradient, atol=1e-6)
    before, after, rate = moved("adam", weight_decay=0.1)  # decay is in the gradient, whose size Adam divides out
    assert torch.allclose(after, before - rate * (1 + 0.1 * before).sign(), atol=1e-6)
    before, after, rate = moved("adamw", weight_decay=0.1)  # decay beside the gradient
    assert torch.allclose(after, before * (1 - rate * 0.1) - rate, atol=1e-6)


# -- schedules


def factors(steps: int, **values: Any) -> list[float]:
    schedule = Schedule(optim(**values), steps)
    return [schedule.factor(step) for step in range(steps)]


def test_constant() -> None:
    assert factors(5, schedule="constant") == [1.0] * 5
    assert factors(10, schedule="constant", warmup=0.5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


def test_cosine_by_hand() -> None:
    assert factors(5, schedule="cosine", final_lr_scale=0.0) == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    assert factors(5, schedule="cosine", final_lr_scale=0.2) == pytest.approx([1, 0.8828427, 0.6, 0.3171573, 0.2])


def test_cosine_with_warm_up() -> None:
    got = factors(100, schedule="cosine", warmup=0.1, final_lr_scale=0.01)
    assert got[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(got) == 1.0
    assert all(a > b for a, b in itertools.pairwise(got[10:]))
    assert got[-1] == pytest.approx(0.01)
    assert got[10 + 45] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 45 / 89)) / 2)


def test_one_cycle_against_torch() -> None:
    steps, lr, warmup, final = 50, 0.3, 0.2, 0.01
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    # torch rises until step pct_start * total - 1; ours until warmup * total.
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=lr,
        total_steps=steps,
        pct_start=(warmup * steps + 1) / steps,
        final_div_factor=1 / (25 * final),
    )
    ours = Schedule(optim(schedule="one_cycle", lr=lr, warmup=warmup, final_lr_scale=final), steps)
    for step in range(steps):
        assert lr * ours.factor(step) == pytest.approx(theirs.get_last_lr()[0]), f"step {step}"
        optimizer.step()
        if step < steps - 1:
            theirs.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "plateau"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.9])
def test_factors_of_short_runs_are_sane(schedule: str, steps: int, warmup: float) -> None:
    got = factors(steps, schedule=schedule, warmup=warmup)
    assert all(0 < factor <= 1 for factor in got)
    beyond = Schedule(optim(schedule=schedule, warmup=warmup), steps).factor(steps + 5)  # a run that goes on
    assert 0 < beyond <= 1


def test_plateau_counts_epochs_without_gain() -> None:
    schedule = Schedule(optim(schedule="plateau", plateau_factor=0.1, plateau_patience=2), 100)
    seen = []
    for gained in (True, False, False, True, False, False, False, False, False, False):
        schedule.epoch_end(gained)
        seen.append(schedule.factor(0))
    assert seen == pytest.approx([1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_against_torch(patience: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=0)
    ours = Schedule(optim(schedule="plateau", plateau_factor=0.5, plateau_patience=patience), 100)
    best = math.inf
    for loss in (5.0, 4.0, 4.5, 4.4, 4.3, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.0, 3.1):
        theirs.step(loss)
        ours.epoch_end(loss < best)
        best = min(best, loss)
        assert ours.factor(0) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_only_plateau_listens_to_scores() -> None:
    for name in ("constant", "cosine", "one_cycle"):
        schedule = Schedule(optim(schedule=name), 100)
        before = schedule.factor(3)
        for _ in range(10):
            schedule.epoch_end(False)
        assert schedule.factor(3) == before


def test_plateau_state_goes_into_a_checkpoint_and_back() -> None:
    config = optim(schedule="plateau", plateau_patience=2)
    schedule = Schedule(config, 100)
    for _ in range(4):
        schedule.epoch_end(False)
    again = Schedule(config, 100)
    again.load(copy.deepcopy(schedule.state()))
    for _ in range(4):
        assert again.factor(0) == schedule.factor(0)
        schedule.epoch_end(False)
        again.epoch_end(False)
    assert schedule.factor(0) < 0.5


def test_set_writes_every_group_and_names_the_rate_of_the_head() -> None:
    model = tiny_model("patt_lite")
    config = optim(lr=0.4, backbone_lr_scale=0.25, schedule="constant", warmup=0.5)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    assert Schedule(config, 10).set(optimizer, 1) == pytest.approx(0.4 * 0.4)
    placed = by_name(model, optimizer.param_groups)
    for name, group in placed.items():
        assert group["lr"] == pytest.approx(0.4 * 0.4 * (1 if name in model.head_names else 0.25))


# -- the moving average


def averaged(decay: float) -> tuple[FaceModel, Ema]:
    model = tiny_model("patt_lite")
    return model, Ema(model, copy.deepcopy(model), decay)


def scatter(model: FaceModel) -> None:
    """Move the weights and the running statistics."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape))
        model.train()(pictures(4))


def test_ema_follows_its_formula() -> None:
    model, ema = averaged(0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(12):
        scatter(model)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    got = ema.model.state_dict()
    running = [name for name in got if name.endswith("running_var")]
    assert running, "no running statistics to average"
    for name, value in expected.items():
        if value.is_floating_point():
            assert torch.allclose(got[name], value, atol=1e-4, rtol=1e-4), name
            assert name not in running or not torch.equal(got[name], model.state_dict()[name])


def test_ema_reaches_its_decay_after_the_warm_up() -> None:
    for decay, step in ((0.9, 80), (0.9, 10_000), (0.999, 8990)):
        model, ema = averaged(decay)
        before = ema.model.network.get_parameter("classifier.weight").clone()
        with torch.no_grad():
            model.network.get_parameter("classifier.weight").add_(1)
        ema.update(step)
        after = ema.model.network.get_parameter("classifier.weight")
        assert (after - before).mean().item() == pytest.approx(1 - decay, rel=1e-3)


def test_ema_leaves_the_live_weights_and_frozen_ones_alone() -> None:
    model = tiny_model("patt_lite", freeze_depth=3)
    ema = Ema(model, copy.deepcopy(model), 0.9)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(5):
        ema.update(step)
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, live[name]) for name, value in ema.model.state_dict().items())
