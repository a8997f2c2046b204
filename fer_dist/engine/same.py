"""What the ranks of a run, and its starts, must have in common: compared before anything is trained."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fer_dist.config import Config
from fer_dist.data.faces import Faces
from fer_dist.errors import UserError
from fer_dist.world import World

PLACES = ("run.dir", "run.progress", "data.path", "data.ferplus", "data.cache_dir", "model.weights")
"""Settings that may differ between nodes: they say where something lies, not what it is."""
ORDER = ("seed", "train.global_batch", "train.steps_per_epoch")
"""Settings that decide which sample is seen when: a run that goes on with others would lose some, or see some twice."""
PIXEL_BYTES = 2**26
"""Pixels that the digest of a data set reads at the most; larger sets are sampled."""


def require_same_settings(config: Config, world: World) -> None:
    """Raises UserError where a rank was given other settings than rank 0, and names them."""
    ranks = [dict(flat(tree)) for tree in world.gather(config.to_dict())]
    for rank, given in enumerate(ranks):
        if found := differences(ranks[0], given, leave_out=PLACES):
            told = "; ".join(f"{name} {theirs!r}, rank 0 {first!r}" for name, first, theirs in found[:5])
            raise UserError(f"rank {rank} was given {told}", "start all nodes with the same line")


def settings_digest(config: Config) -> str:
    """What identifies the settings of a run, but for where things lie and how it reports: 16 hexadecimal digits."""
    kept = {n: v for n, v in flat(config.to_dict()) if n not in PLACES and not n.startswith("run.")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def require_same_data(data: str, world: World) -> None:
    """Raises UserError where the data of a rank has another digest than that of rank 0."""
    ranks = world.gather(data)
    for rank, theirs in enumerate(ranks):
        if theirs != ranks[0]:
            raise UserError(
                f"rank {rank} has other data than rank 0: digest {theirs} instead of {ranks[0]}",
                "give all nodes the same files, and the same version of fer-dist",
            )


def require_same_run(then: Mapping[str, Any], now: Config, data_then: str, data_now: str, source: str) -> list[str]:
    """Whether a run may go on with these settings and data; returns the other settings that differ, as lines.

    Raises:
        UserError: the data are others, or a setting is that decides which sample is seen when.
    """
    found = differences(dict(flat(then)), dict(flat(now.to_dict())), leave_out=PLACES)
    for name, before, value in found:
        if name in ORDER:
            raise UserError(
                f"{source} was made with {name} {before!r}, now it is {value!r}: samples would be lost or seen twice",
                f"--{name} {'none' if before is None else before}, or another --run.name",
            )
    changed = [f"{name} {before!r} -> {value!r}" for name, before, value in found if not name.startswith("run.")]
    if data_then != data_now:
        why = f" ({'; '.join(changed)})" if changed else ""
        raise UserError(
            f"{source} was made from other data: digest {data_then}, now it is {data_now}{why}",
            "name the data set of this run with --data, or another --run.name",
        )
    return changed


def data_digest(faces: Faces, train_M: NDArray[np.int64], val_M: NDArray[np.int64], *, drawn: bool) -> str:
    """What identifies the content of a data set and its parts, wherever it lies: 16 hexadecimal digits.

    Args:
        drawn: the pictures are the program's own, and known by the key of the cache; their pixels
            may differ by a rounding between kinds of processors.
    """
    sha256 = hashlib.sha256(repr((faces.images_NHW.shape, drawn and faces.key)).encode())
    step = max(1, -(-faces.images_NHW.nbytes // PIXEL_BYTES))
    pixels = None if drawn else faces.images_NHW[::step]
    for array in (train_M, val_M, faces.labels_N, faces.targets_NK, pixels):
        sha256.update(b"-" if array is None else np.ascontiguousarray(array).data)
    return sha256.hexdigest()[:16]


def differences(
    first: Mapping[str, Any], other: Mapping[str, Any], *, leave_out: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """Names whose values differ, with both values."""
    names = dict.fromkeys([*first, *other])
    return [
        (name, first.get(name), other.get(name))
        for name in names
        if name not in leave_out and first.get(name) != other.get(name)
    ]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested settings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
