"""The search space: which settings are searched, among which values, and what a trial gets of them.

`tune.spacefile` reads one and checks it. Values are a function, not a state: that of a setting follows from
the seed, the number of the trial and its name, whatever else is searched.
"""

import copy
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

Kind = Literal["uniform", "log_uniform", "integer", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)

OPTIONS = "model.options"
MOST_NETWORKS = 64
"""So many networks are tried at most before a search starts [networks]; each takes about 0.1 s."""
MOST_COMBINATIONS = 100_000
"""Of a grid [trials]."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting and its values: from `low` to `high`, both inclusive, or `choices`."""

    name: str
    kind: Kind
    low: float | int | None = None
    high: float | int | None = None
    choices: tuple[Any, ...] = ()

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values; None: there is no end of them."""
        if self.kind == "choice":
            return self.choices
        low, high = self._ends()
        return tuple(range(int(low), int(high) + 1)) if self.kind == "integer" else None

    def at(self, part: float) -> Any:
        """The value at a part of the way along the axis, 0 <= part < 1; its own copy, if it is a mapping."""
        if self.kind == "choice":
            return copy.deepcopy(self.choices[int(part * len(self.choices))])
        low, high = self._ends()
        if self.kind == "integer":
            return int(low) + int(part * (high - low + 1))
        if self.kind == "log_uniform":
            value = math.exp((1 - part) * math.log(low) + part * math.log(high))
        else:
            value = (1 - part) * low + part * high  # high - low could be infinite
        return min(max(value, low), high)  # rounding may step out

    @property
    def probes(self) -> tuple[Any, ...]:
        """The choices; of a range the ends, and the number after the lowest, which shows what must be a multiple."""
        if self.kind == "choice":
            return self.choices
        low, high = self._ends()
        return low, *([low + 1] if self.kind == "integer" and low < high else []), high

    def to_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {self.kind: copy.deepcopy(list(self.choices)) if self.kind == "choice" else [self.low, self.high]}

    def _ends(self) -> tuple[float | int, float | int]:
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high


@dataclass(frozen=True, kw_only=True)
class Space:
    """All axes of a search, checked; made by `tune.spacefile.space_of`."""

    axes: tuple[Axis, ...]

    @property
    def names(self) -> list[str]:
        """The settings, in order."""
        return [axis.name for axis in self.axes]

    def sample(self, seed: int, number: int) -> dict[str, Any]:
        """The values of trial `number`, by dotted name: the same in every process, whatever was drawn before."""
        return {axis.name: axis.at(_part(seed, number, axis.name)) for axis in self.axes}

    def grid(self, seed: int) -> list[dict[str, Any]]:
        """Every combination once, in an order shuffled by the seed.

        Raises:
            UserError: there is no end of them, or there are more than MOST_COMBINATIONS.
        """
        pools: list[tuple[Any, ...]] = []
        for axis in self.axes:
            if axis.values is None:
                raise UserError(
                    f"{axis.name} is {axis.kind}: a grid would have no end",
                    f"{axis.name}: [{axis.low}, {axis.high}], or more values; or search at random",
                )
            pools.append(axis.values)
        total = math.prod(map(len, pools))
        if total > MOST_COMBINATIONS:
            raise UserError(
                f"the grid has {total} combinations, expected at most {MOST_COMBINATIONS}",
                "give fewer values, or search at random",
            )
        combinations = list(itertools.product(*pools))
        names = [axis.name for axis in self.axes]
        order = np.random.default_rng(seed).permutation(total)
        return [dict(zip(names, copy.deepcopy(combinations[index]), strict=True)) for index in order]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML; `space_of` makes an equal space of them."""
        return {axis.name: axis.to_dict() for axis in self.axes}


def depth_of(config: Config) -> int:
    """The number of blocks of the network, without the memory of its weights.

    Raises:
        UserError: there is no such network.
    """
    import torch

    from fer_dist.models import build, build_spec

    with torch.device("meta"):
        return build(build_spec(config.model, config.data.size, LabelSet())).depth


def least_depth(shaping: Sequence[Axis], config: Config) -> int:
    """The depth of the least deep network that these axes lead to; each is built once, without weights.

    Of more than MOST_NETWORKS, so many are picked: a trial with any other says itself what is wrong.

    Raises:
        UserError: one of them cannot be built.
    """
    pools = [axis.probes for axis in shaping]
    if math.prod(map(len, pools)) <= MOST_NETWORKS:
        picked = list(itertools.product(*pools))
    else:
        random = np.random.default_rng(0)
        picked = [tuple(pool[random.integers(len(pool))] for pool in pools) for _ in range(MOST_NETWORKS)]
    depths = []
    for combination in picked:
        values = {axis.name: value for axis, value in zip(shaping, combination, strict=True)}
        try:
            depths.append(depth_of(config.override(values)))
        except UserError as error:
            told = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UserError(
                f"{error.problem} (with {told})" if told else error.problem,
                f"{error.fix}; what belongs together is one choice, {OPTIONS}: [{{...}}, {{...}}]"
                if told
                else error.fix,
            ) from None
    return min(depths)


def value_of(config: Config, name: str) -> Any:
    """What a config holds under a dotted name, as `config.override` takes it."""
    node: Any = config
    for part in name.split("."):
        node = node[part] if isinstance(node, Mapping) else getattr(node, part)
    return node


def _part(seed: int, number: int, name: str) -> float:
    """0 <= part < 1, a function of its arguments; a new axis leaves the values of the others as they were."""
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return float(np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream])).random())
