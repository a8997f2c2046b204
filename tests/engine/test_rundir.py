"""The run folder: what is in it, and how a run resumes in it."""

import json
import math
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import fer_dist
from fer_dist.config import Config, load_config
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import VAL
from fer_dist.data.feed import evaluation_batches
from fer_dist.engine import plots, rundir, trainer
from fer_dist.engine import run as run_module
from fer_dist.engine.checkpoint import load
from fer_dist.engine.runlog import EpochRecord
from fer_dist.engine.score import score
from fer_dist.engine.trainer import Result, fit
from fer_dist.errors import UserError
from fer_dist.spec import EXPRESSIONS, LabelSet
from fer_dist.world import World
from tests.helpers.small_runs import AUGMENTED, fake_metrics, no_pictures, plain_lines, same, tiny

ROOT = Path(__file__).resolve().parents[2]


def read_json(run: Result, name: str) -> Any:
    return json.loads((run.folder / name).read_text())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    values = {"run__name": "whole", "run__tensorboard": True, "data__embedded_train": 96, "model__dropout": 0.1}
    train = {"train__epochs": 3, "train__ema": 0.5, "train__monitor": "loss"}
    return tiny("patt_lite", tmp_path_factory.mktemp("runs"), **values, **train)


@pytest.fixture(scope="module")
def run(config: Config) -> Result:
    """A run of three epochs."""
    return fit(config)


# -- what is in it


def test_what_is_in_it(run: Result, config: Config) -> None:
    assert {path.name for path in run.folder.iterdir()} == {
        *("config.yaml", "provenance.json", "starts.jsonl", "metrics.jsonl", "checkpoints", "tensorboard"),
        *("curves.png", "confusion.png", "report.json", "best.pth", "last.pth"),
    }
    assert load_config(str(run.folder / "config.yaml")) == config
    for name in ("curves.png", "confusion.png"):
        with Image.open(run.folder / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 50


def test_a_line_for_each_epoch(run: Result) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.records
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, 12), (3, 18)]
    for line in lines:
        first, val = line["step"] - 6, line["val"]
        assert line["lr"] == 1e-3
        assert line["train_loss"] == pytest.approx(sum(run.losses[first : first + 6]) / 6)
        assert set(val) == {"loss", "accuracy", "macro_f1", "recall", "count"}
        assert tuple(val["recall"]) == EXPRESSIONS
        assert val["count"] == 60
        assert all(0 <= value <= 1 for value in (val["accuracy"], val["macro_f1"], *val["recall"].values()))
        assert math.isfinite(val["loss"])
        assert line["images_per_second"] > 0
        assert line["seconds"] > 0
        assert 50 < line["peak_memory_mib"] < 100_000


