"""Every model goes through torch.onnx's dynamo exporter with a free batch size (export itself is another issue)."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.models.tiny import TINY, make_lively, pictures, tiny_model


@pytest.mark.parametrize("arch", TINY)
def test_onnx_with_a_free_batch(arch: str, tmp_path: Path) -> None:
    # The first blocks of MobileNetV2 will do: the exporter takes a second for each, and all are alike.
    shorter = {"options": {"cut": 3, "width_mult": 0.25, "channels": 32}} if arch == "patt_lite" else {}
    model = make_lively(tiny_model(arch, **shorter))
    model.set_attn_implementation("eager")
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (pictures(2),),
        path,
        dynamo=True,
        verbose=False,
        opset_version=20,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        external_data=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [isinstance(i.shape[0], str) for i in (*session.get_inputs(), *session.get_outputs())] == [True, True]
    for count in (1, 2, 3, 7):
        (found_NK,) = session.run(None, {"images": pictures(count).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found_NK, model(pictures(count)).numpy(), atol=1e-4)
