"""Good files, changed at random: every reader returns a value or raises its documented error, and soon."""

import io
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save
from torch import nn

from fer_dist.data.decoding import FORMATS, decode
from fer_dist.errors import UserError
from fer_dist.tensors import NotTensors, read_tensors
from tests.helpers.malicious_pickles import around, members, saved, zipped
from tests.helpers.memory_meter import read_set
from tests.helpers.picture_files import encoded


class Subject(NamedTuple):
    """A good file, how it is read, and the error that this may raise."""

    name: str
    good: bytes
    read: Callable[[Path], object]
    error: type[Exception]
    put: Callable[[bytes], bytes] = bytes  # from changed bytes to the file: a pickle back into its .zip


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
    noise = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    pictures = {form: encoded(noise, form) for form in FORMATS}
    table = pa.BufferOutputStream()
    parquet.write_table(pa.table({"image": [pictures["PNG"]] * 3, "label": [3] * 3}), table)
    archive = zipped({"happy/1.png": pictures["PNG"], "sad/2.jpg": pictures["JPEG"]}, zipfile.ZIP_DEFLATED)
    return {
        "archive of torch": Subject("x.pth", new, read_tensors, NotTensors),
        "pickle": Subject("x.pth", pickled, _resave, NotTensors, lambda raw: around(raw, others=others)),
        "old format": Subject("x.pth", old, read_tensors, NotTensors),
        "safetensors": Subject("x.safetensors", save(dict(flat)), read_tensors, NotTensors),
        "CSV": Subject("fer2013.csv", b"emotion,pixels,Usage\n" + row * 2, read_set, UserError),
        "parquet": Subject("x.parquet", table.getvalue().to_pybytes(), read_set, UserError),
        "archive of pictures": Subject("faces.zip", archive, read_set, UserError),
    } | {
        form: Subject("x", raw, lambda path: decode(path.read_bytes(), 48), UserError) for form, raw in pictures.items()
    }


def changed(raw: bytes, dice: random.Random) -> bytes:
    """Make one to four changes: bits, bytes, lengths, pieces cut out, doubled, moved, or the end cut off."""
    out = bytearray(raw)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        place, other = (dice.randrange(len(out) + 1) for _ in range(2))
        size = min(dice.choice((1, 1, 2, 4, 8, 60)), len(out) - place)
        piece = bytes(out[place : place + size])
        flipped = bytes(byte ^ 1 << dice.randrange(8) for byte in piece)
        filled = dice.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        moved, doubled = out[other : other + size], piece * dice.choice((2, 3, 100))
        out[place : place + size] = dice.choice((flipped, dice.randbytes(size), filled, moved, doubled, b""))
        if dice.random() < 0.04:
            del out[other:]
    return bytes(out)


@pytest.mark.parametrize("kind", subjects())
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_changed_file_is_read_or_refused(kind: str, count: int, tmp_path: Path) -> None:
    """Some must be read and some refused; one that fails otherwise is left in the folder."""
    subject, dice = subjects()[kind], random.Random(f"{kind} {count}")
    path = tmp_path / subject.name
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
                raise AssertionError(f"{kind}, number {number}: {error!r}, see {path}") from error
            refused += 1
        assert time.process_time() - start < 5, f"{kind}, number {number}, see {path}"
    assert count / 20 < refused < count
