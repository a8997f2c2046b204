"""`--model.weights best.pth`: a training that goes on from a whole model of ours, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fer_dist.config import ModelConfig
from fer_dist.engine import start
from fer_dist.engine.checkpoint import Checkpoint, is_checkpoint, save, write_safetensors
from fer_dist.engine.start import starting_model
from fer_dist.errors import UserError
from fer_dist.models import FaceModel
from fer_dist.spec import LabelSet, ModelSpec
from tests.helpers.processes import python
from tests.helpers.tiny_models import TINY, make_lively, pictures, tiny_config, tiny_model
from tests.test_train import TINY as DEMO
from tests.test_train import TRAIN

RECORD = {"epoch": 3, "val": {"accuracy": 0.625}}


def checkpoint(arch: str, /, **changes: Any) -> Checkpoint:
    """A lively network, calibrated, as after a training."""
    model = make_lively(tiny_model(arch))
    spec = replace(model.spec, smoothing=0.1, temperature=2.0, **changes)
    return Checkpoint(spec=spec, weights=model.state_dict(), config={}, record=RECORD, provenance={}, resume={})


def settings(path: Path, arch: str = "patt_lite", **options: Any) -> ModelConfig:
    return tiny_config(arch, weights=str(path), **options).model


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_it_starts_where_the_other_ended(arch: str, suffix: str, tmp_path: Path) -> None:
    """The same answers, head and running statistics with them, but for the calibration, which a loss must not see."""
    path = tmp_path / f"best{suffix}"
    made = checkpoint(arch)
    (save if suffix == ".pth" else write_safetensors)(path, made)
    torch.manual_seed(9)
    lines: list[str] = []
    model = starting_model(settings(path, arch, dropout=0.5, freeze_depth=1), 48, LabelSet(), lines.append)
    expected = replace(made, spec=replace(made.spec, smoothing=0.0, temperature=1.0)).model()
    with torch.inference_mode():
        assert torch.equal(model.eval()(pictures(4)), expected(pictures(4)))
    assert model.spec == replace(expected.spec, options={**expected.spec.options, "dropout": 0.5})
    assert not any(dict(model.named_parameters())[name].requires_grad for name in model.stages[1])
    assert lines == [f"goes on from the model of {path}: epoch 3, accuracy 62.50% then; its head is kept"]


@pytest.mark.parametrize("arch", TINY)
def test_weights_of_half_size(arch: str, tmp_path: Path) -> None:
    """Half the bytes; the model that they are read into has its own type, and nearly the same answers."""
    made = checkpoint(arch)
    write_safetensors(tmp_path / "whole.safetensors", made)
    write_safetensors(tmp_path / "half.safetensors", made, half=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "whole")]
    numbers = sum(value.numel() for value in made.weights.values() if value.is_floating_point())
    assert sizes[1] - sizes[0] >= 2 * numbers - 1000
    model = starting_model(settings(tmp_path / "half.safetensors", arch), 48, LabelSet(), print)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = replace(made, spec=replace(made.spec, smoothing=0.0, temperature=1.0)).model()
    with torch.inference_mode():
        assert torch.allclose(model.eval()(pictures(4)), expected(pictures(4)), atol=0.02)


def test_beyond_half(tmp_path: Path) -> None:
    made = checkpoint("patt_lite")
    name = "network.features.0.1.running_var"
    weights = {**made.weights, name: made.weights[name] + 1e5}
    with pytest.raises(UserError, match=f"{name} is beyond float16's range"):
        write_safetensors(tmp_path / "half.safetensors", replace(made, weights=weights), half=True)
    assert not (tmp_path / "half.safetensors").exists()


def test_sizes_of_the_network_are_the_checkpoint_s(tmp_path: Path) -> None:
    """They need not be typed again; the size inside may be another one where the network can have any."""
    save(tmp_path / "best.pth", checkpoint("patt_lite"))
    model = starting_model(ModelConfig(weights=str(tmp_path / "best.pth"), image_size=64), 48, LabelSet(), print)
    assert (model.spec.options["width_mult"], model.spec.options["channels"]) == (0.25, 32)
    assert model.spec.input.image_size == 64


@pytest.mark.parametrize(
    ("asked", "message", "fix"),
    [
        ({"arch": "vit"}, "is a checkpoint with model.arch patt_lite, not vit", "--model.arch patt_lite"),
        ({"options": {"channels": 64}}, "model.options.channels 32, not 64", "--model.options.channels 32"),
        ({"options": {"colour": 1}}, "model.options.colour None, not 1", "leave model.options.colour out"),
        ({"freeze_depth": 99}, "this network has 13 blocks", "--model.freeze_depth 0..13"),
    ],
)
def test_another_network_is_refused(asked: dict[str, Any], message: str, fix: str, tmp_path: Path) -> None:
    save(tmp_path / "best.pth", checkpoint("patt_lite"))
    with pytest.raises(UserError) as caught:
        starting_model(ModelConfig(weights=str(tmp_path / "best.pth"), **asked), 48, LabelSet(), print)
    assert message in caught.value.problem
    assert caught.value.fix == fix


def test_other_labels_are_refused(tmp_path: Path) -> None:
    """In another order, each of them would be learnt as a neighbour's."""
    names = LabelSet().names
    save(tmp_path / "best.pth", checkpoint("patt_lite", labels=LabelSet(names=names[::-1])))
    with pytest.raises(UserError, match=r"knows the labels neutral, surprise.* expected angry"):
        starting_model(settings(tmp_path / "best.pth"), 48, LabelSet(), print)


