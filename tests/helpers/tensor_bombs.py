"""Files of tensors that are small, and would take memory or time without bounds; and why they are refused."""

import struct
import zipfile
from collections.abc import Callable

from tests.helpers.malicious_pickles import (
    around,
    benign,
    called,
    entry,
    members,
    named,
    old_format,
    text,
    whole,
    with_directory,
    zipped,
)


def number(value: int) -> bytes:
    """LONG1: an integer of any size."""
    return b"\x8a\x14" + value.to_bytes(20, "little")


def storage(count: int, kind: str = "torch FloatStorage", end: bytes = b"tQ") -> bytes:
    """Return a reference to the numbers of the member data/0, which has 48 bytes in `around`."""
    return b"(" + text("storage") + named(kind) + text("0") + text("cpu") + number(count) + end


def tensor(stored: bytes, size: list[int], stride: list[int], offset: int = 0) -> bytes:
    shape, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    return called("torch._utils _rebuild_tensor_v2", stored, number(offset), shape, steps, b"\x89", ORDERED + b")R")


def item(value: bytes, key: bytes = text("weight")) -> bytes:
    """Return a dictionary with one value."""
    return b"}" + key + value + b"s"


def repeated(value: bytes, count: int) -> bytes:
    """Return a list with a value many times: it is written once, and referred to."""
    return b"](" + value + b"q\x00" + b"h\x00" * count + b"e"


def doubled(levels: int) -> bytes:
    """Return pairs of pairs: short to write, two to the power of `levels` values to visit."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


def pickled(body: bytes, reason: str) -> tuple[Callable[[], bytes], str]:
    """Return a bomb that is a pickle in an otherwise good file."""
    return lambda: around(whole(body)), reason


ORDERED = named("collections OrderedDict")
DEEP, OUTSIDE = "is nested deeper than 32", "bytes before or behind its .zip"
TWO_SIZES = b"]" + storage(12) + b"a" + storage(3, "torch DoubleStorage") + b"a"
OLD = old_format(whole(item(tensor(storage(10**12, end=b"NtQ"), [1], [1]))), keys=whole(b"]" + text("0") + b"a"))
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    # memory
    "expanded tensor": pickled(item(tensor(storage(12), [10**6] * 2, [0, 0])), "expands 48 bytes to 4,000,000,000,000"),
    "one tensor in many places": pickled(repeated(tensor(storage(12), [12], [1]), 40_000), "it has 40,002 values"),
    "one text in many places": pickled(repeated(text("x" * 10**5), 10**4), "more than 1,000,000 or"),
    "beyond its storage": pickled(item(tensor(storage(12), [4], [1], 10)), "weight reaches beyond the 48 bytes"),
    "storage larger than the file": pickled(item(tensor(storage(10**12), [1], [1])), "expected 4,000,000,000,000"),
    "storage of two sizes": pickled(TWO_SIZES, "it names the storage '0' twice, with different sizes"),
    "text of 4 GiB": pickled(b"X\xff\xff\xff\xff\x01", "its pickle is damaged"),
    # time
    "key whose hash takes years": pickled(item(b"N", key=doubled(60)), "a key is of type tuple"),
    "numbers as keys": pickled(item(b"N", key=number(2**61 - 1)), "a key is of type int, expected text or"),
    "pairs of pairs, 60 deep": pickled(doubled(60), DEEP),
    "pairs of pairs, a thousand million": pickled(doubled(30), "it has 2,147,483,647 values"),
    "list in itself": pickled(b"]q\x00h\x00a", DEEP),
    "marks 20,000 deep": pickled(b"(" * 20_000 + b"N", "ends in the middle of something"),
    "two million opcodes": pickled(b"](" + b"N" * 2_000_000 + b"e", "more than 1,000,000 opcodes"),
    "data.pkl of 17 MiB": pickled(b"N0" * (17 * 2**19) + b"N", "its data.pkl has 17,825,"),
    # what torch.save does not write, and values that a caller would stumble over
    "NEWOBJ": pickled(ORDERED + b")\x81", "the opcode NEWOBJ"),
    "BUILD of a list": pickled(b"]}" + text("_metadata") + b"Nsb", "it fills a list as if it were another type"),
    "its own items()": pickled(ORDERED + b")R}" + text("items") + b"K\x01sb", "it sets attributes"),
    "BINPERSID of a text": pickled(text("storage") + b"Q", "something outside of itself that is no storage"),
    "protocol 4": pickled(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N", "protocol 4, torch reads 2"),
    "a function as a value": pickled(item(ORDERED), "weight is neither a tensor nor a plain value"),
    "behind the end": (lambda: around(whole(b"}") + whole(b"}")), "its data.pkl goes on behind its end"),
    "TorchScript": (lambda: around(whole(b"}"), others={"constants.pkl": whole(b")")}), "none that torch.save writes"),
    # layout
    "old format, storage larger than the file": (lambda: OLD + struct.pack("<Q", 10**12), "expected 4,000,000,000,2"),
    "something behind the old format": (lambda: benign(legacy=True) + b"x", "bytes, expected"),
    "something behind the archive": (lambda: benign() + b"x", OUTSIDE),
    "something before the archive": (lambda: b"PK\3\4" + benign(), OUTSIDE),
    "members that inflate": (lambda: zipped(members(benign()), zipfile.ZIP_DEFLATED), "is compressed"),
    "members that overlap": (lambda: with_directory(b"PK\3\4" + bytes(40), [entry("x", 10)] * 2), "overlap"),
    "200,000 members": (lambda: with_directory(benign(), [entry("")] * 200_000, 9), "members, more than 100,000"),
    "header of 17 MiB": (
        lambda: struct.pack("<Q", 17 * 2**20) + b"{" * (17 * 2**20),
        "its header has 17,825,792 bytes",
    ),
}
"""Kind -> (how the file is made, reason of the refusal)."""