def test_provenance(run: Result, config: Config) -> None:
    origin = read_json(run, "provenance.json")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert origin["commit"].startswith(head.stdout[:12])
    versions = {"fer_dist": fer_dist.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    assert {**versions, "platform": platform.platform(), "world_size": 1}.items() <= origin.items()
    assert origin["device"].startswith("cpu")
    assert origin["data_key"] == open_faces(config.data, LabelSet()).key != ""
    assert origin["started"].startswith("20")
    assert load(run.folder / "best.pth").provenance == origin == load(run.folder / "last.pth").provenance


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Read the steps and values of a TensorBoard tag."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, float(event.value)) for event in events.Scalars(tag)]


def test_the_best_model_and_its_report_are_those_of_the_best_epoch(run: Result, config: Config) -> None:
    """From best.pth alone: exactly the confusion, the accuracy and the loss of its epoch.

    In the memory format of training: on some processors the other one has other kernels, with other last bits.
    """
    best, last = load(run.folder / "best.pth"), load(run.folder / "last.pth")
    assert best.record == min(run.records, key=lambda line: line["val"]["loss"])
    assert last.record == run.records[-1]
    assert best.config == last.config == config.to_dict()
    assert best.spec == last.spec
    assert best.spec.labels.names == EXPRESSIONS
    assert best.resume == {}
    assert not same(last.weights, last.resume["model"]), "weights: the EMA; resume: the live model"
    model = best.model().to(memory_format=torch.channels_last)
    faces = open_faces(config.data, LabelSet())
    batches = evaluation_batches(faces, faces.part(VAL), batch=256, rank=0, size=1, device=torch.device("cpu"))
    metrics = score(model, batches, World(), classes=7)
    report = read_json(run, "report.json")
    assert report == {"epoch": best.record["epoch"], "split": "val", **metrics.report(EXPRESSIONS)}
    assert metrics.confusion_KK.tolist() == run.best.confusion_KK.tolist()
    for name in ("accuracy", "loss"):
        assert report[name] == best.record["val"][name] == getattr(run.best, name)
    assert {name: row["recall"] for name, row in report["classes"].items()} == best.record["val"]["recall"]


def test_an_existing_run_folder_is_refused_and_not_touched(run: Result, config: Config) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with pytest.raises(UserError, match="exists; a run is never overwritten") as caught:
        fit(config)
    assert "--run.resume auto" in caught.value.fix
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


# -- resuming; to the bit, with all that has a state, in tests/faults/test_resume.py


def resumable(folder: Path, **values: Any) -> Config:
    values = {"run__name": "mine", "run__resume": "auto", "data__embedded_train": 96, "train__ema": 0.9, **values}
    return tiny("patt_lite", folder, **AUGMENTED, **values)


class Gone(Exception):
    """Stands for the end of the process."""


def test_a_resumed_run_has_the_records_and_events_of_the_unbroken_run(tmp_path: Path) -> None:
    """Ended after the save of its first epoch, and with half a line in metrics.jsonl."""
    with no_pictures():
        whole = fit(resumable(tmp_path, run__name="whole"))
        config = resumable(tmp_path, run__tensorboard=True)
        with mock.patch.object(plots, "curves", side_effect=Gone), pytest.raises(Gone):
            fit(config)
        with (tmp_path / "mine" / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 2, "half a line')
        result = fit(config)
    assert result.losses == whole.losses[6:]
    assert plain_lines(result.folder) == plain_lines(whole.folder)
    assert result.best.confusion_KK.tolist() == whole.best.confusion_KK.tolist()
    float32 = [(step, float(np.float32(loss))) for step, loss in enumerate(whole.losses, 1)]
    assert scalars(result.folder, "train/step_loss") == float32
    scores = [(record["step"], float(np.float32(record["val"]["accuracy"]))) for record in whole.records]
    assert scalars(result.folder, "val/accuracy") == scores


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

    def save_state(run: Any, state: Any) -> None:
        if state.epoch == 2:
            raise Gone
        save(run, state)

    save = run_module.save_state
    with no_pictures():
        with mock.patch.object(run_module, "save_state", save_state), pytest.raises(Gone):
            fit(config, on_epoch=stop)
        assert len(fit(config, on_epoch=stop).records) == 2
        assert calls == [1, 2, 2]
        assert len(fit(config).records) == 2, "it was stopped"
        assert len(fit(config.override({"train.epochs": 5})).records) == 5, "more epochs are requested"


def test_checkpoints_that_were_removed_are_missed(tmp_path: Path) -> None:
    config = resumable(tmp_path)
    with no_pictures():
        folder = fit(config).folder
        shutil.rmtree(folder / "checkpoints")
        (folder / "last.pth").unlink()
        before = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match="has the metrics of several epochs and no checkpoint"):
            fit(config)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *_: fake_metrics(0.5))
    config = resumable(tmp_path, train__patience=1, train__epochs=9)
    with no_pictures():
        first = fit(config)
        assert [record["epoch"] for record in first.records] == [1, 2], "patience ends it"
        again = fit(config)
    assert again.losses == []
    assert plain_lines(again.folder) == plain_lines(first.folder)
    assert again.best.accuracy == 0.5


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
