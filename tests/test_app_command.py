"""The command: what it refuses, and what of the shell it takes away."""

import subprocess
import sys
from pathlib import Path

import pytest

from fer_dist.app import closed_environment, main
from fer_dist.serve import shipped
from tests.conftest import ROOT


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["app", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch) == 2
    assert capsys.readouterr().err.endswith("there is no runs/*/best.pth\n  -> make demo, or --model FILE\n")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--model", "none.pth"), "none.pth"),
        (("--model", "notes.txt"), "ends in none of"),
        (("--port", "0"), "0 is not a port within 1..65535"),
        (("--port", "http"), "http is not a port"),
        (("--share",), "unrecognized arguments: --share"),
    ],
)
def test_refused(
    argv: tuple[str, ...],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert problem in err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, fer_dist.app\nsys.argv = ['app', '--help']\n"
        "try: fer_dist.app.main()\nexcept SystemExit: print(sorted({'torch', 'gradio', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "--no-browser" in done.stdout


def test_gradios_settings_of_the_shell_are_gone() -> None:
    shell = {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "HOME": "/root"}
    closed_environment(Path("uploads"), shell)
    assert shell == {
        "HOME": "/root",
        "GRADIO_TEMP_DIR": "uploads",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
