"""The results of a search: its board while it runs, tables that agree with its trials, and a best model."""

import csv
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fer_dist.config import Config, load_config
from fer_dist.errors import UserError
from tests.helpers.search_folders import Terminal, add_trial, epochs
from tune import pictures
from tune.board import Board
from tune.ledger import Ledger, Status, Trial
from tune.report import show, write_report

AXES = ("optim.lr", "optim.name", "train.micro_batch")
SETTINGS = {"searcher": "random", "scheduler": "asha", "seed": 3, "trials": 4, "note": None}
NAMES = ["best.pth", "best.yaml", "results.csv", "results.json", "search.png"]


class Made:
    """A search folder whose trials have the files of a training."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder, self.config = folder, Config().override(config)
        folder.mkdir(parents=True)
        self.ledger = Ledger(folder)

    def add(self, status: Status, accuracies: tuple[float, ...], reason: str = "", **values: Any) -> Path:
        """Add a trial; keywords are spelt `optim__lr`."""
        given = {name.replace("__", "."): value for name, value in values.items()}
        folder = add_trial(self.ledger, given, *accuracies, status=status, reason=reason)
        own = {"run.name": folder.name, "run.dir": str(folder.parent), "run.resume": "auto"}
        own |= {"run.progress": "none", "run.stop_signals": "none"}
        (folder / "config.yaml").write_text(self.config.override(given | own).to_yaml())
        if accuracies:
            monitor = self.config.train.monitor
            (folder / "best.pth").write_bytes(f"weights of {folder.name}".encode())
            best = 1 if monitor == "loss" else max(epochs(*accuracies), key=lambda one: one["val"][monitor])["epoch"]
            (folder / "report.json").write_text(json.dumps({"epoch": best}))
        return folder

    @property
    def trials(self) -> list[Trial]:
        return self.ledger.trials()

    def report(self, axes: tuple[str, ...] = AXES) -> Any:
        return write_report(self.folder, self.trials, self.config, axes, SETTINGS)

    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "results.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def results(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        found: dict[str, Any] = json.loads((self.folder / "results.json").read_text(), parse_constant=refuse)
        return found

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file() and path.name != "trials.jsonl")


@pytest.fixture(autouse=True)
def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an empty search.png; test_pictures.py draws it."""
    monkeypatch.setattr(pictures, "search_picture", lambda trials, axes, monitor, path, title: path.touch())


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Four trials: 002 is the best by accuracy, 004 has failed without an epoch."""
    made = Made(tmp_path / "tune_runs" / "x")
    made.add("finished", (0.5, 0.6, 0.55), optim__lr=1e-5, optim__name="adam", train__micro_batch=None)
    made.add("finished", (0.7, 0.9321, 0.8), optim__lr=1 / 3, optim__name="sgd", train__micro_batch=8)
    made.add("stopped", (0.4,), "by the scheduler", optim__lr=0.1, optim__name="sgd", train__micro_batch=None)
    made.add("failed", (), "UserError: no\x1b[31m data\n  -> give some", optim__lr=0.2, optim__name="adamw")
    return made


def test_all_files_are_written_and_no_others(made: Made) -> None:
    report = made.report()
    assert report.best.id == "002"
    assert sorted(path.name for path in report.files) == made.left() == NAMES
    with pytest.raises(UserError, match="cannot write"):
        write_report(made.folder / "missing", made.trials, made.config, AXES, SETTINGS)


def test_results_csv(made: Made) -> None:
    made.report()
    rows = made.rows()
    assert list(rows[0]) == [
        "trial", "status", *AXES, "epochs", "best_epoch", "accuracy", "macro_f1", "loss", "seconds", "reason",
    ]  # fmt: skip
    assert [row["trial"] for row in rows] == ["001", "002", "003", "004"], "in the order of their start"
    assert [row["status"] for row in rows] == ["finished", "finished", "stopped", "failed"]
    second = rows[1]
    assert float(second["optim.lr"]) == 1 / 3, "not rounded"
    assert (second["optim.name"], second["train.micro_batch"]) == ("sgd", "8")
    assert (second["epochs"], second["best_epoch"]) == ("3", "2")
    assert [float(second[name]) for name in ("accuracy", "macro_f1", "loss")] == [0.9321, 0.9321 - 0.01, 0.2]
    assert float(second["seconds"]) == 7.5
    assert rows[0]["train.micro_batch"] == "none"
    failed = rows[3]
    assert [failed[name] for name in ("epochs", "best_epoch", "accuracy", "loss")] == ["0", "", "", ""]
    assert failed["train.micro_batch"] == "", "it has no value"
    assert failed["reason"] == "UserError: no?[31m data -> give some"
    made.config = made.config.override({"train.monitor": "loss"})
    assert made.report().best.id == "001", "of equals the first"
    assert list(made.rows()[0])[7:10] == ["loss", "accuracy", "macro_f1"]
    assert [row["best_epoch"] for row in made.rows()] == ["1", "1", "1", ""]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+a", "'+a"),
        ("-x", "'-x"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-3e-4", "-3e-4"),
        ("+5", "+5"),
        ('数据 with "quotes", and\na line', '数据 with "quotes", and\na line'),
        (-0.5, "-0.5"),
        (True, "true"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
    ],
)
def test_cells_are_spelt_as_on_the_command_line(tmp_path: Path, value: Any, cell: str) -> None:
    """A spreadsheet must not compute a text."""
    made = Made(tmp_path / "x")
    reason = value if isinstance(value, str) else ""
    trial = Trial(id="001", folder=tmp_path, values={"data.path": value}, status="failed", reason=reason)
    write_report(made.folder, [trial], made.config, ("data.path",), SETTINGS)
    assert made.rows()[0]["data.path"] == cell
    assert made.rows()[0]["reason"] == (" ".join(cell.split()) if reason else "")


def test_results_json(made: Made) -> None:
    made.report()
    found = made.results()
    assert found["settings"] == SETTINGS
    assert (found["monitor"], found["axes"], found["epochs_trained"]) == ("accuracy", list(AXES), 7)
    values = {"optim.lr": 1 / 3, "optim.name": "sgd", "train.micro_batch": 8}
    scores = {"epoch": 2, "accuracy": 0.9321, "macro_f1": 0.9321 - 0.01, "loss": 0.2}
    assert found["best"] == {"trial": "002", "values": values, **scores}
    assert [one["trial"] for one in found["trials"]] == ["001", "002", "003", "004"]
    second, failed = found["trials"][1], found["trials"][3]
    assert (second["values"], second["best"], second["status"], second["seconds"]) == (values, scores, "finished", 7.5)
    assert [point["epoch"] for point in second["curve"]] == [1, 2, 3]
    assert second["curve"][1] == scores
    assert (failed["best"], failed["curve"]) == (None, [])
    assert failed["reason"] == "UserError: no\x1b[31m data\n  -> give some", "whole"
    trials = made.trials
    trials[0].records[0]["val"]["macro_f1"] = float("nan")
    write_report(made.folder, trials, made.config, AXES, {"grace": float("inf")})
    assert made.results()["trials"][0]["curve"][0]["macro_f1"] is None, "JSON has no NaN"
    assert made.results()["settings"] == {"grace": None}


def test_best_yaml(made: Made) -> None:
    base = made.config = made.config.override({"run.tensorboard": False, "run.progress": "plain", "run.keep": 7})
    made.add("finished", (0.1, 0.2, 0.99), optim__lr=0.7, optim__name="adam", train__micro_batch=4)
    made.report()
    path = made.folder / "best.yaml"
    was, now = load_config(str(made.folder / "trials" / "005" / "config.yaml")), load_config(str(path))
    assert (was.run.name, was.run.progress, was.run.stop_signals) == ("005", "none", "none")
    assert (now.run.name, now.run.dir, now.run.resume) == (None, "runs", "restart"), "a run of its own"
    assert (now.run.progress, now.run.stop_signals) == ("plain", base.run.stop_signals), "as in the search"
    assert (now.run.tensorboard, now.run.keep) == (False, 7), "the other settings of the run stay"
    assert now == replace(was, run=now.run), "and all that decides what it learns"
    assert (now.optim.lr, now.optim.name, now.train.micro_batch) == (0.7, "adam", 4)
    lines = path.read_text().splitlines()
    assert [line.startswith("#") for line in lines[:3]] == [True, True, False]
    assert "trial 005, accuracy 99.00% in epoch 3" in lines[0]
    assert str(made.folder) in lines[0]
    assert lines[1].endswith(f"torchrun --standalone --nproc_per_node=1 -m fer_dist.train --config {path}")


def test_a_newline_in_a_name_stays_in_the_comment(tmp_path: Path) -> None:
    made = Made(tmp_path / "runs of\nmine")
    made.add("stopped", (0.5,), optim__lr=0.1)
    made.report(("optim.lr",))
    assert [line[:1] for line in (made.folder / "best.yaml").read_text().splitlines()[:3]] == ["#", "#", "s"]
    assert load_config(str(made.folder / "best.yaml")).optim.lr == 0.1


def test_best_pth_is_the_same_file_or_a_copy(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = made.folder / "trials" / "002" / "best.pth", made.folder / "best.pth"
    for _ in range(2):  # rename does nothing where both names are one file
        made.report()
        assert target.samefile(source)
        assert made.left() == NAMES

    def refuse(*names: object) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    made.report()
    assert not target.samefile(source)
    assert target.read_bytes() == b"weights of 002"
    assert made.left() == NAMES


def test_best_pth_follows_the_best(made: Made) -> None:
    """A best.pth of another epoch or trial is removed: a killed trial may have reported an epoch before it saved."""
    made.report()
    folder = made.add("finished", (0.99,), optim__lr=0.5, optim__name="adam", train__micro_batch=None)
    made.report()
    assert (made.folder / "best.pth").read_bytes() == b"weights of 005"
    assert (made.folder / "trials" / "002" / "best.pth").read_bytes() == b"weights of 002", "its own stays"
    for content in ('{"epoch": 2}', "torn", '{"other": 1}', "[]", '{"epoch": 1}'):
        if content == '{"epoch": 1}':  # the right epoch, but its file is gone
            (folder / "best.pth").unlink()
        (folder / "report.json").write_text(content)
        report = made.report()
        assert report.best.id == "005"
        assert "best.pth" not in [path.name for path in report.files]
        assert "best.pth" not in made.left()
        (made.folder / "best.pth").write_bytes(b"of an earlier report")


def test_no_trial_has_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path / "x")
    assert made.report().best is None
    assert (made.rows(), made.results()["trials"]) == ([], [])
    show([], "loss", AXES, made.folder)
    assert "best: none" in capsys.readouterr().out
    made.add("failed", (), "out of memory", optim__lr=0.1)
    made.add("running", (), optim__lr=0.2)
    assert made.report(("optim.lr",)).best is None
    assert made.left() == ["results.csv", "results.json", "search.png"]
    assert [row["reason"] for row in made.rows()] == ["out of memory", ""]
    assert made.results()["best"] is None
    show(made.trials, "accuracy", ("optim.lr",), made.folder)
    printed = capsys.readouterr().out
    assert "out of memory" in printed
    assert printed.splitlines()[-1].startswith("best: none")


def test_show(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.report()
    show(made.trials, "accuracy", AXES, made.folder)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[:5]]
    assert table[0][:3] == ["trial", "status", "accuracy"]
    assert table[0][-4:] == ["lr", "name", "micro_batch", "reason"]
    assert [row[0] for row in table[1:]] == ["002", "001", "003", "004"], "the best first, those without a score last"
    assert table[1] == ["002", "finished", "93.21%", "2", "3", "7.5", "0.3333", "sgd", "8"]
    assert lines[4].rstrip().endswith("UserError: no?[31m data")
    assert lines[5:] == [
        f"best: trial 002, accuracy 93.21% in epoch 2: {made.folder}/best.pth",
        "repeat it, or train it for longer: torchrun --standalone --nproc_per_node=1 -m fer_dist.train "
        f"--config {made.folder}/best.yaml",
        f"picture: {made.folder}/search.png",
    ]


def test_show_by_loss_in_a_folder_with_a_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path / "a b", **{"train.monitor": "loss"})
    (made.add("finished", (0.5, 0.6), optim__lr=0.1) / "best.pth").unlink()
    made.report(("optim.lr",))
    show(made.trials, "loss", ("optim.lr",), made.folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "best: trial 001, loss 0.1000 in epoch 1", "without best.pth"
    assert lines[-2].endswith(f"--config '{made.folder}/best.yaml'")
    assert lines[-1] == f"picture: '{made.folder}/search.png'"


def test_show_cuts_long_reasons_and_prints_no_markup(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [replace(made.trials[3], reason="x" * 200, values={"optim.name": "a :smile: [b]", "data.name": None})]
    show(trials, "accuracy", ("optim.name", "data.name"), made.folder)
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert head.split()[-3:] == ["optim.name", "data.name", "reason"], "two settings end in name"
    assert row.rstrip().endswith("x" * 79 + "…")
    assert "x" * 80 not in row
    assert "a :smile: [b]" in row


def terminal_of(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stdout by a terminal of a size."""
    for name, value in (("TERM", "xterm"), ("LINES", str(rows)), ("COLUMNS", str(columns))):
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


