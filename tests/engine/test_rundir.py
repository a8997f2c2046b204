"""The run folder: what is in it, that nobody overwrites it, and that a run goes on in it as if never broken."""

import errno
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import fer_dist
from fer_dist.config import Config, load_config
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import VAL
from fer_dist.data.feed import evaluation_batches
from fer_dist.engine import run as run_module
from fer_dist.engine import rundir, trainer
from fer_dist.engine.checkpoint import load
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.rundir import open_run
from fer_dist.engine.runlog import EpochRecord
from fer_dist.engine.score import score
from fer_dist.engine.trainer import Result, fit
from fer_dist.errors import UserError
from fer_dist.spec import EXPRESSIONS, LabelSet
from fer_dist.world import World
from tests.helpers.small_runs import AUGMENTED, everything, fake_metrics, no_gain, no_pictures, plain_lines, same, tiny

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of three epochs, the second of which is the best."""

    config: Config
    result: Result

    @property
    def folder(self) -> Path:
        return self.result.folder

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny(
        "patt_lite",
        tmp_path_factory.mktemp("runs"),
        run__name="whole",
        run__tensorboard=True,
        data__embedded_train=96,
        model__dropout=0.1,
        train__epochs=3,
        train__ema=0.5,
        train__monitor="loss",
    )
    return Run(config=config, result=fit(config))


# -- what is in it


def test_what_is_in_it(run: Run) -> None:
    found = {path.name for path in run.folder.iterdir()}
    assert found == {
        "config.yaml",
        "provenance.json",
        "starts.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "curves.png",
        "confusion.png",
        "report.json",
        "best.pth",
        "last.pth",
    }


def test_config_yaml_gives_the_same_settings(run: Run) -> None:
    assert load_config(str(run.folder / "config.yaml")) == run.config


def test_a_line_for_each_epoch(run: Run) -> None:
    lines = run.lines()
    assert lines == run.result.records
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [6, 12, 18]
    for line in lines:
        assert line["lr"] == 1e-3
        first = line["step"] - 6
        assert line["train_loss"] == pytest.approx(sum(run.result.losses[first : first + 6]) / 6)
        assert set(line["val"]) == {"loss", "accuracy", "macro_f1", "recall", "count"}
        assert tuple(line["val"]["recall"]) == EXPRESSIONS
        assert line["val"]["count"] == 60
        assert all(0 <= line["val"][name] <= 1 for name in ("accuracy", "macro_f1"))
        assert all(0 <= value <= 1 for value in line["val"]["recall"].values())
        assert math.isfinite(line["val"]["loss"])
        assert line["images_per_second"] > 0
        assert line["seconds"] > 0
        assert 50 < line["peak_memory_mib"] < 100_000


def test_report(run: Run) -> None:
    report = run.json("report.json")
    best = min(run.lines(), key=lambda line: line["val"]["loss"])
    assert report["epoch"] == best["epoch"]
    assert report["split"] == "val"
    assert report["accuracy"] == best["val"]["accuracy"] == run.result.best.accuracy
    assert report["loss"] == best["val"]["loss"]
    assert report["confusion"] == run.result.best.confusion_KK.tolist()
    assert sum(row["support"] for row in report["classes"].values()) == report["count"] == 60
    assert {name: row["recall"] for name, row in report["classes"].items()} == best["val"]["recall"]


@pytest.mark.parametrize("name", ["curves.png", "confusion.png"])
def test_pictures_can_be_opened_and_show_something(run: Run, name: str) -> None:
    with Image.open(run.folder / name) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colours is not None
        assert len(colours) > 50


def test_provenance(run: Run) -> None:
    origin = run.json("provenance.json")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert origin["commit"].startswith(head.stdout[:12])
    assert origin["fer_dist"] == fer_dist.__version__
    assert origin["torch"] == str(torch.__version__)
    assert re.fullmatch(r"3\.\d+\.\d+", origin["python"])
    assert origin["platform"]
    assert origin["device"].startswith("cpu")
    assert origin["world_size"] == 1
    assert origin["data_key"] == open_faces(run.config.data, LabelSet()).key != ""
    assert origin["started"].startswith("20")
    assert load(run.folder / "best.pth").provenance == origin == load(run.folder / "last.pth").provenance


def test_tensorboard_events_can_be_read_back(run: Run) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    steps = events.Scalars("train/step_loss")
    assert [event.value for event in steps] == pytest.approx(run.result.losses, rel=1e-6)
    assert [event.step for event in steps] == list(range(1, 19))
    for name in ("loss", "accuracy", "macro_f1"):
        read = events.Scalars(f"val/{name}")
        assert [event.value for event in read] == pytest.approx([line["val"][name] for line in run.lines()], rel=1e-6)
        assert [event.step for event in read] == [6, 12, 18]
    assert {f"recall/{name}" for name in EXPRESSIONS} <= set(events.Tags()["scalars"])


def test_checkpoints(run: Run) -> None:
    best, last = load(run.folder / "best.pth"), load(run.folder / "last.pth")
    lines = run.lines()
    assert best.record == min(lines, key=lambda line: line["val"]["loss"])
    assert last.record == lines[-1]
    assert best.config == last.config == run.config.to_dict()
    assert best.spec == last.spec
    assert best.spec.labels.names == EXPRESSIONS
    assert best.resume == {}
    assert set(last.resume) > {"model", "optimizer", "schedule", "epoch", "step"}
    assert not same(last.weights, last.resume["model"]), "weights: the EMA; resume: the live model"


def test_the_best_model_has_the_accuracy_that_was_recorded(run: Run) -> None:
    """From the file alone: exactly the confusion, the accuracy and the loss of its epoch.

    In the memory format of training: on some processors the other one has other kernels, with other last bits.
    """
    best = load(run.folder / "best.pth")
    model = best.model().to(memory_format=torch.channels_last)
    faces = open_faces(run.config.data, LabelSet())
    batches = evaluation_batches(faces, faces.part(VAL), batch=256, rank=0, size=1, device=torch.device("cpu"))
    metrics = score(model, batches, World(), classes=7)
    assert metrics.accuracy == best.record["val"]["accuracy"]
    assert metrics.loss == best.record["val"]["loss"]
    assert metrics.confusion_KK.tolist() == run.json("report.json")["confusion"]


def test_without_tensorboard(tmp_path: Path) -> None:
    config = tiny("vit", tmp_path, run__name="plain", train__steps_per_epoch=1, train__epochs=1)
    with no_pictures():
        assert not (fit(config).folder / "tensorboard").exists()


def test_best_is_kept_when_later_epochs_are_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.3, 0.6, 0.6, 0.4])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: fake_metrics(next(scores)))
    config = tiny("vit", tmp_path, run__name="best", train__steps_per_epoch=1, train__epochs=4)
    with no_pictures():
        result = fit(config)
    assert load(result.folder / "best.pth").record["epoch"] == 2, "an equal score is no gain"
    assert load(result.folder / "last.pth").record["epoch"] == 4
    assert json.loads((result.folder / "report.json").read_text())["accuracy"] == 0.6
    assert result.best.accuracy == 0.6


# -- its name


def settings(folder: Path, **values: Any) -> Config:
    return tiny("vit", folder, **values)


def test_under_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_run(Config().override({"run.name": "mine"}), World()) == (Path("runs/mine"), False)
    assert (tmp_path / "runs" / "mine").is_dir()


def test_named_by_architecture_and_time(tmp_path: Path) -> None:
    config = settings(tmp_path, model__arch="timm:vit_tiny_patch16_224")
    folder, resumes = open_run(config, World())
    assert re.fullmatch(r"timm-vit_tiny_patch16_224-\d{8}-\d{6}", folder.name)
    assert folder.parent == tmp_path
    assert not resumes


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir.time, "strftime", lambda form: "-20260102-030405")  # type: ignore[attr-defined]
    names = [open_run(settings(tmp_path), World())[0].name for _ in range(3)]
    assert names == ["vit-20260102-030405", "vit-20260102-030405-1", "vit-20260102-030405-2"]


# -- never overwritten


def test_an_existing_folder_is_refused(run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with pytest.raises(UserError, match="exists; a run is never overwritten") as caught:
        fit(run.config)
    assert "--run.resume auto" in caught.value.fix
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_an_empty_folder_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="never overwritten"):
        open_run(settings(tmp_path, run__name="mine"), World())


def test_a_file_where_runs_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for name in ("mine", None):
        with pytest.raises(UserError, match=r"cannot make the run folder .*Not a directory"):
            open_run(settings(tmp_path / "runs", run__name=name), World())


def test_resume_auto_begins_where_there_is_nothing(tmp_path: Path) -> None:
    assert open_run(settings(tmp_path, run__name="mine", run__resume="auto"), World())[1] is False


# -- the launcher starts it again


FIRST, AGAIN = World(launch="one"), World(launch="one", restarted=True)


@pytest.mark.parametrize("name", [None, "mine", "deep/mine"])
def test_a_restart_finds_its_folder(tmp_path: Path, name: str | None) -> None:
    config = settings(tmp_path, run__name=name)
    other, _ = open_run(settings(tmp_path), World())
    first, resumes = open_run(config, FIRST)
    assert not resumes
    assert first != other
    open_run(settings(tmp_path, run__name="zz-later"), World(launch="two"))
    assert open_run(config, AGAIN) == (first, True)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_restart_does_not_enter_the_folder_that_its_first_start_was_refused(run: Run, restarted: bool) -> None:
    for world in (World(launch="seven", restarted=restarted), World(launch="", restarted=restarted)):
        with pytest.raises(UserError, match="never overwritten"):
            open_run(run.config, world)


def test_a_second_launch_makes_a_second_folder(tmp_path: Path) -> None:
    first, _ = open_run(settings(tmp_path), FIRST)
    for world in (World(launch="two"), FIRST):  # the same launcher, not started again: another run
        second, resumes = open_run(settings(tmp_path), world)
        assert second != first
        assert not resumes


def test_of_several_runs_of_a_launch_the_newest_is_gone_on_with(tmp_path: Path) -> None:
    """Newest by the clock, not by name, which begins with the architecture."""
    open_run(tiny("vit", tmp_path), FIRST)
    time.sleep(0.01)
    newest, _ = open_run(tiny("patt_lite", tmp_path), FIRST)
    assert open_run(settings(tmp_path), AGAIN) == (newest, True)


def test_a_requeued_slurm_job_finds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun is new then, and so is its launch; the job's number is the same."""
    monkeypatch.setenv("SLURM_JOB_ID", "33")
    first, _ = open_run(settings(tmp_path), FIRST)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for restarted in (False, True):
        assert open_run(settings(tmp_path), World(launch="new", restarted=restarted)) == (first, True)
    monkeypatch.setenv("SLURM_JOB_ID", "34")
    assert open_run(settings(tmp_path), World(launch="new"))[1] is False


