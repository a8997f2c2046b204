"""Every switch does something: each of these tests fails when its setting is ignored."""

import csv
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fer_dist.config import Config
from fer_dist.data.faces import VAL, Faces
from fer_dist.engine import state as state_module
from fer_dist.engine import trainer
from fer_dist.engine.checkpoint import load
from fer_dist.engine.metrics import Metrics
from fer_dist.engine.runlog import RunLog
from fer_dist.engine.state import exact_kernels, why_sync_batchnorm
from fer_dist.options import Section, walk
from fer_dist.spec import LabelSet
from fer_dist.world import World
from tests.helpers.training import SIDE, VIT, Rig, Watch, fit, noise_faces, settings

TESTS = Path(__file__).resolve().parents[1]
CODE = TESTS.parent / "fer_dist"


def layer(rig: Rig, name: str) -> nn.Module:
    return rig.state.model.network.get_submodule(name)


def norm(changes: list[torch.Tensor]) -> float:
    return float(torch.cat([change.flatten() for change in changes]).norm())


# -- precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "float64"])
def test_precision_inside_the_network(precision: str) -> None:
    rig = Rig(settings(train__precision=precision))
    convolution, head = Watch(layer(rig, "features.0.0")), Watch(layer(rig, "classifier"))
    losses = [rig.step() for _ in range(3)]
    kind = getattr(torch, precision)
    assert set(convolution.types) == set(head.types) == {kind}
    assert all(np.isfinite(losses))
    # The weights are kept whole: mixed precision is for the forward pass only.
    whole = torch.float64 if precision == "float64" else torch.float32
    assert {parameter.dtype for parameter in rig.state.model.parameters()} == {whole}
    head.types.clear()
    rig.evaluate()
    assert set(head.types) == {whole}, "evaluation is in the precision of the weights"


def test_half_precision_rounds_but_learns_the_same() -> None:
    """The losses of the first steps: equal to the digits that a type has, and no further."""
    losses = {}
    for precision in ("float64", "float32", "bfloat16", "float16"):
        rig = Rig(settings(VIT, train__precision=precision, optim__name="sgd", optim__lr=0.1))
        losses[precision] = np.array([rig.step() for _ in range(5)])
    exact = losses.pop("float64")
    errors = {precision: np.abs(loss / exact - 1).max() for precision, loss in losses.items()}
    assert 0 < errors["float32"] < 1e-5 < errors["float16"] < 3e-3
    assert errors["float16"] < errors["bfloat16"] < 3e-2


def on_gradient(weight: nn.Parameter, hook: Callable[[torch.Tensor], object]) -> RemovableHandle:
    handle: RemovableHandle = weight.register_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def test_float16_scales_the_loss_and_hands_the_optimizer_the_true_gradient() -> None:
    seen: dict[str, float] = {}

    def note(gradient: torch.Tensor) -> None:
        seen[precision] = gradient.norm().item()

    for precision in ("float32", "float16"):
        rig = Rig(settings(VIT, train__precision=precision, optim__name="sgd", optim__weight_decay=0, optim__lr=0.1))
        weight = rig.state.model.network.get_parameter("model.classifier.1.weight")
        handle = on_gradient(weight, note)
        before = weight.detach().clone()
        assert rig.state.scaler.is_enabled() == (precision == "float16")
        rig.step()
        handle.remove()
        seen[f"{precision} moved"] = (weight - before).norm().item()
    assert seen["float16"] == pytest.approx(65_536 * seen["float32"], rel=0.02)
    assert seen["float16 moved"] == pytest.approx(seen["float32 moved"], rel=0.02)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_float16_overflow_skips_the_step_and_halves_the_scale(clip_norm: float) -> None:
    rig = Rig(settings(VIT, train__precision="float16", optim__clip_norm=clip_norm))
    weight = rig.state.model.network.get_parameter("model.classifier.1.weight")
    handle = on_gradient(weight, lambda gradient: gradient * torch.inf)
    before = rig.weights()
    rig.step()
    assert all(torch.equal(value, before[name]) for name, value in rig.weights().items())
    assert rig.state.scaler.get_scale() == 32_768
    handle.remove()
    rig.step()
    assert not torch.equal(weight, before["network.model.classifier.1.weight"])


