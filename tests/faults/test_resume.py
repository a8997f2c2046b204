"""Broken off inside an epoch and resumed: the same run, to the bit; at another world size, the same samples."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fer_dist.engine import plots, run
from fer_dist.engine.checkpoint import load
from fer_dist.engine.trainer import fit
from fer_dist.errors import Stopped
from fer_dist.world import World
from tests.helpers.fault_runs import SAVE_EVERY, STEPS, Crash, Ledger, breaking, launch, run_whole
from tests.helpers.small_runs import everything, no_gain, no_pictures, plain_lines, same, starts, stateful

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "vit_mae": ("vit_mae", {"model__freeze_depth": 1}),
    "patt_lite": ("patt_lite", {}),
    "timm": ("timm:mobilenetv3_small_100", {}),
    "float16": ("patt_lite", {"train__precision": "float16", "train__ema": 0.0}),
    "sgd": ("patt_lite", {"optim__name": "sgd", "optim__schedule": "one_cycle", "optim__warmup": 0.3}),
}
SMALL = {"data__embedded_train": 64, "train__global_batch": 8, "model__image_size": 32}
"""Eight steps an epoch, as in the other runs here, at a fraction of the cost."""


def require_same(folder: Path, whole: Path, *names: str) -> None:
    """The checkpoints of two runs and their lines of metrics are equal, to the bit."""
    for name in names:
        assert same(everything(folder / name), everything(whole / name)), name
    assert plain_lines(folder) == plain_lines(whole)


@pytest.mark.parametrize("case", CASES)
def test_stopped_at_any_step_it_is_the_same_run(case: str, tmp_path: Path) -> None:
    """Mixup, EMA, accumulated gradients, plateau, patience, clipping and dropout; four breaks in three epochs."""
    arch, settings = CASES[case][0], CASES[case][1] | SMALL
    ledger: Ledger = []
    with no_gain():
        whole, whole_ledger = run_whole(stateful(arch, tmp_path, run__name="whole", **settings))
        config = stateful(arch, tmp_path, **settings)
        for at in (2, 7, 8, 17):  # inside of an epoch, its last step, the first of the next
            with breaking(at, "signal", ledger), pytest.raises(Stopped, match=f"SIGTERM after step {at + 1},"):
                fit(config)
        with breaking(-1, "", ledger):
            result = fit(config)
    assert len({record["lr"] for record in whole.records}) == 3, "plateau has halved the rate twice"
    assert ledger == whole_ledger, "the same samples, in the same order, as the same pictures: none lost, none twice"
    assert [start["step"] for start in starts(result.folder)] == [0, 3, 8, 9, 18]
    require_same(result.folder, whole.folder, "best.pth", "last.pth")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (result.folder, whole.folder)]
    assert reports[0] == reports[1]


def test_a_crashed_run_resumes_from_the_last_save(tmp_path: Path) -> None:
    settings = {"train__epochs": 2, **SMALL}
    whole, whole_ledger = run_whole(stateful("patt_lite", tmp_path, run__name="whole", **settings))
    for at in (8, 11):
        config, ledger = stateful("patt_lite", tmp_path / str(at), **settings), Ledger()
        with breaking(at, "crash", ledger), pytest.raises(Crash):
            fit(config)
        assert len(ledger) == at
        with breaking(-1, "", ledger):
            result = fit(config)
        saved = at // SAVE_EVERY * SAVE_EVERY
        assert [start["step"] for start in starts(result.folder)] == [0, saved]
        assert ledger[:at] == whole_ledger[:at]
        assert ledger[at:] == whole_ledger[saved:], "at most one save interval is repeated"
        require_same(result.folder, whole.folder, "last.pth")


@pytest.mark.parametrize("name", ["_write_best", "save_step", "curves"])
def test_gone_at_the_end_of_an_epoch_no_best_model_is_lost(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between its line in metrics.jsonl, its best model, its state and its pictures."""
    short = {"train__save_every_steps": None, "train__epochs": 1, "run__progress": "plain", **SMALL}
    whole, _ = run_whole(stateful("patt_lite", tmp_path, run__name="whole", **short))
    config = stateful("patt_lite", tmp_path, **short)
    with no_pictures(), mock.patch.object(plots if name == "curves" else run, name, side_effect=Crash):  # noqa: SIM117
        with pytest.raises(Crash):
            fit(config)
    result, _ = run_whole(config)
    assert [start["step"] for start in starts(result.folder)] == [0, 8 * (name == "curves")]
    begun_again = "has no checkpoint yet, starting from the beginning" in capsys.readouterr().out
    assert begun_again == (name != "curves")
    require_same(result.folder, whole.folder, "best.pth", "last.pth")


