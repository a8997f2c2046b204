"""Pretrained weights: the model computes with those of the file, and what does not fit is an error."""

import argparse
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import mobilenet_v2
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.models import FaceModel, build, build_model, weights
from fer_dist.spec import LabelSet
from tests.helpers.tiny_models import ENCODER_SIZES, check_batch_independence, make_lively, pictures, tiny_model

SIZES: dict[str, Any] = {**ENCODER_SIZES, "image_size": 64}
HEADS = {"vit": "model.classifier", "vit_mae": "classifier"}
SMALL = "mobilenetv3_small_050"  # timm's smallest here


def load(arch: str, path: Path | None, **overrides: Any) -> FaceModel:
    config = Config().override({"model.arch": arch, **{f"model.{k}": v for k, v in overrides.items()}})
    config = config if path is None else config.override({"model.weights": str(path)})
    return build_model(config.model, 48, LabelSet()).eval()


# -- Hugging Face


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources as people have them: a ViT with 1000 classes, a ViTMAE with its decoder."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    decoder: dict[str, Any] = dict.fromkeys(("decoder_hidden_size", "decoder_intermediate_size"), 16)
    decoder |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    vit = ViTForImageClassification(ViTConfig(**SIZES | {"num_labels": 1000}))
    mae = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **decoder))
    for name, model in (("vit", vit), ("vit_mae", mae)):
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(root / name)
    names = load_file(root / "vit" / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names, "the names in Google's files on the hub"
    return {"vit": root / "vit", "vit_mae": root / "vit_mae"}


@pytest.mark.parametrize("arch", ["vit", "vit_mae"])
@pytest.mark.parametrize("image_size", [64, 96])
def test_parity_of_encoders_with_the_source(
    arch: str, image_size: int, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """[CLS] after the encoder is the source's, at 96 px with Hugging Face's own interpolation of positions.

    For MAE that shows that all patches are seen, in order.
    """
    torch.manual_seed(0)
    model = load(arch, folders[arch], image_size=None if image_size == 64 else image_size, freeze_depth=1)
    assert capfd.readouterr() == ("", "")
    assert not any(model.get_parameter(name).requires_grad for name in model.stages[1])
    assert model.spec.input.image_size == image_size, "64 is the folder's own size"
    assert model.spec.options["hidden_size"] == 32
    assert max(float(model.get_parameter(name).detach().std()) for name in model.head_names) < 0.03, "the head is new"
    pixels = model.preprocess(pictures(3))
    source = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)  # a plain ViT: free of our code
    kind: Any = ViTForImageClassification if arch == "vit" else ViTMAEForPreTraining
    source.load_state_dict(kind.from_pretrained(folders[arch]).vit.state_dict())
    with torch.no_grad():
        tokens_NTD = nn.Module.eval(source)(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        expected_NK = model.network.get_submodule(HEADS[arch])(tokens_NTD[:, 0])
        torch.testing.assert_close(model(pictures(3)), expected_NK, atol=1e-5, rtol=1e-5)
    check_batch_independence(make_lively(model))


def test_vit_mae_masks_nothing_in_training() -> None:
    """No noise, no shuffling: a pass in training mode agrees with evaluation and draws no random number."""
    model = make_lively(tiny_model("vit_mae"))
    with torch.no_grad():
        expected_NK = model(pictures(2))
        state = torch.get_rng_state()
        assert torch.equal(model.train()(pictures(2)), expected_NK)
        assert torch.equal(torch.get_rng_state(), state)


def test_mean_and_deviation_come_with_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    shown = load("vit", folder).spec.input
    assert (shown.mean, shown.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {  # file, its new content (None: gone), problem
    "truncated": ("model.safetensors", lambda raw: raw[:1000], "can be read safely"),
    "no weights": ("model.safetensors", lambda raw: None, "holds no model.safetensors or pytorch_model.bin"),
    "config is not JSON": ("config.json", lambda raw: b"{", "is not JSON"),
    "no config": ("config.json", lambda raw: None, "not a folder with a config.json"),
    "another architecture": ("config.json", lambda raw: raw.replace(b'"vit"', b'"bert"'), "holds a 'bert', expected"),
    "fewer blocks than it says": ("config.json", lambda raw: raw.replace(b'layers": 2', b'layers": 3'), "missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_is_refused(how: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    name, change, problem = DAMAGE[how]
    content = change((folder / name).read_bytes())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load("vit", folder)
    assert problem in caught.value.problem
    assert str(folder) in caught.value.problem


def test_options_that_contradict_the_weights_are_refused(folders: dict[str, Path]) -> None:
    for arch, options in (
        ("vit", {"hidden_size": 64}),
        ("vit", {"num_hidden_layers": 1}),
        ("vit_mae", {"num_hidden_layers": 3}),
    ):
        with pytest.raises(UserError, match="do not fit this network"):
            load(arch, folders[arch], options=options)


# -- where pretrained weights are looked for


@pytest.mark.parametrize(
    ("arch", "how"),
    [("vit", "off"), ("vit", "refused"), ("vit_mae", "off"), ("patt_lite", "refused"), ("timm:convnext_atto", "off")],
)
def test_offline_without_weights_is_one_quick_error(
    arch: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """HF_HUB_OFFLINE, or nobody at the other end: no retries, the three ways in one message."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    real = weights.out_of_reach  # at an address of this machine that nobody listens to
    monkeypatch.setattr(weights, "out_of_reach", lambda url: real(f"http://127.0.0.1:9/{url.split('//')[1]}"))
    if how == "refused":
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("used a client that retries"))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        tiny_model(arch, pretrained=True)
    assert time.monotonic() - start < 5
    ways = ("connect once", "--model.weights PATH", "--model.pretrained false")
    assert all(way in caught.value.fix for way in ways)
    assert capfd.readouterr() == ("", "")


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that drops packets looks like this: a connection, and never an answer."""
    monkeypatch.setattr(weights, "PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        assert "timed out" in str(weights.out_of_reach(f"http://127.0.0.1:{server.getsockname()[1]}/file"))
        assert time.monotonic() - start < 3


def test_download_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file: address stands for the network: a good file lands in the cache, one with a wrong hash does not."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    good, bad = tmp_path / "plain.pth", tmp_path / "tagged-0123456789.pth"
    for path in (good, bad):
        path.write_bytes(b"weights")
    assert weights.fetch_from_url(good.as_uri()).read_bytes() == b"weights"
    with pytest.raises(UserError, match="hash"):
        weights.fetch_from_url(bad.as_uri())
    assert not (tmp_path / "home" / "hub" / "checkpoints" / bad.name).exists()


def test_a_cached_hub_file_is_used_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache laid out as the hub's, and any use of the network an error."""
    repository = tmp_path / "models--google--vit-base-patch16-224"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    ViTForImageClassification(ViTConfig(**SIZES | {"image_size": 224})).save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "out_of_reach", lambda url: pytest.fail("used the network"))
    model = tiny_model("vit", pretrained=True, image_size=96)
    assert model.get_parameter("network.model.vit.embeddings.position_embeddings").shape == (1, 37, 32)


# -- torchvision and timm


def test_patt_lite_parity_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    source = mobilenet_v2()
    with torch.no_grad():
        source(torch.randn(4, 3, 64, 64))  # running statistics of its own
    source.eval()
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}}
    cached = tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth"
    cached.parent.mkdir(parents=True)
    torch.save(wrapped, cached)
    model = load("patt_lite", cached, pretrained=False, options={"cut": 10})
    pixels = model.preprocess(pictures(2))
    with torch.no_grad():
        found = model.network.get_submodule("features")(pixels)
        torch.testing.assert_close(found, source.features[:11](pixels), atol=0, rtol=0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weight = load("patt_lite", None).get_parameter("network.features.0.0.weight")
    assert torch.equal(weight, source.features[0][0].weight)


def test_real_mobilenet_weights(real_mobilenet: Path) -> None:
    model = load("patt_lite", real_mobilenet)
    statistics = model.get_buffer("network.features.13.conv.3.running_var")
    assert statistics.std() > 0, "not the ones of a new batch-norm"
    with torch.no_grad():
        assert model(pictures(4)).std() > 0


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_timm_parity_with_the_source(name: str, tmp_path: Path) -> None:
    """The features before the head are the source's; vit_tiny at 224 px, where no embedding is resized."""
    torch.manual_seed(6)
    source: Any = timm.create_model(name).eval()
    save_file(source.state_dict(), tmp_path / "source.pth")  # whatever its name, it is safetensors
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


def test_wrappings_of_training_scripts_are_taken_off(tmp_path: Path) -> None:
    state, other = {"a.weight": torch.ones(2)}, {"a.weight": torch.zeros(2)}
    for wrapped in (
        {"epoch": 3, "arch": "x", "state_dict": state, "metric": 0.5},
        {"state_dict": other, "state_dict_ema": state, "optimizer": {"state": {}, "param_groups": []}},
        {"model": other, "model_ema": state},
        {"model": state, "optimizer": None},
        {"module.a.weight": torch.ones(2)},  # DDP
        {"state_dict": {"_orig_mod.module.a.weight": torch.ones(2)}},  # compiled
    ):
        torch.save(wrapped, tmp_path / "source.pth")
        found = weights.read_state(tmp_path / "source.pth")
        assert found.keys() == state.keys()
        assert torch.equal(found["a.weight"], state["a.weight"])


@pytest.mark.parametrize(
    ("arch", "content", "message"),
    [
        ("patt_lite", b"junk", "can be read safely"),
        ("patt_lite", {"run": os.system}, "can be read safely"),
        ("patt_lite", [1, 2], "not a state dict"),
        ("patt_lite", {}, "not a state dict"),
        ("patt_lite", None, "there is no file"),
        ("patt_lite", {"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, "missing"),
        ("patt_lite", "width", "of another shape"),
        ("timm:convnext_atto", {"stem.0.weight": torch.zeros(1)}, "do not fit timm:convnext_atto"),
        # timm itself accepts an argparse.Namespace; it is not needed, and its attributes may be anything.
        (f"timm:{SMALL}", {"state_dict": {}, "args": argparse.Namespace(lr=0.1)}, "it names argparse.Namespace"),
    ],
)
def test_wrong_files_are_refused(arch: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "source.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(mobilenet_v2(width_mult=0.5).state_dict() if content == "width" else content, path)
    with pytest.raises(UserError) as caught:
        load(arch, path)
    assert message in caught.value.problem
    assert str(path) in caught.value.problem


def test_no_option_of_timm_loads_a_file() -> None:
    """Neither a setting nor the spec of an untrusted checkpoint may set one."""
    spec = tiny_model("timm:resnet18").spec
    for name in ("pretrained", "checkpoint_path", "pretrained_cfg_overlay", "pretrained_cfg", "cache_dir"):
        with pytest.raises(UserError, match=rf"model\.options\.{name} is not an option"):
            tiny_model("timm:resnet18", options={name: "x.pth"})
        with pytest.raises(UserError, match=rf"model\.options\.{name} is not an option"):
            build(replace(spec, options={**spec.options, name: "x.pth"}))
