"""An ONNX file from outside is one of ours, whole and modest, or a UserError."""

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fer_dist.errors import UserError
from fer_dist.serve.artifact import INPUT, PROBABILITIES, Precision, onnx_metadata
from fer_dist.serve.onnxfile import MOST_BYTES, MOST_FIELDS, MOST_STRUCTURE, read_onnx
from fer_dist.serve.runner import open_runner
from tests.conftest import ROOT
from tests.helpers.artifacts import (
    CHECKPOINT,
    CLASSES,
    SIDE,
    SPEC,
    add,
    expected_logits,
    external,
    tiny_onnx,
    write,
)

node = helper.make_node


def refusal(path: Path) -> str:
    """Why a file is refused, in one line."""
    with pytest.raises(UserError) as caught:
        read_onnx(path)
    assert caught.value.fix
    assert "\n" not in caught.value.problem
    return caught.value.problem


@pytest.mark.parametrize(("told", "is_of"), [("fp32", "int8"), ("int8", "fp32"), ("fp16", "fp32"), ("fp32", "fp16")])
def test_its_metadata_cannot_choose_how_strictly_it_is_judged(
    told: Precision, is_of: Precision, tmp_path: Path
) -> None:
    model = tiny_onnx(is_of)
    helper.set_model_props(model, onnx_metadata(SPEC, precision=told, checkpoint_sha256=CHECKPOINT))
    assert f"its metadata says {told}, its graph is {is_of}" in refusal(write(tmp_path, model))


def test_one_of_ours_passes(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_onnx("fp16"))
    opened = read_onnx(path)
    assert (opened.spec, opened.precision, opened.checkpoint_sha256) == (SPEC, "fp16", CHECKPOINT)
    assert ModelProto.FromString(opened.serialized()) == tiny_onnx("fp16")
    with pytest.raises(UserError, match=r"cannot read .*none.onnx"):
        read_onnx(tmp_path / "none.onnx")


def test_what_torch_exports_passes(exported: tuple[Path, Path]) -> None:
    """A real graph with its lengths computed from shapes."""
    assert read_onnx(exported[1]).spec.arch == "vit"


def first(model: ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def _external(location: str) -> Callable[[ModelProto], object]:
    return lambda model: external(first(model, "weight"), location)


def _external_constant(model: ModelProto) -> None:
    tensor = TensorProto(name="inside", data_type=TensorProto.FLOAT, dims=[1])
    external(tensor, "/etc/passwd")
    add(model.graph, node("Constant", [], ["c"], value=tensor))


def _set(path: str, value: object) -> Callable[[ModelProto], object]:
    """Put `value` where a dotted path such as `graph.node[1].domain` leads."""

    def change(model: ModelProto) -> None:
        exec(f"model.{path} = value", {"model": model, "value": value})

    return change


def _typed_too(model: ModelProto) -> None:
    first(model, "bias").float_data.extend([0.0] * CLASSES)


def _foreign(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[2].domain = "com.microsoft"


def _function(model: ModelProto) -> None:
    model.functions.add().name = "f"


def _branches(model: ModelProto) -> None:
    branch = helper.make_graph([node("Constant", [], ["b"], value_float=1.0)], "b", [], [])
    branch.output.add().name = "b"
    add(model.graph, node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch), yes=np.array(True))


def _hidden_graph(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("to2", GraphProto(name="hidden")))


def _sparse(model: ModelProto) -> None:
    model.graph.sparse_initializer.add().dims.extend([3])


def _label(model: ModelProto) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == "labels")
    entry.value = entry.value.replace("angry", "calm")


def _twice(model: ModelProto) -> None:
    model.metadata_props.append(model.metadata_props[0])


def _no_metadata(model: ModelProto) -> None:
    del model.metadata_props[:]


def _second_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def _one_output(model: ModelProto) -> None:
    del model.graph.output[1]


def _more_outputs(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["N", 64]))


def _backwards(model: ModelProto) -> None:
    kept = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _made_twice(model: ModelProto) -> None:
    model.graph.node.append(node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT))


