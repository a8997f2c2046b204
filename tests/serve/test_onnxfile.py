"""An ONNX file from outside is one that fer_dist writes, whole and modest, or it is refused with a UserError."""

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fer_dist.errors import UserError
from fer_dist.serve import onnxfile
from fer_dist.serve.artifact import INPUT, PROBABILITIES, Precision, onnx_metadata
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.runner import open_runner
from tests.helpers.artifacts import CHECKPOINT, SIDE, SPEC, add, expected_logits, external, tiny_onnx, write
from tests.helpers.processes import python

Change = Callable[[ModelProto], object]
node, value_info = helper.make_node, helper.make_tensor_value_info


def refusal(path: Path) -> str:
    """Return why a file is refused, in one line that a terminal can show."""
    with pytest.raises(UserError) as caught:
        read_onnx(path)
    assert caught.value.fix
    assert caught.value.problem.isprintable()
    return caught.value.problem


def test_a_file_of_fer_dist_is_read(exported: tuple[Path, Path], tmp_path: Path) -> None:
    opened = read_onnx(write(tmp_path, tiny_onnx("fp16")))
    assert (opened.spec, opened.precision, opened.checkpoint_sha256) == (SPEC, "fp16", CHECKPOINT)
    assert ModelProto.FromString(opened.serialized()) == tiny_onnx("fp16")
    assert read_onnx(exported[1]).spec.arch == "vit"  # a real graph, with lengths computed from shapes


@pytest.mark.parametrize(("stated", "actual"), [("fp32", "int8"), ("int8", "fp32"), ("fp16", "fp32"), ("fp32", "fp16")])
def test_metadata_cannot_choose_the_tolerance(stated: Precision, actual: Precision, tmp_path: Path) -> None:
    model = tiny_onnx(actual)
    helper.set_model_props(model, onnx_metadata(SPEC, precision=stated, checkpoint_sha256=CHECKPOINT))
    assert f"its metadata says {stated}, its graph is {actual}" in refusal(write(tmp_path, model))


# One change to a valid file


def stored(model: ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def _set(path: str, value: object) -> Change:
    """Put `value` where a dotted path such as `graph.node[1].domain` leads."""

    def change(model: ModelProto) -> None:
        exec(f"model.{path} = value", {"model": model, "value": value})

    return change


def _external(location: str) -> Change:
    return lambda model: external(stored(model, "weight"), location)


def _external_constant(model: ModelProto) -> None:
    tensor = TensorProto(name="inside", data_type=TensorProto.FLOAT, dims=[1])
    external(tensor, "/etc/passwd")
    add(model.graph, node("Constant", [], ["c"], value=tensor))


def _foreign(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[2].domain = "com.microsoft"


def _branches(model: ModelProto) -> None:
    branch = helper.make_graph([node("Constant", [], ["b"], value_float=1.0)], "b", [], [])
    branch.output.add().name = "b"
    add(model.graph, node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch), yes=np.array(True))


def _hidden_graph(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("to2", GraphProto(name="hidden")))


def _label(model: ModelProto) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == "labels")
    entry.value = entry.value.replace("angry", "calm")


def _more_outputs(model: ModelProto) -> None:
    model.graph.output.append(value_info("scaled", TensorProto.FLOAT, ["N", SIDE * SIDE]))


def _stored(**arrays: Any) -> Change:
    def change(model: ModelProto) -> None:
        for name, value in arrays.items():
            stored(model, name).CopyFrom(numpy_helper.from_array(value, name))

    return change


def _attention(*sides: int | str, kind: int = TensorProto.FLOAT, name: str = "attention") -> Change:
    """Add a third output: the probabilities as a map of one row, declared with these sides."""

    def change(model: ModelProto) -> None:
        model.graph.node.append(node("Unsqueeze", [PROBABILITIES, "second"], [name]))
        model.graph.initializer.append(helper.make_tensor("second", TensorProto.INT64, [1], [1]))
        model.graph.output.append(value_info(name, kind, ["N", *sides]))

    return change


