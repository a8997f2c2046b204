"""`--model.weights best.pth`: a training that starts from a whole model of fer_dist, and what is refused."""

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
def test_it_starts_where_the_other_ended(arch: str, tmp_path: Path) -> None:
    """The same answers, head and running statistics with them, but for the calibration, which a loss must not see."""
    made = checkpoint(arch)
    expected = replace(made, spec=replace(made.spec, smoothing=0.0, temperature=1.0)).model()
    save(tmp_path / "best.pth", made)
    write_safetensors(tmp_path / "best.safetensors", made)
    write_safetensors(tmp_path / "half.safetensors", made, half=True)
    for name, tolerance in (("best.pth", 0.0), ("best.safetensors", 0.0), ("half.safetensors", 0.02)):
        path = tmp_path / name
        torch.manual_seed(9)
        lines: list[str] = []
        model = starting_model(settings(path, arch, dropout=0.5, freeze_depth=1), 48, LabelSet(), lines.append)
        with torch.inference_mode():
            assert torch.allclose(model.eval()(pictures(4)), expected(pictures(4)), rtol=0, atol=tolerance), name
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.spec == replace(expected.spec, options={**expected.spec.options, "dropout": 0.5})
        assert not any(dict(model.named_parameters())[name].requires_grad for name in model.stages[1])
        assert lines == [f"goes on from the model of {path}: epoch 3, accuracy 62.50% then; its head is kept"]
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "best")]
    numbers = sum(value.numel() for value in made.weights.values() if value.is_floating_point())
    assert sizes[1] - sizes[0] >= 2 * numbers - 1000, "half has half the bytes"


def test_weights_beyond_float16_are_not_written_as_half(tmp_path: Path) -> None:
    made = checkpoint("patt_lite")
    name = "network.features.0.1.running_var"
    weights = {**made.weights, name: made.weights[name] + 1e5}
    with pytest.raises(UserError, match=f"{name} is beyond float16's range"):
        write_safetensors(tmp_path / "half.safetensors", replace(made, weights=weights), half=True)
    assert not (tmp_path / "half.safetensors").exists()


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("best") / "best.pth"
    save(path, checkpoint("patt_lite"))
    return path


def test_sizes_of_the_network_are_those_of_the_checkpoint(best: Path) -> None:
    """They need not be typed again; the size inside may be another one where the network can have any."""
    model = starting_model(ModelConfig(weights=str(best), image_size=64), 48, LabelSet(), print)
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
def test_another_network_is_refused(asked: dict[str, Any], message: str, fix: str, best: Path) -> None:
    with pytest.raises(UserError) as caught:
        starting_model(ModelConfig(weights=str(best), **asked), 48, LabelSet(), print)
    assert message in caught.value.problem
    assert caught.value.fix == fix


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Labels in another order would be learnt as a neighbour's; control characters do not reach the terminal."""
    path, names = tmp_path / "best.pth", LabelSet().names
    vit: dict[str, Any] = {"arch": "vit", "image_size": 32}  # one embedding for each place
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("patt_lite", {"labels": LabelSet(names=names[::-1])}, {}, r"knows the labels neutral, surpr.* expected angry"),
        ("patt_lite", {"labels": LabelSet(names=("\x1b[2Ja",))}, {}, r"\?\[2J"),
        ("patt_lite", {"arch": "\x1b[2Jvit"}, {}, r"\?\[2J"),
        ("vit", {}, vit, r"position_embeddings \[1, 17, 32\] instead of \[1, 5, 32\]"),
    ]
    for arch, changes, asked, message in cases:
        save(path, checkpoint(arch, **changes))
        with pytest.raises(UserError, match=message) as caught:
            starting_model(settings(path, **asked), 48, LabelSet(), print)
        assert "\x1b" not in str(caught.value)


def test_an_error_of_a_library_is_a_user_error(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(spec: ModelSpec) -> FaceModel:
        raise ValueError("no such size\nin this library")

    monkeypatch.setattr(start, "build", fails)
    with pytest.raises(UserError, match=r"no patt_lite can be built as .*best\.pth says: no such size\n  -> "):
        starting_model(settings(best), 48, LabelSet(), print)


def test_a_damaged_checkpoint_is_refused(best: Path, tmp_path: Path) -> None:
    raw = bytearray(best.read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "best.pth").write_bytes(raw)
    with pytest.raises(UserError, match="its checksum differs"):
        starting_model(settings(tmp_path / "best.pth"), 48, LabelSet(), print)


def test_other_files_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
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
