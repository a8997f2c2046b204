"""Resources of a Ray cluster and the data on its nodes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from fer_dist.config import Config
from fer_dist.errors import UserError
from tests.helpers.ray_search import Search
from tune import cluster
from tune.cluster import prepare_nodes, require_resources, with_gpus
from tune.ledger import Ledger
from tune.settings import Settings
from tune.trial import Task


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: tuple[int, int]) -> None:
    """Replace Ray by nodes with these cores and GPUs, and a dead one."""
    found = [
        {"Alive": True, "NodeID": f"{i:056x}", "NodeManagerHostname": f"n{i}", "Resources": {"CPU": cores, "GPU": gpus}}
        for i, (cores, gpus) in enumerate(resources)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: [*found, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(sum(gpus for _, gpus in resources))})


@pytest.mark.parametrize(
    ("settings", "concurrent", "fit"),
    [
        (Settings(gpus=0), None, 8),
        (Settings(gpus=0), 3, 3),
        (Settings(gpus=0, cpus=3), None, 2),
        (Settings(gpus=0, cpus=4), None, 1),
        (Settings(gpus=0, workers=2, cpus=2), None, 1),
        (Settings(gpus=1), None, 2),
        (Settings(gpus=0.5), None, 4),
        (Settings(gpus=0.1), None, 5),
        (Settings(gpus=2, workers=2), None, 1),
        (Settings(gpus=0, cpus=6), None, 0),  # more than on any node, but not more than on both
        (Settings(gpus=0, workers=3, cpus=3), None, 0),
        (Settings(gpus=3), None, 0),
        (Settings(gpus=4, workers=4), None, 0),
    ],
)
def test_trials_at_once(settings: Settings, concurrent: int | None, fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (5, 2), (3, 0))
    if fit:
        assert require_resources(settings, concurrent) == fit
        return
    with pytest.raises(UserError, match=r"a trial needs .* Ray has 5 cores and 2 GPUs; 3 cores and 0 GPUs"):
        require_resources(settings, concurrent)


@pytest.mark.parametrize(
    ("settings", "device", "gpus"),
    [
        (Settings(), "auto", 1),
        (Settings(workers=2), "cuda", 2),
        (Settings(workers=3), "auto", 0),
        (Settings(), "cpu", 0),
        (Settings(gpus=0), "auto", 0),
        (Settings(gpus=0.5), "auto", 0.5),
    ],
)
def test_gpus_are_used_if_there_are_enough(
    settings: Settings, device: str, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, (5, 2))
    assert with_gpus(settings, device).gpus == gpus


class Here:
    """Run a remote function in this process; `ray.get` returns its result."""

    def __init__(self, function: object) -> None:
        self.remote = function

    def options(self, **_: object) -> "Here":
        return self


@pytest.mark.parametrize("folder", ["/opt/plain", "/opt/with blanks"])
def test_an_interpreter_with_blanks_in_its_path_is_quoted(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray 2.60 runs it in a shell command; without quotes no worker of a trial starts."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda address, **given: options.update(given))
    monkeypatch.setattr(sys, "executable", f"{folder}/bin/python")
    with cluster.connected("", 1):
        pass
    expected = {"py_executable": "'/opt/with blanks/bin/python'"} if "blanks" in folder else None
    assert options.get("runtime_env") == expected


def test_every_node_reads_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (1, 0), (1, 0))
    monkeypatch.setattr(ray, "remote", lambda **_: Here)
    monkeypatch.setattr(ray, "get", lambda result: result)
    small = Config().override({"data.embedded_train": 14, "data.embedded_val": 7})
    task = Task(folder=tmp_path, scratch=tmp_path, config=small, settings=Settings())
    assert [line.partition(" pictures")[0].split() for line in prepare_nodes(task)] == [
        ["node", "n0:", "28"], ["node", "n1:", "28"],
    ]  # fmt: skip
    bad = Task(folder=tmp_path, scratch=tmp_path, config=small.override({"data.path": "no.csv"}), settings=Settings())
    with pytest.raises(UserError, match=r"node n0: .*no\.csv"):
        prepare_nodes(bad)
    assert list(tmp_path.iterdir()) == []
    problem, _, _ = cluster.prepare(task, tmp_path / "missing")
    assert "of the search is not there" in problem, "a node that does not see the folder"


@pytest.mark.gpu
@pytest.mark.parametrize(("share", "at_once"), [("0.5", 2), ("1", 1)])
def test_trials_on_a_gpu(share: str, at_once: int, tmp_path: Path) -> None:
    with Search(tmp_path, "--gpus-per-trial", share, "--trials", "2", "--cpus", "2", "--name", "one") as search:
        search.ok()
        assert f"{at_once} at once" in search.printed
        for trial in Ledger(tmp_path / "tune_runs" / "one").trials():
            assert trial.records
            assert "cpu" not in (trial.folder / "provenance.json").read_text()
