"""Heat maps of where a network looked, for every architecture."""

import pytest
import torch

from fer_dist.serve.explain import METHODS, heat_maps, rollout
from tests.helpers.tiny_models import make_lively, pictures, tiny_model


@pytest.mark.parametrize("arch", METHODS)
def test_maps_of_every_architecture_are_normalized(arch: str) -> None:
    model = make_lively(tiny_model(arch)).eval()
    images, classes = pictures(11), torch.arange(11) % 7
    before = model(images).detach()
    found = heat_maps(model, images, classes)
    assert found is not None
    assert (found.shape, found.dtype, found.requires_grad) == ((11, 48, 48), torch.float32, False)
    assert found.min() >= 0
    highest = found.amax((1, 2))
    assert ((highest == 0) | (highest - 1 < 1e-6)).all()
    assert (highest > 0).sum() > 5
    alone = heat_maps(model, images[4:5], classes[4:5])  # a map does not depend on the other pictures
    assert alone is not None
    torch.testing.assert_close(alone[0], found[4], rtol=1e-3, atol=1e-3)
    assert torch.equal(model(images), before), "it is left as it was"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_grad_cam_follows_the_paper() -> None:
    """The channels of the map, each weighted by the mean of the gradient of its class, without what is negative."""
    model, images, classes = make_lively(tiny_model("patt_lite")).eval(), pictures(2), torch.tensor([3, 0])
    kept = []
    hook = model.network.get_submodule("patches").register_forward_hook(lambda module, given, out: kept.append(out))
    logits = model(images)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(2), classes].sum(), kept)
    cam = (kept[0] * gradient.mean((2, 3), keepdim=True)).sum(1).clamp_min(0).detach()
    expected = torch.nn.functional.interpolate(cam[None], size=(48, 48), mode="bilinear")[0]
    found = heat_maps(model, images, classes)
    assert found is not None
    assert expected.amax() > 0
    torch.testing.assert_close(found * expected.amax((1, 2), keepdim=True), expected, rtol=1e-4, atol=1e-7)


def test_rollout_follows_attention_through_the_layers() -> None:
    """Two layers, [CLS] and four patches: [CLS] looks at patch 3, which had looked at patch 2."""
    first, second = torch.eye(5), torch.eye(5)
    first[4] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])  # token 4 (patch 3) takes token 3 (patch 2)
    second[0] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    found = rollout(torch.stack([first, second])[:, None])
    # [CLS] takes half of token 4, which is half itself and half token 3.
    assert found.tolist() == [[[0.0, 0.0], [0.25, 0.25]]]
    assert rollout(torch.stack([second, first])[:, None]).tolist() == [[[0.0, 0.0], [0.0, 0.5]]]