# -- how it is computed


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last(channels_last: bool) -> None:
    rig = Rig(settings(train__channels_last=channels_last))
    watch = Watch(layer(rig, "features.1"))
    rig.step()
    # Only a weight with more than one channel and more than one pixel tells the formats apart.
    weight = rig.state.model.network.get_parameter("features.0.0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last
    assert watch.outputs[0].is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("compiles", [True, False])
def test_compile_is_called_and_its_module_is_trained(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            result: torch.Tensor = self.inner(images)
            return result

    made: list[Compiled] = []

    def record(module: nn.Module) -> nn.Module:
        made.append(Compiled(module))
        return made[-1]

    monkeypatch.setattr(torch, "compile", record)
    rig = Rig(settings(train__compile=compiles))
    rig.step()
    assert [compiled.calls for compiled in made] == [1] * compiles
    if made:
        assert made[0].inner is rig.state.model
    assert all("inner" not in name for name in rig.state.deployed.state_dict()), "names in checkpoints"


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps() -> None:
    """With dropout off: inductor draws its own."""
    losses = {}
    for compiles in (False, True):
        rig = Rig(settings(train__compile=compiles, train__ema=0.9))
        losses[compiles] = [rig.step() for _ in range(3)]
        assert rig.evaluate().count == 24
        rig.state.wrapped.train()
        assert rig.state.model.training
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize("micro_batch", [None, 8, 3, 1])
def test_micro_batch_cuts_the_forward_pass_and_not_the_step(micro_batch: int | None) -> None:
    """Without batch norm the gradient is the same; in float64, so that nothing else is seen."""
    rigs = [
        Rig(settings(VIT, train__micro_batch=cut, train__precision="float64", optim__name="sgd"))
        for cut in (None, micro_batch)
    ]
    counts = [Watch(layer(rig, "model.classifier")).counts for rig in rigs]
    whole, cut = (rig.step() for rig in rigs)
    assert counts == [[8], {None: [8], 8: [8], 3: [3, 3, 2], 1: [1] * 8}[micro_batch]]
    assert cut == pytest.approx(whole, rel=1e-12)
    for name, value in rigs[1].weights().items():
        assert torch.allclose(value, rigs[0].weights()[name], atol=1e-12, rtol=1e-10), name


def test_eval_batch() -> None:
    rig = Rig(settings(train__eval_batch=10))
    watch = Watch(layer(rig, "classifier"))
    rig.evaluate()
    assert watch.counts == [10, 10, 4]


@pytest.mark.parametrize(
    ("mode", "global_batch", "size", "device", "synchronised"),
    [
        ("auto", 60, 4, "cuda", True),  # 15 each
        ("auto", 64, 4, "cuda", False),  # 16 each
        ("auto", 8, 1, "cuda", False),
        ("auto", 8, 4, "cpu", False),
        ("always", 256, 2, "cuda", True),
        ("always", 256, 1, "cuda", False),
        ("always", 256, 2, "cpu", False),
        ("never", 8, 4, "cuda", False),
    ],
)
def test_when_batch_norm_is_synchronised(
    mode: str, global_batch: int, size: int, device: str, synchronised: bool
) -> None:
    train = settings(train__sync_batchnorm=mode, train__global_batch=global_batch).train
    assert bool(why_sync_batchnorm(train, World(size=size, device=torch.device(device)))) == synchronised


def test_synchronised_batch_norm_counts_what_the_norm_sees() -> None:
    train = settings(train__global_batch=64, train__micro_batch=8).train
    assert "sees 8 pictures" in why_sync_batchnorm(train, World(size=2, device=torch.device("cuda")))


@pytest.mark.parametrize(("arch", "freeze_depth", "expected"), [("patt_lite", 0, True), ("vit", 0, False)])
def test_synchronised_batch_norm_is_made_and_said(
    arch: str, freeze_depth: int, expected: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU it can be made, not run."""
    monkeypatch.setattr(state_module, "why_sync_batchnorm", lambda train, world: "the test says so")
    monkeypatch.setattr("tests.helpers.training.RunConfig", lambda progress: settings(run__progress="plain").run)
    rig = Rig(settings(VIT if arch == "vit" else {}, model__freeze_depth=freeze_depth))
    norms = [m for m in rig.state.model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert bool(norms) == expected
    assert ("batch norm: statistics over all ranks, since the test says so" in capsys.readouterr().out) == expected
    if expected:
        assert len(rig.state.running_stats) == 2 * len(norms)
        assert {id(p) for m in norms for p in m.parameters()} <= {
            id(p) for group in rig.state.optimizer.param_groups for p in group["params"]
        }, "the optimizer holds parameters of the norms that were replaced"


@pytest.mark.gpu
def test_synchronised_batch_norm_runs_on_one_gpu() -> None:
    rig = Rig(settings())
    network = nn.SyncBatchNorm.convert_sync_batchnorm(rig.state.model).cuda().train()  # type: ignore[no-untyped-call]
    assert network(rig.batch().images_N1SS.cuda()).isfinite().all()


# -- the step


@pytest.mark.parametrize("precision", ["float32", "float16", "float64"])
def test_clip_norm_bounds_the_gradient(precision: str) -> None:
    """Plain SGD at rate 1 moves by the gradient itself."""
    plain = {
        "optim.name": "sgd",
        "optim.momentum": 0,
        "optim.weight_decay": 0,
        "optim.lr": 1,
        "train.precision": precision,
    }
    moved = {}
    for clip_norm in (0.0, 0.01):
        rig = Rig(settings(VIT, plain, optim__clip_norm=clip_norm))
        before = rig.weights()
        rig.step()
        moved[clip_norm] = norm([value - before[name] for name, value in rig.weights().items()])
    assert moved[0.0] > 0.1
    assert moved[0.01] == pytest.approx(0.01, rel=2e-3)


def test_clip_norm_leaves_small_gradients_alone() -> None:
    plain = {"optim.name": "sgd", "optim.momentum": 0, "optim.weight_decay": 0, "optim.lr": 1}
    moved = []
    for clip_norm in (0.0, 1e6):
        rig = Rig(settings(VIT, plain, optim__clip_norm=clip_norm))
        rig.step()
        moved.append(rig.weights())
    assert all(torch.equal(value, moved[1][name]) for name, value in moved[0].items())


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizer(name: str, kind: type) -> None:
    rig = Rig(settings(optim__name=name, optim__momentum=0.7, optim__weight_decay=0.3))
    assert type(rig.state.optimizer) is kind
    group = rig.state.optimizer.param_groups[0]
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.7
    assert {group["weight_decay"] for group in rig.state.optimizer.param_groups} == {0.0, 0.3}
    assert group["fused"]


def test_learning_rates_of_head_and_backbone() -> None:
    rig = Rig(settings(optim__name="sgd", optim__lr=1e-3, optim__backbone_lr_scale=1e-4, optim__momentum=0))
    before = rig.weights()
    rig.step()
    moved = {name: (value - before[name]).norm().item() for name, value in rig.weights().items()}
    head = rig.state.model.head_names
    assert {group["lr"] for group in rig.state.optimizer.param_groups} == {1e-3, 1e-3 * 1e-4}
    assert max(moved[name] for name in head) > 100 * max(moved[name] for name in moved if name not in head) > 0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"optim.schedule": "constant"}, [1, 1, 1, 1]),
        ({"optim.schedule": "constant", "optim.warmup": 0.5}, [0.5, 1, 1, 1]),
        ({"optim.schedule": "cosine", "optim.final_lr_scale": 0.1}, [1, 0.775, 0.325, 0.1]),
        ({"optim.schedule": "cosine", "optim.warmup": 0.5, "optim.final_lr_scale": 0.1}, [0.5, 1, 1, 0.1]),
        ({"optim.schedule": "one_cycle", "optim.warmup": 0.5, "optim.final_lr_scale": 0.1}, [0.04, 0.52, 1, 0.1]),
        ({"optim.schedule": "plateau"}, [1, 1, 1, 1]),
    ],
)
def test_schedule_is_what_the_steps_run_at(schedule: dict[str, Any], rates: list[float]) -> None:
    rig = Rig(settings(schedule, optim__lr=1.0, train__epochs=1, train__steps_per_epoch=4))
    seen = []
    for _ in range(4):
        rig.step()
        seen.append(max(group["lr"] for group in rig.state.optimizer.param_groups))
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize("freeze_depth", [0, 3])
def test_frozen_parameters_and_statistics_stay(freeze_depth: int) -> None:
    rig = Rig(settings(model__freeze_depth=freeze_depth, optim__weight_decay=0.5, optim__lr=0.1))
    frozen = [name for stage in rig.state.model.stages[:4] for name in stage]
    before = {name: value.clone() for name, value in rig.state.model.state_dict().items()}
    rig.step()
    still = {name for name, value in rig.state.model.state_dict().items() if torch.equal(value, before[name])}
    assert set(frozen) <= still if freeze_depth else not set(frozen) & still
    statistic = "network.features.1.conv.0.1.running_mean"
    assert (statistic in still) == bool(freeze_depth)
    assert "network.features.5.conv.0.1.running_mean" not in still


@pytest.mark.parametrize("arch", [{}, VIT])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout(arch: dict[str, Any], dropout: float) -> None:
    """Two passes over one picture differ with dropout only, and never in evaluation."""
    rig = Rig(settings(arch, model__dropout=dropout))
    model, images = rig.state.model, rig.batch().images_N1SS
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p] == [dropout] * (dropout > 0)
    assert torch.equal(model(images), model(images)) == (dropout == 0)
    model.eval()
    assert torch.equal(model(images), model(images))


# -- the targets and pictures of a step


def test_label_smoothing() -> None:
    batch = Rig(settings(train__label_smoothing=0.14)).batch()
    assert batch.targets_NK.amax(1).tolist() == pytest.approx([0.88] * 8)
    assert Rig(settings()).batch().targets_NK.amax(1).tolist() == [1] * 8


def test_loss_is_the_cross_entropy_with_the_targets() -> None:
    for options in ({}, {"train.label_smoothing": 0.1}, {"train.class_weights": "balanced"}):
        rig = Rig(settings(options, VIT), uneven())
        batch = rig.batch()
        with torch.no_grad():
            logits_NK = rig.state.model(batch.images_N1SS)
        theirs = nn.functional.cross_entropy(logits_NK, batch.targets_NK).item()
        assert rig.step() == pytest.approx(theirs, rel=1e-5)


def uneven() -> Faces:
    """Half of the pictures of one class."""
    faces = noise_faces()
    return dataclasses.replace(faces, labels_N=np.where(np.arange(len(faces)) % 2, 3, faces.labels_N))


def test_class_weights() -> None:
    faces = uneven()
    plain = Rig(settings(), faces).batch()
    weighted = Rig(settings(train__class_weights="balanced"), faces).batch()
    assert plain.targets_NK.sum(1).tolist() == [1] * 8
    weights = weighted.targets_NK.sum(1)
    common = plain.targets_NK.argmax(1) == 3
    assert weights[common].max() < 1 < weights[~common].min()


PARTS: dict[str, float] = {
    "flip": 1.0,
    "rotation": 20,
    "translation": 0.2,
    "scale": 0.3,
    "crop": 0.3,
    "brightness": 0.2,
    "blur": 4.0,
    "noise": 60.0,
    "contrast": 0.5,
    "erase": 1.0,
    "mixup": 1.0,
    "cutmix": 1.0,
}


@pytest.mark.parametrize("name", PARTS)
def test_each_augmentation_reaches_the_training_pictures(name: str) -> None:
    plain = Rig(settings()).batch()
    varied = Rig(settings({f"data.augment.{name}": PARTS[name]})).batch()
    assert torch.equal(varied.rows_N, plain.rows_N)
    assert (varied.images_N1SS - plain.images_N1SS).abs().mean() > 2
    assert torch.equal(varied.targets_NK, plain.targets_NK) == (name not in ("mixup", "cutmix"))


def test_erase_area() -> None:
    erased = []
    for area in (0.05, 0.8):
        options = {"data.augment.erase": 1.0, "data.augment.erase_area": area}
        images = Rig(settings(options)).batch().images_N1SS
        erased.append(((images - Rig(settings()).batch().images_N1SS).abs() > 0.01).float().mean().item())
    assert 0 < erased[0] < 0.06
    assert erased[1] > 0.15


def test_mix_off() -> None:
    for mix_off, mixed in ((0.0, [True, True]), (0.5, [True, False]), (1.0, [False, False])):
        rig = Rig(settings({"data.augment.mixup": 1.0, "data.augment.mix_off": mix_off}))
        targets = [next(iter(rig.feed.epoch(epoch, rank=0, size=1))).targets_NK for epoch in (0, 1)]
        assert [bool((t.amax(1) < 1).any()) for t in targets] == mixed


def test_evaluation_pictures_are_never_varied() -> None:
    rig = Rig(settings({f"data.augment.{name}": value for name, value in PARTS.items()}))
    watch = Watch(rig.state.model.preprocess)
    rig.evaluate()
    stored = rig.faces.images_NHW[rig.faces.part(VAL)]
    assert np.array_equal(torch.cat(watch.inputs).squeeze(1).numpy(), stored)


@pytest.mark.parametrize("flip_tta", [True, False])
def test_flip_tta(flip_tta: bool) -> None:
    rig = Rig(settings(train__flip_tta=flip_tta))
    rig.step()
    rig.state.model.eval()
    images = torch.from_numpy(rig.faces.images_NHW[rig.faces.part(VAL)]).unsqueeze(1)
    labels = torch.from_numpy(rig.faces.labels_N[rig.faces.part(VAL)])
    with torch.inference_mode():
        p_NK = rig.state.model(images).double().softmax(1)
        mirrored_NK = rig.state.model(images.flip(-1)).double().softmax(1)
    expected = Metrics.of(((p_NK + mirrored_NK) / 2 if flip_tta else p_NK).log(), labels)
    assert rig.evaluate().loss == pytest.approx(expected.loss, rel=1e-9)
    assert not torch.allclose(p_NK, mirrored_NK, rtol=1e-6)


# -- the moving average


def test_ema_moves_after_each_step_by_its_formula() -> None:
    """By 0.9 and 9/11 of the way in its warm-up, by 0.3 where the decay of 0.7 is reached (step 7)."""
    rig = Rig(settings(train__ema=0.7, optim__lr=0.05))
    expected = rig.weights()
    for step in range(9):
        rig.step()
        decay = min(0.7, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in rig.weights().items()}
        for name, value in rig.state.deployed.named_parameters():
            assert torch.allclose(value, expected[name], atol=1e-5), f"{name} after step {step}"
            assert not torch.equal(value, rig.weights()[name])


def test_ema_is_what_is_evaluated() -> None:
    rig = Rig(settings(train__ema=0.99, optim__lr=0.05))
    for _ in range(4):
        rig.step()
    images = torch.from_numpy(rig.faces.images_NHW[rig.faces.part(VAL)]).unsqueeze(1)
    labels = torch.from_numpy(rig.faces.labels_N[rig.faces.part(VAL)])
    averaged = rig.evaluate().loss
    losses = []
    assert rig.state.ema is not None
    for model in (rig.state.ema.model, rig.state.model):
        with torch.inference_mode():
            losses.append(Metrics.of(model.eval()(images).double().log_softmax(1), labels).loss)
    assert averaged == pytest.approx(losses[0], rel=1e-9)
    assert averaged != pytest.approx(losses[1], rel=1e-3)
    rig.state.ema = None
    assert rig.evaluate().loss == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_checkpoint_holds_the_average_as_weights(ema: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train__ema=ema, train__epochs=1, train__steps_per_epoch=3, optim__lr=0.02)
    result = fit(monkeypatch, tmp_path, config)
    last = load(result.folder / "last.pth")
    live = last.resume["model"]
    assert bool(live) == bool(ema), "without an average the weights are the live ones, and stand there once"
    assert not any(torch.equal(value, live[name]) for name, value in last.weights.items() if ema and value.ndim)
    faces = noise_faces()
    images = torch.from_numpy(faces.images_NHW[faces.part(VAL)]).unsqueeze(1)
    with torch.inference_mode():
        log_p_NK = last.model()(images).double().log_softmax(1)
    loss = Metrics.of(log_p_NK, torch.from_numpy(faces.labels_N[faces.part(VAL)])).loss
    assert loss == pytest.approx(result.records[0]["val"]["loss"], rel=1e-6)


# -- what epochs are judged by


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: tuple[int, int, float]) -> None:
    """Evaluations that answer, epoch by epoch: pictures right of the first class (of 9), of the second (of 3), loss."""
    script = deque(
        Metrics(confusion_KK=np.pad([[a, 9 - a], [3 - b, b]], (0, 5)).astype(np.int64), loss_sum=12 * loss, count=12)
        for a, b, loss in scores
    )
    monkeypatch.setattr(trainer, "evaluate", lambda *_: script.popleft())


@pytest.mark.parametrize(("monitor", "best"), [("loss", 3), ("accuracy", 2), ("macro_f1", 4)])
def test_monitor_picks_the_best_epoch(monitor: str, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, (5, 1, 2.0), (9, 0, 1.5), (5, 1, 1.0), (7, 2, 1.9), (5, 1, 1.2))
    config = settings(train__monitor=monitor, train__epochs=5, train__steps_per_epoch=1)
    result = fit(monkeypatch, tmp_path, config)
    assert load(result.folder / "best.pth").record["epoch"] == best
    assert result.best.loss == pytest.approx({3: 1.0, 2: 1.5, 4: 1.9}[best])


WORSE = [(5, 1, 1.0 + 0.1 * i) for i in range(8)]


@pytest.mark.parametrize(("patience", "epochs"), [(0, 8), (1, 2), (3, 4)])
def test_patience(patience: int, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, *WORSE)
    config = settings(train__patience=patience, train__monitor="loss", train__epochs=8, train__steps_per_epoch=1)
    assert len(fit(monkeypatch, tmp_path, config).records) == epochs


def test_patience_begins_anew_with_a_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, *((5, 1, loss) for loss in (1.0, 1.1, 0.9, 1.0, 1.0, 0.5)))
    config = settings(train__patience=2, train__monitor="loss", train__epochs=6, train__steps_per_epoch=1)
    assert len(fit(monkeypatch, tmp_path, config).records) == 5


@pytest.mark.parametrize(("monitor", "rates"), [("loss", [1, 1, 1, 0.1, 0.1, 0.01]), ("accuracy", [1, 1, 1, 1, 1, 1])])
def test_plateau_listens_to_the_monitored_score(
    monitor: str, rates: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, *((2 + i, 1, 1.0 + i) for i in range(6)))  # accuracy gains, loss does not
    plateau = {"optim.schedule": "plateau", "optim.plateau_patience": 1, "optim.plateau_factor": 0.1}
    config = settings(plateau, optim__lr=1.0, train__monitor=monitor, train__epochs=6, train__steps_per_epoch=1)
    records = fit(monkeypatch, tmp_path, config).records
    assert [record["lr"] for record in records] == pytest.approx(rates)


def test_on_epoch_is_asked_after_every_epoch_and_can_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last one of an early stop, too: Ray would miss its result."""
    scripted(monkeypatch, *WORSE)
    asked: list[int] = []
    whole = trainer.fit

    def watched(config: Config, world: World) -> trainer.Result:
        return whole(config, world, lambda record: asked.append(record.epoch))

    monkeypatch.setattr(trainer, "fit", watched)
    config = settings(train__patience=2, train__monitor="loss", train__epochs=8, train__steps_per_epoch=1)
    fit(monkeypatch, tmp_path, config)
    assert asked == [1, 2, 3]
    scripted(monkeypatch, *WORSE)
    monkeypatch.setattr(trainer, "fit", lambda config, world: whole(config, world, lambda record: record.epoch == 2))
    assert len(fit(monkeypatch, tmp_path / "b", config.override({"train.patience": 0})).records) == 2


# -- how long, from where, on what


def test_epochs_and_steps_per_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps_per_epoch, steps in ((None, [5, 10, 15]), (2, [2, 4, 6])):
        config = settings(train__epochs=3, train__steps_per_epoch=steps_per_epoch)
        result = fit(monkeypatch, tmp_path / str(steps_per_epoch), config)
        assert [record["step"] for record in result.records] == steps
        assert len(result.losses) == steps[-1]


def test_global_batch() -> None:
    assert len(Rig(settings(train__global_batch=5)).batch()) == 5


def test_seed_decides_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every source of chance switched on: the same seed, the same run; another seed, another."""
    chance = {f"data.augment.{name}": value for name, value in PARTS.items()}
    config = settings(chance, model__dropout=0.3, train__steps_per_epoch=2)
    torch.manual_seed(5)
    first = fit(monkeypatch, tmp_path / "a", config).losses
    torch.manual_seed(6)  # what the caller did with torch's generator does not matter
    assert fit(monkeypatch, tmp_path / "b", config).losses == first
    assert fit(monkeypatch, tmp_path / "c", config.override({"seed": 1})).losses != first


def test_seed_reaches_each_source_of_chance() -> None:
    """Weights, order, pictures, mixtures and dropout, one by one."""
    zero, one = (
        Rig(settings({"seed": seed, "data.augment.rotation": 20, "data.augment.mixup": 1.0})) for seed in (0, 1)
    )
    assert not torch.equal(zero.weights()["network.classifier.weight"], one.weights()["network.classifier.weight"])
    assert zero.batch().rows_N.tolist() != one.batch().rows_N.tolist()
    rigs = [Rig(settings(model__dropout=0.5)), Rig(settings(model__dropout=0.5))]
    rigs[1].config = rigs[1].config.override({"seed": 1})  # the same weights and batch, other dropout
    assert rigs[0].step() != rigs[1].step()
    again = Rig(settings(model__dropout=0.5))
    again.state.step = 5  # and another step, other dropout
    assert again.step() != Rig(settings(model__dropout=0.5)).step()


def test_largest_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(settings(seed=2**31 - 1, model__dropout=0.5))
    rig.state.step = 1_000_000
    assert np.isfinite(rig.step())


@pytest.mark.parametrize("drop_copies", [True, False])
def test_drop_copies(drop_copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = noise_faces(train=20)
    images_NHW = faces.images_NHW.copy()
    images_NHW[:6] = images_NHW[faces.part(VAL)[:6]]
    config = settings(data__drop_copies=drop_copies, train__epochs=1, train__global_batch=5)
    result = fit(monkeypatch, tmp_path, config, dataclasses.replace(faces, images_NHW=images_NHW))
    assert len(result.losses) == (14 if drop_copies else 20) // 5


def test_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def joining(device: str, timeout_seconds: float) -> World:
        asked.append((device, timeout_seconds))
        raise InterruptedError

    monkeypatch.setattr(trainer, "join", joining)
    for device in ("auto", "cuda", "cpu"):
        with pytest.raises(InterruptedError):
            trainer.fit(settings(train__device=device, run__timeout_seconds=7))
    assert asked == [("auto", 7), ("cuda", 7), ("cpu", 7)]


def test_validation_part_is_held_out_in_the_share_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unmarked = dataclasses.replace(noise_faces(), usage_N=np.zeros(64, np.int64))
    monkeypatch.setattr(trainer, "open_faces", lambda data, labels: unmarked)
    for fraction, held in ((0.12, 7), (0.45, 28)):  # of nine pictures of each class (ten of the first) one, or four
        config = settings(data__val_fraction=fraction)
        _, train_M, val_M = trainer.open_parts(config, LabelSet(), World(), RunLog(config.run, first=True))
        assert (len(train_M), len(val_M)) == (64 - held, held)


def test_embedded_faces_are_as_many_as_asked_and_of_their_seed(tmp_path: Path) -> None:
    opened = []
    for seed in (0, 1):
        config = settings(data__embedded_train=9, data__embedded_val=8, data__embedded_seed=seed)
        config = config.override({"data.cache_dir": str(tmp_path)})
        faces, train_M, val_M = trainer.open_parts(config, LabelSet(), World(), RunLog(config.run, first=True))
        assert (len(train_M), len(val_M)) == (9, 8)
        assert faces.images_NHW.shape[1:] == (SIDE, SIDE)
        opened.append(faces.images_NHW)
    assert not np.array_equal(opened[0], opened[1])


@pytest.mark.parametrize("wanted", [True, False])
def test_kernels_are_exact_while_it_trains(wanted: bool) -> None:
    train = settings(train__deterministic=wanted).train
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with exact_kernels(train, torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled() == wanted
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before


@pytest.mark.parametrize("tensorboard", [True, False])
def test_tensorboard(tensorboard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(run__tensorboard=tensorboard, train__epochs=1, train__steps_per_epoch=1)
    folder = fit(monkeypatch, tmp_path, config).folder
    assert bool(list(folder.rglob("events.out.tfevents*"))) == tensorboard


@pytest.mark.parametrize(("progress", "speaks"), [("plain", True), ("auto", True), ("none", False)])
def test_progress(
    progress: str, speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How the lines look is in test_runlog.py."""
    fit(monkeypatch, tmp_path, settings(run__progress=progress, train__epochs=1, train__steps_per_epoch=1))
    assert ("epoch   1/1" in capsys.readouterr().out) == speaks


# -- nothing is forgotten


def test_every_setting_is_named_in_a_test() -> None:
    """Dotted, or with two underscores as `settings()` spells it."""
    text = "\n".join(path.read_text() for path in TESTS.rglob("*.py") if path.name != "test_config.py")
    forgotten = [
        name
        for name, _ in walk(Config)
        if name not in text and name.replace(".", "__") not in text and name.split(".")[-1] not in PARTS
    ]
    assert not forgotten, "no test sets " + ", ".join(forgotten)


def test_every_setting_is_read_by_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a few times and notes which fields fer_dist asks for; what nobody asks for is ignored."""
    read: set[tuple[type, str]] = set()
    plumbing = {str(CODE / name) for name in ("options.py", "config.py")}

    def note(section: Section, name: str) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(str(CODE)) and caller not in plumbing:
            read.add((type(section), name))
        return object.__getattribute__(section, name)

    ferplus = tmp_path / "fer2013new.csv"
    table = tmp_path / "fer2013.csv"
    write_tables(table, ferplus)
    quick = {"train.epochs": 1, "train.steps_per_epoch": 1, "run.dir": str(tmp_path / "runs"), "run.tensorboard": True}
    on_table = {"data.path": str(table), "data.ferplus": str(ferplus), "data.size": 48, "data.cache_dir": str(tmp_path)}
    drawn = {"data.embedded_train": 14, "data.embedded_val": 7}
    mixing = {"data.augment.mixup": 0.2, "data.augment.cutmix": 0.2}
    runs = (
        {**quick, **drawn, **mixing, "run.name": "a", "optim.schedule": "one_cycle", "train.precision": "bfloat16"},
        {**quick, **on_table, "run.name": "b", "run.resume": "auto", "optim.schedule": "plateau", "train.ema": 0.9},
    )
    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", note, raising=False)
        patch.setattr("os.fsync", lambda handle: None)
        (tmp_path / "runs" / "b").mkdir(parents=True)  # so that it matters whether a run goes on
        for values in runs:
            trainer.fit(settings(values))
        why_sync_batchnorm(settings().train, World(size=2, device=torch.device("cuda")))
    sections = {(type(section), name) for section, name in _leaves(Config())}
    names = {f"{kind.__name__}.{name}" for kind, name in sections - read}
    # Read in the second evaluation without a gain, which one epoch does not have, and after a spoilt step.
    assert names <= {"OptimConfig.plateau_factor", "TrainConfig.max_skipped"}, "never read: " + ", ".join(sorted(names))


def _leaves(section: Section) -> Iterator[tuple[Section, str]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Section):
            yield from _leaves(value)
        else:
            yield section, field.name


def write_tables(table: Path, ferplus: Path) -> None:
    """Twenty training pictures as fer2013.csv and their votes; no validation part."""
    rng = np.random.default_rng(0)
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["emotion", "pixels", "Usage"])
        for i in range(20):
            rows.writerow([i % 5, " ".join(map(str, rng.integers(0, 256, 48 * 48))), "Training"])
    head = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    votes = [f"Training,fer{i:07d}.png,{i % 5},{5 - i % 5},0,0,3,1,1,0,0,0" for i in range(20)]
    ferplus.write_text("\n".join([head, *votes]) + "\n")
