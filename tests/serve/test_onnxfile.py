"""An ONNX file from outside is one that fer_dist writes, whole and modest, or it is refused with a UserError."""

import os
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, external_data_helper, helper
from onnx.numpy_helper import from_array

from fer_dist.errors import UserError
from fer_dist.serve import onnxfile
from fer_dist.serve.artifact import INPUT, PROBABILITIES
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.runner import open_runner
from tests.helpers.artifacts import CHECKPOINT, SIDE, SPEC, tiny_onnx, write
from tests.helpers.processes import python
from tests.helpers.tiny_models import pictures

Change = Callable[[ModelProto], object]
node, value_info = helper.make_node, helper.make_tensor_value_info


def refusal(path: Path) -> str:
    """Return why a file is refused, in one line that a terminal can show."""
    with pytest.raises(UserError) as caught:
        read_onnx(path)
    assert "onnx" in caught.value.fix
    assert caught.value.problem.isprintable()
    return caught.value.problem


def add(model: ModelProto, *nodes: NodeProto, **stored: Any) -> ModelProto:
    """Put nodes before those of a graph, and arrays to what is stored."""
    for place, new in enumerate(nodes):
        model.graph.node.insert(place, new)
    model.graph.initializer.extend(from_array(np.asarray(value), name) for name, value in stored.items())
    return model


def test_the_checked_bytes_are_those_that_run(tmp_path: Path) -> None:
    """Fields that this protobuf does not know never reach ONNX Runtime, nor does a file that is replaced later."""
    path = write(tmp_path, tiny_onnx("fp16"))
    path.write_bytes(path.read_bytes() + b"\xfa\x7f\x03abc")  # field 2047
    opened = read_onnx(path)
    path.unlink()
    assert opened.serialized() == tiny_onnx("fp16").SerializeToString()
    assert (opened.spec, opened.precision, opened.checkpoint_sha256) == (SPEC, "fp16", CHECKPOINT)


# One change to a valid file


def _set(path: str, value: object) -> Change:
    """Put `value` where a dotted path such as `graph.node[1].domain` leads."""

    def change(model: ModelProto) -> None:
        exec(f"model.{path} = value", {"model": model, "value": value})

    return change


def _external(tensor: TensorProto) -> TensorProto:
    """Let a tensor lie in another file."""
    tensor.raw_data = b""  # onnx wants to see that there were some
    external_data_helper.set_external_data(tensor, "/etc/passwd")
    tensor.ClearField("raw_data")
    return tensor


def _attention(*sides: int | str, kind: int = TensorProto.FLOAT, name: str = "attention") -> Change:
    """Add a third output: the probabilities as a map of one row, declared with these sides."""

    def change(model: ModelProto) -> None:
        model.graph.node.append(node("Unsqueeze", [PROBABILITIES, "second"], [name]))
        model.graph.initializer.append(helper.make_tensor("second", TensorProto.INT64, [1], [1]))
        model.graph.output.append(value_info(name, kind, ["N", *sides]))

    return change


