"""Tensors and plain values from a file: the only place that reads one, and the only `torch.load`.

Files come from strangers. `weights_only=True` is torch's guard; in front of it stands a wall of our
own, which looks at the whole form of a file before anything in it is acted upon: the layout of the
.zip or of the old format, what its pickle says (`fer_dist.pickles`), and that nothing in it is
larger than the file. A `.safetensors` file has no code, its reader is called as it is.
"""

import io
import os
import re
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch

from fer_dist.archives import BadArchive, find_directory, require_apart
from fer_dist.errors import printable
from fer_dist.pickles import BadPickle, Dtype, Ordered, Outline, TensorOutline, read_outline

MAX_PICKLE_BYTES = 16 * 2**20
"""Largest description of the tensors in a file: its pickles, or the header of a `.safetensors`."""
MAX_MEMBERS = 100_000
"""Most members of a .zip, which are tensors but for a few."""
MAX_DEPTH = 32
"""How deep dictionaries, lists and tuples may lie in each other."""
MAX_VALUES = 1_000_000
"""Most values, each counted wherever it is used."""
MAX_REPEATS, FREE_BYTES = 8, 2**20
"""Everything may take FREE_BYTES + MAX_REPEATS x the file, counted wherever it is used; one tensor what is
stored for it, or FREE_BYTES."""

_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins a file of the old format: a pickle of one number
_PROTOCOL = 1001  # of the old format
_MEMBER = re.compile(
    r"data\.pkl|data/\w{1,40}|version|byteorder|\.(format_version|storage_alignment|data/serialization_id)", re.ASCII
)


class NotTensors(Exception):
    """Why a file is none of tensors and plain values that can be read safely, in one line without its path."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))  # a stranger's names


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to quote."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_tensors(path: str | Path) -> Any:
    """Tensors and plain values (text, numbers, lists, dictionaries) from a file, onto the CPU.

    What it is goes by its content, never by its name: what torch.save writes (a .zip, or the old
    format before torch 1.6), with or without a comment behind the .zip, or safetensors.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        NotTensors: it is damaged, of another form, names code, or is beyond the bounds above.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe would be waited for
        raise NotTensors("it is no regular file")
    with path.open("rb") as file:
        try:
            return _read(file, path)
        except Exception as error:  # a damaged file fails in zipfile, torch and safetensors in a dozen ways
            raise NotTensors(first_line(error)) from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that a `.safetensors` file carries beside its tensors; `read_tensors` has read it before.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        NotTensors: it is damaged or of another form.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise NotTensors(first_line(error)) from error


def _read(file: BinaryIO, path: Path) -> Any:
    size = os.fstat(file.fileno()).st_size
    head = file.read(len(_MAGIC))
    if head.startswith(b"PK\3\4"):
        outline = _outline_of_zip(file, size)
    elif head == _MAGIC:
        outline = _outline_of_old_format(file, size)
    elif head[8:9] == b"{":
        header_bytes = int.from_bytes(head[:8], "little")
        if header_bytes > MAX_PICKLE_BYTES:
            raise BadArchive(f"its header has {header_bytes:,} bytes, more than {MAX_PICKLE_BYTES:,}")
        return safetensors.torch.load_file(path)
    else:
        raise BadArchive("it begins like no file of torch.save or safetensors")
    _require_modest(outline.value, size)
    file.seek(0)
    with warnings.catch_warnings(action="ignore"):
        # The open file, not its name: what was looked at is what is read.
        return torch.load(file, map_location="cpu", weights_only=True)


def _outline_of_zip(file: BinaryIO, size: int) -> Outline:
    """Look at a .zip of torch.save; torch finds its members as `zipfile` does, if all of this holds."""
    directory = find_directory(file, MAX_MEMBERS)
    if directory.prefix or directory.end != size:
        raise BadArchive("there are bytes before or behind its .zip")
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        require_apart(infos, directory.start)
        members = {}
        folder = infos[0].orig_filename.split("/")[0] if infos else ""
        for info in infos:
            top, _, name = info.orig_filename.partition("/")
            if top != folder or not _MEMBER.fullmatch(name):
                raise BadArchive(f"its member {info.orig_filename[:80]!r} is none that torch.save writes")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise BadArchive(f"its member {name!r} is compressed, which torch.save does not do")
            if info.flag_bits & ~0x808 or not _is_plain(info.extra):  # sizes behind the data, names in UTF-8
                raise BadArchive(f"its member {name!r} is encrypted or has other rare marks")
            members[name.lower()] = info  # torch takes small and capital letters for the same
        if "data.pkl" not in members or not len(members) == len(infos) == directory.declared:
            raise BadArchive("it has not exactly one data.pkl, or members of the same name")
        if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
            raise BadArchive(f"its data.pkl has {members['data.pkl'].file_size:,} bytes, over {MAX_PICKLE_BYTES:,}")
        pickle = io.BytesIO(archive.read(members["data.pkl"]))
    outline = read_outline(pickle)
    if pickle.read(1):
        raise BadArchive("its data.pkl goes on behind its end")
    for key, storage in outline.storages.items():
        member = members.get(f"data/{key}".lower())
        if member is None or member.file_size != storage.nbytes:
            held = "no bytes" if member is None else f"{member.file_size:,} bytes"
            raise BadArchive(f"its storage {key[:40]!r} has {held}, expected {storage.nbytes:,}")
    return outline


