"""fer_dist: facial-expression classifiers, trained on many GPUs, exported with proof.

Names of arrays and tensors end in their shape: N batch or data set, C channels, H height,
W width, K classes, S side of a square picture, P patches, D features. `images_NHW` is `[N, H, W]`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fer_dist.config import Config, load_config
    from fer_dist.engine.trainer import fit
    from fer_dist.errors import UserError
    from fer_dist.spec import EXPRESSIONS, InputSpec, LabelSet, ModelSpec

__version__ = "0.1.0"

_HOMES = {
    "Config": "fer_dist.config",
    "load_config": "fer_dist.config",
    "fit": "fer_dist.engine.trainer",
    "UserError": "fer_dist.errors",
    "EXPRESSIONS": "fer_dist.spec",
    "InputSpec": "fer_dist.spec",
    "LabelSet": "fer_dist.spec",
    "ModelSpec": "fer_dist.spec",
}

__all__ = [
    "EXPRESSIONS",
    "Config",
    "InputSpec",
    "LabelSet",
    "ModelSpec",
    "UserError",
    "__version__",
    "fit",
    "load_config",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `--help` need not wait for torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fer_dist' has no attribute {name!r}")
