"""What a pickle of tensors says, read without doing any of it: a wall in front of torch's own guard.

`torch.load(weights_only=True)` runs a pickle with a list of functions that do no harm. But that
list makes a `bytearray` of any size, its dictionaries take keys whose hash takes years, and a
guard may have holes. Here the opcodes are only walked (`pickletools`): plain values are collected,
of tensors is kept what was said about them, and nothing is imported, called or allocated because a
file says so. What torch.save writes for tensors and plain values passes; all else is refused.
"""

import pickletools
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, NamedTuple, TypeVar

MAX_OPCODES = 1_000_000
"""Opcodes of a pickle. A tensor takes about 40: ViT-base and its AdamW 20,000."""
MAX_DIMENSIONS = 16

_STORAGES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
_STORAGES |= {"Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8}
_DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex128": 16, "complex64": 8, "bool": 1}
_DTYPES |= {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
_DTYPES |= {f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}
_REBUILD = [f"torch._utils _rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter")]

T = TypeVar("T")


class BadPickle(Exception):
    """Why a pickle is none of tensors and plain values, in one line."""


@dataclass(frozen=True)
class Name:
    """A type or function that a pickle names."""

    name: str


@dataclass(frozen=True)
class StorageType(Name):
    """A type of storage, as `torch.FloatStorage`."""

    itemsize: int


@dataclass(frozen=True)
class Dtype(Name):
    """A type of number, as `torch.float32`."""

    itemsize: int


_NAMES = {name: Name(name) for name in ("collections OrderedDict", "torch Size", *_REBUILD)}
_NAMES |= {f"torch {kind}Storage": StorageType(f"torch {kind}Storage", size) for kind, size in _STORAGES.items()}
_NAMES |= {"torch.storage UntypedStorage": StorageType("torch.storage UntypedStorage", 1)}
_NAMES |= {f"torch {name}": Dtype(f"torch {name}", size) for name, size in _DTYPES.items()}


class Ordered(dict[Any, Any]):
    """An `OrderedDict`, which may carry the versions of a module's state."""

    metadata: Any = None


@dataclass(frozen=True)
class Storage:
    """Numbers that the file holds elsewhere, under `key`."""

    key: str
    kind: StorageType
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.kind.itemsize


@dataclass(frozen=True)
class TensorOutline:
    """What a pickle says about a tensor; offset and strides in numbers of `itemsize` bytes."""

    storage: Storage
    itemsize: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.itemsize

    @property
    def reach(self) -> int:
        """Where its last number ends in the storage, in bytes; 0 if it has none."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return (self.offset + last + 1) * self.itemsize if self.nbytes else 0


class Outline(NamedTuple):
    """What a pickle describes, with outlines in place of tensors, and the storages that it names by key."""

    value: Any
    storages: dict[str, Storage]


def read_outline(stream: BinaryIO) -> Outline:
    """Read one pickle from where the stream stands, which is just behind it afterwards.

    Args:
        stream: in memory: a length that a pickle claims is asked of it.

    Raises:
        BadPickle: it is damaged, or says what tensors and plain values do not need.
    """
    walk = _Walk()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), start=1):
            if count > MAX_OPCODES:
                raise BadPickle(f"its pickle has more than {MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                break
            walk.step(opcode.name, argument)
        (value,) = walk.stack
        if walk.below:
            raise BadPickle("its pickle ends in the middle of something")
    except BadPickle:
        raise
    except Exception as error:  # pickletools has one for each opcode, and a stack may be empty
        raise BadPickle(f"its pickle is damaged ({type(error).__name__})") from None
    if walk.protocol > 3:
        raise BadPickle(f"its pickle has protocol {walk.protocol}, torch reads 2: save it again with torch.save")
    return Outline(value, walk.storages)


class _Walk:
    """The machine of a pickle: a stack, the stacks below its marks, and what it is to remember."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.protocol = 2

    def step(self, name: str, argument: Any) -> None:
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                self._push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._push({"NEWTRUE": True, "NEWFALSE": False}.get(name))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self._push({"EMPTY_DICT": dict, "EMPTY_LIST": list}.get(name, tuple)())
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._popped(name)))
            case "APPEND" | "APPENDS":
                items = self._popped(name)
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._popped(name))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._push(self.memo[argument])
            case "PROTO":
                self.protocol = argument
            case "FRAME":
                pass
            case _:
                self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        match name:
            case "GLOBAL":
                self._push(_named(argument))
            case "STACK_GLOBAL":
                self._push(_named(" ".join(map(str, self._popped("TUPLE2")))))
            case "BINPERSID":
                self._push(self._storage(self.stack.pop()))
            case "REDUCE":
                function, arguments = self._popped("TUPLE2")
                self._push(_called(function, arguments))
            case "BUILD":
                state = self.stack.pop()
                # torch gives an OrderedDict these attributes: one called `items` would replace its method.
                if type(state) is not dict or list(state) != ["_metadata"]:
                    raise BadPickle("it sets attributes, which tensors do not need")
                self._top(Ordered).metadata = state["_metadata"]
            case _:
                raise BadPickle(f"its pickle has the opcode {name}, which torch.save does not write")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _popped(self, name: str) -> list[Any]:
        """What an opcode takes from the stack: as many as it says, or all since the last mark."""
        count = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}.get(name)
        if count is None:
            items, self.stack = self.stack, self.below.pop()
        else:
            items = self.stack[-count:]
            del self.stack[-count:]
            if len(items) < count:
                raise IndexError
        return items

    def _top(self, kind: type[T]) -> T:
        if not isinstance(self.stack[-1], kind):
            raise BadPickle(f"it fills a {type(self.stack[-1]).__name__} as if it were another type")
        return self.stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        target: dict[Any, Any] = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of tuples in tuples, or of many chosen numbers, takes more time than anybody has.
            if not (type(key) is str or (type(key) is int and abs(key) < 2**31)):
                raise BadPickle(f"a key is of type {type(key).__name__}, expected text or a number of 32 bits")
            target[key] = value

    def _storage(self, said: Any) -> Storage:
        match said:
            case ("storage", StorageType() as kind, str() as key, str(), count) | (
                "storage",
                StorageType() as kind,
                str() as key,
                str(),
                count,
                None,
            ) if _whole((count,)):
                storage = self.storages.setdefault(key, Storage(key, kind, count))
                if storage != Storage(key, kind, count):
                    raise BadPickle(f"it names the storage {key[:40]!r} twice, with different sizes")
                return storage
        raise BadPickle("it names something outside of itself that is no storage")


