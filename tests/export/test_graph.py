"""Point 1: one ONNX file per network that takes stored pictures and says itself what it is."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from export.graph import OPSET, Exported, check, to_onnx, trace
from fer_dist.errors import UserError
from fer_dist.serve.artifact import ATTENTION, INPUT, LOGITS, PROBABILITIES
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.runner import open_runner
from tests.helpers.exporting import SHA256, Gate, lively
from tests.helpers.onnx_graphs import ARCHS, copied, graph_of
from tests.helpers.tiny_models import pictures

BATCHES = (1, 2, 3, 7, 64, 100)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_contract(arch: str) -> None:
    graph = graph_of(arch)
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    assert not graph.functions
    (images,) = graph.graph.input
    assert (images.name, images.type.tensor_type.elem_type) == (INPUT, TensorProto.UINT8)
    attention = [ATTENTION] if arch == "patt_lite" else []
    assert [value.name for value in graph.graph.output] == [LOGITS, PROBABILITIES, *attention]
    assert {value.type.tensor_type.elem_type for value in graph.graph.output} == {TensorProto.FLOAT}
    for value, rest in zip(
        (images, *graph.graph.output), ([1, 48, 48], [7], [7], *([[12, 12]] * len(attention))), strict=True
    ):
        batch, *sides = value.type.tensor_type.shape.dim
        assert batch.dim_param
        assert [side.dim_value for side in sides] == rest
    assert not any(tensor.external_data for tensor in graph.graph.initializer), "one file"


@pytest.mark.parametrize("arch", ARCHS)
def test_it_says_itself_what_it_is(arch: str) -> None:
    """To programs without fer_dist as well: plain names, JSON."""
    model = lively(arch)
    told = {entry.key: json.loads(entry.value) for entry in graph_of(arch).metadata_props}
    assert told["labels"] == list(model.spec.labels.names)
    assert told["input"]["shape"] == ["N", 1, 48, 48]
    assert told["input"]["dtype"] == "uint8"
    assert told["outputs"][PROBABILITIES]["shape"] == ["N", 7]
    assert told["fer_dist"] == {
        "format": 1,
        "spec": json.loads(json.dumps(model.spec.to_dict())),
        "precision": "fp32",
        "checkpoint_sha256": SHA256,
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_of_this_machine_is_inside(arch: str) -> None:
    raw = graph_of(arch).SerializeToString()
    outside = re.sub(rb"[^ -~]+", b"\n", raw).decode()
    assert not re.search(r"/(work|root|home|tmp|usr|lib)/|site-packages|\.py\b|File \"|Traceback", outside)
    assert "stack_trace" not in outside
    assert "class_hierarchy" not in outside


@pytest.mark.parametrize("arch", ARCHS)
def test_any_batch_and_the_answers_of_the_model(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "best.onnx"
    path.write_bytes(graph_of(arch).SerializeToString())
    opened = read_onnx(path)
    model = lively(arch)
    assert opened.spec == model.spec
    session = onnx_session(opened.serialized())
    for count in BATCHES:
        images_N1SS = pictures(count)
        logits_NK, probabilities_NK = session.run([LOGITS, PROBABILITIES], {INPUT: images_N1SS.numpy()})
        with torch.no_grad():
            expected_NK = model(images_N1SS)
        np.testing.assert_allclose(logits_NK, expected_NK.numpy(), atol=2e-5)
        np.testing.assert_allclose(probabilities_NK, expected_NK.softmax(1).numpy(), atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_passes_the_gate(arch: str, tmp_path: Path) -> None:
    report = Gate(lively(arch), tmp_path).judge(graph_of(arch))
    assert report.passed, report.reasons
    assert report.top1_agreement == 1
    assert report.relative <= 1e-4
    assert set(report.by_batch) >= {1, 2, 3, 7, 64}


def test_masking_is_gone() -> None:
    kinds = {node.op_type for node in graph_of("vit_mae").graph.node}
    assert not kinds & {"RandomUniform", "RandomUniformLike", "RandomNormal", "TopK", "GatherElements", "GatherND"}


@pytest.mark.parametrize("arch", ["vit", "patt_lite"])
def test_the_same_bytes_twice(arch: str) -> None:
    again = to_onnx(lively(arch), SHA256)
    assert again.SerializeToString(deterministic=True) == graph_of(arch).SerializeToString(deterministic=True)


def test_a_fixed_batch_is_our_mistake_and_refused(tmp_path: Path) -> None:
    """As exported from one picture: refused where it is made, and by whoever opens it."""
    model = lively("vit")
    fixed = copied(graph_of("vit"))
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(UserError, match="with a free batch"):
        check(fixed, model.spec)
    path = tmp_path / "best.onnx"
    path.write_bytes(fixed.SerializeToString())
    with pytest.raises(UserError, match="inputs and outputs"):
        read_onnx(path)


def test_attention_is_that_of_the_network(tmp_path: Path) -> None:
    """In any batch: the part of each patch, and they sum to 1; the logits are those of the network that was trained."""
    model, images_N1SS = lively("patt_lite"), pictures(9)
    path = tmp_path / "best.onnx"
    path.write_bytes(graph_of("patt_lite").SerializeToString())
    with torch.no_grad():
        logits_NK, expected_NHW = model.with_attention(images_N1SS)
        torch.testing.assert_close(logits_NK, model(images_N1SS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected_NHW.sum((1, 2)), torch.ones(9))
    assert float(expected_NHW.std(0).max()) > 1e-6, "maps that are all alike would show nothing"
    with open_runner(path, provider="cpu") as runner:
        for batch in (1, 4, 9):
            found_NHW = runner.run(images_N1SS[:batch]).attention_NHW
            assert found_NHW is not None
            torch.testing.assert_close(found_NHW, expected_NHW[:batch], rtol=1e-4, atol=1e-6)
    (tmp_path / "vit.onnx").write_bytes(graph_of("vit").SerializeToString())
    with open_runner(tmp_path / "vit.onnx", provider="cpu") as runner:
        assert runner.run(images_N1SS).attention_NHW is None


def test_another_number_of_classes_is_our_mistake() -> None:
    other = copied(graph_of("vit"))
    other.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    with pytest.raises((AssertionError, onnx.shape_inference.InferenceError)):
        check(other, lively("vit").spec)


def test_a_network_that_the_exporter_does_not_take_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timm:<name>` is any of a thousand networks."""

    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no decomposition\nof that")

    monkeypatch.setattr(torch.onnx, "export", fail)
    model = lively("vit")
    with pytest.raises(UserError, match="exporter does not take vit: no decomposition\n"):
        trace(Exported(model), model.spec)


def onnx_session(raw: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
