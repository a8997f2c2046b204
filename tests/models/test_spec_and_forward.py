"""What a spec resolves to, what a model computes first, and that a spec is enough to build it again."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.models import build, build_spec
from fer_dist.models.base import Preprocess, unsmoothed
from fer_dist.spec import IMAGENET_MEAN, IMAGENET_STD, InputSpec, LabelSet, ModelSpec
from tests.helpers.tiny_models import ALL, TINY, check_batch_independence, make_lively, pictures, tiny_model

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("arch", "image_size", "mean", "std"),
    [
        ("vit", 224, HALF, HALF),
        ("vit_mae", 224, IMAGENET_MEAN, IMAGENET_STD),
        ("patt_lite", 96, IMAGENET_MEAN, IMAGENET_STD),
        ("timm:resnet18", 224, IMAGENET_MEAN, IMAGENET_STD),
        ("timm:vit_tiny_patch16_224", 224, HALF, HALF),
        ("timm:mobilenetv3_large_100.miil_in21k", 224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_input_of_each_backbone(arch: str, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    spec = build_spec(Config().override({"model.arch": arch}).model, 48, LabelSet())
    assert (spec.input.size, spec.input.image_size, spec.input.mean, spec.input.std) == (48, image_size, mean, std)


@pytest.mark.parametrize(("arch", "count"), [("vit", 85_804_039), ("vit_mae", 85_804_039), ("patt_lite", 900_199)])
def test_full_size_networks(arch: str, count: int) -> None:
    """On the meta device: the shapes without the memory."""
    with torch.device("meta"):
        model = build(build_spec(Config().override({"model.arch": arch}).model, 48, LabelSet()))
        assert model.eval()(torch.zeros(2, 1, 48, 48, dtype=torch.uint8)).shape == (2, 7)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("arch", ALL)
def test_a_model_is_built_again_from_its_spec(arch: str) -> None:
    model = make_lively(tiny_model(arch, dropout=0.5))
    again = build(ModelSpec.from_dict(json.loads(json.dumps(model.spec.to_dict()))))
    assert again.spec == model.spec
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits_NK = model(pictures(3))
        assert torch.equal(again.eval()(pictures(3)), logits_NK)
        assert torch.equal(model(pictures(3).float()), logits_NK), "uint8 and float pictures differ"
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        model.network.training = True  # timm's own switch for dropout
        assert not torch.allclose(logits_NK, model(pictures(3))), "the head has no dropout"


@pytest.mark.parametrize("arch", TINY)
def test_other_precisions_and_sizes(arch: str) -> None:
    """The size of the stored pictures is free: the model brings them to its own."""
    first, second = (tiny_model(arch).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "weights must come from torch's generator"
    model = make_lively(tiny_model(arch))
    with torch.no_grad():
        for size in (16, 64):
            assert model(pictures(2, size)).shape == (2, 7)
        single_NK = model(pictures(3))
        double_NK = model.double()(pictures(3))
        assert double_NK.dtype == torch.float64
        torch.testing.assert_close(double_NK.float(), single_NK, atol=1e-4, rtol=1e-4)
        half_NK = model.half()(pictures(3))
        assert half_NK.dtype == torch.float16
        torch.testing.assert_close(half_NK.float(), single_NK, atol=0.2, rtol=0.05)
        assert model(pictures(3, 96)).isfinite().all(), "reduced with antialiasing, which CPUs lack in half precision"


@pytest.mark.parametrize(("size", "image_size"), [(48, 96), (48, 48), (96, 48)])
def test_preprocessing(size: int, image_size: int) -> None:
    """Against the plain formula: resize, scale to 0..1, repeat, normalise."""
    spec = InputSpec(size=size, image_size=image_size)
    x_N1SS = pictures(2, size)
    pixels_N3HW = Preprocess(spec)(x_N1SS)
    resized = F.interpolate(
        x_N1SS.double(), size=(image_size, image_size), mode="bilinear", antialias=size > image_size
    )
    mean, std = (torch.tensor(value).double().view(3, 1, 1) for value in (spec.mean, spec.std))
    expected = (resized / 255 - mean) / std
    assert pixels_N3HW.dtype == torch.float32
    assert not Preprocess(spec).state_dict(), "mean and deviation follow from the spec, not from the weights"
    torch.testing.assert_close(pixels_N3HW.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["vit", "vit_mae"])
def test_encoders_know_the_labels_and_compute_attention_either_way(arch: str) -> None:
    model = make_lively(tiny_model(arch))
    inner: Any = model.network.get_submodule("model" if arch == "vit" else "encoder")
    assert inner.config.id2label == dict(enumerate(LabelSet().names))
    assert inner.config._attn_implementation == "sdpa"
    with torch.no_grad():
        before = model(pictures(2))
        model.set_attn_implementation("eager")
        assert inner.config._attn_implementation == "eager"
        torch.testing.assert_close(model(pictures(2)), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.arch": "vti"}, "did you mean --model.arch vit"),
        ({"model.arch": "timm:resnet81"}, "did you mean --model.arch timm:resnet18"),
        ({"model.arch": "timm:resnet18.nothing"}, "no network called 'resnet18.nothing'"),
        ({"model.arch": "vit", "model.options.hiden_size": 64}, "did you mean 'hidden_size'"),
        ({"model.arch": "vit_mae", "model.options.dropout": 0.1}, "--model.dropout"),
        ({"model.arch": "vit", "model.options.hidden_size": "wide"}, "expected int such as 768"),
        ({"model.arch": "vit", "model.options.hidden_size": 0}, "at least 1"),
        ({"model.arch": "vit", "model.options.hidden_size": 100}, "not a multiple of num_attention_heads = 12"),
        ({"model.arch": "vit", "model.options.hidden_act": "gelo"}, "hidden_act is 'gelo'"),
        ({"model.arch": "vit", "model.options.hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
        ({"model.arch": "vit", "model.image_size": 100}, "--model.image_size 96"),
        ({"model.arch": "vit_mae", "model.options.hidden_size": 6, "model.options.num_attention_heads": 2}, "of 4"),
        ({"model.arch": "patt_lite", "model.options.cut": 18}, "17 blocks"),
        ({"model.arch": "patt_lite", "model.options.heads": 7}, "not a multiple of heads = 7"),
        ({"model.arch": "patt_lite", "model.options.attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"model.arch": "patt_lite", "model.options.width_mult": -1.0}, "at least 0"),
        ({"model.arch": "timm:resnet18", "model.options.num_classes": 3}, "not an option of timm:resnet18"),
    ],
)
def test_wrong_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_spec(Config().override(overrides).model, 48, LabelSet())
    assert message in str(caught.value)


def test_options_shape_the_network() -> None:
    options = {"width_mult": 1.0, "channels": 256, "cut": 6, "separable": 2, "patch_stride": 2, "heads": 4}
    model = tiny_model("patt_lite", image_size=96, options=options).eval()
    assert model.depth == 6
    network: Any = model.network
    assert network.patches(network.features(torch.zeros(1, 3, 96, 96))).shape == (1, 256, 6, 6)  # stride 8, then 2
    assert tiny_model("timm:vit_tiny_patch16_224", options={"depth": 3}).depth == 3
    with pytest.raises(UserError, match="timm refuses timm:resnet18 with depht=3"):
        tiny_model("timm:resnet18", options={"depht": 3})
    spec = build_spec(Config().override({"model.arch": "timm:poolformer_s12"}).model, 48, LabelSet())
    with pytest.raises(
        UserError, match=r"poolformer_s12 cannot be divided into blocks.*\n.*--model\.arch timm:resnet18"
    ):
        build(spec)


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.5])
def test_label_smoothing_is_undone(smoothing: float) -> None:
    """Probabilities that are not near zero are restored; any constant may be on the logits."""
    q_NK = torch.randn(500, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).softmax(1)
    p_NK = (1 - smoothing) * q_NK + smoothing / 7  # the output of a network trained with smoothed labels
    found_NK = unsmoothed(p_NK.log() + 3.7, smoothing)
    large_NK = q_NK > 0.06 * smoothing / 7 / (1 - smoothing)
    assert large_NK.double().mean() > 0.5
    assert torch.allclose(found_NK.exp()[large_NK], q_NK[large_NK], rtol=1e-9)
    assert torch.allclose(found_NK.softmax(1), q_NK, atol=0.06 * smoothing)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_smoothing_the_order_stays_and_nothing_is_infinite(dtype: torch.dtype) -> None:
    """Also of answers far below what smoothed labels allow, and of two classes that are equal."""
    logits_NK = torch.randn(500, 7, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype)
    logits_NK[:, 3] = logits_NK[:, 5]
    logits_NK[0] = torch.tensor([0, -5, -10, -20, -5, -20, 1], dtype=dtype)
    found_NK = unsmoothed(logits_NK, 0.1)
    assert found_NK.dtype == dtype
    assert found_NK.isfinite().all()
    assert torch.equal(found_NK[:, 3], found_NK[:, 5])
    chosen_NK = found_NK.gather(1, logits_NK.argsort(1))
    slack = 0 if dtype in (torch.float32, torch.float64) else 0.1
    assert (chosen_NK.diff(dim=1) >= -slack).all()


@pytest.mark.parametrize("arch", ALL)
def test_logits_do_not_depend_on_the_batch(arch: str) -> None:
    check_batch_independence(make_lively(tiny_model(arch)).double(), tolerance=1e-12)


@torch.no_grad()
def test_parts_are_weights_times_norms_of_values() -> None:
    model = make_lively(tiny_model("patt_lite")).eval()
    network: Any = model.network
    map_NDHW = network.patches(network.features(model.preprocess(pictures(4))))
    patches_NPD = map_NDHW.flatten(2).transpose(1, 2)
    layer = network.attention
    attended_NPD, weights_NHPP = layer(patches_NPD, patches_NPD, patches_NPD, average_attn_weights=False)
    width = patches_NPD.shape[-1]
    values_NPD = F.linear(patches_NPD, layer.in_proj_weight[2 * width :], layer.in_proj_bias[2 * width :])
    norms_NPH = values_NPD.unflatten(2, (layer.num_heads, -1)).norm(dim=-1)  # type: ignore[no-untyped-call]
    parts_NP = torch.einsum("nhqp,nph->np", weights_NHPP, norms_NPH)
    expected_NHW = (parts_NP / parts_NP.sum(1, keepdim=True)).reshape(4, *map_NDHW.shape[2:])
    logits_NK, found_NHW = model.with_attention(pictures(4))
    torch.testing.assert_close(found_NHW, expected_NHW, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits_NK, model(pictures(4)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network._attend(patches_NPD)[0], attended_NPD, rtol=1e-4, atol=1e-5)
    assert found_NHW.shape == (4, 3, 3), "48 pixels at stride 16"
    assert float(found_NHW.flatten(1).std(1).min()) > 1e-4
    assert model.shows_attention
    assert not tiny_model("vit").shows_attention
