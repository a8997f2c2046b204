"""The entry itself: `python -m fer_dist.train` alone and under torchrun, what it leaves, prints and answers."""

import json
import re
from pathlib import Path

import pytest

from fer_dist.engine.checkpoint import load
from fer_dist.errors import EXIT_USER_ERROR
from tests.helpers.processes import ROOT, WORKERS, Done, by_hand, python, torchrun

TINY = [
    *("--config", "demo", "--data.embedded_train", "140", "--data.embedded_val", "21"),
    *("--model.options.width_mult", "0.25", "--model.options.channels", "32"),
    *("--train.epochs", "2", "--train.global_batch", "28", "--train.device", "cpu"),
]
TRAIN = ["-m", "fer_dist.train"]


def test_alone(tmp_path: Path) -> None:
    """One process, no launcher: a run folder under the working directory, a line of progress per epoch."""
    done = python("-W", "error", *TRAIN, *TINY, cwd=tmp_path).ok()
    assert done.err == ""
    first, *rest = done.out.splitlines()
    assert "embedded" in first
    assert "--data fer2013.csv" in first
    assert sum(bool(re.match(r"epoch +\d/2 ", line)) for line in rest) == 2
    assert "\x1b" not in done.out, "plain lines where there is no terminal"
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("patt_lite-")
    assert f"runs/{folder.name}/best.pth" in rest[-1]
    assert load(folder / "best.pth").provenance["world_size"] == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_under_torchrun(tmp_path: Path) -> None:
    """Two ranks: everything is said once, by rank 0, and rank 0 writes."""
    done = torchrun(2, *TRAIN, *TINY, "--run.name", "two", cwd=tmp_path).ok()
    assert len(re.findall(r"^epoch +[12]/2 ", done.out, re.MULTILINE)) == 2
    assert done.out.count("embedded") == 1
    assert "Traceback" not in done.err
    folder = tmp_path / "runs" / "two"
    assert json.loads((folder / "provenance.json").read_text())["world_size"] == 2
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "provenance.json", "launch.json", "metrics.jsonl", "tensorboard"),
        *("curves.png", "confusion.png", "report.json", "best.pth", "last.pth", "checkpoints", "starts.jsonl"),
    }


def refused(done: Done, message: str) -> None:
    """The message stands there once, without a traceback of ours, and a worker has left with 2."""
    assert done.code != 0
    assert len(re.findall(r"^error: ", done.err, re.MULTILINE)) == 1, done.err
    assert done.err.count(message) == 1, done.err
    assert f'File "{ROOT / "fer_dist"}' not in done.err, "torchrun's own traceback may be there, none of our code"
    *others, cause = re.findall(r"exitcode +: (-?\d+)", done.err)  # torchrun puts the first failure last
    assert cause == str(EXIT_USER_ERROR), done.err
    assert set(others) <= {str(EXIT_USER_ERROR), "-15"}, "or ended by torchrun while it was still starting"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere.csv"], "nowhere.csv"),  # found by all ranks, with a group
        (["--optim.lrr", "1"], "optim.lr"),  # found by all ranks, before there is a group
    ],
    ids=["data", "setting"],
)
def test_an_error_under_torchrun(tmp_path: Path, words: list[str], message: str) -> None:
    done = torchrun(2, *TRAIN, *TINY, *words, cwd=tmp_path)
    assert message in done.err
    refused(done, "error: ")
    assert not (tmp_path / "runs").exists()


def test_an_error_of_one_rank_under_torchrun() -> None:
    refused(torchrun(2, str(WORKERS / "flaky_worker.py"), "one"), "error: rank 1 stumbles\n  -> mind the step\n")


def test_rank_0_speaks_though_it_is_the_last() -> None:
    """The other ranks are there seconds earlier: torchrun would end rank 0 as soon as one of them left."""
    refused(torchrun(3, str(WORKERS / "flaky_worker.py"), "all"), "error: all ranks stumble\n  -> mind the step\n")


@pytest.mark.parametrize("words", [[*TRAIN, *TINY, "--data", "nowhere.csv"], [str(WORKERS / "flaky_worker.py"), "one"]])
def test_every_rank_leaves_with_2(words: list[str]) -> None:
    """Ranks without an agent, so that each leaves by itself."""
    first, *others = by_hand(2, *words)
    assert first.code == EXIT_USER_ERROR
    assert first.err.startswith("error: ")
    assert [(other.code, other.err) for other in others] == [(EXIT_USER_ERROR, "")]


def test_an_existing_run_folder(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    done = python(*TRAIN, *TINY, "--run.name", "mine", cwd=tmp_path)
    assert done.code == EXIT_USER_ERROR
    assert done.err.startswith("error: the run folder runs/mine exists; a run is never overwritten\n  -> --run.name")
    assert list((tmp_path / "runs" / "mine").iterdir()) == []


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two epochs in two starts of one epoch each would be another schedule; a killed run goes on with its own."""
    words = [*TRAIN, *TINY, "--run.name", "mine", "--run.resume", "auto"]
    python(*words, cwd=tmp_path).ok()
    done = python(*words, cwd=tmp_path).ok()
    assert "runs/mine/checkpoints/step-00000010.pth, after step 10: 2 epochs, 0 steps of the next" in done.out
    assert len((tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()) == 2
