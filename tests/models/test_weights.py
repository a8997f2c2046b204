"""Pretrained weights: the model computes with those of the file, and what does not fit is an error."""

import argparse
import json
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.models import FaceModel, build, build_model, build_spec, weights
from fer_dist.spec import LabelSet
from tests.helpers.tiny_models import (
    ENCODER_SIZES,
    TINY,
    check_batch_independence,
    make_lively,
    pictures,
    tiny_config,
    tiny_model,
)

SIZES: dict[str, Any] = {**ENCODER_SIZES, "image_size": 64}
DECODER: dict[str, Any] = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
MANY_LABELS: dict[str, Any] = {"num_labels": 1000}
HEADS = {"vit": "model.classifier", "vit_mae": "classifier"}
SMALL = "mobilenetv3_small_050"  # timm's smallest here


# -- Hugging Face


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources as people have them: a ViT with 1000 classes, a ViTMAE with its decoder."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    vit = ViTForImageClassification(ViTConfig(**SIZES, **MANY_LABELS))
    mae = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **DECODER))
    for name, model in (("vit", vit), ("vit_mae", mae)):
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(root / name)
    return {"vit": root / "vit", "vit_mae": root / "vit_mae"}


def load(arch: str, path: Path | str | None, **overrides: Any) -> FaceModel:
    config = Config().override({"model.arch": arch}).override({f"model.{k}": v for k, v in overrides.items()})
    config = config if path is None else config.override({"model.weights": str(path)})
    return build_model(config.model, 48, LabelSet()).eval()


def plain_vit(arch: str, folder: Path) -> nn.Module:
    """The source encoder as a plain ViT without pooling: what the weights mean, free of our code."""
    torch.manual_seed(4)
    vit = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)
    kind: Any = ViTForImageClassification if arch == "vit" else ViTMAEForPreTraining
    vit.load_state_dict(kind.from_pretrained(folder).vit.state_dict())
    return nn.Module.eval(vit)


