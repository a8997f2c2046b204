"""trials.jsonl: after a kill at any byte no trial is lost and none is there twice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fer_dist.errors import UserError
from tune.ledger import Ledger, Trial, ranked


def record(epoch: int, accuracy: float = 0.5, **val: float) -> dict[str, Any]:
    return {"epoch": epoch, "val": {"accuracy": accuracy, "macro_f1": accuracy, "loss": 1 - accuracy, **val}}


def trial(name: str, *records: dict[str, Any]) -> Trial:
    return Trial(id=name, folder=Path(name), values={}, records=list(records))


def three(folder: Path) -> Ledger:
    """Two trials that have ended and one that runs."""
    ledger = Ledger(folder)
    for lr in (0.1, 0.2, 0.3):
        ledger.give({"optim.lr": lr})
    ledger.end("001", "finished", "", 12.345)
    ledger.end("002", "failed", "no data\nat all", 1.0)
    return ledger


def test_what_is_noted_is_read(tmp_path: Path) -> None:
    found = three(tmp_path).trials()
    assert [one.id for one in found] == ["001", "002", "003"]
    assert [one.values for one in found] == [{"optim.lr": 0.1}, {"optim.lr": 0.2}, {"optim.lr": 0.3}]
    assert [one.status for one in found] == ["finished", "failed", "running"]
    assert [one.reason for one in found] == ["", "no data\nat all", ""]
    assert [one.seconds for one in found] == [12.35, 1.0, 0.0]
    assert [one.folder for one in found] == [tmp_path / "trials" / one.id for one in found]
    assert all(one.records == [] for one in found)


def test_no_search_yet(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "missing").trials() == []


def test_a_second_end_replaces_the_first(tmp_path: Path) -> None:
    ledger = three(tmp_path)
    ledger.end("002", "stopped", "by the scheduler", 3.0)
    again = Ledger(tmp_path).trials()
    assert len(again) == 3
    assert (again[1].status, again[1].reason, again[1].seconds) == ("stopped", "by the scheduler", 3.0)
    assert again[1].values == {"optim.lr": 0.2}


def test_an_end_of_an_unknown_trial_makes_none(tmp_path: Path) -> None:
    ledger = three(tmp_path)
    ledger.end("009", "finished", "", 1.0)
    assert [one.id for one in ledger.trials()] == ["001", "002", "003"]


def test_killed_at_every_byte(tmp_path: Path) -> None:
    """Whatever was cut off: whole lines count, the next trial has an id of its own and is read back."""
    whole = three(tmp_path).path.read_bytes()
    for cut in range(len(whole) + 1):
        kept = whole[:cut]
        ledger = Ledger(tmp_path)
        ledger.path.write_bytes(kept)
        lines = whole.splitlines()
        # A line that lacks no more than its end is whole, too.
        there = [json.loads(line) for line in lines[: kept.count(b"\n") + (kept.split(b"\n")[-1] in lines)]]
        given = [line["trial"] for line in there if "values" in line]
        ended = [line["trial"] for line in there if "status" in line]
        assert [one.id for one in ledger.trials()] == given, f"cut at byte {cut}"
        new = ledger.give({"optim.lr": 9.0})
        assert new not in given
        ledger.end(new, "finished", "", 1.0)
        found = ledger.trials()
        assert [one.id for one in found] == [*given, new], f"cut at byte {cut}"
        assert [one.id for one in found if one.status != "running"] == [*ended, new]
        assert found[-1].values == {"optim.lr": 9.0}


def test_more_than_999_trials(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    lines = [json.dumps({"trial": f"{number:03d}", "values": {}}) for number in range(1, 1001)]
    ledger.path.write_text("\n".join(lines) + "\n")
    assert ledger.give({}) == "1001"
    assert [one.id for one in ledger.trials()][-2:] == ["1000", "1001"]


def test_lines_that_are_none_of_ours(tmp_path: Path) -> None:
    ledger = three(tmp_path)
    with ledger.path.open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n7\n{}\n{"trial": "004", "values": 3}\n{"trial": "001", "status": "lost"}\n\n')
    assert [(one.id, one.status) for one in ledger.trials()] == [
        ("001", "finished"),
        ("002", "failed"),
        ("003", "running"),
    ]


def test_two_holders(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    with first.hold():
        with pytest.raises(UserError, match="another process runs the search"), Ledger(tmp_path).hold():
            pass
        assert first.give({}) == "001", "who holds it writes"
        assert Ledger(tmp_path).trials() != [], "everybody reads"
    with Ledger(tmp_path).hold():
        pass


def test_a_holder_that_was_killed_holds_no_more(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tune.ledger import Ledger\n"
        "with Ledger(Path(sys.argv[1])).hold(): print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=pipe, stdout=pipe, cwd=root) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process"), Ledger(tmp_path).hold():
            pass
        other.kill()
    with Ledger(tmp_path).hold():
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        ledger = Ledger(folder)
        with pytest.raises(UserError, match=r"cannot (read|write) .*trials\.jsonl"):
            ledger.give({})
        with pytest.raises(UserError, match=r"cannot write .*trials\.jsonl"), ledger.hold():
            pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        ledger.end("001", "finished", "", 1.0)  # reads nothing: the device has no end


def test_a_ledger_that_cannot_be_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*trials\.jsonl"):
        ledger.trials()


def test_the_newest_line_of_an_epoch_counts(tmp_path: Path) -> None:
    """A trial that was started again writes epochs anew; a torn line is none."""
    ledger = Ledger(tmp_path)
    folder = tmp_path / "trials" / ledger.give({})
    folder.mkdir(parents=True)
    lines = [json.dumps(record(*pair)) for pair in ((1, 0.1), (2, 0.2), (2, 0.25))]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(record(3))[:20]]))
    assert ledger.trials()[0].records == [record(1, 0.1), record(2, 0.25)]


@pytest.mark.parametrize(("monitor", "epoch"), [("accuracy", 2), ("macro_f1", 1), ("loss", 3)])
def test_the_best_epoch(monitor: str, epoch: int) -> None:
    records = [
        record(1, accuracy=0.5, macro_f1=0.9, loss=0.7),
        record(2, accuracy=0.9, macro_f1=0.4, loss=0.6),
        record(3, accuracy=0.6, macro_f1=0.5, loss=0.1),
        record(4, accuracy=0.9, macro_f1=0.9, loss=0.1),  # no better than the ones before it
    ]
    best = trial("001", *records).best(monitor)
    assert best is not None
    assert best["epoch"] == epoch


def test_no_epoch_has_no_best() -> None:
    assert trial("001").best("accuracy") is None
    assert ranked([trial("001")], "accuracy") == []


def test_the_order_of_trials() -> None:
    some = [trial("001", record(1, 0.5)), trial("002"), trial("003", record(1, 0.9), record(2, 0.1))]
    some += [trial("004", record(1, 0.5)), trial("005", record(1, 0.2))]
    assert [one.id for one in ranked(some, "accuracy")] == ["003", "001", "004", "005"]
    assert [one.id for one in ranked(some, "loss")] == ["003", "001", "004", "005"], "the lower loss comes first"
    some[4].records[0]["val"]["loss"] = 0.01
    assert ranked(some, "loss")[0].id == "005"
