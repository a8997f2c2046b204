"""The contract that every artifact carries: labels, input and architecture.

A checkpoint, an ONNX file and an engine all hold a `ModelSpec`, so that nobody types a class
count, a picture size, a mean or a label order a second time.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fer_dist.errors import UserError

EXPRESSIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
"""FER2013's seven expressions in the order of the CSV's codes 0..6 (Goodfellow et al., 2013)."""

_ALIASES = {
    "anger": "angry",
    "disgusted": "disgust",
    "fearful": "fear",
    "afraid": "fear",
    "happiness": "happy",
    "sadness": "sad",
    "surprised": "surprise",
}

LARGEST = 1024
"""Largest side of a picture [pixels], and most labels, that a spec from a file may have."""

LOWEST, HIGHEST = 0.01, 100.0
"""Of a temperature: beyond these a model knows nothing, or its answers were all right, and float16 overflows."""

MOST_SMOOTHING = 0.9
"""Of labels, as in `train.label_smoothing`."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """Class names in the order of the logits."""

    names: tuple[str, ...] = EXPRESSIONS

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """The class index of a name or of a digit, case and common synonyms aside.

        Raises:
            UserError: no class is called so.
        """
        word = name.strip().lower()
        word = _ALIASES.get(word, word)
        if word in self.names:
            return self.names.index(word)
        if word.isdecimal() and int(word) < len(self.names):
            return int(word)
        raise UserError(
            f"unknown class {name!r}; expected one of {', '.join(self.names)}, or 0..{len(self.names) - 1}",
            "rename it, or leave it out of the data set",
        )


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What goes into a model: uint8 grey pictures `[N, 1, size, size]`, values 0..255.

    The model itself enlarges them to `image_size`, repeats the channel three times and
    normalises with `mean` and `std` (of values scaled to 0..1).
    """

    size: int = 48
    image_size: int = 48
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything needed to build the network again, weights aside.

    Attributes:
        options: sizes of the architecture.
        smoothing: label smoothing of the training, taken back from the network's answers (`fer_dist.calibrate`),
            fraction; 0: it is not, as while it trains.
        temperature: what its logits are then divided by; 1 while it trains.
    """

    arch: str
    labels: LabelSet = field(default_factory=LabelSet)
    input: InputSpec = field(default_factory=InputSpec)
    options: dict[str, Any] = field(default_factory=dict)
    smoothing: float = 0.0
    temperature: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as they are stored in checkpoints and JSON files."""
        plain = asdict(self)
        plain["labels"] = list(self.labels.names)
        plain["input"] = {k: list(v) if isinstance(v, tuple) else v for k, v in plain["input"].items()}
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ModelSpec":
        """The inverse of `to_dict`; the dictionary may come from a stranger's file, or from before calibration.

        Raises:
            KeyError, TypeError, ValueError: the dictionary is not one of ours.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain["input"].items()}
        spec = cls(
            arch=plain["arch"],
            labels=LabelSet(names=tuple(plain["labels"])),
            input=InputSpec(**values),
            options=dict(plain["options"]),
            smoothing=plain.get("smoothing", 0.0),
            temperature=plain.get("temperature", 1.0),
        )
        names, shown = spec.labels.names, spec.input
        sizes = all(type(size) is int and 1 <= size <= LARGEST for size in (shown.size, shown.image_size))
        colours = all(
            len(colour) == 3 and all(type(x) is float and math.isfinite(x) for x in colour)
            for colour in (shown.mean, shown.std)
        )
        if not (type(spec.arch) is str and sizes and colours and min(shown.std) > 0):
            raise ValueError("its architecture, sizes, mean or deviation are none")
        if not 0 < len(names) == len(set(names)) <= LARGEST or not all(type(name) is str for name in names):
            raise ValueError("its labels are no different names")
        if not all(type(name) is str for name in spec.options):
            raise ValueError("its options have no names")
        if type(spec.smoothing) is not float or not 0 <= spec.smoothing <= MOST_SMOOTHING:
            raise ValueError(f"its smoothing is no number within 0..{MOST_SMOOTHING}")
        if type(spec.temperature) is not float or not LOWEST <= spec.temperature <= HIGHEST:
            raise ValueError(f"its temperature is no number within {LOWEST}..{HIGHEST}")
        return spec
