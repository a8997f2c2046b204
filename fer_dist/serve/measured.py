"""What is known of how good a model is, out of its own files, in one line for people."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from fer_dist.engine.checkpoint import load
from fer_dist.engine.form import is_record
from fer_dist.engine.metrics import wilson
from fer_dist.serve.dataset import read_beside
from fer_dist.serve.runner import Runner


class Measured(NamedTuple):
    """An accuracy.

    Attributes:
        accuracy: 0..1.
        pictures, of: on how many pictures it was measured, and how many the data have.
        how: what was done that the app does not do, or of what else it is; mostly "".
        data: what the pictures are.
        drawn: whether they are drawn faces.
    """

    accuracy: float
    pictures: int
    of: int
    how: str
    data: str
    drawn: bool

    def __str__(self) -> str:
        low, high = wilson(self.accuracy, self.pictures)
        range_95 = f"95% interval {100 * low:.1f} to {100 * high:.1f}%"
        part = f" of {self.of:,}" * (self.of > self.pictures)
        return f"{self.accuracy:.1%} accuracy ({range_95}) on {self.pictures:,}{part} pictures{self.how}: {self.data}"


def measured(runner: Runner) -> Measured | None:
    """The accuracy of a model on the validation part of its own data; None: its files do not say.

    A checkpoint carries that of its epoch, perhaps with mirror images; beside an artifact the gate has left that of
    the artifact itself, as the app asks it, perhaps on a part of the pictures.

    Raises:
        UserError: the file beside an artifact is damaged, or about another file.
    """
    if runner.kind == "pth":
        saved = load(runner.path)
        if not is_record(saved.record):
            return None
        val = saved.record["val"]
        mirrored = isinstance(train := saved.config.get("train"), dict) and train.get("flip_tta") is True
        how = ", each averaged with its mirror image" * mirrored
        return _measured(val["accuracy"], val["count"], val["count"], how, saved.config)
    beside = read_beside(runner.path)
    if beside is None or beside.parity.get("meaningful") is not True:
        return None
    parity = beside.parity
    how = ", by the graph that it was built from" * (parity.get("executed") is False)
    return _measured(parity.get("accuracy_candidate"), parity.get("count"), parity.get("of"), how, beside.data)


def _measured(accuracy: Any, count: Any, of: Any, how: str, settings: Mapping[str, Any]) -> Measured | None:
    """The numbers and the settings may be a stranger's."""
    if not isinstance(accuracy, int | float) or type(count) is not int or not (0 <= accuracy <= 1 and count > 0):
        return None
    of = of if type(of) is int and of > count else count
    data = settings.get("data")
    path = data.get("path") if isinstance(data, Mapping) else None
    if path is None and isinstance(data, Mapping) and data:
        return Measured(accuracy, count, of, how, "drawn faces that it was not trained on", True)
    name = f" of {PurePath(str(path)).name[:80]}" if path is not None else ""
    return Measured(accuracy, count, of, how, f"validation part{name}", False)
