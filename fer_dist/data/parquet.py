"""Parquet files of encoded pictures, as on the Hugging Face Hub.

A parquet file is packed: a kilobyte of it may hold one picture a thousand times, or a page of a
gigabyte. What its footer says about that binds nobody, so the heads of the pages are read first.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fer_dist.data.faces import TRAIN
from fer_dist.data.gathering import Encoded, Gathering, split_of_prefix, split_of_usage, split_of_word
from fer_dist.errors import UserError

MAX_GROUP_BYTES = 256 * 2**20
"""Largest row group, unpacked, of the columns that are read. One row may be as large again, a few times over."""
MAX_LISTED = 10_000
"""Most columns, and most row groups, of a file."""
_MAX_NAME_BYTES = 2**24  # of names and descriptions in the footer
_MAX_ROWS, _BATCH_BYTES = 512, 64 * 2**20  # taken at once
_WHOLE, _BYTES, _STRUCT = (4, 5, 6), 8, 12  # types of thrift's compact protocol
_FIXED = {1: 0, 2: 0, 3: 1, 7: 8}  # bytes of the types without a length


def parquet_pictures(root: Path, files: Sequence[str], into: Gathering) -> Iterator[Encoded]:
    """The encoded pictures of parquet files, in the order of files and rows.

    The image column is a struct with `bytes`, or binary; the label column text or numbers.
    The split is that of a prefix in the picture's path, of a column, of the file's name or of
    its folder, else train.

    Raises:
        UserError: a file is damaged, lacks a column or has a row group beyond MAX_GROUP_BYTES, or a
            bad row with on_error="stop".
    """
    from pyarrow import ArrowException, parquet  # half a second that most runs do not need

    limits = {"thrift_container_size_limit": MAX_LISTED, "thrift_string_size_limit": _MAX_NAME_BYTES}
    for name in files:
        path = root / name
        words = (re.split(r"[-_.]", path.name)[0], path.absolute().parent.name)
        of_file = next((split for split in map(split_of_word, words) if split is not None), TRAIN)
        try:
            with parquet.ParquetFile(path, **limits) as file, path.open("rb") as plain:
                image, label, usage, class_names = _columns(file.schema_arrow, path)
                columns = [image, label] if usage is None else [image, label, usage]
                for row, fields in enumerate(_rows(file, plain, path, columns), start=1):
                    try:
                        read = _row([*map(fields.get, columns), None][:3], class_names, of_file, into)
                        yield Encoded(f"{name} row {row}", *read)
                    except UserError as error:
                        into.bad(f"{path} row {row}", error.problem)
        except (ArrowException, OSError, OverflowError, ValueError) as error:
            raise UserError(
                f"{path} is no readable parquet file of at most {MAX_LISTED:,} columns and row groups: {error}",
                "fetch it again",
            ) from None


def _rows(file: Any, plain: BinaryIO, path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of an open parquet file, as many at once as cannot grow beyond MAX_GROUP_BYTES."""
    for group in range(file.metadata.num_row_groups):
        size = sum(_unpacked(plain, leaf) for leaf in _leaves(file.metadata.row_group(group), columns))
        if size > MAX_GROUP_BYTES:
            raise UserError(
                f"{path}: row group {group} unpacks to {size:,} bytes or more, allowed are {MAX_GROUP_BYTES:,}",
                "do not trust this file; if it is yours, write it with fewer rows in a group",
            )
        # One value may be as large as the group, and be that of every row.
        count = max(1, min(_MAX_ROWS, _BATCH_BYTES // max(1, size)))
        for batch in file.iter_batches(batch_size=count, row_groups=[group], columns=columns):
            for row in range(batch.num_rows):
                yield {name: batch.column(name)[row].as_py() for name in columns}


def _leaves(group: Any, columns: list[str]) -> Iterator[Any]:
    for index in range(group.num_columns):
        leaf = group.column(index)
        if any(leaf.path_in_schema == name or leaf.path_in_schema.startswith(f"{name}.") for name in columns):
            yield leaf


def _unpacked(file: BinaryIO, leaf: Any) -> int:
    """Bytes of the pages of a column in a row group when unpacked, by their own heads; stops beyond the bound.

    Raises:
        OSError: something else is where a page should be.
    """
    place = min(place for place in (leaf.dictionary_page_offset, leaf.data_page_offset) if place is not None)
    end, total = place + leaf.total_compressed_size, 0
    while place < end and total <= MAX_GROUP_BYTES:
        file.seek(place)
        head = _whole_fields(file, 0)
        size, packed = head.get(2, -1), head.get(3, -1)
        if size < 0 or packed < 0:
            raise OSError("a page without a size")
        total += size
        place = file.tell() + packed
    return total


def _whole_fields(file: BinaryIO, depth: int) -> dict[int, int]:
    """The whole numbers of a thrift struct by field; the rest is passed over.

    Raises:
        OSError: it is none of a page's head.
    """
    found: dict[int, int] = {}
    field = 0
    while kind := _byte(file):
        field = field + (kind >> 4) if kind >> 4 else _zigzag(file)
        kind &= 15
        if kind in _WHOLE:
            found[field] = _zigzag(file)
        elif kind == _BYTES:
            file.seek(_varint(file), 1)
        elif kind in _FIXED:
            file.seek(_FIXED[kind], 1)
        elif kind == _STRUCT and depth < 3:
            _whole_fields(file, depth + 1)
        else:
            raise OSError("the head of a page is damaged")
    return found


def _byte(file: BinaryIO) -> int:
    read = file.read(1)
    if not read:
        raise OSError("a page lies beyond the end")
    return read[0]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise OSError("the head of a page is damaged")


def _zigzag(file: BinaryIO) -> int:
    value = _varint(file)
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1


def _columns(schema: Any, path: Path) -> tuple[str, str, str | None, list[str] | None]:
    """The names of the columns of pictures, labels and splits, and those of the classes."""
    from pyarrow import types

    by_word = {name.strip().lower(): name for name in schema.names}
    image = next((by_word[word] for word in ("image", "img", "picture") if word in by_word), None)
    label = next((by_word[word] for word in ("label", "labels", "emotion") if word in by_word), None)
    if image is None or label is None:
        missing = "image" if image is None else "label"
        raise UserError(
            f"{path}: no column {missing!r}; found {', '.join(schema.names)[:200]}",
            "the columns are image (encoded pictures) and label, as on the Hugging Face Hub",
        )
    usage = by_word.get("usage", by_word.get("split"))
    for name in (image, label, usage):
        if name is None:
            continue
        kind = schema.field(name).type
        parts = [kind.field(i).type for i in range(kind.num_fields)] if types.is_struct(kind) else [kind]
        if any(part.num_fields for part in parts):  # a row of lists may be endless
            raise UserError(
                f"{path}: the column {name!r} holds {str(kind)[:80]}", "image is bytes or a struct with bytes and path"
            )
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return image, label, usage, None  # no class names: digits are canonical
    return image, label, usage, names


def _row(fields: Sequence[Any], class_names: list[str] | None, of_file: int, into: Gathering) -> tuple[bytes, int, int]:
    image, label, usage = fields
    inner = str(image.get("path") or "")[-300:] if isinstance(image, dict) else ""
    raw = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(raw, bytes):
        raise UserError("no picture, expected bytes or a struct with bytes")
    if class_names is not None and isinstance(label, int):
        if not 0 <= label < len(class_names):
            raise UserError(f"label {label}, expected 0..{len(class_names) - 1}")
        label = class_names[label]
    split = split_of_prefix(inner)
    if split is None:
        split = of_file if usage is None else split_of_usage(str(usage)[:40])
    return raw, into.labels.index(str(label)[:40]), split