IMAGES, SECOND = "graph.input[0].type.tensor_type", "graph.output[1].type.tensor_type.shape"
SIGNATURE, SHAPES = "inputs and outputs", "graph is invalid|have the shapes"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_external("/etc/passwd"), "another file .*/etc/passwd"),
        (_external("*/_ORT_MEM_ADDR_/*"), "another file"),
        (_external_constant, "another file"),
        (_set("graph.initializer[2].dims[0]", 63), "shape .*63.* but its data are"),
        (_set("graph.initializer[2].dims[0]", 2**60), "but its data are"),
        (_set("graph.initializer[2].dims[0]", -64), "negative"),
        (_set("graph.initializer[2].data_type", TensorProto.STRING), "type 8"),
        (_set("graph.initializer[2].data_type", 99), "type 99"),
        (lambda model: stored(model, "bias").float_data.extend([0.0] * 7), "but its data are"),
        (lambda model: model.graph.initializer.append(stored(model, "bias")), "2 tensors named 'bias'"),
        (lambda model: model.graph.sparse_initializer.add(dims=[3]), "sparse"),
        (lambda model: model.functions.add(name="f"), "functions"),
        (_foreign, "domain 'com.microsoft', none of ONNX's own"),
        (_branches, "holds graphs"),
        (_hidden_graph, "holds graphs"),
        (_set("graph.node[2].op_type", "NoSuch"), "NoSuch"),
        (_set("graph.node[2].input[0]", "nowhere"), "nowhere"),
        (_set("ir_version", 99), "graph is invalid"),
        (lambda model: model.graph.node.reverse(), "graph is invalid"),
        (lambda model: model.graph.node.append(model.graph.node[0]), "graph is invalid"),
        (_stored(flat=np.array([2, SIDE * SIDE])), SHAPES),
        (_stored(weight=np.zeros((SIDE * SIDE, 8), np.float32), bias=np.zeros(8, np.float32)), SHAPES),
        (_set("opset_import[0].version", 19), r"opset \[19\]"),
        (_set("opset_import[0].domain", "other"), r"opset \[\]"),
        (lambda model: model.ClearField("metadata_props"), "metadata"),
        (lambda model: model.metadata_props.append(model.metadata_props[0]), "twice"),
        (_label, "labels differ"),
        (_set("graph.input[0].name", "image"), "expected .*images"),
        (_set(f"{IMAGES}.elem_type", TensorProto.FLOAT), SIGNATURE),
        (_set(f"{IMAGES}.shape.dim[0].dim_value", 1), SIGNATURE),
        (_set(f"{IMAGES}.shape.dim[2].dim_value", 48), SIGNATURE),
        (lambda model: model.graph.input.append(value_info("more", TensorProto.FLOAT, [1])), SIGNATURE),
        (_set("graph.output[0].name", "scores"), SIGNATURE),
        (_set(f"{SECOND}.dim[0].dim_value", 1), SIGNATURE),
        (_set(f"{SECOND}.dim[1].dim_value", 8), SIGNATURE),
        (lambda model: model.graph.output.pop(), SIGNATURE),
        (_more_outputs, SIGNATURE),
        (_attention(7), SIGNATURE),
        (_attention(1, 7, 1), SIGNATURE),
        (_attention("h", 7), SIGNATURE),
        (_attention(0, 7), SIGNATURE),
        (_attention(1, 7, kind=TensorProto.FLOAT16), SIGNATURE),
        (_attention(1, 7, name="attending"), SIGNATURE),
        (_attention(7, 1), SHAPES),
        (_attention(1, 2**40), SHAPES),
        (lambda model: [change(model) for change in (_attention(1, 7), _more_outputs)], SIGNATURE),
    ],
)
def test_a_changed_file_is_refused(change: Change, words: str, tmp_path: Path) -> None:
    model = tiny_onnx()
    change(model)
    with pytest.raises(UserError, match=f"is refused: .*({words})") as caught:
        read_onnx(write(tmp_path, model))
    assert "python -m export.onnx" in caught.value.fix


def test_an_output_of_attention_is_optional(tmp_path: Path) -> None:
    model = tiny_onnx()
    assert read_onnx(write(tmp_path, model)).attention is None
    _attention(1, 7)(model)
    path = write(tmp_path, model)
    assert read_onnx(path).attention == (1, 7)
    with open_runner(path, provider="cpu") as runner:
        found = runner.run(torch.zeros(3, 1, SIDE, SIDE, dtype=torch.uint8))
    assert found.attention_NHW is not None
    assert torch.equal(found.attention_NHW.squeeze(1), found.probabilities_NK)


# Memory


def f32(values: object) -> Any:
    return np.array(values, dtype=np.float32)


