"""How many trials fit, and what does not."""

import pytest
import ray

from fer_dist.errors import UserError
from tests.tune.rig import Search
from tune.cluster import require_resources
from tune.ledger import Ledger
from tune.settings import Settings


@pytest.mark.parametrize(
    ("settings", "concurrent", "fit"),
    [
        (Settings(), None, 8),
        (Settings(), 3, 3),
        (Settings(cpus=3), None, 2),
        (Settings(workers=2, cpus=2), None, 2),
        (Settings(workers=8), None, 1),
        (Settings(gpus=1), None, 2),
        (Settings(gpus=0.5), None, 4),
        (Settings(gpus=0.1), None, 8),
        (Settings(gpus=2, workers=2), None, 1),
    ],
)
def test_how_many_trials_fit(
    settings: Settings, concurrent: int | None, fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert require_resources(settings, concurrent) == fit


@pytest.mark.parametrize("settings", [Settings(cpus=9), Settings(workers=3, cpus=3), Settings(gpus=3)])
def test_what_does_not_fit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    with pytest.raises(UserError, match="a trial needs"):
        require_resources(settings, None)


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
