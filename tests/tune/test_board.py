"""What a search shows while it runs: lines, or a table on a terminal."""

import sys
from pathlib import Path

import pytest

from tests.helpers.search_folders import Terminal, add_trial
from tune.board import Board
from tune.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path)
    add_trial(made, {"optim.lr": 0.25}, 0.5)
    add_trial(made, {"optim.lr": 0.5}, 0.71, status="running")
    return made


def test_lines_without_a_terminal(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    with Board(ledger.trials, "accuracy", ["optim.lr"]) as board:
        board.tell("trial 001 \x1b[2J starts")
    assert capsys.readouterr().out == "trial 001 ?[2J starts\n"


@pytest.mark.parametrize(("rows", "columns"), [(40, 140), (12, 60)])
def test_a_table_on_a_terminal(rows: int, columns: int, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has running and ended trials with the newest line, and is wiped at the end."""
    for name, value in (("TERM", "xterm"), ("LINES", str(rows)), ("COLUMNS", str(columns))):
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Board(ledger.trials, "accuracy", ["optim.lr"]) as board:
        board.tell("trial 001 starts")
        board.tell("trial 002 epoch 1/3: accuracy 71.00%")
    text = terminal.getvalue()
    for word in ("running", "finished", "71.00%", "50.00%", "0.25", "trial 002 epoch 1/3"):
        assert word in text, text
    assert text.count("\x1b[2K") > 5, "lines are wiped before others are drawn"
    assert text.endswith("\x1b[2K"), "nothing is left"
