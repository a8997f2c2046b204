"""`World`: how many processes train together, and the few things they say to each other.

The only file that names torch.distributed. A process is started by torchrun, by SLURM through
torchrun, by Ray, or alone; the rest of the code cannot tell and does not ask.
"""

import inspect
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fer_dist.device import choose_device
from fer_dist.errors import RankLost, UserError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others at the start, and at the least in every exchange."""
LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
"""What torch's errors say, plain RuntimeErrors among them, where another rank is the reason."""

_started = os.getpid(), os.getppid()
"""This process and who started it, at the import: a launcher that dies while data are read is gone later."""
_joins = itertools.count()
"""Numbers the joins of this process: a script may train several times in one launch."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one run.

    Attributes:
        rank: 0..size-1, over all nodes.
        size: number of processes.
        local_rank: number of this process on its node.
        device: where this process computes.
        launch: what all starts by one launcher have in common; known to rank 0.
        restarted: the launcher has started the ranks again; known to rank 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    launch: str = ""
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors of one dtype over all ranks, in place, in one message."""
        if self.size > 1 and tensors:
            flat = torch.cat([x.reshape(-1) for x in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            pieces = flat.split([x.numel() for x in tensors])  # type: ignore[no-untyped-call]
            for x, piece in zip(tensors, pieces, strict=True):
                x.copy_(piece.view_as(x))

    def agree(self, flag: bool) -> bool:
        """Whether the flag is raised on any rank; the same answer on all."""
        return any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order of rank, on every rank (small, picklable values)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def share(self, tree: T) -> T:
        """Rank 0's nested dictionaries and lists on every rank; CPU tensors travel as they are, not pickled."""
        if self.size == 1:
            return tree
        tensors: list[Tensor] = []
        skeleton = self.from_first(_outline(tree, tensors))
        if not self.first:
            tensors.clear()
        return cast(T, _filled(skeleton, tensors, self.first, _carrier(self.device)))

    def together(self, work: Callable[[], T]) -> T:
        """Do the work on every rank; a UserError of any rank becomes the error of all.

        Without this, one rank would leave with its message and the others wait for it.
        """
        result, error = None, None
        try:
            result = work()
        except UserError as caught:
            error = caught
        for other in self.gather(None if error is None else (error.problem, error.fix)):
            if other is not None:
                raise UserError(*other)
        return cast(T, result)

    def only_first(self, work: Callable[[], object]) -> None:
        """Do the work on rank 0; its UserError becomes the error of all."""
        self.together(lambda: work() if self.first else None)

    def node_first(self, work: Callable[[], T]) -> T:
        """Do the work on each node's first process, then on the others, which find it done."""

        def nothing() -> None: ...

        if self.local_rank == 0:
            result = self.together(work)
            self.together(nothing)
        else:
            self.together(nothing)
            result = self.together(work)
        return result

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks (DDP); alone, the model itself.

        Buffers are not broadcast: the trainer averages the running statistics after each step,
        so that every rank evaluates and saves the same ones.
        """
        if self.size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # torch 2.14 renamed the switch and warns of the old name; 2.10 knows the old one only.
        known = inspect.signature(DistributedDataParallel).parameters
        no_buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **no_buffers)

    def sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch: gradients are exchanged after the last one only."""
        no_sync = getattr(model, "no_sync", None)  # of DDP, also where torch.compile is around it
        if no_sync is not None and not last:
            return cast(AbstractContextManager[None], no_sync())
        return nullcontext()


def launcher() -> int:
    """The process that started this one, which may be gone by now; in a fork, its present parent."""
    return _started[1] if _started[0] == os.getpid() else os.getppid()


def _outline(tree: Any, tensors: list[Tensor]) -> Any:
    """The tree with an empty ("meta") tensor for each tensor, and the tensors in that order, each one block of memory.

    The empty ones carry shape, type and layout: channels-last stays so, as the optimizers want it.
    """
    if isinstance(tree, dict):
        return {key: _outline(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_outline(value, tensors) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    dense = tree.is_contiguous() or (tree.ndim == 4 and tree.is_contiguous(memory_format=torch.channels_last))
    tensors.append(tree if dense else tree.contiguous())
    return torch.empty_like(tensors[-1], device="meta")


def _filled(tree: Any, tensors: list[Tensor], sends: bool, carrier: torch.device) -> Any:
    """The tree with its tensors, sent or received in the order of their places."""
    if isinstance(tree, dict):
        return {key: _filled(value, tensors, sends, carrier) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_filled(value, tensors, sends, carrier) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    x = tensors.pop(0) if sends else torch.empty_strided(tree.shape, tree.stride(), dtype=tree.dtype)
    if x.numel():
        flat = x.as_strided((x.numel(),), (1,))
        carried = flat.to(carrier)
        dist.broadcast(carried, src=0)
        if not sends and carried is not flat:
            flat.copy_(carried)
    return x


def _carrier(device: torch.device) -> torch.device:
    """Where tensors that are on the CPU travel: a group that somebody else has made may know NCCL only."""
    kinds = str(dist.get_backend_config())  # "cpu:gloo,cuda:nccl"
    return torch.device("cpu") if "cpu:" in kinds else device


@contextmanager
def join(device: str = "auto", timeout_seconds: float = 0.0) -> Iterator[World]:
    """Make or find this process's World, and close what was made.

    A process group that somebody else made (Ray, a notebook) is used and left open. Otherwise
    torchrun's variables are followed; without them the process is alone.

    Args:
        device: auto, cpu or cuda. NCCL carries CUDA tensors, gloo carries CPU tensors.
        timeout_seconds: how long one exchange may take, PATIENCE at the least [s].

    Raises:
        UserError: cuda is asked for and absent, or a node has more ranks than GPUs.
        RankLost: another rank is gone.
    """
    with _naming_lost_ranks(), _joined(device, timedelta(seconds=timeout_seconds)) as world:
        yield world


@contextmanager
def _naming_lost_ranks() -> Iterator[None]:
    """Turns what torch raises when another rank is gone into a RankLost."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch.distributed's own errors are RuntimeErrors
        told = str(error)
        if isinstance(error, dist.DistError) or any(word in told for word in LOST):
            raise RankLost(" ".join(told.split("]", 1)[-1].split(". This is")[0].split())[:200]) from error
        raise


@contextmanager
def _joined(device: str, timeout: timedelta) -> Iterator[World]:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on = choose_device(device, local_rank)
    if dist.is_initialized():
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=on)
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
        launch, starts = _known_launch(store) if rank == 0 else ("", 1)
        where: dict[str, Any] = {"store": _fresh_store(store, rank, size), "rank": rank, "world_size": size}
        where["timeout"] = max(PATIENCE, timeout)
        if on.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=on, **where)
        else:
            dist.init_process_group("gloo", **where)
        try:
            yield World(rank=rank, size=size, local_rank=local_rank, device=on, launch=launch, restarted=starts > 1)
        finally:
            dist.destroy_process_group()
    else:
        yield World(device=on)


def _known_launch(store: Any) -> tuple[str, int]:
    """A name for this launch, and how often rank 0 has started in it.

    torchrun keeps its store when it restarts the ranks. $TORCHELASTIC_RESTART_COUNT would not do: where
    a rank of another node has died, it stays 0 on this one. Each `join` of a process counts for itself.
    """
    join = next(_joins)
    starts = store.add(f"fer_dist/starts/{join}", 1)
    return store.compare_set(f"fer_dist/launch/{join}", "", uuid.uuid4().hex).decode(), starts


def _fresh_store(store: Any, rank: int, size: int) -> Any:
    """A corner of the store that no earlier start of the same run has written to.

    torchrun keeps its store when it restarts the ranks. What the dead ones wrote, their addresses
    among it, is still there, and a quick rank would connect to them (seen with torch 2.14 and gloo:
    "Connection refused" in one restart of a few). So rank 0 makes up a name, and tells it to
    those who say hello with a word of their own until all of them have heard it.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"fer_dist/hello/{rank}", word)
        name = store.get(f"fer_dist/answer/{word}").decode()
        store.add(f"fer_dist/{name}/met", 1)
        return dist.PrefixStore(f"fer_dist/{name}", store)  # type: ignore[attr-defined]
    name, answered, begun = uuid.uuid4().hex, set[bytes](), time.monotonic()
    while (met := store.add(f"fer_dist/{name}/met", 0)) < size - 1:
        for key in (f"fer_dist/hello/{other}" for other in range(1, size)):
            if store.check([key]) and (said := store.get(key)) not in answered:
                store.set(f"fer_dist/answer/{said.decode()}", name)
                answered.add(said)
        if time.monotonic() - begun > PATIENCE.total_seconds():
            raise UserError(f"{met + 1} of {size} ranks have come within {PATIENCE}", "start the others, too")
        time.sleep(0.01)
    return dist.PrefixStore(f"fer_dist/{name}", store)  # type: ignore[attr-defined]
