"""Tables: FER2013's CSV files, the votes of FER+, and parquet files of encoded pictures.

`Gathering`, which all readers share, collects faces and counts bad ones. A function that looks at
one row or picture raises a UserError without a place; its caller adds it (`Gathering.bad`).
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fer_dist.data.faces import TEST, TRAIN, VAL, Faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

SIDE = 48
"""Side of the pictures in FER2013's CSV files."""

_SPLIT_WORDS = {"training": TRAIN, "train": TRAIN, "publictest": VAL, "val": VAL, "valid": VAL}
_SPLIT_WORDS |= {"validation": VAL, "privatetest": TEST, "test": TEST}
_PREFIXES = {"Training": TRAIN, "PublicTest": VAL, "PrivateTest": TEST}
_NAMED = 10  # bad ones that a note names


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
        self._bad: list[str] = []

    def add(self, grey_HW: NDArray[np.uint8], label: int, usage: int, name: str) -> None:
        """Take one picture, brought to `size`; uint8 `[H, W]`."""
        self._pixels += resized(grey_HW, self.size).tobytes()
        self._labels.append(label)
        self._usage.append(usage)
        self._names.append(name.replace("\n", " "))  # the cache keeps one name a line

    def bad(self, where: str, problem: str) -> None:
        """Count one bad row or picture.

        Raises:
            UserError: the data set is not read with on_error="skip".
        """
        if self.on_error == "stop":
            raise UserError(f"{where}: {problem}", "repair it, or leave bad ones out with --data.on_error skip")
        self._bad.append(f"{where}: {problem}")

    def faces(self, source: str) -> Faces:
        """All that was gathered, in the order of coming.

        Raises:
            UserError: nothing was.
        """
        if not self._labels:
            why = f", {len(self._bad)} bad ones were skipped, the first: {self._bad[0]}" if self._bad else ""
            raise UserError(f"{source} holds no picture{why}", "name FER2013 itself with --data.path")
        if self._bad:
            named = "; ".join(self._bad[:_NAMED])
            more = f"; and {len(self._bad) - _NAMED:,} more" if len(self._bad) > _NAMED else ""
            self.notes.append(f"skipped {len(self._bad):,} bad pictures or rows: {named}{more}")
        images_NHW = np.frombuffer(self._pixels, dtype=np.uint8).reshape(-1, self.size, self.size)
        return Faces(
            images_NHW=images_NHW,
            labels_N=np.array(self._labels, dtype=np.int64),
            usage_N=np.array(self._usage, dtype=np.int64),
            names=self._names,
            notes=tuple(self.notes),
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


def split_of_prefix(path: str) -> int | None:
    """The split that FER2013 wrote into a file's name (`PublicTest_123.jpg`), or None."""
    return _PREFIXES.get(PurePosixPath(path).name.partition("_")[0])


def read_csv(lines: Iterable[str], source: str, into: Gathering) -> tuple[NDArray[np.int64], int]:
    """Gather the rows of `emotion,pixels[,Usage]`; blanks in the header do not matter.

    Returns:
        int64 `[N]`, the row (from 0) of each face that was taken, and the number of rows.

    Raises:
        UserError: a column is missing, or a bad row with on_error="stop".
    """
    rows_N: list[int] = []
    count = 0
    with _table(lines, source) as (header, reader):
        columns = _columns(
            header, ("emotion", "pixels"), source, "give fer2013.csv or train.csv; test.csv has no labels"
        )
        usage_column = header.index("usage") if "usage" in header else None
        if usage_column is None:
            into.notes.append("the CSV has no column Usage: every row is training")
        for count, fields in enumerate(filter(None, reader), start=1):
            try:
                if len(fields) != len(header):
                    raise UserError(f"{len(fields)} fields, expected {len(header)}")
                label = into.labels.index(fields[columns[0]][:40])
                grey_HW = _pixels(fields[columns[1]])
                usage = TRAIN if usage_column is None else _usage(fields[usage_column])
            except UserError as error:
                into.bad(f"{source}, row {count} (line {reader.line_num})", error.problem)
                continue
            into.add(grey_HW, label, usage, f"row {count}")
            rows_N.append(count - 1)
    return np.array(rows_N, dtype=np.int64), count


class Votes(NamedTuple):
    """FER+ votes of R rows: float32 `[R, K]`, and int64 `[R]` splits (-1 where none is given)."""

    votes_RK: NDArray[np.float32]
    usage_R: NDArray[np.int64]


def read_votes(lines: Iterable[str], source: str, into: Gathering) -> Votes:
    """The votes of fer2013new.csv for our classes; contempt, unknown and NF are left out.

    Raises:
        UserError: a class has no column, or a bad row with on_error="stop".
    """
    votes: list[list[int]] = []
    usage: list[int] = []
    with _table(lines, source) as (header, reader):
        canonical = [_class_or_word(word, into.labels) for word in header]
        columns = _columns(canonical, into.labels.names, source, "give fer2013new.csv of FER+")
        usage_column = header.index("usage") if "usage" in header else None
        for row, fields in enumerate(filter(None, reader), start=1):
            counts = [fields[c].strip() if c < len(fields) else "" for c in columns]
            if all(count.isdecimal() and len(count) < 9 for count in counts):
                votes.append([int(count) for count in counts])
            else:
                into.bad(f"{source}, row {row}", f"votes {counts}, expected whole numbers")
                votes.append([0] * len(columns))  # rows stay in step; no votes are dealt with below
            word = fields[usage_column] if usage_column is not None and usage_column < len(fields) else ""
            split = split_of_word(word)
            usage.append(-1 if split is None else split)
    votes_RK = np.array(votes, dtype=np.float32).reshape(-1, len(into.labels))
    return Votes(votes_RK, np.array(usage, dtype=np.int64))


def parquet_pictures(root: Path, files: Sequence[str], into: Gathering) -> Iterator[Encoded]:
    """The encoded pictures of parquet files, in the order of files and rows.

    The image column is a struct with `bytes`, or binary; the label column text or numbers.
    The split is that of a prefix in the picture's path, of a column, of the file's name or of
    its folder, else train.

    Raises:
        UserError: a file is damaged or lacks a column, or a bad row with on_error="stop".
    """
    from pyarrow import ArrowException, parquet  # half a second that most runs do not need

    for name in files:
        path = root / name
        words = (re.split(r"[-_.]", path.name)[0], path.absolute().parent.name)
        of_file = next((split for split in map(split_of_word, words) if split is not None), TRAIN)
        try:
            file = parquet.ParquetFile(path)
            image, label, usage, class_names = _parquet_columns(file.schema_arrow, path)
            columns = [column for column in (image, label, usage) if column is not None]
            row = 0
            for batch in file.iter_batches(batch_size=512, columns=columns):
                for fields in batch.to_pylist():
                    row += 1
                    try:
                        read = _parquet_row([fields.get(c) for c in (image, label, usage)], class_names, of_file, into)
                        yield Encoded(f"{name} row {row}", *read)
                    except UserError as error:
                        into.bad(f"{path} row {row}", error.problem)
        except (ArrowException, OSError) as error:
            raise UserError(f"{path} is no readable parquet file: {error}", "fetch it again") from None


def _parquet_columns(schema: Any, path: Path) -> tuple[str, str, str | None, list[str] | None]:
    by_word = {name.strip().lower(): name for name in schema.names}
    image = next((by_word[word] for word in ("image", "img", "picture") if word in by_word), None)
    label = next((by_word[word] for word in ("label", "labels", "emotion") if word in by_word), None)
    if image is None or label is None:
        missing = "image" if image is None else "label"
        raise UserError(
            f"{path}: no column {missing!r}; found {', '.join(schema.names)}",
            "the columns are image (encoded pictures) and label, as on the Hugging Face Hub",
        )
    usage = by_word.get("usage", by_word.get("split"))
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return image, label, usage, None  # no class names: digits are canonical
    return image, label, usage, names


def _parquet_row(
    fields: Sequence[Any], class_names: list[str] | None, of_file: int, into: Gathering
) -> tuple[bytes, int, int]:
    image, label, usage = fields
    inner = str(image.get("path") or "") if isinstance(image, dict) else ""
    raw = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(raw, bytes):
        raise UserError("no picture, expected bytes or a struct with bytes")
    if class_names is not None and isinstance(label, int):
        if not 0 <= label < len(class_names):
            raise UserError(f"label {label}, expected 0..{len(class_names) - 1}")
        label = class_names[label]
    split = split_of_prefix(inner)
    if split is None:
        split = of_file if usage is None else _usage(str(usage))
    return raw, into.labels.index(str(label)[:40]), split


@contextmanager
def _table(lines: Iterable[str], source: str) -> Iterator[tuple[list[str], Any]]:
    """The header in small letters without blanks, and the reader of the rows below it."""
    reader = csv.reader(lines)
    try:
        yield [word.strip().lower() for word in next(reader, [])], reader
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: {error}", "the file is no CSV; fetch it again") from None


def _columns(header: Sequence[str], wanted: Sequence[str], source: str, fix: str) -> list[int]:
    for word in wanted:
        if word not in header:
            found = ", ".join(header)[:200] or "an empty file"
            raise UserError(f"{source}: no column {word!r}; found {found}, expected {', '.join(wanted)}", fix)
    return [header.index(word) for word in wanted]


def _class_or_word(word: str, labels: LabelSet) -> str:
    try:
        return labels.names[labels.index(word)]
    except UserError:
        return word


def _usage(word: str) -> int:
    split = split_of_word(word)
    if split is None:
        raise UserError(f"unknown Usage {word!r}, expected Training, PublicTest or PrivateTest")
    return split


def _pixels(text: str) -> NDArray[np.uint8]:
    if text.isascii() and text.replace(" ", "").isdecimal():  # nothing that numpy could trip over
        level_P = np.fromstring(text, dtype=np.int64, sep=" ")
        if level_P.size == SIDE * SIDE and level_P.max() <= 255:
            return level_P.astype(np.uint8).reshape(SIDE, SIDE)
    values = text.split()
    if len(values) != SIDE * SIDE:
        raise UserError(f"{len(values):,} pixels, expected {SIDE * SIDE:,} ({SIDE}x{SIDE})")
    wrong = [value for value in values if not (value.isdecimal() and len(value) < 9 and int(value) <= 255)]
    if wrong:
        raise UserError(f"pixel value {wrong[0][:20]!r}, expected a whole number in 0..255")
    return np.array([int(value) for value in values], dtype=np.uint8).reshape(SIDE, SIDE)
