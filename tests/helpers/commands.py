"""Shared by the tests of commands: require that a command refuses its arguments, make a small data set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fer_dist.errors import EXIT_USER_ERROR
from tests.helpers.exporting import command

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def refused(capsys: Capture, main: Callable[[], None], *words: object, fix: bool = True) -> str:
    """Require exit code 2, one error (with its fix) and no traceback; return what stands on stderr."""
    capsys.readouterr()
    assert command(main, *words) == EXIT_USER_ERROR, words
    err = capsys.readouterr().err
    assert err.count("error: ") == 1, err
    assert ("\n  -> " in err) == fix, err
    assert "Traceback" not in err
    return err


def data_folder(root: Path, parts: dict[str, list[tuple[str, int]]]) -> Path:
    """Write class folders of noise.

    Args:
        parts: train, val or test -> class and seed of each picture; seed 0 is a black picture.
    """
    marks = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
    for part, pictures in parts.items():
        for place, (label, seed) in enumerate(pictures):
            image = np.random.default_rng(seed).integers(0, 256 if seed else 1, (48, 48), dtype=np.uint8)
            path = root / ("train" if part == "train" else "test") / label / f"{marks[part]}_{part}{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root
