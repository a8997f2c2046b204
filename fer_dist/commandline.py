"""The command line of the trainer: `--config NAME_OR_PATH`, dotted overrides, `--help`."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args, get_origin

from fer_dist.config import Config, load_config
from fer_dist.errors import EXIT_USER_ERROR, UserError
from fer_dist.options import RECIPES, walk

ALIASES = {"--data": "--data.path"}


def parse(argv: Sequence[str], *, prog: str, about: str) -> Config:
    """Turn arguments into a Config. `--help` and `--print-config` print and leave with 0.

    Raises:
        UserError: an unknown argument or setting, or a bad value.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_help(prog, about))
        raise SystemExit(0)
    kinds = {name: f.type for name, f in walk(Config)}
    values: dict[str, Any] = {}
    recipe, show = "demo", False
    words = list(argv)
    while words:
        word = words.pop(0)
        key, has_value, value = word.partition("=")
        key = ALIASES.get(key, key)
        if key == "--print-config":
            show = True
            continue
        if not key.startswith("--"):
            raise UserError(f"unexpected argument {word!r}", "settings look like --optim.lr 3e-4; see --help")
        if not has_value:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif kinds.get(key[2:]) is bool:
                value = "true"
            else:
                raise UserError(f"{key} needs a value", f"{key} VALUE")
        if key == "--config":
            recipe = value
        else:
            values[key[2:]] = value
    config = load_config(recipe, values)
    if show:
        print(config.to_yaml(), end="")
        raise SystemExit(0)
    return config


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command; a UserError is printed once, by rank 0, and the exit code is 2."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def _help(prog: str, about: str) -> str:
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    lines = [
        f"usage: {prog} [--config NAME_OR_PATH] [--SETTING VALUE]...",
        "",
        about,
        "",
        f"  --config NAME_OR_PATH  recipe ({recipes}) or YAML file; default: demo",
        "  --data PATH            short for --data.path PATH",
        "  --print-config         print the resolved settings as YAML and leave",
        "",
        "settings (default; a recipe may set another):",
    ]
    for name, f in walk(Config):
        default = {} if f.default is dataclasses.MISSING else f.default
        lines.append(f"  --{name} {_kind(f.type)}  ({'none' if default is None else default})")
        lines.append(f"        {f.metadata['help']}")
    return "\n".join(lines)


def _kind(kind: Any) -> str:
    if str(get_origin(kind)) == "typing.Literal":
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    args = [arg for arg in get_args(kind) if arg is not type(None)]
    base = args[0] if args and get_origin(kind) is not dict else kind
    return {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}.get(base, "MAPPING")
