"""The model that comes with the package, and which model is taken where none is named."""

from pathlib import Path

from fer_dist.errors import UserError
from fer_dist.serve.predictor import newest_model

ASSETS = Path(__file__).resolve().parents[1] / "assets"
NAME = "patt_lite.onnx"
"""Beside it: `patt_lite.onnx.json` (`serve.artifact`), MODEL_CARD.md, and measured.json, of which the card is made."""
WEIGHTS = "patt_lite.safetensors"
"""The checkpoint it was exported from, in float16: a start for other trainings."""


def shipped_model() -> Path | None:
    """The ONNX file in the package; None: this copy of fer_dist has none."""
    path = ASSETS / NAME
    return path if path.is_file() else None


def default_model() -> Path:
    """The shipped model, else the newest of the user's own runs.

    Raises:
        UserError: there is neither.
    """
    return shipped_model() or newest_model()


def require_shipped() -> Path:
    """The shipped model, where nothing else will do.

    Raises:
        UserError: there is none.
    """
    found = shipped_model()
    if found is None:
        raise UserError(
            "no artifact is named, and no model came with this copy of fer_dist",
            "name one: python -m fer_dist.evaluate best.pth --data PATH",
        )
    return found
