"""`--model.weights best.pth`: a training that starts from a whole model of fer_dist, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fer_dist.config import ModelConfig
from fer_dist.engine import start
from fer_dist.engine.checkpoint import Checkpoint, is_checkpoint, load, save, write_safetensors
from fer_dist.engine.start import starting_model
from fer_dist.engine.trainer import fit
from fer_dist.errors import UserError
from fer_dist.models import FaceModel
from fer_dist.spec import LabelSet
from tests.helpers.small_runs import no_pictures, tiny
from tests.helpers.tiny_models import TINY, make_lively, pictures, tiny_config, tiny_model


def checkpoint(arch: str, /, **changes: Any) -> Checkpoint:
    """Return a lively network, calibrated, as after a training."""
    model = make_lively(tiny_model(arch))
    spec = replace(model.spec, smoothing=0.1, temperature=2.0, **changes)
    record = {"epoch": 3, "val": {"accuracy": 0.625}}
    return Checkpoint(spec=spec, weights=model.state_dict(), config={}, record=record, provenance={}, resume={})


def started(path: Path, **options: Any) -> FaceModel:
    return starting_model(ModelConfig(weights=str(path), **options), 48, LabelSet(), print)


@pytest.fixture
def best(tmp_path: Path) -> Path:
    save(tmp_path / "best.pth", checkpoint("patt_lite"))
    return tmp_path / "best.pth"


@pytest.mark.parametrize("arch", TINY)
def test_it_starts_where_the_other_ended(arch: str, tmp_path: Path) -> None:
    """The same logits, from head and running statistics as well, but without the calibration: the loss needs none."""
    made = checkpoint(arch)
    expected = replace(made, spec=replace(made.spec, smoothing=0.0, temperature=1.0)).model()
    save(tmp_path / "best.pth", made)
    write_safetensors(tmp_path / "best.safetensors", made)
    write_safetensors(tmp_path / "half.safetensors", made, half=True)
    for name, tolerance in (("best.pth", 0.0), ("best.safetensors", 0.0), ("half.safetensors", 0.02)):
        path = tmp_path / name
        torch.manual_seed(9)
        lines: list[str] = []
        config = tiny_config(arch, weights=str(path), dropout=0.5, freeze_depth=1).model
        model = starting_model(config, 48, LabelSet(), lines.append)
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
    made.weights["network.features.0.1.running_var"] += 1e5
    with pytest.raises(UserError, match=r"network\.features\.0\.1\.running_var is beyond float16's range"):
        write_safetensors(tmp_path / "half.safetensors", made, half=True)
    assert not (tmp_path / "half.safetensors").exists()


def test_sizes_of_the_network_are_those_of_the_checkpoint(best: Path) -> None:
    """They need not be typed again; the size inside may be another one where the network can have any."""
    spec = started(best, image_size=64).spec
    assert (spec.options["width_mult"], spec.options["channels"], spec.input.image_size) == (0.25, 32, 64)


@pytest.mark.parametrize(
    ("arch", "changes", "requested", "message"),
    [
        ("patt_lite", {}, {"arch": "vit"}, "with model.arch patt_lite, not vit\n  -> --model.arch patt_lite"),
        ("patt_lite", {}, {"options": {"channels": 64}}, "channels 32, not 64\n  -> --model.options.channels 32"),
        ("patt_lite", {}, {"options": {"colour": 1}}, "colour None, not 1\n  -> leave model.options.colour out"),
        ("patt_lite", {}, {"freeze_depth": 99}, "this network has 13 blocks\n  -> --model.freeze_depth 0..13"),
        ("patt_lite", {"labels": LabelSet(names=LabelSet().names[::-1])}, {}, "knows the labels neutral, surprise"),
        ("patt_lite", {"labels": LabelSet(names=("\x1b[2Ja",))}, {}, "knows the labels ?[2Ja; expected angry"),
        ("patt_lite", {"arch": "\x1b[2Jvit"}, {}, "model.arch ?[2Jvit, not patt_lite"),
        ("vit", {}, {"arch": "vit", "image_size": 32}, "position_embeddings [1, 17, 32] instead of [1, 5, 32]"),
    ],
    ids=["arch", "size", "option", "depth", "order of labels", "control characters", "hostile arch", "image size"],
)
def test_another_network_is_refused(
    arch: str, changes: dict[str, Any], requested: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Control characters do not reach the terminal."""
    save(tmp_path / "best.pth", checkpoint(arch, **changes))
    with pytest.raises(UserError) as caught:
        started(tmp_path / "best.pth", **requested)
    assert message in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_damaged_checkpoint_and_an_error_of_a_library_are_user_errors(
    best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spec: object) -> FaceModel:
        raise ValueError("no such size\nin this library")

    with monkeypatch.context() as patch:
        patch.setattr(start, "build", fail)
        with pytest.raises(UserError, match=r"no patt_lite can be built as .*best\.pth says: no such size\n  -> "):
            started(best)
    raw = bytearray(best.read_bytes())
    raw[len(raw) // 2] ^= 1
    best.write_bytes(raw)
    with pytest.raises(UserError, match="its checksum differs"):
        started(best)


def test_other_files_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    """State dicts, a folder, a missing and a tiny file are treated as pretrained weights."""
    torch.save(tiny_model("patt_lite").state_dict(), tmp_path / "plain.pth")
    for name in ("short.pth", "short.safetensors"):
        (tmp_path / name).write_bytes(b"fer_dist")
    for name in ("plain.pth", "short.pth", "short.safetensors", "missing.pth", "."):
        assert not is_checkpoint(tmp_path / name)


def test_a_run_starts_from_a_run(tmp_path: Path) -> None:
    short = {"train__epochs": 1, "train__steps_per_epoch": 1}
    with no_pictures():
        first = fit(tiny("patt_lite", tmp_path, run__name="first", **short)).folder / "best.pth"
        settings = {"run__name": "second", "model__weights": str(first), "optim__lr": 1e-9, "seed": 1, **short}
        second = fit(tiny("patt_lite", tmp_path, **settings)).folder / "best.pth"
    before, after = (load(path).weights["network.classifier.weight"] for path in (first, second))
    assert torch.allclose(before, after, atol=1e-6)
