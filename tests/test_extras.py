"""Packages that not every machine can have: a missing one is an error that names its extra."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from fer_dist.errors import UserError
from fer_dist.extras import require

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize(("module", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")])
def test_a_missing_package_names_its_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extra in EXTRAS
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "path", [])  # as on a machine without it, wherever this runs
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:3])  # the built-in finders; not an editable install's
    with pytest.raises(UserError) as caught:
        require(module, extra=extra)
    assert caught.value.problem == f"the package {module!r} is not installed"
    assert f"pip install 'fer-dist[{extra}]'" in caught.value.fix
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('libnvinfer.so.11: cannot open shared object file')", "libnvinfer.so.11"),
        ("raise ImportError('undefined symbol: x')", "undefined symbol"),
        ("import fer_dist_no_such_library", "No module named 'fer_dist_no_such_library'"),
    ],
)
def test_a_broken_package_says_why(source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fer_dist_broken.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="is installed but does not load") as caught:
        require("fer_dist_broken", extra="tensorrt")
    assert reason in caught.value.problem
    assert "fer-dist[tensorrt]" in caught.value.fix


def test_what_is_there_is_imported() -> None:
    assert require("json", extra="none") is sys.modules["json"]


def test_every_extra_that_the_code_names_exists() -> None:
    files = [path for package in ("fer_dist", "export", "tune") for path in (ROOT / package).rglob("*.py")]
    calls = [
        node
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "require"
    ]
    named = {word.value.value for call in calls for word in call.keywords if isinstance(word.value, ast.Constant)}
    assert named <= set(EXTRAS)
