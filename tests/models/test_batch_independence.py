"""Logits of a picture do not depend on the rest of its batch: all architectures, and proof that the check can fail."""

import pytest
import torch
from torch import nn

from tests.helpers.tiny_models import ALL, check_batch_independence, make_lively, tiny_model


@pytest.mark.parametrize("arch", ALL)
def test_logits_do_not_depend_on_the_batch(arch: str) -> None:
    model = make_lively(tiny_model(arch))
    check_batch_independence(model)
    check_batch_independence(model.double(), tolerance=1e-12)  # what was left was rounding


def test_full_size_patt_lite_does_not_depend_on_the_batch() -> None:
    model = tiny_model("patt_lite", image_size=None, options={})
    assert model.spec.input.image_size == 96
    check_batch_independence(make_lively(model))


def test_check_fails_when_attention_runs_across_the_batch() -> None:
    """batch_first=False is how the authors' code attends: the pictures of a batch are the sequence."""
    model = make_lively(tiny_model("patt_lite"))
    attention = model.network.get_submodule("attention")
    assert isinstance(attention, nn.MultiheadAttention)
    attention.batch_first = False
    with pytest.raises(AssertionError, match="logits differ by"):
        check_batch_independence(model)


def test_check_fails_when_batch_norm_uses_the_batch() -> None:
    model = make_lively(tiny_model("timm:resnet18"))
    norm = model.network.get_submodule("bn1")
    norm.train()
    with pytest.raises(AssertionError, match="logits differ by"):
        check_batch_independence(model)


def test_check_refuses_a_network_that_answers_all_alike() -> None:
    model = tiny_model("patt_lite").eval()
    with torch.no_grad():
        model.network.get_parameter("classifier.weight").zero_()
    with pytest.raises(AssertionError, match="blind"):
        check_batch_independence(model)