@pytest.mark.parametrize("changes", [{"labels": LabelSet(names=("\x1b[2Ja",))}, {"arch": "\x1b[2Jvit"}])
def test_a_stranger_s_words_do_not_reach_the_terminal(changes: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "best.pth", checkpoint("patt_lite", **changes))
    with pytest.raises(UserError, match=r"\?\[2J") as caught:
        starting_model(settings(tmp_path / "best.pth"), 48, LabelSet(), print)
    assert "\x1b" not in str(caught.value)


def test_positions_of_another_size_are_refused(tmp_path: Path) -> None:
    """A ViT has one embedding for each place: a picture of another size has no weights."""
    save(tmp_path / "best.pth", checkpoint("vit"))
    with pytest.raises(UserError, match=r"position_embeddings \[1, 17, 32\] instead of \[1, 5, 32\]"):
        starting_model(settings(tmp_path / "best.pth", "vit", image_size=32), 48, LabelSet(), print)


def test_a_network_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the options of a stranger pass our checks and a library trips over them, its error is told as ours."""

    def trips(spec: ModelSpec) -> FaceModel:
        raise ValueError("no such size\nin this library")

    save(tmp_path / "best.pth", checkpoint("patt_lite"))
    monkeypatch.setattr(start, "build", trips)
    with pytest.raises(UserError, match=r"no patt_lite can be built as .*best\.pth says: no such size\n  -> "):
        starting_model(settings(tmp_path / "best.pth"), 48, LabelSet(), print)


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    save(path, checkpoint("patt_lite"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="its checksum differs"):
        starting_model(settings(path), 48, LabelSet(), print)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    """Weights of others, a folder, nothing, next to nothing: these go the way of pretrained weights."""
    torch.save(tiny_model("patt_lite").state_dict(), tmp_path / "plain.pth")
    (tmp_path / "short.pth").write_bytes(b"fer_dist")
    (tmp_path / "short.safetensors").write_bytes(b"fer_dist")
    for name in ("plain.pth", "short.pth", "short.safetensors", "missing.pth", "."):
        assert not is_checkpoint(tmp_path / name)


def test_a_run_goes_on_from_a_run(tmp_path: Path) -> None:
    """As typed: the second run says where it starts, and starts better than the first ended without training on."""
    line = [*TRAIN, *DEMO, "--train.epochs", "1"]
    python(*line, "--run.name", "first", cwd=tmp_path).ok()
    weights = ["--model.weights", "runs/first/best.pth"]
    done = python(*line, *weights, "--optim.lr", "1e-9", "--train.ema", "0", "--run.name", "second", cwd=tmp_path).ok()
    first = torch.load(tmp_path / "runs/first/best.pth")["weights"]
    second = torch.load(tmp_path / "runs/second/best.pth")["weights"]
    assert "goes on from the model of runs/first/best.pth: epoch 1, accuracy" in done.out
    name = "network.classifier.weight"
    assert torch.allclose(first[name], second[name], atol=1e-6)
