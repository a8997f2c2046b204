"""What a run tells: plain lines, a live line on a terminal, metrics.jsonl, TensorBoard events."""

import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from fer_dist.config import RunConfig
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import EpochRecord, RunLog
from fer_dist.errors import UserError

NAMES = ("cat", "dog", "eel")


def record(epoch: int, accuracy: int = 7) -> EpochRecord:
    confusion_KK = np.array([[accuracy, 10 - accuracy, 0], [0, 5, 0], [0, 0, 0]], np.int64)
    return EpochRecord(
        epoch=epoch,
        step=20 * epoch,
        lr=3e-4,
        train_loss=1.25,
        val=Metrics(confusion_KK=confusion_KK, loss_sum=15.0, count=15),
        images_per_second=123.456,
        seconds=30.0,
        peak_memory=512.34,
    )


def plain(**values: Any) -> RunConfig:
    return RunConfig(**{"progress": "plain", "tensorboard": False, **values})


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From here on the standard output is a terminal (in a fixture, pytest would put its own back)."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def one_epoch(log: RunLog) -> None:
    """All that an epoch says."""
    log.say("before")
    log.epoch_begins(2, 12, 20)
    time.sleep(0.02)
    log.step(2, 5, 20, 64, 1.5)
    log.epoch_ends(record(2), NAMES, best=True, epochs=12)
    log.close()


# -- lines


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    one_epoch(RunLog(plain(progress="auto"), first=True))  # captured output is no terminal
    before, step, epoch = capsys.readouterr().out.splitlines()
    assert before == "before"
    assert re.fullmatch(r"  epoch 2 step 5/20 loss 1\.500 \d+ images/s, \d+ s left", step)
    assert epoch == (
        "epoch   2/12  lr 3.00e-04  train 1.2500  val 1.0000  accuracy 80.00%  macro-F1 52.94%  "
        "123 images/s  30.0 s  left 5.0 min  *"
    ).replace("52.94", f"{100 * record(2).val.macro_f1:.2f}")


