"""What passes the gate gets its name, what fails does not, and nothing is half-written whatever happens."""

import contextlib
import errno
import hashlib
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from export import maker, precision, trt
from export import onnx as onnx_command
from export.console import Wish
from export.delivery import workshop
from export.pipeline import export
from export.precision import CannotRewriteError, Form
from fer_dist.errors import EXIT_REJECTED, Rejected, UserError
from fer_dist.serve.artifact import read_sidecar
from fer_dist.serve.runner import open_runner
from tests.helpers.commands import Capture, Patch
from tests.helpers.exporting import command, content, exported, names, nothing_changes, sidecar_of
from tests.helpers.onnx_graphs import constants, set_constant

# -- the gate


def scaled(graph: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The same graph, but for its last layer."""
    for name, values in constants(graph).items():
        if "classifier" in name and values.ndim == 2:
            set_constant(graph, name, factor * values)
    return graph


def test_a_rejected_graph_gets_another_name_and_the_old_one_stays(
    copy: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """No engine is built of it, and a graph that passes later removes it."""
    before = content(copy)
    monkeypatch.setattr(maker, "to_onnx", lambda *given: scaled(exported(*given), 1.001))
    assert command(trt.main, copy / "best.pth", "--backend", "rtx") == EXIT_REJECTED
    out, err = capsys.readouterr()
    assert err.startswith("rejected: best.onnx")
    assert "REJECTED: relative difference" in out
    assert "best.onnx, which was there before, is another one and stays" in out
    after = content(copy)
    assert {name: after.pop(name) for name in before} == before
    assert set(after) == {"best.onnx.rejected", "best.onnx.rejected.json"}
    report = sidecar_of(copy / "best.onnx.rejected")
    assert "relative difference" in report["parity"]["reasons"][0]
    assert report["sha256"] == hashlib.sha256(after["best.onnx.rejected"]).hexdigest()
    monkeypatch.setattr(maker, "to_onnx", exported)
    assert command(onnx_command.main, copy / "best.pth", "--limit", 5) == 0
    assert names(copy) == ["best.onnx", "best.onnx.json", "best.pth"]


def test_of_two_forms_one_fails(copy: Path, monkeypatch: Patch) -> None:
    """The other is delivered, and the exit code says that one failed."""

    def to_int8(model: onnx.ModelProto, images: Any, *, form: Form, judge: Any) -> Any:
        made, notes, calibration = precision.to_int8(model, images, form=form, judge=judge)
        return (scaled(made, -1) if form == "int8" else made), notes, calibration

    monkeypatch.setattr(maker, "to_int8", to_int8)
    words = ["--precision", "int8", "--calibration", "20", "--tolerance", "agreement=0,accuracy=0.5,kl=0.05"]
    assert command(onnx_command.main, copy / "best.onnx", *words) == EXIT_REJECTED
    found = [name for name in names(copy) if "int8" in name and "json" not in name]
    assert found == ["best.int8.cpu.onnx", "best.int8.onnx.rejected"]


@pytest.mark.parametrize("good", [True, False])
def test_an_engine_that_is_executed_is_judged_itself(good: bool, copy: Path, monkeypatch: Patch) -> None:
    """Its own numbers stand in its report; what it is computed with here is the graph, or one that is wrong."""
    computed = copy / "computed.onnx"
    computed.write_bytes(scaled(onnx.load(copy / "best.onnx"), 1 if good else 2).SerializeToString())
    opened = []

    def open_instead(path: Path) -> Any:
        if path.suffix == ".engine":
            opened.append(read_sidecar(path))
            path = computed
        return open_runner(path)

    monkeypatch.setattr(maker, "open_runner", open_instead)
    builder: Any = SimpleNamespace(executes=True, batch=(1, 8, 64), build=lambda *_: (b"engine", {}), told=lambda: "")
    with contextlib.nullcontext() if good else pytest.raises(Rejected, match=r"best\.engine"):
        export(Wish(path=copy / "best.onnx"), builder)
    (sidecar,) = opened
    assert (sidecar.kind, sidecar.batch, sidecar.parent) == ("engine", (1, 8, 64), "best.onnx"), "a runner needs it"
    engine = copy / ("best.engine" if good else "best.engine.rejected")
    assert set(copy.glob("best.engine*")) == {engine, copy / f"{engine.name}.json"}
    report = sidecar_of(engine)["parity"]
    assert (report["executed"], report["passed"]) == (True, good)
    assert report["candidate"].startswith("best.engine (")


# -- nothing half-written


@pytest.mark.usefixtures("exported_before")
@pytest.mark.parametrize("where", ["to_onnx", "compare", "deliver"])
def test_nothing_is_left_after_an_exception(where: str, copy: Path, monkeypatch: Patch) -> None:
    def fail(*given: object, **named: object) -> None:
        assert any(path.name.startswith(".export-") for path in copy.iterdir()), "in the middle of the work"
        raise KeyboardInterrupt

    monkeypatch.setattr(maker, where, fail)
    with nothing_changes(copy), pytest.raises(KeyboardInterrupt):
        export(Wish(path=copy / "best.pth", limit=5))


def test_sigterm_leaves_nothing(copy: Path, monkeypatch: Patch) -> None:
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
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_between_the_artifact_and_its_sidecar_restores_the_folder(
    first: bool, copy: Path, monkeypatch: Patch
) -> None:
    """For a moment the artifact has its name and no sidecar; an earlier artifact comes back."""
    error = KeyboardInterrupt() if first else OSError(errno.EIO, "Input/output error")
    if first:
        for name in ("best.onnx", "best.onnx.json"):
            (copy / name).unlink()
    rename = Path.replace

    def replaced(self: Path, target: Path) -> Path:
        if target.name == "best.onnx.json":
            assert (copy / "best.onnx").exists()
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    with nothing_changes(copy), pytest.raises(KeyboardInterrupt if first else UserError):
        export(Wish(path=copy / "best.pth", limit=5))


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


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (CannotRewriteError("there is no layer to quantise"), "cannot be made fp16: there is no layer to quantise"),
        (OSError(errno.ENOSPC, "No space left on device"), "fp16: no temporary file: No space left on device"),
    ],
)
def test_a_failing_rewriter_is_a_user_error(failure: Exception, said: str, copy: Path, monkeypatch: Patch) -> None:
    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(maker, "to_float16", fail)
    with nothing_changes(copy), pytest.raises(UserError, match=said):
        export(Wish(path=copy / "best.onnx", precision="fp16", tolerance="agreement=0.5"))
