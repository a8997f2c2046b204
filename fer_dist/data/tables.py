"""Tables: FER2013's CSV files, and the votes of FER+."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from fer_dist.data.faces import TRAIN
from fer_dist.data.gathering import MAX_PICTURES, Gathering, split_of_usage, split_of_word
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

SIDE = 48
"""Side of the pictures in FER2013's CSV files."""
MAX_ROW_CHARS = 2**16
"""Longest row of a CSV, over however many lines it goes; one of FER2013 has 9,000. No more is held in memory."""


def read_csv(lines: TextIO, source: str, into: Gathering) -> tuple[NDArray[np.int64], int]:
    """Gather the rows of `emotion,pixels[,Usage]`; blanks in the header do not matter.

    Returns:
        int64 `[N]`, the row (from 0) of each face that was taken, and the number of rows.

    Raises:
        UserError: a column is missing, or a bad row with on_error="stop".
    """
    rows_N: list[int] = []
    count = 0
    with _table(lines, source) as (header, rows):
        columns = _columns(
            header, ("emotion", "pixels"), source, "give fer2013.csv or train.csv; test.csv has no labels"
        )
        usage_column = header.index("usage") if "usage" in header else None
        if usage_column is None:
            into.notes.append("the CSV has no column Usage: every row is training")
        for count, fields in enumerate(filter(None, rows), start=1):
            try:
                if len(fields) != len(header):
                    raise UserError(f"{len(fields)} fields, expected {len(header)}")
                label = into.labels.index(fields[columns[0]][:40])
                grey_HW = _pixels(fields[columns[1]])
                usage = TRAIN if usage_column is None else split_of_usage(fields[usage_column])
            except UserError as error:
                into.bad(f"{source}, row {count} (line {rows.line_num})", error.problem)
                continue
            into.add(grey_HW, label, usage, f"row {count}")
            rows_N.append(count - 1)
    return np.array(rows_N, dtype=np.int64), count


class Votes(NamedTuple):
    """FER+ votes of R rows: float32 `[R, K]`, and int64 `[R]` splits (-1 where none is given)."""

    votes_RK: NDArray[np.float32]
    usage_R: NDArray[np.int64]


def read_votes(lines: TextIO, source: str, into: Gathering) -> Votes:
    """The votes of fer2013new.csv for our classes; contempt, unknown and NF are left out.

    Raises:
        UserError: a class has no column, or a bad row with on_error="stop".
    """
    votes: list[list[int]] = []
    usage: list[int] = []
    with _table(lines, source) as (header, rows):
        canonical = [_class_or_word(word, into.labels) for word in header]
        columns = _columns(canonical, into.labels.names, source, "give fer2013new.csv of FER+")
        usage_column = header.index("usage") if "usage" in header else None
        for row, fields in enumerate(filter(None, rows), start=1):
            counts = [fields[c].strip() if c < len(fields) else "" for c in columns]
            if all(count.isdecimal() and len(count) < 9 for count in counts):
                votes.append([int(count) for count in counts])
            else:
                into.bad(f"{source}, row {row}", f"votes {str(counts)[:80]}, expected whole numbers")
                votes.append([0] * len(columns))  # rows stay in step; no votes are dealt with below
            word = fields[usage_column] if usage_column is not None and usage_column < len(fields) else ""
            split = split_of_word(word)
            usage.append(-1 if split is None else split)
    votes_RK = np.array(votes, dtype=np.float32).reshape(-1, len(into.labels))
    return Votes(votes_RK, np.array(usage, dtype=np.int64))


class _Rows(Iterator[list[str]]):
    """The rows of a CSV, which may be one endless line: none is read further than MAX_ROW_CHARS."""

    def __init__(self, lines: TextIO, source: str) -> None:
        self._lines, self._source = lines, source
        self._reader = csv.reader(self._bounded())
        self._left, self._count = MAX_ROW_CHARS, 0

    @property
    def line_num(self) -> int:
        return self._reader.line_num

    def __next__(self) -> list[str]:
        self._left = MAX_ROW_CHARS
        row = next(self._reader)
        self._count += 1
        if self._count > MAX_PICTURES + 1:  # the header is one, too
            raise UserError(f"{self._source} has more than {MAX_PICTURES:,} rows", "split it, or use a part of it")
        return row

    def _bounded(self) -> Iterator[str]:
        """Lines, as many as the reader wants for a row."""
        while line := self._lines.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                raise UserError(
                    f"{self._source}, line {self.line_num + 1}: a row of more than {MAX_ROW_CHARS:,} characters",
                    "the file is no CSV of FER2013; fetch it again",
                )
            yield line


@contextmanager
def _table(lines: TextIO, source: str) -> Iterator[tuple[list[str], _Rows]]:
    """The header in small letters without blanks, and the rows below it."""
    rows = _Rows(lines, source)
    try:
        yield [word.strip().lower() for word in next(rows, [])], rows
    except csv.Error as error:
        raise UserError(f"{source}, line {rows.line_num}: {error}", "the file is no CSV; fetch it again") from None


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
