"""The command line: aliases, values of every look, errors that appear once, help that loads nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fer_dist.commandline import parse, run
from fer_dist.config import Config, load_config
from fer_dist.console import SPLIT_CODES
from fer_dist.data.faces import SPLITS
from fer_dist.errors import UserError
from fer_dist.options import bounds, recipes, walk
from tests.conftest import ROOT
from tests.helpers.processes import python
from tests.test_import_order import ENTRIES


def parsed(*words: str) -> Config:
    return parse(words, prog="prog", about="About it.")


def test_a_recipe_by_name() -> None:
    assert parsed() == load_config("demo")
    for words in (["--config", "vit"], ["--config=vit"], ["--config", "demo", "--config", "vit"]):
        assert parsed(*words) == load_config("vit")
    assert parsed("--optim.lr", "0.5", "--config", "vit").optim.lr == 0.5, "settings come after the recipe"


def test_settings(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.touch()
    for name, value, *lines in (
        ("data.path", "x.csv", "--data x.csv", "--data.path=x.csv"),
        ("data.path", "a=b.csv", "--data a=b.csv", "--data=a=b.csv"),
        ("data.path", "--odd", "--data=--odd"),
        ("data.path", "b", "--data.path a --data b", "--data a --data.path b"),  # the last one wins
        ("optim.lr", 3e-4, "--optim.lr 3e-4", "--optim.lr 1 --optim.lr 3e-4"),
        ("train.compile", True, "--train.compile", "--train.compile --run.name none", "--train.compile true"),
        ("run.tensorboard", False, "--run.tensorboard=false", "--run.tensorboard false"),
        ("run.name", None, "--run.name none"),
        ("run.name", "-3", "--run.name -3"),
        ("model.options", {"depth": -3}, "--model.options.depth -3"),
        ("model.options", {"a": 1, "b": 2}, '--model.options {"a":1} --model.options.b 2'),
        ("model.options", {"a": 1}, '--model.options.b 2 --model.options {"a":1}'),
        ("model.options", {}, '--model.options {"a":1} --model.options.b 2 --model.options {}'),
    ):
        for line in lines:
            assert parsed(*str(line).split(), "--config", str(empty)) == Config().override({str(name): value}), line


def test_refusals() -> None:
    for line, message in (
        ("fer2013.csv", "unexpected argument 'fer2013.csv'"),
        ("-x", "unexpected argument '-x'"),
        ("--=3", "unexpected argument '--=3'"),
        ("--optim.lr", "--optim.lr needs a value\n  -> --optim.lr VALUE"),
        ("--optim.lr --seed 3", "--optim.lr needs a value"),
        ("--data", "--data needs a value\n  -> --data VALUE"),
        ("--data ", "data.path is '', expected a text"),  # an unset variable of the shell
        ("--data=", "data.path is '', expected a text"),
        ("--run.name --x", "a value that begins with -- needs --run.name=VALUE"),
        ("--config", "--config needs a value"),
        ("--print-config=false", "unknown setting 'print-config'"),
        ("--train.global_batch 1" + "0" * 400, "train.global_batch: a number is too large"),
    ):
        with pytest.raises(UserError) as caught:
            parsed(*line.split(" "))
        assert message in str(caught.value)


def test_print_config_loads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "printed.yaml"
    words = ["--config", "vit", "--model.options.depth", "2", "--data", "x y.csv"]
    with pytest.raises(SystemExit) as caught:
        parsed(*words, "--print-config")
    assert caught.value.code == 0
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


HELP = """
import contextlib, io, runpy, sys
heavy = {"torch", "numpy", "matplotlib", "PIL", "jinja2", "rich", "gradio", "onnx", "onnxruntime", "transformers"}
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as left:
            assert left.code == 0
    assert "usage: " in shown.getvalue(), name
    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))
"""


def test_the_help_of_every_command_loads_nothing_heavy() -> None:
    """Start a real interpreter: its imports are tested. fer_dist.launch is torchrun; tune.search needs numpy."""
    names = [name for name in ENTRIES if name not in ("fer_dist.launch", "tune.search")]
    done = subprocess.run([sys.executable, "-c", HELP, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {name: SPLITS.index(name) for name in SPLIT_CODES} == SPLIT_CODES, "the copy without numpy"


@pytest.mark.parametrize("rank", [None, "3"])
def test_an_error_appears_once_and_the_code_is_2(rank: str | None) -> None:
    ranked = {} if rank is None else {"RANK": rank, "WORLD_SIZE": "4"}
    done = python("-m", "fer_dist.train", "--optim.lrr", "3", env=os.environ | ranked)
    assert (done.code, done.out) == (2, "")
    shown = "error: unknown setting 'optim.lrr'\n  -> did you mean 'optim.lr'? --help lists all\n"
    assert done.err == ("" if rank else shown)


def test_success_is_0_and_an_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(SystemExit) as caught:
        run(lambda: None)
    assert caught.value.code == 0
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 / 0))
