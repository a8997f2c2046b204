"""What passes the gate gets its name, what fails does not, and nothing is half-written whatever happens."""

import errno
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import maker, precision, trt
from export import onnx as onnx_command
from export.console import Wish
from export.delivery import workshop
from export.pipeline import export
from export.precision import CannotRewriteError, Form
from fer_dist.errors import EXIT_REJECTED, EXIT_USER_ERROR, Rejected, UserError
from fer_dist.models import FaceModel
from fer_dist.serve.artifact import read_sidecar
from fer_dist.serve.runner import open_runner
from tests.helpers.exporting import command, content, exported, names, nothing_changes, saved

LOOSE = ("--tolerance", "agreement=0,accuracy=0.5,kl=9")
"""Random weights answer two classes almost alike: that a picture in fifty goes the other way says nothing."""


def plain(path: Path) -> dict[str, Any]:
    """A JSON file beside an artifact."""
    found: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text())
    return found


# -- the gate


def off_by(factor: float) -> Callable[[FaceModel, str], onnx.ModelProto]:
    """An exporter that gets the last layer wrong."""

    def export_wrongly(model: FaceModel, checkpoint_sha256: str) -> onnx.ModelProto:
        return scaled(exported(model, checkpoint_sha256), factor)

    return export_wrongly


def scaled(graph: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The same graph, but for its last layer."""
    for tensor in graph.graph.initializer:
        if "classifier" in tensor.name and len(tensor.dims) == 2:
            values = (factor * numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return graph


@pytest.mark.usefixtures("exported_before")
def test_what_fails_never_gets_its_name(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3, the file as *.rejected with its report; the engine is not even tried; a good one clears away."""
    for name in ("best.onnx", "best.onnx.json"):
        (copy / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maker, "to_onnx", off_by(1.001))
        assert command(trt.main, copy / "best.pth", "--backend", "rtx") == EXIT_REJECTED
    out, err = capsys.readouterr()
    assert names(copy) == ["best.onnx.rejected", "best.onnx.rejected.json", "best.pth"]
    assert err.startswith("rejected: best.onnx")
    assert "relative difference" in err
    assert "REJECTED: relative difference" in out
    told = json.loads((copy / "best.onnx.rejected.json").read_text())
    assert told["parity"]["passed"] is False
    assert "relative difference" in told["parity"]["reasons"][0]
    assert told["sha256"] == hashlib.sha256((copy / "best.onnx.rejected").read_bytes()).hexdigest()
    assert command(onnx_command.main, copy / "best.pth", "--limit", 5) == 0
    assert names(copy) == ["best.onnx", "best.onnx.json", "best.pth"]


@pytest.mark.usefixtures("exported_before")
def test_the_tolerance_lets_it_pass_and_is_recorded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maker, "to_onnx", off_by(1.001))
    assert command(onnx_command.main, copy / "best.pth", "--tolerance", "relative=0.1") == 0
    told = read_sidecar(copy / "best.onnx").parity
    assert told["passed"] is True
    assert told["tolerance"]["loosened"] == ["relative=0.1"]
    assert told["tolerance"]["relative"] == 0.1


@pytest.mark.usefixtures("exported_before")
def test_one_that_passed_before_stays(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(copy)
    monkeypatch.setattr(maker, "to_onnx", off_by(1.001))
    assert command(onnx_command.main, copy / "best.pth") == EXIT_REJECTED
    assert "best.onnx, which was there before, is another one and stays" in capsys.readouterr().out
    after = content(copy)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"best.onnx.rejected", "best.onnx.rejected.json"}


