"""trials.jsonl: after a kill at any byte, no trial is lost and none is there twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fer_dist.errors import UserError
from tests.conftest import ROOT
from tests.helpers.search_folders import epochs, write_metrics
from tune.ledger import Ledger, Trial, ranked


def three(folder: Path) -> Ledger:
    """Return a ledger of two trials that have ended and one that runs."""
    ledger = Ledger(folder)
    for lr in (0.1, 0.2, 0.3):
        ledger.give({"optim.lr": lr})
    ledger.end("001", "finished", "", 12.345)
    ledger.end("002", "failed", "no data\nat all", 1.0)
    return ledger


def test_trials_are_read_as_written(tmp_path: Path) -> None:
    ledger = three(tmp_path)
    found = ledger.trials()
    assert [(one.id, one.values["optim.lr"], one.status, one.reason, one.seconds) for one in found] == [
        ("001", 0.1, "finished", "", 12.35),
        ("002", 0.2, "failed", "no data\nat all", 1.0),
        ("003", 0.3, "running", "", 0.0),
    ]
    assert [(one.folder, one.records) for one in found] == [(tmp_path / "trials" / one.id, []) for one in found]
    ledger.end("002", "stopped", "by the scheduler", 3.0)  # replaces the first end
    ledger.end("009", "finished", "", 1.0)  # of an unknown trial
    again = Ledger(tmp_path).trials()
    assert [one.id for one in again] == ["001", "002", "003"]
    assert (again[1].status, again[1].reason, again[1].seconds) == ("stopped", "by the scheduler", 3.0)
    assert again[1].values == {"optim.lr": 0.2}
    assert Ledger(tmp_path / "missing").trials() == []


def test_a_file_cut_at_every_byte(tmp_path: Path) -> None:
    """Whole lines count; the next trial has a new id and is read back."""
    whole = three(tmp_path).path.read_bytes()
    lines = whole.splitlines()
    for cut in range(len(whole) + 1):
        kept = whole[:cut]
        ledger = Ledger(tmp_path)
        ledger.path.write_bytes(kept)
        # A line that lacks only its line end is whole, too.
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


def test_foreign_lines_are_ignored(tmp_path: Path) -> None:
    ledger = three(tmp_path)
    with ledger.path.open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n7\n{}\n{"trial": "004", "values": 3}\n{"trial": "001", "status": "lost"}\n\n')
    found = [(one.id, one.status) for one in ledger.trials()]
    assert found == [("001", "finished"), ("002", "failed"), ("003", "running")]


def test_one_process_holds_it_until_its_end(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    with first.hold():
        with pytest.raises(UserError, match="another process runs the search"), Ledger(tmp_path).hold():
            pass
        assert first.give({}) == "001", "its holder writes"
        assert Ledger(tmp_path).trials() != [], "others read"
    code = (
        "import sys; from pathlib import Path; from tune.ledger import Ledger\n"
        "with Ledger(Path(sys.argv[1])).hold(): print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=pipe, stdout=pipe, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process"), Ledger(tmp_path).hold():
            pass
        other.kill()
    with Ledger(tmp_path).hold():
        pass


def test_a_ledger_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UserError, match=r"cannot (read|write) .*trials\.jsonl"):
            Ledger(folder).give({})
        with pytest.raises(UserError, match=r"cannot write .*trials\.jsonl"), Ledger(folder).hold():
            pass
    (tmp_path / "trials.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        Ledger(tmp_path).end("001", "finished", "", 1.0)  # reads nothing: the device has no end
    (tmp_path / "folder" / "trials.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot read .*trials\.jsonl"):
        Ledger(tmp_path / "folder").trials()


def test_the_newest_line_of_an_epoch_counts(tmp_path: Path) -> None:
    """A trial that was started again repeats epochs; a torn line does not count."""
    ledger = Ledger(tmp_path)
    folder = tmp_path / "trials" / ledger.give({})
    (first, second), (_, newer) = epochs(0.1, 0.2), epochs(0.1, 0.25)
    write_metrics(folder, [first, second, newer])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "val": {')
    assert ledger.trials()[0].records == [first, newer]


def test_the_best_epoch_and_the_order_of_trials() -> None:
    """Of equals the first; the lower loss is the better one; a trial without an epoch has no place."""

    def trial(name: str, *scores: tuple[float, float, float]) -> Trial:
        names = ("accuracy", "macro_f1", "loss")
        records = [{"epoch": i, "val": dict(zip(names, one, strict=True))} for i, one in enumerate(scores, 1)]
        return Trial(id=name, folder=Path(name), values={}, records=records)

    best = trial("001", (0.5, 0.9, 0.7), (0.9, 0.4, 0.6), (0.6, 0.5, 0.1), (0.9, 0.9, 0.1))
    for monitor, epoch in (("accuracy", 2), ("macro_f1", 1), ("loss", 3)):
        assert (best.best(monitor) or {})["epoch"] == epoch
    assert trial("001").best("accuracy") is None
    some = [trial("001", (0.5, 0.5, 0.5)), trial("002"), trial("003", (0.9, 0.9, 0.2), (0.1, 0.1, 0.9))]
    some += [trial("004", (0.5, 0.5, 0.5)), trial("005", (0.2, 0.2, 0.01))]
    assert [one.id for one in ranked(some, "accuracy")] == ["003", "001", "004", "005"]
    assert [one.id for one in ranked(some, "loss")] == ["005", "003", "001", "004"]
