"""A rank that makes no progress is noticed, with the stacks of the living; ranks that do not fit do not start."""

import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pytest

from fer_dist.config import RunConfig
from fer_dist.data.faces import TRAIN, VAL
from fer_dist.engine.same import data_digest
from fer_dist.engine.watch import LOOK_S, Watch
from fer_dist.errors import EXIT_RANK_LOST
from fer_dist.world import World
from tests.helpers.fault_runs import launch, require_equal, unbroken
from tests.helpers.picture_files import encoded, write_folder
from tests.helpers.processes import Done, python
from tests.helpers.training import noise_faces


@pytest.mark.slow
def test_a_rank_that_stands_still_is_noticed_and_the_run_ends_like_the_unbroken_one(tmp_path: Path) -> None:
    """SIGSTOP of one of four; torchrun itself then waits 30 s before it kills what does not heed its SIGTERM."""
    fault = {"rank": 2, "signal": "SIGSTOP", "step": 13, "after_s": 0}
    broken = launch(tmp_path / "broken", 4, fault, settings={"run__timeout_seconds": 5})
    broken.done.ok()
    (strike,) = broken.lines("fault.jsonl")
    stacks = broken.folder / "stacks"
    assert sorted(path.name for path in stacks.iterdir()) == ["rank-0.txt", "rank-1.txt", "rank-3.txt"]
    for path in stacks.iterdir():
        text = path.read_text()
        assert "no progress for 5 s (run.timeout_seconds) in epoch 2, step 6/8" in text
        assert re.search(r'engine/step.py", line \d+ in (train_step|backward)', text), "where it waited"
        assert 0 < path.stat().st_mtime - strike["time"] < 5 + 3, "noticed in time"
    assert len(re.findall(r"error: rank \d: no progress for 5 s", broken.done.err)) == 3
    assert [start["step"] for start in broken.starts] == [0, 12]
    require_equal(broken, unbroken(4))


# -- the watch itself


def test_one_process_is_left_to_its_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a launcher that would start it again, the stacks are written and the process runs on."""
    with Watch(RunConfig(timeout_seconds=0.3), World(), tmp_path) as watch:
        watch.place = "in step 3"
        time.sleep(1.0)
        asked = watch.asked
    assert asked == ""
    assert "no progress for 0.3 s (run.timeout_seconds) in step 3; stacks in" in capsys.readouterr().err
    assert "test_one_process_is_left_to_its_owner" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def watched(folder: Path, inside: str, timeout_s: float = 0.2, before: str = "") -> Done:
    """Run code inside of a watch in a process that has a launcher."""
    return python(
        "-c",
        f"""
import os, resource, signal, subprocess, time
from pathlib import Path
from fer_dist.config import RunConfig
from fer_dist.engine import watch
from fer_dist.world import World
os.environ["RANK"] = "0"
{before}
with watch.Watch(RunConfig(timeout_seconds={timeout_s}), World(), Path({str(folder)!r})) as watched:
    {inside}
""",
    )


def test_a_process_that_was_suspended_resumes(tmp_path: Path) -> None:
    """A queue that suspends jobs, a container that is paused: the time away is not the run's."""
    code = """
    with subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.8)
    watched.beat()"""
    done = watched(tmp_path, code, timeout_s=1.5, before="watch.SUSPENDED_S = 1.0")
    assert (done.code, done.err) == (0, "")


def test_it_leaves_with_many_files_open_though_its_stacks_cannot_be_written(tmp_path: Path) -> None:
    """select() knows the first 1024 only."""
    (tmp_path / "stacks").write_text("a file in the place of the folder")
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
files = [open("/dev/null") for _ in range(1100)]"""
    done = watched(tmp_path, "time.sleep(60)", before=code)
    assert done.code == EXIT_RANK_LOST
    assert "error: rank 0: no progress for 0.2 s" in done.err
    assert "its stacks cannot be written" in done.err


def test_it_leaves_after_the_others_had_time_to_look(tmp_path: Path) -> None:
    """They would die of a broken connection instead, and what they write would not say where they waited."""
    code = """
def say_when(watch, why):
    print(time.time(), flush=True)
    os._exit(1)
