"""freeze_depth means one thing everywhere."""

import pytest
import torch
from torch import nn

from fer_dist.errors import UserError
from fer_dist.models import FaceModel
from tests.helpers.tiny_models import ALL, pictures, tiny_model

STAGES: dict[str, tuple[int, list[str], str, list[str]]] = {  # depth, stem, second block, head
    "vit": (2, ["model.vit.embeddings."], "model.vit.layers.1.", ["model.classifier."]),
    "vit_mae": (2, ["encoder.embeddings."], "encoder.layers.1.", ["classifier."]),
    "patt_lite": (13, ["features.0."], "features.2.", ["patches.", "attention.", "norm.", "classifier."]),
    "timm:resnet18": (8, ["conv1.", "bn1."], "layer1.1.", ["fc."]),
    "timm:convnext_atto": (12, ["stem."], "stages.0.blocks.1.", ["head.fc."]),
    "timm:mobilenetv3_small_100": (12, ["conv_stem.", "bn1."], "blocks.1.0.", ["classifier."]),
    "timm:vit_tiny_patch16_224": (12, ["cls_token", "pos_embed", "patch_embed."], "blocks.1.", ["head."]),
}
ALWAYS_FIXED = {"network.encoder.embeddings.position_embeddings"}  # ViTMAE's sines


def fixed(model: FaceModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad} - ALWAYS_FIXED


@pytest.mark.parametrize("arch", ALL)
def test_stages_head_and_what_each_depth_freezes(arch: str) -> None:
    model = tiny_model(arch)
    depth, stem, second, head = STAGES[arch]
    names = {name for name, _ in model.named_parameters()}
    listed = [name for stage in model.stages for name in stage]
    assert model.depth == depth
    assert len(listed) == len(set(listed)), "a parameter is in two stages"
    for starts, members in ((stem, model.stages[0]), ([second], model.stages[2]), (head, model.head_names)):
        assert {name for name in names if name.startswith(tuple(f"network.{start}" for start in starts))} == set(
            members
        )
    assert fixed(model) == set()
    model.freeze(depth)
    assert fixed(model) == set(listed) - ALWAYS_FIXED
    with pytest.raises(UserError, match=rf"freeze_depth is {depth + 1}.* has {depth} blocks"):
        model.freeze(depth + 1)
    model = tiny_model(arch, freeze_depth=1)
    assert fixed(model) == {*model.stages[0], *model.stages[1]} - ALWAYS_FIXED
    model(pictures(4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


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
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, module in norms.items():
        assert module.training is (name not in frozen), name
        moved = not torch.equal(before[f"{name}.running_mean"], module.get_buffer("running_mean"))
        assert moved is (name not in frozen), name
    assert len(frozen & norms.keys()) >= 3
