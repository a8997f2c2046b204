"""Share what is expensive between the processes of pytest-xdist: the first one makes it, the others wait for it."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

SHARED = "TEST_SHARED_FOLDER"
"""Environment variable: a temporary folder of this run of pytest, set by tests/conftest.py."""


def shared_folder(name: str, fill: Callable[[Path], object]) -> Path:
    """Return a folder that is filled once per run of pytest; it is to be read only.

    Args:
        name: unique among the shared folders.
        fill: writes into the folder; not called where another process has done so. If it fails, the next one tries.
    """
    folder = Path(os.environ[SHARED]) / name.replace(":", "-")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            new = folder.with_name(f"{folder.name}.new")
            new.mkdir(exist_ok=True)
            fill(new)
            new.rename(folder)
    return folder
