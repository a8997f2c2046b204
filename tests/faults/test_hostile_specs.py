"""A checkpoint with a right checksum and plain values, which lies about its model: a clear error, and no memory."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fer_dist.engine.checkpoint import Checkpoint, load, save
from fer_dist.errors import UserError
from fer_dist.spec import ModelSpec
from tests.engine.test_checkpoint import write
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a checkpoint of a tiny patt_lite holds."""
    model, path = tiny_model("patt_lite"), tmp_path_factory.mktemp("spec") / "x.pth"
    made = Checkpoint(spec=model.spec, weights=dict(model.state_dict()), config={}, record={}, provenance={})
    save(path, made)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change: the value at a path."""

    def change(tree: dict[str, Any]) -> None:
        for name in path[:-1]:
            tree = tree[name]
        tree[path[-1]] = value

    return change


FOREIGN = {
    "arch is a number": put("spec", "arch", value=3),
    "no labels": put("spec", "labels", value=[]),
    "labels twice": put("spec", "labels", value=["a", "a"]),
    "labels are numbers": put("spec", "labels", value=[1, 2]),
    "a million labels": put("spec", "labels", value=[str(i) for i in range(1_000_000)]),
    "size of a terabyte": put("spec", "input", "size", value=10**6),
    "size is true": put("spec", "input", "size", value=True),
    "image size is text": put("spec", "input", "image_size", value="48"),
    "mean is text": put("spec", "input", "mean", value="0.5"),
    "mean is not finite": put("spec", "input", "mean", value=[0.5, 0.5, float("nan")]),
    "deviation is zero": put("spec", "input", "std", value=[0.0, 1.0, 1.0]),
    "another field": put("spec", "input", "more", value=1),
    "smoothing is text": put("spec", "smoothing", value="0.1"),
    "smoothing is all": put("spec", "smoothing", value=1.0),
    "smoothing is below zero": put("spec", "smoothing", value=-0.1),
    "smoothing is no number": put("spec", "smoothing", value=float("nan")),
    "temperature is text": put("spec", "temperature", value="1.0"),
    "temperature is true": put("spec", "temperature", value=True),
    "temperature is zero": put("spec", "temperature", value=0.0),
    "temperature is below zero": put("spec", "temperature", value=-1.0),
    "temperature is no number": put("spec", "temperature", value=float("nan")),
    "temperature is infinite": put("spec", "temperature", value=float("inf")),
    "temperature melts": put("spec", "temperature", value=1e30),
    "options are a list": put("spec", "options", value=[1]),
    "options without names": put("spec", "options", value={1: 2}),
    "spec is text": put("spec", value="patt_lite"),
    "weights are a number": put("weights", value=7),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_none_of_ours_is_not_loaded(kind: str, content: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(content)
    FOREIGN[kind](changed)
    write(changed, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"is not a checkpoint of fer_dist|is damaged or not a checkpoint"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [torch.zeros(2), torch.tensor(2), [2], True, 2.0, "2" * 1000])
def test_a_format_that_is_no_number(value: Any, content: dict[str, Any], tmp_path: Path) -> None:
    write({**content, "format": value}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"has format .{1,20}, this version reads 2"):
        load(tmp_path / "x.pth")


UNFIT = {
    "an option of 10^4": (put("spec", "options", "width_mult", value=1e4), "width_mult is 10000.0, expected at most 8"),
    "an option of 10^9": (
        put("spec", "options", "separable", value=10**9),
        "separable is 1000000000, expected",
    ),
    "channels": (put("spec", "options", "channels", value=2**40), "expected at most 8192"),
    "an option is text": (put("spec", "options", "cut", value="13"), "model.options.cut is '13', expected int"),
    "an option is missing": (put("spec", "options", value={"dropout": 0.0}), "do not fit its own architecture"),
    "dropout is missing": (put("spec", "options", value={}), "do not fit its own architecture"),
    "dropout is text": (put("spec", "options", "dropout", value="much"), "do not fit its own architecture"),
    "another architecture": (put("spec", "arch", value="vitt"), "unknown architecture 'vitt'"),
    "of timm, which loads files": (
        lambda tree: tree["spec"].update(arch="timm:resnet18", options={"checkpoint_path": "/etc/x", "dropout": 0}),
        "model.options.checkpoint_path is not an option",
    ),
    "a weight that is none": (put("weights", "network.norm.bias", value="text"), "its weights has another form"),
    "a weight of another type": (
        put("weights", "network.norm.bias", value=torch.zeros(32, dtype=torch.complex64)),
        "do not fit its own architecture",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_not_built(kind: str, content: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(content)
    change, message = UNFIT[kind]
    change(changed)
    write(changed, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "x.pth").model()
    assert caught.value.fix


def test_a_spec_of_before_has_no_calibration(content: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(content)
    assert (changed["spec"].pop("temperature"), changed["spec"].pop("smoothing")) == (1.0, 0.0)
    write(changed, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").spec == tiny_model("patt_lite").spec


def test_ours_comes_back(content: dict[str, Any], tmp_path: Path) -> None:
    write(content, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").spec == ModelSpec.from_dict(content["spec"]) == tiny_model("patt_lite").spec
    load(tmp_path / "x.pth").model()
