"""ViTMAE: the encoder of a masked autoencoder without any masking, and a linear head on [CLS].

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), arXiv:2111.06377;
weights `facebook/vit-mae-base` (ImageNet-1k, pixels normalised with ImageNet's mean and deviation).
"""

from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEModel

from fer_dist.config import ModelConfig
from fer_dist.errors import UserError
from fer_dist.models.base import FaceModel
from fer_dist.models.hf import encoder_config, encoder_stages, load_encoder, resolve_encoder
from fer_dist.spec import IMAGENET_MEAN, IMAGENET_STD, LabelSet, ModelSpec

REPOSITORY = "facebook/vit-mae-base"


class MaskFreeViTMAE(nn.Module):
    """Pixels `[N, 3, H, W]` -> logits `[N, K]`."""

    def __init__(self, config: ViTMAEConfig, classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = ViTMAEModel(config)
        # mask_ratio = 0 would not do: it still draws noise, shuffles the patches, and exports all of that.
        self.encoder.embeddings.random_masking = _keep_all  # type: ignore[method-assign]
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        tokens_NTD = self.encoder(pixel_values=pixels_N3HW).last_hidden_state
        logits_NK: Tensor = self.classifier(self.dropout(tokens_NTD[:, 0]))
        return logits_NK


def resolve(model: ModelConfig, size: int, labels: LabelSet) -> ModelSpec:
    """The spec of a `vit_mae`.

    Raises:
        UserError: see `fer_dist.models.hf.resolve_encoder`; a hidden size that is no multiple of 4.
    """
    spec = resolve_encoder(ViTMAEConfig, model, size, labels, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    width = spec.options["hidden_size"]
    if width % 4:
        raise UserError(f"model.options.hidden_size is {width}, not a multiple of 4", "choose a multiple of 4")
    return spec


def build(spec: ModelSpec) -> FaceModel:
    """The network with random weights, from torch's generator. Its sine position embeddings never train."""
    network = MaskFreeViTMAE(encoder_config(ViTMAEConfig, spec), len(spec.labels), spec.options["dropout"])
    head_names = [f"classifier.{name}" for name, _ in network.classifier.named_parameters()]
    return FaceModel(spec, network, encoder_stages(network.encoder, "encoder."), head_names)


def load_pretrained(face_model: FaceModel, model: ModelConfig) -> None:
    """The encoder's weights from the folder `model.weights`, else from `REPOSITORY`; a decoder is left out.

    Raises:
        UserError: see `fer_dist.models.hf.load_encoder`.
    """
    network = face_model.network
    assert isinstance(network, MaskFreeViTMAE)
    load_encoder(ViTMAEModel, network.encoder, face_model.spec, model.weights, REPOSITORY)


def _keep_all(sequence_NPD: Tensor, noise: Tensor | None = None) -> tuple[Tensor, None, None]:
    """In place of `ViTMAEEmbeddings.random_masking`: every patch, in order; no mask, nothing to restore."""
    return sequence_NPD, None, None
