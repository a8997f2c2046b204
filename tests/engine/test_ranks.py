"""One, two, three and four ranks: the same losses, the same counts, the same decisions, the same errors.

Real processes. A launch takes seconds, so that each size is launched once and does all the jobs
of `tests/workers/rank_jobs.py` that a test here asks for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fer_dist.data.faces import VAL
from fer_dist.world import World
from tests.helpers.processes import WORKERS, torchrun, two_agents
from tests.helpers.small_runs import CLASSES, everything, numbered_faces, plain_lines, same
from tests.workers.rank_jobs import COUNTS, LOSS_CASES, do

JOBS = str(WORKERS / "rank_jobs.py")
EVERY = ["counts", "ledger", "parts"]
TRAINING = [*EVERY, "losses", "states", "faults", "attach"]
NAMES = {
    1: [*TRAINING, "decisions"],
    2: [*TRAINING, "settled", "one_loss", "losses_unshared", "unbroken", "stop_on_last_rank"],
    3: [*EVERY, "decisions", "check_batch"],
    4: [*TRAINING, "states_unaveraged"],
}
Found = list[dict[str, Any]]
"""What each rank of a launch found: job -> finding."""


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Found]]:
    """The folder and the findings of the launch of a size; one launch per size, however many ask."""
    kept: dict[int, tuple[Path, Found]] = {}

    def launch(size: int) -> tuple[Path, Found]:
        if size not in kept:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            kept[size] = folder, []  # a launch that fails is not tried again
            if size == 1:
                found = [do(World(), folder, NAMES[1])]
            else:
                torchrun(size, JOBS, str(folder), *NAMES[size]).ok()
                found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
            kept[size] = folder, found
        assert kept[size][1], f"the launch of {size} ranks has failed before"
        return kept[size]

    return launch


@pytest.fixture
def findings(launched: Callable[[int], tuple[Path, Found]]) -> Callable[[int], Found]:
    return lambda size: launched(size)[1]


# -- the same losses


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_losses_agree(findings: Callable[[int], Found], size: int, case: str, precision: str, tolerance: float) -> None:
    alone = findings(1)[0]["losses"][f"{case} {precision}"]
    for rank in findings(size):
        shared = rank["losses"][f"{case} {precision}"]
        assert len(shared) == len(alone) == 50
        np.testing.assert_allclose(shared, alone, rtol=0, atol=tolerance)


def test_losses_of_unshared_gradients_differ(findings: Callable[[int], Found]) -> None:
    """Each rank for itself: the comparison above would tell, by a factor of a thousand."""
    alone = findings(1)[0]["losses"]["vit float32"]
    assert np.abs(np.subtract(findings(2)[0]["losses_unshared"], alone)).max() > 1e-2


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation_changes_nothing(
    findings: Callable[[int], Found], size: int, precision: str, tolerance: float
) -> None:
    found = findings(size)[0]["losses"]
    np.testing.assert_allclose(found[f"vit accumulated {precision}"], found[f"vit {precision}"], rtol=0, atol=tolerance)


def test_two_agents_give_the_losses_of_one(findings: Callable[[int], Found], tmp_path: Path) -> None:
    """Two nodes with a rank each, against one node with two ranks."""
    for agent in two_agents(JOBS, str(tmp_path), "one_loss"):
        agent.ok()
    for rank in range(2):
        there = json.loads((tmp_path / f"{rank}.json").read_text())
        assert there["one_loss"] == findings(2)[rank]["one_loss"]
    assert len(there["one_loss"]) == 50


# -- the same counts


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_sample_is_counted_once(findings: Callable[[int], Found], size: int, count: int) -> None:
    ranks = [rank["counts"][str(count)] for rank in findings(size)]
    seen = [row for rank in ranks for row in rank["seen"]]
    assert sorted(seen) == list(range(count)), "each sample is looked at by one rank, once"
    shares = [len(rank["seen"]) for rank in ranks]
    assert max(shares) - min(shares) <= 1
    faces = numbered_faces(count)
    predicted_N = faces.images_NHW.reshape(count, -1).sum(1, dtype=np.int64) % CLASSES
    expected_KK = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(expected_KK, (faces.labels_N[faces.part(VAL)], predicted_N), 1)
    for rank in ranks:
        assert rank["confusion"] == expected_KK.tolist()
        assert rank["count"] == count
        assert rank["loss"] == pytest.approx(findings(1)[0]["counts"][str(count)]["loss"], rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_an_epoch_loses_and_doubles_no_sample(findings: Callable[[int], Found], size: int) -> None:
    """100 pictures in global batches of 12: eight steps, and four pictures rest, other ones in each epoch."""
    left = []
    for epoch in range(3):
        ranks = [rank["ledger"][epoch] for rank in findings(size)]
        assert {len(steps) for steps in ranks} == {8}
        assert all(len(rows) == 12 // size for steps in ranks for rows in steps)
        joint = [[row for steps in ranks for row in steps[step]] for step in range(8)]
        assert joint == findings(1)[0]["ledger"][epoch], "a step takes the same pictures at any size"
        rows = [row for step in joint for row in step]
        assert len(set(rows)) == 96
        left.append(set(range(100)) - set(rows))
    assert left[0] != left[1] != left[2]


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_evaluates_the_same_model(findings: Callable[[int], Found], size: int) -> None:
    """Weights and buffers, live and averaged, with batch norm that moves."""
    epochs = list(zip(*(rank["states"] for rank in findings(size)), strict=True))
    assert len(epochs) == 3
    for live_and_deployed in epochs:
        assert all(rank == live_and_deployed[0] for rank in live_and_deployed)
    assert len({str(epoch[0]) for epoch in epochs}) == 3, "each epoch changes them"


def test_a_rank_with_its_own_statistics_would_be_seen(findings: Callable[[int], Found]) -> None:
    """The same hashes without the averaging of running statistics: they differ between all ranks."""
    for ranks in zip(*(rank["states_unaveraged"] for rank in findings(4)), strict=True):
        assert len({live for live, _ in ranks}) == 4
        assert len({deployed for _, deployed in ranks}) == 4


def test_the_first_backward_pass_leaves_no_trace(findings: Callable[[int], Found]) -> None:
    before, after = findings(2)[0]["settled"]
    assert before == after


# -- the same decisions


@pytest.mark.parametrize("size", [1, 3])
def test_rank_0_decides_for_all(findings: Callable[[int], Found], size: int) -> None:
    """Other ranks measure other scores: best epoch, plateau and early stopping follow rank 0's."""
    for rank in findings(size):
        found = rank["decisions"]
        assert found["accuracies"] == [0.5, 0.6, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6], "patience 5 ends it after epoch 8"
        assert found["heard"] == found["accuracies"], "the hook hears every epoch, the last one too"
        assert found["best"] == 0.7
        lr = [1e-3] * 5 + [0.5e-3] * 2 + [0.25e-3]
        assert found["lr"] == pytest.approx(lr), "plateau: after two epochs without gain, then two more"


