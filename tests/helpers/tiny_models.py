"""Tiny networks of every architecture, pictures to show them, and the check that pictures do not see each other."""

from typing import Any

import torch
from torch import Tensor, nn

from fer_dist.config import Config
from fer_dist.models import FaceModel, build_model
from fer_dist.spec import LabelSet

ENCODER_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "patch_size": 16,
}
_ENCODER = {f"model.options.{name}": size for name, size in ENCODER_SIZES.items()}
_ENCODER |= {"model.pretrained": False, "model.image_size": 64}
_PATT_LITE = {"model.options.width_mult": 0.25, "model.options.channels": 32}

TINY: dict[str, dict[str, Any]] = {
    "vit": {"model.arch": "vit", **_ENCODER},
    "vit_mae": {"model.arch": "vit_mae", **_ENCODER},
    "patt_lite": {"model.arch": "patt_lite", "model.pretrained": False, "model.image_size": 48, **_PATT_LITE},
}
"""Overrides that make a real network of each architecture, small enough for a test."""

TIMM: dict[str, dict[str, Any]] = {
    f"timm:{name}": {"model.arch": f"timm:{name}", "model.pretrained": False, "model.image_size": 64}
    for name in ("resnet18", "convnext_atto", "mobilenetv3_small_100", "vit_tiny_patch16_224")
}
"""The four timm networks that issue 2 names: their own sizes, small pictures."""

ALL = TINY | TIMM


def tiny_config(arch: str, **model_options: Any) -> Config:
    """The configuration of a tiny network; keywords replace fields of `model`."""
    return Config().override(ALL[arch]).override({f"model.{name}": value for name, value in model_options.items()})


def tiny_model(arch: str, **model_options: Any) -> FaceModel:
    """A tiny network in training mode, the same at every call."""
    torch.manual_seed(0)
    return build_model(tiny_config(arch, **model_options).model, 48, LabelSet())


def pictures(count: int, size: int = 48) -> Tensor:
    """Noise as uint8 `[count, 1, size, size]`, the same at every call; brightness differs between pictures."""
    generator = torch.Generator().manual_seed(1)
    noise_N1SS = torch.randint(0, 128, (count, 1, size, size), generator=generator)
    offset_N111 = torch.randint(0, 128, (count, 1, 1, 1), generator=generator)
    return (noise_N1SS + offset_N111).to(torch.uint8)


def make_lively(model: FaceModel) -> FaceModel:
    """Give a random network logits that differ between pictures by about 0.3; as built, a deep one answers all alike.

    Batch-norm takes the statistics of some pictures; the last layer is enlarged.
    """
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # plain average
        norm.reset_running_stats()
    parameters = dict(model.named_parameters())
    (weight,) = (parameters[n] for n in model.head_names if parameters[n].shape[:1] == (7,) and parameters[n].ndim == 2)
    with torch.no_grad():
        model.train()(pictures(16))
        weight.normal_(generator=torch.Generator().manual_seed(2))
        weight.mul_(0.3 / float(model.eval()(pictures(16)).std(dim=0).max()))
    return model


def check_batch_independence(model: FaceModel, tolerance: float = 1e-5) -> None:
    """Raise AssertionError unless the logits of a picture are the same alone and among any others.

    Args:
        model: in evaluation mode, with logits that differ between pictures.
        tolerance: on the absolute difference of logits.
    """
    assert not model.training
    images_N1SS = pictures(8)
    changed_N1SS = images_N1SS.clone()
    changed_N1SS[4:] = 0  # other neighbours for the first half
    with torch.inference_mode():
        together_NK = model(images_N1SS)
        alone_NK = torch.cat([model(images_N1SS[i : i + 1]) for i in range(len(images_N1SS))])
        others_NK = model(changed_N1SS)
    spread = float(together_NK.std(dim=0).max())
    assert spread > 100 * tolerance, f"the logits hardly differ between pictures (spread {spread:.1e}): blind check"
    for found_NK, where in ((alone_NK, "alone"), (others_NK[:4], "among others")):
        difference = float((together_NK[: len(found_NK)] - found_NK).abs().max())
        assert difference <= tolerance, f"logits differ by {difference:.1e} {where}"
