"""Good files, changed at random: every reader gives a value or its documented error, soon, and never anything else."""

import io
import random
import time
import zipfile
from collections import Counter
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

MOST_SECONDS = 5.0


class Subject(NamedTuple):
    """What is changed and read.

    Attributes:
        good: the bytes to be changed.
        put: changed bytes -> the file; e.g. the pickle back into its .zip, with a right checksum.
        read: of the file.
        error: what it may raise.
    """

    good: bytes
    put: Callable[[bytes], bytes]
    read: Callable[[Path], Any]
    error: type[Exception]


def _plain(raw: bytes) -> bytes:
    return raw


def _faces(path: Path) -> Any:
    return read_faces(path, size=48, labels=LabelSet(), on_error="stop", ferplus=None)


def _picture(path: Path) -> Any:
    return decode(path.read_bytes(), 48)


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    return {"weights": model.state_dict(), "lr": [0.1, None, True], "step": 2**33, "name": "grün"}


def subjects() -> dict[str, tuple[str, Subject]]:
    """By kind: the name of the file, and the subject."""
    new, old = saved(state()), saved(state(), legacy=True)
    pickled = members(new)["archive/data.pkl"]
    others = {name.split("/", 1)[1]: raw for name, raw in members(new).items() if "data/" in name}
    flat = dict(state()["weights"])
    row = ("3," + " ".join(["7"] * 2304) + ",Training\n").encode()
    archive = zipped({"happy/1.png": encoded("PNG"), "sad/2.jpg": encoded("JPEG")}, zipfile.ZIP_DEFLATED)
    found = {
        "archive of torch": ("x.pth", Subject(new, _plain, read_tensors, NotTensors)),
        "pickle": ("x.pth", Subject(pickled, lambda raw: around(raw, **others), read_tensors, NotTensors)),
        "old format": ("x.pth", Subject(old, _plain, read_tensors, NotTensors)),
        "safetensors": ("x.safetensors", Subject(save(flat), _plain, read_tensors, NotTensors)),
        "CSV": ("fer2013.csv", Subject(b"emotion,pixels,Usage\n" + row * 2, _plain, _faces, UserError)),
        "archive of pictures": ("faces.zip", Subject(archive, _plain, _faces, UserError)),
    }
    for form, ending in FORMATS.items():
        found[form] = (f"x.{ending}", Subject(encoded(form), _plain, _picture, UserError))
    return found


def changed(raw: bytes, dice: random.Random) -> bytes:
    """One to four changes: bits, bytes, lengths, pieces cut out, doubled, moved, or the end cut off."""
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


def fuzz(kind: str, count: int, folder: Path, seed: int) -> Counter[str]:
    """Read `count` changed files; counts what was read and what refused.

    Raises:
        AssertionError: another error than the documented one, or too long; the file is left in `folder`.
    """
    name, subject = subjects()[kind]
    dice = random.Random(f"{kind} {seed}")
    counts: Counter[str] = Counter()
    path = folder / name
    for number in range(count):
        path.write_bytes(subject.put(changed(subject.good, dice)))
        start = time.monotonic()
        try:
            subject.read(path)
            counts["read"] += 1
        except BaseException as error:
            if type(error) is not subject.error:
                raise AssertionError(f"{kind}, number {number} of seed {seed}: {error!r}, see {path}") from error
            counts["refused"] += 1
        assert time.monotonic() - start < MOST_SECONDS, f"{kind}, number {number} of seed {seed}, see {path}"
    return counts


@pytest.mark.parametrize("kind", subjects())
def test_a_few_hundred_changes(kind: str, tmp_path: Path) -> None:
    name, subject = subjects()[kind]
    (tmp_path / name).write_bytes(subject.put(subject.good))
    subject.read(tmp_path / name)
    count = 2000 if name == "x.pth" else 500
    counts = fuzz(kind, count, tmp_path, seed=1)
    assert counts["refused"] > count / 20
    assert counts["read"] > 0


def test_a_changed_tensor_is_what_it_says(tmp_path: Path) -> None:
    """Of changed pickles that are read, every tensor lies in its storage: reading beyond would end the process."""
    dice = random.Random(2)
    name, subject = subjects()["pickle"]
    for _ in range(500):
        (tmp_path / name).write_bytes(subject.put(changed(subject.good, dice)))
        try:
            content = subject.read(tmp_path / name)
        except NotTensors:
            continue
        torch.save(content, io.BytesIO())


@pytest.mark.soak
def test_a_hundred_thousand_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what became of them; about a minute."""
    share = {"archive of torch": 20_000, "pickle": 25_000, "old format": 10_000, "safetensors": 10_000}
    share |= {"CSV": 5_000, "archive of pictures": 5_000} | dict.fromkeys(FORMATS, 5_000)
    assert share.keys() == subjects().keys()
    assert sum(share.values()) == 100_000
    lines = []
    for kind, count in share.items():
        start = time.monotonic()
        counts = fuzz(kind, count, tmp_path, seed=3)
        lines.append(
            f"{kind}: {counts['read']:,} read, {counts['refused']:,} refused, {time.monotonic() - start:.0f} s"
        )
    with capsys.disabled():
        print("", *lines, sep="\n")
