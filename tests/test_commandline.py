"""The command line: aliases, values of every look, errors that appear once, help that is quick."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fer_dist.commandline import parse, run
from fer_dist.config import Config, load_config
from fer_dist.errors import EXIT_USER_ERROR, UserError
from fer_dist.options import bounds, recipes, walk

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, "-m", "fer_dist.train"]


def parsed(*words: str) -> Config:
    return parse(words, prog="prog", about="About it.")


def test_nothing_is_the_demo() -> None:
    assert parsed() == load_config("demo")


@pytest.mark.parametrize("words", [["--config", "vit"], ["--config=vit"], ["--config", "demo", "--config", "vit"]])
def test_a_recipe_by_name(words: list[str]) -> None:
    assert parsed(*words) == load_config("vit")


def test_a_recipe_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 0.25}\n", encoding="utf-8")
    assert parsed("--config", str(path)) == Config().override({"optim.lr": 0.25})


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--data", "x.csv"], "data.path", "x.csv"),
        (["--data=x.csv"], "data.path", "x.csv"),
        (["--data.path=x.csv"], "data.path", "x.csv"),
        (["--data", "a=b.csv"], "data.path", "a=b.csv"),
        (["--data=a=b.csv"], "data.path", "a=b.csv"),
        (["--data=--odd"], "data.path", "--odd"),
        (["--data.path", "a", "--data", "b"], "data.path", "b"),
        (["--data", "a", "--data.path", "b"], "data.path", "b"),
        (["--data.ferplus", "v.csv"], "data.ferplus", "v.csv"),
        (["--optim.lr", "3e-4"], "optim.lr", 3e-4),
        (["--optim.lr", "1", "--optim.lr", "2"], "optim.lr", 2.0),
        (["--train.compile"], "train.compile", True),
        (["--train.compile", "--run.name", "none"], "train.compile", True),
        (["--train.compile", "true"], "train.compile", True),
        (["--run.tensorboard=false"], "run.tensorboard", False),
        (["--run.tensorboard", "false"], "run.tensorboard", False),
        (["--run.name", "none"], "run.name", None),
        (["--run.name", "-3"], "run.name", "-3"),
        (["--model.options.depth", "-3"], "model.options", {"depth": -3}),
        (["--model.options", "{a: 1}", "--model.options.b", "2"], "model.options", {"a": 1, "b": 2}),
        (["--model.options.b", "2", "--model.options", "{a: 1}"], "model.options", {"a": 1}),
        (["--model.options", "{a: 1}", "--model.options.b", "2", "--model.options", "{}"], "model.options", {}),
    ],
)
def test_settings(words: list[str], name: str, value: object, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.touch()
    assert parsed(*words, "--config", str(empty)) == Config().override({name: value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fer2013.csv"], "unexpected argument 'fer2013.csv'"),
        (["-x"], "unexpected argument '-x'"),
        (["--"], "unexpected argument '--'"),
        (["--=3"], "unexpected argument '--=3'"),
        (["--optim.lr"], "--optim.lr needs a value\n  -> --optim.lr VALUE"),
        (["--optim.lr", "--seed", "3"], "--optim.lr needs a value"),
        (["--data"], "--data needs a value\n  -> --data VALUE"),
        (["--data", ""], "data.path is '', expected a text"),  # an unset variable of the shell
        (["--data="], "data.path is '', expected a text"),
        (["--run.name", "--x"], "a value that begins with -- needs --run.name=VALUE"),
        (["--config"], "--config needs a value"),
        (["--config", "vitt"], "no recipe and no readable file is called 'vitt'"),
        (["--optim.lrr", "3"], "did you mean 'optim.lr'?"),
        (["--optim.lrr"], "did you mean 'optim.lr'?"),
        (["--optim", "3"], "optim is a section, not a value"),
        (["--optim.lr", "-3"], "optim.lr is -3.0, expected > 0"),
        (["--train.compile", "maybe"], "train.compile is 'maybe', expected true or false"),
        (["--print-config=false"], "unknown setting 'print-config'"),
        (["--train.global_batch", "1" + "0" * 400], "train.global_batch: a number is too large"),
        (["--model.options.cut", "1" + "0" * 400], "model.options.cut: a number is too large"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize("recipe", recipes())
def test_print_config_loads_back(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", recipe, "--model.options.depth", "2", "--data", "x y.csv"]
    with pytest.raises(SystemExit) as caught:
        parsed(*words, "--print-config")
    assert caught.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert parsed("--config", str(path)) == parsed(*words)


def test_help_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("--optim.lrr", "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for name, f in walk(Config):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  --{name} "))
        assert bounds(f) in lines[at]
        assert lines[at + 1].strip() == f.metadata["help"]
    assert all(recipe in shown for recipe in recipes())
    assert "--data PATH" in shown
    assert "--optim.name {adamw,adam,sgd}  (adamw)" in shown
    assert "--run.name TEXT  (none)" in shown
    assert "--model.options MAPPING  ({})" in shown
    assert max(map(len, lines)) <= 120


def test_help_is_quick() -> None:
    """At most a quarter of `import torch`; the least of several goes, taken in turns, on a busy machine."""
    torch_goes, help_goes = [], []
    for _ in range(3):
        torch_goes.append(_seconds([sys.executable, "-c", "import torch"]))
        help_goes.append(_seconds([*TRAIN, "--help"]))
    assert min(help_goes) <= min(torch_goes) / 4, f"help {min(help_goes):.2f} s, torch {min(torch_goes):.2f} s"


def _seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


@pytest.mark.parametrize("rank", [None, "0", "1", "3"])
def test_an_error_appears_once_and_the_code_is_2(rank: str | None) -> None:
    ranked = {} if rank is None else {"RANK": rank, "WORLD_SIZE": "4"}
    done = subprocess.run(
        [*TRAIN, "--optim.lrr", "3"], cwd=ROOT, env=os.environ | ranked, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_USER_ERROR == 2
    assert done.stdout == ""
    shown = "error: unknown setting 'optim.lrr'\n  -> did you mean 'optim.lr'? --help lists all\n"
    assert done.stderr == (shown if rank in (None, "0") else "")


def _nothing() -> None:
    pass


def _user_error() -> None:
    raise UserError("wrong", "do this")


@pytest.mark.parametrize(
    ("main", "code", "message"), [(_nothing, 0, ""), (_user_error, 2, "error: wrong\n  -> do this\n")]
)
def test_run(main: Callable[[], None], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == message


def test_our_own_mistakes_keep_their_traceback() -> None:
    def broken() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run(broken)
