"""The exported float32 graph: one ONNX file per network that takes stored pictures and describes itself."""

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from export.graph import OPSET, Exported, check, trace
from fer_dist.errors import UserError
from fer_dist.serve.artifact import ATTENTION, INPUT, LOGITS, PROBABILITIES
from fer_dist.serve.runner import open_runner
from tests.helpers.exporting import SHA256, copied, graph_of, judge, lively
from tests.helpers.onnx_graphs import ARCHS
from tests.helpers.tiny_models import pictures


@pytest.mark.parametrize("arch", ARCHS)
def test_inputs_outputs_and_metadata_are_the_contract(arch: str) -> None:
    """Programs without fer_dist read it too: plain names, JSON, and nothing of the machine that exported it."""
    graph, spec = graph_of(arch), lively(arch).spec
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    assert not graph.functions
    found = {}
    for value in (*graph.graph.input, *graph.graph.output):
        batch, *sides = value.type.tensor_type.shape.dim
        assert batch.dim_param
        found[value.name] = (value.type.tensor_type.elem_type, [side.dim_value for side in sides])
    attention = {ATTENTION: (TensorProto.FLOAT, [12, 12])} if arch == "patt_lite" else {}
    expected = {LOGITS: (TensorProto.FLOAT, [7]), PROBABILITIES: (TensorProto.FLOAT, [7]), **attention}
    assert list(found.items()) == [(INPUT, (TensorProto.UINT8, [1, 48, 48])), *expected.items()]
    assert not any(tensor.external_data for tensor in graph.graph.initializer), "one file"
    about = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert about["labels"] == list(spec.labels.names)
    assert (about["input"]["shape"], about["input"]["dtype"]) == (["N", 1, 48, 48], "uint8")
    assert about["outputs"][PROBABILITIES]["shape"] == ["N", 7]
    ours = {"format": 1, "spec": json.loads(json.dumps(spec.to_dict())), "precision": "fp32"}
    assert about["fer_dist"] == {**ours, "checkpoint_sha256": SHA256}
    texts = re.sub(rb"[^ -~]+", b"\n", graph.SerializeToString()).decode()
    assert not re.search(r"/(work|root|home|tmp|usr|lib)/|site-packages|\.py\b|File \"|Traceback", texts)
    assert not re.search("stack_trace|class_hierarchy", texts)


@pytest.mark.parametrize("arch", ARCHS)
def test_any_batch_gets_the_outputs_of_the_model(arch: str) -> None:
    report = judge(arch, graph_of(arch))
    assert report.passed, report.reasons
    assert set(report.by_batch) >= {1, 2, 3, 7, 64}


def test_a_fixed_batch_or_another_number_of_classes_is_refused() -> None:
    fixed, other = copied(graph_of("vit")), copied(graph_of("vit"))
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 2
    other.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    with pytest.raises(UserError, match="with a free batch"):
        check(fixed, lively("vit").spec)
    with pytest.raises((UserError, onnx.shape_inference.InferenceError)):
        check(other, lively("vit").spec)


def test_attention_is_that_of_the_network(tmp_path: Path) -> None:
    """In any batch: the part of each patch, and they sum to 1; the logits are those of the network that was trained."""
    model, images_N1SS = lively("patt_lite"), pictures(9)
    with torch.no_grad():
        logits_NK, expected_NHW = model.with_attention(images_N1SS)
        torch.testing.assert_close(logits_NK, model(images_N1SS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected_NHW.sum((1, 2)), torch.ones(9))
    assert float(expected_NHW.std(0).max()) > 1e-6, "maps that are all alike would show nothing"
    for arch in ("patt_lite", "vit"):
        path = tmp_path / f"{arch}.onnx"
        path.write_bytes(graph_of(arch).SerializeToString())
        with open_runner(path, provider="cpu") as runner:
            for batch in (1, 4, 9):
                found_NHW = runner.run(images_N1SS[:batch]).attention_NHW
                if arch == "vit":
                    assert found_NHW is None
                else:
                    torch.testing.assert_close(found_NHW, expected_NHW[:batch], rtol=1e-4, atol=1e-6)


def test_a_network_that_the_exporter_does_not_take_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timm:<name>` is any of a thousand networks."""

    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no decomposition\nof that")

    monkeypatch.setattr(torch.onnx, "export", fail)
    model = lively("vit")
    with pytest.raises(UserError, match="exporter does not take vit: no decomposition\n"):
        trace(Exported(model), model.spec)