@pytest.mark.parametrize(("columns", "head"), [(200, "global_batch"), (100, "settings")])
def test_show_fits_a_terminal(columns: int, head: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting has its own column if there is room for all of them."""
    terminal = terminal_of(40, columns, monkeypatch)
    show(made.trials, "accuracy", [*AXES, "train.global_batch", "train.label_smoothing"], made.folder)
    table = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).split("best: ")[0].splitlines()
    assert any(head in line for line in table)
    assert max(map(len, table)) <= columns
    text = " ".join("".join(table).split())
    assert "…" not in text
    assert "0.3333" in text
    assert "no?[31m data" in text


def test_the_board_prints_lines_without_a_terminal(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    with Board(made.ledger.trials, "accuracy", ["optim.lr"]) as board:
        board.tell("trial 001 \x1b[2J starts")
    assert capsys.readouterr().out == "trial 001 ?[2J starts\n"


@pytest.mark.parametrize(("rows", "columns"), [(40, 140), (12, 60)])
def test_the_board_on_a_terminal(rows: int, columns: int, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has running and ended trials with the newest line, and is wiped at the end."""
    made.add("running", (0.71,), optim__lr=0.25)
    terminal = terminal_of(rows, columns, monkeypatch)
    with Board(made.ledger.trials, "accuracy", ["optim.lr"]) as board:
        board.tell("trial 005 starts")
        board.tell("trial 005 epoch 1/3: accuracy 71.00%")
    text = terminal.getvalue()
    for word in ("running", "finished", "71.00%", "93.21%", "0.25", "trial 005 epoch 1/3"):
        assert word in text, text
    assert text.count("\x1b[2K") > 5, "lines are wiped before others are drawn"
    assert text.endswith("\x1b[2K"), "nothing is left"
