"""The run folder: what is in it, and how a run resumes in it."""

import json
import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import fer_dist
from fer_dist.config import Config, load_config
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import VAL
from fer_dist.data.feed import evaluation_batches
from fer_dist.engine import run as run_module
from fer_dist.engine import rundir, trainer
from fer_dist.engine.checkpoint import load
from fer_dist.engine.runlog import EpochRecord
from fer_dist.engine.score import score
from fer_dist.engine.trainer import Result, fit
from fer_dist.errors import UserError
from fer_dist.spec import EXPRESSIONS, LabelSet
from fer_dist.world import World
from tests.helpers.fault_runs import Crash
from tests.helpers.small_runs import AUGMENTED, fake_metrics, no_pictures, plain_lines, same, tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    values = {"run__name": "whole", "run__tensorboard": True, "data__embedded_train": 96, "model__dropout": 0.1}
    train = {"train__epochs": 3, "train__ema": 0.5, "train__monitor": "loss"}
    return tiny("patt_lite", tmp_path_factory.mktemp("runs"), **values, **train)


@pytest.fixture(scope="module")
def run(config: Config) -> Result:
    """A run of three epochs."""
    return fit(config)


def test_files_and_lines_of_a_run(run: Result, config: Config) -> None:
    assert {path.name for path in run.folder.iterdir()} == {
        *("config.yaml", "provenance.json", "starts.jsonl", "metrics.jsonl", "checkpoints", "tensorboard"),
        *("curves.png", "confusion.png", "report.json", "best.pth", "last.pth"),
    }
    assert load_config(str(run.folder / "config.yaml")) == config
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.records
    assert [(line["epoch"], line["step"], line["lr"]) for line in lines] == [(1, 6, 1e-3), (2, 12, 1e-3), (3, 18, 1e-3)]
    for line in lines:
        assert line["train_loss"] == pytest.approx(sum(run.losses[line["step"] - 6 : line["step"]]) / 6)
        assert line["val"]["count"] == 60
        assert math.isfinite(line["val"]["loss"])
        assert min(line["images_per_second"], line["seconds"]) > 0
        assert 50 < line["peak_memory_mib"] < 100_000


