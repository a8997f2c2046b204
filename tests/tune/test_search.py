"""`python -m tune.search` from its command line to its last line, on real Ray."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fer_dist.config import Config, load_config
from fer_dist.engine.checkpoint import load
from fer_dist.engine.trainer import fit
from fer_dist.errors import UserError
from tests.conftest import ROOT
from tests.helpers.ray_search import LOOPBACK, SPACE, TINY, Search
from tune.asked import new, parser, resumed
from tune.ledger import Ledger, Trial, records_in
from tune.search import _main
from tune.settings import Settings, to_yaml
from tune.space import value_of


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Search, set[str]]]:
    """A whole search with TPE and ASHA: its folder, what it printed, where it has listened."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "space.yaml").write_text(SPACE)
    # One rank of threads more than trials are needed for two at once on two cores; the mark is in all of them.
    search = Search(folder, "--space", "space.yaml", "--trials", "5", "--name", "one", "--cpus", "2")
    try:
        search.until_line("epoch 1/3")
        listening = search.addresses()
        assert search.named("ray::"), "the mark finds Ray's processes"
        assert search.wait() == 0, search.printed
        search.require_no_orphans()
        yield folder / "tune_runs" / "one", search, listening
    finally:
        search.close()


def trials_of(folder: Path) -> list[Trial]:
    return Ledger(folder).trials()


def test_every_value_is_in_the_config_of_its_trial(searched: tuple[Path, Search, set[str]]) -> None:
    """Saved by the trainer, and in the checkpoint: a value that was dropped on the way would not be there."""
    folder, _, _ = searched
    trials = trials_of(folder)
    assert [trial.id for trial in trials] == ["001", "002", "003", "004", "005"]
    names = set(yaml.safe_load(SPACE))
    for trial in trials:
        assert set(trial.values) == names
        saved = load_config(str(trial.folder / "config.yaml"))
        in_checkpoint = Config().override(load(trial.folder / "best.pth").config)
        for name, value in trial.values.items():
            assert value_of(saved, name) == value == value_of(in_checkpoint, name), (trial.id, name)
            assert type(value_of(saved, name)) is type(value)
    assert len({trial.values["optim.lr"] for trial in trials}) == 5


def test_what_it_leaves(searched: tuple[Path, Search, set[str]]) -> None:
    folder, _, _ = searched
    left = {path.name for path in folder.iterdir()}
    assert left == {"search.yaml", "trials.jsonl", "trials", "results.csv", "results.json", "best.yaml", "best.pth",
                    "search.png"}  # fmt: skip
    trials = trials_of(folder)
    assert {trial.status for trial in trials} <= {"finished", "stopped"}
    with (folder / "results.csv").open(newline="") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert set(rows) == {trial.id for trial in trials}
    for trial in trials:
        assert float(rows[trial.id]["optim.lr"]) == trial.values["optim.lr"]
        assert int(rows[trial.id]["epochs"]) == len(trial.records) >= 1
    results = json.loads((folder / "results.json").read_text())
    best = max(trials, key=lambda trial: max(record["val"]["accuracy"] for record in trial.records))
    assert results["best"]["trial"] == best.id
    assert (folder / "best.pth").read_bytes() == (best.folder / "best.pth").read_bytes()


def test_best_yaml_repeats_the_best_trial(searched: tuple[Path, Search, set[str]], tmp_path: Path) -> None:
    """As a training of its own, to the last bit: a trial is nothing else, in a process that had others before."""
    folder, search, _ = searched
    best = json.loads((folder / "results.json").read_text())["best"]["trial"]
    assert re.search(r"torchrun .*-m fer_dist.train --config \S*best\.yaml", search.printed)
    config = load_config(str(folder / "best.yaml"))
    assert (config.run.name, config.run.dir, config.run.resume) == (None, "runs", "restart")
    assert (config.run.progress, config.run.stop_signals) == ("auto", Config().run.stop_signals)
    found = fit(config.override({"run.dir": str(tmp_path), "run.progress": "none"}))
    again, before = records_in(found.folder), records_in(folder / "trials" / best)
    assert len(again) == 3
    for record, old in zip(again, before, strict=False):
        assert (record["train_loss"], record["val"], record["lr"]) == (old["train_loss"], old["val"], old["lr"])


