"""Hostile files of tensors, made on the spot: some run code where a pickle is simply loaded, others fill the memory.

Code that runs leaves a trace: it makes a folder. To add a file, add a line to ATTACKS or BOMBS.
"""

import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class Attack(NamedTuple):
    """A file that acts where the guard is off.

    Attributes:
        make: the path of the trace -> the file; what else it needs, it puts beside the trace.
        proof: who shows that it acts: plain "pickle" or "torch" without its guard; "" where neither does.
        reason: why it is refused.
    """

    make: Callable[[Path], bytes]
    proof: str = "torch"
    reason: str = "it names "


class Acts:
    """A class of the program itself, whose making or restoring acts."""

    def __new__(cls, trace: str = "") -> "Acts":
        if trace:
            os.mkdir(trace)  # noqa: PTH102
        return super().__new__(cls)

    def __setstate__(self, trace: str) -> None:
        os.mkdir(trace)  # noqa: PTH102


class Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# -- pickles by hand: an opcode is a byte, and what it needs follows


def text(value: str | Path) -> bytes:
    """A text, as in protocol 2."""
    raw = str(value).encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(name: str) -> bytes:
    """GLOBAL: `module name`."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def called(name: str, *arguments: bytes) -> bytes:
    """REDUCE: a function by its name, with arguments that are on the stack then."""
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def whole(body: bytes, protocol: int = 2) -> bytes:
    """A pickle: the value of `body` is what it gives."""
    return b"\x80" + bytes([protocol]) + body + b"."


def mkdir(trace: Path) -> bytes:
    """The smallest attack, to be put into others."""
    return called("os mkdir", text(trace))


# -- files


def saved(content: Any, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def benign(legacy: bool = False) -> bytes:
    """A small state dict."""
    return saved({"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3)}, legacy)


def members(raw: bytes) -> dict[str, bytes]:
    """The members of an archive."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(files: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive; a list may name a member twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, raw in files.items() if isinstance(files, dict) else files:
            archive.writestr(zipfile.ZipInfo(name), raw, method)
    return out.getvalue()


def around(pickled: bytes, **others: bytes) -> bytes:
    """A file of torch.save with another data.pkl, and other members in `archive/`."""
    files = members(benign()) | {"archive/data.pkl": pickled}
    return zipped(files | {f"archive/{name}": raw for name, raw in others.items()})


def old_format(pickled: bytes = b"\x80\x02}.", info: bytes = b"\x80\x02}.", keys: bytes = b"\x80\x02].") -> bytes:
    """A file of the old format: magic number, version, C types, content, keys of storages."""
    return b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + info + pickled + keys


def beside(trace: Path, name: str, raw: bytes) -> Path:
    """Write what an attack needs beside its trace."""
    path = trace.with_name(name)
    path.write_bytes(raw)
    return path