def _named(name: str) -> Name:
    known = _NAMES.get(name)
    if known is None:
        raise BadPickle(f"it names {name.replace(' ', '.')[:80]}, which tensors do not need")
    return known


def _called(function: Any, arguments: Any) -> Any:
    """What torch's own functions make of these arguments; no others are called."""
    match getattr(function, "name", None), arguments:
        case "collections OrderedDict", ():
            return Ordered()
        case "torch Size", (tuple() as size,) if _whole(size):
            return size
        case "torch._utils _rebuild_tensor_v2", (Storage() as storage, *where, bool(), Ordered() as hooks) if not hooks:
            return _tensor(storage, storage.kind.itemsize, *where)
        case "torch._utils _rebuild_tensor_v3", (
            Storage() as storage,
            *where,
            bool(),
            Ordered() as hooks,
            Dtype() as dtype,
        ) if not hooks:
            return _tensor(storage, dtype.itemsize, *where)
        case "torch._utils _rebuild_parameter", (TensorOutline() as tensor, bool(), Ordered() as hooks) if not hooks:
            return tensor
    raise BadPickle("it calls something as torch.save does not")


def _tensor(storage: Storage, itemsize: int, offset: Any, size: Any, stride: Any) -> TensorOutline:
    for numbers in ((offset,), size, stride):
        if type(numbers) is not tuple or not _whole(numbers) or len(size) != len(stride):
            raise BadPickle("a tensor's offset, size or strides are no whole numbers")
    if len(size) > MAX_DIMENSIONS:
        raise BadPickle(f"a tensor has {len(size)} dimensions, more than {MAX_DIMENSIONS}")
    return TensorOutline(storage, itemsize, offset, size, stride)


def _whole(numbers: tuple[Any, ...]) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
