"""Where a network looked: attention rollout for the transformers, Grad-CAM for patt_lite."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fer_dist.models.base import FaceModel
from fer_dist.models.patt_lite import PattLite
from fer_dist.models.vit import ViT
from fer_dist.models.vit_mae import MaskFreeViTMAE
from fer_dist.serve.runner import Runner, TorchRunner

METHODS = {"vit": "attention rollout", "vit_mae": "attention rollout", "patt_lite": "Grad-CAM"}
"""Architecture -> how its maps are made."""
AT_ONCE = 8
"""Pictures at a time: every layer's attention of all of them is in memory."""


def look(runner: Runner, images_N1SS: Tensor, classes_N: Tensor) -> tuple[NDArray[np.float32] | None, str]:
    """Heat maps float32 `[N, S, S]` and how they were made; None and "" where nothing says where the model looked."""
    if isinstance(runner, TorchRunner):
        found = heat_maps(runner.model, images_N1SS, classes_N)
        return (None, "") if found is None else (found.numpy(), METHODS[runner.spec.arch])
    attention_NHW = runner.run(images_N1SS).attention_NHW
    if attention_NHW is None:
        return None, ""
    return attention_maps(attention_NHW, images_N1SS.shape[-1]).numpy(), "attention over its patches"


def heat_maps(model: FaceModel, images_N1SS: Tensor, classes_N: Tensor) -> Tensor | None:
    """How much each place of a picture has to do with the answer.

    Attention rollout (Abnar & Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv:2005.00928): the
    attention of [CLS] to the patches through all layers, whatever the class. Grad-CAM (Selvaraju et al., 2017,
    arXiv:1610.02391; captum's): what of the last map of patches speaks for the class.

    Args:
        model: in evaluation mode; left as it was.
        images_N1SS: uint8 `[N, 1, S, S]`.
        classes_N: int64, the class that Grad-CAM asks for, one for each picture.

    Returns:
        float32 `[N, S, S]` on the CPU, each map from 0 to its highest place, 1 (all 0 where nothing speaks for the
        class); None: an architecture that neither is made for.
    """
    network = model.network
    if not isinstance(network, ViT | MaskFreeViTMAE | PattLite):
        return None
    device = next(model.parameters()).device
    found = []
    for begin in range(0, len(images_N1SS), AT_ONCE):
        images = images_N1SS[begin : begin + AT_ONCE].to(device)
        if isinstance(network, PattLite):
            found.append(_grad_cam(model, network, images, classes_N[begin : begin + AT_ONCE].to(device)))
        else:
            found.append(_rollout(model, network, images))
    return enlarged(torch.cat(found), images_N1SS.shape[-1])


def attention_maps(attention_NHW: Tensor, side: int) -> Tensor:
    """What `Outputs.attention_NHW` shows: float32 `[N, side, side]`, from the least attention, 0, to the most, 1."""
    return enlarged(attention_NHW - attention_NHW.amin((1, 2), keepdim=True), side)


def enlarged(maps_NHW: Tensor, side: int) -> Tensor:
    """Maps over patches, at least 0, as maps over pixels: float32 `[N, side, side]`, 1 at the highest place of each."""
    maps_NSS = F.interpolate(maps_NHW.unsqueeze(1), size=(side, side), mode="bilinear", align_corners=False).squeeze(1)
    return maps_NSS / maps_NSS.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _grad_cam(model: FaceModel, network: PattLite, images_N1SS: Tensor, classes_N: Tensor) -> Tensor:
    """Maps over the patches, float32 `[N, h, w]`, at least 0."""
    from captum.attr import LayerGradCam  # a second of imports

    with torch.enable_grad():
        cam = LayerGradCam(model, network.patches)
        maps_N1HW = cam.attribute(images_N1SS.float(), target=classes_N, relu_attributions=True)
    assert isinstance(maps_N1HW, Tensor)
    return maps_N1HW.detach().squeeze(1).float().cpu()


@torch.no_grad()
def _rollout(model: FaceModel, network: ViT | MaskFreeViTMAE, images_N1SS: Tensor) -> Tensor:
    """Attention of [CLS] to the patches through all layers, float32 `[N, h, w]`; without what all patches get alike."""
    encoder = network.model if isinstance(network, ViT) else network.encoder
    model.set_attn_implementation("eager")  # the others do not give their weights away
    try:
        layers = encoder(pixel_values=model.preprocess(images_N1SS), output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return rollout(torch.stack([layer_NHTT.float().cpu().mean(1) for layer_NHTT in layers]))


def rollout(attention_LNTT: Tensor) -> Tensor:
    """Attention of [CLS], token 0, to the patches through L layers: `[L, N, T, T]` -> `[N, h, w]`, T = 1 + h * w.

    A residual connection passes each token on as it is, so half of each layer is the identity. What every patch
    gets at the least is taken away: rollout spreads most of it evenly.
    """
    count = attention_LNTT.shape[-1]
    flow_NTT = torch.eye(count).expand(attention_LNTT.shape[1:])
    for layer_NTT in attention_LNTT:
        flow_NTT = (0.5 * layer_NTT + 0.5 * torch.eye(count)) @ flow_NTT
    patches_NP = flow_NTT[:, 0, 1:]
    patches_NP = patches_NP - patches_NP.amin(1, keepdim=True)
    side = round((count - 1) ** 0.5)
    return patches_NP.reshape(-1, side, side)
