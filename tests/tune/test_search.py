"""`python -m tune.search`: two searches on real Ray, and the command line without Ray."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
import yaml
from PIL import Image

from fer_dist.config import Config, load_config
from fer_dist.engine.checkpoint import load
from fer_dist.engine.trainer import fit
from fer_dist.errors import Stopped, UserError
from tests.conftest import ROOT
from tests.helpers.ray_search import LOOPBACK, SPACE, TINY, Search
from tune import cluster
from tune import search as search_module
from tune.asked import new, parser, resumed
from tune.ledger import Ledger, records_in
from tune.search import _main, main
from tune.settings import Settings, to_yaml
from tune.space import value_of


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Search, set[str]]]:
    """Run a whole search with TPE and ASHA: its folder, its output, the addresses on which it listened."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "space.yaml").write_text(SPACE)
    with Search(folder, "--space", "space.yaml", "--trials", "4", "--name", "one", "--cpus", "2") as search:
        search.until(lambda printed: "epoch 1/3" in printed)
        listening = search.addresses()
        assert search.named("ray::"), "the mark finds Ray's processes"
        search.ok()
        search.require_no_orphans()
        yield folder / "tune_runs" / "one", search, listening


def test_every_value_is_in_the_config_of_its_trial(searched: tuple[Path, Search, set[str]]) -> None:
    """The trainer has saved it, and the checkpoint has it: a dropped value would not be there."""
    trials = Ledger(searched[0]).trials()
    assert [trial.id for trial in trials] == ["001", "002", "003", "004"]
    for trial in trials:
        assert set(trial.values) == set(yaml.safe_load(SPACE))
        saved = load_config(str(trial.folder / "config.yaml"))
        in_checkpoint = Config().override(load(trial.folder / "best.pth").config)
        for name, value in trial.values.items():
            assert value_of(saved, name) == value == value_of(in_checkpoint, name), (trial.id, name)
            assert type(value_of(saved, name)) is type(value)
    assert len({trial.values["optim.lr"] for trial in trials}) == 4


def test_the_results_agree_with_the_trials(searched: tuple[Path, Search, set[str]]) -> None:
    folder, _, _ = searched
    assert {path.name for path in folder.iterdir()} == {
        "search.yaml", "trials.jsonl", "trials", "results.csv", "results.json", "best.yaml", "best.pth", "search.png",
    }  # fmt: skip
    trials = Ledger(folder).trials()
    assert {trial.status for trial in trials} <= {"finished", "stopped"}
    best = max(trials, key=lambda trial: max(record["val"]["accuracy"] for record in trial.records))
    assert json.loads((folder / "results.json").read_text())["best"]["trial"] == best.id
    assert (folder / "best.pth").read_bytes() == (best.folder / "best.pth").read_bytes()
    with Image.open(folder / "search.png") as image:
        assert image.height > 1000, "all of its trials are drawn"


def test_best_yaml_repeats_the_best_trial(searched: tuple[Path, Search, set[str]], tmp_path: Path) -> None:
    """As a separate training, bit for bit, although Ray reuses the process of a trial for others."""
    folder, search, _ = searched
    best = json.loads((folder / "results.json").read_text())["best"]["trial"]
    assert re.search(r"torchrun .*-m fer_dist.train --config \S*best\.yaml", search.printed)
    config = load_config(str(folder / "best.yaml"))
    again = records_in(fit(config.override({"run.dir": str(tmp_path), "run.progress": "none"})).folder)
    assert len(again) == 3
    for record, old in zip(again, records_in(folder / "trials" / best), strict=False):
        assert (record["train_loss"], record["val"], record["lr"]) == (old["train_loss"], old["val"], old["lr"])


def test_its_output_and_its_addresses(searched: tuple[Path, Search, set[str]]) -> None:
    """Plain lines without a terminal: each trial starts, reports and ends. Ray listens on loopback only."""
    _, search, listening = searched
    for name in ("001", "002", "003", "004"):
        assert f"trial {name} starts: optim.lr " in search.printed
        assert f"trial {name} epoch 1/3: accuracy " in search.printed
        assert re.search(rf"trial {name} (finished|stopped)", search.printed)
    assert "4 of 4 trials have ended" in search.printed
    assert search.printed.count("pictures are ready") == 1, "the data are decoded once, before the trials"
    assert "Traceback" not in search.printed
    assert len(search.lines) < 60, f"Ray's own messages are not for users:\n{search.printed}"
    assert listening
    assert listening <= LOOPBACK