def test_of_two_trainings_in_a_requeued_slurm_job_each_finds_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their settings, but for where things lie and how the run reports."""
    monkeypatch.setenv("SLURM_JOB_ID", "33")
    made = {seed: open_run(settings(tmp_path, seed=seed), World(launch=f"first {seed}"))[0] for seed in (1, 2)}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for seed, folder in made.items():
        again = settings(tmp_path, seed=seed, run__timeout_seconds=7.0, data__cache_dir="elsewhere")
        assert open_run(again, World(launch=f"second {seed}")) == (folder, True)
    assert open_run(settings(tmp_path, seed=3), World(launch="third"))[1] is False


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_start_that_is_killed_while_it_makes_its_folder_leaves_none(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would find a folder that is nobody's, and refuse it."""

    def gone(path: Path, content: Any) -> None:
        raise Gone

    config = settings(tmp_path, run__name=name)
    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_json", gone)
        with pytest.raises(Gone):
            open_run(config, FIRST)
    assert list(tmp_path.iterdir()) == []
    assert open_run(config, AGAIN)[1] is False


def test_a_killed_start_leaves_only_what_is_not_in_the_way(tmp_path: Path) -> None:
    """SIGKILL, so that nothing is tidied up."""
    code = f"""
import os, signal
from pathlib import Path
from fer_dist.config import Config
from fer_dist.engine import rundir
from fer_dist.world import World
rundir.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
rundir.open_run(Config().override({{"run.name": "mine", "run.dir": {str(tmp_path)!r}}}), World(launch="one"))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not (tmp_path / "mine").exists()
    assert open_run(settings(tmp_path, run__name="mine"), AGAIN) == (tmp_path / "mine", False)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"launch": 3}', '{"slurm": null}'])
def test_a_damaged_launch_json_is_of_nobody(tmp_path: Path, content: str) -> None:
    first, _ = open_run(settings(tmp_path), FIRST)
    (first / "launch.json").write_text(content)
    assert open_run(settings(tmp_path), AGAIN)[1] is False


# -- going on


def stateful(folder: Path, **values: Any) -> Config:
    """All that has a state: batch norm, EMA, plateau, AdamW, dropout, mixup that rests at the end."""
    settings = {
        **AUGMENTED,
        "data__embedded_train": 96,
        "data__augment__mix_off": 0.3,
        "model__dropout": 0.2,
        "optim__schedule": "plateau",
        "optim__plateau_patience": 0,
        "train__ema": 0.9,
        "train__epochs": 4,
        "run__resume": "auto",
    }
    return tiny("patt_lite", folder, **{**settings, **values})


class Gone(Exception):
    """The process would be gone."""


def fit_until(config: Config, epoch: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of a process that is gone right after the save of an epoch."""
    losses: list[float] = []

    def leave_epoch(run: Any, state: Any, record: Any, *rest: Any) -> None:
        leave(run, state, record, *rest)
        losses[:] = state.losses
        if record.epoch == epoch:
            raise Gone

    leave = run_module.leave_epoch
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "leave_epoch", leave_epoch)
        with pytest.raises(Gone):
            fit(config)
    return losses


