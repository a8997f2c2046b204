"""`python -m fer_dist.app`: arguments that are refused, and the shell's settings of Gradio, which are removed."""

from pathlib import Path

from fer_dist.app import closed_environment, main
from fer_dist.serve import shipped
from tests.helpers.commands import Capture, Patch, refused


def test_wrong_arguments_are_refused(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    for words, problem in (
        ((), "there is no runs/*/best.pth\n  -> make demo, or --model FILE\n"),
        (("--model", "none.pth"), "none.pth"),
        (("--model", "notes.txt"), "ends in none of"),
        (("--port", "0"), "0 is not a port within 1..65535"),
        (("--port", "http"), "http is not a port"),
        (("--share",), "unrecognized arguments: --share"),
    ):
        err = refused(capsys, main, *words)
        assert err.startswith("error: ")
        assert problem in err


def test_gradios_settings_of_the_shell_are_gone() -> None:
    shell = {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "HOME": "/root"}
    closed_environment(Path("uploads"), shell)
    assert shell == {
        "HOME": "/root",
        "GRADIO_TEMP_DIR": "uploads",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
