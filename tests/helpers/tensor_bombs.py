"""Files of tensors that are small, and would take memory or time beyond measure; and why they are refused."""

import json
import struct
import zipfile
from collections.abc import Callable
from functools import cache

from tests.helpers.malicious_pickles import around, benign, called, members, named, old_format, text, whole, zipped


def number(value: int) -> bytes:
    """A whole number of any size."""
    raw = value.to_bytes(20, "little")
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(count: int, key: str = "0", kind: str = "torch FloatStorage", old: bool = False) -> bytes:
    """Numbers that lie elsewhere in the file."""
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + number(count) + b"N" * old + b"tQ"


def tensor(stored: bytes, size: list[int], stride: list[int], offset: int = 0) -> bytes:
    """A tensor of a storage."""
    shape, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    hooks = named("collections OrderedDict") + b")R"
    return called("torch._utils _rebuild_tensor_v2", stored, number(offset), shape, steps, b"\x89", hooks)


def item(value: bytes, key: bytes = text("weight")) -> bytes:
    """A pickle of a dictionary with one value."""
    return whole(b"}" + key + value + b"s")


def doubled(levels: int, pair: bytes, first: bytes) -> bytes:
    """A pair of pairs of pairs: short to say, two to the power of `levels` to go through."""
    return first + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + pair for i in range(levels))


def lists(levels: int) -> bytes:
    """Lists in lists, each twice in the next."""
    body = b"]"
    for i in range(levels):
        body = b"](" + body + b"q" + bytes([i]) + b"h" + bytes([i]) + b"e"
    return body


def overlapping() -> bytes:
    """Two members with the same bytes: the second entry of the directory points at the first member."""
    raw = bytearray(zipped({"archive/data.pkl": item(b"N"), "archive/data/0": bytes(8), "archive/version": b"3\n"}))
    first = raw.index(b"PK\1\2")
    third = raw.index(b"PK\1\2", raw.index(b"PK\1\2", first + 1) + 1)
    raw[third + 42 : third + 46] = raw[raw.index(b"PK\1\2", first + 1) + 42 :][:4]
    return bytes(raw)


@cache
def inflating(name: str) -> bytes:
    """A member of zeros, 256 MiB of them in 256 KiB."""
    return zipped(members(benign()) | {f"archive/{name}": bytes(2**28)}, zipfile.ZIP_DEFLATED)


