"""Pictures in class folders or in a .zip of them: found, checked, decoded.

Archives and pictures come from strangers. Nothing is unpacked to disk; what a member claims to
inflate to is bounded before it is read and held to while it is; the size of a picture is looked
at before it is decoded; only five common formats are decoded at all.
"""

import io
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fer_dist.data.faces import TRAIN
from fer_dist.data.tables import Encoded, Gathering, resized, split_of_prefix, split_of_word
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")

MAX_PICTURE_BYTES = 16 * 2**20
"""Largest encoded picture, inflated."""
MAX_PIXELS = 2**24
"""Largest picture to be decoded."""
MAX_TABLE_BYTES = 2**30
"""Largest CSV inside a .zip, inflated (fer2013.csv is 0.3 GB); it is read as a stream."""
MAX_RATIO, FREE_BYTES = 100, 64 * 2**20
"""A whole .zip may inflate to FREE_BYTES + MAX_RATIO x its own size."""

_MAX_DEPTH = 8  # ends the walk into a folder that links to itself
_FETCH = "fetch or pack the archive again"
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)


class Stamp(NamedTuple):
    """A file below a folder: its path with forward slashes, bytes, and time of change in ns."""

    name: str
    size: int
    mtime_ns: int


def walk(root: Path) -> list[Stamp]:
    """All files below a folder, sorted by path; hidden ones and what is no regular file left out.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[Stamp] = []
    folders = [("", 0)]
    while folders:
        prefix, depth = folders.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders += [(f"{prefix}{entry.name}/", depth + 1)] * (depth < _MAX_DEPTH)
                        continue
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # a link to nothing: a bad picture, not a missing one
                        found.append(Stamp(prefix + entry.name, 0, 0))
                        continue
                    if stat.S_ISREG(status.st_mode):
                        found.append(Stamp(prefix + entry.name, status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise UserError(f"{root / prefix} cannot be read: {error.strerror}", "check its permissions") from None
    return sorted(found)


def open_zip(path: Path) -> zipfile.ZipFile:
    """A .zip file, open for reading.

    Raises:
        UserError: it is truncated, or no .zip at all.
    """
    try:
        return zipfile.ZipFile(path)
    except _UNREADABLE as error:
        raise UserError(f"{path} is truncated or no .zip file: {error}", _FETCH) from None


def members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by path, sorted, after every check that needs no reading.

    Raises:
        UserError: a member escapes the archive, is encrypted or packed in a rare way, or the
            whole inflates beyond bounds.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")  # some packers of Windows write backslashes
        where = f"{path}, member {info.orig_filename!r}"
        if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
            raise UserError(f"{where} points outside of the archive", "do not trust this archive; " + _FETCH)
        if info.flag_bits & 0x61:  # encrypted, a patch, strongly encrypted
            raise UserError(f"{where} is encrypted", "pack the archive without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # The other methods inflate a chunk whole, so that a bound would come too late.
            raise UserError(f"{where} is packed by method {info.compress_type}", "pack it with deflate or stored")
        if not info.is_dir():
            found[name] = info
    total, bound = sum(info.file_size for info in found.values()), FREE_BYTES + MAX_RATIO * path.stat().st_size
    if total > bound:
        raise UserError(
            f"{path} would inflate to {total:,} bytes, more than {bound:,}", "do not trust this archive; " + _FETCH
        )
    return dict(sorted(found.items()))


def is_hidden(name: str) -> bool:
    """Whether a path is bookkeeping of a file system (`.git/..`, `__MACOSX/..`), not data."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_picture(name: str) -> bool:
    """Whether a path is that of a picture, by its suffix."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def folder_pictures(root: Path, files: Sequence[Stamp], into: Gathering) -> Iterator[Encoded]:
    """The encoded pictures of class folders, sorted by path.

    Raises:
        UserError: an unknown class folder, or a bad picture with on_error="stop".
    """
    sizes = {file.name: file.size for file in files}
    for name, label, usage in _plan(list(sizes), str(root), into):
        path = root / name
        try:
            _check_size(sizes[name])
            raw = path.read_bytes()
        except UserError as error:
            into.bad(str(path), error.problem)
        except OSError as error:
            into.bad(str(path), f"cannot be read: {error.strerror}")
        else:
            yield Encoded(name, raw, label, usage)


def zip_pictures(
    archive: zipfile.ZipFile, path: Path, infos: dict[str, zipfile.ZipInfo], into: Gathering
) -> Iterator[Encoded]:
    """The encoded pictures of class folders inside a .zip, sorted by path.

    Raises:
        UserError: an unknown class folder, or a bad picture with on_error="stop".
    """
    for name, label, usage in _plan(list(infos), str(path), into):
        where = f"{path}, member {name!r}"
        try:
            _check_size(infos[name].file_size)
            raw = _inflated(archive, infos[name])
        except UserError as error:
            into.bad(where, error.problem)
        except _UNREADABLE as error:
            into.bad(where, f"is damaged: {error}")
        else:
            yield Encoded(name, raw, label, usage)


def decode_all(encoded: Iterable[Encoded], prefix: str, into: Gathering) -> None:
    """Decode pictures one by one; `prefix` and the name of a picture say where it is.

    Raises:
        UserError: a bad picture with on_error="stop".
    """
    with warnings.catch_warnings():  # Pillow warns of odd metadata, which says nothing about pixels
        warnings.simplefilter("ignore")
        for name, raw, label, usage in encoded:
            try:
                grey_SS = decode(raw, into.size)
            except UserError as error:
                into.bad(f"{prefix}{name}", error.problem)
            else:
                into.add(grey_SS, label, usage, name)


def decode(raw: bytes, size: int) -> NDArray[np.uint8]:
    """A picture as grey levels, uint8 `[size, size]`; larger and smaller ones are resized.

    Raises:
        UserError: it is none, too large, or damaged.
    """
    _check_size(len(raw))
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:  # known from the header, before decoding
                raise Image.DecompressionBombError(f"{picture.width}x{picture.height} pixels, over {MAX_PIXELS:,}")
            if picture.mode.startswith("I"):  # 16 bits: Pillow would clip them at 255
                return resized((np.asarray(picture) // 257).astype(np.uint8), size)
            if picture.mode in ("P", "PA"):  # a palette may hide transparency, which L cannot express
                return resized(np.asarray(picture.convert("RGBA").convert("L")), size)
            return resized(np.asarray(picture.convert("L")), size)
    except UnidentifiedImageError:
        raise UserError(f"no picture of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise UserError(f"does not decode: {error}") from None


def _check_size(count: int) -> None:
    if count > MAX_PICTURE_BYTES:
        raise UserError(f"{count:,} bytes, more than a picture may have ({MAX_PICTURE_BYTES:,})")


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # Without a count, zipfile inflates all there is and only then cuts to the declared size;
    # with one it stops there, and the CRC tells a member that lied.
    with archive.open(info) as member:
        raw = member.read(info.file_size + 1)
    if len(raw) != info.file_size:
        raise EOFError(f"{len(raw):,} of {info.file_size:,} bytes")
    return raw


def _plan(names: Sequence[str], source: str, into: Gathering) -> list[tuple[str, int, int]]:
    """Label and split of each picture, from the folders that it lies in and its prefix."""
    pictures = [name for name in names if is_picture(name)]
    others = [name for name in names if not is_picture(name) and not is_hidden(name)]
    if others:
        into.notes.append(f"left out {len(others):,} files that are no pictures, the first: {others[0]}")
    parts = [PurePosixPath(name).parts for name in pictures]
    top = _common_top(parts)
    known: dict[tuple[str, ...], tuple[int, int | None]] = {}
    plan: list[tuple[str, int, int]] = []
    for name, part in zip(pictures, parts, strict=True):
        folders = part[top:-1]
        if folders not in known:
            known[folders] = _class_and_split(folders, f"{source}, {name}", into.labels)
        label, of_folder = known[folders]
        of_prefix = split_of_prefix(name)
        usage = of_folder if of_prefix is None else of_prefix
        plan.append((name, label, TRAIN if usage is None else usage))
    if known and all(of_folder is None for _, of_folder in known.values()):
        into.notes.append("there are no train and test folders: pictures are training unless their name says otherwise")
    return plan


def _common_top(parts: Sequence[tuple[str, ...]]) -> int:
    """How many folders all paths begin with, before the folders of splits and classes."""
    top = 0
    while parts and all(len(p) > top + 2 and p[top] == parts[0][top] for p in parts):
        if split_of_word(parts[0][top]) is not None:
            break
        top += 1
    return top


def _class_and_split(folders: tuple[str, ...], where: str, labels: LabelSet) -> tuple[int, int | None]:
    fix = (
        f"pictures lie in train/<class>/ and test/<class>/, or in <class>/, with the classes {', '.join(labels.names)}"
    )
    if not folders:
        raise UserError(f"{where} lies in no class folder", fix)
    try:
        label = labels.index(folders[-1])
    except UserError:
        raise UserError(f"{where}: unknown class folder {folders[-1]!r}", fix) from None
    if len(folders) == 1:
        return label, None
    split = split_of_word(folders[-2])
    if split is None or len(folders) > 2:
        raise UserError(f"{where}: expected train, val or test instead of {'/'.join(folders[:-1])!r}", fix)
    return label, split