def test_a_run_without_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`restart` (the default) resumes what its launcher has started again; the others make a new folder."""
    for resume, steps in (("restart", [0, 4]), ("never", [0]), ("auto", [0])):
        values = {"run__name": None, "run__resume": resume, "run__progress": "plain", "train__epochs": 1}
        config = stateful("vit", tmp_path / resume, **values)
        launch = "" if resume == "auto" else "one"
        with breaking(5, "crash", []), pytest.raises(Crash):
            fit(config, World(launch=launch))
        capsys.readouterr()
        with no_pictures():
            folder = fit(config, World(launch=launch, restarted=resume != "auto")).folder
        assert len(list((tmp_path / resume).iterdir())) == (1 if resume == "restart" else 2)
        assert [start["step"] for start in starts(folder)] == steps
        message = f"no run.name was given, so this is a new run; --run.name {folder.name} would go on"
        assert (message in capsys.readouterr().out) == (resume == "auto")


def test_a_changed_setting_is_told_and_takes_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another rate, weight decay and more epochs: what does not decide the order of samples may change."""
    config = stateful("vit", tmp_path, optim__schedule="constant", run__progress="plain")
    with breaking(10, "signal", []), pytest.raises(Stopped):
        fit(config)
    changed = {"optim.lr": 2e-4, "optim.weight_decay": 0.5, "train.epochs": 4}
    with no_pictures():
        result = fit(config.override(changed))
    printed = capsys.readouterr().out
    changes = "optim.lr 0.001 -> 0.0002; optim.weight_decay 0.05 -> 0.5; train.epochs 3 -> 4"
    assert f"settings have changed: {changes}" in printed
    assert [record["lr"] for record in result.records] == [1e-3, 2e-4, 2e-4, 2e-4]
    groups = load(result.folder / "last.pth").resume["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {2e-4}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}


def test_at_another_world_size_the_same_samples_and_losses(tmp_path: Path) -> None:
    """Compare four ranks, then two, then one, each stopped inside an epoch, with one rank that was never stopped."""
    settings = {"model__dropout": 0.0, "train__precision": "float64", "train__micro_batch": None}
    whole, whole_ledger = run_whole(stateful("vit", tmp_path, run__name="whole", **settings))
    for ranks, stop in ((4, 5), (2, 13)):
        fault = {"rank": ranks - 1, "signal": "SIGTERM", "step": stop, "after_s": 0.0}
        assert launch(tmp_path, ranks, fault, arch="vit", settings=settings, restarts=0).done.code == 1
    last = launch(tmp_path, 1, {}, arch="vit", settings=settings)
    last.done.ok()
    assert [start["world_size"] for start in last.starts] == [4, 2, 1]
    steps = [start["step"] for start in last.starts]
    assert 0 < steps[1] < steps[2] < STEPS
    assert steps[1] % SAVE_EVERY or steps[2] % SAVE_EVERY, "it was stopped between two saves"
    assert list(last.ledger().items()) == whole_ledger, "the same samples, in the same order, as the same pictures"
    losses = [record["train_loss"] for record in plain_lines(last.folder)]
    theirs = [record["train_loss"] for record in plain_lines(whole.folder)]
    np.testing.assert_allclose(losses, theirs, rtol=0, atol=1e-12)
