"""Precision, memory format, compilation, micro-batches and batch norm: each switch does what its name says."""

import numpy as np
import pytest
import torch
from torch import nn

from fer_dist.engine import state as state_module
from fer_dist.engine.state import exact_kernels, why_sync_batchnorm
from fer_dist.world import World
from tests.helpers.training import GRADIENT, VIT, Rig, Watch, settings

# -- precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "float64"])
def test_precision_inside_the_network(precision: str) -> None:
    rig = Rig(settings(train__precision=precision))
    convolution, head = Watch(rig.layer("features.0.0")), Watch(rig.layer("classifier"))
    assert all(np.isfinite([rig.step() for _ in range(2)]))
    assert convolution.types == head.types == {getattr(torch, precision)}
    # The weights are kept whole: mixed precision is for the forward pass only.
    whole = torch.float64 if precision == "float64" else torch.float32
    assert {parameter.dtype for parameter in rig.state.model.parameters()} == {whole}
    head.outputs.clear()
    rig.evaluate()
    assert head.types == {whole}, "evaluation is in the precision of the weights"


def test_half_precision_rounds_but_learns_the_same() -> None:
    """The losses of the first steps: equal to the digits that a type has, and no further."""
    losses = {}
    for precision in ("float64", "float32", "bfloat16", "float16"):
        rig = Rig(settings(VIT, train__precision=precision, optim__name="sgd", optim__lr=0.1))
        losses[precision] = np.array([rig.step() for _ in range(3)])
    exact = losses.pop("float64")
    errors = {precision: np.abs(loss / exact - 1).max() for precision, loss in losses.items()}
    assert 0 < errors["float32"] < 1e-5 < errors["float16"] < 3e-3
    assert errors["float16"] < errors["bfloat16"] < 3e-2


def test_float16_scales_the_loss_and_hands_the_optimizer_the_true_gradient() -> None:
    gradients, moved = [], []
    for precision in ("float32", "float16"):
        rig = Rig(settings(VIT, GRADIENT, train__precision=precision, optim__lr=0.1))
        weight = rig.state.model.network.get_parameter("model.classifier.1.weight")
        weight.register_hook(lambda gradient: gradients.append(gradient.norm().item()))  # type: ignore[no-untyped-call]
        before = weight.detach().clone()
        assert rig.state.scaler.is_enabled() == (precision == "float16")
        rig.step()
        moved.append((weight - before).norm().item())
    assert gradients[1] == pytest.approx(65_536 * gradients[0], rel=0.02)
    assert moved[1] == pytest.approx(moved[0], rel=0.02)


# -- how it is computed


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last(channels_last: bool) -> None:
    rig = Rig(settings(train__channels_last=channels_last))
    watch = Watch(rig.layer("features.1"))
    rig.step()
    # Only a weight with more than one channel and more than one pixel differs between the formats.
    weight = rig.state.model.network.get_parameter("features.0.0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last
    assert watch.outputs[0].is_contiguous(memory_format=torch.channels_last) == channels_last


def test_compile_is_called_and_its_module_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", nn.Sequential)  # a module around a module, as torch.compile returns
    rig = Rig(settings(train__compile=True))
    assert isinstance(rig.state.wrapped, nn.Sequential)
    assert rig.state.wrapped[0] is rig.state.model
    watch = Watch(rig.state.wrapped)
    rig.step()
    assert watch.counts == [8]
    assert not any(name.startswith("0.") for name in rig.state.deployed.state_dict()), "names in checkpoints"
    assert not isinstance(Rig(settings(train__compile=False)).state.wrapped, nn.Sequential)


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


def test_micro_batch_cuts_the_forward_pass_and_not_the_step() -> None:
    """Without batch norm the gradient is the same; in float64, so that nothing else is seen."""
    weights, losses = [], []
    for micro_batch, counts in ((None, [8]), (8, [8]), (3, [3, 3, 2]), (1, [1] * 8)):
        rig = Rig(settings(VIT, train__micro_batch=micro_batch, train__precision="float64", optim__name="sgd"))
        watch = Watch(rig.layer("model.classifier"))
        losses.append(rig.step())
        weights.append(rig.weights())
        assert watch.counts == counts
        for name, value in weights[-1].items():
            assert torch.allclose(value, weights[0][name], atol=1e-12, rtol=1e-10), (micro_batch, name)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


def test_when_batch_norm_is_synchronised() -> None:
    """On several GPUs, if requested or if the norms of a rank see fewer than 16 pictures at once."""
    for mode, global_batch, micro_batch, size, device, expected in (
        ("auto", 60, None, 4, "cuda", "sees 15 pictures"),
        ("auto", 64, 8, 2, "cuda", "sees 8 pictures"),
        ("auto", 64, None, 4, "cuda", ""),
        ("auto", 8, None, 1, "cuda", ""),
        ("auto", 8, None, 4, "cpu", ""),
        ("always", 256, None, 2, "cuda", "is always"),
        ("always", 256, None, 1, "cuda", ""),
        ("always", 256, None, 2, "cpu", ""),
        ("never", 8, None, 4, "cuda", ""),
    ):
        batches = {"train.global_batch": global_batch, "train.micro_batch": micro_batch}
        train = settings(batches, train__sync_batchnorm=mode).train
        reason = why_sync_batchnorm(train, World(size=size, device=torch.device(device)))
        assert expected in reason, (mode, batches, size, device)
        assert bool(reason) == bool(expected), (mode, batches, size, device)


@pytest.mark.parametrize("arch", ["patt_lite", "vit"])
def test_synchronised_batch_norm_replaces_the_norms_of_a_network_that_has_some(
    arch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU it can be made, not run."""
    monkeypatch.setattr(state_module, "why_sync_batchnorm", lambda train, world: "the test says so")
    monkeypatch.setattr("tests.helpers.training.RunConfig", lambda progress: settings(run__progress="plain").run)
    rig = Rig(settings(VIT if arch == "vit" else {}))
    norms = [m for m in rig.state.model.modules() if isinstance(m, nn.SyncBatchNorm)]
    said = "batch norm: statistics over all ranks, since the test says so" in capsys.readouterr().out
    assert bool(norms) == said == (arch == "patt_lite")
    assert len(rig.state.running_stats) == 2 * len(norms)
    held = {id(p) for group in rig.state.optimizer.param_groups for p in group["params"]}
    assert {id(p) for m in norms for p in m.parameters()} <= held, "the optimizer holds parameters of replaced norms"


@pytest.mark.gpu
def test_synchronised_batch_norm_runs_on_one_gpu() -> None:
    rig = Rig(settings())
    network = nn.SyncBatchNorm.convert_sync_batchnorm(rig.state.model).cuda().train()  # type: ignore[no-untyped-call]
    assert network(rig.batch().images_N1SS.cuda()).isfinite().all()


def test_kernels_are_exact_while_it_trains() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    for wanted in (True, False):
        with exact_kernels(settings(train__deterministic=wanted).train, torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled() == wanted
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before