def _stored_twice(model: ModelProto) -> None:
    model.graph.initializer.append(first(model, "bias"))


def _fixed_inside(model: ModelProto) -> None:
    first(model, "flat").CopyFrom(numpy_helper.from_array(np.array([2, SIDE * SIDE]), "flat"))


def _wide(model: ModelProto) -> None:
    first(model, "weight").CopyFrom(numpy_helper.from_array(np.zeros((64, 8), dtype=np.float32), "weight"))
    first(model, "bias").CopyFrom(numpy_helper.from_array(np.zeros(8, dtype=np.float32), "bias"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_external("/etc/passwd"), "another file .*/etc/passwd"),
        (_external("../other.bin"), "another file"),
        (_external("weights.bin"), "another file"),
        (_external("*/_ORT_MEM_ADDR_/*"), "another file"),
        (_external_constant, "another file"),
        (_set("graph.initializer[2].dims[0]", 63), "shape .*63.* but its data are"),
        (_set("graph.initializer[2].dims[0]", 2**60), "but its data are"),
        (_set("graph.initializer[2].dims[0]", -64), "negative"),
        (_set("graph.initializer[2].raw_data", b"\0" * 17), "but its data are"),
        (_set("graph.initializer[2].data_type", TensorProto.STRING), "type 8"),
        (_set("graph.initializer[2].data_type", 99), "type 99"),
        (_typed_too, "but its data are"),
        (_foreign, "domain 'com.microsoft', none of ONNX's own"),
        (_set("graph.node[2].op_type", "NoSuch"), "NoSuch"),
        (_set("graph.node[2].input[0]", "nowhere"), "nowhere"),
        (_branches, "holds graphs"),
        (_hidden_graph, "holds graphs"),
        (_function, "functions"),
        (_sparse, "sparse"),
        (_set("opset_import[0].version", 19), r"opset \[19\]"),
        (_set("opset_import[0].domain", "other"), r"opset \[\]"),
        (_set("ir_version", 99), "graph is invalid"),
        (_no_metadata, "metadata"),
        (_label, "labels differ"),
        (_twice, "twice"),
        (_set("graph.input[0].name", "image"), "expected .*images"),
        (_set("graph.input[0].type.tensor_type.elem_type", TensorProto.FLOAT), "inputs and outputs"),
        (_set("graph.input[0].type.tensor_type.shape.dim[0].dim_value", 1), "inputs and outputs"),
        (_set("graph.input[0].type.tensor_type.shape.dim[2].dim_value", 48), "inputs and outputs"),
        (_set("graph.output[0].name", "scores"), "inputs and outputs"),
        (_set("graph.output[1].type.tensor_type.shape.dim[0].dim_value", 1), "inputs and outputs"),
        (_set("graph.output[1].type.tensor_type.shape.dim[1].dim_value", 8), "inputs and outputs"),
        (_second_input, "inputs and outputs"),
        (_one_output, "inputs and outputs"),
        (_more_outputs, "inputs and outputs"),
        (_backwards, "graph is invalid"),
        (_made_twice, "graph is invalid"),
        (_stored_twice, "2 tensors named 'bias'"),
        (_fixed_inside, "graph is invalid|have the shapes"),
        (_wide, "graph is invalid|have the shapes"),
    ],
)
def test_what_is_not_ours_is_refused(change: Callable[[ModelProto], object], words: str, tmp_path: Path) -> None:
    model = tiny_onnx()
    change(model)
    with pytest.raises(UserError, match=f"is refused: .*({words})") as caught:
        read_onnx(write(tmp_path, model))
    assert "python -m export.onnx" in caught.value.fix


def with_attention(
    model: ModelProto, *sides: int | str, kind: int = TensorProto.FLOAT, name: str = "attention"
) -> None:
    """A third output: the probabilities as a map of one row, told to be of these sides."""
    model.graph.node.append(node("Unsqueeze", [PROBABILITIES, "second"], [name]))
    model.graph.initializer.append(helper.make_tensor("second", TensorProto.INT64, [1], [1]))
    model.graph.output.append(helper.make_tensor_value_info(name, kind, ["N", *sides]))


