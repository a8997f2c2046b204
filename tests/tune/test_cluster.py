"""How many trials fit, and what does not."""

import pytest
import ray

from fer_dist.errors import UserError
from tests.helpers.ray_search import Search
from tune.cluster import require_resources, with_gpus
from tune.ledger import Ledger
from tune.settings import Settings


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: tuple[int, int]) -> None:
    """Ray with nodes of so many cores and GPUs, and a dead one."""
    found = [{"Alive": True, "Resources": {"CPU": float(cores), "GPU": float(gpus)}} for cores, gpus in resources]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*found, dead])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(sum(gpus for _, gpus in resources))})


@pytest.mark.parametrize(
    ("settings", "concurrent", "fit"),
    [
        (Settings(gpus=0), None, 8),
        (Settings(gpus=0), 3, 3),
        (Settings(gpus=0, cpus=3), None, 2),
        (Settings(gpus=0, cpus=4), None, 1),
        (Settings(gpus=0, workers=2, cpus=2), None, 1),
        (Settings(gpus=0, workers=8), None, 1),
        (Settings(gpus=1), None, 2),
        (Settings(gpus=0.5), None, 4),
        (Settings(gpus=0.1), None, 5),
        (Settings(gpus=2, workers=2), None, 1),
    ],
)
def test_how_many_trials_fit(
    settings: Settings, concurrent: int | None, fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, (5, 2), (3, 0))
    assert require_resources(settings, concurrent) == fit


@pytest.mark.parametrize(
    "settings",
    [
        Settings(gpus=0, cpus=6),  # more than on any node, though not than on both
        Settings(gpus=0, workers=3, cpus=3),
        Settings(gpus=3),
        Settings(gpus=4, workers=4),
    ],
)
def test_what_does_not_fit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, (5, 2), (3, 0))
    with pytest.raises(UserError, match=r"a trial needs .* Ray has 5 cores and 2 GPUs; 3 cores and 0 GPUs"):
        require_resources(settings, None)


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
def test_gpus_are_used_where_there_are_any(
    settings: Settings, device: str, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, (5, 2))
    assert with_gpus(settings, device).gpus == gpus


@pytest.mark.gpu
@pytest.mark.parametrize("words", [("--gpus-per-trial", "0.5"), ("--gpus-per-trial", "1")])
def test_trials_on_a_gpu(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two share one, or one has it alone."""
    folder = tmp_path_factory.mktemp("gpu")
    search = Search(folder, *words, "--trials", "2", "--cpus", "2", "--name", "one")
    try:
        assert search.wait() == 0, search.printed
        assert f"{2 if '0.5' in words else 1} at once" in search.printed
        found = Ledger(folder / "tune_runs" / "one").trials()
        assert all(trial.records for trial in found)
        assert all("cpu" not in (trial.folder / "provenance.json").read_text() for trial in found)
    finally:
        search.close()
