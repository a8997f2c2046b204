"""The file of a search space, read and checked.

    optim.lr: {log_uniform: [1.0e-5, 1.0e-2]}
    train.global_batch: {choice: [32, 64, 128]}
    model.freeze_depth: {integer: [0, null]}      # null: up to the architecture's own depth
    optim.name: [adam, adamw]                     # a list is a choice
    model.options: [{cut: 8}, {cut: 10}]          # options that belong together are one choice

Sections may be nested. Everything is checked before the first trial starts, with the bounds of `Config`
itself; what a trial is given is what its `Config` then holds.
"""

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.options import walk
from tune.space import KINDS, OPTIONS, Axis, Kind, Space, least_depth, value_of

BATCH, DEPTH = "train.global_batch", "model.freeze_depth"
SHAPING = ("model.arch", "model.image_size", "model.weights", OPTIONS)
"""What decides which network is built, and so how deep it is; below `model.options`, too."""
FIXED = (
    "train.epochs", "train.monitor", "train.flip_tta", "data.path", "data.ferplus", "data.cache_dir",
    "data.val_fraction", "data.embedded_val", "data.embedded_seed",
)  # fmt: skip
"""With all of `run`: the same for every trial of a search, or their scores could not be compared."""
MOST_NUMBERS = 1_000_000
"""Of an integer axis [values]."""

_FIELDS = dict(walk(Config))


def default_space(config: Config, workers: int) -> Space:
    """Learning rate, batch size and freeze depth around those of `config`.

    Args:
        workers: processes of one trial, which share its batches evenly.

    Raises:
        UserError: no batch size fits the workers; the network cannot be built.
    """
    lr, batch = config.optim.lr, config.train.global_batch
    halved = [batch // 2] if batch % 2 == 0 else []
    fitting = [size for size in (*halved, batch, 2 * batch) if size % workers == 0]
    if not fitting:
        raise UserError(
            f"{BATCH} is {batch}, and {workers} workers divide neither it nor its half nor its double",
            f"--{BATCH} {_multiple(batch, workers)}, or another number of workers",
        )
    tree = {
        "optim.lr": {"log_uniform": [float(f"{lr / 10:.12g}"), float(f"{lr * 10:.12g}")]},
        BATCH: {"choice": fitting},
        DEPTH: {"integer": [0, None]},
    }
    return space_of(tree, config, workers, "the default search space")


def read_space(path: Path, config: Config, workers: int) -> Space:
    """The search space in a YAML file; see `space_of`.

    Raises:
        UserError: no readable file, not YAML, a setting twice, or as `space_of`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _require_single_keys(yaml.compose(text, Loader=yaml.SafeLoader), str(path), set())
        tree = yaml.safe_load(text)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "name a YAML file such as `optim.lr: [0.001, 0.01]`"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or no such date or number
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", "put that line right") from None
    return space_of(tree, config, workers, str(path))


def space_of(tree: Mapping[str, Any], config: Config, workers: int, where: str) -> Space:
    """Check a search space; every value in it is one that `config.override` takes.

    Args:
        tree: setting -> values, as in the file, flat or nested.
        config: the settings that the trials start from.
        workers: processes of one trial, which share its batches evenly.
        where: what holds the tree, for messages.

    Raises:
        UserError: what is wrong, where, and what to write instead.
    """
    try:
        return _space(tree, config, workers)
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", error.fix) from None


def _require_single_keys(node: Any, where: str, seen: set[int]) -> None:
    """YAML's own reader keeps the last of two lines for one key, and says nothing."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):  # an alias may lead back
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for child in node.value:
        key, item = child if isinstance(node, yaml.MappingNode) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{where}: {key.value} is there twice, in lines {lines[key.value]} and {line}",
                    "leave one, with all its values",
                )
            lines[key.value] = line
        _require_single_keys(item, where, seen)


