"""Pictures in class folders or in a .zip of them: found and checked.

Folders and archives come from strangers. Nothing is unpacked to disk; what a member claims to
inflate to is bounded before it is read and held to while it is; an archive in an archive stays
closed; a folder that links back to itself is gone through once.
"""

import errno
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fer_dist.archives import BadArchive, find_directory, require_apart
from fer_dist.data.decoding import FORMAT_OF, MAX_PICTURE_BYTES, require_size
from fer_dist.data.faces import TRAIN
from fer_dist.data.gathering import MAX_PICTURES, Encoded, Gathering, split_of_prefix, split_of_word
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

MAX_TABLE_BYTES = 2**30
"""Largest CSV inside a .zip, inflated (fer2013.csv is 0.3 GB); it is read as a stream."""
MAX_RATIO, FREE_BYTES = 100, 64 * 2**20
"""A whole .zip may inflate to FREE_BYTES + MAX_RATIO x its own size."""

_MAX_DEPTH = 8  # of folders in each other
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
        UserError: a folder cannot be read, or there are more than MAX_PICTURES files and folders.
    """
    found: list[Stamp] = []
    count = 0
    folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # with those above, as the disk knows them
    while folders:
        prefix, above = folders.pop()
        try:
            status = (root / prefix).stat()
            here = (status.st_dev, status.st_ino)
            if here in above or len(above) > _MAX_DEPTH:  # a link to a folder that it lies in
                continue
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if (count := count + 1) > MAX_PICTURES:
                        raise UserError(f"{root} holds more than {MAX_PICTURES:,} files", "name a smaller folder")
                    if entry.name.startswith("."):
                        continue
                    mode, stamp = _looked_at(entry, prefix)
                    if stat.S_ISDIR(mode):
                        folders.append((f"{prefix}{entry.name}/", (*above, here)))
                    elif stat.S_ISREG(mode):
                        found.append(stamp)
        except OSError as error:
            raise UserError(f"{root / prefix} cannot be read: {error.strerror}", "check its permissions") from None
    return sorted(found)


def _looked_at(entry: os.DirEntry[str], prefix: str) -> tuple[int, Stamp]:
    """The kind of an entry, and its stamp; a link to nothing or to itself is a bad picture, not a missing one."""
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return stat.S_IFREG, Stamp(prefix + entry.name, 0, 0)
    return status.st_mode, Stamp(prefix + entry.name, status.st_size, status.st_mtime_ns)


def open_zip(path: Path) -> zipfile.ZipFile:
    """A .zip file, open for reading.

    Raises:
        UserError: it is truncated, or no .zip at all, or its directory has more than MAX_PICTURES members.
    """
    try:
        with path.open("rb") as file:
            find_directory(file, MAX_PICTURES)  # zipfile would read one of any size
        return zipfile.ZipFile(path)
    except (BadArchive, *_UNREADABLE) as error:
        raise UserError(f"{path} is truncated or no .zip file that can be read: {error}", _FETCH) from None


def members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by path, sorted, after every check that needs no reading.

    Raises:
        UserError: a member escapes the archive, has no name, is a link, is encrypted or packed in a
            rare way, two share bytes, or the whole inflates beyond bounds.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")  # some packers of Windows write backslashes
        where = f"{path}, member {info.orig_filename!r}"
        if not name:
            raise UserError(f"{where} has no name", "do not trust this archive; " + _FETCH)
        if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
            raise UserError(f"{where} points outside of the archive", "do not trust this archive; " + _FETCH)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{where} is a link, not a file", "pack what it links to")
        if info.flag_bits & 0x61:  # encrypted, a patch, strongly encrypted
            raise UserError(f"{where} is encrypted", "pack the archive without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # The other methods inflate a chunk whole, so that a bound would come too late.
            raise UserError(f"{where} is packed by method {info.compress_type}", "pack it with deflate or stored")
        if not info.is_dir():
            found[name] = info
    try:
        require_apart(archive.infolist(), archive.start_dir)
    except BadArchive as error:
        raise UserError(f"{path}: {error}", "do not trust this archive; " + _FETCH) from None
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
    return name.lower().endswith(tuple(FORMAT_OF)) and not is_hidden(name)


def folder_pictures(root: Path, files: Sequence[Stamp], into: Gathering) -> Iterator[Encoded]:
    """The encoded pictures of class folders, sorted by path.

    Raises:
        UserError: an unknown class folder, or a bad picture with on_error="stop".
    """
    sizes = {file.name: file.size for file in files}
    for name, label, usage in _plan(list(sizes), str(root), into):
        path = root / name
        try:
            require_size(sizes[name])
            with path.open("rb") as file:
                raw = file.read(MAX_PICTURE_BYTES + 1)  # it may have grown
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
            require_size(infos[name].file_size)
            raw = _inflated(archive, infos[name])
        except UserError as error:
            into.bad(where, error.problem)
        except _UNREADABLE as error:
            into.bad(where, f"is damaged: {error}")
        else:
            yield Encoded(name, raw, label, usage)


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