@pytest.mark.slow
def test_grid_tries_every_combination_once(tmp_path: Path) -> None:
    """A trial that fails is noted with its reason, and does not end the search."""
    (tmp_path / "space.yaml").write_text("train.global_batch: [8, 16]\noptim.lr: [1.0e-3, 1.0e+30]\n")
    words = ("--space", "space.yaml", "--searcher", "grid", "--scheduler", "none", "--name", "grid")
    with Search(tmp_path, *words) as search:
        search.ok()
    trials = Ledger(tmp_path / "tune_runs" / "grid").trials()
    found = sorted((trial.values["train.global_batch"], trial.values["optim.lr"]) for trial in trials)
    assert found == [(8, 1e-3), (8, 1e30), (16, 1e-3), (16, 1e30)]
    for trial in trials:
        bad = trial.values["optim.lr"] > 1
        assert (trial.status, len(trial.records)) == (("failed", 0) if bad else ("finished", 3))
        assert ("NaN or infinity" in trial.reason) == bad
    assert search.printed.count("failed: ") == 2
    assert re.search(r"best: trial 00\d", search.printed)


# Without Ray


@pytest.fixture
def no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the cluster by two cores that nothing runs on; returns the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "_environment", lambda address: None)
    real = cluster.connected
    monkeypatch.setattr(cluster, "connected", lambda address, cpus: real(address, cpus) if address else nullcontext())
    monkeypatch.setattr(cluster, "prepare_nodes", lambda task: [])
    monkeypatch.setattr(cluster, "open_desk", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "cluster_resources", dict)
    return tmp_path