def _space(tree: Any, config: Config, workers: int) -> Space:
    if not isinstance(tree, Mapping) or not tree:
        found = "nothing" if not tree else f"a {type(tree).__name__}"
        raise UserError(
            f"found {found}, expected a mapping of settings to values",
            "write lines such as optim.lr: {log_uniform: [1.0e-5, 1.0e-2]}",
        )
    items: dict[str, Any] = {}
    for name, item in _named(tree):
        _require_searchable(name, config)
        for other in items:
            if other == name or other.startswith(f"{name}.") or name.startswith(f"{other}."):
                what = f"{name} is there twice" if other == name else f"{other} and {name} overlap"
                raise UserError(what, "leave one, with all its values")
        items[name] = item
    axes = {name: _axis(name, item, config) for name, item in items.items() if name != DEPTH}
    _require_shares(axes.get(BATCH), config, workers)
    shaping = [axis for axis in axes.values() if axis.name.startswith(SHAPING)]
    if shaping or DEPTH in items:
        depth = least_depth(shaping, config)
        if DEPTH in items:
            axes[DEPTH] = _axis(DEPTH, _to_depth(items[DEPTH], depth), config)
        deepest = max(axes[DEPTH].values or ()) if DEPTH in items else config.model.freeze_depth
        if deepest > depth:
            raise UserError(
                f"{DEPTH} goes up to {deepest}, but {'the smallest' if shaping else 'the'} network has {depth} blocks",
                f"{DEPTH}: {{integer: [0, {depth}]}}, where null means {depth}, too",
            )
    return Space(axes=tuple(axes[name] for name in items))


