"""ViT: Hugging Face's ViTForImageClassification.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), arXiv:2010.11929; weights
`google/vit-base-patch16-224` (ImageNet-21k, fine-tuned on ImageNet-1k, pixels normalised to -1..1).
"""

from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from fer_dist.config import ModelConfig
from fer_dist.models.base import FaceModel
from fer_dist.models.hf import encoder_config, encoder_stages, load_encoder, resolve_encoder
from fer_dist.spec import LabelSet, ModelSpec

REPOSITORY = "google/vit-base-patch16-224"


class ViT(nn.Module):
    """Pixels `[N, 3, H, W]` -> logits `[N, K]`, with dropout before Hugging Face's own head."""

    def __init__(self, config: ViTConfig, dropout: float) -> None:
        super().__init__()
        self.model = ViTForImageClassification(config)
        self.model.set_submodule("classifier", nn.Sequential(nn.Dropout(dropout), self.model.classifier))

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        logits_NK: Tensor = self.model(pixel_values=pixels_N3HW).logits
        return logits_NK


def resolve(model: ModelConfig, size: int, labels: LabelSet) -> ModelSpec:
    """The spec of a `vit`.

    Raises:
        UserError: see `fer_dist.models.hf.resolve_encoder`.
    """
    return resolve_encoder(ViTConfig, model, size, labels, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def build(spec: ModelSpec) -> FaceModel:
    """The network with random weights, from torch's generator."""
    network = ViT(encoder_config(ViTConfig, spec), spec.options["dropout"])
    stages = encoder_stages(network.model.vit, "model.vit.")
    head_names = [f"model.classifier.{name}" for name, _ in network.model.classifier.named_parameters()]
    return FaceModel(spec, network, stages, head_names)


def load_pretrained(face_model: FaceModel, model: ModelConfig) -> None:
    """The encoder's weights from the folder `model.weights`, else from `REPOSITORY`; the head stays new.

    Raises:
        UserError: see `fer_dist.models.hf.load_encoder`.
    """
    network = face_model.network
    assert isinstance(network, ViT)
    load_encoder(ViTForImageClassification, network.model.vit, face_model.spec, model.weights, REPOSITORY)