def test_provenance(run: Result, config: Config) -> None:
    origin = json.loads((run.folder / "provenance.json").read_text())
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert origin["commit"].startswith(head.stdout[:12])
    versions = {"fer_dist": fer_dist.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    assert {**versions, "platform": platform.platform(), "world_size": 1}.items() <= origin.items()
    assert origin["device"].startswith("cpu")
    assert origin["data_key"] == open_faces(config.data, LabelSet()).key != ""
    assert origin["started"].startswith("20")
    assert load(run.folder / "best.pth").provenance == origin == load(run.folder / "last.pth").provenance


def test_the_best_model_and_its_report_are_those_of_the_best_epoch(run: Result, config: Config) -> None:
    """best.pth alone gives exactly the confusion matrix, the accuracy and the loss of its epoch.

    In the memory format of training: on some processors the other one has other kernels, with other last bits.
    """
    best, last = load(run.folder / "best.pth"), load(run.folder / "last.pth")
    assert best.record == min(run.records, key=lambda line: line["val"]["loss"])
    assert last.record == run.records[-1]
    assert best.config == last.config == config.to_dict()
    assert best.spec == last.spec
    assert best.resume == {}
    assert not same(last.weights, last.resume["model"]), "weights: the EMA; resume: the live model"
    model = best.model().to(memory_format=torch.channels_last)
    faces = open_faces(config.data, LabelSet())
    batches = evaluation_batches(faces, faces.part(VAL), batch=256, rank=0, size=1, device=torch.device("cpu"))
    metrics = score(model, batches, World(), classes=7)
    report = json.loads((run.folder / "report.json").read_text())
    assert report == {"epoch": best.record["epoch"], "split": "val", **metrics.report(EXPRESSIONS)}
    assert metrics.confusion_KK.tolist() == run.best.confusion_KK.tolist()
    assert report["loss"] == best.record["val"]["loss"] == run.best.loss
    assert {name: row["recall"] for name, row in report["classes"].items()} == best.record["val"]["recall"]


# -- resuming; to the bit, with all that has a state, in tests/faults/test_resume.py


def resumable(folder: Path, **values: Any) -> Config:
    faces = {"data__embedded_train": 32, "data__embedded_val": 14}
    run = {"run__name": "mine", "run__resume": "auto", "train__ema": 0.9, **values}
    return tiny("patt_lite", folder, **AUGMENTED, **faces, **run)


@contextmanager
def crash_before_the_save_of_epoch_2() -> Iterator[None]:
    save = run_module.save_state

    def save_state(run: Any, state: Any) -> None:
        if state.epoch == 2:
            raise Crash
        save(run, state)

    with mock.patch.object(run_module, "save_state", save_state), pytest.raises(Crash):
        yield


def test_a_resumed_run_has_the_records_and_events_of_the_unbroken_run(tmp_path: Path) -> None:
    """Its second epoch was in metrics.jsonl and in TensorBoard, but not saved; metrics.jsonl is damaged, too."""
    with no_pictures():
        whole = fit(resumable(tmp_path, run__name="whole"))
        config = resumable(tmp_path, run__tensorboard=True)
        with crash_before_the_save_of_epoch_2():
            fit(config)
        (tmp_path / "mine" / "metrics.jsonl").write_text('{"epoch": 7}\n{"epoch": 2, "half a line')
        result = fit(config)
    assert result.losses == whole.losses[2:]
    assert plain_lines(result.folder) == plain_lines(whole.folder)
    assert result.best.confusion_KK.tolist() == whole.best.confusion_KK.tolist()
    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    values = {f"epoch/{name}": [line[name] for line in result.records] for name in ("epoch", "lr", "train_loss")}
    values["epoch/images_per_second"] = [line["images_per_second"] for line in result.records]
    for group, line in (("val", "loss"), ("val", "accuracy"), ("val", "macro_f1")):
        values[f"{group}/{line}"] = [record["val"][line] for record in result.records]
    values |= {f"recall/{name}": [line["val"]["recall"][name] for line in result.records] for name in EXPRESSIONS}
    expected = {tag: list(zip((2, 4), map(np.float32, both), strict=True)) for tag, both in values.items()}
    expected["train/step_loss"] = list(enumerate(map(np.float32, whole.losses), 1))
    assert shown == expected, "each step once"


def test_an_answer_of_on_epoch_outlives_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by it, killed before the save: called again. Killed after the save: it stays stopped."""
    monkeypatch.setattr(rundir, "HOLD_S", 0.0)
    config = resumable(tmp_path, train__epochs=4)
    calls: list[int] = []

    def stop(record: EpochRecord) -> bool:
        calls.append(record.epoch)
        with pytest.raises(UserError, match="another process writes into"):  # the run folder has one writer
            rundir.Hold(tmp_path / "mine")
        return record.epoch == 2

    with no_pictures():
        with crash_before_the_save_of_epoch_2():
            fit(config, on_epoch=stop)
        assert len(fit(config, on_epoch=stop).records) == 2
        assert calls == [1, 2, 2]
        assert len(fit(config).records) == 2, "it was stopped"
        assert len(fit(config.override({"train.epochs": 5})).records) == 5, "more epochs are requested"


def test_a_finished_run_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its checkpoints were removed."""
    monkeypatch.setattr(trainer, "evaluate", lambda *_: fake_metrics(0.5))
    config = resumable(tmp_path, train__patience=1, train__epochs=9)
    with no_pictures():
        first, again = fit(config), fit(config)
        assert [record["epoch"] for record in first.records] == [1, 2], "patience ends it"
        assert again.losses == []
        assert again.records == first.records
        assert again.best.accuracy == 0.5
        shutil.rmtree(first.folder / "checkpoints")
        (first.folder / "last.pth").unlink()
        before = (first.folder / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match="has the metrics of several epochs and no checkpoint"):
            fit(config)
    assert (first.folder / "metrics.jsonl").read_bytes() == before


def test_a_run_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    with no_pictures():
        fit(resumable(tmp_path, train__epochs=1))
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
                fit(resumable(tmp_path, **values))