def many_members(count: int) -> bytes:
    """A directory of members without a name."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    size = len(entry) * count
    return benign() + entry * count + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, size, len(benign()), 0)


def safetensors(header: bytes, length: int | None = None, content: bytes = b"") -> bytes:
    """A file of safetensors, its header of any length said."""
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def described(shape: list[int], offsets: list[int]) -> bytes:
    """The header of safetensors for one tensor."""
    return json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    # memory, by what torch itself lets pass
    "bytearray": (lambda: around(whole(called("builtins bytearray", number(10**12)))), "it names builtins.bytearray"),
    "FloatTensor": (lambda: around(whole(called("torch FloatTensor", number(10**12)))), "it names torch.FloatTensor"),
    "_codecs.encode": (
        lambda: around(whole(called("_codecs encode", text("x" * 9), text("punycode")))),
        "it names _codecs.encode",
    ),
    "meta tensor": (
        lambda: around(
            whole(called("torch._utils _rebuild_meta_tensor_no_storage", named("torch float32"), b")", b")", b"\x89"))
        ),
        "it names torch._utils._rebuild_meta_tensor_no_storage",
    ),
    "expanded tensor": (
        lambda: around(item(tensor(storage(12), [10**6, 10**6], [0, 0])), **{"data/0": bytes(48)}),
        "weight expands 48 bytes to 4,000,000,000,000, more than 1,048,576",
    ),
    "one tensor in many places": (
        lambda: around(
            whole(b"](" + tensor(storage(2**18), [2**18], [1]) + b"q\x00" + b"h\x00" * 5000 + b"e"),
            **{"data/0": bytes(2**20)},
        ),
        "it has 5,002 values in 5,243,9",
    ),
    "beyond its storage": (
        lambda: around(item(tensor(storage(12), [4], [1], offset=10)), **{"data/0": bytes(48)}),
        "weight reaches beyond the 48 bytes of its storage",
    ),
    "storage larger than the file": (
        lambda: around(item(tensor(storage(10**12), [1], [1]))),
        "its storage '0' has 48 bytes, expected 4,000,000,000,000",
    ),
    "old format, storage larger than the file": (
        lambda: (
            old_format(item(tensor(storage(10**12, old=True), [1], [1])), keys=whole(b"]" + text("0") + b"a"))
            + struct.pack("<Q", 10**12)
        ),
        "bytes, expected 4,000,000,000,2",
    ),
    "storage twice, of two sizes": (
        lambda: around(
            whole(b"]" + storage(12) + b"a" + storage(3, kind="torch DoubleStorage") + b"a"), **{"data/0": bytes(48)}
        ),
        "it names the storage '0' twice, with different sizes",
    ),
    "one text in many places": (
        lambda: around(whole(b"](" + text("x" * 10**5) + b"q\x00" + b"h\x00" * 10**4 + b"e")),
        "more than 1,000,000 or",
    ),
    # time
    "key whose hash takes years": (
        lambda: around(item(b"N", key=doubled(60, b"\x86", b")"))),
        "a key is of type tuple",
    ),
    "lists in lists, 60 deep": (lambda: around(whole(lists(60))), "is nested deeper than 32"),
    "lists in lists, a thousand million": (lambda: around(whole(lists(30))), "it has 2,147,483,647 values"),
    "lists in themselves": (lambda: around(whole(b"]q\x00h\x00a")), "is nested deeper than 32"),
    "tuples 20,000 deep": (lambda: around(whole(b")" + b"\x85" * 20_000)), "is nested deeper than 32"),
    "lists 20,000 deep": (lambda: around(whole(b"]" * 20_000 + b"a" * 19_999)), "is nested deeper than 32"),
    "marks 20,000 deep": (lambda: around(whole(b"(" * 20_000 + b"N")), "ends in the middle of something"),
    "two million opcodes": (lambda: around(whole(b"](" + b"N" * 2_000_000 + b"e")), "more than 1,000,000 opcodes"),
    "numbers as keys": (
        lambda: around(whole(b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 40_000)) + b"u")),
        "a key is of type int, expected text or a number of 32 bits",
    ),
    # lengths that are not there
    "LONG4 of 2 GiB": (lambda: around(whole(b"\x8b\xff\xff\xff\x7f\x01")), "its pickle is damaged"),
    "text of 4 GiB": (lambda: around(whole(b"X\xff\xff\xff\xff\x01")), "its pickle is damaged"),
    "text of 2**62 bytes": (lambda: around(whole(b"\x8d" + struct.pack("<Q", 2**62) + b"x")), "its pickle is damaged"),
    "frame of 2**62 bytes": (
        lambda: around(whole(b"\x95" + struct.pack("<Q", 2**62) + b"N", 4)),
        "protocol 4, torch reads 2",
    ),
    # what a caller would stumble over
    "its own items()": (
        lambda: around(whole(named("collections OrderedDict") + b")R}" + text("items") + b"K\x01sb")),
        "it sets attributes",
    ),
    "a function as a value": (
        lambda: around(item(named("collections OrderedDict"))),
        "weight is neither a tensor nor a plain value",
    ),
    # archives
    "something behind the old format": (lambda: benign(legacy=True) + b"x", "bytes, expected"),
    "data.pkl of 17 MiB": (lambda: around(whole(b"N0" * (17 * 2**19) + b"N")), "its data.pkl has 17,825,"),
    "data.pkl that inflates": (lambda: inflating("data.pkl"), "'data.pkl' is compressed"),
    "storage that inflates": (lambda: inflating("data/0"), "is compressed"),
    "members that overlap": (overlapping, "overlap"),
    "600,000 members": (lambda: many_members(600_000), "its directory has 27,600,000 bytes, more than 25,600,000"),
    "200,000 members": (lambda: many_members(200_000), "its directory has 200,000 members, more than 100,000"),
    "something behind the archive": (lambda: benign() + b"x", "bytes before or behind its .zip"),
    "something before the archive": (lambda: b"PK\3\4" + benign(), "bytes before or behind its .zip"),
    # safetensors
    "header of 2**63 bytes": (
        lambda: safetensors(b"{}", 2**63),
        "its header has 9,223,372,036,854,775,808 bytes, more than 16,777,216",
    ),
    "header of 17 MiB": (
        lambda: safetensors(b"{" + b" " * (17 * 2**20) + b"}"),
        "its header has 17,825,794 bytes, more than 16,777,216",
    ),
    "header 100,000 deep": (lambda: safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "recursion limit"),
    "shape beyond its bytes": (lambda: safetensors(described([10**12], [0, 4]), content=bytes(4)), "invalid shape"),
    "shape that wraps around": (lambda: safetensors(described([2**32, 2**32], [0, 0])), "overflow"),
    "offsets beyond the file": (lambda: safetensors(described([10**10], [0, 4 * 10**10])), "not fully covered"),
}