def test_only_the_best_epoch_has_a_star(capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(plain(), first=True).epoch_ends(record(3), NAMES, best=False, epochs=3)
    assert capsys.readouterr().out.endswith("left 0.0 min\n")


def test_long_lines_and_odd_characters_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would wrap at 80 columns, read [bold] as markup and :cat: as a picture."""
    line = "data: /home/[bold]x/:cat:/1234 " + "long " * 50
    RunLog(plain(), first=True).say(line)
    assert capsys.readouterr().out == line + "\n"


def test_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    one_epoch(RunLog(plain(progress="auto"), first=True))
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    assert "━" in shown
    assert "epoch 2/12" in shown
    assert "loss 1.500" in shown
    assert "  epoch 2 step 5/20" not in shown, "the plain heartbeat comes as well"
    rest = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert sum(line.startswith("epoch   2/12  lr") for line in rest) == 1


def test_the_live_line_is_gone_and_the_cursor_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    log = RunLog(plain(progress="auto"), first=True)
    log.epoch_begins(1, 2, 20)
    assert terminal.getvalue().endswith("\x1b[?25l") or "\x1b[?25l" in terminal.getvalue()
    log.close()
    assert terminal.getvalue().rstrip("\r").rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")


def test_plain_is_plain_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    one_epoch(RunLog(plain(), first=True))
    assert "\x1b[" not in terminal.getvalue()
    assert "  epoch 2 step 5/20 loss 1.500" in terminal.getvalue()


@pytest.mark.parametrize("progress", ["auto", "plain", "none"])
@pytest.mark.parametrize("first", [True, False])
def test_who_speaks(progress: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    log = RunLog(plain(progress=progress), first=first)
    assert log.due() is False
    one_epoch(log)
    assert bool(terminal.getvalue()) == (first and progress != "none")


def test_due_after_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    live, slow, mute = (
        RunLog(plain(progress="auto"), first=True),
        RunLog(plain(), first=True),
        RunLog(plain(), first=False),
    )
    now += 0.6
    assert [log.due() for log in (live, slow, mute)] == [True, False, False]
    now += 20
    assert [log.due() for log in (live, slow, mute)] == [True, True, False]
    slow.step(1, 5, 20, 64, 1.0)
    assert not slow.due()


# -- metrics.jsonl


def test_metrics_are_a_line_per_epoch_with_every_field(tmp_path: Path) -> None:
    log = RunLog(plain(progress="none"), first=True)
    log.open(tmp_path, [])
    for epoch in (1, 2):
        log.epoch_ends(record(epoch), NAMES, best=True, epochs=2)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "epoch": 2,
        "step": 40,
        "lr": 3e-4,
        "train_loss": 1.25,
        "val": {
            "loss": 1.0,
            "accuracy": pytest.approx(0.8),
            "macro_f1": pytest.approx(record(2).val.macro_f1),
            "recall": {"cat": pytest.approx(0.7), "dog": 1.0, "eel": 0.0},
            "count": 15,
        },
        "skipped": 0,
        "overflows": 0,
        "images_per_second": 123.5,
        "seconds": 30.0,
        "peak_memory_mib": 512.3,
    }
    assert [line["epoch"] for line in lines] == [1, 2]


def test_each_line_is_there_when_its_epoch_ends(tmp_path: Path) -> None:
    log = RunLog(plain(progress="none"), first=True)
    log.open(tmp_path, [])
    log.epoch_ends(record(1), NAMES, best=True, epochs=2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("damage", ["none", "half a line", "gone", "other lines"])
@pytest.mark.parametrize("keep", [0, 2, 3])
def test_going_on_writes_the_epochs_of_the_checkpoint_and_no_more(keep: int, damage: str, tmp_path: Path) -> None:
    """A run that was ended between metrics.jsonl and its checkpoint writes its epoch again, once; damage is mended."""
    first = RunLog(plain(progress="none"), first=True)
    first.open(tmp_path, [])
    written = [first.epoch_ends(record(epoch), NAMES, best=True, epochs=9) for epoch in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    if damage == "half a line":
        path.write_text(path.read_text() + '{"epoch": 4, "st')
    elif damage == "gone":
        path.unlink()
    elif damage == "other lines":
        path.write_text('{"epoch": 7}\n')
    again = RunLog(plain(progress="none"), first=True)
    again.open(tmp_path, written[:keep])
    written[keep:] = [again.epoch_ends(record(keep + 1), NAMES, best=True, epochs=9)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == written


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    log = RunLog(plain(progress="none", tensorboard=True), first=False)
    log.open(tmp_path, [{"epoch": 1, "step": 20}])
    log.losses(0, [1.0])
    log.epoch_ends(record(3), NAMES, best=True, epochs=9)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epo'


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    log = RunLog(plain(progress="none"), first=True)
    log.open(tmp_path, [])
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        log.epoch_ends(record(1), NAMES, best=True, epochs=2)


# -- TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value)."""
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_events(tmp_path: Path) -> None:
    log = RunLog(plain(progress="none", tensorboard=True), first=True)
    log.open(tmp_path, [])
    for epoch in (1, 2):
        log.losses(20 * (epoch - 1), [float(20 * epoch + i) for i in range(20)])
        log.epoch_ends(record(epoch), NAMES, best=True, epochs=2)
    log.close()
    shown = events(tmp_path)
    assert shown["train/step_loss"] == [(step, float(step + 19)) for step in range(1, 41)]
    assert [step for step, _ in shown["val/accuracy"]] == [20, 40]
    assert shown["val/accuracy"][0][1] == pytest.approx(0.8)
    assert shown["epoch/epoch"] == [(20, 1.0), (40, 2.0)]
    assert set(shown) == {
        "train/step_loss",
        *(f"epoch/{name}" for name in ("epoch", "lr", "train_loss", "images_per_second")),
        *(f"val/{name}" for name in ("loss", "accuracy", "macro_f1")),
        *(f"recall/{name}" for name in NAMES),
    }


def test_tensorboard_of_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    """Ended in epoch 3, after two whole ones: what is kept stays, what is done again is shown again only."""
    written: list[dict[str, Any]] = []
    for begin, end, value in ((1, 3, 1.0), (3, 4, 2.0)):
        log = RunLog(plain(progress="none", tensorboard=True), first=True)
        log.open(tmp_path, written[: begin - 1])
        for epoch in range(begin, end + 1):
            log.losses(20 * (epoch - 1), [value] * 20)
            written.append(log.epoch_ends(record(epoch, accuracy=round(5 * value)), NAMES, best=True, epochs=4))
        log.close()
        time.sleep(1.1)  # the name of an events file holds its second, and TensorBoard reads them by name
    shown = events(tmp_path)
    assert shown["train/step_loss"] == [(step, 1.0 if step <= 40 else 2.0) for step in range(1, 81)]
    assert [step for step, _ in shown["val/accuracy"]] == [20, 40, 60, 80]
    assert [value for _, value in shown["recall/cat"]] == pytest.approx([0.5, 0.5, 1.0, 1.0])