def test_the_hook_of_one_rank_stops_all(findings: Callable[[int], Found]) -> None:
    assert [rank["stop_on_last_rank"] for rank in findings(2)] == [2, 2]


# -- the same errors


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("nan", "3 steps in a row (train.max_skipped 2): step 4 had a NaN or infinity in the loss on rank 0"),
        ("nan after the last step", "the validation loss is nan in epoch 1"),
        ("config.yaml", "config.yaml: No space left on device"),
        ("report.json", "report.json: No space left on device"),
        ("best.pth", "best.pth: No space left on device"),
        ("step-00000001.pth", "step-00000001.pth: No space left on device"),
        ("metrics.jsonl", "metrics.jsonl: Is a directory"),
        ("tensorboard", "tensorboard: File exists"),
        ("exists", "exists; a run is never overwritten"),
        ("last rank", "the last rank stumbles\n  -> lend it a hand"),
        ("node first", "the last rank stumbles\n  -> lend it a hand"),
    ],
)
def test_trouble_of_one_is_the_error_of_all(findings: Callable[[int], Found], size: int, fault: str, text: str) -> None:
    """A loss that is no number, a disk that is full for rank 0, a UserError of the last rank: nobody waits."""
    said = [rank["faults"][fault] for rank in findings(size)]
    assert text in said[0]
    assert said == said[:1] * size


@pytest.mark.parametrize("size", [2, 4])
def test_only_first_is_done_by_rank_0_only(findings: Callable[[int], Found], size: int) -> None:
    assert {rank["faults"]["only first, never done elsewhere"] for rank in findings(size)} == {""}


def test_a_global_batch_that_the_ranks_do_not_divide(findings: Callable[[int], Found]) -> None:
    for rank in findings(3):
        assert "train.global_batch 7 is not divisible by 3 ranks" in rank["check_batch"]
        assert "--train.global_batch 6 or 9" in rank["check_batch"]


# -- World


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_a_world_says(findings: Callable[[int], Found], size: int) -> None:
    for rank, found in enumerate(rank["parts"] for rank in findings(size)):
        mean = (size - 1) / 2
        assert found == {
            "rank": rank,
            "size": size,
            "sum": [size * (size + 1) / 2] * 2,
            "means": [[[mean, mean], [mean, mean]], [10 * mean]],
            "gather": [f"rank {i}" for i in range(size)],
            "from_first": 100,
            "share": [True, [24, 1, 8, 2], 7, True, [0], 3],
            "any": [size > 1, False, True],
            "together": rank,
            "node_first": rank,
        }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_process_group_of_somebody_else_is_used_and_left_open(findings: Callable[[int], Found], size: int) -> None:
    for rank, found in enumerate(rank["attach"] for rank in findings(size)):
        assert found == [rank, size, rank, 2, size, 1]


# -- a restart by the launcher


def test_a_restarted_run_ends_like_an_unbroken_one(
    launched: Callable[[int], tuple[Path, Found]], tmp_path: Path
) -> None:
    """Rank 1 is killed after epoch 1; torchrun starts both again, which find their folder and go on."""
    done = torchrun(
        2, str(WORKERS / "restart_worker.py"), str(tmp_path), flags=["--standalone", "--max-restarts=1"]
    ).ok()
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert f"folder {folder}" in done.out
    (whole,) = (launched(2)[0] / "unbroken").iterdir()
    assert [record["epoch"] for record in plain_lines(folder)] == [1, 2, 3]
    assert plain_lines(folder) == plain_lines(whole)
    for name in ("best.pth", "last.pth"):
        assert same(everything(folder / name), everything(whole / name)), name