@pytest.mark.parametrize("arch", ["vit", "vit_mae"])
@pytest.mark.parametrize("image_size", [64, 96])
def test_parity_of_encoders_with_the_source(arch: str, image_size: int, folders: dict[str, Path]) -> None:
    """[CLS] after the encoder is the source's, at 96 px with Hugging Face's own interpolation of positions.

    For MAE that shows that all patches are seen, in order.
    """
    model = load(arch, folders[arch], image_size=None if image_size == 64 else image_size)
    assert model.spec.input.image_size == image_size, "64 is the folder's own size"
    assert model.spec.options["hidden_size"] == 32
    pixels = model.preprocess(pictures(3))
    torch.manual_seed(4)
    source = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)  # a plain ViT: free of our code
    kind: Any = ViTForImageClassification if arch == "vit" else ViTMAEForPreTraining
    source.load_state_dict(kind.from_pretrained(folders[arch]).vit.state_dict())
    with torch.no_grad():
        tokens_NTD = nn.Module.eval(source)(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        expected_NK = model.network.get_submodule(HEADS[arch])(tokens_NTD[:, 0])
        torch.testing.assert_close(model(pictures(3)), expected_NK, atol=1e-5, rtol=1e-5)


def test_google_style_names_are_in_the_file(folders: dict[str, Path]) -> None:
    """The files on the hub use these names; only with them do the parity tests speak for those files."""
    with (folders["vit"] / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in header


def test_vit_mae_sees_every_patch_in_training_as_in_evaluation() -> None:
    """No noise, no shuffling: two passes in training mode agree with evaluation and draw no random number."""
    model = make_lively(tiny_model("vit_mae"))
    with torch.no_grad():
        calm = model(pictures(2))
        model.train()
        state = torch.get_rng_state()
        assert torch.equal(model(pictures(2)), calm)
        assert torch.equal(torch.get_rng_state(), state)
    images = pictures(1).float().requires_grad_()
    model(images).sum().backward()
    assert images.grad is not None
    by_patch = images.grad.abs().reshape(4, 12, 4, 12).sum(dim=(1, 3))
    assert (by_patch > 0).all(), "a patch without influence was masked"


@pytest.mark.parametrize("arch", ["vit", "vit_mae"])
def test_the_head_stays_new_and_loading_is_silent(
    arch: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = load(arch, folders[arch], freeze_depth=1)
    assert capfd.readouterr() == ("", "")
    head = {name for name, _ in model.named_parameters() if name.startswith(f"network.{HEADS[arch]}.")}
    assert head == model.head_names
    assert max(float(model.get_parameter(name).detach().std()) for name in head) < 0.03
    assert not any(model.get_parameter(name).requires_grad for stage in model.stages[:2] for name in stage)
    check_batch_independence(make_lively(model))


def test_mean_and_deviation_come_with_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    shown = build_spec(Config().override({"model.arch": "vit", "model.weights": str(folder)}).model, 48, LabelSet())
    assert (shown.input.mean, shown.input.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


BAD_FOLDERS = {
    "truncated": "can be read safely",
    "no weights": "holds no model.safetensors or pytorch_model.bin",
    "unsafe pickle": "it names posix.system",
    "config is not JSON": "is not JSON",
    "no config": "not a folder with a config.json",
    "another architecture": "holds a 'bert', expected",
    "fewer blocks than it says": "missing",
}


@pytest.mark.parametrize(
    ("arch", "how"), [*(("vit", how) for how in BAD_FOLDERS), ("vit_mae", "no config"), ("vit_mae", "truncated")]
)
def test_a_damaged_folder_is_refused(arch: str, how: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[arch], tmp_path / arch)
    file, config = folder / "model.safetensors", folder / "config.json"
    match how:
        case "truncated":
            file.write_bytes(file.read_bytes()[:1000])
        case "no weights":
            file.unlink()
        case "unsafe pickle":
            file.unlink()
            torch.save({"run": os.system}, folder / "pytorch_model.bin")
        case "config is not JSON":
            config.write_text("{")
        case "no config":
            config.unlink()
        case "another architecture":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
        case "fewer blocks than it says":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(UserError) as caught:
        load(arch, folder)
    assert BAD_FOLDERS[how] in caught.value.problem
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
    config = tiny_config(arch) if arch in TINY else Config().override({"model.arch": arch})
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        build_model(config.override({"model.pretrained": True}).model, 48, LabelSet())
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
    good = tmp_path / "plain.pth"
    good.write_bytes(b"weights")
    assert weights.fetch_from_url(good.as_uri()).read_bytes() == b"weights"
    bad = tmp_path / "tagged-0123456789.pth"
    bad.write_bytes(b"weights")
    with pytest.raises(UserError, match="hash"):
        weights.fetch_from_url(bad.as_uri())
    assert not (tmp_path / "home" / "hub" / "checkpoints" / bad.name).exists()


def test_a_cached_hub_file_is_used_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache laid out as the hub's, and any use of the network an error."""
    snapshot = tmp_path / "models--google--vit-base-patch16-224" / "snapshots" / ("0" * 40)
    ViTForImageClassification(ViTConfig(**(SIZES | MANY_LABELS | {"image_size": 224}))).save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "out_of_reach", lambda url: pytest.fail("used the network"))
    options = {name: value for name, value in SIZES.items() if name != "image_size"}
    model = load("vit", None, options=options, image_size=96)
    assert model.get_parameter("network.model.vit.embeddings.position_embeddings").shape == (1, 37, 32)


# -- torchvision and timm


def mobilenet_state(seed: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    source = mobilenet_v2()
    with torch.no_grad():
        source.train()(torch.randn(4, 3, 64, 64))  # running statistics of its own
    state: dict[str, Tensor] = source.eval().state_dict()
    return state


def test_patt_lite_parity_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = mobilenet_state()
    cached = tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth"
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    model = load("patt_lite", cached, pretrained=False, options={"cut": 10})
    source = mobilenet_v2()
    source.load_state_dict(state)
    pixels = model.preprocess(pictures(2))
    with torch.no_grad():
        expected = source.eval().features[:11](pixels)
        torch.testing.assert_close(model.network.get_submodule("features")(pixels), expected, atol=0, rtol=0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = load("patt_lite", None)
    assert torch.equal(model.get_parameter("network.features.0.0.weight"), state["features.0.0.weight"])


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


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_wrapped_and_safetensors_weights_are_loaded(kind: str, tmp_path: Path) -> None:
    """By each architecture, and under any name."""
    mobilenet, small = mobilenet_state(), timm.create_model(SMALL).state_dict()
    for arch, state, name in (("patt_lite", mobilenet, "features.0.0"), (f"timm:{SMALL}", small, "conv_stem")):
        path = tmp_path / "source.pth"
        if kind == "checkpoint":
            torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
        else:
            save_file(state, path)
        model = load(arch, path)
        assert torch.equal(model.get_parameter(f"network.{name}.weight"), state[f"{name}.weight"])


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
        ("timm:convnext_atto", b"junk", "can be read safely"),
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


def test_no_option_of_timm_loads_a_file(tmp_path: Path) -> None:
    """Neither a setting nor the spec of an untrusted checkpoint may set one."""
    spec = load("timm:resnet18", None, pretrained=False, image_size=64).spec
    overlay = {"file": str(tmp_path / "x.pth"), "url": "http://127.0.0.1:9/x"}
    for name in ("pretrained", "checkpoint_path", "pretrained_cfg_overlay", "pretrained_cfg", "cache_dir"):
        value = overlay if name.endswith("overlay") else "x.pth"
        with pytest.raises(UserError, match=rf"model\.options\.{name} is not an option"):
            load("timm:resnet18", None, pretrained=False, options={name: value})
        with pytest.raises(UserError, match=rf"model\.options\.{name} is not an option"):
            build(replace(spec, options={**spec.options, name: value}))