def _named(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with what stands beside it. Sections and `model.options` are opened, unless they hold a kind."""
    for key, item in tree.items():
        name = f"{prefix}{key}"
        group = name == OPTIONS or any(known.startswith(f"{name}.") for known in _FIELDS)
        if group and isinstance(item, Mapping) and not set(item) <= set(KINDS):
            yield from _named(item, f"{name}.")
        else:
            yield name, item


def _require_searchable(name: str, config: Config) -> None:
    if name not in _FIELDS:
        config.override({name: []})  # refuses what is unknown, and sections; not what is below model.options
    if name in FIXED or name.startswith("run."):
        raise UserError(
            f"{name} is the same for all trials of a search, it cannot be searched",
            f"take this line out; --{name} VALUE sets it for all",
        )


def _axis(name: str, item: Any, config: Config) -> Axis:
    kind, given = _kind_of(name, item)
    if kind != "choice":
        low, high = _range(name, kind, given, config)
        return Axis(name=name, kind=kind, low=low, high=high)
    values = [_value(name, value, config) for value in given]
    if not values:
        raise UserError(f"{name} has no value to choose from", _example(name))
    seen = [(isinstance(value, bool), value) for value in values]  # to Python, True is 1
    for index, value in enumerate(values):
        if seen[index] in seen[:index]:
            raise UserError(f"{name} has the value {value!r} twice", "leave one: each is equally likely")
    return Axis(name=name, kind="choice", choices=tuple(values))


def _kind_of(name: str, item: Any) -> tuple[Kind, Sequence[Any]]:
    if isinstance(item, list | tuple):
        return "choice", item
    if not isinstance(item, Mapping) or len(item) != 1:
        raise UserError(f"{name} is {item!r}, expected a list of values, or one of {', '.join(KINDS)}", _example(name))
    ((word, given),) = item.items()
    kind = next((kind for kind in KINDS if kind == word), None)
    if kind is None:
        near = difflib.get_close_matches(str(word), KINDS, n=1, cutoff=0.0)[0]
        raise UserError(f"{name}: unknown kind {word!r}, expected one of {', '.join(KINDS)}", f"did you mean {near!r}?")
    if not isinstance(given, list | tuple):
        raise UserError(f"{name}: {kind} of {given!r}, expected a list in brackets", _example(name, kind))
    return kind, given


def _range(name: str, kind: Kind, given: Sequence[Any], config: Config) -> tuple[float | int, float | int]:
    """The ends as the Config holds them: whole numbers for `integer`, else floats."""
    wanted = int if kind == "integer" else float
    held = _type_of(name)
    if held not in (wanted, None):
        draws = "whole numbers" if wanted is int else "fractions"
        raise UserError(f"{name}: {kind} draws {draws}, which this setting does not hold", _example(name))
    if len(given) != 2:
        raise UserError(
            f"{name}: {kind} of {len(given)} numbers, expected the lowest and highest", _example(name, kind)
        )
    ends = []
    for end in given:
        number = _value(name, end, config)
        whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
        if isinstance(number, bool) or not (whole or (wanted is float and isinstance(number, float))):
            raise UserError(
                f"{name}: {kind} with an end {end!r}, expected a {'whole ' * (wanted is int)}number",
                _example(name, kind),
            )
        ends.append(wanted(number))
    low, high = ends
    if low > high or (low == high and wanted is float):
        below = "below" if wanted is float else "not above"
        raise UserError(
            f"{name}: {kind} from {low} to {high}, expected the lowest {below} the highest",
            f"{name}: {{{kind}: [{high}, {low}]}}" if low > high else f"{name}: [{low}]",
        )
    if kind == "log_uniform" and low <= 0:
        raise UserError(
            f"{name}: log_uniform from {low}, expected more than 0",
            f"a lowest value such as {high / 1000 if high > 0 else 1e-5:g}, or uniform",
        )
    if high - low >= MOST_NUMBERS and wanted is int:
        raise UserError(
            f"{name}: {int(high - low) + 1} whole numbers, expected at most {MOST_NUMBERS}", "bring the ends closer"
        )
    return low, high


def _value(name: str, found: Any, config: Config) -> Any:
    """The value as the Config holds it."""
    try:
        value = value_of(config.override({name: found}), name)
        again = value_of(config.override({name: value}), name)
    except RecursionError:  # an alias of YAML
        raise UserError(f"{name}: a value holds itself", "write it without an alias") from None
    if not _finite(value):
        raise UserError(f"{name} is {found!r}, expected a finite number", _example(name))
    if again != value:
        raise UserError(f"{name} is {found!r}: quotes inside of quotes", f"write {again!r} without any")
    return value


def _finite(value: Any) -> bool:
    if isinstance(value, Mapping | list):
        return all(_finite(item) for item in (value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, int | float) or math.isfinite(value)


def _type_of(name: str) -> Any:
    """What a setting holds, besides None; None: it is below `model.options`, where anything may be."""
    if name not in _FIELDS:
        return None
    kind = _FIELDS[name].type
    return next(arg for arg in get_args(kind) if arg is not type(None)) if isinstance(kind, types.UnionType) else kind


def _example(name: str, kind: Kind | None = None) -> str:
    """What to write."""
    if kind is None:
        kind = {float: KINDS[0], int: KINDS[2]}.get(_type_of(name))
    ranged = f"{name}: {{{kind}: [LOW, HIGH]}}"
    return ranged if kind not in ("choice", None) else f"{name}: [VALUE, VALUE]"


def _require_shares(axis: Axis | None, config: Config, workers: int) -> None:
    """Every batch size that can come up is one that the workers of a trial share evenly."""
    sizes = (config.train.global_batch,) if axis is None else axis.values or ()
    wrong = [size for size in sizes if size % workers]
    if not wrong:
        return
    fitting = sorted({size if size % workers == 0 else _multiple(size, workers) for size in sizes})
    shown = ", ".join(map(str, wrong[:5])) + ", ..." * (len(wrong) > 5)
    some = ", ".join(map(str, fitting[:: -(-len(fitting) // 5)]))
    raise UserError(
        f"{BATCH}: {workers} workers of a trial do not divide {shown}",
        f"these would fit: {some}; {BATCH}: [{some}]" if axis else f"--{BATCH} {some}, or another number of workers",
    )


def _multiple(batch: int, workers: int) -> int:
    """The multiple of `workers` that is nearest to `batch`."""
    return max(1, round(batch / workers)) * workers


def _to_depth(item: Any, depth: int) -> Any:
    """`{integer: [0, null]}` with the architecture's depth for null."""
    if isinstance(item, Mapping) and isinstance(ends := item.get("integer"), list | tuple) and [*ends[1:]] == [None]:
        return {**item, "integer": [ends[0], depth]}
    return item
