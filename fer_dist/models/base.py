"""What every architecture has in common: preprocessing, head and stages around a network."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fer_dist.config import ModelConfig
from fer_dist.errors import UserError
from fer_dist.models.freeze import freeze_stages, hold_frozen_norms
from fer_dist.spec import InputSpec, LabelSet, ModelSpec

LEAST_LEFT = 0.05
"""What `unsmoothed` leaves of a probability, at least: on FER2013 0.02 to 0.2 were equally good."""


class Preprocess(nn.Module):
    """Grey pictures as stored -> pixels as the backbone knows them.

    Resizes bilinearly (half-pixel centres; antialiased only when it reduces), repeats the
    channel three times and normalises, in the floating type of the model. The constants are
    not part of the state: they follow from the spec.
    """

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.image_size = spec.image_size
        mean_C, std_C = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)
        # (x / 255 - mean) / std as one multiplication and one addition.
        scale_C, shift_C = 1 / (255 * std_C), -mean_C / std_C
        dtype = torch.get_default_dtype()
        self.register_buffer("scale_C11", scale_C.to(dtype)[:, None, None], persistent=False)
        self.register_buffer("shift_C11", shift_C.to(dtype)[:, None, None], persistent=False)

    def forward(self, images_N1SS: Tensor) -> Tensor:
        """uint8 or floating `[N, 1, S, S]` on 0..255 -> `[N, 3, image_size, image_size]`."""
        dtype = self.scale_C11.dtype
        # At least float32: half has too few digits for weights of pixels, and no antialiasing on CPUs.
        x_N1SS = images_N1SS.to(torch.promote_types(dtype, torch.float32))
        size = images_N1SS.shape[-1]
        if size != self.image_size:
            x_N1SS = F.interpolate(
                x_N1SS,
                size=(self.image_size, self.image_size),
                mode="bilinear",
                align_corners=False,
                antialias=size > self.image_size,
            )
        return x_N1SS.to(dtype) * self.scale_C11 + self.shift_C11


class FaceModel(nn.Module):
    """Pictures in, logits out: preprocessing, then the network of one architecture.

    Attributes:
        spec: all that is needed to build it again (`fer_dist.models.build`), weights aside.
        stages: names of parameters: stage 0 is the stem or the embeddings, stage i is block i.
        head_names: names of the parameters that are new for this task (learning rate
            `optim.lr`); all others are the backbone.
    """

    def __init__(
        self, spec: ModelSpec, network: nn.Module, stages: Sequence[Sequence[str]], head_names: Sequence[str]
    ) -> None:
        """
        Args:
            spec: the contract that travels with the weights.
            network: pixels `[N, 3, H, W]` -> logits `[N, K]`.
            stages: see above; names as in `network.named_parameters()`.
            head_names: likewise.
        """
        super().__init__()
        self.spec = spec
        self.preprocess = Preprocess(spec.input)
        self.network = network
        self.stages: list[list[str]] = [[f"network.{name}" for name in stage] for stage in stages]
        self.head_names: set[str] = {f"network.{name}" for name in head_names}
        known = {name for name, _ in self.named_parameters()}
        in_stages = {name for stage in self.stages for name in stage}
        assert self.head_names, "a model without a head"
        assert in_stages | self.head_names <= known, "stages or head name a parameter that does not exist"
        assert not in_stages & self.head_names, "the head is never part of a stage"

    @property
    def depth(self) -> int:
        """The number of blocks, which is the largest `model.freeze_depth`."""
        return len(self.stages) - 1

    def forward(self, images_N1SS: Tensor) -> Tensor:
        """uint8, or floating on 0..255, `[N, 1, S, S]` -> logits `[N, K]` in the type of the parameters."""
        logits_NK: Tensor = self.network(self.preprocess(images_N1SS))
        return self._calibrated(logits_NK)

    @property
    def shows_attention(self) -> bool:
        """Whether `with_attention` is there for this architecture."""
        return hasattr(self.network, "with_attention")

    def with_attention(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and the part that each place of the network's grid has in the attention: `[N, h, w]`, sum 1."""
        network: Any = self.network
        logits_NK, attention_NHW = network.with_attention(self.preprocess(images_N1SS))
        return self._calibrated(logits_NK), attention_NHW

    def _calibrated(self, logits_NK: Tensor) -> Tensor:
        """Without the smoothing and at the temperature of the spec; with 0 and 1 not touched, in a graph neither."""
        if self.spec.smoothing:
            logits_NK = unsmoothed(logits_NK, self.spec.smoothing)
        return logits_NK if self.spec.temperature == 1 else logits_NK / self.spec.temperature

    def freeze(self, depth: int) -> Self:
        """Freeze the stem and the first `depth` blocks (0: nothing); frozen batch-norm stays in evaluation mode.

        Raises:
            UserError: there are fewer blocks.
        """
        freeze_stages(self, self.stages, depth)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`, but frozen modules with running statistics stay in evaluation mode."""
        super().train(mode)
        hold_frozen_norms(self)
        return self

    def set_attn_implementation(self, name: str) -> None:
        """Choose how Hugging Face attention is computed, e.g. `"eager"` before an ONNX export; no-op elsewhere.

        Models are built with `"sdpa"`, which trains faster; both give the same logits.
        """
        for module in self.network.modules():
            choose = getattr(module, "set_attn_implementation", None)
            if choose is not None:
                choose(name)


def unsmoothed(logits_NK: Tensor, smoothing: float) -> Tensor:
    """Logits without the label smoothing e of a training; the order of the classes stays.

    Trained on targets (1 - e) t + e / K, a network answers p where q is meant, p = (1 - e) q + e / K. So
    q = (p - e / K) / (1 - e); it is not less than `LEAST_LEFT` of p, since answers also go below e / K.

    Args:
        logits_NK: floating `[N, K]`; logits or log-probabilities.
        smoothing: e, in 0..1.

    Returns:
        The logarithm of q, `[N, K]`; its softmax is q over its sum.
    """
    floor = smoothing / logits_NK.shape[-1]
    log_p_NK = logits_NK.log_softmax(-1)
    p_NK = log_p_NK.exp()
    # Where both are the same: above it the first is larger. Below, its logarithm is not used, but must exist.
    same = floor / (1 - LEAST_LEFT * (1 - smoothing))
    log_q_NK = ((p_NK - floor).clamp_min(1e-6) / (1 - smoothing)).log()
    return torch.where(p_NK > same, log_q_NK, log_p_NK + math.log(LEAST_LEFT))


def resolve_options(arch: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of an architecture: its defaults, replaced by what the user set.

    Raises:
        UserError: unknown option (the nearest is shown), wrong type, a count below 1.
    """
    resolved = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.0)
            hint = "--model.dropout or --model.image_size" if name in ("dropout", "image_size") else near[0]
            raise UserError(
                f"{arch} has no option model.options.{name}",
                f"did you mean {hint!r}? It has {', '.join(defaults)}",
            )
        resolved[name] = _as_type_of(defaults[name], value, f"model.options.{name}")
    return resolved


def _as_type_of(default: Any, value: Any, name: str) -> Any:
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{name} is {value!r}, expected {kind.__name__} such as {default!r}", "put the value right")
    if kind is int and value < 1:
        raise UserError(f"{name} is {value}, expected at least 1", "put the value right")
    if kind is float and not 0 <= value < float("inf"):
        raise UserError(f"{name} is {value}, expected a number of at least 0", "put the value right")
    return value


def make_spec(
    model: ModelConfig,
    size: int,
    labels: LabelSet,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    options: Mapping[str, Any],
) -> ModelSpec:
    """The spec of a resolved model; `image_size` is the backbone's own, which `model.image_size` replaces."""
    red, green, blue = mean
    red_std, green_std, blue_std = std
    shown = InputSpec(
        size=size,
        image_size=image_size if model.image_size is None else model.image_size,
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )
    return ModelSpec(arch=model.arch, labels=labels, input=shown, options={**options, "dropout": model.dropout})
