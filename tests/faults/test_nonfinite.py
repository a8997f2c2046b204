"""A NaN or an infinity: all ranks skip the step and count it, or stop; no weight, buffer or checkpoint has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fer_dist.engine import step, trainer
from fer_dist.engine.checkpoint import load
from fer_dist.engine.history import step_files
from fer_dist.engine.state import prepare
from fer_dist.engine.trainer import fit
from fer_dist.errors import UserError
from tests.helpers.fault_runs import launch
from tests.helpers.small_runs import no_pictures, plain_lines, stateful
from tests.helpers.training import Rig, settings


def test_all_ranks_skip_and_count_and_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """Rank 1 has a NaN in the loss, the gradient, the running statistics; twice in a row, then three times."""
    spoil = dict.fromkeys(("2", "11", "22", "23"), "loss") | {"5": "gradient", "10": "statistics", "21": "gradient"}
    values = {"train__max_skipped": 2, "run__progress": "plain", "optim__schedule": "constant"}
    small = {"data__embedded_train": 64, "train__global_batch": 8}
    faulty = launch(tmp_path, 2, {"rank": 1, "spoil": spoil}, settings=values | small, restarts=0)
    assert [line["skipped"] for line in plain_lines(faulty.folder)] == [2, 4]
    out = faulty.done.out
    assert "step 3 had a NaN or infinity in the loss on rank 1, lr 0.001, samples " in out
    assert "step 6 had a NaN or infinity in the gradient on rank 0, 1," in out, "DDP shares the gradient"
    assert "step 12 had a NaN or infinity in the loss on rank 1" in out
    assert ": skipped, 2 in a row" in out
    # the ranks stay alike: weights, running statistics and EMA at each save
    ranks = [faulty.lines(f"digests-{rank}.jsonl") for rank in range(2)]
    assert len(ranks[0]) == 7
    assert ranks[0] == ranks[1]
    # nothing of it is saved
    for path in (*step_files(faulty.folder), faulty.folder / "best.pth"):
        checkpoint = load(path)
        tensors = [*checkpoint.weights.values(), *checkpoint.resume.get("model", {}).values()]
        for moments in checkpoint.resume.get("optimizer", {}).get("state", {}).values():
            tensors += moments.values()
        assert all(bool(torch.isfinite(value).all()) for value in tensors)
    assert load(faulty.folder / "last.pth").resume["step"] == 20
    # one error names the step, the rank and its samples
    assert faulty.done.code == 1, "torchrun's own"
    report = json.loads((faulty.folder / "nonfinite.json").read_text())
    assert (report["step"], report["lr"], report["skipped_in_row"]) == (24, 1e-3, 3)
    assert report["ranks"][1]["loss"] == "inf"
    rows = next(line["rows"] for line in faulty.lines("ledger-1.jsonl") if line["step"] == 23)
    assert report["ranks"][1]["samples"] == rows
    named = ", ".join(f"{row} ({name})" for row, name in zip(rows, report["ranks"][1]["names"], strict=True))
    error = "error: 3 steps in a row (train.max_skipped 2): step 24 had a NaN or infinity in the loss on rank 1, lr "
    error += f"0.001, samples {named}\n  -> a lower --optim.lr, or --optim.clip_norm 1; all samples are in "
    assert f"{error}{faulty.folder}/nonfinite.json" in faulty.done.err
    assert faulty.done.err.count("error: 3 steps") == 1
    assert "exitcode  : 2 " in faulty.done.err


# -- one rank, by hand


def moving(rig: Rig) -> dict[str, Tensor]:
    """Return everything that a step may move: weights, buffers, EMA, the optimizer's moments."""
    found = {f"live {name}": value for name, value in rig.state.model.state_dict().items()}
    assert rig.state.ema
    found |= {f"average {name}": value for name, value in rig.state.ema.model.state_dict().items()}
    for i, kept in rig.state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {i} {name}": value for name, value in kept.items()}
    return {name: value.clone() for name, value in found.items() if "num_batches_tracked" not in name}


def inject(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Put a NaN or an infinity into every backward pass until `monkeypatch.undo`."""
    backward = step.backward

    def faulty(config: Any, state: Any, *rest: Any) -> Tensor:
        loss = backward(config, state, *rest)
        if what == "gradient":
            state.optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        elif what == "statistics":
            state.running_stats[0][0] = float("inf")
        return loss * {"loss": float("nan"), "infinite loss": float("inf")}.get(what, 1.0)

    monkeypatch.setattr(step, "backward", faulty)


@pytest.mark.parametrize(
    ("what", "name"), [("loss", "adamw"), ("infinite loss", "sgd"), ("gradient", "adamw"), ("statistics", "sgd")]
)
def test_a_skipped_step_moves_nothing(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(settings(train__ema=0.9, optim__name=name, optim__clip_norm=1.0))
    rig.step()
    before = moving(rig)
    inject(monkeypatch, what)
    rig.step()
    after = moving(rig)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (rig.state.step, rig.state.skipped, rig.state.skipped_in_row) == (2, 1, 1)
    assert rig.state.epoch_losses[1] is None
    monkeypatch.undo()
    rig.step()
    assert (rig.state.step, rig.state.skipped, rig.state.skipped_in_row) == (3, 1, 0)
    assert any(not torch.equal(before[key], value) for key, value in moving(rig).items())


def test_a_nan_under_float16_counts_once_the_scale_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(settings(train__precision="float16"))
    inject(monkeypatch, "gradient")
    for _ in range(20):
        rig.step()
    assert (rig.state.overflows, rig.state.skipped_in_row) == (16, 4), "2**16 halved sixteen times"


def test_overflows_are_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scaled_too_high(*arguments: Any) -> Any:
        state = prepare(*arguments)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return state

    monkeypatch.setattr(trainer, "prepare", scaled_too_high)
    config = stateful("vit", tmp_path, train__precision="float16", train__epochs=1, run__progress="plain")
    with no_pictures():
        (record,) = fit(config.override({"train.global_batch": 4})).records
    assert record["overflows"] > 0
    assert record["skipped"] == 0
    message = f"step 1 skipped: gradients over float16's range; the loss scale is now {2.0**39:g}"
    assert message in capsys.readouterr().out


def test_an_epoch_of_skipped_steps_ends_the_run(tmp_path: Path) -> None:
    values = {"optim__name": "sgd", "optim__clip_norm": 0.0, "train__ema": 0.0, "train__steps_per_epoch": 2}
    with no_pictures(), pytest.raises(UserError, match=r"the (training|validation) loss is nan in epoch 1"):
        fit(stateful("vit", tmp_path, optim__lr=1e30, train__max_skipped=9, **values))
    assert not (tmp_path / "run" / "best.pth").exists()


def test_weights_that_are_no_longer_finite_are_not_saved(tmp_path: Path) -> None:
    """Finite gradients, and a rate that makes infinities of the weights."""
    values = {"optim__schedule": "constant", "optim__weight_decay": 1e30, "train__save_every_steps": 1}
    with no_pictures(), pytest.raises(UserError, match=r"is not written: .* holds a NaN or an infinity") as caught:
        fit(stateful("vit", tmp_path, optim__lr=1e30, train__max_skipped=99, **values))
    assert "--optim.lr" in caught.value.fix
    for path in step_files(tmp_path / "run"):
        load(path)
