"""Hostile files of tensors that run code where a pickle is simply loaded; what has run leaves a folder, the trace."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# -- pickles by hand: an opcode is a byte, and its argument follows


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
    """Return the smallest attack, to be put into others."""
    return called("os mkdir", text(trace))


# -- files


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


def zipped(files: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive; a list may name a member twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, raw in files.items() if isinstance(files, dict) else files:
            archive.writestr(zipfile.ZipInfo(name), raw, method)
    return out.getvalue()


def around(pickled: bytes, **others: bytes) -> bytes:
    """Return a file of torch.save with another data.pkl, and other members in `archive/`."""
    files = members(benign()) | {"archive/data.pkl": pickled}
    return zipped(files | {f"archive/{name}": raw for name, raw in others.items()})


def old_format(pickled: bytes = b"\x80\x02}.", info: bytes = b"\x80\x02}.", keys: bytes = b"\x80\x02].") -> bytes:
    """Return a file of the old format: magic number, version, C types, content, keys of storages."""
    return b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + info + pickled + keys


def in_tar(trace: Path) -> bytes:
    """Return the format before the old one: a .tar, whose `storages` are the first thing that is unpickled."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            raw = whole(mkdir(trace))
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def twice(first: bytes, second: bytes) -> bytes:
    """Return a .zip with two members data.pkl; torch finds the first, zipfile the second."""
    version = ("archive/version", b"3\n")
    return zipped([("archive/data.pkl", first), ("archive/data.pkl", second), version])


def capitals(trace: Path) -> bytes:
    """Return an archive whose pickle is called DATA.PKL, which torch finds, too."""
    return zipped({name.replace("data.", "DATA."): raw for name, raw in members(around(whole(mkdir(trace)))).items()})


NAMES, FOREIGN, LIKE_NONE = "it names ", "none that torch.save writes", "it begins like no file"
ATTACKS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda t: saved(Calls(os.system, f"mkdir '{t}'")), NAMES),
    "eval": (lambda t: saved(Calls(eval, f"__import__('os').mkdir({str(t)!r})")), NAMES),
    # opcodes
    "GLOBAL of protocol 0": (lambda t: b"cos\nmkdir\n(S'" + str(t).encode() + b"'\ntR.", LIKE_NONE),
    "STACK_GLOBAL": (lambda t: around(whole(text("os") + text("mkdir") + b"\x93(" + text(t) + b"tR", 4)), NAMES),
    "STACK_GLOBAL of a path": (
        lambda t: around(whole(text("torch") + text("os.mkdir") + b"\x93(" + text(t) + b"tR", 4)),
        NAMES,
    ),
    "INST": (lambda t: around(whole(b"(" + text(t) + b"ios\nmkdir\n")), "the opcode INST"),
    "OBJ": (lambda t: around(whole(b"(" + named("os mkdir") + text(t) + b"o")), NAMES),
    "BINPERSID": (lambda t: around(whole(b"(" + text("storage") + mkdir(t) + b"tQ")), NAMES),
    # places in a file
    "raw pickle": (lambda t: whole(mkdir(t)), LIKE_NONE),
    "raw pickle of protocol 4": (lambda t: pickle.dumps(Calls(os.mkdir, str(t)), 4), LIKE_NONE),
    "in a state dict": (lambda t: saved({"weight": torch.zeros(2), "evil": Calls(os.mkdir, str(t))}), NAMES),
    "as a key": (lambda t: around(whole(b"}" + mkdir(t) + b"K\x01s")), NAMES),
    "as an argument": (
        lambda t: around(whole(called("torch._utils _rebuild_parameter", mkdir(t), b"\x88", b"N"))),
        NAMES,
    ),
    "old format": (lambda t: saved({"evil": Calls(os.mkdir, str(t))}, legacy=True), NAMES),
    "old format, third pickle": (lambda t: old_format(info=whole(mkdir(t))), NAMES),
    "old format, last pickle": (lambda t: old_format(keys=whole(mkdir(t))), NAMES),
    "tar": (in_tar, LIKE_NONE),
    "tar in front of a zip": (lambda t: in_tar(t) + benign(), LIKE_NONE),
    "behind the end": (lambda t: around(b"\x80\x02}." + whole(mkdir(t))), "its data.pkl goes on behind its end"),
    "data.pkl twice": (lambda t: twice(whole(mkdir(t)), b"\x80\x02}."), "not exactly one data.pkl"),
    "DATA.PKL": (capitals, FOREIGN),
    "deflated": (lambda t: zipped(members(around(whole(mkdir(t)))), zipfile.ZIP_DEFLATED), "is compressed"),
    "TorchScript": (lambda t: around(whole(mkdir(t)), **{"constants.pkl": b"\x80\x02)."}), FOREIGN),
}
"""Kind -> (path of the trace -> file, reason of the refusal)."""
INERT = ("behind the end", "TorchScript")
"""Of ATTACKS, those that neither `pickle` nor `torch` runs."""
EVIL_NAMES = [
    *("os system", "posix system", "nt system", "subprocess check_call", "shutil rmtree", "builtins eval"),
    *("builtins exec", "builtins getattr", "builtins __import__", "__builtin__ eval", "timeit timeit", "pathlib Path"),
    *("runpy run_path", "importlib import_module", "functools partial", "operator methodcaller", "numpy load"),
    *("operator attrgetter", "torch load", "torch.serialization load", "torch.storage _load_from_bytes"),
    *("torch.hub _load_local", "torch.jit load", "torch._utils os.mkdir"),
    # torch's own guard permits these, which fill the memory
    *("builtins bytearray", "torch FloatTensor", "_codecs encode", "torch._utils _rebuild_meta_tensor_no_storage"),
]
"""Functions that could act, or lead to others that do: `module name`."""
