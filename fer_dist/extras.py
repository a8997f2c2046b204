"""Packages that not every machine can have: imported when needed, or an error that names the extra."""

import importlib
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from fer_dist.errors import UserError


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed, or does not load; the message names the extra that brings it.
    """
    install = f"pip install 'fer-dist[{extra}]', or in a checkout: .venv/bin/pip install -e '.[{extra}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            raise UserError(f"the package {module!r} is not installed", install) from None
        broken: Exception = error
    except (ImportError, OSError) as error:  # TensorRT's wheels find their shared libraries at import
        broken = error
    raise UserError(f"the package {module!r} is installed but does not load: {broken}", install) from broken