def test_it_listens_on_loopback_only(searched: tuple[Path, Search, set[str]]) -> None:
    _, _, listening = searched
    assert listening, "Ray does listen"
    assert listening <= LOOPBACK


def test_it_says_what_happens(searched: tuple[Path, Search, set[str]]) -> None:
    """Plain lines where there is no terminal; each trial starts, reports and ends."""
    _, search, _ = searched
    for name in ("001", "002", "003", "004", "005"):
        assert f"trial {name} starts: optim.lr " in search.printed
        assert f"trial {name} epoch 1/3: accuracy " in search.printed
        assert re.search(rf"trial {name} (finished|stopped)", search.printed)
    assert "5 of 5 trials have ended" in search.printed
    assert search.printed.count("pictures are ready") == 1, "the data are decoded once, before the trials"
    assert "Traceback" not in search.printed
    assert len(search.lines) < 60, f"Ray's own words are not for users:\n{search.printed}"


def test_a_search_that_is_over_says_so_again(searched: tuple[Path, Search, set[str]]) -> None:
    """--resume with nothing left runs nothing, and shows the table."""
    folder, _, _ = searched
    before = (folder / "trials.jsonl").read_bytes()
    search = Search(folder.parent.parent, "--resume", "--name", "one", tiny=False)
    assert search.wait() == 0, search.printed
    assert (folder / "trials.jsonl").read_bytes() == before
    assert "best: trial" in search.printed


def test_grid_tries_every_combination_once(tmp_path: Path) -> None:
    """Also: a trial that fails is noted with its reason, and does not end the search."""
    (tmp_path / "space.yaml").write_text("train.global_batch: [8, 16]\noptim.lr: [1.0e-3, 1.0e+30]\n")
    search = Search(tmp_path, "--space", "space.yaml", "--searcher", "grid", "--scheduler", "none", "--name", "grid")
    try:
        assert search.wait() == 0, search.printed
    finally:
        search.close()
    trials = trials_of(tmp_path / "tune_runs" / "grid")
    found = {(trial.values["train.global_batch"], trial.values["optim.lr"]): trial for trial in trials}
    assert len(trials) == 4
    assert set(found) == {(8, 1e-3), (16, 1e-3), (8, 1e30), (16, 1e30)}
    for (_, lr), trial in found.items():
        assert trial.status == ("failed" if lr > 1 else "finished")
        assert ("NaN or infinity" in trial.reason) == (lr > 1)
        assert len(trial.records) == (0 if lr > 1 else 3)
    assert search.printed.count("failed: ") == 2
    assert re.search(r"best: trial 00\d", search.printed)


