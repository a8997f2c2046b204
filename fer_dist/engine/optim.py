"""Parameter groups, optimizers and learning-rate schedules."""

import math
from typing import Any

import torch
from torch import nn

from fer_dist.config import OptimConfig
from fer_dist.models.base import FaceModel

UNDECAYED = ("position_embeddings", "pos_embed", "_token", "bias_table")
"""Last parts of names that take no weight decay, beside all parameters of fewer than two dimensions."""


def parameter_groups(model: FaceModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Head and backbone, each with and without weight decay; frozen parameters are in none.

    Norms and biases (parameters of fewer than two dimensions) and position embeddings and class
    tokens are not decayed, after ViT's and MAE's recipes (Dosovitskiy et al. 2020, He et al. 2021).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(UNDECAYED)
            groups.setdefault((name in model.head_names, not plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "peak_lr": config.lr * (1.0 if head else config.backbone_lr_scale),
        }
        for (head, decays), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam (coupled decay) or AdamW, in their fused form."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused
        )
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)


class Schedule:
    """The factor on every group's peak learning rate.

    constant, cosine and one_cycle are functions of the step alone; plateau multiplies its own
    `scale` when the monitored score has not gained for more than `plateau_patience` epochs.
    """

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self._config = config
        self._steps = max(1, steps)
        self.scale = 1.0
        self.bad_epochs = 0

    def factor(self, step: int) -> float:
        """The factor at a step, 0-based."""
        config = self._config
        rise = config.warmup * self._steps
        if step < rise:
            start = 1 / 25 if config.schedule == "one_cycle" else 0.0
            done = (step + 1) / rise if config.schedule != "one_cycle" else step / rise
            if config.schedule == "one_cycle":
                done = (1 - math.cos(math.pi * done)) / 2
            return (start + (1 - start) * min(1.0, done)) * self.scale
        if config.schedule in ("cosine", "one_cycle"):
            done = min(1.0, (step - rise) / max(1.0, self._steps - 1 - rise))  # 1 at the last step
            final = config.final_lr_scale
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
        return self.scale

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Write the learning rates of a step; returns the head's."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.lr(step)

    def lr(self, step: int) -> float:
        """The head's learning rate at a step, 0-based."""
        return self._config.lr * self.factor(step)

    def epoch_end(self, gained: bool) -> None:
        """Tell plateau whether the epoch's monitored score was the best so far."""
        self.bad_epochs = 0 if gained else self.bad_epochs + 1
        if self._config.schedule == "plateau" and self.bad_epochs > self._config.plateau_patience:
            self.scale *= self._config.plateau_factor
            self.bad_epochs = 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "bad_epochs": self.bad_epochs}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self.bad_epochs = state["scale"], state["bad_epochs"]


class Ema:
    """A moving average of weights and running statistics, warmed up over the first steps.

    The decay at step t is min(decay, (1 + t) / (10 + t)), as in TensorFlow's
    ExponentialMovingAverage with num_updates.
    """

    def __init__(self, model: FaceModel, average: FaceModel, decay: float) -> None:
        self.model = average
        self._decay = decay
        state, averaged = model.state_dict(), average.state_dict()
        floats = [name for name, value in state.items() if value.is_floating_point()]
        self._live = [state[name] for name in floats]
        self._average = [averaged[name] for name in floats]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live weights after step `step` (0-based)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)
