"""What a person sees while a search runs."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tune.board import Board
from tune.ledger import Ledger

SCRIPT = """
import sys
from pathlib import Path
from tune.board import Board
from tune.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
with Board(ledger.trials, "accuracy", ["optim.lr"]) as board:
    board.tell("trial 001 starts")
    board.tell("trial 002 epoch 1/3: accuracy 71.00%")
print("over")
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path)
    for number, accuracy in ((1, 0.5), (2, 0.71)):
        name = found.give({"optim.lr": 0.25 * number})
        (tmp_path / "trials" / name).mkdir(parents=True)
        line = f'{{"epoch": 1, "val": {{"accuracy": {accuracy}, "loss": 1, "macro_f1": 1}}}}\n'
        (tmp_path / "trials" / name / "metrics.jsonl").write_text(line)
    found.end("001", "finished", "", 2.5)
    return found


def test_lines_where_there_is_no_terminal(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    with Board(ledger.trials, "accuracy", ["optim.lr"]) as board:
        board.tell("trial 001 \x1b[2J starts")
    assert capsys.readouterr().out == "trial 001 ?[2J starts\n"


@pytest.mark.parametrize("size", ["40 140", "12 60"])
def test_a_table_on_a_terminal(size: str, ledger: Ledger) -> None:
    """Trials that run and that have ended, with the newest line; nothing of it is left behind."""
    outer, inner = pty.openpty()
    rows, columns = size.split()
    environment = {**os.environ, "TERM": "xterm", "LINES": rows, "COLUMNS": columns, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", SCRIPT, str(ledger.folder)]
    done = subprocess.run(words, stdout=inner, stderr=inner, env=environment, check=False, timeout=60)
    os.close(inner)
    seen = b""
    try:
        while part := os.read(outer, 65536):
            seen += part
    except OSError:  # its end
        pass
    os.close(outer)
    text = seen.decode()
    assert done.returncode == 0, text
    for word in ("running", "finished", "71.00%", "50.00%", "0.25", "trial 002 epoch 1/3"):
        assert word in text, text
    assert text.rstrip().endswith("over")
    assert text.count("\x1b[2K") > 5, "lines are wiped before others are drawn"
    assert "Traceback" not in text
