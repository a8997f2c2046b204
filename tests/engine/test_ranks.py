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
from tests.workers.rank_jobs import COUNTS, LOSS_RUNS, do

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
"""Findings of each rank of a launch: job -> finding."""


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Found]]:
    """Return the folder and the findings of the launch of a size; one launch per size."""
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
def ranks(request: pytest.FixtureRequest, launched: Callable[[int], tuple[Path, Found]]) -> Found:
    """Return the findings of each rank; the parameter is the number of ranks."""
    return launched(request.param)[1]


@pytest.fixture
def alone(launched: Callable[[int], tuple[Path, Found]]) -> dict[str, Any]:
    """Return the findings of one process."""
    return launched(1)[1][0]


def of_sizes(*sizes: int) -> pytest.MarkDecorator:
    """Run a test with the findings of each number of ranks."""
    return pytest.mark.parametrize("ranks", sizes, indirect=True)


# -- the same losses


@of_sizes(2, 4)
def test_losses_agree(ranks: Found, alone: dict[str, Any]) -> None:
    for rank in ranks:
        for case, precision, steps in LOSS_RUNS:
            name = f"{case} {precision}"
            assert len(rank["losses"][name]) == len(alone["losses"][name]) == steps
            tolerance = {"float32": 1e-5, "float64": 1e-12}[precision]
            np.testing.assert_allclose(
                rank["losses"][name], alone["losses"][name], rtol=0, atol=tolerance, err_msg=name
            )


@of_sizes(2)
def test_losses_of_unshared_gradients_differ(ranks: Found, alone: dict[str, Any]) -> None:
    """Without averaged gradients the losses differ by a factor of a thousand: the comparison above would fail."""
    assert np.abs(np.subtract(ranks[0]["losses_unshared"], alone["losses"]["vit float32"])).max() > 1e-2


@of_sizes(1, 2, 4)
def test_accumulation_changes_nothing(ranks: Found) -> None:
    losses = ranks[0]["losses"]
    np.testing.assert_allclose(losses["vit accumulated float64"], losses["vit float64"], rtol=0, atol=1e-12)


@of_sizes(2)
def test_two_agents_give_the_losses_of_one(ranks: Found, tmp_path: Path) -> None:
    """Two nodes with one rank each have the losses of one node with two ranks."""
    for agent in two_agents(JOBS, str(tmp_path), "one_loss"):
        agent.ok()
    for number, rank in enumerate(ranks):
        there = json.loads((tmp_path / f"{number}.json").read_text())
        assert there["one_loss"] == rank["one_loss"]
    assert len(there["one_loss"]) == 50


# -- the same counts


@of_sizes(1, 2, 3, 4)
def test_each_sample_is_counted_once(ranks: Found, alone: dict[str, Any]) -> None:
    for count in COUNTS:
        counts = [rank["counts"][str(count)] for rank in ranks]
        assert sorted(row for rank in counts for row in rank["seen"]) == list(range(count)), "by one rank, once"
        shares = [len(rank["seen"]) for rank in counts]
        assert max(shares) - min(shares) <= 1
        faces = numbered_faces(count)
        predicted_N = faces.images_NHW.reshape(count, -1).sum(1, dtype=np.int64) % CLASSES
        expected_KK = np.zeros((CLASSES, CLASSES), np.int64)
        np.add.at(expected_KK, (faces.labels_N[faces.part(VAL)], predicted_N), 1)
        for rank in counts:
            assert rank["confusion"] == expected_KK.tolist()
            assert rank["count"] == count
            assert rank["loss"] == pytest.approx(alone["counts"][str(count)]["loss"], rel=1e-12)