def test_of_two_forms_one_fails(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other is delivered, and the exit code says that one failed."""

    def to_int8(model: onnx.ModelProto, images: Any, *, form: Form, judge: Any) -> Any:
        made, notes, calibration = precision.to_int8(model, images, form=form, judge=judge)
        return (scaled(made, -1) if form == "int8" else made), notes, calibration

    monkeypatch.setattr(maker, "to_int8", to_int8)
    words = ["--precision", "int8", "--calibration", "20", "--tolerance", "agreement=0,accuracy=0.5,kl=0.05"]
    assert command(onnx_command.main, copy / "best.onnx", *words) == EXIT_REJECTED
    found = [name for name in names(copy) if "int8" in name and "json" not in name]
    assert found == ["best.int8.cpu.onnx", "best.int8.onnx.rejected"]


class Executing:
    """A builder whose engines are said to run here."""

    executes = True
    batch = (1, 8, 64)

    def build(self, raw: bytes, name: str, spec: object) -> tuple[bytes, dict[str, Any]]:
        return b"engine", {"backend": "rtx"}

    def told(self) -> str:
        return "a stand-in"


@pytest.mark.parametrize("good", [True, False])
def test_an_engine_that_is_executed_is_judged_itself(good: bool, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own numbers stand in its report; what it is computed with here is the graph, or one that is wrong."""
    wrong = copy / "wrong.onnx"
    wrong.write_bytes(scaled(onnx.load(copy / "best.onnx"), 2).SerializeToString())
    asked = []

    def opened(path: Path, provider: str = "auto") -> Any:
        if path.suffix == ".engine":
            asked.append(read_sidecar(path))
            path = copy / "best.onnx" if good else wrong
        return open_runner(path, provider=provider)

    monkeypatch.setattr(maker, "open_runner", opened)
    wish = Wish(path=copy / "best.onnx")
    if good:
        assert export(wish, Executing()) == [copy / "best.engine"]
    else:
        with pytest.raises(Rejected, match=r"best\.engine"):
            export(wish, Executing())
    (beside,) = asked
    assert (beside.kind, beside.batch, beside.parent) == ("engine", (1, 8, 64), "best.onnx"), "a runner needs it"
    told = plain(copy / ("best.engine" if good else "best.engine.rejected"))
    assert told["parity"]["executed"] is True
    assert told["parity"]["passed"] is good
    assert told["parity"]["candidate"].startswith("best.engine (")
    assert not (copy / ("best.engine.rejected" if good else "best.engine")).exists()


# -- nothing half-written


@pytest.mark.usefixtures("exported_before")
@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), None), (RuntimeError("a mistake of ours"), None), (UserError("x", "y"), EXIT_USER_ERROR)],
)
@pytest.mark.parametrize("where", ["to_onnx", "compare", "deliver", "to_int8"])
def test_nothing_is_left_after_an_exception(
    error: BaseException, code: int | None, where: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **named: object) -> None:
        assert any(path.name.startswith(".export-") for path in copy.iterdir()), "in the middle of the work"
        raise error

    monkeypatch.setattr(maker, where, fail)
    path = copy / ("best.onnx" if where == "to_int8" else "best.pth")
    words = ["--limit", 5, *(["--precision", "int8"] if where == "to_int8" else [])]
    with nothing_changes(copy):
        if code:
            assert command(onnx_command.main, path, *words) == code
        else:
            with pytest.raises(type(error)):
                onnx_command._main([str(path), *map(str, words)])


def test_sigterm_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(number: int, frame: object) -> None:  # or a failure would end all the tests
        raise AssertionError("the signal was not awaited")

    monkeypatch.setattr(maker, "to_onnx", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with nothing_changes(copy):
            assert command(onnx_command.main, copy / "best.pth", "--limit", 5) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is ours, "given back"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("exported_before")
def test_interrupted_between_the_artifact_and_its_json_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only moment at which something has its name already."""

    def replaced(self: Path, target: Path) -> Path:
        if target.name == "best.onnx.json":
            assert (tmp_path / "best.onnx").exists()
            raise KeyboardInterrupt
        return rename(self, target)

    path, rename = saved(tmp_path, "vit"), Path.replace
    monkeypatch.setattr(Path, "replace", replaced)
    with nothing_changes(tmp_path), pytest.raises(KeyboardInterrupt):
        onnx_command._main([str(path), "--limit", "5"])


def test_what_a_killed_export_left_goes_a_day_later(tmp_path: Path) -> None:
    old, new = tmp_path / ".export-old", tmp_path / ".export-new"
    for path in (old, new):
        path.mkdir()
        (path / "best.onnx").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    with workshop(tmp_path) as shop:
        assert set(tmp_path.iterdir()) == {new, shop}
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.usefixtures("exported_before")
@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (CannotRewriteError("there is no layer to quantise"), "cannot be made fp16: there is no layer to quantise"),
        (OSError(errno.ENOSPC, "No space left on device"), "fp16: no temporary file: No space left on device"),
    ],
)
def test_what_a_rewriter_cannot_do_is_told(
    failure: Exception, said: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(maker, "to_float16", fail)
    with nothing_changes(copy), pytest.raises(UserError, match=said):
        export(Wish(path=copy / "best.onnx", precision="fp16", tolerance="agreement=0.5"))


@pytest.mark.usefixtures("exported_before")
def test_a_good_artifact_outlives_one_that_cannot_be_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails between the two names: the artifact of before is back, and its JSON file is about it."""
    before, rename = content(copy), Path.replace

    def replaced(self: Path, target: Path) -> Path:
        if target.name == "best.onnx.json":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    with pytest.raises(UserError, match="Input/output error"):
        export(Wish(path=copy / "best.pth"))
    assert content(copy) == before