IMAGES, SECOND = "graph.input[0].type.tensor_type", "graph.output[1].type.tensor_type.shape"
SIGNATURE, SHAPES, MEMORY = "inputs and outputs", "have the shapes", "numbers at once"
LARGE = np.array([1, 1, 2**15, 2**15])
PRODUCT = [  # each picture multiplied by each: harmless for one, not for many
    node("Cast", [INPUT], ["f"], to=TensorProto.FLOAT),
    node("Reshape", ["f", "flat"], ["rows"]),
    node("Transpose", ["rows"], ["columns"], perm=[1, 0]),
    node("MatMul", ["rows", "columns"], ["each"]),
]
DOUBLING = [node("Concat", [f"x{i}", f"x{i}"], [f"x{i + 1}"], axis=0) for i in range(40)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: _external(model.graph.initializer[2]), "another file .*/etc/passwd"),
        (lambda model: add(model, node("Constant", [], ["c"], value=_external(TensorProto(dims=[1])))), "another file"),
        (_set("graph.initializer[2].dims[0]", 2**60), "shape .*1152921504606846976.* but its data are"),
        (_set("graph.initializer[2].dims[0]", -64), "negative"),
        (_set("graph.initializer[2].data_type", TensorProto.STRING), "type 8"),
        (lambda model: model.graph.initializer[3].float_data.extend([0.0] * 7), "but its data are"),
        (lambda model: model.graph.initializer.append(model.graph.initializer[3]), "2 tensors named 'bias'"),
        (lambda model: model.graph.sparse_initializer.add(dims=[3]), "sparse"),
        (lambda model: model.functions.add(name="f"), "functions"),
        (_set("graph.node[2].domain", "com.microsoft"), "domain 'com.microsoft', none of ONNX's own"),
        (_set("graph.node[2].domain", "\x1b]0;owned\x07"), "owned"),  # in our message
        (_set("graph.node[2].op_type", "\x1b]0;owned\x07"), "graph is invalid.*owned"),  # in that of ONNX
        (_set("graph.node[2].op_type", "Loop"), "holds graphs"),
        (lambda model: model.graph.node[0].attribute.add(name="to2").g.SetInParent(), "holds graphs"),
        (lambda model: model.graph.node.reverse(), "graph is invalid"),
        (lambda model: model.graph.initializer[0].CopyFrom(from_array(np.array([2, 256]), "flat")), SHAPES),
        (_set("opset_import[0].version", 19), r"opset \[19\]"),
        (lambda model: model.ClearField("metadata_props"), "metadata"),
        (lambda model: model.metadata_props.append(model.metadata_props[0]), "twice"),
        (_set("metadata_props[1].value", "[]"), "labels differ"),
        (_set(f"{IMAGES}.elem_type", TensorProto.FLOAT), SIGNATURE),
        (_set(f"{IMAGES}.shape.dim[0].dim_value", 1), SIGNATURE),
        (lambda model: model.graph.input.append(model.graph.output.pop(0)), SIGNATURE),
        (_set("graph.output[0].name", "scores"), SIGNATURE),
        (_set(f"{SECOND}.dim[1].dim_value", 8), SIGNATURE),
        (_attention(7), SIGNATURE),
        (_attention("h", 7), SIGNATURE),
        (_attention(0, 7), SIGNATURE),
        (_attention(1, 7, kind=TensorProto.FLOAT16), SIGNATURE),
        (_attention(1, 7, name="attending"), SIGNATURE),
        (_attention(7, 1), SHAPES),
        # The precision chooses how strictly the outputs are compared.
        (_set("graph.node[2].op_type", "QuantizeLinear"), "its metadata says fp32, its graph is int8"),
        (_set("graph.node[0].attribute[0].i", TensorProto.FLOAT16), "its metadata says fp32, its graph is fp16"),
        # A few bytes that grow in memory, or by pixels
        (lambda model: add(model, node("ConstantOfShape", ["large"], ["b"]), large=LARGE), MEMORY),
        (lambda model: add(model, node("Resize", [INPUT, "", "", "large"], ["b"]), large=LARGE), MEMORY),
        (lambda model: add(model, node("Range", ["a", "z", "a"], ["b"]), a=np.int64(1), z=np.int64(2**40)), MEMORY),
        (lambda model: add(model, *DOUBLING, x0=np.zeros(2**10, np.float32)), MEMORY),
        (lambda model: add(model, *PRODUCT), "'each' grows faster than the batch"),
        (lambda model: add(model, node("NonZero", [INPUT], ["w"])), "'w' does not follow from the batch"),
    ],
)
def test_a_changed_file_is_refused(change: Change, words: str, tmp_path: Path) -> None:
    model = tiny_onnx()
    change(model)
    assert re.search(f"is refused: .*{words}", refusal(write(tmp_path, model)))


def test_an_output_of_attention_is_optional(tmp_path: Path) -> None:
    model = tiny_onnx()
    assert read_onnx(write(tmp_path, model)).attention is None
    _attention(1, 7)(model)
    path = write(tmp_path, model)
    assert read_onnx(path).attention == (1, 7)
    with open_runner(path, provider="cpu") as runner:
        found = runner.run(pictures(3, SIDE))
    assert found.attention_NHW is not None
    assert torch.equal(found.attention_NHW.squeeze(1), found.probabilities_NK)


# Memory