def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, EMA, optimizer, schedule, metrics and checkpoints, to the bit."""
    with no_pictures(), no_gain():
        whole = fit(stateful(tmp_path, run__name="whole"))
        config = stateful(tmp_path, run__name="broken", run__tensorboard=True)
        parts = [fit_until(config, epoch, monkeypatch) for epoch in (1, 3)]
        last = fit(config)
    assert [len(part) for part in (*parts, last.losses)] == [6, 12, 6]
    assert [*parts[0], *parts[1], *last.losses] == whole.losses
    assert plain_lines(last.folder) == plain_lines(whole.folder)
    assert [record["epoch"] for record in last.records] == [1, 2, 3, 4]
    assert len({line["lr"] for line in plain_lines(whole.folder)}) > 1, "plateau has moved"
    assert last.best.confusion_KK.tolist() == whole.best.confusion_KK.tolist()
    for name in ("best.pth", "last.pth"):
        assert same(everything(last.folder / name), everything(whole.folder / name)), name
    reports = [json.loads((part.folder / "report.json").read_text()) for part in (last, whole)]
    assert reports[0] == reports[1]
    events = EventAccumulator(str(last.folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/step_loss")] == pytest.approx(whole.losses, rel=1e-6)


def test_an_epoch_that_was_broken_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of metrics.jsonl was written, last.pth not: the line is replaced, not doubled."""
    with no_pictures():
        whole = fit(stateful(tmp_path, run__name="whole", train__epochs=2))
        config = stateful(tmp_path, run__name="broken", train__epochs=2)
        fit_until(config, 1, monkeypatch)
        folder = tmp_path / "broken"
        old = (folder / "last.pth").read_bytes()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 2, "half a line')
        assert fit(config).losses == whole.losses[6:]
    assert plain_lines(folder) == plain_lines(whole.folder)
    assert (folder / "last.pth").read_bytes() != old


