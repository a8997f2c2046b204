"""How settings are read: typed, bounded dataclass fields behind dotted names.

Plain Python, so that `--help` and a wrong key answer before torch is imported.
"""

import dataclasses
import difflib
import math
import numbers
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml

from fer_dist.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its meaning and bounds; `default` may be a factory such as `dict`."""
    metadata = {"help": help, "low": low, "high": high, "above": above}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type[Any]) -> Any:
    """A nested group of fields."""
    return dataclasses.field(default_factory=kind)


def bounds(f: "dataclasses.Field[Any]") -> str:
    """`">= 0 and <= 1"`; empty for an option without bounds."""
    signs = {"low": ">=", "above": ">", "high": "<="}
    return " and ".join(f"{sign} {f.metadata[key]}" for key, sign in signs.items() if f.metadata[key] is not None)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of options. Values are checked when it is made, wherever they come from."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not is_dataclass(f.type):
                object.__setattr__(self, f.name, _checked(f, getattr(self, f.name), f.name))

    def override(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values, dotted (`{"optim.lr": 3e-4}`) or nested (`{"optim": {"lr": 3e-4}}`).

        Strings are converted to the type of the field.

        Raises:
            UserError: unknown name (the nearest is shown), wrong type, out of bounds.
        """
        changed: Self = self
        for name, value in values.items():
            changed = _replaced(changed, str(name).split("."), value, type(self), str(name))
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole section as YAML; `load_config` reads it back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def walk(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Every option below a section, with its dotted name, in order of declaration."""
    for f in fields(kind):
        if is_dataclass(f.type):
            yield from walk(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{f.name}", f


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_yaml(name_or_path: str) -> dict[str, Any]:
    """A recipe by name, or a YAML file by path, as nested mappings.

    Raises:
        UserError: there is no such recipe or file, or it is not a mapping in YAML.
    """
    known = recipes()
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and path.is_file():  # bytes that are no text
            raise UserError(f"{path} is not YAML: {error}", "give --config a YAML file") from None
        near = difflib.get_close_matches(name_or_path, known, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"no recipe and no readable file is called {name_or_path!r}",
            f"{guess}--config takes one of {', '.join(known)}, or the path of a YAML file",
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", "put that line right") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(
            f"{path} holds a {type(tree).__name__}, expected a mapping such as `optim: {{lr: 0.001}}`",
            "--print-config shows a whole one",
        )
    return tree or {}


def _replaced(node: Any, path: Sequence[str], value: Any, root: type[Any], name: str) -> Any:
    """`node` with the value at `path` replaced; `name` is the whole name below `root`, for messages."""
    head, rest = path[0], path[1:]
    f = {f.name: f for f in fields(node)}.get(head)
    if f is None:
        raise _unknown(root, name)
    inner = getattr(node, head)
    if is_dataclass(f.type):
        if rest:
            inner = _replaced(inner, rest, value, root, name)
        elif value is None or isinstance(value, Mapping):  # None: `optim:` with nothing below it, in YAML
            for key, item in (value or {}).items():
                inner = _replaced(inner, str(key).split("."), item, root, f"{name}.{key}")
        else:
            raise UserError(
                f"{name} is a section, not a value",
                f"name one of its fields: {', '.join(f'{name}.{g.name}' for g in fields(f.type))}",
            )
    elif not rest:
        inner = _checked(f, value, name)
    elif f.type == dict[str, Any] and all(rest):
        inner = _checked(f, _with_key(inner, rest, _spelt(value)), name)
    else:
        raise _unknown(root, name)
    return dataclasses.replace(node, **{head: inner})


def _with_key(tree: Any, path: Sequence[str], value: Any) -> dict[str, Any]:
    old = tree if isinstance(tree, dict) else {}
    return {**old, path[0]: _with_key(old.get(path[0]), path[1:], value) if path[1:] else value}


def _unknown(root: type[Any], name: str) -> UserError:
    """The error for a name that is no setting, with the nearest that is.

    Close are: the same last part, in another section; its initials (learning_rate: lr); a word of
    it (batch_size: global_batch); what the help text calls so; after these, similar spelling.
    """
    typed = name.replace("-", "_").lower()
    leaf = typed.rpartition(".")[2]
    words = [word for word in leaf.split("_") if word]

    def closeness(item: "tuple[str, dataclasses.Field[Any]]") -> float:
        known, f = item
        own = known.rpartition(".")[2]
        score = _alike(typed, known) + _alike(leaf, own)
        score += own in (leaf, "".join(word[0] for word in words))
        score += 0.5 * bool(set(words) & set(own.split("_")))
        score += 0.3 * (typed.rpartition(".")[0] == known.rpartition(".")[0])
        return score + (bool(words) and " ".join(words) in f.metadata["help"].lower())

    nearest = max(walk(root), key=closeness)[0]
    return UserError(f"unknown setting {name!r}", f"did you mean {nearest!r}? --help lists all")


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _spelt(value: Any) -> Any:
    """A string from the command line as the YAML value that it spells ("3e-4" is a number, too)."""
    if not isinstance(value, str):
        return value
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            continue
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _plain(value: Any) -> Any:
    """Only what YAML and a checkpoint hold: numpy's numbers and tuples are converted, dates become text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):
        number = float(value)  # refuses a whole number that is too large for it, too
        return int(value) if isinstance(value, numbers.Integral) else number
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _checked(f: "dataclasses.Field[Any]", value: Any, name: str) -> Any:
    """The value converted to the type of the field, and within its bounds."""
    kind: Any = f.type
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    try:
        value = _converted(kind, value, name)
        finite = kind not in (int, float) or math.isfinite(value)
    except OverflowError:  # hundreds of digits
        raise UserError(f"{name}: a number is too large", "write a smaller one") from None
    if kind in (int, float):
        low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
        wrong = (low is not None and value < low) or (high is not None and value > high)
        if wrong or (above is not None and value <= above) or not finite:
            expected = bounds(f) or "a finite number"
            raise UserError(f"{name} is {value}, expected {expected}", f"{name}: {f.metadata['help']}")
    return value


def _converted(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is Literal:
        return _chosen(get_args(kind), value, name)
    if kind == dict[str, Any]:
        value = _spelt(value)
        if isinstance(value, Mapping):
            return _plain(value)
    elif kind is bool:
        word = str(value).lower()
        if word in ("true", "false"):
            return word == "true"
    elif kind is str:
        if isinstance(value, str | Path) and str(value).strip():
            return str(value)
    elif kind in (int, float) and not isinstance(value, bool):
        converted = _number(kind, value)
        if converted is not None:
            return converted
    expected, fix = {
        int: ("a whole number", "write it in digits, such as 64"),
        float: ("a number", "write it such as 0.001 or 1e-3"),
        bool: ("true or false", "write true or false"),
        str: ("a text", "name something; a number in a YAML file needs quotes"),
    }.get(kind, ("a mapping", f"write {name}.KEY VALUE, or {{KEY: VALUE}}"))
    raise UserError(f"{name} is {value!r}, expected {expected}", fix)


def _chosen(choices: tuple[str, ...], value: Any, name: str) -> str:
    for choice in choices:
        if value == choice:
            return choice
    near = difflib.get_close_matches(str(value), choices, n=1) or [choices[0]]
    raise UserError(f"{name} is {value!r}, expected one of {', '.join(choices)}", f"{name} {near[0]}, for example")


def _number(kind: Callable[[Any], Any], value: Any) -> Any:
    if kind is int and isinstance(value, int | str):
        try:
            return int(value)
        except ValueError:
            pass  # "64.0" and "1e3" are whole, too
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number
