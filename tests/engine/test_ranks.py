"""One, two, three and four ranks: the same losses, counts, decisions and errors.

Real processes. A launch takes seconds, so each size is launched once for all jobs of `tests/workers/rank_jobs.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fer_dist.data.faces import VAL
from tests.helpers import fault_runs
from tests.helpers.processes import WORKERS, python, torchrun, two_agents
from tests.helpers.shared import shared_folder
from tests.helpers.small_runs import CLASSES, numbered_faces, plain_lines, starts
from tests.workers.rank_jobs import COUNTS, LOSS_RUNS

JOBS = str(WORKERS / "rank_jobs.py")
NAMES = {
    1: ["counts", "losses"],
    2: ["counts", "losses", "states", "stop_on_last_rank", "faults", "collectives"],
    3: ["counts", "decisions", "collectives"],
    4: ["counts", "losses", "states", "faults"],
}
Found = list[dict[str, Any]]
"""Results of each rank of a launch: job -> result."""


def launched(size: int) -> Found:
    """Return the results of the launch of a size; each size is launched once per run of pytest."""

    def launch(folder: Path) -> None:
        command = [JOBS, str(folder), *NAMES[size]]
        (python(*command) if size == 1 else torchrun(size, *command)).ok()

    return read(shared_folder(f"ranks-{size}", launch), size)


def read(folder: Path, size: int) -> Found:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Found:
    """Return the results of each rank; the parameter is the number of ranks."""
    return launched(request.param)


@pytest.fixture
def alone() -> dict[str, Any]:
    """Return the results of one process."""
    return launched(1)[0]


def of_sizes(*sizes: int) -> pytest.MarkDecorator:
    """Run a test with the results of each number of ranks."""
    return pytest.mark.parametrize("ranks", sizes, indirect=True)


@of_sizes(2, 4)
def test_losses_agree(ranks: Found, alone: dict[str, Any]) -> None:
    for rank in ranks:
        for name, (_, precision, steps, _) in LOSS_RUNS.items():
            found, expected = rank["losses"][name], alone["losses"][name]
            assert len(found) == len(expected) == steps
            tolerance = {"float32": 1e-5, "float64": 1e-12}[precision]
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=name)


@of_sizes(2)
def test_two_agents_give_the_losses_of_one(ranks: Found, tmp_path: Path) -> None:
    """Two nodes with one rank each have the losses of one node with two ranks."""
    for agent in two_agents(JOBS, str(tmp_path), "stop_on_last_rank"):
        agent.ok()
    assert [rank["stop_on_last_rank"] for rank in read(tmp_path, 2)] == [rank["stop_on_last_rank"] for rank in ranks]


@of_sizes(2, 3, 4)
def test_each_sample_is_counted_once(ranks: Found, alone: dict[str, Any]) -> None:
    for count in COUNTS:
        faces = numbered_faces(count)
        predicted_N = faces.images_NHW.reshape(count, -1).sum(1, dtype=np.int64) % CLASSES
        expected_KK = np.zeros((CLASSES, CLASSES), np.int64)
        np.add.at(expected_KK, (faces.labels_N[faces.part(VAL)], predicted_N), 1)
        expected_loss = alone["counts"][str(count)][2]
        rows: list[int] = []
        for rank in ranks:
            confusion, counted, loss, seen = rank["counts"][str(count)]
            assert (confusion, counted) == (expected_KK.tolist(), count)
            assert loss == pytest.approx(expected_loss, rel=1e-12)
            rows += seen
        assert sorted(rows) == list(range(count)), "by one rank, once"


@of_sizes(2, 4)
def test_every_rank_evaluates_the_same_model(ranks: Found) -> None:
    """Weights and buffers, live and averaged, with batch norm that moves."""
    found = [rank["states"] for rank in ranks]
    assert found == found[:1] * len(ranks)
    assert len(set(found[0]["live"])) == len(set(found[0]["deployed"])) == 3, "each epoch changes them"
    before, after = found[0]["settled"]
    assert before == after, "the discarded backward pass changed the model"


@of_sizes(3)
def test_rank_0_decides_for_all(ranks: Found) -> None:
    """Other ranks measure other scores: best epoch, plateau and early stopping follow rank 0's."""
    for found in (rank["decisions"] for rank in ranks):
        assert found["heard"] == [0.5, 0.6, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6], "patience 5 ends it after epoch 8"
        assert found["best"] == 0.7
        # Plateau: after two epochs without gain, then two more.
        assert found["lr"] == pytest.approx([1e-3] * 5 + [0.5e-3] * 2 + [0.25e-3])


@of_sizes(2)
def test_the_hook_of_one_rank_stops_all_in_an_existing_process_group(ranks: Found) -> None:
    """`fit` uses the group and leaves it open."""
    for number, found in enumerate(rank["stop_on_last_rank"] for rank in ranks):
        assert len(found.pop("losses")) == 20, "two epochs"
        assert found == {"rank": number, "size": 2, "open": True}


@of_sizes(2, 4)
def test_an_error_of_one_rank_is_the_error_of_all(ranks: Found) -> None:
    """A loss that is NaN, a disk that is full for rank 0, a UserError of the last rank: no rank waits."""
    size = len(ranks)
    texts = {
        "global batch": f"7 is not divisible by {size} ranks\n  -> --train.global_batch {7 // size * size} or 8,",
        "nan": "3 steps in a row (train.max_skipped 2): step 4 had a NaN or infinity in the loss on rank 0",
        "nan after the last step": "the validation loss is nan in epoch 1",
        "config.yaml": "config.yaml: No space left on device",
        "report.json": "report.json: No space left on device",
        "best.pth": "best.pth: No space left on device",
        "step-00000001.pth": "step-00000001.pth: No space left on device",
        "metrics.jsonl": "metrics.jsonl: Is a directory",
        "exists": "exists; a run is never overwritten",
        "tensorboard": "tensorboard: File exists",
        "last rank": "the last rank failed\n  -> try again",
        "node first": "the last rank failed\n  -> try again",
    }
    for fault, text in texts.items():
        messages = [rank["faults"][fault] for rank in ranks]
        assert text in messages[0]
        assert messages == messages[:1] * size
    assert {rank["faults"]["only first"] for rank in ranks} == {""}, "the last rank did not do it"


@of_sizes(2, 3)
def test_collectives_of_a_world(ranks: Found) -> None:
    size = len(ranks)
    mean = (size - 1) / 2
    for rank, found in enumerate(rank["collectives"] for rank in ranks):
        assert found == {
            "rank": rank,
            "size": size,
            "sum": [size * (size + 1) / 2] * 2,
            "means": [[[mean, mean], [mean, mean]], [10 * mean]],
            "gather": [f"rank {i}" for i in range(size)],
            "from_first": 100,
            "stride": [24, 1, 8, 2],  # of the shared picture, which is channels-last
            "agree": [True, False, True],
            "together": rank,
            "node_first": rank,
        }


def test_a_restarted_run_without_a_name_finds_its_folder(tmp_path: Path) -> None:
    """Rank 1 is killed; torchrun starts both again. tests/faults/test_kills.py compares with an unbroken run."""
    fault = {"rank": 1, "signal": "SIGKILL", "step": 5, "after_s": 0}
    settings = {"run__name": None, "run__resume": "restart", "train__epochs": 1}
    fault_runs.launch(tmp_path, 2, fault, arch="vit", settings=settings).done.ok()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert [start["step"] for start in starts(folder)] == [0, 4]
    assert [line["epoch"] for line in plain_lines(folder)] == [1]
