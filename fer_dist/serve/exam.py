"""What artifacts are examined on: the pictures of one part, and which of them a model may know."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fer_dist.data.copies import exact_groups
from fer_dist.data.faces import SPLITS, Faces
from fer_dist.data.split import require_part
from fer_dist.engine.score import Views
from fer_dist.errors import printable
from fer_dist.serve.dataset import Say, open_data, open_training, settings_of
from fer_dist.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be judged, and how.

    Attributes:
        split: code of the part, VAL or TEST.
        data, train_data: other data than that of the first artifact; more pictures that trained or chose.
        views: test-time augmentation.
        device, provider, threads: see `open_runner`.
        shown: how many mistakes are to be kept with picture.
    """

    paths: tuple[Path, ...]
    split: int
    data: str | None = None
    train_data: str | None = None
    views: Views = "none"
    batch: int = 64
    device: str = "auto"
    provider: str = "auto"
    threads: int | None = None
    shown: int = 24


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The pictures that all artifacts answer.

    Attributes:
        rows_M, labels_M: int64, their indices in faces, and their classes.
        clean_M: bool, whether a picture has no exact copy in a part that trained or chose; None: no such part is known.
        notes: what should be known about the numbers, one sentence each.
    """

    faces: Faces
    rows_M: NDArray[np.int64]
    labels_M: NDArray[np.int64]
    clean_M: NDArray[np.bool_] | None
    source: str
    split: int
    notes: tuple[str, ...]


def open_exam(task: Task, spec: ModelSpec, say: Say) -> Exam:
    """The pictures, those that have a copy in parts that trained or chose, and what is to be known about them.

    Args:
        spec: of the first artifact.
        say: is told what was taken.

    Raises:
        UserError: the data cannot be read, or the part is empty.
    """
    each = [settings_of(path) for path in task.paths]
    settings = each[0] or next((other for other in each if other), {})
    data = open_data(settings, spec, task.data, say, substitute=False)
    require_part(data.faces, task.split)
    notes = list(data.faces.notes)
    if not data.meaningful:
        notes.append("the pictures are not what the model was made for: its scores say nothing")
    if data.hold_out is not None and task.split == SPLITS.index("val"):
        for path, other in zip(task.paths, each, strict=True):
            seed, fraction = other.get("seed"), other.get("data", {}).get("val_fraction")
            if (seed, fraction) != data.hold_out:
                notes.append(f"{path.name} was not trained with this held-out validation part: it may know some of it")
    rows_M, used = data.faces.part(task.split), np.flatnonzero(data.faces.usage_N < task.split)
    known = [data.faces.images_NHW[used]]
    if task.train_data is not None:
        more = open_training(settings, spec, task.train_data)
        known.append(more.images_NHW[more.usage_N < task.split])
    earlier = np.concatenate(known)
    clean_M = None
    if len(earlier):
        group = exact_groups(np.concatenate([data.faces.images_NHW[rows_M], earlier]))
        clean_M = ~np.isin(group[: len(rows_M)], group[len(rows_M) :])
    else:
        notes.append("no part that trained or chose is known, so that copies are: --train-data PATH names it")
    return Exam(
        faces=data.faces,
        rows_M=rows_M,
        labels_M=data.faces.labels_N[rows_M],
        clean_M=clean_M,
        source=data.source,
        split=task.split,
        notes=tuple(map(printable, notes)),
    )
