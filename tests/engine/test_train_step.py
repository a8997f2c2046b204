"""The settings of a training step reach it: each of these tests fails when its setting is ignored."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fer_dist.config import AugmentConfig
from fer_dist.data.augment import draw
from fer_dist.data.faces import VAL
from tests.helpers.training import ALL_PARTS, GRADIENT, PARTS, VIT, Rig, Watch, metrics_of, noise_faces, settings


@pytest.mark.parametrize("precision", ["float32", "float16", "float64"])
def test_clip_norm_bounds_the_gradient(precision: str) -> None:
    moved = []
    for clip_norm in (0.0, 0.01, 1e6):
        rig = Rig(settings(VIT, GRADIENT, train__precision=precision, optim__clip_norm=clip_norm))
        before = rig.weights()
        rig.step()
        moved.append(torch.cat([(value - before[name]).flatten() for name, value in rig.weights().items()]))
    assert moved[0].norm() > 0.1
    assert moved[1].norm().item() == pytest.approx(0.01, rel=2e-3)
    assert torch.equal(moved[2], moved[0]), "a small gradient was changed"


@pytest.mark.parametrize("freeze_depth", [0, 3])
def test_frozen_parameters_and_statistics_stay(freeze_depth: int) -> None:
    rig = Rig(settings(model__freeze_depth=freeze_depth, optim__weight_decay=0.5, optim__lr=0.1))
    frozen = {name for stage in rig.state.model.stages[:4] for name in stage}
    frozen.add("network.features.1.conv.0.1.running_mean")
    before = {name: value.clone() for name, value in rig.state.model.state_dict().items()}
    rig.step()
    same = {name for name, value in rig.state.model.state_dict().items() if torch.equal(value, before[name])}
    assert frozen & same == (frozen if freeze_depth else set())
    assert "network.features.5.conv.0.1.running_mean" not in same


def test_dropout_differs_by_seed_and_by_step() -> None:
    """The same weights and the same batch; dropout alone gives another loss."""
    losses = []
    for seed, step in ((0, 0), (0, 0), (1, 0), (0, 5), (2**31 - 1, 1_000_000)):
        rig = Rig(settings(model__dropout=0.5))
        rig.config = rig.config.override({"seed": seed})
        rig.state.step = step
        losses.append(rig.step())
    assert np.isfinite(losses).all()
    assert losses[0] == losses[1]
    assert len(set(losses)) == 4
    assert rig.evaluate().loss == rig.evaluate().loss, "dropout works in evaluation"


# -- the targets and pictures of a step


def test_loss_is_the_cross_entropy_with_smoothed_and_weighted_targets() -> None:
    faces = noise_faces()
    uneven_N = np.where(np.arange(len(faces)) % 2, 3, faces.labels_N)  # half of the pictures are of one class
    targets = []
    for options in ({}, {"train.label_smoothing": 0.14}, {"train.class_weights": "balanced"}):
        rig = Rig(settings(options, VIT), dataclasses.replace(faces, labels_N=uneven_N))
        batch = rig.batch()
        with torch.no_grad():
            theirs = nn.functional.cross_entropy(rig.state.model(batch.images_N1SS), batch.targets_NK).item()
        assert rig.step() == pytest.approx(theirs, rel=1e-5)
        targets.append(batch.targets_NK)
    plain, smooth, weighted = targets
    assert plain.amax(1).tolist() == plain.sum(1).tolist() == [1] * 8
    assert smooth.amax(1).tolist() == pytest.approx([0.88] * 8)
    common = plain.argmax(1) == 3
    assert weighted.sum(1)[common].max() < 1 < weighted.sum(1)[~common].min()


def test_each_augmentation_reaches_the_training_pictures() -> None:
    plain = Rig(settings()).batch()
    for name, value in PARTS.items():
        varied = Rig(settings({f"data.augment.{name}": value})).batch()
        assert torch.equal(varied.rows_N, plain.rows_N), name
        assert (varied.images_N1SS - plain.images_N1SS).abs().mean() > 2, name
        assert torch.equal(varied.targets_NK, plain.targets_NK) == (name not in ("mixup", "cutmix")), name
    small = Rig(settings({"data.augment.erase": 1.0, "data.augment.erase_area": 0.05})).batch()
    assert 0 < ((small.images_N1SS - plain.images_N1SS).abs() > 0.01).float().mean() < 0.06


def test_the_share_of_a_mixture_is_independent_of_the_partner() -> None:
    """Drawn from the numbers that choose the partners, shares would rise with the partner's index."""
    drawn = [
        draw(AugmentConfig(mixup=0.4), seed=seed, epoch=0, count=1, partners_M=np.arange(1000), mixes=True)
        for seed in range(300)
    ]
    pairs = np.array([(float(found.partner_N[0]), float(found.mix_N5[0, 0])) for found in drawn])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.25  # four standard deviations; from one stream 0.6


# -- evaluation


def test_evaluation_pictures_are_never_varied() -> None:
    rig = Rig(settings(ALL_PARTS, train__eval_batch=10))
    watch = Watch(rig.state.model.preprocess)
    rig.evaluate()
    assert watch.counts == [10, 10, 4]
    expected_NHW = rig.faces.images_NHW[rig.faces.part(VAL)]
    assert np.array_equal(torch.cat(watch.inputs).squeeze(1), expected_NHW)


def test_flip_tta() -> None:
    losses = []
    for flip_tta in (True, False):
        rig = Rig(settings(train__flip_tta=flip_tta, train__eval_batch=10))
        rig.step()
        losses.append(rig.evaluate().loss)
        assert losses[-1] == pytest.approx(metrics_of(rig.state.model, rig.faces, flip=flip_tta).loss, rel=1e-7)
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def test_ema_follows_its_formula_in_weights_and_running_statistics() -> None:
    """The decay is 1/10, 2/11 and 3/12 in the warm-up and 0.3 from step 3 on; frozen weights stay."""
    rig = Rig(settings(train__ema=0.3, optim__lr=0.05, model__freeze_depth=3))
    first = {
        name: value.clone() for name, value in rig.state.deployed.state_dict().items() if value.is_floating_point()
    }
    expected = first
    for step in range(5):
        rig.step()
        live = rig.state.model.state_dict()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * live[name] for name, value in expected.items()}
        average = rig.state.deployed.state_dict()
        for name, value in expected.items():
            assert torch.allclose(average[name], value, atol=1e-4, rtol=1e-4), f"{name} after step {step}"
    moved = {name for name in first if not torch.equal(average[name], first[name])}
    assert moved == {name for name in first if not torch.equal(average[name], live[name])}, (
        "not a copy of the live ones"
    )
    assert any(name.endswith("running_var") for name in moved)
    assert not moved & {name for stage in rig.state.model.stages[:4] for name in stage}
