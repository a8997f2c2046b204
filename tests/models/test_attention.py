"""The attention that `patt_lite` shows: against torch's own layer."""

from typing import Any

import torch
from torch.nn import functional as F

from tests.helpers.tiny_models import make_lively, pictures, tiny_model


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
    assert float(found_NHW.flatten(1).std(1).min()) > 1e-4
    assert model.shows_attention
    assert not tiny_model("vit").shows_attention