def _is_plain(extra: bytes) -> bool:
    """Whether a member has no more than the sizes of a large file beside its name."""
    return not extra or (extra[:2] == b"\1\0" and int.from_bytes(extra[2:4], "little") == len(extra) - 4)


def _outline_of_old_format(file: BinaryIO, size: int) -> Outline:
    """Look at a file of the old format: five pickles, then each storage with its count of numbers before it."""
    file.seek(0)
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    read_outline(pickles)  # the magic number
    if read_outline(pickles).value != _PROTOCOL:
        raise BadArchive(f"it is not of version {_PROTOCOL} of the old format")
    read_outline(pickles)  # sizes of C types, which torch does not look at
    outline = read_outline(pickles)
    keys = read_outline(pickles).value
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)) or (
        sorted(keys) != sorted(outline.storages)
    ):
        raise BadArchive("its list of storages names others than its tensors do")
    place = pickles.tell()
    for key in keys:
        storage = outline.storages[key]
        file.seek(place)
        count = int.from_bytes(file.read(8), "little")
        if count != storage.count:
            raise BadArchive(f"its storage {key[:40]!r} has {count:,} numbers, expected {storage.count:,}")
        place += 8 + storage.nbytes
    if place != size:
        raise BadArchive(f"it has {size:,} bytes, expected {place:,}")
    return outline


class _Weight(NamedTuple):
    """What a value is when it is written out: values in it, their bytes, and levels below it."""

    values: int
    nbytes: int
    height: int


def _require_modest(value: Any, held: int) -> None:
    """Refuse what is small in a file and large when it is used: expanded tensors, one list in many places."""
    values, nbytes, _ = _weigh(value, (), {})
    most = FREE_BYTES + MAX_REPEATS * held
    if values > MAX_VALUES or nbytes > most:
        raise BadPickle(f"it has {values:,} values in {nbytes:,} bytes, more than {MAX_VALUES:,} or {most:,}")


def _weigh(value: Any, path: tuple[Any, ...], seen: dict[int, _Weight]) -> _Weight:
    """The weight of what lies at `path` of an outline; a list in many places is gone through once."""
    if isinstance(value, TensorOutline):
        held = value.storage.nbytes
        if value.reach > held:
            raise BadPickle(f"{_place(path)} reaches beyond the {held:,} bytes of its storage")
        if value.nbytes > max(held, FREE_BYTES):
            raise BadPickle(f"{_place(path)} expands {held:,} bytes to {value.nbytes:,}, more than {FREE_BYTES:,}")
        return _Weight(1, value.nbytes, 0)
    if value is None or isinstance(value, bool | int | float | str | Dtype):
        return _Weight(1, len(value) if isinstance(value, str) else 8, 0)
    if not isinstance(value, dict | list | tuple):
        raise BadPickle(f"{_place(path)} is neither a tensor nor a plain value")
    weight = seen.get(id(value))
    if len(path) + (weight.height if weight else 0) >= MAX_DEPTH:
        raise BadPickle(f"{_place(path[:3])} is nested deeper than {MAX_DEPTH}")
    if weight is None:
        parts: list[tuple[Any, Any]] = list(value.items() if isinstance(value, dict) else enumerate(value))
        parts += [("_metadata", value.metadata)] if isinstance(value, Ordered) else []
        weights = [_weigh(part, (*path, key), seen) for key, part in parts]
        text = sum(len(key) for key, _ in parts if isinstance(key, str))
        seen[id(value)] = weight = _Weight(
            1 + sum(part.values for part in weights),
            8 * len(parts) + text + sum(part.nbytes for part in weights),
            1 + max((part.height for part in weights), default=0),
        )
    return weight


def _place(path: tuple[Any, ...]) -> str:
    return ".".join(str(key)[:60] for key in path) or "the content"