LARGE = np.array([2**15, 2**15])
BOMBS: dict[str, tuple[list[NodeProto], dict[str, object]]] = {
    "ConstantOfShape": ([node("ConstantOfShape", ["large"], ["b"])], {"large": LARGE}),
    "Expand": ([node("Expand", ["one", "large"], ["b"])], {"one": f32([1]), "large": LARGE}),
    "Tile": ([node("Tile", ["one", "large"], ["b"])], {"one": f32([[1]]), "large": LARGE}),
    "Range": ([node("Range", ["a", "z", "d"], ["b"])], {"a": np.int64(0), "z": np.int64(2**40), "d": np.int64(1)}),
    "Pad": ([node("Pad", [INPUT, "by"], ["b"])], {"by": np.array([0, 0, 0, 0, 0, 0, 2**15, 2**15])}),
    "Resize": ([node("Resize", [INPUT, "", "", "to"], ["b"])], {"to": np.array([1, 1, 2**15, 2**15])}),
    "OneHot": (
        [node("OneHot", ["of", "depth", "values"], ["b"])],
        {"of": np.zeros(2**12, np.int64), "depth": np.int64(2**20), "values": f32([0, 1])},
    ),
    "doubling": (
        [node("Concat", [f"x{i}", f"x{i}"], [f"x{i + 1}"], axis=0) for i in range(40)],
        {"x0": f32(np.zeros(2**10))},
    ),
    "many": ([node("ConstantOfShape", ["large"], [f"b{i}"]) for i in range(9)], {"large": np.array([2**13, 2**13])}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_grows_in_memory_is_refused(name: str, tmp_path: Path) -> None:
    model = tiny_onnx()
    nodes, arrays = BOMBS[name]
    add(model.graph, *nodes, **arrays)
    path = write(tmp_path, model)
    assert path.stat().st_size < 2**17
    assert ("at once" in (problem := refusal(path))) or ("does not follow" in problem)


@pytest.mark.parametrize("source", ["float0", "stored"])
def test_the_numbers_held_at_once_are_bounded(source: str, tmp_path: Path) -> None:
    """Nine tensors of 2**26 numbers, one after the other, are too many if they do not depend on the pictures: a
    session computes these once and keeps them."""
    model = tiny_onnx()
    chain = [node("Cast", [INPUT], ["float0"], to=TensorProto.FLOAT), node("Identity", [source], ["s0"])]
    for i in range(9):
        chain += [
            node("Resize", [f"s{i}", "", "times"], [f"wide{i}"]),
            node("ReduceMean", [f"wide{i}"], [f"m{i}"]),
            node("Add", [f"m{i}", f"s{i}"], [f"s{i + 1}"]),
        ]
    add(model.graph, *chain, times=f32([1, 1, 2**10, 2**10]), stored=f32(np.zeros((1, 1, SIDE, SIDE))))
    path = write(tmp_path, model)
    if source == "stored":
        assert "at once" in refusal(path)
    else:
        read_onnx(path)


def test_a_shape_must_follow_from_the_batch(tmp_path: Path) -> None:
    """Each picture multiplied by each is harmless for one, not for many; NonZero depends on pixels."""
    model = tiny_onnx()
    add(
        model.graph,
        node("Cast", [INPUT], ["f"], to=TensorProto.FLOAT),
        node("Reshape", ["f", "flat"], ["rows"]),
        node("Transpose", ["rows"], ["columns"], perm=[1, 0]),
        node("MatMul", ["rows", "columns"], ["each"]),
    )
    assert "'each' grows faster than the batch" in refusal(write(tmp_path, model))
    model = tiny_onnx()
    add(model.graph, node("NonZero", [INPUT], ["where"]))
    assert "'where' does not follow" in refusal(write(tmp_path, model))


def test_a_length_computed_from_the_batch_is_followed(tmp_path: Path) -> None:
    """`Range` up to the batch, as timm's convnext has it: ONNX's inference alone gives up there."""
    model = tiny_onnx()
    model.graph.node[0].input[0] = "same"
    add(
        model.graph,
        node("Shape", [INPUT], ["sizes"], start=0, end=1),
        node("Squeeze", ["sizes"], ["count"]),
        node("Range", ["zero", "count", "one"], ["rows"]),
        node("Gather", [INPUT, "rows"], ["same"], axis=0),
        zero=np.int64(0),
        one=np.int64(1),
    )
    images = torch.randint(0, 256, (5, 1, SIDE, SIDE), dtype=torch.uint8)
    with open_runner(write(tmp_path, model), threads=1) as runner:
        torch.testing.assert_close(runner(images), expected_logits(images))


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
    for irregular in (tmp_path, tmp_path / "pipe.onnx"):
        assert "no regular file" in refusal(irregular)


def test_sizes_are_bounded_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, raw = tmp_path / "large.onnx", tiny_onnx().SerializeToString()
    with path.open("wb") as file:
        file.truncate(onnxfile.MOST_BYTES + 1)
    assert "larger than" in refusal(path)
    assert (onnxfile.MOST_FIELDS, onnxfile.MOST_STRUCTURE) == (2**20, 2**26)
    monkeypatch.setattr(onnxfile, "MOST_FIELDS", 2**12)  # counting a million takes seconds
    monkeypatch.setattr(onnxfile, "MOST_STRUCTURE", 2**14)
    path.write_bytes(raw + b"\x3a\x82\x40" + b"\x0a\x00" * (2**12 + 1))  # a graph of empty nodes
    assert "fields" in refusal(path)
    path.write_bytes(raw + b"\x32\x80\x80\x01" + bytes(2**14))  # a documentation string
    assert "beside its weights" in refusal(path)


def test_the_checked_bytes_are_those_that_run(tmp_path: Path) -> None:
    """Fields that this protobuf does not know never reach ONNX Runtime, nor does a file that is replaced later."""
    path = write(tmp_path, tiny_onnx())
    path.write_bytes(path.read_bytes() + b"\xfa\x7f\x03abc")  # field 2047
    opened = read_onnx(path)
    path.unlink()
    assert opened.serialized() == tiny_onnx().SerializeToString()


@pytest.mark.parametrize("part", ["domain", "op_type"])  # the first is in our message, the second in that of ONNX
def test_names_cannot_control_a_terminal(part: str, tmp_path: Path) -> None:
    model = tiny_onnx()
    setattr(model.graph.node[2], part, "\x1b]0;owned\x07")
    assert "owned" in refusal(write(tmp_path, model))


# Fuzz: in a child, since a crash of a library would end the tests.

MAX_MEMORY = 6 * 2**30


@pytest.mark.parametrize(("which", "copies"), [("by hand", 250), ("exported", 120)])
def test_no_changed_copy_crashes(which: str, copies: int, exported: tuple[Path, Path], tmp_path: Path) -> None:
    path = write(tmp_path, tiny_onnx()) if which == "by hand" else exported[1]
    done = python(
        "-c", f"from {__name__} import fuzz; fuzz({str(path)!r}, {str(tmp_path / 'changed.onnx')!r}, {copies})"
    )
    refused, ran, grown = map(int, done.ok().out.split()[-3:])
    assert refused + ran == copies
    assert refused > copies // 10
    assert ran > 0, "changes in weights and names should leave some that run"
    assert grown < 2**30


def fuzz(path: str, copy: str, copies: int) -> None:
    """Open and run changed copies of a file, each written to `copy`.

    Prints how many were refused, how many ran, and by how many bytes memory grew.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    torch.set_num_threads(1)
    raw, ran = Path(path).read_bytes(), 0
    with open_runner(path, threads=1) as runner:
        images = torch.zeros(2, 1, runner.spec.input.size, runner.spec.input.size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(copies):
        Path(copy).write_bytes(changed(raw, seed))
        print(seed, flush=True)  # the last one shows which copy crashed
        try:
            with open_runner(copy, threads=1) as runner:
                assert runner.run(images).logits_NK.shape == (2, len(runner.spec.labels))
        except UserError:
            continue
        ran += 1
    print(copies - ran, ran, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def changed(raw: bytes, seed: int) -> bytes:
    """Return a copy with some bytes changed, cut out, doubled or inserted; mostly where the structure is."""
    dice = random.Random(seed)
    # Weights lie in long runs of bytes that are not text: aim elsewhere most of the time.
    places = [i for i in range(len(raw)) if 32 <= raw[i] < 127 or raw[i] < 16] if dice.random() < 0.8 else []
    copy = bytearray(raw)
    for _ in range(dice.choice([1, 1, 1, 2, 5, 20])):
        at = min(dice.choice(places) if places else dice.randrange(len(raw)), len(copy) - 1)
        step, number = bytes([(copy[at] + dice.choice([-1, 1])) % 256]), b"\xff" * 8 + b"\x7f"
        new = dice.choice([b"", dice.randbytes(1), dice.randbytes(4), bytes(copy[at : at + 16]), step, number])
        copy[at : at + dice.choice([0, 1, 1, 1, 2, 16])] = new
    return bytes(copy[: dice.randrange(1, len(copy))]) if dice.random() < 0.05 else bytes(copy)