def in_tar(trace: Path) -> bytes:
    """The format before the old one: a .tar, whose `storages` are the first thing that is unpickled."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            raw = whole(mkdir(trace))
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def twice(first: bytes, second: bytes, others: int) -> bytes:
    """A .zip with two members data.pkl; which one torch finds depends on how many others there are."""
    rest = [(name, raw) for name, raw in members(benign()).items() if not name.endswith("data.pkl")]
    rest.sort(key=lambda item: not item[0].endswith("/version"))
    return zipped([("archive/data.pkl", first), ("archive/data.pkl", second), *rest[:others]])


def two_directories(trace: Path) -> bytes:
    """zipfile finds a harmless directory at the end; torch follows the locator there to another one."""
    (evil, evil_list), (good, good_list) = _halves(around(whole(mkdir(trace)))), _halves(zipped(members(benign())))
    body = evil + good + evil_list + _record(evil_list, len(evil + good))
    good_list = _shifted(good_list, len(evil))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(evil + good + evil_list), 1)
    count = good_list.count(b"PK\1\2")
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(good_list), len(body), 0)
    return body + good_list + _record(good_list, len(body)) + locator + end


def _halves(raw: bytes) -> tuple[bytes, bytes]:
    """The members of an archive, and its directory."""
    *_, size, start, _ = struct.unpack("<4s4H2LH", raw[-22:])
    return raw[:start], raw[start : start + size]


def _record(directory: bytes, start: int) -> bytes:
    """What a large archive has behind its directory."""
    count = directory.count(b"PK\1\2")
    return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)


def _shifted(directory: bytes, by: int) -> bytes:
    """A directory whose members lie further behind."""
    out, place = bytearray(directory), 0
    while place < len(out):
        (offset,) = struct.unpack_from("<L", out, place + 42)
        struct.pack_into("<L", out, place + 42, offset + by)
        place += 46 + sum(struct.unpack_from("<3H", out, place + 28))
    return bytes(out)


def torchscript(trace: Path) -> bytes:
    """An archive of torch.jit.save, with code/ and constants.pkl, and a pickle that acts."""
    out = io.BytesIO()
    jit: Any = torch.jit
    jit.save(jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), out)
    files = {f"archive/{name.split('/', 1)[1]}": raw for name, raw in members(out.getvalue()).items()}
    return zipped(files | {"archive/data.pkl": whole(mkdir(trace))})


def array_of_objects(trace: Path) -> bytes:
    """numpy.load with allow_pickle, of an array of objects beside it."""
    out = io.BytesIO()
    np.save(out, np.array([Calls(os.mkdir, str(trace))], dtype=object), allow_pickle=True)
    return around(whole(called("numpy load", text(beside(trace, "x.npy", out.getvalue())), b"N", b"\x88")))


def second_load(trace: Path, name: str) -> bytes:
    """torch.load once more, of a file beside it and with another unpickler: then its own guard is off."""
    inner = beside(trace, "inner.pth", around(whole(mkdir(trace))))
    unpickler = called("importlib import_module", text("pickle"))
    return around(whole(called(name, text(inner), b"N", unpickler)))


def local_hub(trace: Path) -> bytes:
    """torch.hub imports a hubconf.py from a folder beside it."""
    beside(trace, "hubconf.py", f"import os\nos.mkdir({str(trace)!r})\ndef model(): pass\n".encode())
    return around(whole(called("torch.hub _load_local", text(trace.parent), text("model"))))


def script(trace: Path) -> bytes:
    """runpy runs a file beside it."""
    beside(trace, "script.py", f"import os\nos.mkdir({str(trace)!r})\n".encode())
    return around(whole(called("runpy run_path", text(trace.with_name("script.py")))))


def partial(trace: Path) -> bytes:
    """functools.partial: made, filled by BUILD, called."""
    state = b"(" + named("os mkdir") + b"(" + text(trace) + b"t}Nt"
    return around(whole(named("functools partial") + b"(" + named("os mkdir") + b"tR" + state + b"b)R"))


def method_of_path(trace: Path) -> bytes:
    """operator.methodcaller, called with a path."""
    return around(
        whole(called("operator methodcaller", text("mkdir")) + b"(" + called("pathlib Path", text(trace)) + b"tR")
    )


def attribute_of_path(trace: Path) -> bytes:
    """operator.attrgetter finds the method of a path, then it is called."""
    method = called("operator attrgetter", text("mkdir")) + b"(" + called("pathlib Path", text(trace)) + b"tR"
    return around(whole(method + b")R"))


def from_bytes(trace: Path) -> bytes:
    """torch's own function for storages inside of a pickle, which loads without a guard."""
    inner = around(whole(mkdir(trace)))
    raw = called("_codecs encode", text(inner.decode("latin-1")), text("latin-1"))
    return around(whole(called("torch.storage _load_from_bytes", raw)))


