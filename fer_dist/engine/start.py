"""What a training starts from: a network with pretrained weights, or a model that was trained here before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fer_dist.config import ModelConfig
from fer_dist.engine.checkpoint import Checkpoint, is_checkpoint, load
from fer_dist.errors import UserError, printable, told_as_ours
from fer_dist.models import FaceModel, build, build_model
from fer_dist.models.weights import load_strictly
from fer_dist.spec import LabelSet, ModelSpec
from fer_dist.tensors import first_line


def starting_model(model: ModelConfig, size: int, labels: LabelSet, say: Callable[[str], object]) -> FaceModel:
    """The model before the first step.

    Where `model.weights` is a checkpoint of fer_dist, the network is the checkpoint's and starts with all its weights,
    those of the head as well; a calibration is taken off. Else as `build_model`.

    Args:
        model: the settings.
        size: side of the stored pictures.
        labels: the classes in the order of the logits.
        say: is told from which checkpoint the training goes on, if it does.

    Returns:
        The model, frozen to depth.

    Raises:
        UserError: as `build_model`; the checkpoint is damaged, or the settings ask for another network or other labels.
    """
    if model.weights is None or not is_checkpoint(Path(model.weights)):
        return build_model(model, size, labels)
    checkpoint = load(model.weights)
    spec = _adapted(checkpoint.spec, model, size, labels)
    problem = f"model.weights: no {spec.arch} can be built as {model.weights} says"
    with told_as_ours(problem, "use a checkpoint that fer_dist has written", first_line):
        face_model = build(spec)
    load_strictly(face_model, checkpoint.weights, model.weights)
    say(_line(model.weights, checkpoint))
    return face_model.freeze(model.freeze_depth)


def _adapted(spec: ModelSpec, model: ModelConfig, size: int, labels: LabelSet) -> ModelSpec:
    """The spec of a checkpoint with what a new training may choose: picture sizes and dropout."""
    asked: dict[str, tuple[Any, Any]] = {"model.arch": (model.arch, spec.arch)}
    asked |= {f"model.options.{name}": (value, spec.options.get(name)) for name, value in model.options.items()}
    for name, (value, theirs) in asked.items():
        if value != theirs:
            said = printable(str(theirs))  # by whoever wrote the file
            raise UserError(
                f"model.weights: {model.weights} is a checkpoint with {name} {said}, not {value}",
                f"--{name} {said}" if theirs is not None else f"leave {name} out",
            )
    if spec.labels != labels:
        raise UserError(
            f"model.weights: {model.weights} knows the labels {printable(', '.join(spec.labels.names))}; "
            f"expected {', '.join(labels.names)}, in this order",
            "a checkpoint with these labels, or pretrained weights of the backbone alone",
        )
    return replace(
        spec,
        input=replace(spec.input, size=size, image_size=model.image_size or spec.input.image_size),
        options={**spec.options, "dropout": model.dropout},
        smoothing=0.0,
        temperature=1.0,
    )


def _line(path: str, checkpoint: Checkpoint) -> str:
    record = checkpoint.record
    score = f": epoch {record['epoch']}, accuracy {100 * record['val']['accuracy']:.2f}% then" if record else ""
    return f"goes on from the model of {path}{score}; its head is kept"
