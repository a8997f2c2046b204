"""PAtt-Lite: a truncated MobileNetV2, patch extraction, attention over the patches of one picture.

Source: Ngwe, Lim, Lim, Ong, Alqahtani, "PAtt-Lite: Lightweight Patch and Attention MobileNet for
Challenging Facial Expression Recognition" (2023), arXiv:2306.09626; MobileNetV2: Sandler et al.
(2018), arXiv:1801.04381, as in torchvision.

Two differences. The paper truncates MobileNetV1, this is MobileNetV2 cut after a feature block.
And the paper's code averages the map to one vector per picture and then attends with the batch as
the sequence, so that a prediction depends on its neighbours in the batch; here the sequence is
the patches of one picture, and the mean is taken after the attention.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from fer_dist.config import ModelConfig
from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel, make_spec, resolve_options
from fer_dist.models.weights import fetch_from_url, load_strictly, read_state
from fer_dist.spec import IMAGENET_MEAN, IMAGENET_STD, LabelSet, ModelSpec

IMAGE_SIZE = 96
"""96 px and an output stride of 16 make 6 x 6 = 36 patches."""

OPTIONS: dict[str, Any] = {
    "cut": 13,  # last feature block kept, 1..17; 13 has 96 channels and stride 16
    "width_mult": 1.0,  # MobileNetV2's width; the pretrained weights are for 1.0
    "channels": 256,  # of the patches
    "separable": 1,  # depthwise-separable convolutions before the 1x1
    "patch_stride": 1,  # of the first of them; 2 leaves a quarter of the patches
    "heads": 8,
    "attention_dropout": 0.0,
}

MOST = {"width_mult": 8.0, "channels": 8192, "separable": 16, "patch_stride": 8}
"""Bounds of options: the largest network has 1.5e9 parameters."""


class PattLite(nn.Module):
    """Pixels `[N, 3, H, W]` -> logits `[N, K]`."""

    def __init__(self, classes: int, dropout: float, options: dict[str, Any]) -> None:
        super().__init__()
        channels = options["channels"]
        self.features = mobilenet_v2(width_mult=options["width_mult"]).features[: options["cut"] + 1]
        self.patches = _patch_extraction(_channels_out(self.features), channels, options)
        self.attention = nn.MultiheadAttention(
            channels, options["heads"], dropout=options["attention_dropout"], batch_first=True
        )
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        patches_NPD = self.patches(self.features(pixels_N3HW)).flatten(2).transpose(1, 2)
        attended_NPD, _ = self.attention(patches_NPD, patches_NPD, patches_NPD, need_weights=False)
        return self._classify(patches_NPD, attended_NPD)

    def with_attention(self, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, but for rounding those of `forward`, and the part that each patch has in the attention.

        Parts are `[N, h, w]` and sum to 1: attention weights times the norms of the values that they move, a mean over
        the patches that ask, summed over heads. After Kobayashi et al., "Attention is Not Only a Weight" (2020),
        arXiv:2004.10102, who take the norms behind the output projection. Weights alone mislead: a head with nothing
        to say looks at a patch whose value is nearly zero.
        """
        map_NDHW = self.patches(self.features(pixels_N3HW))
        patches_NPD = map_NDHW.flatten(2).transpose(1, 2)
        attended_NPD, parts_NP = self._attend(patches_NPD)
        return self._classify(patches_NPD, attended_NPD), parts_NP.reshape(-1, *map_NDHW.shape[2:])

    def _attend(self, patches_NPD: Tensor) -> tuple[Tensor, Tensor]:
        """What `self.attention` answers, without dropout, and the part of each patch in it, `[N, P]`."""
        layer = self.attention
        all_three = F.linear(patches_NPD, layer.in_proj_weight, layer.in_proj_bias)
        query_NHPE, key_NHPE, value_NHPE = all_three.unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[no-untyped-call]
        weights_NHPP = (query_NHPE @ key_NHPE.transpose(2, 3) * layer.head_dim**-0.5).softmax(-1)
        attended_NPD = layer.out_proj((weights_NHPP @ value_NHPE).transpose(1, 2).flatten(2))
        parts_NP = (weights_NHPP.mean(2) * value_NHPE.norm(dim=-1)).sum(1)
        # Where all values are zero, so are the parts; float16 holds this bound.
        return attended_NPD, parts_NP / parts_NP.sum(1, keepdim=True).clamp_min(2**-14)

    def _classify(self, patches_NPD: Tensor, attended_NPD: Tensor) -> Tensor:
        mean_ND = self.norm(patches_NPD + attended_NPD).mean(dim=1)
        logits_NK: Tensor = self.classifier(self.dropout(mean_ND))
        return logits_NK