def _attention_and_more(model: ModelProto) -> None:
    with_attention(model, 1, 7)
    _more_outputs(model)


def test_attention_may_come_out_as_well(tmp_path: Path) -> None:
    model = tiny_onnx()
    assert read_onnx(write(tmp_path, model)).attention is None
    with_attention(model, 1, 7)
    path = write(tmp_path, model)
    assert read_onnx(path).attention == (1, 7)
    with open_runner(path, provider="cpu") as runner:
        found = runner.run(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert found.attention_NHW is not None
    assert torch.equal(found.attention_NHW.squeeze(1), found.probabilities_NK)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: with_attention(model, 7), "inputs and outputs"),
        (lambda model: with_attention(model, 1, 7, 1), "inputs and outputs"),
        (lambda model: with_attention(model, "h", 7), "inputs and outputs"),
        (lambda model: with_attention(model, 0, 7), "inputs and outputs"),
        (lambda model: with_attention(model, 1, 7, kind=TensorProto.FLOAT16), "inputs and outputs"),
        (lambda model: with_attention(model, 1, 7, name="attending"), "inputs and outputs"),
        (lambda model: with_attention(model, 7, 1), "graph is invalid|have the shapes"),
        (lambda model: with_attention(model, 1, 2**40), "graph is invalid|have the shapes"),
        (_attention_and_more, "inputs and outputs"),
    ],
)
def test_attention_of_another_form_is_refused(
    change: Callable[[ModelProto], object], words: str, tmp_path: Path
) -> None:
    model = tiny_onnx()
    change(model)
    with pytest.raises(UserError, match=f"is refused: .*({words})"):
        read_onnx(write(tmp_path, model))


def f32(values: object) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


LARGE = np.array([2**15, 2**15], dtype=np.int64)


def _doubling() -> tuple[NodeProto, ...]:
    return tuple(node("Concat", [f"x{i}", f"x{i}"], [f"x{i + 1}"], axis=0) for i in range(40))


