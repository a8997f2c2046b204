"""A NaN or an infinity: all ranks skip the step and count it, or stop; no weight, buffer or checkpoint has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fer_dist.config import Config
from fer_dist.engine import step, trainer
from fer_dist.engine.checkpoint import load
from fer_dist.engine.history import step_files
from fer_dist.engine.state import prepare
from fer_dist.engine.trainer import fit
from fer_dist.errors import UserError
from tests.helpers.fault_runs import Launch, launch
from tests.helpers.small_runs import no_pictures, plain_lines, stateful
from tests.helpers.training import Rig, settings

# -- several ranks, one of them spoilt


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two ranks; rank 1 has a NaN in its loss, in a gradient of its own, in its running statistics; later in a row."""
    spoil = {"2": "loss", "5": "gradient", "10": "statistics", "11": "loss", "21": "gradient"}
    return launch(
        tmp_path_factory.mktemp("spoilt"),
        2,
        {"rank": 1, "spoil": spoil},
        settings={"train__max_skipped": 2, "run__progress": "plain"},
        restarts=0,
    )


def test_all_ranks_skip_and_count(spoilt: Launch) -> None:
    spoilt.done.ok()
    assert [line["skipped"] for line in plain_lines(spoilt.folder)] == [2, 4, 5]
    assert "step 3 had a NaN or infinity in the loss on rank 1, lr 0.001, samples " in spoilt.done.out
    assert "step 6 had a NaN or infinity in the gradient on rank 0, 1," in spoilt.done.out, (
        "the gradient is everybody's"
    )
    assert "step 12 had a NaN or infinity in the loss on rank 1" in spoilt.done.out
    assert ": skipped, 2 in a row" in spoilt.done.out


def test_all_ranks_stay_alike(spoilt: Launch) -> None:
    """Weights, running statistics and EMA at each save."""
    ranks = [spoilt.lines(f"digests-{rank}.jsonl") for rank in range(2)]
    assert len(ranks[0]) == 9
    assert ranks[0] == ranks[1]


def test_nothing_of_it_is_saved(spoilt: Launch) -> None:
    for path in (*step_files(spoilt.folder), spoilt.folder / "best.pth"):
        checkpoint = load(path)
        state = checkpoint.resume.get("optimizer", {}).get("state", {})
        tensors = [*checkpoint.weights.values(), *checkpoint.resume.get("model", {}).values()]
        tensors += [value for moments in state.values() for value in moments.values()]
        assert all(bool(torch.isfinite(value).all()) for value in tensors)
    assert load(spoilt.folder / "last.pth").resume["losses"] == []


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    spoil = {str(number): "loss" for number in (3, 5, 6, 7)}
    ended = launch(tmp_path, 2, {"rank": 1, "spoil": spoil}, settings={"train__max_skipped": 2}, restarts=0)
    assert ended.done.code == 1, "torchrun's own"
    told = json.loads((ended.folder / "nonfinite.json").read_text())
    assert (told["step"], told["lr"], told["skipped_in_row"]) == (8, 1e-3, 3)
    assert [rank["loss"] for rank in told["ranks"]][1] == "inf"
    rows = next(line["rows"] for line in ended.lines("ledger-1.jsonl") if line["step"] == 7)
    assert told["ranks"][1]["samples"] == rows
    named = ", ".join(f"{row} ({name})" for row, name in zip(rows, told["ranks"][1]["names"], strict=True))
    assert (
        f"error: 3 steps in a row (train.max_skipped 2): step 8 had a NaN or infinity in the loss on rank 1, lr 0.001, "
        f"samples {named}\n  -> a lower --optim.lr, or --optim.clip_norm 1; "
        f"all samples are in {ended.folder}/nonfinite.json"
    ) in ended.done.err
    assert ended.done.err.count("error: 3 steps") == 1
    assert "exitcode  : 2 " in ended.done.err
    assert load(ended.folder / "last.pth").resume["step"] == 4


# -- one rank, by hand


def moments(rig: Rig) -> dict[str, Tensor]:
    """Everything that a step may move: weights, buffers, EMA, the optimizer's moments."""
    found = {f"live {name}": value for name, value in rig.state.model.state_dict().items()}
    assert rig.state.ema
    found |= {f"average {name}": value for name, value in rig.state.ema.model.state_dict().items()}
    for i, kept in rig.state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {i} {name}": value for name, value in kept.items()}
    return {name: value.clone() for name, value in found.items() if "num_batches_tracked" not in name}


@pytest.mark.parametrize("what", ["loss", "infinite loss", "gradient", "statistics"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_skipped_step_moves_nothing(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(settings(train__ema=0.9, optim__name=name, optim__clip_norm=1.0))
    rig.step()
    before, backward = moments(rig), step.backward

    def spoils(config: Config, state: Any, batch: Any, world: Any) -> Tensor:
        loss = backward(config, state, batch, world)
        if what == "gradient":
            state.optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
        elif what == "statistics":
            state.running_stats[0][0] = float("inf")
        return loss * {"loss": float("nan"), "infinite loss": float("inf")}.get(what, 1.0)

    monkeypatch.setattr(step, "backward", spoils)
    rig.step()
    after = moments(rig)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (rig.state.step, rig.state.skipped, rig.state.skipped_in_row) == (2, 1, 1)
    assert rig.state.epoch_losses[1] is None
    monkeypatch.setattr(step, "backward", backward)
    rig.step()
    assert (rig.state.step, rig.state.skipped, rig.state.skipped_in_row) == (3, 1, 0)
    assert any(not torch.equal(before[key], value) for key, value in moments(rig).items())


def test_an_overflow_of_float16_lowers_the_scale_and_is_counted_apart() -> None:
    rig = Rig(settings(train__precision="float16"))
    rig.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    while rig.state.overflows == rig.state.step:
        rig.step()
    assert rig.state.overflows > 20
    assert rig.state.skipped == rig.state.skipped_in_row == 0
    assert rig.state.scaler.get_scale() == 2.0 ** (60 - rig.state.overflows)


def test_a_nan_under_float16_is_no_overflow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale falls to 1, which no gradient is too large for: from there on it counts."""
    rig = Rig(settings(train__precision="float16"))
    backward = step.backward

    def spoils(config: Config, state: Any, batch: Any, world: Any) -> Tensor:
        loss = backward(config, state, batch, world)
        state.optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(step, "backward", spoils)
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
    told = capsys.readouterr().out
    assert f"step 1 skipped: gradients over float16's range; the loss scale is now {2.0**39:g}" in told


def test_an_epoch_of_nothing_but_skipped_steps(tmp_path: Path) -> None:
    config = stateful(
        "vit", tmp_path, optim__lr=1e30, optim__name="sgd", train__steps_per_epoch=2, train__max_skipped=9
    )
    config = config.override({"optim.clip_norm": 0.0, "train.ema": 0.0})
    with no_pictures(), pytest.raises(UserError, match=r"the (training|validation) loss is nan in epoch 1"):
        fit(config)
    assert not (tmp_path / "run" / "best.pth").exists()


def test_weights_that_are_no_longer_finite_are_not_saved(tmp_path: Path) -> None:
    """Finite gradients, and a rate that makes infinities of the weights all the same."""
    config = stateful("vit", tmp_path, optim__lr=1e30, optim__schedule="constant", train__max_skipped=99)
    config = config.override({"train.save_every_steps": 1, "optim.weight_decay": 1e30})
    with no_pictures(), pytest.raises(UserError, match=r"is not written: .* holds a NaN or an infinity") as caught:
        fit(config)
    assert "--optim.lr" in caught.value.fix
    for path in step_files(tmp_path / "run"):
        load(path)