def resolve(model: ModelConfig, size: int, labels: LabelSet) -> ModelSpec:
    """The spec of a `patt_lite`.

    Raises:
        UserError: an option is unknown or out of bounds.
    """
    options = _checked(model.options)
    return make_spec(model, size, labels, image_size=IMAGE_SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD, options=options)


def build(spec: ModelSpec) -> FaceModel:
    """The network with random weights, from torch's generator. Block i is MobileNetV2's `features[i]`.

    Raises:
        UserError: the spec came with a file, and its options are out of bounds.
    """
    options = _checked({name: value for name, value in spec.options.items() if name != "dropout"})
    network = PattLite(len(spec.labels), spec.options["dropout"], options)
    stages: list[list[str]] = [[] for _ in network.features]
    head_names = []
    for name, _ in network.named_parameters():
        part, block, *_ = name.split(".")
        if part == "features":
            stages[int(block)].append(name)
        else:
            head_names.append(name)
    return FaceModel(spec, network, stages, head_names)


def load_pretrained(face_model: FaceModel, model: ModelConfig) -> None:
    """MobileNetV2's ImageNet weights into the blocks that are kept.

    From `model.weights` (a `.pth` of torchvision's mobilenet_v2), else from torch.hub's cache or the network.

    Raises:
        UserError: neither is there, or the file does not fit.
    """
    path = model.weights or fetch_from_url(MobileNet_V2_Weights.IMAGENET1K_V1.url)
    network = face_model.network
    assert isinstance(network, PattLite)
    kept = {f"features.{block}." for block in range(len(network.features))}
    state = {
        name.removeprefix("features."): value
        for name, value in read_state(path).items()
        if name.startswith(tuple(kept))
    }
    load_strictly(network.features, state, path)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    options = resolve_options("patt_lite", OPTIONS, given)
    if options["cut"] > 17:
        raise UserError(f"model.options.cut is {options['cut']}, but MobileNetV2 has 17 blocks", "use 1..17")
    for name, most in MOST.items():  # before anything is allocated
        if options[name] > most:
            raise UserError(f"model.options.{name} is {options[name]}, expected at most {most}", "choose less")
    if options["channels"] % options["heads"]:
        raise UserError(
            f"model.options.channels is {options['channels']}, not a multiple of heads = {options['heads']}",
            "choose a multiple",
        )
    if options["attention_dropout"] >= 1:
        raise UserError(f"model.options.attention_dropout is {options['attention_dropout']}", "use 0..0.95")
    return options


def _patch_extraction(channels_in: int, channels: int, options: dict[str, Any]) -> nn.Sequential:
    """Depthwise-separable convolutions, then a 1x1: each position of the result is a patch."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(options["separable"]):
        stride = options["patch_stride"] if index == 0 else 1
        layers[f"separable{index}"] = nn.Sequential(
            nn.Conv2d(channels_in, channels_in, 3, stride=stride, padding=1, groups=channels_in, bias=False),
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        channels_in = channels
    layers["pointwise"] = nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    )
    return nn.Sequential(layers)


def _channels_out(features: nn.Sequential) -> int:
    """The channels of the last batch-norm, which ends every block of MobileNetV2."""
    return [m.num_features for m in features.modules() if isinstance(m, nn.BatchNorm2d)][-1]