BOMBS: dict[str, tuple[tuple[NodeProto, ...], dict[str, object]]] = {
    "ConstantOfShape": ((node("ConstantOfShape", ["large"], ["b"]),), {"large": LARGE}),
    "Expand": ((node("Expand", ["one", "large"], ["b"]),), {"one": f32([1]), "large": LARGE}),
    "Tile": ((node("Tile", ["one", "large"], ["b"]),), {"one": f32([[1]]), "large": LARGE}),
    "Range": ((node("Range", ["a", "z", "d"], ["b"]),), {"a": np.int64(0), "z": np.int64(2**40), "d": np.int64(1)}),
    "Pad": ((node("Pad", [INPUT, "by"], ["b"]),), {"by": np.array([0, 0, 0, 0, 0, 0, 2**15, 2**15])}),
    "Resize": ((node("Resize", [INPUT, "", "", "to"], ["b"]),), {"to": np.array([1, 1, 2**15, 2**15])}),
    "OneHot": (
        (node("OneHot", ["of", "depth", "values"], ["b"]),),
        {"of": np.zeros(2**12, dtype=np.int64), "depth": np.int64(2**20), "values": f32([0, 1])},
    ),
    "doubling": (_doubling(), {"x0": np.zeros(2**10, dtype=np.float32)}),
    "many": (
        tuple(node("ConstantOfShape", ["large"], [f"b{i}"]) for i in range(9)),
        {"large": np.array([2**13, 2**13])},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_does_not_grow(name: str, tmp_path: Path) -> None:
    model = tiny_onnx()
    nodes, stored = BOMBS[name]
    add(model.graph, *nodes, **stored)
    path = write(tmp_path, model)
    assert path.stat().st_size < 2**17
    assert ("at once" in (problem := refusal(path))) or ("does not follow" in problem)


@pytest.mark.parametrize("begin", ["kept", "fleeting"])
def test_what_is_held_at_once_is_bounded(begin: str, tmp_path: Path) -> None:
    """Nine tensors of 2**26 numbers, one after the other: too many where they do not depend on the pictures,
    since a session computes them once and keeps them."""
    model = tiny_onnx()
    source = "float0" if begin == "fleeting" else "stored"
    chain = [node("Cast", [INPUT], ["float0"], to=TensorProto.FLOAT), node("Identity", [source], ["s0"])]
    for i in range(9):
        chain += [
            node("Resize", [f"s{i}", "", "times"], [f"wide{i}"]),
            node("ReduceMean", [f"wide{i}"], [f"m{i}"]),
            node("Add", [f"m{i}", f"s{i}"], [f"s{i + 1}"]),
        ]
    small = np.zeros((1, 1, SIDE, SIDE), dtype=np.float32)
    add(model.graph, *chain, times=f32([1, 1, 2**10, 2**10]), stored=small)
    path = write(tmp_path, model)
    if begin == "kept":
        assert "at once" in refusal(path)
    else:
        read_onnx(path)


def test_growth_beyond_the_batch_is_refused(tmp_path: Path) -> None:
    """Each picture against each: harmless for one, not for many."""
    model = tiny_onnx()
    graph = model.graph
    add(
        graph,
        node("Cast", [INPUT], ["f"], to=TensorProto.FLOAT),
        node("Reshape", ["f", "flat"], ["rows"]),
        node("Transpose", ["rows"], ["columns"], perm=[1, 0]),
        node("MatMul", ["rows", "columns"], ["each"]),
    )
    assert "'each' grows faster than the batch" in refusal(write(tmp_path, model))


def test_a_shape_that_depends_on_pixels_is_refused(tmp_path: Path) -> None:
    model = tiny_onnx()
    add(model.graph, node("NonZero", [INPUT], ["where"]))
    assert "'where' does not follow" in refusal(write(tmp_path, model))


def test_a_length_computed_from_the_batch_is_followed(tmp_path: Path) -> None:
    """`Range` up to the batch, as timm's convnext has it: ONNX's inference alone gives up there."""
    model = tiny_onnx()
    add(
        model.graph,
        node("Shape", [INPUT], ["sizes"], start=0, end=1),
        node("Squeeze", ["sizes"], ["count"]),
        node("Range", ["zero", "count", "one"], ["rows"]),
        node("Gather", [INPUT, "rows"], ["same"], axis=0),
        zero=np.int64(0),
        one=np.int64(1),
    )
    model.graph.node[4].input[0] = "same"
    images = torch.randint(0, 256, (5, 1, SIDE, SIDE), dtype=torch.uint8)
    with open_runner(write(tmp_path, model), threads=1) as runner:
        torch.testing.assert_close(runner(images), expected_logits(images))


@pytest.mark.parametrize("length", [1, 2, 9, 100, 1000, -1])
def test_a_file_cut_short_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(tiny_onnx().SerializeToString()[:length])
    assert "is refused" in refusal(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    for content, words in ((b"", "empty"), (b"\x1b[31m, ours?", "is refused"), (os.urandom(5000), "is refused")):
        path.write_bytes(content)
        assert words in refusal(path)
        assert "\x1b" not in refusal(path)
    assert "no regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "no regular file" in refusal(tmp_path / "pipe.onnx")


def test_sizes_are_bounded_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert "larger than" in refusal(path)
    raw = tiny_onnx().SerializeToString()
    empty_nodes = b"\x0a\x00" * (MOST_FIELDS + 1)
    path.write_bytes(raw + b"\x3a" + _varint(len(empty_nodes)) + empty_nodes)
    assert "fields" in refusal(path)
    path.write_bytes(raw + b"\x32" + _varint(MOST_STRUCTURE) + bytes(MOST_STRUCTURE))
    assert "beside its weights" in refusal(path)


def _varint(value: int) -> bytes:
    return bytes((value >> 7 * i & 0x7F) | (0x80 if value >> 7 * (i + 1) else 0) for i in range(5) if value >> 7 * i)


def test_what_was_looked_at_is_what_runs(tmp_path: Path) -> None:
    """Fields that this protobuf does not know never reach ONNX Runtime, nor does a file that comes later."""
    path = write(tmp_path, tiny_onnx())
    path.write_bytes(path.read_bytes() + b"\xfa\x7f\x03abc")  # field 2047
    opened = read_onnx(path)
    path.unlink()
    assert opened.serialized() == tiny_onnx().SerializeToString()


def test_names_obey_no_terminal(tmp_path: Path) -> None:
    """Neither those that we quote nor those that ONNX's checker does."""
    for part in ("domain", "op_type"):
        model = tiny_onnx()
        setattr(model.graph.node[2], part, "\x1b]0;owned\x07")
        problem = refusal(write(tmp_path, model))
        assert "owned" in problem
        assert problem.isprintable()


# Fuzz: in a child, since a crash of a library would end the tests.

COPIES, MOST_MEMORY = 250, 6 * 2**30


@pytest.mark.parametrize("which", ["by hand", "exported"])
def test_no_copy_with_changes_crashes(which: str, exported: tuple[Path, Path], tmp_path: Path) -> None:
    path = write(tmp_path, tiny_onnx()) if which == "by hand" else exported[1]
    code = f"from tests.serve.test_onnxfile import fuzz; fuzz({str(path)!r}, {str(tmp_path / 'changed.onnx')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit code {done.returncode} after {last}: {done.stderr[-2000:]}"
    refused, ran, grown = map(int, last[0].split())
    assert refused + ran == COPIES
    assert refused > COPIES // 10
    assert ran > 0, "changes in weights and names should leave some that run"
    assert grown < 2**30


def fuzz(path: str, copy: str) -> None:
    """Open and run changed copies of a file, each written to `copy`.

    Prints how many were refused, how many ran, and by how many bytes memory grew.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    torch.set_num_threads(1)
    raw = Path(path).read_bytes()
    with open_runner(path, threads=1) as runner:
        side = runner.spec.input.size
    images = torch.zeros(2, 1, side, side, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {True: 0, False: 0}
    for seed in range(COPIES):
        Path(copy).write_bytes(mutated(raw, seed))
        print(seed, flush=True)
        try:
            with open_runner(copy, threads=1) as runner:
                assert runner.run(images).logits_NK.shape == (2, len(runner.spec.labels))
        except UserError:
            counts[False] += 1
        else:
            counts[True] += 1
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(counts[False], counts[True], grown)


def mutated(raw: bytes, seed: int) -> bytes:
    """A copy with some bytes changed, cut out, doubled or exchanged; mostly where the structure is."""
    dice = random.Random(seed)
    # Weights lie in long runs of bytes that are no text: aim elsewhere most of the time.
    places = [i for i in range(len(raw)) if 32 <= raw[i] < 127 or raw[i] < 16] if dice.random() < 0.8 else []
    changed = bytearray(raw)
    for _ in range(dice.choice([1, 1, 1, 2, 5, 20])):
        at = dice.choice(places) if places else dice.randrange(len(raw))
        at = min(at, len(changed) - 1)
        match dice.randrange(7):
            case 0:
                changed[at] ^= 1 << dice.randrange(8)
            case 1:
                changed[at] = dice.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                del changed[at : at + dice.choice([1, 2, 16])]
            case 3:
                changed[at:at] = changed[at : at + dice.choice([1, 2, 16, 64])]
            case 4:
                changed[at:at] = dice.randbytes(dice.choice([1, 4]))
            case 5:
                changed[at : at + 1] = b"\xff" * 8 + b"\x7f"  # a huge number, where one begins
            case _:
                changed[at] = (changed[at] + dice.choice([-1, 1])) % 256
    return bytes(changed[: dice.randrange(1, len(changed))]) if dice.random() < 0.05 else bytes(changed)
