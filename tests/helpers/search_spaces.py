"""Spaces for the tests of what a space is and of how it is read."""

from typing import Any

from fer_dist.config import Config
from tune.space import Axis, Space
from tune.spacefile import space_of

EVERY_KIND: dict[str, Any] = {
    "optim.lr": {"log_uniform": ["1e-5", 1.0e-2]},
    "data.augment.mixup": {"uniform": [0, 0.4]},
    "optim.plateau_patience": {"integer": [0, 4]},
    "train.global_batch": {"choice": [32, 64, 128]},
    "optim.name": ["adam", "adamw"],
    "model.image_size": {"choice": [None, 96]},
    "model.options.cut": [8, 10],
    "train.compile": [True, False],
}


def space(tree: Any, config: Config | None = None, workers: int = 1) -> Space:
    return space_of(tree, config or Config(), workers, "here.yaml")


def axis(item: Any, name: str) -> Axis:
    (made,) = space({name: item}).axes
    return made
