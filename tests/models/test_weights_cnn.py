"""Weights of torchvision and timm: the file is what the model computes with; what does not fit is an error."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import mobilenet_v2

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.models import FaceModel, build, build_model
from fer_dist.spec import LabelSet
from tests.helpers.tiny_models import pictures


def load(arch: str, path: Path | None, **overrides: Any) -> FaceModel:
    config = Config().override({"model.arch": arch}).override({f"model.{k}": v for k, v in overrides.items()})
    config = config if path is None else config.override({"model.weights": str(path)})
    return build_model(config.model, 48, LabelSet()).eval()


def mobilenet_state(seed: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    source = mobilenet_v2()
    with torch.no_grad():
        source.train()(torch.randn(4, 3, 64, 64))  # running statistics of its own
    state: dict[str, Tensor] = source.eval().state_dict()
    return state


def test_patt_lite_parity_with_torchvision(tmp_path: Path) -> None:
    state = mobilenet_state()
    torch.save(state, tmp_path / "mobilenet.pth")
    model = load("patt_lite", tmp_path / "mobilenet.pth", pretrained=False, options={"cut": 10})
    source = mobilenet_v2()
    source.load_state_dict(state)
    pixels = model.preprocess(pictures(2))
    with torch.no_grad():
        expected = source.eval().features[:11](pixels)
        torch.testing.assert_close(model.network.get_submodule("features")(pixels), expected, atol=0, rtol=0)


def test_patt_lite_from_torch_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = mobilenet_state()
    torch.save(state, tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth")
    model = load("patt_lite", None)
    assert torch.equal(model.get_parameter("network.features.0.0.weight"), state["features.0.0.weight"])


def test_real_mobilenet_weights(real_mobilenet: Path) -> None:
    model = load("patt_lite", real_mobilenet)
    statistics = model.get_buffer("network.features.13.conv.3.running_var")
    assert statistics.std() > 0, "not the ones of a new batch-norm"
    with torch.no_grad():
        assert model(pictures(4)).std() > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "can be read safely"),
        ({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, "missing"),
        ({"run": os.system}, "can be read safely"),
        ([1, 2], "not a state dict"),
        ("width", "of another shape"),
        (None, "there is no file"),
    ],
)
def test_wrong_files_for_patt_lite(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mobilenet.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "width":
        torch.save(mobilenet_v2(width_mult=0.5).state_dict(), path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as caught:
        load("patt_lite", path)
    assert message in caught.value.problem
    assert str(path) in caught.value.problem


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_timm_parity_with_the_source(name: str, tmp_path: Path) -> None:
    """The features before the head are the source's; vit_tiny at 224 px, where no embedding is resized."""
    torch.manual_seed(6)
    source: Any = timm.create_model(name).eval()
    torch.save(source.state_dict(), tmp_path / "source.pth")
    model = load(f"timm:{name}", tmp_path / "source.pth")
    network: Any = model.network
    pixels = model.preprocess(pictures(1))
    with torch.no_grad():
        expected = source.forward_head(source.forward_features(pixels), pre_logits=True)
        found = network.forward_head(network.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(found, expected)
    assert network.get_classifier().out_features == 7


def test_timm_resizes_position_embeddings(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "source.pth")
    model = load("timm:vit_tiny_patch16_224", tmp_path / "source.pth", image_size=64)
    assert model.get_parameter("network.pos_embed").shape == (1, 17, 192)


def wrapped(state: dict[str, Tensor], how: str) -> dict[str, Any]:
    """As training scripts save it: with more around it, and names as their wrappers call them."""
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    match how:
        case "timm":
            return {"epoch": 3, "arch": "x", "state_dict": state, "metric": 0.5}
        case "timm with EMA":
            return {"state_dict": other, "state_dict_ema": state, "optimizer": {"state": {}, "param_groups": []}}
        case "EMA of others":
            return {"model": other, "model_ema": state}
        case "model":
            return {"model": state, "optimizer": None}
        case "DDP":
            return {f"module.{name}": value for name, value in state.items()}
        case _:
            return {"state_dict": {f"_orig_mod.module.{name}": value for name, value in state.items()}}


@pytest.mark.parametrize("how", ["timm", "timm with EMA", "EMA of others", "model", "DDP", "compiled DDP"])
def test_checkpoints_of_training_scripts(how: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    torch.save(wrapped(source, how), tmp_path / "source.pth")
    model = load("timm:mobilenetv3_small_050", tmp_path / "source.pth", image_size=64)
    assert torch.equal(model.get_parameter("network.conv_stem.weight"), source["conv_stem.weight"])
    state = mobilenet_state()
    torch.save(wrapped(state, how), tmp_path / "mobilenet.pth")
    model = load("patt_lite", tmp_path / "mobilenet.pth")
    assert torch.equal(model.get_parameter("network.features.0.0.weight"), state["features.0.0.weight"])


def test_weights_of_safetensors(tmp_path: Path) -> None:
    """For each architecture, and under any name."""
    state = mobilenet_state()
    save_file(state, tmp_path / "mobilenet.pth")
    model = load("patt_lite", tmp_path / "mobilenet.pth")
    assert torch.equal(model.get_parameter("network.features.0.0.weight"), state["features.0.0.weight"])
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(source, tmp_path / "source.safetensors")
    model = load("timm:mobilenetv3_small_050", tmp_path / "source.safetensors", image_size=64)
    assert torch.equal(model.get_parameter("network.conv_stem.weight"), source["conv_stem.weight"])


def test_settings_of_a_training_script_are_refused(tmp_path: Path) -> None:
    """timm itself lets an argparse.Namespace pass; it is not needed, and its attributes may be anything."""
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "source.pth")
    with pytest.raises(UserError, match=r"it names argparse\.Namespace"):
        load("timm:mobilenetv3_small_050", tmp_path / "source.pth")


@pytest.mark.parametrize("content", [b"junk", {}, "resnet18", None])
def test_wrong_files_for_timm(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "source.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        state = timm.create_model("mobilenetv3_small_050").state_dict() if content == "resnet18" else content
        torch.save(state, path)
    with pytest.raises(UserError) as caught:
        load("timm:convnext_atto", path)
    assert str(path) in caught.value.problem


@pytest.mark.parametrize(
    "name", ["pretrained", "checkpoint_path", "pretrained_cfg_overlay", "pretrained_cfg", "cache_dir"]
)
def test_timm_loads_no_file_by_an_option(name: str, tmp_path: Path) -> None:
    """Neither by a setting nor by the spec of a stranger's checkpoint."""
    value = {"file": str(tmp_path / "x.pth"), "url": "http://127.0.0.1:9/x"} if name.endswith("overlay") else "x.pth"
    with pytest.raises(UserError, match=rf"model\.options\.{name} is not an option"):
        load("timm:resnet18", None, pretrained=False, options={name: value})
    spec = load("timm:resnet18", None, pretrained=False, image_size=64).spec
    with pytest.raises(UserError, match=rf"model\.options\.{name} is not an option"):
        build(replace(spec, options={**spec.options, name: value}))
