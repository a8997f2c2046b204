"""freeze_depth means one thing everywhere."""

import pytest
import torch
from torch import nn

from fer_dist.errors import UserError
from fer_dist.models import FaceModel
from tests.helpers.tiny_models import ALL, pictures, tiny_model

STAGES: dict[str, tuple[int, tuple[str, ...], str]] = {  # depth, stem, second block
    "vit": (2, ("model.vit.embeddings.",), "model.vit.layers.1."),
    "vit_mae": (2, ("encoder.embeddings.",), "encoder.layers.1."),
    "patt_lite": (13, ("features.0.",), "features.2."),
    "timm:resnet18": (8, ("conv1.", "bn1."), "layer1.1."),
    "timm:convnext_atto": (12, ("stem.",), "stages.0.blocks.1."),
    "timm:mobilenetv3_small_100": (12, ("conv_stem.", "bn1."), "blocks.1.0."),
    "timm:vit_tiny_patch16_224": (12, ("cls_token", "pos_embed", "patch_embed."), "blocks.1."),
}
ALWAYS_FIXED = {"network.encoder.embeddings.position_embeddings"}  # ViTMAE's sines


def fixed(model: FaceModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad} - ALWAYS_FIXED


@pytest.mark.parametrize("arch", ALL)
def test_stages_and_what_each_depth_freezes(arch: str) -> None:
    model = tiny_model(arch)
    depth, stem, second = STAGES[arch]
    names = {name for name, _ in model.named_parameters()}
    listed = [name for stage in model.stages for name in stage]
    assert model.depth == depth
    assert len(listed) == len(set(listed)), "a parameter is in two stages"
    for starts, stage in ((stem, model.stages[0]), ((second,), model.stages[2])):
        assert {name for name in names if name.startswith(tuple(f"network.{s}" for s in starts))} == set(stage)
    assert fixed(model) == set()
    assert fixed(tiny_model(arch, freeze_depth=1)) == {*model.stages[0], *model.stages[1]} - ALWAYS_FIXED
    model.freeze(depth)
    assert fixed(model) == set(listed) - ALWAYS_FIXED
    assert model.head_names <= names - fixed(model)
    with pytest.raises(UserError, match=rf"freeze_depth is {depth + 1}.* has {depth} blocks"):
        model.freeze(depth + 1)


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
    for arch, head in (
        ("vit", "model.classifier.1"),
        ("vit_mae", "classifier"),
        ("timm:resnet18", "fc"),
        ("timm:convnext_atto", "head.fc"),
    ):
        assert tiny_model(arch).head_names == {f"network.{head}.weight", f"network.{head}.bias"}
    model = tiny_model("patt_lite")  # everything after the pretrained blocks is new
    stages = {name for stage in model.stages for name in stage}
    assert model.head_names == {name for name, _ in model.named_parameters()} - stages
