"""A run logs plain lines, a live line on a terminal, metrics.jsonl and TensorBoard events."""

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
    val = Metrics(confusion_KK=confusion_KK, loss_sum=15.0, count=15)
    measured: dict[str, Any] = {"images_per_second": 123.456, "seconds": 30.0, "peak_memory": 512.34}
    return EpochRecord(epoch=epoch, step=20 * epoch, lr=3e-4, train_loss=1.25, val=val, **measured)


def run_log(progress: str = "plain", *, first: bool = True, tensorboard: bool = False) -> RunLog:
    return RunLog(RunConfig(progress=progress, tensorboard=tensorboard), first=first)  # type: ignore[arg-type]


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
    log._began -= 1.0  # a step takes time
    log.step(2, 5, 20, 64, 1.5)
    log.epoch_ends(record(2), NAMES, best=True, epochs=12)
    log.close()


# -- lines


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
    """It is gone and the cursor is back at the end, also where an epoch breaks off."""
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
    assert "  epoch 2 step 5/20" not in shown, "the plain heartbeat comes as well"
    rest = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert sum(line.startswith("epoch   2/12  lr") for line in rest) == 1


@pytest.mark.parametrize("progress", ["auto", "plain", "none"])
@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_rank_speaks(progress: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    log = run_log(progress, first=first)
    assert log.due() is False
    one_epoch(log)
    shown = terminal.getvalue()
    assert bool(shown) == (first and progress != "none")
    if progress == "plain" and first:
        assert "\x1b[" not in shown, "plain on a terminal, too"
        assert "  epoch 2 step 5/20 loss 1.500" in shown


def test_a_line_is_due_after_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    live, slow, mute = run_log("auto"), run_log(), run_log(first=False)
    now += 0.6
    assert [log.due() for log in (live, slow, mute)] == [True, False, False]
    now += 20
    assert [log.due() for log in (live, slow, mute)] == [True, True, False]
    slow.step(1, 5, 20, 64, 1.0)
    assert not slow.due()


# -- metrics.jsonl


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_a_line_per_epoch_with_every_field(tmp_path: Path) -> None:
    """Each line is there when its epoch ends."""
    log = run_log("none")
    log.open(tmp_path, [])
    for epoch in (1, 2):
        log.epoch_ends(record(epoch), NAMES, best=True, epochs=2)
        assert [line["epoch"] for line in lines(tmp_path)] == list(range(1, epoch + 1))
    second = lines(tmp_path)[1]
    scores = {"loss": 1.0, "accuracy": pytest.approx(0.8), "macro_f1": pytest.approx(record(2).val.macro_f1)}
    recall = {"cat": pytest.approx(0.7), "dog": 1.0, "eel": 0.0}
    assert second.pop("val") == {**scores, "recall": recall, "count": 15}
    measured = {"images_per_second": 123.5, "seconds": 30.0, "peak_memory_mib": 512.3}
    assert second == {"epoch": 2, "step": 40, "lr": 3e-4, "train_loss": 1.25, "skipped": 0, "overflows": 0, **measured}


@pytest.mark.parametrize("damage", ["none", "half a line", "gone", "other lines"])
def test_a_resumed_run_writes_the_epochs_of_its_checkpoint_and_no_more(damage: str, tmp_path: Path) -> None:
    """A run that was ended between metrics.jsonl and its checkpoint writes its epoch again, once; damage is mended."""
    for keep in (0, 2, 3):
        (folder := tmp_path / str(keep)).mkdir()
        first = run_log("none")
        first.open(folder, [])
        written = [first.epoch_ends(record(epoch), NAMES, best=True, epochs=9) for epoch in (1, 2, 3)]
        path = folder / "metrics.jsonl"
        if damage == "half a line":
            path.write_text(path.read_text() + '{"epoch": 4, "st')
        elif damage == "gone":
            path.unlink()
        elif damage == "other lines":
            path.write_text('{"epoch": 7}\n')
        again = run_log("none")
        again.open(folder, written[:keep])
        written[keep:] = [again.epoch_ends(record(keep + 1), NAMES, best=True, epochs=9)]
        assert lines(folder) == written


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    log = run_log("none", first=False, tensorboard=True)
    log.open(tmp_path, [{"epoch": 1, "step": 20}])
    log.losses(0, [1.0])
    log.epoch_ends(record(3), NAMES, best=True, epochs=9)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epo'


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    log = run_log("none")
    log.open(tmp_path, [])
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        log.epoch_ends(record(1), NAMES, best=True, epochs=2)


# -- TensorBoard


def test_tensorboard_of_a_resumed_run_shows_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended in epoch 3, after two whole ones: what is kept stays, what is done again is shown again only."""
    clock = iter(range(1_700_000_000, 1_800_000_000))  # TensorBoard reads its files in the order of their seconds
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    written: list[dict[str, Any]] = []
    for begin, end, value in ((1, 3, 1.0), (3, 4, 2.0)):
        log = run_log("none", tensorboard=True)
        log.open(tmp_path, written[: begin - 1])
        for epoch in range(begin, end + 1):
            log.losses(20 * (epoch - 1), [value + i for i in range(20)])
            written.append(log.epoch_ends(record(epoch, accuracy=round(5 * value)), NAMES, best=True, epochs=4))
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    losses = [(step, (1.0 if step <= 40 else 2.0) + (step - 1) % 20) for step in range(1, 81)]
    assert shown["train/step_loss"] == losses
    assert shown["epoch/epoch"] == [(20, 1.0), (40, 2.0), (60, 3.0), (80, 4.0)]
    assert shown["val/accuracy"] == [(20 * i, pytest.approx(value)) for i, value in enumerate([2 / 3, 2 / 3, 1, 1], 1)]
    assert shown["recall/cat"] == [(20, 0.5), (40, 0.5), (60, 1.0), (80, 1.0)]
    groups: dict[str, tuple[str, ...]] = {"train": ("step_loss",), "val": ("loss", "accuracy", "macro_f1")}
    groups |= {"epoch": ("epoch", "lr", "train_loss", "images_per_second"), "recall": NAMES}
    assert set(shown) == {f"{group}/{name}" for group, names in groups.items() for name in names}
