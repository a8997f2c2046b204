"""A run logs plain lines, a live line on a terminal, and metrics.jsonl; TensorBoard events are in test_rundir.py."""

import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fer_dist.config import RunConfig
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import EpochRecord, RunLog

NAMES = ("cat", "dog", "eel")


def record(epoch: int) -> EpochRecord:
    confusion_KK = np.array([[7, 3, 0], [0, 5, 0], [0, 0, 0]], np.int64)
    val = Metrics(confusion_KK=confusion_KK, loss_sum=15.0, count=15)
    measured: dict[str, Any] = {"images_per_second": 123.456, "seconds": 30.0, "peak_memory": 512.34}
    return EpochRecord(epoch=epoch, step=20 * epoch, lr=3e-4, train_loss=1.25, val=val, **measured)


def run_log(progress: str, *, first: bool = True) -> RunLog:
    return RunLog(RunConfig(progress=progress), first=first)  # type: ignore[arg-type]


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """From here on the standard output is a terminal (in a fixture, pytest would put its own back)."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def one_epoch(log: RunLog) -> None:
    """Log all that an epoch logs."""
    log.say("before")
    log.epoch_begins(2, 12, 20)
    log._began -= 1.0  # a step takes time
    log.step(2, 5, 20, 64, 1.5)
    log.losses(20, [1.0])
    log.epoch_ends(record(2), NAMES, best=True, epochs=12)
    log.close()


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Long lines and odd characters are as they are: rich would wrap, read [bold] as markup and :cat: as a picture."""
    log = run_log("auto")  # captured output is not a terminal
    one_epoch(log)
    log.epoch_ends(record(12), NAMES, best=False, epochs=12)
    log.say(line := "data: /home/[bold]x/:cat:/1234 " + "long " * 50)
    before, step, epoch, last, odd = capsys.readouterr().out.split("\n")[:-1]
    assert before == "before"
    assert re.fullmatch(r"  epoch 2 step 5/20 loss 1\.500 3\d\d images/s, 3 s left", step)
    assert epoch == (
        "epoch   2/12  lr 3.00e-04  train 1.2500  val 1.0000  accuracy 80.00%  "
        f"macro-F1 {100 * record(2).val.macro_f1:.2f}%  123 images/s  30.0 s  left 5.0 min  *"
    )
    assert last.endswith("left 0.0 min"), "only the best epoch has a star"
    assert odd == line


def test_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is removed and the cursor is visible again at the end, also where an epoch breaks off."""
    terminal = on_terminal(monkeypatch)
    log = run_log("auto")
    log.epoch_begins(1, 2, 20)
    assert "\x1b[?25l" in terminal.getvalue()
    log.close()
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")
    one_epoch(run_log("auto"))
    shown = terminal.getvalue()
    for text in ("\x1b[", "━", "epoch 2/12", "loss 1.500"):
        assert text in shown
    assert "  epoch 2 step 5/20" not in shown, "the plain line is printed as well"
    rest = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert sum(line.startswith("epoch   2/12  lr") for line in rest) == 1


@pytest.mark.parametrize(
    ("progress", "first", "speaks"),
    [("plain", True, True), ("none", True, False), ("auto", False, False), ("plain", False, False)],
)
def test_who_speaks(progress: str, first: bool, speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines are plain on a terminal, too; other ranks neither print nor write."""
    terminal = on_terminal(monkeypatch)
    log = run_log(progress, first=first)
    log.open(tmp_path, [{"epoch": 1, "step": 20}])
    one_epoch(log)
    assert ("  epoch 2 step 5/20 loss 1.500" in terminal.getvalue()) == speaks
    assert "\x1b[" not in terminal.getvalue()
    assert bool(terminal.getvalue()) == speaks
    assert bool(list(tmp_path.iterdir())) == first


def test_a_line_is_due_after_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logs = live, slow, _ = run_log("auto"), run_log("plain"), run_log("auto", first=False)
    for wait, due in ((0.4, [False] * 3), (0.2, [True, False, False]), (20, [True, True, False])):
        now += wait
        assert [log.due() for log in logs] == due
    slow.step(1, 5, 20, 64, 1.0)
    assert [log.due() for log in (live, slow)] == [True, False]


def test_metrics_are_a_line_per_epoch_with_every_field(tmp_path: Path) -> None:
    """Each line is there when its epoch ends."""
    log = RunLog(RunConfig(progress="none", tensorboard=False), first=True)
    log.open(tmp_path, [])
    for epoch in (1, 2):
        log.epoch_ends(record(epoch), NAMES, best=True, epochs=2)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, epoch + 1))
    scores = {"loss": 1.0, "accuracy": pytest.approx(0.8), "macro_f1": pytest.approx(record(2).val.macro_f1)}
    recall = {"cat": pytest.approx(0.7), "dog": 1.0, "eel": 0.0}
    assert lines[1].pop("val") == {**scores, "recall": recall, "count": 15}
    measured = {"images_per_second": 123.5, "seconds": 30.0, "peak_memory_mib": 512.3}
    assert lines[1] == {
        "epoch": 2,
        "step": 40,
        "lr": 3e-4,
        "train_loss": 1.25,
        "skipped": 0,
        "overflows": 0,
        **measured,
    }