watch.Watch._leave = say_when"""
    done = watched(tmp_path, "time.sleep(60)", before=code)
    assert float(done.out) - (tmp_path / "stacks" / "rank-0.txt").stat().st_mtime > LOOK_S + 0.5


def test_the_longest_step_is_one_of_a_step(tmp_path: Path) -> None:
    """Not the end of an epoch with its pictures: a rank that is told to stop would wait for three of those."""
    with Watch(RunConfig(), World(), tmp_path) as watch:
        for _ in watch.steps(range(2)):
            time.sleep(0.02)
        time.sleep(0.5)
        for _ in watch.steps(range(2)):
            time.sleep(0.02)
        assert 0.02 <= watch._longest < 0.4


def test_progress_is_what_beats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(RunConfig(timeout_seconds=1.0), World(), tmp_path) as watch:
        for _ in watch.over(range(8)):
            time.sleep(0.3)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "stacks").exists()


# -- ranks that do not fit together


def test_ranks_of_other_settings_do_not_start(tmp_path: Path) -> None:
    """A batch that only the other rank could not divide is no other error."""
    other = {"train__epochs": 9, "model__options__channels": 16, "train__global_batch": 7}
    ended = launch(tmp_path, 2, {"rank": 1, "settings": other}, restarts=0)
    message = "model.options.channels 16, rank 0 32; train.epochs 9, rank 0 3; train.global_batch 7, rank 0 16"
    assert ended.done.code == 1, "torchrun's own"
    assert ended.done.err.startswith(f"error: rank 1 was given {message}\n  -> start all nodes with the same line\n")
    assert ended.done.err.count("error: ") == 1
    assert "exitcode  : 2 " in ended.done.err
    assert not ended.folder.exists()


def write_faces(folder: Path, seed: int) -> str:
    """Write a data set of noise: 128 pictures to train with, and 14 to validate."""
    noise_NHW = np.random.default_rng(seed).integers(0, 256, (142, 48, 48), dtype=np.uint8)
    names = [f"{'train' if i < 128 else 'val'}/{'happy' if i % 2 else 'sad'}/{i}.png" for i in range(142)]
    return str(write_folder(folder, {name: encoded(noise_HW) for name, noise_HW in zip(names, noise_NHW, strict=True)}))


def test_ranks_of_other_data_do_not_start(tmp_path: Path) -> None:
    """The same path, as on two nodes, and not the same pictures."""
    first, second = (write_faces(tmp_path / f"data{seed}", seed) for seed in range(2))
    fault = {"rank": 1, "settings": {"data__path": second}}
    ended = launch(tmp_path / "other", 2, fault, settings={"data__path": first}, restarts=0)
    assert re.match(r"error: rank 1 has other data than rank 0: digest \w{16} instead of \w{16}\n  -> ", ended.done.err)
    assert not ended.folder.exists()


def test_ranks_of_the_same_data_in_other_places_do_start(tmp_path: Path) -> None:
    """Each node has its own copy and cache of it; rank 1 other weights, and takes those of rank 0."""
    first, second = (
        {"data__path": write_faces(tmp_path / f"data{rank}", 0), "data__cache_dir": str(tmp_path / f"cache{rank}")}
        for rank in range(2)
    )
    fault = {"rank": 1, "settings": second, "weights": True}
    ended = launch(tmp_path / "same", 2, fault, settings={"train__epochs": 1, **first}, restarts=0)
    ended.done.ok()
    ranks = [ended.lines(f"digests-{number}.jsonl") for number in range(2)]
    assert len(ranks[0]) == 3
    assert ranks[0] == ranks[1], "weights and EMA at each save"


def test_what_a_digest_tells_apart() -> None:
    faces = noise_faces()
    train, val = faces.part(TRAIN), faces.part(VAL)
    digest = data_digest(faces, train, val, drawn=False)
    assert digest == data_digest(noise_faces(), train, val, drawn=False)
    images_NHW = faces.images_NHW.copy()
    images_NHW[5, 3, 3] ^= 1
    others = [
        data_digest(faces, val, train, drawn=False),
        data_digest(faces, train[::-1], val, drawn=False),
        data_digest(dataclasses.replace(faces, labels_N=faces.labels_N[::-1]), train, val, drawn=False),
        data_digest(dataclasses.replace(faces, images_NHW=images_NHW), train, val, drawn=False),
        data_digest(faces, train, val, drawn=True),
        data_digest(dataclasses.replace(faces, key="other"), train, val, drawn=True),
    ]
    assert len({digest, *others}) == 1 + len(others)
