"""What `vit` and `vit_mae` share: the options, configuration and weights of a Hugging Face encoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging

from fer_dist.config import ModelConfig
from fer_dist.errors import UserError
from fer_dist.models.base import make_spec, resolve_options
from fer_dist.models.folders import read_folder, weight_files
from fer_dist.models.weights import fetch_from_hub, read_state, require_fit
from fer_dist.spec import LabelSet, ModelSpec
from fer_dist.tensors import first_line

IMAGE_SIZE = 224

MAX_PARAMETERS, MAX_LAYERS = 2**31, 1000
"""Largest encoder to be built: 8 GiB in float32; the largest ViT that people fine-tune has 1.8e9 in 48 layers."""

OPTIONS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "initializer_range": 0.02,
}
"""The fields of `ViTConfig` and `ViTMAEConfig` that shape the encoder, as in ViT-base."""

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "patch_size")
_POSITIONS = "embeddings.position_embeddings"

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)


def resolve_encoder(
    kind: type[PreTrainedConfig],
    model: ModelConfig,
    size: int,
    labels: LabelSet,
    mean: Sequence[float],
    std: Sequence[float],
) -> ModelSpec:
    """The spec of an encoder: ViT-base or what the folder `model.weights` says, then `model.options`.

    Args:
        kind: configuration class, `ViTConfig` or `ViTMAEConfig`.
        model: the settings.
        size: side of the stored pictures.
        labels: the classes.
        mean, std: of the backbone; a `preprocessor_config.json` in the folder replaces them.

    Raises:
        UserError: not a folder of that architecture; unknown option; sizes that do not go together.
    """
    own: dict[str, Any] = {"image_size": IMAGE_SIZE, "image_mean": mean, "image_std": std}
    if model.weights is not None:
        own |= read_folder(kind.model_type, model.weights)
    known = resolve_options(model.arch, OPTIONS, {name: own[name] for name in OPTIONS.keys() & own.keys()})
    options = resolve_options(model.arch, known, model.options)
    spec = make_spec(
        model,
        size,
        labels,
        image_size=own["image_size"],
        mean=own["image_mean"],
        std=own["image_std"],
        options=options,
    )
    _require_consistent(spec.input.image_size, options)
    return spec


def encoder_config(kind: type[ConfigT], spec: ModelSpec, image_size: int | None = None) -> ConfigT:
    """The Hugging Face configuration of a spec, for its own or for another image size.

    Raises:
        UserError: the spec came with a file, and its sizes are no sizes or would fill the memory.
    """
    options = resolve_options(
        spec.arch, OPTIONS, {name: spec.options[name] for name in OPTIONS.keys() & spec.options.keys()}
    )
    image_size = spec.input.image_size if image_size is None else image_size
    _require_consistent(image_size, options)
    make: Any = kind  # its keywords come from decorators that type checkers do not see through
    config: ConfigT = make(
        **options,
        image_size=image_size,
        id2label=dict(enumerate(spec.labels.names)),
        label2id={name: index for index, name in enumerate(spec.labels.names)},
        attn_implementation="sdpa",
    )
    return config


def encoder_stages(encoder: PreTrainedModel, prefix: str) -> list[list[str]]:
    """Names of parameters: embeddings, then block by block. The last layer norm belongs to no stage."""
    blocks: Any = encoder.layers
    stages: list[tuple[str, nn.Module]] = [("embeddings", encoder.get_submodule("embeddings"))]
    stages += [(f"layers.{index}", block) for index, block in enumerate(blocks)]
    return [[f"{prefix}{stage}.{name}" for name, _ in module.named_parameters()] for stage, module in stages]


def load_encoder(
    kind: type[PreTrainedModel], encoder: PreTrainedModel, spec: ModelSpec, weights: str | None, repository: str
) -> None:
    """Copy pretrained weights into `encoder`; position embeddings are interpolated to its grid.

    Args:
        kind: the class that reads the weights; a head in them is not used, since the labels differ.
        encoder: the encoder of a network built from `spec`.
        spec: says the sizes.
        weights: a folder made by `save_pretrained`; none: `repository` from the cache or the hub.

    Raises:
        UserError: no weights to be had; unreadable; names or shapes of the encoder do not fit.
    """
    if weights is None:
        files = [fetch_from_hub(repository, ("model.safetensors", "pytorch_model.bin"))]
        image_size = IMAGE_SIZE
    else:
        files = weight_files(Path(weights))
        assert kind.config_class is not None
        image_size = read_folder(kind.config_class.model_type, weights).get("image_size", IMAGE_SIZE)
    config = encoder_config(type(encoder.config), spec, image_size)
    source = _model_of(kind, config, files)
    state = source.base_model.state_dict()
    state[_POSITIONS] = resize_positions(state[_POSITIONS], spec.input.image_size // spec.options["patch_size"])
    encoder.load_state_dict(state)


def resize_positions(positions_1PD: Tensor, grid: int) -> Tensor:
    """Position embeddings for a grid of `grid` x `grid` patches; the first one, of [CLS], stays.

    Bicubic, as `interpolate_pos_encoding` of Hugging Face and the authors of ViT and MAE do it:
    float `[1, 1 + P, D]` -> `[1, 1 + grid * grid, D]`.
    """
    class_11D, patches_1PD = positions_1PD[:, :1], positions_1PD[:, 1:]
    side = round(patches_1PD.shape[1] ** 0.5)
    if side == grid:
        return positions_1PD
    map_1DHW = patches_1PD.transpose(1, 2).reshape(1, -1, side, side)
    map_1DHW = F.interpolate(map_1DHW, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((class_11D, map_1DHW.flatten(2).transpose(1, 2)), dim=1)


def _model_of(kind: type[PreTrainedModel], config: PreTrainedConfig, files: Sequence[Path]) -> PreTrainedModel:
    state = {name: value for file in files for name, value in read_state(file).items()}
    folder = files[0].parent
    try:
        with _quiet():
            make: Any = (
                kind.from_pretrained
            )  # given a state, it opens no file; with a folder, it finds more than weights
            loaded = make(None, config=config, state_dict=state, ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:  # tensors that its renaming was not made for
        raise UserError(
            f"the weights in {folder} cannot be used ({first_line(error)})",
            "use a whole folder made by save_pretrained, with config.json and model.safetensors",
        ) from error
    source, info = loaded
    in_head = ("classifier.", "pooler.", "vit.pooler.", "decoder.")
    missing, unknown = (
        sorted(name for name in info[which] if not name.startswith(in_head) and not name.endswith("mask_token"))
        for which in ("missing_keys", "unexpected_keys")
    )
    shapes = sorted(
        f"{name} {list(found)} instead of {list(expected)}"
        for name, found, expected in info["mismatched_keys"]
        if not name.startswith(in_head)
    )
    require_fit(folder, missing, unknown, shapes)
    checked: PreTrainedModel = source
    return checked


def _require_consistent(image_size: Any, options: dict[str, Any]) -> None:
    """Before anything is allocated: the numbers may come with a folder or a checkpoint of a stranger."""
    width, heads, patch = options["hidden_size"], options["num_attention_heads"], options["patch_size"]
    if type(image_size) is not int or image_size < 1:
        raise UserError(f"the image size is {image_size!r}, expected a number of pixels", "--model.image_size 224")
    layers, inner = options["num_hidden_layers"], options["intermediate_size"]
    embeddings = width * (3 * patch**2 + (image_size // patch) ** 2)
    if layers * 2 * width * (2 * width + inner) + embeddings > MAX_PARAMETERS or layers > MAX_LAYERS:
        sizes = {name: options[name] for name in _SIZES} | {"image size": image_size}
        raise UserError(
            f"an encoder with {', '.join(f'{name} {str(size)[:20]}' for name, size in sizes.items())}"
            f" has more than {MAX_PARAMETERS:,} parameters or {MAX_LAYERS:,} layers",
            "use weights of a usual size, or smaller --model.options",
        )
    if width % heads:
        raise UserError(
            f"model.options.hidden_size is {width}, not a multiple of num_attention_heads = {str(heads)[:20]}",
            "choose a multiple",
        )
    if image_size % patch:
        near = max(patch, round(image_size / patch) * patch)
        raise UserError(
            f"model.image_size is {image_size}, not a multiple of patch_size = {patch}",
            f"--model.image_size {near}",
        )
    if options["hidden_act"] not in ACT2FN:
        raise UserError(f"model.options.hidden_act is {options['hidden_act']!r}", "use gelu, relu, silu, ...")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if options[name] >= 1:
            raise UserError(f"model.options.{name} is {options[name]}", "use a probability below 1")


@contextmanager
def _quiet() -> Iterator[None]:
    """No report about the new head and no progress bar: what does not fit is an error of ours."""
    log: Any = logging  # partly untyped
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
