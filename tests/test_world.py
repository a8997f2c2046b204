"""`World` in one process: how it is joined and left, and what it refuses. Several ranks: engine/test_ranks.py."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fer_dist import world as world_module
from fer_dist.errors import UserError
from fer_dist.world import World, _fresh_store, _known_launch, join
from tests.helpers.processes import python


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Pretend that so many GPUs are visible; returns the devices that get chosen."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_alone() -> None:
    with join("cpu") as world:
        assert world == World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        assert world.first
    assert not dist.is_initialized()


def test_alone_everything_is_its_own() -> None:
    world = World()
    x = torch.tensor([1.5])
    world.mean_([x])
    model = nn.Linear(2, 2)
    assert world.sum_(x).item() == 1.5
    assert world.gather("a") == ["a"]
    assert world.from_first("a") == "a"
    assert world.agree(True)
    assert not world.agree(False)
    assert world.wrap(model) is model
    with world.sync(model, last=False):
        pass
    calls: list[int] = []
    assert world.node_first(lambda: calls.append(1)) is None
    assert calls == [1], "a node's first process does the work once"


def test_torchruns_variables_make_a_group_that_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with join("cpu") as world:
        assert (world.rank, world.size) == (0, 1)
        assert dist.is_initialized()
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()
    with pytest.raises(UserError), join("cpu"):
        raise UserError("closed after an error as well")
    assert not dist.is_initialized()


def test_a_group_of_somebody_else_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with join("cpu") as world:
            assert (world.rank, world.size) == (0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2, monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 ranks on a node with 2 visible GPUs") as caught, join(device):
        pass
    assert "--nproc_per_node=2" in caught.value.fix


def test_more_ranks_than_gpus_is_fine_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2, monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with join("cpu") as world:
        assert world.device.type == "cpu"


def test_cuda_is_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0, monkeypatch)
    with pytest.raises(UserError, match="no CUDA device is visible"), join("cuda"):
        pass


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0, monkeypatch)
    with join("auto") as world:
        assert world.device.type == "cpu"


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_size", "number"),
    [(4, 2, 4, 2), (4, 3, 4, 3), (8, 1, 2, 1), (1, 0, 1, 0)],
)
def test_each_rank_takes_its_own_gpu(
    visible: int, local_rank: int, local_size: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = gpus(visible, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    with join() as world:
        assert world.device == torch.device("cuda", number)
    assert chosen == [torch.device("cuda", number)]


def test_a_launcher_that_shows_each_rank_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray and some SLURM set-ups: local rank 3 of a node sees one GPU only, which is number 0 to it."""
    gpus(1, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with join() as world:
        assert world.device == torch.device("cuda", 0)


@pytest.mark.parametrize(("kinds", "carrier"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda:1")])
def test_what_a_checkpoint_travels_on(kinds: str, carrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that somebody else has made, as Ray does, may carry CUDA tensors only."""
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: kinds)
    assert world_module._carrier(torch.device("cuda:1")) == torch.device(carrier)


def test_a_launcher_is_known_before_it_can_be_gone() -> None:
    """Its number is taken at the import; a fork of this process has another parent."""
    assert world_module.launcher() == os.getppid()
    code = "import os, fer_dist.world as w; child = os.fork(); assert w.launcher() == os.getppid(); child and os.wait()"
    python("-c", code).ok()


def test_a_launch_knows_how_often_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that trains twice joins twice in each start; its launcher starts it again once."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
    found = []
    for _ in range(2):
        monkeypatch.setattr(world_module, "_joins", itertools.count())  # a new process
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)  # type: ignore[attr-defined]
        found.append([_known_launch(client), _known_launch(client)])
    (first, second), again = found
    assert (first[1], second[1]) == (1, 1)
    assert first[0] != second[0]
    assert again == [(first[0], 2), (second[0], 2)]


def test_what_dead_ranks_wrote_is_not_read() -> None:
    """torchrun keeps its store over a restart: a second start of the same ranks sees nothing of the first."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]

    def start(rank: int) -> tuple[bool, str]:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)  # type: ignore[attr-defined]
        if rank == 1:
            time.sleep(0.3)  # the quick ranks find the words of the dead one
        store = _fresh_store(client, rank, 3)
        stale = bool(store.check([f"address{rank}"]))
        store.set(f"address{rank}", str(rank))
        return stale, ",".join(store.get(f"address{other}").decode() for other in range(3))

    with ThreadPoolExecutor(3) as ranks:
        for _ in range(3):
            assert list(ranks.map(start, range(3))) == [(False, "0,1,2")] * 3