# What is refused, before Ray is started


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--trials", "0"], "trials is 0"),
        (["--searcher", "tpa"], "searcher is 'tpa', expected tpe, random, grid"),
        (["--scheduler", "hyperband"], "scheduler is 'hyperband'"),
        (["--workers-per-trial", "3"], "train.global_batch"),
        (["--workers-per-trial", "2", "--gpus-per-trial", "1"], "0.5 each"),
        (["--gpus-per-trial", "1.5"], "GPUs are whole"),
        (["--searcher", "grid"], "optim.lr"),
        (["--optim.lrr", "1"], "unknown setting 'optim.lrr'"),
        (["--serchr", "tpe"], "did you mean '--searcher'?"),
        (["--trial=3"], "did you mean '--trials'?"),
        (["--dta", "x.csv"], "did you mean '--data'?"),
        (["--space", "none.yaml"], "none.yaml"),
        (["--name", "../up"], "expected a printable name"),
        (["--resume"], "there is no search in"),
        (["--resume", "--name", "gone"], "holds no search"),
        (["--cpus-per-worker", "9", "--cpus", "2"], "a trial needs 9 cores"),
        (["--gpus-per-trial", "64"], "and 64 GPUs"),
        (["--concurrent", "0"], "invalid count value: '0'"),
        (["--cpus", "-2"], "invalid count value: '-2'"),
        (["--name", "a\x1b[31m"], "expected a printable name"),
        (["--run.name", "mine"], "run.name, run.dir and run.resume are the search's own"),
        (["--address", "127.0.0.1:1", "--name", "x"], "no Ray cluster answers"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_is_refused(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [] if "--resume" in words else [*TINY[:4], "--train.global_batch", "16"]
    done = subprocess.run(
        [sys.executable, "-m", "tune.search", *tiny, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "  -> " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("tune_runs/*")), "the same line, put right, can be typed again"


def test_a_folder_is_never_used_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tune_runs" / "one").mkdir(parents=True)
    (tmp_path / "tune_runs" / "one" / "search.yaml").write_text("mine\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is in use") as caught:
        _main(["--name", "one"])
    assert "--name one --resume" in caught.value.fix
    assert (tmp_path / "tune_runs" / "one" / "search.yaml").read_text() == "mine\n"


@pytest.mark.parametrize(
    "content", ["mine", "search: 3", "search: {trials: many}", "- 1", "search: {}\nspace: {}", "\x00"]
)
def test_a_damaged_search(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tune_runs" / "one").mkdir(parents=True)
    (tmp_path / "tune_runs" / "one" / "search.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"search\.yaml cannot be read"):
        _main(["--resume"])


def test_other_settings_are_refused_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--optim.lr", "1"], ["--searcher", "random"], ["--space", "a.yaml"]):
        with pytest.raises(UserError, match="goes on with the settings"):
            _main(["--resume", *words])


def kept(folder: Path, *lines: str) -> Path:
    """A search that has been begun, and the lines of its ledger."""
    found = folder / "tune_runs" / "one"
    (found / "trials").mkdir(parents=True)
    (found / "search.yaml").write_text(to_yaml(Settings(trials=3), Config(), {"optim.lr": [0.1, 0.2]}))
    (found / "trials.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return found


def test_what_is_asked_for_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More trials are kept for the next time; failed ones get another try only if that is asked for."""
    monkeypatch.chdir(tmp_path)
    given = '{"trial": "001", "values": {"optim.lr": 0.1}}'
    folder = kept(tmp_path, given, '{"trial": "001", "status": "failed", "reason": "disk full", "seconds": 1}')
    resumed(*parser().parse_known_args(["--resume", "--trials", "7"]))
    assert resumed(*parser().parse_known_args(["--resume"])).settings.trials == 7
    assert [trial.status for trial in trials_of(folder)] == ["failed"]
    resumed(*parser().parse_known_args(["--resume", "--retry-failed"]))
    assert [(trial.status, trial.reason) for trial in trials_of(folder)] == [("running", "")]


def test_run_folders_that_the_ledger_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was lost: its numbers must not be given again on top of them."""
    monkeypatch.chdir(tmp_path)
    folder = kept(tmp_path)
    (folder / "trials" / "004").mkdir()
    with pytest.raises(UserError, match="does not know of the run folders 004"):
        _main(["--resume"])
    assert Ledger(folder).give({"optim.lr": 0.1}) == "005"


def test_paths_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray runs a trial in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "space.yaml").write_text("model.weights: [a.pth, ~/b.pth]\n")
    words = ["--space", "space.yaml", "--data", "~/x.csv", "--data.cache_dir", "cache", "--name", "one"]
    search = new(*parser().parse_known_args(words))
    assert search.config.data.path == str(tmp_path / "home" / "x.csv")
    assert search.config.data.cache_dir == str(tmp_path / "cache")
    assert search.space.to_dict() == {
        "model.weights": {"choice": [str(tmp_path / "a.pth"), str(tmp_path / "home" / "b.pth")]}
    }


# Without Ray


def test_help_needs_no_ray_and_is_fast(tmp_path: Path) -> None:
    """As on a machine without Ray: importing it fails."""
    for name in ("ray", "torch", "optuna"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "tune.search", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "--workers-per-trial" in done.stdout
    assert done.stderr == ""