@pytest.mark.parametrize("source", ["float0", "stored"])
def test_the_numbers_held_at_once_are_bounded(source: str, tmp_path: Path) -> None:
    """Nine tensors of 2**26 numbers, one after the other, are too many if they do not depend on the pictures: a
    session computes these once and keeps them."""
    chain = [node("Cast", [INPUT], ["float0"], to=TensorProto.FLOAT), node("Identity", [source], ["s0"])]
    for i in range(9):
        chain += [
            node("Resize", [f"s{i}", "", "times"], [f"wide{i}"]),
            node("ReduceMean", [f"wide{i}"], [f"m{i}"]),
            node("Add", [f"m{i}", f"s{i}"], [f"s{i + 1}"]),
        ]
    arrays = {"times": np.array([1, 1, 2**10, 2**10], np.float32), "stored": np.zeros((1, 1, SIDE, SIDE), np.float32)}
    path = write(tmp_path, add(tiny_onnx(), *chain, **arrays))
    if source == "stored":
        assert MEMORY in refusal(path)
    else:
        read_onnx(path)


# Files that are not ONNX


def test_other_files_are_refused(tmp_path: Path) -> None:
    path, raw = tmp_path / "other.onnx", tiny_onnx().SerializeToString()
    assert "cannot read" in refusal(path)
    for content in (b"\x1b[31m, ours?", os.urandom(5000), *(raw[:length] for length in (1, 2, 9, 100, 1000, -1))):
        path.write_bytes(content)
        assert "is refused" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "no regular file" in refusal(tmp_path / "pipe.onnx")


def test_sizes_are_bounded_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, raw = tmp_path / "large.onnx", tiny_onnx().SerializeToString()
    with path.open("wb") as file:
        file.truncate(onnxfile.MOST_BYTES + 1)
    assert "larger than" in refusal(path)
    monkeypatch.setattr(onnxfile, "MOST_FIELDS", 2**12)  # counting a million takes seconds
    monkeypatch.setattr(onnxfile, "MOST_STRUCTURE", 2**14)
    path.write_bytes(raw + b"\x3a\x82\x40" + b"\x0a\x00" * (2**12 + 1))  # a graph of empty nodes
    assert "fields" in refusal(path)
    path.write_bytes(raw + b"\x32\x80\x80\x01" + bytes(2**14))  # a documentation string
    assert "beside its weights" in refusal(path)


# Fuzz: in a child, since a crash of a library would end the tests.


@pytest.mark.parametrize(("which", "copies"), [("by hand", 250), ("exported", 60)])
def test_no_changed_copy_crashes(which: str, copies: int, exported: tuple[Path, Path], tmp_path: Path) -> None:
    path = write(tmp_path, tiny_onnx()) if which == "by hand" else exported[1]
    done = python("-c", f"from {__name__} import fuzz; fuzz({str(path)!r}, {str(tmp_path / 'copy.onnx')!r}, {copies})")
    ran = int(done.ok().out.split()[-1])
    assert 0 < ran < 0.9 * copies, "many are refused; changes in weights and names should leave some that run"


def fuzz(path: str, copy: str, copies: int) -> None:
    """Open and run changed copies of a file in bounded memory; print how many ran."""
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
    torch.set_num_threads(1)
    raw, ran = Path(path).read_bytes(), 0
    with open_runner(path, threads=1) as runner:
        images = pictures(2, runner.spec.input.size)
    for seed in range(copies):
        Path(copy).write_bytes(changed(raw, seed))
        print(seed, flush=True)  # the last one shows which copy crashed
        try:
            with open_runner(copy, threads=1) as runner:
                assert runner.run(images).logits_NK.shape == (2, len(runner.spec.labels))
        except UserError:
            continue
        ran += 1
    print(ran)


def changed(raw: bytes, seed: int) -> bytes:
    """Return a copy with some bytes changed, cut out, doubled or inserted."""
    dice, copy = random.Random(seed), bytearray(raw)
    for _ in range(dice.choice([1, 1, 1, 2, 5, 20])):
        at = int(len(copy) ** dice.random())  # mostly at the beginning: nodes come first, then long runs of weights
        number = b"\xff" * 8 + b"\x7f"
        new = dice.choice(
            [b"", bytes([copy[at] ^ 1]), dice.randbytes(1), dice.randbytes(4), copy[at : at + 16], number]
        )
        copy[at : at + dice.choice([0, 1, 1, 1, 2, 16])] = new
    return bytes(copy)
