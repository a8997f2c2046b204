"""Weights of Hugging Face encoders, and where pretrained weights are looked for."""

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.models import FaceModel, build_model, build_spec, weights
from fer_dist.spec import LabelSet
from tests.helpers.tiny_models import TINY, check_batch_independence, make_lively, pictures, tiny_config, tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "patch_size": 16,
    "image_size": 64,
}
DECODER: dict[str, Any] = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
MANY_LABELS: dict[str, Any] = {"num_labels": 1000}
HEADS = {"vit": "network.model.classifier.", "vit_mae": "network.classifier."}


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
def test_parity_with_the_source(arch: str, folders: dict[str, Path]) -> None:
    """[CLS] after the encoder is the source's; for MAE that shows all patches are seen, in order."""
    model = load(arch, folders[arch])
    assert model.spec.input.image_size == 64, "the folder's own size"
    assert model.spec.options["hidden_size"] == 32
    pixels = model.preprocess(pictures(3))
    head = model.network.get_submodule("model.classifier" if arch == "vit" else "classifier")
    with torch.no_grad():
        cls_ND = plain_vit(arch, folders[arch])(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(model(pictures(3)), head(cls_ND), atol=1e-5, rtol=1e-5)


def test_google_style_names_are_in_the_file(folders: dict[str, Path]) -> None:
    """The files on the hub use these names; only with them do the parity tests speak for those files."""
    with (folders["vit"] / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in header


@pytest.mark.parametrize("arch", ["vit", "vit_mae"])
def test_position_embeddings_are_interpolated(arch: str, folders: dict[str, Path]) -> None:
    """At 96 px the model computes what the source computes with Hugging Face's own interpolation."""
    model = load(arch, folders[arch], image_size=96)
    pixels = model.preprocess(pictures(2))
    assert pixels.shape[-1] == 96
    head = model.network.get_submodule("model.classifier" if arch == "vit" else "classifier")
    source = plain_vit(arch, folders[arch])
    with torch.no_grad():
        cls_ND = source(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        torch.testing.assert_close(model(pictures(2)), head(cls_ND), atol=1e-5, rtol=1e-5)


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
def test_the_head_stays_new_and_frozen_stays_frozen(arch: str, folders: dict[str, Path]) -> None:
    torch.manual_seed(0)
    model = load(arch, folders[arch], freeze_depth=1)
    names = {name for name, _ in model.named_parameters() if name.startswith(HEADS[arch])}
    assert names == model.head_names
    assert float(model.get_parameter(f"{HEADS[arch]}{'1.' if arch == 'vit' else ''}weight").detach().std()) < 0.03
    assert not any(model.get_parameter(name).requires_grad for stage in model.stages[:2] for name in stage)
    check_batch_independence(make_lively(load(arch, folders[arch])))


def test_loading_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load("vit", folders["vit"])
    load("vit_mae", folders["vit_mae"])
    assert capfd.readouterr() == ("", "")


def test_mean_and_deviation_come_with_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    shown = build_spec(Config().override({"model.arch": "vit", "model.weights": str(folder)}).model, 48, LabelSet())
    assert (shown.input.mean, shown.input.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def spoil(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    match how:
        case "truncated":
            file.write_bytes(file.read_bytes()[:1000])
        case "not weights":
            file.write_bytes(b"junk")
        case "no weights":
            file.unlink()
        case "unsafe pickle":
            file.unlink()
            torch.save({"run": os.system}, folder / "pytorch_model.bin")
        case "config is not JSON":
            (folder / "config.json").write_text("{")
        case "no config":
            (folder / "config.json").unlink()
        case "another architecture":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
        case "fewer blocks than it says":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "can be read safely"),
        ("not weights", "can be read safely"),
        ("no weights", "holds no model.safetensors or pytorch_model.bin"),
        ("unsafe pickle", "it names posix.system"),
        ("config is not JSON", "is not JSON"),
        ("no config", "not a folder with a config.json"),
        ("another architecture", "holds a 'bert', expected"),
        ("fewer blocks than it says", "missing"),
    ],
)
@pytest.mark.parametrize("arch", ["vit", "vit_mae"])
def test_spoiled_folders(arch: str, how: str, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[arch], tmp_path / arch)
    spoil(folder, how)
    with pytest.raises(UserError) as caught:
        load(arch, folder)
    assert message in caught.value.problem
    assert str(folder) in caught.value.problem


@pytest.mark.parametrize("options", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_options_that_contradict_the_weights(options: dict[str, Any], folders: dict[str, Path]) -> None:
    for arch in ("vit", "vit_mae"):
        with pytest.raises(UserError, match="do not fit this network"):
            load(arch, folders[arch], options=options)


THREE_WAYS = ("connect once", "--model.weights PATH", "--model.pretrained false")


@pytest.mark.parametrize("arch", ["vit", "vit_mae", "patt_lite", "timm:convnext_atto"])
@pytest.mark.parametrize("how", ["switched off", "refused"])
def test_offline_without_weights_is_one_quick_error(
    arch: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """HF_HUB_OFFLINE, or nobody at the other end: no retries, the three ways in one message."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "out_of_reach", lambda url, ask=weights.out_of_reach: ask(nowhere(url)))
    if how == "refused":
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    retries = "asked a client that retries for a minute"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: pytest.fail(retries))
    config = (tiny_config(arch) if arch in TINY else Config().override({"model.arch": arch})).override(
        {"model.pretrained": True}
    )
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        build_model(config.model, 48, LabelSet())
    assert time.monotonic() - start < 5
    assert all(way in caught.value.fix for way in THREE_WAYS)
    assert capfd.readouterr() == ("", "")


def nowhere(url: str) -> str:
    """The same address on a port of this machine that nobody listens to."""
    return f"http://127.0.0.1:9/{url.split('//')[1]}"


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


def test_a_cached_hub_file_is_used_without_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache laid out as the hub's, and any question to the network an error."""
    snapshot = tmp_path / "models--google--vit-base-patch16-224" / "snapshots" / ("0" * 40)
    ViTForImageClassification(ViTConfig(**(SIZES | MANY_LABELS | {"image_size": 224}))).save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "out_of_reach", lambda url: pytest.fail("asked the network"))
    options = {name: value for name, value in SIZES.items() if name != "image_size"}
    model = load("vit", None, options=options, image_size=96)
    assert model.get_parameter("network.model.vit.embeddings.position_embeddings").shape == (1, 37, 32)