def test_a_finished_search_shows_its_results_again(
    searched: tuple[Path, Search, set[str]], no_ray: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = searched
    before = (folder / "trials.jsonl").read_bytes()
    _main(["--resume", "--name", "one", "--dir", str(folder.parent)])
    assert (folder / "trials.jsonl").read_bytes() == before
    assert "best: trial" in capsys.readouterr().out


def kept(folder: Path, *lines: str) -> Path:
    """Make a search that has begun, with the lines of its ledger."""
    found = folder / "one"
    (found / "trials").mkdir(parents=True)
    (found / "search.yaml").write_text(to_yaml(Settings(trials=3), Config(), {"optim.lr": [0.1, 0.2]}))
    (found / "trials.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return found


GIVEN = '{"trial": "001", "values": {"optim.lr": 0.1}}'
FAILED = '{"trial": "001", "status": "failed", "reason": "disk full", "seconds": 1}'


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--trials 0", "trials is 0"),
        ("--searcher tpa", "searcher is 'tpa', expected tpe, random, grid"),
        ("--workers-per-trial 3", "train.global_batch"),
        ("--workers-per-trial 2 --gpus-per-trial 1", "0.5 each"),
        ("--gpus-per-trial 1.5", "GPUs are whole"),
        ("--searcher grid", "optim.lr"),
        ("--optim.lrr 1", "unknown setting 'optim.lrr'"),
        ("--serchr tpe", "did you mean '--searcher'?"),
        ("--trial=3", "did you mean '--trials'?"),
        ("--space none.yaml", "none.yaml"),
        ("--name ../up", "expected a printable name"),
        ("--name a\x1b[31m", "expected a printable name"),
        ("--resume", "there is no search in"),
        ("--resume --name gone", "holds no search"),
        ("--concurrent 0", "invalid count value: '0'"),
        ("--run.name mine", "run.name, run.dir and run.resume are the search's own"),
        ("--cpus-per-worker 9", "a trial needs 9 cores"),
        ("--address 127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
        ("--dir old --name one", "-m tune.search --dir {old} --name one --resume goes on"),
        ("--dir old --resume --optim.lr 1", "goes on with the settings"),
        ("--dir old --resume --searcher random", "goes on with the settings"),
        ("--dir old --resume --space a.yaml", "goes on with the settings"),
    ],
)
def test_a_wrong_command_is_refused(
    words: str, problem: str, no_ray: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with exit code 2, leaves no folder, so that the corrected line can be typed, and other searches alone."""
    old = kept(no_ray / "old") / "search.yaml"
    before = old.read_bytes()
    tiny = [] if "--resume" in words else [*TINY[:4], "--train.global_batch", "16"]
    monkeypatch.setattr(sys, "argv", ["search", *tiny, *words.split(" ")])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert problem.format(old=no_ray / "old") in error
    assert error.count("error: ") == 1
    assert "  -> " in error
    assert not list(no_ray.glob("tune_runs/*"))
    assert old.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["mine", "search: 3", "search: {trials: many}", "- 1", "search: {}\nspace: {}", "\x00"]
)
def test_a_damaged_search_is_refused(content: str, no_ray: Path) -> None:
    (kept(no_ray / "tune_runs") / "search.yaml").write_text(content)
    with pytest.raises(UserError, match=r"search\.yaml cannot be read"):
        _main(["--resume"])


def test_resume_keeps_more_trials_and_retries_failed_ones(no_ray: Path) -> None:
    folder = kept(no_ray / "tune_runs", GIVEN, FAILED)
    resumed(*parser().parse_known_args(["--resume", "--trials", "7"]))
    assert resumed(*parser().parse_known_args(["--resume"])).settings.trials == 7
    assert [trial.status for trial in Ledger(folder).trials()] == ["failed"]
    resumed(*parser().parse_known_args(["--resume", "--retry-failed"]))
    assert [(trial.status, trial.reason) for trial in Ledger(folder).trials()] == [("running", "")]


def test_run_folders_that_the_ledger_does_not_know(no_ray: Path) -> None:
    """The ledger was lost: its numbers must not be given again to new trials."""
    folder = kept(no_ray / "tune_runs")
    (folder / "trials" / "004").mkdir()
    with pytest.raises(UserError, match="does not know of the run folders 004"):
        _main(["--resume"])
    assert Ledger(folder).give({"optim.lr": 0.1}) == "005"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_trials(number: int, no_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results so far are written; a search without trials leaves no folder."""
    monkeypatch.setattr(search_module, "_tune", lambda *_: signal.raise_signal(number))
    folder = kept(no_ray / "tune_runs", GIVEN, FAILED)
    with pytest.raises(Stopped, match=r"1 of 3 trials have ended.*\n.*--name one --resume goes on"):
        _main(["--resume"])
    assert (folder / "results.csv").exists()
    with pytest.raises(Stopped, match="before it had begun"):
        _main([*TINY, "--name", "two"])
    assert not (folder.parent / "two").exists()


def test_paths_are_absolute(no_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray runs a trial in a folder of its own."""
    monkeypatch.setenv("HOME", str(no_ray / "home"))
    (no_ray / "space.yaml").write_text("model.weights: [a.pth, ~/b.pth]\n")
    words = ["--space", "space.yaml", "--data", "~/x.csv", "--data.cache_dir", "cache", "--name", "one"]
    search = new(*parser().parse_known_args(words))
    assert search.config.data.path == str(no_ray / "home" / "x.csv")
    assert search.config.data.cache_dir == str(no_ray / "cache")
    weights = [str(no_ray / "a.pth"), str(no_ray / "home" / "b.pth")]
    assert search.space.to_dict() == {"model.weights": {"choice": weights}}


def test_help_needs_no_ray_and_imports_little(tmp_path: Path) -> None:
    """As on a machine without Ray. Each part of a search imports only what it needs: fresh interpreters show it."""
    for name in ("ray", "torch", "optuna"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    parts = (
        "import sys, tune.report; heavy = {'torch', 'numpy', 'matplotlib', 'rich', 'ray'} & set(sys.modules)\n"
        "from fer_dist.config import Config; from tune.spacefile import space_of\n"
        "space_of({'optim.lr': [0.1]}, Config(), 1, '').sample(0, 0)\n"
        "print(sorted(heavy | {'torch', 'ray', 'optuna', 'fer_dist.models'} & set(sys.modules)))\n"
    )
    pictures = "import sys, tune.pictures, tune.report; print('ray' in sys.modules)"
    for words, path, printed in (
        (("-m", "tune.search", "--help"), f"{tmp_path}:{ROOT}", "--workers-per-trial"),
        (("-c", parts), str(ROOT), "[]"),
        (("-c", pictures), str(ROOT), "False"),
    ):
        environment = {"PYTHONPATH": path, "PATH": "/usr/bin"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, env=environment)
        assert printed in done.stdout
        assert done.stderr == ""