def test_an_answer_of_on_epoch_outlives_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by it, killed before the save: asked again. Killed after the save: it stays stopped."""
    config = stateful(tmp_path, run__name="mine")
    asked: list[int] = []

    def stop(record: EpochRecord) -> bool:
        asked.append(record.epoch)
        return record.epoch == 2

    def save_state(run: Any, state: Any) -> None:
        if state.epoch == 2:
            raise Gone
        save(run, state)

    save = run_module.save_state
    with no_pictures():
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "save_state", save_state)
            with pytest.raises(Gone):
                fit(config, on_epoch=stop)
        assert len(fit(config, on_epoch=stop).records) == 2
        assert asked == [1, 2, 2]
        assert len(fit(config).records) == 2, "it was stopped"
        assert len(fit(config.override({"train.epochs": 5})).records) == 5, "more epochs are asked for"


def test_checkpoints_that_were_removed_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stateful(tmp_path, run__name="mine", train__epochs=2)
    with no_pictures():
        folder = fit(config).folder
        shutil.rmtree(folder / "checkpoints")
        (folder / "last.pth").unlink()
        before = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match="has the metrics of several epochs and no checkpoint"):
            fit(config)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_requeued_start_waits_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps the lock of a node that has died for a while."""
    monkeypatch.setattr(rundir, "HOLD_S", 0.1)
    monkeypatch.setattr(rundir, "REQUEUED_HOLD_S", 30.0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    dead = rundir.Hold(tmp_path)
    timer = threading.Timer(1.0, dead.release)
    timer.start()
    rundir.Hold(tmp_path).release()
    timer.join()


def test_a_folder_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits, and gives up; the lock goes with its process."""
    monkeypatch.setattr(rundir, "HOLD_S", 0.5)
    config = stateful(tmp_path, run__name="mine", train__epochs=1)
    heard: list[str] = []

    def second(record: EpochRecord) -> None:
        with pytest.raises(UserError, match=r"another process writes into .*mine and has not left within"):
            fit(config)
        heard.append("refused")

    with no_pictures():
        assert len(fit(config, on_epoch=second).records) == 1
        assert heard == ["refused"]
        fit(config)
    holds = "import sys, time; from pathlib import Path; from fer_dist.engine.rundir import Hold"
    code = f"{holds}; held = Hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "mine")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process writes"):
            rundir.Hold(tmp_path / "mine")
        other.kill()
        other.wait()
        rundir.Hold(tmp_path / "mine").release()


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(rundir.fcntl, "flock", none)  # type: ignore[attr-defined]
    rundir.Hold(tmp_path).release()


def test_a_finished_run_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *_: fake_metrics(0.5))
    config = stateful(tmp_path, run__name="done", train__patience=2, train__epochs=9)
    with no_pictures():
        first = fit(config)
        assert [record["epoch"] for record in first.records] == [1, 2, 3], "patience ends it"
        again = fit(config)
    assert again.losses == []
    assert plain_lines(again.folder) == plain_lines(first.folder)
    assert again.best.accuracy == 0.5


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    with no_pictures():
        fit(stateful(tmp_path, run__name="mine", train__epochs=1))
        for values, message in (
            ({"optim__name": "sgd"}, "does not fit these settings: its optimizer is AdamW, here it is SGD"),
            ({"model__freeze_depth": 2}, r"optimizer moves groups of \[.*\] parameters, here they are"),
            ({"train__ema": 0.0}, "it was made with train.ema"),
            ({"model__options__channels": 16}, "size mismatch"),
            ({"seed": 7}, "was made with seed 0, now it is 7: samples would be lost or seen twice"),
            ({"train__global_batch": 8}, "train.global_batch 16, now it is 8"),
            ({"data__embedded_seed": 7}, "from other data: .* .data.embedded_seed 0 -> 7"),
        ):
            with pytest.raises(UserError, match=message):
                fit(stateful(tmp_path, run__name="mine", **values))


def test_a_seed_is_a_seed(tmp_path: Path) -> None:
    """Equal seeds give equal runs, other seeds others; the largest seed works."""
    with no_pictures():
        runs = [
            fit(tiny("vit", tmp_path, run__name=name, seed=seed, train__steps_per_epoch=2, train__epochs=1)).losses
            for name, seed in (("a", 5), ("b", 5), ("c", 2**31 - 1))
        ]
    assert runs[0] == runs[1] != runs[2]


def test_metrics_of_nothing_are_no_gain() -> None:
    empty = Metrics.empty(7)
    assert empty.better_than(None, "accuracy")
    assert not empty.better_than(empty, "accuracy")
