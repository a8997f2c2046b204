"""What a model answers to every picture of an evaluation set, in batches of several sizes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fer_dist.config import Config
from fer_dist.console import counting
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import TRAIN, VAL, Faces
from fer_dist.data.split import hold_out_validation, require_part, training_index
from fer_dist.errors import UserError
from fer_dist.serve.runner import Runner
from fer_dist.spec import LabelSet, ModelSpec

BATCHES = (1, 2, 3, 7, 64)
"""Batch sizes that take turns: each picture is asked once, each size many times."""
MOST_DRAWN = 200_000
"""Most drawn faces that a checkpoint from elsewhere can ask for."""
_TAKEN = ("path", "on_error", "val_fraction", "drop_copies", "embedded_train", "embedded_val", "embedded_seed")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures with labels.

    Attributes:
        images_N1SS: uint8 `[N, 1, S, S]`.
        labels_N: int64 `[N]`.
        source: what they are, for people.
        meaningful: whether they are what the model was made for; otherwise accuracy says nothing.
        of: how many there were, where only a part was taken.
    """

    images_N1SS: Tensor
    labels_N: Tensor
    source: str
    meaningful: bool
    of: int

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """M answers to N pictures; M is N but for sets too small to fill one turn of BATCHES, where pictures come again.

    Attributes:
        rows_M: int64, the picture of each answer.
        batch_M: int64, the size of the batch that it came in.
        logits_MK, probabilities_MK: float32, on the CPU.
        count: N.
    """

    rows_M: Tensor
    batch_M: Tensor
    logits_MK: Tensor
    probabilities_MK: Tensor
    count: int

    def by_picture(self) -> Tensor:
        """The logits `[N, K]`, one answer for each picture, in their order."""
        logits_NK = torch.empty(self.count, self.logits_MK.shape[1])
        logits_NK[self.rows_M] = self.logits_MK
        return logits_NK


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The faces to judge and to calibrate with."""

    faces: Faces
    source: str
    meaningful: bool
    drop_copies: bool

    def validation(self, limit: int | None = None) -> Pictures:
        """The validation part, or `limit` pictures spread evenly over it.

        Raises:
            UserError: it is empty.
        """
        require_part(self.faces, VAL)
        rows_M = self.faces.part(VAL)
        return self._take(_spread(rows_M, limit), len(rows_M), "validation")

    def calibration(self, count: int, seed: int) -> Pictures:
        """Pictures of the training part, drawn by a seed.

        Raises:
            UserError: it is empty.
        """
        rows_M, _ = training_index(self.faces, self.drop_copies)
        drawn = np.random.default_rng(seed).permutation(rows_M)[:count]
        return self._take(np.sort(drawn), len(rows_M), "training")

    def _take(self, rows: NDArray[np.int64], of: int, part: str) -> Pictures:
        images = torch.from_numpy(np.ascontiguousarray(self.faces.images_NHW[rows])).unsqueeze(1)
        labels = torch.from_numpy(self.faces.labels_N[rows])
        source = f"{part} part of {self.source}"
        return Pictures(images_N1SS=images, labels_N=labels, source=source, meaningful=self.meaningful, of=of)


def data_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `open_data` needs of the config of a checkpoint, which may come from a stranger; empty: nothing."""
    data = config.get("data")
    if not isinstance(data, Mapping):
        return {}
    return {"seed": config.get("seed", 0), "data": {name: data[name] for name in _TAKEN if name in data}}


def open_data(settings: Mapping[str, Any], spec: ModelSpec, path: str | None, say: Say) -> DataSet:
    """The data set to judge a model on.

    Args:
        settings: see `data_settings`; may come from a stranger.
        spec: of the model.
        path: another data set, from the command line; None: that of the settings, or where it is not
            there the embedded one, of which accuracy says nothing.
        say: is told what was taken.

    Raises:
        UserError: the data cannot be read.
    """
    config = _config(settings, spec)
    kept = config.data.path
    if path is not None:
        config, meaningful = config.override({"data.path": path}), True
    elif kept is not None and not _is_there(kept):
        say(f"data: {kept}, which the model was judged on, is not here; taking drawn faces: --data PATH takes yours")
        config, meaningful = config.override({"data.path": None}), False
    else:
        meaningful = bool(settings)
    faces = open_faces(config.data, spec.labels)
    if config.data.path is None and spec.labels != LabelSet():  # drawn faces show the seven expressions
        faces, meaningful = replace(faces, labels_N=faces.labels_N % len(spec.labels)), False
    if len(faces.part(TRAIN)) and not len(faces.part(VAL)):
        faces = hold_out_validation(faces, config.data.val_fraction, config.seed)
    source = config.data.path or "embedded drawn faces"
    return DataSet(faces=faces, source=source, meaningful=meaningful, drop_copies=config.data.drop_copies)


def ask(runner: Runner, pictures: Pictures, progress: Callable[[int], object] = lambda done: None) -> Answers:
    """The answers of a model to all pictures, in batches of BATCHES in turn."""
    rows, sizes, logits, probabilities = [], [], [], []
    for batch in batches(len(pictures)):
        found = runner.run(pictures.images_N1SS[batch])
        rows.append(batch)
        sizes.append(torch.full((len(batch),), len(batch)))
        logits.append(found.logits_NK)
        probabilities.append(found.probabilities_NK)
        progress(len(batch))
    return Answers(
        rows_M=torch.cat(rows),
        batch_M=torch.cat(sizes),
        logits_MK=torch.cat(logits),
        probabilities_MK=torch.cat(probabilities),
        count=len(pictures),
    )


def ask_aloud(runner: Runner, pictures: Pictures) -> Answers:
    """The same, and people see how far it is."""
    with counting(f"asking {runner.path.name}", len(pictures)) as progress:
        return ask(runner, pictures, progress)


def batches(count: int) -> Iterator[Tensor]:
    """Rows 0..count-1 once each, in batches of BATCHES in turn; fewer pictures than one turn come again."""
    begin = 0
    turn = cycle(BATCHES)
    while begin < max(count, sum(BATCHES)):
        end = begin + next(turn)
        yield torch.arange(begin, end if count < sum(BATCHES) else min(end, count)) % count
        begin = end


def _config(settings: Mapping[str, Any], spec: ModelSpec) -> Config:
    """The settings of the data; of a stranger's only what reads, and nothing out of proportion."""
    taken = data_settings(settings) or {"data": {}}
    try:
        found = Config().override(taken | {"data": {**taken["data"], "size": spec.input.size}})
    except UserError as error:
        raise UserError(f"the model's settings of its data are damaged: {error.problem}", "--data PATH") from None
    if (drawn := max(found.data.embedded_train, found.data.embedded_val)) > MOST_DRAWN:
        raise UserError(f"the model's settings ask for {drawn:,} drawn faces, more than {MOST_DRAWN:,}", "--data PATH")
    return found


def _is_there(path: str) -> bool:
    """Whether a path of a stranger's settings leads to something."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, not permitted, of a user who is not there
        return False


def _spread(rows_M: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    if limit is None or limit >= len(rows_M):
        return rows_M
    return rows_M[np.linspace(0, len(rows_M) - 1, limit).round().astype(np.int64)]
