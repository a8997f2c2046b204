"""Files of tensors that are small, and would take memory or time without bounds; and why they are refused."""

import json
import struct
import zipfile
from collections.abc import Callable

from tests.helpers.malicious_pickles import around, benign, called, members, named, old_format, text, whole, zipped


def number(value: int) -> bytes:
    """LONG1: an integer of any size."""
    raw = value.to_bytes(20, "little")
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(count: int, kind: str = "torch FloatStorage", end: bytes = b"tQ") -> bytes:
    """Return a reference to the numbers of the member data/0, which has 48 bytes in `around`."""
    return b"(" + text("storage") + named(kind) + text("0") + text("cpu") + number(count) + end


def tensor(stored: bytes, size: list[int], stride: list[int], offset: int = 0) -> bytes:
    shape, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    return called("torch._utils _rebuild_tensor_v2", stored, number(offset), shape, steps, b"\x89", ORDERED + b")R")


def item(value: bytes, key: bytes = text("weight")) -> bytes:
    """Return a dictionary with one value."""
    return b"}" + key + value + b"s"


def doubled(levels: int) -> bytes:
    """Return pairs of pairs: short to write, two to the power of `levels` values to visit."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


def lists(levels: int) -> bytes:
    """Return lists in lists, each twice in the next."""
    body = b"]"
    for i in range(levels):
        body = b"](" + body + b"q" + bytes([i]) + b"h" + bytes([i]) + b"e"
    return body


def overlapping() -> bytes:
    """Return two members with the same bytes: the second entry of the directory points at the first member."""
    raw = bytearray(zipped({"archive/data.pkl": whole(b"}"), "archive/data/0": bytes(8), "archive/version": b"3\n"}))
    second = raw.index(b"PK\1\2", raw.index(b"PK\1\2") + 1)
    third = raw.index(b"PK\1\2", second + 1)
    raw[third + 42 : third + 46] = raw[second + 42 : second + 46]
    return bytes(raw)


def inflating(name: str) -> bytes:
    """Return an archive with a member of zeros, 64 MiB of them in 64 KiB."""
    return zipped(members(benign()) | {f"archive/{name}": bytes(2**26)}, zipfile.ZIP_DEFLATED)


def many_members(count: int) -> bytes:
    """Return a directory of members without a name."""
    entry = b"PK\1\2\0\0\x14" + bytes(39)
    size = len(entry) * count
    return benign() + entry * count + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, size, len(benign()), 0)


def safetensors(header: bytes, length: int | None = None) -> bytes:
    """Return a file of safetensors that claims a header of any length."""
    return struct.pack("<Q", len(header) if length is None else length) + header


def described(shape: list[int], offsets: list[int]) -> bytes:
    """Return a header of safetensors for one tensor."""
    return safetensors(json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode())


ORDERED = named("collections OrderedDict")
DEEP, DAMAGED, OUTSIDE = "is nested deeper than 32", "its pickle is damaged", "bytes before or behind its .zip"
TWO_SIZES = b"]" + storage(12) + b"a" + storage(3, "torch DoubleStorage") + b"a"
SHARED_TENSOR = tensor(storage(12), [12], [1]) + b"q\x00" + b"h\x00" * 40_000
OLD = old_format(whole(item(tensor(storage(10**12, end=b"NtQ"), [1], [1]))), keys=whole(b"]" + text("0") + b"a"))
BODIES: dict[str, tuple[bytes, str]] = {
    # memory
    "expanded tensor": (item(tensor(storage(12), [10**6] * 2, [0, 0])), "weight expands 48 bytes to 4,000,000,000,000"),
    "one tensor in many places": (b"](" + SHARED_TENSOR + b"e", "it has 40,002 values in 2,2"),
    "beyond its storage": (item(tensor(storage(12), [4], [1], 10)), "weight reaches beyond the 48 bytes"),
    "storage larger than the file": (item(tensor(storage(10**12), [1], [1])), "expected 4,000,000,000,000"),
    "storage of two sizes": (TWO_SIZES, "it names the storage '0' twice, with different sizes"),
    "one text in many places": (
        b"](" + text("x" * 10**5) + b"q\x00" + b"h\x00" * 10**4 + b"e",
        "more than 1,000,000 or",
    ),
    # time
    "key whose hash takes years": (item(b"N", key=doubled(60)), "a key is of type tuple"),
    "lists in lists, 60 deep": (lists(60), DEEP),
    "lists in lists, a thousand million": (lists(30), "it has 2,147,483,647 values"),
    "lists in themselves": (b"]q\x00h\x00a", DEEP),
    "tuples 20,000 deep": (b")" + b"\x85" * 20_000, DEEP),
    "marks 20,000 deep": (b"(" * 20_000 + b"N", "ends in the middle of something"),
    "two million opcodes": (b"](" + b"N" * 2_000_000 + b"e", "more than 1,000,000 opcodes"),
    "numbers as keys": (
        item(b"N", key=number(2**61 - 1)),
        "a key is of type int, expected text or",
    ),
    # claimed lengths
    "LONG4 of 2 GiB": (b"\x8b\xff\xff\xff\x7f\x01", DAMAGED),
    "text of 4 GiB": (b"X\xff\xff\xff\xff\x01", DAMAGED),
    "text of 2**62 bytes": (b"\x8d" + struct.pack("<Q", 2**62) + b"x", DAMAGED),
    # opcodes that torch.save does not write, and values that a caller would stumble over
    "NEWOBJ": (ORDERED + b")\x81", "the opcode NEWOBJ"),
    "OBJ": (b"(" + ORDERED + b"o", "the opcode OBJ"),
    "INST": (b"(icollections\nOrderedDict\n", "the opcode INST"),
    "EXT1": (b"\x82\x01)R", "the opcode EXT1"),
    "PERSID": (b"Pstorage\n", "the opcode PERSID"),
    "BUILD of a list": (b"]}b", "it sets attributes"),
    "BINPERSID of a text": (text("storage") + b"Q", "something outside of itself that is no storage"),
    "protocol 4": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N", "protocol 4, torch reads 2"),
    "its own items()": (ORDERED + b")R}" + text("items") + b"K\x01sb", "it sets attributes"),
    "a function as a value": (item(ORDERED), "weight is neither a tensor nor a plain value"),
    "data.pkl of 17 MiB": (b"N0" * (17 * 2**19) + b"N", "its data.pkl has 17,825,"),
}
"""Kind -> (body of the pickle, reason of the refusal)."""
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "old format, storage larger than the file": (lambda: OLD + struct.pack("<Q", 10**12), "expected 4,000,000,000,2"),
    "something behind the old format": (lambda: benign(legacy=True) + b"x", "bytes, expected"),
    "data.pkl that inflates": (lambda: inflating("data.pkl"), "'data.pkl' is compressed"),
    "storage that inflates": (lambda: inflating("data/0"), "is compressed"),
    "members that overlap": (overlapping, "overlap"),
    "600,000 members": (lambda: many_members(600_000), "its directory has 27,600,000 bytes, more than 25,600,000"),
    "200,000 members": (lambda: many_members(200_000), "its directory has 200,000 members, more than 100,000"),
    "something behind the archive": (lambda: benign() + b"x", OUTSIDE),
    "something before the archive": (lambda: b"PK\3\4" + benign(), OUTSIDE),
    "header of 2**63 bytes": (lambda: safetensors(b"{}", 2**63), "its header has 9,223,372,036,854,775,808 bytes"),
    "header of 17 MiB": (lambda: safetensors(b"{" + b" " * (17 * 2**20) + b"}"), "its header has 17,825,794 bytes"),
    "header 100,000 deep": (lambda: safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "recursion limit"),
    "shape beyond its bytes": (lambda: described([10**12], [0, 4]) + bytes(4), "invalid shape"),
    "shape that wraps around": (lambda: described([2**32, 2**32], [0, 0]), "overflow"),
    "offsets beyond the file": (lambda: described([10**10], [0, 4 * 10**10]), "not fully covered"),
}


def make_bomb(kind: str) -> tuple[bytes, str]:
    """Return the file and the reason of its refusal."""
    if kind in BODIES:
        body, reason = BODIES[kind]
        return around(whole(body)), reason
    make, reason = FILES[kind]
    return make(), reason
