"""Share what is expensive between the processes of pytest-xdist: the first one makes it, the others wait for it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """Return a folder that is filled once per run of pytest.

    Args:
        factory: the fixture `tmp_path_factory`.
        name: unique among all shared folders.
        fill: writes into the folder; not called where another process has done so. If it fails, the next one tries.
    """
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"shared-{name}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            new = folder.with_name(f"{folder.name}.new")
            new.mkdir(exist_ok=True)
            fill(new)
            new.rename(folder)
    return folder
