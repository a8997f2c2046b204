"""The architectures by name, and the three ways to make one.

`build_spec` resolves settings to a spec, `build` makes the network of a spec, `build_model` does
both, loads pretrained weights and freezes. An architecture is a module with `resolve`, `build`
and `load_pretrained`; it is imported when it is first asked for (transformers and timm are slow to import).
"""

import difflib
import importlib
from typing import Any

from fer_dist.config import ModelConfig
from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel
from fer_dist.spec import LabelSet, ModelSpec

__all__ = ["ARCHITECTURES", "FaceModel", "build", "build_model", "build_spec"]

ARCHITECTURES = ("vit", "patt_lite", "vit_mae", "timm:<name>")


def build_spec(model: ModelConfig, size: int, labels: LabelSet) -> ModelSpec:
    """Resolve the settings of a model: image size, mean and deviation, and all sizes of the network.

    Never asks the network; reads the configuration in the folder `model.weights`, if there is one.

    Args:
        model: the settings.
        size: side of the stored pictures.
        labels: the classes in the order of the logits.

    Raises:
        UserError: unknown architecture or option, values that do not fit together.
    """
    spec: ModelSpec = _home(model.arch).resolve(model, size, labels)
    return spec


def build(spec: ModelSpec) -> FaceModel:
    """The network of a spec with random weights from torch's generator; checkpoints load into it.

    Raises:
        UserError: the architecture is unknown or refuses its options.
    """
    face_model: FaceModel = _home(spec.arch).build(spec)
    return face_model


def build_model(model: ModelConfig, size: int, labels: LabelSet) -> FaceModel:
    """The model that a training starts from: built, with pretrained weights if asked for, frozen to depth.

    Args:
        model: the settings; `model.weights` names local weights whatever `model.pretrained` says.
        size: side of the stored pictures.
        labels: the classes in the order of the logits.

    Raises:
        UserError: as `build_spec`; the weights are not to be had or do not fit; freeze_depth beyond the blocks.
    """
    face_model = build(build_spec(model, size, labels))
    face_model.freeze(model.freeze_depth)
    if model.pretrained or model.weights:
        _home(model.arch).load_pretrained(face_model, model)
    return face_model


def _home(arch: str) -> Any:
    if arch.startswith("timm:"):
        return importlib.import_module("fer_dist.models.timm_backbone")
    if arch in ARCHITECTURES[:3]:
        return importlib.import_module(f"fer_dist.models.{arch}")
    near = difflib.get_close_matches(arch, ARCHITECTURES, n=1, cutoff=0.0)[0]
    raise UserError(
        f"unknown architecture {arch!r}; expected {', '.join(ARCHITECTURES)}", f"did you mean --model.arch {near}?"
    )
