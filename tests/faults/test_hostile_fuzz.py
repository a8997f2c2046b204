"""Good files, changed at random: every reader returns a value or raises its documented error, and soon."""

import io
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save
from torch import nn

from fer_dist.data.decoding import decode
from fer_dist.data.readers import read_faces
from fer_dist.errors import UserError
from fer_dist.spec import LabelSet
from fer_dist.tensors import NotTensors, read_tensors
from tests.faults.test_hostile_pictures import FORMATS, encoded
from tests.helpers.malicious_pickles import around, members, saved, zipped

MAX_SECONDS = 5.0


class Subject(NamedTuple):
    """A good file, how it is read, and the error that this may raise."""

    name: str
    good: bytes
    read: Callable[[Path], Any]
    error: type[Exception]
    put: Callable[[bytes], bytes] = bytes  # from changed bytes to the file: a pickle back into its .zip


def _read_faces(path: Path) -> Any:
    return read_faces(path, size=48, labels=LabelSet(), on_error="stop", ferplus=None)


def _resave(path: Path) -> None:
    """Read tensors and touch all their numbers: one beyond its storage would end the process."""
    torch.save(read_tensors(path), io.BytesIO())


def subjects() -> dict[str, Subject]:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    state = {"weights": flat, "lr": [0.1, None, True], "step": 2**33, "name": "grün"}
    new, old = saved(state), saved(state, legacy=True)
    others = {name.split("/", 1)[1]: raw for name, raw in members(new).items() if "data/" in name}
    pickled = members(new)["archive/data.pkl"]
    row = ("3," + " ".join(["7"] * 2304) + ",Training\n").encode()
    archive = zipped({"happy/1.png": encoded("PNG"), "sad/2.jpg": encoded("JPEG")}, zipfile.ZIP_DEFLATED)
    return {
        "archive of torch": Subject("x.pth", new, read_tensors, NotTensors),
        "pickle": Subject("x.pth", pickled, _resave, NotTensors, lambda raw: around(raw, **others)),
        "old format": Subject("x.pth", old, read_tensors, NotTensors),
        "safetensors": Subject("x.safetensors", save(dict(flat)), read_tensors, NotTensors),
        "CSV": Subject("fer2013.csv", b"emotion,pixels,Usage\n" + row * 2, _read_faces, UserError),
        "archive of pictures": Subject("faces.zip", archive, _read_faces, UserError),
    } | {
        form: Subject(f"x.{ending}", encoded(form), lambda path: decode(path.read_bytes(), 48), UserError)
        for form, ending in FORMATS.items()
    }


def changed(raw: bytes, dice: random.Random) -> bytes:
    """Make one to four changes: bits, bytes, lengths, pieces cut out, doubled, moved, or the end cut off."""
    out = bytearray(raw)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        place = dice.randrange(len(out) + 1)
        size = min(dice.choice((1, 1, 2, 4, 8, 60)), len(out) - place)
        match dice.randrange(8):
            case 0 | 1 if size:
                out[place] ^= 1 << dice.randrange(8)
            case 2:
                out[place : place + size] = dice.randbytes(size)
            case 3:
                out[place : place + size] = dice.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
            case 4:
                del out[place : place + size]
            case 5:
                out[place:place] = out[place : place + size] * dice.choice((1, 2, 100))
            case 6:
                other = dice.randrange(len(out) + 1)
                out[place : place + size] = out[other : other + size]
            case _ if dice.random() < 0.3:
                del out[place:]
    return bytes(out)


def fuzz(kind: str, count: int, folder: Path, seed: int) -> None:
    """Read `count` changed files: some must be read and some refused; one that fails is left in `folder`."""
    subject = subjects()[kind]
    dice = random.Random(f"{kind} {seed}")
    path = folder / subject.name
    path.write_bytes(subject.put(subject.good))
    subject.read(path)
    refused = 0
    for number in range(count):
        path.write_bytes(subject.put(changed(subject.good, dice)))
        start = time.process_time()
        try:
            subject.read(path)
        except BaseException as error:
            if type(error) is not subject.error:
                raise AssertionError(f"{kind}, number {number} of seed {seed}: {error!r}, see {path}") from error
            refused += 1
        assert time.process_time() - start < MAX_SECONDS, f"{kind}, number {number} of seed {seed}, see {path}"
    assert count / 20 < refused < count


@pytest.mark.parametrize("kind", subjects())
def test_a_changed_file_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    fuzz(kind, 400, tmp_path, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("kind", subjects())
def test_many_changed_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    """100,000 files in all, in about a minute."""
    share = {"archive of torch": 20_000, "pickle": 25_000, "old format": 10_000, "safetensors": 10_000}
    fuzz(kind, share.get(kind, 5_000), tmp_path, seed=3)
