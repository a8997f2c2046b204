"""The command line of the trainer: `--config NAME_OR_PATH`, dotted overrides, `--help`."""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from fer_dist.config import Config, load_config
from fer_dist.errors import (
    EXIT_RANK_LOST,
    EXIT_REJECTED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    RankLost,
    Rejected,
    Stopped,
    UserError,
)
from fer_dist.options import bounds, recipes, walk

ALIASES = {"--data": "--data.path"}
LAST_WORD_S = 20.0
"""How long the other ranks wait, at most, for rank 0 to print a UserError and leave."""


class Parser(argparse.ArgumentParser):
    """argparse for the commands that take no settings; its errors are UserErrors."""

    def __init__(self, prog: str, about: str) -> None:
        super().__init__(
            prog=prog, description=about, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"{self.prog} --help")


def parse(argv: Sequence[str], *, prog: str, about: str, recipe: str = "demo") -> Config:
    """Turn arguments into a Config. `--help` and `--print-config` print and leave with 0.

    Args:
        recipe: what `--config` is where it is not given.

    Raises:
        UserError: an unknown argument or setting, or a bad value.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_help(prog, about))
        raise SystemExit(0)
    words = list(argv)
    show = False
    values: dict[str, str] = {}
    while words:
        if words[0] == "--print-config":
            show = bool(words.pop(0))
            continue
        key, value = _next_setting(words)
        if key == "config":
            recipe = value
        else:
            values.pop(key, None)  # the last one wins, in its own place of the order
            values[key] = value
    config = load_config(recipe, values)
    if show:
        print(config.to_yaml(), end="")
        raise SystemExit(0)
    return config


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command; a UserError is printed once, by rank 0, and the exit code is 2. Others: see `errors`."""
    try:
        main()
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        code = EXIT_STOPPED
    except RankLost as lost:
        print(f"error: rank {os.environ.get('RANK', '0')}: another rank is gone ({lost})", file=sys.stderr, flush=True)
        code = EXIT_RANK_LOST
    except Rejected as rejected:
        print(f"rejected: {rejected}", file=sys.stderr, flush=True)
        code = EXIT_REJECTED
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            _let_rank_0_speak()
        code = EXIT_USER_ERROR
    else:
        code = 0
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process with an exit code; everything must be written and closed by now.

    A rank goes without the interpreter's clean-up: there, native threads of the libraries abort the
    process now and then ("terminate called without an active exception", twice in some forty launches
    with torch 2.14 and gloo), and a finished run would look like a crash, or be started again.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    raise SystemExit(code)


def _let_rank_0_speak() -> None:
    """Wait until torchrun ends this rank, which it does when rank 0 has left; it would end rank 0 the same way."""
    signal.signal(signal.SIGTERM, lambda *_: leave(EXIT_USER_ERROR))
    time.sleep(LAST_WORD_S)


def _next_setting(words: list[str]) -> tuple[str, str]:
    """Take `--name value`, `--name=value` or, for a switch, `--name` off the front of `words`."""
    word = words.pop(0)
    flag, has_value, value = word.partition("=")
    name = ALIASES.get(flag, flag).removeprefix("--")
    if not flag.startswith("--") or not name:
        raise UserError(f"unexpected argument {word!r}", "settings look like --optim.lr 3e-4; --help lists all")
    if has_value:
        return name, value
    if words and not words[0].startswith("--"):  # -3 is a value
        return name, words.pop(0)
    kinds = {"config": str} | {known: f.type for known, f in walk(Config)}
    if kinds.get(name, bool) is bool:  # a bare switch; of an unknown name, that it is unknown is the news
        return name, "true"
    raise UserError(f"{flag} needs a value", f"{flag} VALUE; a value that begins with -- needs {flag}=VALUE")


def _help(prog: str, about: str) -> str:
    lines = [
        f"usage: {prog} [--config NAME_OR_PATH] [--SETTING VALUE]...",
        "",
        about,
        "",
        "  --config NAME_OR_PATH  recipe or YAML file; default: demo",
        f"                         recipes: {', '.join(recipes())}",
        "  --data PATH            short for --data.path PATH",
        "  --print-config         print the resolved settings as YAML and leave",
        "",
        "settings (default and bounds; a recipe may set another default):",
    ]
    part = ""
    for name, f in walk(Config):
        if name.rpartition(".")[0] != part:
            part = name.rpartition(".")[0]
            lines.append("")
        default = {} if f.default is dataclasses.MISSING else f.default
        shown = {"None": "none", "True": "true", "False": "false"}.get(str(default), default)
        limits = f"; {bounds(f)}" if bounds(f) else ""
        lines.append(f"  --{name} {_kind(f.type)}  ({shown}{limits})")
        lines.append(f"        {f.metadata['help']}")
    return "\n".join(lines)


def _kind(kind: Any) -> str:
    """What to type: the choices, or the kind of value."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    args = [arg for arg in get_args(kind) if arg is not type(None)]
    base = args[0] if args and get_origin(kind) is not dict else kind
    return {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}.get(base, "MAPPING")
