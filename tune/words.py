"""How settings and scores are spelt for people."""

import re
from typing import Any

SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "loss": "loss"}
"""What `train.monitor` may be, and its name for people."""


def spelt(value: Any, digits: int = 4) -> str:
    """A value as one types it, fractions shortened to so many digits."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.{digits}g}")
    return str(value)


def number(monitor: str, score: float) -> str:
    """`93.21%`; of a loss `0.2310`."""
    return f"{score:.4f}" if monitor == "loss" else f"{100 * score:.2f}%"


def scored(monitor: str, score: float) -> str:
    """`accuracy 93.21%`, `loss 0.2310`."""
    return f"{SCORES[monitor]} {number(monitor, score)}"