@of_sizes(1, 2, 3, 4)
def test_an_epoch_loses_and_doubles_no_sample(ranks: Found, alone: dict[str, Any]) -> None:
    """100 pictures in global batches of 12: eight steps, and four pictures are left out, others in each epoch."""
    left = []
    for epoch in range(3):
        epochs = [rank["ledger"][epoch] for rank in ranks]
        assert {len(steps) for steps in epochs} == {8}
        assert all(len(rows) == 12 // len(ranks) for steps in epochs for rows in steps)
        joint = [[row for steps in epochs for row in steps[step]] for step in range(8)]
        assert joint == alone["ledger"][epoch], "a step takes the same pictures at any size"
        rows = [row for step in joint for row in step]
        assert len(set(rows)) == 96
        left.append(set(range(100)) - set(rows))
    assert left[0] != left[1] != left[2]


@of_sizes(2, 4)
def test_every_rank_evaluates_the_same_model(ranks: Found) -> None:
    """Weights and buffers, live and averaged, with batch norm that moves."""
    epochs = list(zip(*(rank["states"] for rank in ranks), strict=True))
    assert len(epochs) == 3
    for live_and_deployed in epochs:
        assert all(rank == live_and_deployed[0] for rank in live_and_deployed)
    assert len({str(epoch[0]) for epoch in epochs}) == 3, "each epoch changes them"


@of_sizes(4)
def test_a_rank_with_its_own_statistics_would_be_seen(ranks: Found) -> None:
    """Without the averaging of running statistics the same hashes differ between all ranks."""
    for hashes in zip(*(rank["states_unaveraged"] for rank in ranks), strict=True):
        assert len({live for live, _ in hashes}) == 4
        assert len({deployed for _, deployed in hashes}) == 4


@of_sizes(2)
def test_the_first_backward_pass_leaves_no_trace(ranks: Found) -> None:
    before, after = ranks[0]["settled"]
    assert before == after


# -- the same decisions


@of_sizes(1, 3)
def test_rank_0_decides_for_all(ranks: Found) -> None:
    """Other ranks measure other scores: best epoch, plateau and early stopping follow rank 0's."""
    for rank in ranks:
        found = rank["decisions"]
        assert found["accuracies"] == [0.5, 0.6, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6], "patience 5 ends it after epoch 8"
        assert found["heard"] == found["accuracies"], "the hook gets every epoch, the last one too"
        assert found["best"] == 0.7
        lr = [1e-3] * 5 + [0.5e-3] * 2 + [0.25e-3]
        assert found["lr"] == pytest.approx(lr), "plateau: after two epochs without gain, then two more"


@of_sizes(2)
def test_the_hook_of_one_rank_stops_all(ranks: Found) -> None:
    assert [rank["stop_on_last_rank"] for rank in ranks] == [2, 2]


# -- the same errors


ERRORS = {
    "nan": "3 steps in a row (train.max_skipped 2): step 4 had a NaN or infinity in the loss on rank 0",
    "nan after the last step": "the validation loss is nan in epoch 1",
    "config.yaml": "config.yaml: No space left on device",
    "report.json": "report.json: No space left on device",
    "best.pth": "best.pth: No space left on device",
    "step-00000001.pth": "step-00000001.pth: No space left on device",
    "metrics.jsonl": "metrics.jsonl: Is a directory",
    "tensorboard": "tensorboard: File exists",
    "exists": "exists; a run is never overwritten",
    "last rank": "the last rank stumbles\n  -> lend it a hand",
    "node first": "the last rank stumbles\n  -> lend it a hand",
}


@of_sizes(1, 2, 4)
def test_an_error_of_one_rank_is_the_error_of_all(ranks: Found) -> None:
    """A loss that is NaN, a disk that is full for rank 0, a UserError of the last rank: no rank waits."""
    for fault, text in ERRORS.items():
        messages = [rank["faults"][fault] for rank in ranks]
        assert text in messages[0]
        assert messages == messages[:1] * len(ranks)
    if len(ranks) > 1:
        assert {rank["faults"]["only first, never done elsewhere"] for rank in ranks} == {""}


@of_sizes(3)
def test_a_global_batch_that_the_ranks_do_not_divide(ranks: Found) -> None:
    for rank in ranks:
        assert "train.global_batch 7 is not divisible by 3 ranks" in rank["check_batch"]
        assert "--train.global_batch 6 or 9" in rank["check_batch"]


# -- World


@of_sizes(1, 2, 3, 4)
def test_collectives_of_a_world(ranks: Found) -> None:
    size = len(ranks)
    for rank, found in enumerate(rank["parts"] for rank in ranks):
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


@of_sizes(1, 2, 4)
def test_an_existing_process_group_is_used_and_left_open(ranks: Found) -> None:
    for rank, found in enumerate(rank["attach"] for rank in ranks):
        assert found == [rank, len(ranks), rank, 2, len(ranks), 1]


# -- a restart by the launcher


@of_sizes(2)
def test_a_restarted_run_ends_like_an_unbroken_one(
    ranks: Found, launched: Callable[[int], tuple[Path, Found]], tmp_path: Path
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
