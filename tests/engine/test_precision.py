"""Precision, memory format, compilation, micro-batches and batch norm: each setting does what its name says."""

import numpy as np
import pytest
import torch
from torch import nn

from fer_dist.engine import state as state_module
from fer_dist.engine.runlog import RunLog
from fer_dist.engine.state import exact_kernels, why_sync_batchnorm
from fer_dist.world import World
from tests.helpers.training import GRADIENT, VIT, Rig, Watch, settings


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "float64"])
def test_precision_inside_the_network(precision: str) -> None:
    rig = Rig(settings(train__precision=precision))
    convolution, head = Watch(rig.layer("features.0.0")), Watch(rig.layer("classifier"))
    assert all(np.isfinite([rig.step() for _ in range(2)]))
    assert convolution.types == head.types == {getattr(torch, precision)}
    weights = torch.float64 if precision == "float64" else torch.float32
    assert {parameter.dtype for parameter in rig.state.model.parameters()} == {weights}
    head.outputs.clear()
    rig.evaluate()
    assert head.types == {weights}, "mixed precision is for training only"


def test_half_precision_has_the_gradient_of_float32_and_float16_scales_the_loss() -> None:
    gradients, moved = [], []
    for precision in ("float32", "bfloat16", "float16"):
        rig = Rig(settings(VIT, GRADIENT, train__precision=precision, optim__lr=0.1))
        weight = rig.state.model.network.get_parameter("model.classifier.1.weight")
        weight.register_hook(lambda gradient: gradients.append(gradient.norm().item()))  # type: ignore[no-untyped-call]
        before = weight.detach().clone()
        rig.step()
        moved.append((weight - before).norm().item())
    assert [gradient / gradients[0] for gradient in gradients] == pytest.approx([1, 1, 65_536], rel=0.02)
    assert moved == pytest.approx([moved[0]] * 3, rel=0.02)


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last(channels_last: bool) -> None:
    rig = Rig(settings(train__channels_last=channels_last))
    watch = Watch(rig.layer("features.1"))
    rig.step()
    # Only a weight with more than one channel and more than one pixel differs between the formats.
    for x in (rig.state.model.network.get_parameter("features.0.0.weight"), watch.outputs[0]):
        assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert x.is_contiguous() != channels_last


def test_the_compiled_module_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", nn.Sequential)  # a module around a module, as torch.compile returns
    assert Rig(settings()).state.wrapped.__class__ is not nn.Sequential
    rig = Rig(settings(train__compile=True))
    watch = Watch(rig.state.wrapped)
    rig.step()
    assert isinstance(rig.state.wrapped, nn.Sequential)
    assert watch.counts == [8]
    assert rig.state.deployed is rig.state.wrapped[0], "names in checkpoints have no prefix"


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps() -> None:
    """Without dropout, which inductor draws itself."""
    losses = []
    for compiles in (False, True):
        rig = Rig(settings(train__compile=compiles, train__ema=0.9))
        losses.append([rig.step() for _ in range(3)])
        assert rig.evaluate().count == 24
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_micro_batch_splits_the_forward_pass_and_not_the_step() -> None:
    """Without batch norm the gradient is the same; in float64, so that rounding does not hide a difference."""
    weights, losses = [], []
    for micro_batch, counts in ((None, [8]), (3, [3, 3, 2]), (1, [1] * 8)):
        rig = Rig(settings(VIT, train__micro_batch=micro_batch, train__precision="float64", optim__name="sgd"))
        watch = Watch(rig.layer("model.classifier"))
        losses.append(rig.step())
        weights.append(rig.weights())
        assert watch.counts == counts
        for name, value in weights[-1].items():
            assert torch.allclose(value, weights[0][name], atol=1e-12, rtol=1e-10), (micro_batch, name)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_when_batch_norm_is_synchronized() -> None:
    """On several GPUs, if requested or if the norms of a rank see fewer than 16 pictures at once."""
    for mode, global_batch, micro_batch, size, device, expected in (
        ("auto", 60, None, 4, "cuda", "sees 15 pictures"),
        ("auto", 64, 8, 2, "cuda", "sees 8 pictures"),
        ("auto", 64, None, 4, "cuda", ""),
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


@pytest.mark.parametrize(("arch", "layers"), [("patt_lite", {}), ("vit", VIT)], ids=["patt_lite", "vit"])
def test_synchronized_batch_norm_replaces_the_norms_of_a_network(
    arch: str, layers: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it can be made, not run; a network without batch norm stays as it is."""
    lines: list[str] = []
    monkeypatch.setattr(RunLog, "say", lambda log, line: lines.append(line))
    monkeypatch.setattr(state_module, "why_sync_batchnorm", lambda train, world: "the test requires it")
    state = Rig(settings(layers)).state
    norms = [m for m in state.model.modules() if isinstance(m, nn.SyncBatchNorm)]
    message = "batch norm: statistics over all ranks, since the test requires it"
    assert (bool(norms), lines) == ((True, [message]) if arch == "patt_lite" else (False, []))
    assert len(state.running_stats) == 2 * len(norms)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert {id(p) for m in norms for p in m.parameters()} <= held, "the optimizer holds parameters of replaced norms"


def test_kernels_are_exact_during_training_only() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    for requested in (True, False):
        with exact_kernels(settings(train__deterministic=requested).train, torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled() == requested
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before
