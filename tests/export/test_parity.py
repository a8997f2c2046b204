"""`python -m export.parity A B`: any two artifacts."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.parity import main
from fer_dist.engine.checkpoint import load, save
from fer_dist.errors import EXIT_REJECTED, EXIT_USER_ERROR, UserError
from fer_dist.serve.artifact import file_sha256
from fer_dist.serve.runner import open_runner
from fer_dist.spec import LabelSet
from tests.conftest import ROOT
from tests.helpers.commands import Capture, Patch, refused
from tests.helpers.exporting import command, exported, names, nothing_changes, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pth and best.onnx, other.pth with another last layer, and faces.csv, a data set of nine pictures."""
    folder = tmp_path_factory.mktemp("parity")
    path = saved(folder, "vit")
    checkpoint = load(path)
    (folder / "best.onnx").write_bytes(exported(checkpoint.model(), file_sha256(path)).SerializeToString())
    changed = {name: value * (1.01 if "classifier" in name else 1) for name, value in checkpoint.weights.items()}
    save(folder / "other.pth", replace(checkpoint, weights=changed))
    rows = "\n".join(f"{i % 7},{' '.join([str(i * 7)] * 48 * 48)},PublicTest" for i in range(9))
    (folder / "faces.csv").write_text(f"emotion,pixels,Usage\n{rows}\n")
    return folder


def test_a_pair_that_is_the_same(folder: Path, capsys: Capture) -> None:
    with nothing_changes(folder):
        for pair in (("best.pth", "best.onnx"), ("best.onnx", "best.pth")):
            assert command(main, *(folder / name for name in pair)) == 0
            shown = capsys.readouterr().out
            assert ": passed\n" in shown
            assert "140 of 140, validation part of embedded drawn faces" in shown
            assert "not meaningful" not in shown
            assert "different checkpoints" not in shown


def test_a_pair_that_is_not(folder: Path, capsys: Capture) -> None:
    """Another checkpoint is only a message; that it is another function is the reason."""
    pair = (folder / "best.onnx", folder / "other.pth")
    assert command(main, *pair) == EXIT_REJECTED
    out, err = capsys.readouterr()
    assert "made from different checkpoints" in out
    assert "REJECTED: relative difference" in out
    assert err.startswith("rejected: ")
    assert "checkpoint" not in err.partition("relative")[2]
    assert command(main, *pair, "--tolerance", "relative=9,agreement=0,kl=9") == 0
    assert "loosened       relative=9, agreement=0, kl=9" in capsys.readouterr().out


def test_other_labels(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """In another order: a reason, however alike the numbers. Another count: nothing to compare."""
    checkpoint = load(folder / "best.pth")
    few = {name: value[:3] if "classifier" in name else value for name, value in checkpoint.weights.items()}
    for labels, weights, reason in (
        (sorted(checkpoint.spec.labels.names), checkpoint.weights, "its labels are angry, disgust, fear, happy,"),
        (["a", "b", "c"], few, "has 3 classes"),
    ):
        spec = replace(checkpoint.spec, labels=LabelSet(names=tuple(labels)))
        save(tmp_path / "renamed.pth", replace(checkpoint, spec=spec, weights=weights))
        assert command(main, folder / "best.pth", tmp_path / "renamed.pth") == EXIT_REJECTED
        assert reason in capsys.readouterr().err


def test_the_command_with_data(folder: Path, capsys: Capture) -> None:
    """--data and --limit; what is not there is refused."""
    words = [folder / "best.pth", folder / "best.onnx", "--data", folder / "faces.csv"]
    assert command(main, *words, "--limit", 4) == 0
    assert "4 of 9, validation part of" in capsys.readouterr().out
    for wrong in (
        [*words[:3], folder / "nothing.csv"],
        [folder / "best.pth", folder / "best.gone"],
        [*words, "--limit", "0"],
        [*words, "--tolerance", "x=1"],
    ):
        refused(capsys, main, *wrong)


@pytest.mark.usefixtures("few_faces")
def test_the_data_is_that_of_either_artifact(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """An ONNX file without its sidecar does not say on which data the model was judged."""
    shutil.copy(folder / "best.onnx", tmp_path)
    for other, meaningful in ((folder / "best.pth", True), (tmp_path / "best.onnx", False)):
        assert command(main, tmp_path / "best.onnx", other, "--limit", 3) == 0
        shown = capsys.readouterr().out
        assert ("not meaningful: these are not the pictures that the model was made for" in shown) != meaningful
    assert names(tmp_path) == ["best.onnx"]


def test_help_needs_no_heavy_package() -> None:
    """Not torch, onnx or TensorRT: so it takes no time."""
    code = """
import runpy, sys
sys.argv = ["x", "--help"]
for name in ("parity", "onnx", "trt"):
    try:
        runpy.run_module(f"export.{name}", run_name="__main__")
    except SystemExit as left:
        print("left", left.code)
print(sorted(set(sys.modules) & {"torch", "onnx", "numpy", "tensorrt", "tensorrt_rtx", "onnxruntime"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("parity", "onnx", "trt"):
        assert f"usage: python -m export.{name} " in done.stdout
    assert done.stdout.count("left 0\n") == done.stdout.count("  --tolerance TEXT") == 3
    assert done.stdout.endswith("[]\n")


def test_runners_are_closed(folder: Path, monkeypatch: Patch) -> None:
    """Also when the comparison fails in the middle."""
    opened = []

    def watched(*given: object, **named: object) -> object:
        opened.append(open_runner(*given, **named))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr("fer_dist.serve.runner.open_runner", watched)
    monkeypatch.setattr("export.answers.ask", lambda *given: (_ for _ in ()).throw(UserError("broken", "")))
    assert command(main, folder / "best.pth", folder / "best.onnx") == EXIT_USER_ERROR
    assert len(opened) == 2
    assert all(runner._closed for runner in opened)
