"""`Gathering`: faces as they are read, which all readers share, and what was wrong with the others.

A function that looks at one row or picture raises a UserError without a place; its caller adds it
(`Gathering.bad`).
"""

from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fer_dist.data.faces import TEST, TRAIN, VAL, Faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

_SPLIT_WORDS = {"training": TRAIN, "train": TRAIN, "publictest": VAL, "val": VAL, "valid": VAL}
_SPLIT_WORDS |= {"validation": VAL, "privatetest": TEST, "test": TEST}
_PREFIXES = {"Training": TRAIN, "PublicTest": VAL, "PrivateTest": TEST}
_NAMED = 10  # bad ones that a note names

MAX_PICTURES = 500_000
"""Most pictures or rows, good and bad ones, of a data set, and members of a .zip (FER2013 has 35,887)."""


class Encoded(NamedTuple):
    """One picture as a file holds it: JPEG, PNG and the like."""

    name: str
    raw: bytes
    label: int
    usage: int


class Gathering:
    """Faces as they are read, and what was wrong with the others.

    Args:
        size: side of the pictures to be stored.
        labels: classes of the data set.
        on_error: "stop" makes `bad` raise; "skip" makes it count.
    """

    def __init__(self, size: int, labels: LabelSet, on_error: Literal["stop", "skip"]) -> None:
        self.size, self.labels, self.on_error = size, labels, on_error
        self.notes: list[str] = []
        self._pixels = bytearray()  # one growing block: a list of arrays would need the memory twice
        self._labels: list[int] = []
        self._usage: list[int] = []
        self._names: list[str] = []
        self._bad: list[str] = []  # the first few
        self._bad_count = 0

    def add(self, grey_HW: NDArray[np.uint8], label: int, usage: int, name: str) -> None:
        """Take one picture, brought to `size`; uint8 `[H, W]`.

        Raises:
            UserError: there are more than MAX_PICTURES.
        """
        self._require_room(name)
        self._pixels += resized(grey_HW, self.size).tobytes()
        self._labels.append(label)
        self._usage.append(usage)
        self._names.append(name.replace("\n", " "))  # the cache keeps one name a line

    def bad(self, where: str, problem: str) -> None:
        """Count one bad row or picture.

        Raises:
            UserError: the data set is not read with on_error="skip", or there are more than MAX_PICTURES.
        """
        if self.on_error == "stop":
            raise UserError(f"{where}: {problem}", "repair it, or leave bad ones out with --data.on_error skip")
        self._require_room(where)
        self._bad_count += 1
        self._bad += [f"{where}: {problem}"] * (len(self._bad) < _NAMED)

    def faces(self, source: str) -> Faces:
        """All that was gathered, in the order of coming.

        Raises:
            UserError: nothing was.
        """
        if not self._labels:
            why = f", {self._bad_count:,} bad ones were skipped, the first: {self._bad[0]}" if self._bad else ""
            raise UserError(f"{source} holds no picture{why}", "name FER2013 itself with --data.path")
        if self._bad:
            more = f"; and {self._bad_count - _NAMED:,} more" if self._bad_count > _NAMED else ""
            self.notes.append(f"skipped {self._bad_count:,} bad pictures or rows: {'; '.join(self._bad)}{more}")
        images_NHW = np.frombuffer(self._pixels, dtype=np.uint8).reshape(-1, self.size, self.size)
        return Faces(
            images_NHW=images_NHW,
            labels_N=np.array(self._labels, dtype=np.int64),
            usage_N=np.array(self._usage, dtype=np.int64),
            names=self._names,
            notes=tuple(self.notes),
        )

    def _require_room(self, where: str) -> None:
        if len(self._labels) + self._bad_count >= MAX_PICTURES:
            raise UserError(
                f"{where}: more than {MAX_PICTURES:,} pictures or rows", "split the data set, or use a part of it"
            )


def resized(grey_HW: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A picture brought to `size` x `size`, antialiased; uint8 in and out."""
    if grey_HW.shape == (size, size):
        return grey_HW
    picture = Image.fromarray(grey_HW).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.uint8)


def split_of_word(word: str) -> int | None:
    """TRAIN, VAL or TEST for a Usage, or the name of a folder; None: it says nothing."""
    return _SPLIT_WORDS.get(word.strip().lower())


def split_of_usage(word: str) -> int:
    """TRAIN, VAL or TEST for a Usage.

    Raises:
        UserError: it is none.
    """
    split = split_of_word(word)
    if split is None:
        raise UserError(f"unknown Usage {word[:40]!r}, expected Training, PublicTest or PrivateTest")
    return split


def split_of_prefix(path: str) -> int | None:
    """The split that FER2013 wrote into a file's name (`PublicTest_123.jpg`), or None."""
    return _PREFIXES.get(PurePosixPath(path).name.partition("_")[0])
