"""Whether what a file holds has the form of a checkpoint: anybody can write a file and seal it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def require_form(content: Mapping[str, Any]) -> None:
    """Look at the types of everything that is used without asking again; `config` is checked where it is read.

    Args:
        content: what `checkpoint.save` writes.

    Raises:
        ValueError: a part has another type; names it.
    """
    weights = content["weights"]
    _require("weights", isinstance(weights, Mapping) and all(map(_is_named_tensor, weights.items())))
    for name in ("config", "record", "provenance"):
        _require(name, isinstance(content[name], Mapping) and _is_plain(content[name]))
    resume = content["resume"]
    _require("resume", isinstance(resume, Mapping))
    for name, fits in _RESUME.items():  # one that is missing is told by who goes on from it
        _require(f"resume.{name}", name not in resume or fits(resume[name]))


def _require(name: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"its {name} has another form")


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _is_plain(value: Any) -> bool:
    """Whether JSON and YAML can write it."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(x) for name, x in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_loss(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def is_record(value: Any) -> bool:
    """Whether metrics are such as `EpochRecord.to_dict` makes."""
    if not isinstance(value, Mapping) or not isinstance(val := value.get("val"), Mapping) or not _is_plain(value):
        return False
    numbers = [value.get(name) for name in ("train_loss", "lr")]
    numbers += [val.get(name) for name in ("loss", "accuracy", "macro_f1")]
    counts = [value.get("epoch"), value.get("step"), val.get("count")]
    return all(isinstance(x, int | float) for x in numbers) and all(map(_is_count, counts))


def _is_best(value: Any) -> bool:
    """Whether it is the confusion matrix of the best epoch with its loss; None: there was no epoch yet."""
    if value is None:
        return True
    if not isinstance(value, Mapping) or not isinstance(rows := value.get("confusion"), list):
        return False
    square = all(isinstance(row, list) and len(row) == len(rows) and all(map(_is_count, row)) for row in rows)
    return square and isinstance(value.get("loss_sum"), float) and _is_count(value.get("count"))


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


_RESUME: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, Mapping) and all(map(_is_named_tensor, value.items())),
    "optimizer": _is_mapping,
    "scaler": _is_mapping,
    "schedule": lambda value: isinstance(value, Mapping) and all(isinstance(x, int | float) for x in value.values()),
    **dict.fromkeys(("epoch", "step", "bad_epochs", "skipped", "skipped_in_row", "overflows"), _is_count),
    "stopped": lambda value: isinstance(value, bool),
    "losses": _is_list_of(_is_loss),
    "records": _is_list_of(is_record),
    "best": _is_best,
    "data": lambda value: isinstance(value, str),
}
"""What `state.resume_state` makes, part by part."""
