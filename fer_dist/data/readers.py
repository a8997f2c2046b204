"""FER2013 in every form in which people have it -> `Faces`."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from fer_dist.data.decoding import decode_all
from fer_dist.data.faces import SPLITS, TRAIN, Faces
from fer_dist.data.gathering import Gathering
from fer_dist.data.parquet import parquet_pictures
from fer_dist.data.pictures import (
    MAX_TABLE_BYTES,
    folder_pictures,
    is_hidden,
    is_picture,
    members,
    open_zip,
    walk,
    zip_pictures,
)
from fer_dist.data.tables import Votes, read_csv, read_votes
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

FORMS = "fer2013.csv, icml_face_data.csv, train.csv, class folders, a .zip of either, or parquet"
_CSV_NAMES = ("fer2013.csv", "icml_face_data.csv", "train.csv")


def read_faces(
    path: Path,
    *,
    size: int,
    labels: LabelSet,
    on_error: Literal["stop", "skip"],
    ferplus: Path | None,
) -> Faces:
    """Read and decode a data set; rows keep their order, files are sorted by path.

    Args:
        path: a CSV, .zip or .parquet file, or a folder with class folders, a CSV or parquet files.
        size: side of the stored pictures; others are resized to it (not cropped).
        labels: the classes.
        on_error: "stop" raises at the first bad picture or row; "skip" counts them in a note.
        ferplus: FER+ votes (fer2013new.csv) for the rows of a CSV.

    Returns:
        Faces with uint8 pictures `[N, size, size]` in memory.

    Raises:
        UserError: the path or its form is unknown, the source is damaged or empty, a column or
            class folder is wrong, or one picture or row with on_error="stop".
    """
    into = Gathering(size, labels, on_error)
    if not path.exists():
        raise UserError(f"{path} does not exist", f"--data.path takes {FORMS}")
    if path.is_dir():
        return _read_folder(path, into, ferplus)
    if not path.is_file():  # a pipe would be waited for, a device never ends
        raise UserError(f"{path} is neither a file nor a folder", f"--data.path takes {FORMS}")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        with _text(path) as lines:
            return _read_table(lines, str(path), into, ferplus)
    if suffix == ".zip":
        return _read_zip(path, into, ferplus)
    if suffix == ".parquet":
        return _read_parquet(path.parent, [path.name], into, ferplus)
    raise UserError(f"{path} is of no known form", f"--data.path takes {FORMS}")


def _read_folder(path: Path, into: Gathering, ferplus: Path | None) -> Faces:
    files = walk(path)
    names = [file.name for file in files]
    table = _table_among(names)
    if table is not None:
        into.notes.append(f"of the folder, {table} was read")
        with _text(path / table) as lines:
            return _read_table(lines, str(path / table), into, ferplus)
    parquet = [name for name in names if name.lower().endswith(".parquet") and not is_hidden(name)]
    if parquet:
        return _read_parquet(path, parquet, into, ferplus)
    _refuse(ferplus, path)
    decode_all(folder_pictures(path, files, into), f"{path}/", into)
    return into.faces(str(path))


def _read_zip(path: Path, into: Gathering, ferplus: Path | None) -> Faces:
    with open_zip(path) as archive:
        infos = members(archive, path)
        table = _table_among(list(infos))
        if table is None:
            _refuse(ferplus, path)
            decode_all(zip_pictures(archive, path, infos, into), f"{path}, member ", into)
            return into.faces(str(path))
        source = f"{path}, member {table!r}"
        if infos[table].file_size > MAX_TABLE_BYTES:
            raise UserError(f"{source} would inflate beyond {MAX_TABLE_BYTES:,} bytes", "give the CSV itself")
        into.notes.append(f"of the archive, {table} was read")
        try:
            with archive.open(infos[table]) as member:
                lines = io.TextIOWrapper(member, encoding="utf-8-sig", errors="replace", newline="")
                return _read_table(lines, source, into, ferplus)
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{source} is damaged: {error}", "fetch or pack the archive again") from None


def _read_parquet(root: Path, files: list[str], into: Gathering, ferplus: Path | None) -> Faces:
    _refuse(ferplus, root / files[0])
    decode_all(parquet_pictures(root, files, into), f"{root}/", into)
    return into.faces(str(root / files[0]))


def _read_table(lines: TextIO, source: str, into: Gathering, ferplus: Path | None) -> Faces:
    rows_N, count = read_csv(lines, source, into)
    if ferplus is None:
        return into.faces(source)
    if not ferplus.is_file():
        raise UserError(f"{ferplus} does not exist", "--data.ferplus takes FER+'s fer2013new.csv")
    with _text(ferplus) as votes:
        read = read_votes(votes, str(ferplus), into)
    return _with_votes(into.faces(source), rows_N, count, read, str(ferplus))


def _with_votes(faces: Faces, rows_N: NDArray[np.int64], row_count: int, votes: Votes, source: str) -> Faces:
    """Faces with FER+ votes as soft targets, row by row.

    Training pictures without a vote for our classes are dropped; evaluation pictures keep
    their label, so that the number of them never changes.
    """
    fix = "--data.ferplus takes fer2013new.csv beside the FER2013 CSV in its original order"
    if len(votes.votes_RK) != row_count:
        raise UserError(f"{source} has {len(votes.votes_RK):,} rows, expected {row_count:,} as in the CSV", fix)
    votes_NK, usage_N = votes.votes_RK[rows_N], votes.usage_R[rows_N]
    wrong = np.flatnonzero((usage_N >= 0) & (usage_N != faces.usage_N))
    if wrong.size:
        said, is_ = SPLITS[usage_N[wrong[0]]], SPLITS[faces.usage_N[wrong[0]]]
        raise UserError(f"{source}, row {rows_N[wrong[0]] + 1} is of {said}, but that row of the CSV of {is_}", fix)
    sum_N = votes_NK.sum(axis=1)
    voted_N = sum_N > 0
    targets_NK = np.eye(votes_NK.shape[1], dtype=np.float32)[faces.labels_N]
    targets_NK[voted_N] = votes_NK[voted_N] / sum_N[voted_N, None]
    soft = replace(faces, targets_NK=targets_NK)
    if voted_N.all():
        return soft
    drop_N = ~voted_N & (faces.usage_N == TRAIN)
    dropped, kept = np.count_nonzero(drop_N), np.count_nonzero(~voted_N & ~drop_N)
    note = (
        f"{dropped + kept:,} pictures have no FER+ vote for the {votes_NK.shape[1]} classes: "
        f"{dropped:,} of train are left out, {kept:,} of val and test keep their label"
    )
    return replace(soft, notes=(*faces.notes, note)).select(np.flatnonzero(~drop_N))


def _table_among(names: Sequence[str]) -> str | None:
    """The FER2013 CSV to read, the most complete first; train.csv beside pictures is a list of them."""
    for wanted in _CSV_NAMES:
        for name in names:
            if PurePosixPath(name).name.lower() == wanted and not is_hidden(name):
                return None if wanted == "train.csv" and any(map(is_picture, names)) else name
    return None


def _refuse(ferplus: Path | None, path: Path) -> None:
    if ferplus is not None:
        raise UserError(
            f"--data.ferplus goes by the rows of a CSV, but {path} holds none",
            "give fer2013.csv as --data.path, or leave out --data.ferplus",
        )


def _text(path: Path) -> TextIO:
    try:
        # A byte that is no UTF-8 becomes a sign that no column or number contains: an error with its row.
        return path.open(encoding="utf-8-sig", errors="replace", newline="")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check its permissions") from None
