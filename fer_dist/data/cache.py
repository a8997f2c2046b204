"""A data set is decoded once; from then on it opens as a memory map that all ranks share.

An entry of the cache is a folder named by its key. It is built beside its place and renamed, so
that it is there whole or not at all; of two builders, one renames and the other uses that.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fer_dist.config import DataConfig
from fer_dist.data.faces import Faces
from fer_dist.data.pictures import open_zip, walk
from fer_dist.data.readers import FORMS, read_faces
from fer_dist.data.synthetic import DRAWING_VERSION, draw_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet

FORMAT = 2
"""Raised with every change to what the readers make of a source, or to the files of an entry."""

_BUILDING = ".building-"
_DEAD_AFTER = 24 * 3600  # seconds; no build takes a day
_ARRAYS = ("images_NHW", "labels_N", "usage_N", "targets_NK")


def open_faces(data: DataConfig, labels: LabelSet) -> Faces:
    """The data set of a configuration, decoded now or before.

    Returns:
        Faces whose pictures are a read-only memory map, with `key` set to the cache key.

    Raises:
        UserError: the data cannot be read (see `read_faces`), or the cache folder not written.
    """
    key = _key(data, labels)
    root = cache_dir(data)
    for _ in range(3):  # more than once only if somebody damages or removes it meanwhile
        faces = _load(root, key)
        if faces is not None:
            return faces
        _build(root, key, data, labels)
    raise UserError(f"{root / key} cannot be read after it was written", "name another folder with --data.cache_dir")


def cache_dir(data: DataConfig) -> Path:
    """The folder of decoded data sets: the setting, $FER_DIST_CACHE, or the user's cache folder.

    Raises:
        UserError: there is neither a setting nor a home.
    """
    chosen = data.cache_dir or os.environ.get("FER_DIST_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fer_dist"
    except RuntimeError as error:
        raise UserError(f"no folder for the cache: {error}", "name one with --data.cache_dir") from None


def _key(data: DataConfig, labels: LabelSet) -> str:
    """A digest of all that decides the content of an entry, found without decoding anything."""
    parts: dict[str, Any] = {"format": FORMAT, "size": data.size, "labels": labels.names}
    if data.path is None:
        if data.ferplus is not None:
            raise UserError("data.ferplus needs the FER2013 CSV that it votes on", "--data fer2013.csv")
        parts["drawn"] = [DRAWING_VERSION, data.embedded_seed, data.embedded_train, data.embedded_val]
    else:
        parts["source"] = _content(Path(data.path).expanduser(), f"--data.path takes {FORMS}")
        parts["on_error"] = data.on_error
        if data.ferplus is not None:
            parts["ferplus"] = _content(Path(data.ferplus).expanduser(), "--data.ferplus takes FER+'s fer2013new.csv")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _content(path: Path, fix: str) -> list[Any]:
    """What identifies the content of a source: CRCs, or names, sizes and times."""
    try:
        if path.is_dir():
            return [str(path.resolve()), walk(path)]
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", fix) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix) from None
    if path.suffix.lower() == ".zip":
        with open_zip(path) as archive:
            return sorted((info.filename, info.CRC, info.file_size) for info in archive.infolist())
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _read(data: DataConfig, labels: LabelSet) -> Faces:
    if data.path is None:
        return draw_faces(data.embedded_train, data.embedded_val, data.embedded_val, data.embedded_seed, data.size)
    return read_faces(
        Path(data.path).expanduser(),
        size=data.size,
        labels=labels,
        on_error=data.on_error,
        ferplus=None if data.ferplus is None else Path(data.ferplus).expanduser(),
    )


def _load(root: Path, key: str) -> Faces | None:
    """An entry, or None if it is not there or damaged."""
    folder = root / key
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
            return None
        text = (folder / "names.txt").read_bytes().decode("utf-8", "surrogateescape")  # as text, \r would become \n
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in _ARRAYS if f"{n}.npy" in meta["files"]}
        # Only the pictures are worth a map: the rest is small, and others may want to write to it.
        arrays |= {name: np.array(array) for name, array in arrays.items() if name != "images_NHW"}
        faces = Faces(**arrays, names=text.split("\n"), key=key, notes=tuple(meta["notes"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = len(faces.images_NHW) == len(faces.labels_N) == len(faces.usage_N) == len(faces.names)
    return faces if whole and faces.images_NHW.dtype == np.uint8 and faces.images_NHW.ndim == 3 else None


def _build(root: Path, key: str, data: DataConfig, labels: LabelSet) -> None:
    """Make an entry, unless another process is quicker.

    Raises:
        UserError: the source cannot be read, or the cache folder not written.
    """
    temporary = root / f"{_BUILDING}{key}-{os.getpid()}-{secrets.token_hex(4)}"
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_dead(root)
        temporary.mkdir()  # before the decoding: who cannot write learns it at once
    try:
        faces = _read(data, labels)
        with _writing(root):
            _store(replace(faces, key=key), temporary)
            _publish(temporary, root, key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turns an OSError of the cache folder into a UserError that names the setting."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {root} cannot be written: {error.strerror or error}",
            "name another one with --data.cache_dir",
        ) from None


def _store(faces: Faces, folder: Path) -> None:
    """Write all files of an entry and wait until they are on the disk."""
    for name in _ARRAYS:
        array = getattr(faces, name)
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    (folder / "names.txt").write_bytes("\n".join(faces.names).encode("utf-8", "surrogateescape"))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    meta = {"format": FORMAT, "key": faces.key, "files": files, "notes": faces.notes}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _publish(temporary: Path, root: Path, key: str) -> None:
    """Rename an entry to its place; one that is there and whole stays, a damaged one goes."""
    while True:
        try:
            temporary.rename(root / key)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return _sync(root)
        if _load(root, key) is not None:
            return None
        # Moved away whole, not emptied in place: nobody may see half of it.
        aside = root / f"{_BUILDING}damaged-{secrets.token_hex(4)}"
        with suppress(FileNotFoundError):  # another builder was quicker
            (root / key).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_dead(root: Path) -> None:
    """Remove what builds left behind that were killed more than a day ago."""
    for path in root.glob(f"{_BUILDING}*"):
        try:
            dead = path.stat().st_mtime < time.time() - _DEAD_AFTER
        except OSError:  # its builder has just finished
            continue
        if dead:
            shutil.rmtree(path, ignore_errors=True)
