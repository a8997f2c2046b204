"""The entry itself: `python -m fer_dist.train` alone and under torchrun, what it leaves, prints and answers."""

import json
import re
from pathlib import Path

import pytest

from fer_dist.engine.checkpoint import load
from fer_dist.errors import EXIT_USER_ERROR
from tests.helpers.processes import ROOT, WORKERS, by_hand, python, torchrun

TRAIN = [
    *("-m", "fer_dist.train", "--config", "demo", "--data.embedded_train", "140", "--data.embedded_val", "21"),
    *("--model.options.width_mult", "0.25", "--model.options.channels", "32"),
    *("--train.epochs", "2", "--train.global_batch", "28", "--train.device", "cpu"),
]
FLAKY = str(WORKERS / "flaky_worker.py")


def test_alone(tmp_path: Path) -> None:
    """No launcher: a run folder under the working directory, a line of progress per epoch; resumed, it stays so."""
    done = python("-W", "error", *TRAIN, cwd=tmp_path).ok()
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

    resumed = python(*TRAIN, "--run.name", folder.name, "--run.resume", "auto", cwd=tmp_path).ok()
    assert "checkpoints/step-00000010.pth, after step 10: 2 epochs, 0 steps of the next" in resumed.out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_under_torchrun(tmp_path: Path) -> None:
    """Two ranks: everything is said once, by rank 0, and rank 0 writes."""
    done = torchrun(2, *TRAIN, "--run.name", "two", cwd=tmp_path).ok()
    assert len(re.findall(r"^epoch +[12]/2 ", done.out, re.MULTILINE)) == 2
    assert done.out.count("embedded") == 1
    assert "Traceback" not in done.err
    folder = tmp_path / "runs" / "two"
    assert json.loads((folder / "provenance.json").read_text())["world_size"] == 2
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "provenance.json", "launch.json", "metrics.jsonl", "tensorboard"),
        *("curves.png", "confusion.png", "report.json", "best.pth", "last.pth", "checkpoints", "starts.jsonl"),
    }


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (2, [FLAKY, "one"], "rank 1 stumbles\n  -> mind the step\n"),
        # rank 0 comes seconds later: torchrun would end it as soon as one of the others left
        (3, [FLAKY, "all"], "all ranks stumble\n  -> mind the step\n"),
    ],
    ids=["of_one_rank", "of_all_ranks"],
)
def test_an_error_under_torchrun(ranks: int, words: list[str], message: str) -> None:
    """The message stands there once, without a traceback of ours, and a worker has left with 2."""
    done = torchrun(ranks, *words)
    assert done.code != 0
    assert done.err.count("error: ") == done.err.count(f"error: {message}") == 1, done.err
    assert f'File "{ROOT / "fer_dist"}' not in done.err, "torchrun's own traceback may be there, none of our code"
    *others, cause = re.findall(r"exitcode +: (-?\d+)", done.err)  # torchrun puts the first failure last
    assert cause == str(EXIT_USER_ERROR), done.err
    assert set(others) <= {str(EXIT_USER_ERROR), "-15"}, "or ended by torchrun while it was still starting"


def test_every_rank_leaves_with_2(tmp_path: Path) -> None:
    """Ranks without an agent, so that each leaves by itself; an error that all of them find leaves no run folder."""
    first, other = by_hand(2, *TRAIN, "--run.dir", str(tmp_path / "runs"), "--data", "nowhere.csv")
    assert first.code == other.code == EXIT_USER_ERROR
    assert first.err.startswith("error: ")
    assert "nowhere.csv" in first.err
    assert other.err == ""
    assert not (tmp_path / "runs").exists()
