"""Malicious files of tensors: pickles by hand, archives by hand, and attacks that run code where a file is unpickled.

An attack that has run leaves a folder, the trace.
"""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

# -- pickles: an opcode is a byte, and its argument follows


def text(value: str | Path) -> bytes:
    raw = str(value).encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(name: str) -> bytes:
    """GLOBAL: `module name`."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def called(name: str, *arguments: bytes) -> bytes:
    """REDUCE: a function by its name, with arguments."""
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def whole(body: bytes, protocol: int = 2) -> bytes:
    """Return a pickle whose value is that of `body`."""
    return b"\x80" + bytes([protocol]) + body + b"."


def mkdir(trace: Path) -> bytes:
    """Return a pickle that makes the folder."""
    return whole(called("os mkdir", text(trace)))


# -- archives


def zipped(files: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive; a list may name a member twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, raw in files.items() if isinstance(files, dict) else files:
            archive.writestr(zipfile.ZipInfo(name), raw, method)
    return out.getvalue()


def entry(name: str, size: int = 0, offset: int = 0, mode: int = 0) -> bytes:
    """Return the entry of a deflated member in the directory of an archive, with the file mode of Unix."""
    fields = (b"PK\1\2", 20, 20, 0, 8, 0, 33, 0, size, size, len(name), 0, 0, 0, 0, mode << 16, offset)
    return struct.pack("<4s6H3L5H2L", *fields) + name.encode()


def with_directory(body: bytes, entries: list[bytes], count: int | None = None) -> bytes:
    """Return an archive whose directory is given entry by entry, and may claim another count."""
    count, listed = len(entries) if count is None else count, b"".join(entries)
    return body + listed + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(listed), len(body), 0)


# -- files of tensors


def saved(content: Any, legacy: bool = False) -> bytes:
    """Return what torch.save writes."""
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


@cache
def benign(legacy: bool = False) -> bytes:
    """Return a small state dict."""
    return saved({"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3)}, legacy)


def members(raw: bytes) -> dict[str, bytes]:
    """Return the members of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def around(pickled: bytes, name: str = "data.pkl", others: Mapping[str, bytes] | None = None) -> bytes:
    """Return a file of torch.save with another pickle, perhaps under another name, and other members."""
    files = members(benign())
    del files["archive/data.pkl"]
    more = {f"archive/{name}": raw for name, raw in (others or {}).items()}
    return zipped({f"archive/{name}": pickled} | files | more)


def old_format(pickled: bytes = whole(b"}"), info: bytes = whole(b"}"), keys: bytes = whole(b"]")) -> bytes:
    """Return a file of the old format: magic number, version, C types, content, keys of storages."""
    return b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + info + pickled + keys


class Calls:
    """Pickled as a call of os.mkdir."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.trace,)


NAMES = "it names "
ATTACKS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "state dict": (lambda t: saved({"weight": torch.zeros(2), "evil": Calls(t)}), NAMES),
    "STACK_GLOBAL": (lambda t: around(whole(text("torch") + text("os.mkdir") + b"\x93(" + text(t) + b"tR", 4)), NAMES),
    "INST": (lambda t: around(whole(b"(" + text(t) + b"ios\nmkdir\n")), "the opcode INST"),
    "data.pkl twice": (  # torch finds the first, zipfile the second
        lambda t: zipped([*members(around(mkdir(t))).items(), ("archive/data.pkl", whole(b"}"))]),
        "not exactly one data.pkl",
    ),
    "DATA.PKL": (lambda t: around(mkdir(t), "DATA.PKL"), "none that torch.save writes"),
    "old format": (lambda t: saved({"evil": Calls(t)}, legacy=True), NAMES),
    "old format, third pickle": (lambda t: old_format(info=mkdir(t)), NAMES),
    "old format, last pickle": (lambda t: old_format(keys=mkdir(t)), NAMES),
    "raw pickle": (lambda t: pickle.dumps(Calls(t)), "it begins like no file"),
}
"""Kind -> (path of the trace -> file, reason of the refusal)."""
