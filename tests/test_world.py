"""`World` in one process: how it is joined and left, and what it refuses. Several ranks: engine/test_ranks.py."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from fer_dist import world as world_module
from fer_dist.errors import UserError
from fer_dist.world import World, _fresh_store, _known_launch, join
from tests.helpers.processes import python


def test_a_group_is_made_of_torchruns_variables_and_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with join("cpu") as world:
        assert world == World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        assert not dist.is_initialized(), "alone"
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with join("cpu") as world:
        assert (world.rank, world.size) == (0, 1)
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()
    with pytest.raises(UserError), join("cpu"):
        raise UserError("closed after an error as well")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("device", "gpus", "local_rank", "local_size", "expected"),
    [
        ("auto", 4, 3, 4, "cuda:3"),
        ("auto", 1, 3, None, "cuda:0"),  # Ray and some SLURM set-ups show each rank its own GPU only
        ("auto", 0, 0, 1, "cpu"),
        ("cpu", 2, 0, 4, "cpu"),
        ("auto", 2, 0, 4, "4 ranks on a node with 2 visible GPUs.* --nproc_per_node=2"),
        ("cuda", 0, 0, 1, "no CUDA device is visible"),
    ],
)
def test_the_device_of_a_rank(
    device: str, gpus: int, local_rank: int, local_size: int | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if local_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    if " " in expected:
        with pytest.raises(UserError, match=f"(?s){expected}"), join(device):
            pass
    else:
        with join(device) as world:
            assert str(world.device) == expected
    assert [str(one) for one in chosen] == ([expected] if expected.startswith("cuda:") else [])


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
