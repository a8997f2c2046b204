"""The data set that an artifact is judged on: that which its model was trained on, or another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fer_dist.config import Config
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import TRAIN, VAL, Faces
from fer_dist.data.split import hold_out_validation, require_part, training_index
from fer_dist.engine.checkpoint import load
from fer_dist.errors import UserError
from fer_dist.serve.artifact import ExportedModel, file_sha256, read_sidecar, sidecar
from fer_dist.spec import LabelSet, ModelSpec

CHECKPOINTS = (".pth", ".safetensors")
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
class DataSet:
    """The faces to judge and to calibrate with.

    Attributes:
        source: what they are, for people.
        meaningful: whether they are what the model was made for; otherwise accuracy says nothing.
        drop_copies: whether training left out copies of evaluation pictures.
        hold_out: seed and fraction of a validation part that was made here; None: it is marked in the data.
    """

    faces: Faces
    source: str
    meaningful: bool
    drop_copies: bool
    hold_out: tuple[int, float] | None = None

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


def open_data(
    settings: Mapping[str, Any], spec: ModelSpec, path: str | None, say: Say, *, substitute: bool = True
) -> DataSet:
    """The data set to judge a model on.

    Args:
        settings: see `data_settings`; may come from a stranger.
        spec: of the model.
        path: another data set, from the command line; None: that of the settings, or where it is not
            there the embedded one, of which accuracy says nothing.
        say: is told what was taken.
        substitute: whether drawn faces may stand in for the data of the settings.

    Raises:
        UserError: the data cannot be read, or are not there and nothing may stand in for them.
    """
    config = _config(settings, spec)
    kept = config.data.path
    if path is None and not substitute and (not settings or (kept is not None and not _is_there(kept))):
        lost = "nothing says what the model was judged on" if not settings else f"{kept}, its data, is not here"
        raise UserError(lost, "--data PATH names the pictures to judge it on")
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
    held_out = bool(len(faces.part(TRAIN))) and not len(faces.part(VAL))
    if held_out:
        faces = hold_out_validation(faces, config.data.val_fraction, config.seed)
    source = config.data.path or "embedded drawn faces"
    return DataSet(
        faces=faces,
        source=source,
        meaningful=meaningful,
        drop_copies=config.data.drop_copies,
        hold_out=(config.seed, config.data.val_fraction) if held_out else None,
    )


def open_training(settings: Mapping[str, Any], spec: ModelSpec, path: str) -> Faces:
    """Faces that a model was trained on, as they are marked; nothing is held out.

    Raises:
        UserError: the data cannot be read.
    """
    return open_faces(_config(settings, spec).override({"data.path": path}).data, spec.labels)


def settings_of(path: Path) -> dict[str, Any]:
    """Of the data set that an artifact's model was judged on (`data_settings`); empty: unknown.

    Raises:
        UserError: the artifact or its sidecar cannot be read.
    """
    if path.suffix in CHECKPOINTS:
        return data_settings(load(path).config)
    beside = read_beside(path)
    return beside.data if beside else {}


def read_beside(path: Path) -> ExportedModel | None:
    """The sidecar of an artifact, if there is one.

    Raises:
        UserError: it is about another file.
    """
    if not sidecar(path).exists():
        return None
    found = read_sidecar(path)
    if found.sha256 == file_sha256(path):
        return found
    raise UserError(
        f"{sidecar(path)} is about another file than {path.name}: one of them has changed",
        "export it again: python -m export.onnx best.pth",
    )


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