ACTS = "tests.helpers.malicious_pickles Acts"
ATTACKS: dict[str, Attack] = {
    # functions, as __reduce__ writes them
    "os.system": Attack(lambda t: saved(Calls(os.system, f"mkdir '{t}'"))),
    "subprocess": Attack(lambda t: saved(Calls(subprocess.check_call, ["mkdir", str(t)]))),
    "eval": Attack(lambda t: saved(Calls(eval, f"__import__('os').mkdir({str(t)!r})"))),
    "exec": Attack(lambda t: saved(Calls(exec, f"import os; os.mkdir({str(t)!r})"))),
    "eval of Python 2": Attack(
        lambda t: around(whole(called("__builtin__ eval", text(f"__import__('os').mkdir({str(t)!r})"))))
    ),
    "getattr": Attack(
        lambda t: around(
            whole(
                called("builtins getattr", called("builtins __import__", text("os")), text("mkdir"))
                + b"("
                + text(t)
                + b"tR"
            )
        )
    ),
    "timeit": Attack(
        lambda t: around(whole(called("timeit timeit", text("pass"), text(f"import os; os.mkdir({str(t)!r})"))))
    ),
    "runpy": Attack(script),
    "functools.partial": Attack(partial),
    "operator.methodcaller": Attack(method_of_path),
    "operator.attrgetter": Attack(attribute_of_path),
    "numpy.load": Attack(array_of_objects),
    "torch.load": Attack(lambda t: second_load(t, "torch load")),
    "torch.serialization.load": Attack(lambda t: second_load(t, "torch.serialization load")),
    "torch.storage": Attack(from_bytes),
    "torch.hub": Attack(local_hub),
    "torch.jit.load": Attack(lambda t: around(whole(called("torch.jit load", text(t)))), ""),
    # opcodes
    "GLOBAL of protocol 0": Attack(
        lambda t: b"cos\nmkdir\n(S'" + str(t).encode() + b"'\ntR.", "pickle", reason="it begins like no file"
    ),
    "STACK_GLOBAL": Attack(lambda t: around(whole(text("os") + text("mkdir") + b"\x93(" + text(t) + b"tR", 4))),
    "STACK_GLOBAL through torch": Attack(
        lambda t: around(whole(text("torch.serialization") + text("os.mkdir") + b"\x93(" + text(t) + b"tR", 4))
    ),
    "INST": Attack(lambda t: around(whole(b"(" + text(t) + b"ios\nmkdir\n")), reason="the opcode INST"),
    "OBJ": Attack(lambda t: around(whole(b"(" + named("os mkdir") + text(t) + b"o"))),
    "NEWOBJ": Attack(lambda t: around(whole(named(ACTS) + b"(" + text(t) + b"t\x81"))),
    "BUILD": Attack(lambda t: around(whole(named(ACTS) + b")\x81" + text(t) + b"b"))),
    "BINPERSID": Attack(lambda t: around(whole(b"(" + text("storage") + mkdir(t) + b"tQ"))),
    "PERSID": Attack(lambda t: around(whole(mkdir(t) + b"0Pstorage\n"))),
    "EXT": Attack(lambda t: around(whole(b"\x82\x01(" + text(t) + b"tR")), "", reason="the opcode EXT1"),
    # places in a file
    "raw pickle": Attack(lambda t: whole(mkdir(t)), "pickle", reason="it begins like no file"),
    "raw pickle of protocol 4": Attack(
        lambda t: pickle.dumps(Calls(os.mkdir, str(t)), 4), "pickle", reason="it begins like no file"
    ),
    "in a state dict": Attack(lambda t: saved({"weight": torch.zeros(2), "evil": Calls(os.mkdir, str(t))})),
    "as a key": Attack(lambda t: around(whole(b"}" + mkdir(t) + b"K\x01s"))),
    "as an argument": Attack(
        lambda t: around(whole(called("torch._utils _rebuild_parameter", mkdir(t), b"\x88", b"N"))),
    ),
    "old format": Attack(lambda t: saved({"evil": Calls(os.mkdir, str(t))}, legacy=True)),
    "old format, third pickle": Attack(lambda t: old_format(info=whole(mkdir(t)))),
    "old format, last pickle": Attack(lambda t: old_format(keys=whole(mkdir(t)))),
    "tar": Attack(in_tar, reason="it begins like no file"),
    "tar in front of a zip": Attack(lambda t: in_tar(t) + benign(), reason="it begins like no file"),
    "behind the end": Attack(
        lambda t: around(b"\x80\x02}." + whole(mkdir(t))), "", reason="its data.pkl goes on behind its end"
    ),
    "data.pkl twice, zipfile finds the other": Attack(
        lambda t: twice(whole(mkdir(t)), b"\x80\x02}.", others=1), reason="not exactly one data.pkl"
    ),
    "data.pkl twice, zipfile finds it, too": Attack(
        lambda t: twice(b"\x80\x02}.", whole(mkdir(t)), others=4), reason="not exactly one data.pkl"
    ),
    "DATA.PKL": Attack(
        lambda t: zipped(
            {name.replace("data.", "DATA."): raw for name, raw in members(around(whole(mkdir(t)))).items()}
        ),
        reason="none that torch.save writes",
    ),
    "two directories": Attack(two_directories, reason="contradict each other"),
    "deflated": Attack(
        lambda t: zipped(members(around(whole(mkdir(t)))), zipfile.ZIP_DEFLATED), reason="is compressed"
    ),
    "TorchScript": Attack(torchscript, "", reason="none that torch.save writes"),
}
