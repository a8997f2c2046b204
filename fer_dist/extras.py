"""Packages that not every machine can have: imported when needed, or an error that names the extra."""

import importlib
from types import ModuleType

from fer_dist.errors import UserError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise UserError(
            f"the package {module!r} is not installed",
            f"pip install 'fer-dist[{extra}]'",
        ) from None
