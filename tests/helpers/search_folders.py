"""Search folders and trials that no training has made, and a terminal that keeps what is written."""

import io
import json
from pathlib import Path
from typing import Any

from tune.ledger import Ledger, Status


class Terminal(io.StringIO):
    """A terminal, to replace `sys.stdout`; rich reads its size from $LINES and $COLUMNS, its kind from $TERM."""

    def isatty(self) -> bool:
        return True


def epochs(*accuracies: float) -> list[dict[str, Any]]:
    """Return one record per epoch; macro-F1 is lower than the accuracy by 0.01, the loss is lowest in epoch 1."""
    return [
        {"epoch": epoch, "val": {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "loss": 0.1 * epoch}}
        for epoch, accuracy in enumerate(accuracies, 1)
    ]


def write_metrics(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write the metrics.jsonl of a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def add_trial(
    ledger: Ledger, values: dict[str, Any], *accuracies: float, status: Status = "finished", reason: str = ""
) -> Path:
    """Add a trial with its run folder, which is returned."""
    name = ledger.give(values)
    folder = ledger.folder / "trials" / name
    write_metrics(folder, epochs(*accuracies))
    if status != "running":
        ledger.end(name, status, reason, 7.5)
    return folder
