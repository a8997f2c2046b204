"""freeze_depth means one thing everywhere."""

import pytest
import torch
from torch import nn

from fer_dist.errors import UserError
from fer_dist.models import FaceModel
from tests.helpers.tiny_models import ALL, pictures, tiny_model

DEPTHS = {
    "vit": 2,
    "vit_mae": 2,
    "patt_lite": 13,
    "timm:resnet18": 8,
    "timm:convnext_atto": 12,
    "timm:mobilenetv3_small_100": 12,
    "timm:vit_tiny_patch16_224": 12,
}
STEMS: dict[str, str | tuple[str, ...]] = {
    "vit": "network.model.vit.embeddings.",
    "vit_mae": "network.encoder.embeddings.",
    "patt_lite": "network.features.0.",
    "timm:resnet18": ("network.conv1.", "network.bn1."),
    "timm:convnext_atto": "network.stem.",
    "timm:mobilenetv3_small_100": ("network.conv_stem.", "network.bn1."),
    "timm:vit_tiny_patch16_224": ("network.cls_token", "network.pos_embed", "network.patch_embed."),
}
SECOND_BLOCK = {
    "vit": "network.model.vit.layers.1.",
    "vit_mae": "network.encoder.layers.1.",
    "patt_lite": "network.features.2.",
    "timm:resnet18": "network.layer1.1.",
    "timm:convnext_atto": "network.stages.0.blocks.1.",
    "timm:mobilenetv3_small_100": "network.blocks.1.0.",
    "timm:vit_tiny_patch16_224": "network.blocks.1.",
}
ALWAYS_FIXED = {"network.encoder.embeddings.position_embeddings"}  # ViTMAE's sines


def fixed(model: FaceModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad} - ALWAYS_FIXED


@pytest.mark.parametrize("arch", ALL)
def test_stages_are_what_they_should_be(arch: str) -> None:
    model = tiny_model(arch)
    assert model.depth == DEPTHS[arch]
    assert all(name.startswith(STEMS[arch]) for name in model.stages[0])
    assert all(name.startswith(SECOND_BLOCK[arch]) for name in model.stages[2])
    names = [name for name, _ in model.named_parameters()]
    listed = [name for stage in model.stages for name in stage]
    assert len(listed) == len(set(listed)), "a parameter is in two stages"
    assert {name for name in names if name.startswith(STEMS[arch])} == set(model.stages[0])
    assert {name for name in names if name.startswith(SECOND_BLOCK[arch])} == set(model.stages[2])


@pytest.mark.parametrize("arch", ALL)
def test_depths(arch: str) -> None:
    assert fixed(tiny_model(arch)) == set()
    model = tiny_model(arch, freeze_depth=1)
    assert fixed(model) == {*model.stages[0], *model.stages[1]} - ALWAYS_FIXED
    model.freeze(model.depth)
    assert fixed(model) == {name for stage in model.stages for name in stage} - ALWAYS_FIXED
    parameters = dict(model.named_parameters())
    assert all(parameters[name].requires_grad for name in model.head_names)
    with pytest.raises(UserError, match=rf"freeze_depth is {model.depth + 1}.* has {model.depth} blocks"):
        model.freeze(model.depth + 1)


@pytest.mark.parametrize("arch", ["patt_lite", "timm:resnet18", "timm:mobilenetv3_small_100"])
def test_frozen_batch_norm_stays_in_evaluation_mode(arch: str) -> None:
    model = tiny_model(arch, freeze_depth=2)
    assert model.training
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.eval()
    model.train()
    with torch.no_grad():
        model(pictures(4))
    frozen = {name.rsplit(".", 1)[0] for stage in model.stages[:3] for name in stage}
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training is (name not in frozen), name
            moved = not torch.equal(before[f"{name}.running_mean"], module.get_buffer("running_mean"))
            assert moved is (name not in frozen), name
            checked += name in frozen
    assert checked >= 3


def test_frozen_parameters_get_no_gradient_and_the_head_does() -> None:
    for arch in ("vit", "vit_mae", "patt_lite"):
        model = tiny_model(arch, freeze_depth=2)
        model(pictures(4)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) is parameter.requires_grad, name


def test_head_names() -> None:
    assert tiny_model("vit").head_names == {f"network.model.classifier.1.{n}" for n in ("weight", "bias")}
    assert tiny_model("vit_mae").head_names == {f"network.classifier.{n}" for n in ("weight", "bias")}
    assert tiny_model("timm:resnet18").head_names == {f"network.fc.{n}" for n in ("weight", "bias")}
    assert tiny_model("timm:convnext_atto").head_names == {f"network.head.fc.{n}" for n in ("weight", "bias")}
    model = tiny_model("patt_lite")  # everything after the pretrained blocks is new
    stages = {name for stage in model.stages for name in stage}
    assert model.head_names == {name for name, _ in model.named_parameters()} - stages
