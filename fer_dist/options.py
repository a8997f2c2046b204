"""How settings are read: typed, bounded dataclass fields behind dotted names.

Plain Python, so that `--help` and a wrong key answer before torch is imported.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterator, Mapping
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


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of options. Values are checked when it is made, wherever they come from."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not is_dataclass(f.type):
                object.__setattr__(self, f.name, _checked(f, getattr(self, f.name), f.name))

    def override(self, values: Mapping[str, Any]) -> Self:
        """A copy with dotted names replaced, e.g. `{"optim.lr": 3e-4}`; strings are converted.

        Raises:
            UserError: unknown name (the nearest is shown), wrong type, out of bounds.
        """
        changed: Self = self
        for name, value in values.items():
            changed = _replaced(changed, name, name.split("."), value)
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole section as YAML; `load_config` reads it back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` -> `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def walk(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Every option below a section, with its dotted name, in order of declaration."""
    for f in fields(kind):
        if is_dataclass(f.type):
            yield from walk(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{f.name}", f


def read_yaml(name_or_path: str) -> dict[str, Any]:
    """A recipe by name, or a YAML file by path, as dotted names.

    Raises:
        UserError: there is no such recipe or file, or it is not a mapping in YAML.
    """
    recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in recipes else Path(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"no recipe and no readable file is called {name_or_path!r} ({error.strerror})",
            f"--config with one of {', '.join(recipes)}, or with the path of a YAML file",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", "put the file right") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, expected a mapping", "see --print-config")
    return flatten(tree or {})


def _replaced(node: Any, full_name: str, path: list[str], value: Any) -> Any:
    head, rest = path[0], path[1:]
    known = {f.name: f for f in fields(node)}
    f = known.get(head)
    if f is None or (rest and not is_dataclass(f.type) and f.type != dict[str, Any]):
        raise _unknown(full_name)
    if is_dataclass(f.type):
        if not rest:
            raise UserError(
                f"{full_name} is a section, not a value",
                f"name one of its fields: {', '.join(f'{full_name}.{g.name}' for g in fields(f.type))}",
            )
        return dataclasses.replace(node, **{head: _replaced(getattr(node, head), full_name, rest, value)})
    if rest:  # a key of a free dictionary
        value = getattr(node, head) | {".".join(rest): _plain(value)}
    return dataclasses.replace(node, **{head: _checked(f, value, full_name)})


def _unknown(name: str) -> UserError:
    from fer_dist.config import Config

    names = [known for known, _ in walk(Config)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    same_end = [known for known in names if known.split(".")[-1] == name.split(".")[-1]]
    return UserError(f"unknown setting {name!r}", f"did you mean {(same_end or near)[0]!r}? --help lists all")


def _plain(value: Any) -> Any:
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


def _checked(f: "dataclasses.Field[Any]", value: Any, name: str) -> Any:
    kind: Any = f.type
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    value = _converted(kind, value, name)
    low, high, above = (f.metadata.get(key) for key in ("low", "high", "above"))
    if isinstance(value, int | float) and not isinstance(value, bool):
        wrong = value != value or (low is not None and value < low) or (high is not None and value > high)
        if wrong or (above is not None and value <= above):
            bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
            bounds += [f"> {above}"] * (above is not None)
            raise UserError(f"{name} is {value}, expected {' and '.join(bounds) or 'a number'}", f.metadata["help"])
    return value


def _converted(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UserError(f"{name} is {value!r}, expected one of {', '.join(map(str, get_args(kind)))}", "choose one")
    if kind == dict[str, Any]:
        value = _plain(value)
        if isinstance(value, dict):
            return dict(value)
    elif kind is bool:
        word = str(value).lower()
        if word in ("true", "false"):
            return word == "true"
    elif kind is str and isinstance(value, str | Path):
        return str(value)
    elif kind in (int, float) and not isinstance(value, bool):
        converted = _number(kind, value)
        if converted is not None:
            return converted
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise UserError(f"{name} is {value!r}, expected {wanted.get(kind, 'a mapping')}", "see --help")


def _number(kind: Callable[[Any], Any], value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number
