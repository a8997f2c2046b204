"""The directory of a .zip, looked at before `zipfile` or torch believe it.

Both read the directory at the end of a file and trust it: its length, its entries, and where its
members lie. A stranger's archive may name millions of members, the same bytes many times over, or
hide a second directory that only one of the two readers would find.
"""

import struct
import zipfile
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY_BYTES = 256  # what the directory may have for each member that is allowed: a name and its dates
_HEADER_BYTES = 30  # before each member, and the name again


class BadArchive(Exception):
    """What is wrong with an archive, in one line."""


class Directory(NamedTuple):
    """What the end of a .zip says about its directory.

    Attributes:
        start: where it begins in the file.
        declared: the members that it says it has; `zipfile` goes by what it finds.
        prefix: bytes in front of the archive; 0 unless something was put there.
        end: where the archive ends, its comment included.
    """

    start: int
    declared: int
    prefix: int
    end: int


def find_directory(file: BinaryIO, most: int) -> Directory:
    """Find the directory where `zipfile` will, and refuse one that is ambiguous or too large to be read.

    Args:
        file: open for reading, seekable; it is left standing anywhere.
        most: the members that the archive may have.

    Raises:
        BadArchive: there is none, it does not fit into the file, its parts contradict each other,
            or it has more than `most` entries or more than 256 bytes for each of these.
    """
    length = file.seek(0, 2)
    tail_start = max(0, length - _LOCATOR.size - _END64.size - _END.size - 0xFFFF)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise BadArchive("it has no directory at its end")
    *_, count, size, offset, comment_size = _END.unpack_from(tail, at)
    end = at + _END.size + comment_size
    locator, large = at - _LOCATOR.size, at - _LOCATOR.size - _END64.size
    if locator >= 0 and tail[locator:].startswith(b"PK\6\7"):
        if large < 0 or not tail[large:].startswith(b"PK\6\6"):
            raise BadArchive("the two records at its end contradict each other")
        *_, count, size, offset = _END64.unpack_from(tail, large)
        # torch follows the locator, zipfile looks in front of it: they must not find different directories.
        if _LOCATOR.unpack_from(tail, locator)[2] != offset + size:
            raise BadArchive("the two records at its end contradict each other")
        at = large
    start = tail_start + at - size
    if start < offset:
        raise BadArchive(f"its directory of {size:,} bytes at {offset:,} does not fit into {length:,} bytes")
    if size > most * _ENTRY_BYTES:
        raise BadArchive(f"its directory has {size:,} bytes, more than {most * _ENTRY_BYTES:,}")
    file.seek(start)
    found = file.read(size).count(b"PK\1\2")  # each entry begins so; the declared count binds nobody
    if max(found, count) > most:
        raise BadArchive(f"its directory has {max(found, count):,} members, more than {most:,}")
    return Directory(start, count, start - offset, tail_start + end)


def require_apart(infos: Iterable[zipfile.ZipInfo], end: int) -> None:
    """Refuse members that share bytes: a small file inflates a thousandfold that way.

    Args:
        infos: all members.
        end: where the directory begins, which is behind all of them.

    Raises:
        BadArchive: two overlap, or one reaches into the directory.
    """
    before, reach = "", 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < reach:
            raise BadArchive(f"the members {before!r} and {info.orig_filename!r} overlap")
        before = info.orig_filename
        reach = info.header_offset + _HEADER_BYTES + len(before) + info.compress_size
    if reach > end:
        raise BadArchive(f"the member {before!r} reaches into the directory")
