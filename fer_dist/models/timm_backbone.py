"""`timm:<name>`: any classification network of timm, e.g. `timm:resnet18`.

Source: Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models. What a
stem and a block are is what the network's own `group_matcher` says.
"""

import difflib
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import timm
from torch import nn

from fer_dist.config import ModelConfig
from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel, make_spec
from fer_dist.models.weights import fetch_from_hub, fetch_from_url, load_strictly, read_state, unavailable
from fer_dist.spec import LabelSet, ModelSpec
from fer_dist.tensors import first_line

_RESERVED = ("num_classes", "in_chans", "drop_rate", "img_size", "dropout")
_LOADING = ("pretrained", "checkpoint_path", "cache_dir")  # begin the names of what makes timm load files itself


def resolve(model: ModelConfig, size: int, labels: LabelSet) -> ModelSpec:
    """The spec of a timm network; `model.options` go to its constructor as they are.

    Raises:
        UserError: timm has no such network (the nearest is shown); an option that has its own setting.
    """
    card = _card(model.arch)
    _require_allowed(model.arch, model.options)
    return make_spec(
        model, size, labels, image_size=card.input_size[-1], mean=card.mean, std=card.std, options=model.options
    )


def build(spec: ModelSpec) -> FaceModel:
    """The network with random weights, from torch's generator.

    Raises:
        UserError: timm refuses the options or the image size, or does not say what the blocks are.
    """
    network: Any = _create(spec, num_classes=len(spec.labels))
    head_names = _head_names(spec.arch, network)
    if not hasattr(network, "group_matcher"):  # a few families, such as poolformer and pit
        raise UserError(
            f"{spec.arch} cannot be divided into blocks: timm does not say what its blocks are",
            "choose another network of timm, such as --model.arch timm:resnet18",
        )
    groups = timm.models.group_parameters(network, network.group_matcher(coarse=False))
    in_order = [groups[index] for index in sorted(groups)]
    # What no pattern matches comes last, and the head is always in there.
    stages = takewhile(lambda names: not head_names.intersection(names), in_order)
    return FaceModel(spec, network, list(stages), sorted(head_names))


def load_pretrained(face_model: FaceModel, model: ModelConfig) -> None:
    """timm's weights for the backbone, from the file `model.weights` or the cache or the hub; the head stays new.

    Raises:
        UserError: no weights to be had; unreadable; they do not fit.
    """
    spec, card = face_model.spec, _card(face_model.spec.arch)
    if model.weights is not None:
        path = model.weights
    elif card.hf_hub_id:
        filename = card.hf_hub_filename
        path = str(
            fetch_from_hub(card.hf_hub_id, (filename,) if filename else ("model.safetensors", "pytorch_model.bin"))
        )
    elif card.url:
        path = str(fetch_from_url(card.url))
    else:
        raise unavailable(f"of {spec.arch}", "timm names none")
    state = read_state(path)
    # Into a network with the original head: timm is strict about names and shapes only then.
    try:
        source = _create(
            spec,
            num_classes=card.num_classes,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "custom_load": False},
        )
    except UserError as error:
        raise UserError(
            f"the weights in {path} do not fit {spec.arch}: {error.problem}",
            "--model.weights with a file of timm's weights for this network, or --model.pretrained false",
        ) from None
    network = face_model.network
    head_names = _head_names(spec.arch, network)
    own = {name: value for name, value in network.state_dict().items() if name in head_names}
    backbone = {name: value for name, value in source.state_dict().items() if name not in head_names}
    load_strictly(network, backbone | own, path)


def _create(spec: ModelSpec, **keywords: Any) -> nn.Module:
    options = {name: value for name, value in spec.options.items() if name != "dropout"}
    _require_allowed(spec.arch, options)  # they may come from a checkpoint
    if _card(spec.arch).fixed_input_size:
        options["img_size"] = spec.input.image_size
    try:
        network: nn.Module = timm.create_model(
            spec.arch.removeprefix("timm:"), drop_rate=spec.options["dropout"], **options, **keywords
        )
    except Exception as error:  # whatever a constructor makes of options that it was not written for
        given = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no options"
        raise UserError(
            f"timm refuses {spec.arch} with {given}: {first_line(error)}",
            "put model.options or model.image_size right",
        ) from None
    return network


def _require_allowed(arch: str, options: Iterable[str]) -> None:
    for name in options:
        if name in _RESERVED or name.startswith(_LOADING):
            raise UserError(
                f"model.options.{name} is not an option of {arch}",
                "it follows from model.pretrained, model.weights, model.dropout, model.image_size and the labels",
            )


def _head_names(arch: str, network: nn.Module) -> set[str]:
    prefixes = _card(arch).classifier or ()
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    names = {name for name, _ in network.named_parameters() if name.startswith(tuple(f"{p}." for p in prefixes))}
    if not names:
        raise UserError(f"{arch} has no classifier", "choose a classification network of timm")
    return names


def _card(arch: str) -> Any:
    """timm's own description of a network and of its weights."""
    name = arch.removeprefix("timm:")
    try:
        card = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the network exists, the weights named after the dot do not
        card = None
    if card is None:
        names = [*timm.list_models(), *timm.list_pretrained()]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"timm has no network called {name!r}", f"did you mean --model.arch timm:{near}?")
    return card
