"""`python -m export.onnx` and `python -m export.trt` as typed: what they leave, what they say, what they record."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from export import onnx as onnx_command
from export import trt
from export.console import Wish
from export.pipeline import export
from fer_dist.engine.checkpoint import load, write_safetensors
from fer_dist.errors import EXIT_REJECTED, EXIT_USER_ERROR, UserError
from fer_dist.serve.artifact import contract, file_sha256, read_sidecar
from fer_dist.serve.dataset import data_settings
from fer_dist.serve.onnxfile import read_onnx
from fer_dist.serve.runner import open_runner
from tests.helpers.exporting import command, names, nothing_changes, saved
from tests.helpers.tiny_models import pictures

LOOSE = ("--tolerance", "agreement=0,accuracy=0.5,kl=9")
"""Random weights answer two classes almost alike: that a picture in fifty goes the other way says nothing."""


def plain(path: Path) -> dict[str, Any]:
    """A JSON file beside an artifact."""
    found: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text())
    return found


# -- what is left


def test_the_way_to_an_engine(whole: Path) -> None:
    assert names(whole) == ["best.engine", "best.engine.json", "best.onnx", "best.onnx.json", "best.pth"]
    checkpoint = load(whole / "best.pth")
    graph, engine = read_sidecar(whole / "best.onnx"), read_sidecar(whole / "best.engine")
    for path, told in ((whole / "best.onnx", graph), (whole / "best.engine", engine)):
        assert told.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert told.bytes == path.stat().st_size
        assert told.spec == checkpoint.spec
        assert told.checkpoint_sha256 == file_sha256(whole / "best.pth")
        assert told.data == data_settings(checkpoint.config)
        assert told.data["data"]["embedded_val"] == 140
        assert {"fer-dist", "torch", "onnx", "onnxscript"} <= told.built_with.keys()
        assert plain(path)["contract"] == contract(checkpoint.spec)
        assert (told.kind, told.precision) == (path.suffix[1:], "fp32")
    assert (graph.parent, graph.parent_sha256) == ("best.pth", graph.checkpoint_sha256)
    assert (engine.parent, engine.parent_sha256) == ("best.onnx", graph.sha256)
    assert (graph.batch, engine.batch) == ((), (1, 8, 64))
    opened = read_onnx(whole / "best.onnx")
    assert (opened.spec, opened.precision, opened.checkpoint_sha256) == (graph.spec, "fp32", graph.checkpoint_sha256)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_attention_in_every_precision(precision: str, exported_before: None, tmp_path: Path) -> None:
    """The ONNX files of patt_lite show where it looked, say so in their contract, and engines do neither."""
    path = saved(tmp_path, "patt_lite")
    assert (
        command(
            onnx_command.main,
            path,
            "--precision",
            precision,
            *((*LOOSE, "--calibration", 16) if precision != "fp32" else ()),
        )
        == 0
    )
    found = sorted(tmp_path.glob("*.onnx"))
    assert found
    with open_runner(path) as reference:
        expected_NHW = reference.model.with_attention(pictures(5))[1].detach()  # type: ignore[attr-defined]
    for file in found:
        with open_runner(file, provider="cpu") as runner:
            attention_NHW = runner.run(pictures(5)).attention_NHW
        assert attention_NHW is not None
        torch.testing.assert_close(attention_NHW.sum((1, 2)), torch.ones(5), rtol=0, atol=1e-2)
        torch.testing.assert_close(attention_NHW, expected_NHW, rtol=0.1, atol=2e-3)
        assert plain(file)["contract"]["outputs"]["attention"]["shape"] == ["N", "h", "w"]
        assert read_sidecar(file).attends


def test_the_report_is_in_the_sidecar(whole: Path) -> None:
    told = read_sidecar(whole / "best.onnx").parity
    assert told["passed"] is True
    assert told["executed"] is True
    assert told["top1_agreement"] == 1
    assert 0 < told["relative"] <= 1e-4
    assert told["count"] == told["of"] == 140
    assert set(told["by_batch"]) >= {"1", "2", "3", "7", "64"}
    assert told["tolerance"] == {"agreement": 1.0, "relative": 1e-4, "accuracy": 0.0, "kl": 1e-6, "loosened": []}
    assert told["accuracy_reference"] == told["accuracy_candidate"]


def test_an_engine_that_was_not_executed_says_so(whole: Path) -> None:
    told = read_sidecar(whole / "best.engine")
    assert told.built_with["backend"] == "rtx"
    assert told.built_with["compute_capabilities"] == []
    assert told.parity["executed"] is False
    assert told.parity["execute"] == f"python -m export.parity {whole / 'best.pth'} {whole / 'best.engine'}"
    with pytest.raises(UserError, match="GPU"):
        open_runner(whole / "best.engine")


def test_other_precisions_from_our_onnx_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fp16 from best.onnx, an engine from that; int8 in both forms. The float32 file stays as it was."""
    before = (copy / "best.onnx").read_bytes()
    assert command(trt.main, copy / "best.onnx", "--backend", "rtx", "--precision", "fp16", *LOOSE) == 0
    shown = capsys.readouterr().out
    assert "with best.pth (torch" in shown, "the checkpoint beside it is the reference"
    assert "NOT executed" in shown
    assert f"python -m export.parity {copy / 'best.pth'} {copy / 'best.fp16.engine'}" in shown
    half = read_sidecar(copy / "best.fp16.onnx")
    assert (half.precision, half.parent, half.parent_sha256) == ("fp16", "best.onnx", file_sha256(copy / "best.onnx"))
    assert "float16: " in half.made[0]
    assert half.parity["tolerance"]["loosened"] == LOOSE[1].split(",")
    assert read_sidecar(copy / "best.fp16.engine").parent == "best.fp16.onnx"
    # From the half-precision file itself: again its engine.
    (copy / "best.fp16.engine").unlink()
    assert command(trt.main, copy / "best.fp16.onnx", "--backend", "rtx", *LOOSE) == 0
    engine = read_sidecar(copy / "best.fp16.engine")
    assert (engine.parent, engine.made) == ("best.fp16.onnx", half.made), "its JSON file says what the precision took"
    words = ["--precision", "int8", "--calibration", "20", "--seed", "3", *LOOSE]
    assert command(onnx_command.main, copy / "best.onnx", *words) == 0
    for form in ("int8", "int8.cpu"):
        told = read_sidecar(copy / f"best.{form}.onnx")
        assert (told.precision, told.parent) == (form, "best.onnx")
        assert told.calibration["pictures"] == 20
        assert told.calibration["seed"] == 3
        assert told.calibration["data"] == "training part of embedded drawn faces"
        assert any("ranges over 20 pictures" in line for line in told.made)
    assert (copy / "best.onnx").read_bytes() == before
    made = ["fp16.engine", "fp16.onnx", "int8.cpu.onnx", "int8.onnx", "onnx"]
    expected = {f"best.{name}{more}" for name in made for more in ("", ".json")} | {"best.pth"}
    assert set(names(copy)) == expected
    # What it cannot become.
    with nothing_changes(copy):
        for words in (["best.fp16.onnx", "--precision", "int8"], ["best.int8.onnx", "--precision", "fp16"]):
            assert command(onnx_command.main, copy / words[0], *words[1:]) == EXIT_USER_ERROR
            assert "cannot become" in capsys.readouterr().err
        assert command(trt.main, copy / "best.int8.cpu.onnx", "--backend", "rtx") == EXIT_USER_ERROR
        assert "quantised for CPUs" in capsys.readouterr().err


def test_the_same_checkpoint_gives_the_same_file(copy: Path) -> None:
    """And a checkpoint as safetensors the same weights, from another parent."""
    before = (copy / "best.onnx").read_bytes()
    assert export(Wish(path=copy / "best.pth", limit=5)) == [copy / "best.onnx"]
    assert (copy / "best.onnx").read_bytes() == before
    write_safetensors(copy / "shared.safetensors", load(copy / "best.pth"))
    assert export(Wish(path=copy / "shared.safetensors", limit=5)) == [copy / "shared.onnx"]
    graphs = [onnx.load(copy / name) for name in ("best.onnx", "shared.onnx")]
    assert graphs[0].graph.SerializeToString() == graphs[1].graph.SerializeToString()
    assert graphs[0].metadata_props != graphs[1].metadata_props


@pytest.mark.usefixtures("exported_before")
def test_data_and_limit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "\n".join(f"{i % 7},{' '.join([str(i * 7)] * 48 * 48)},PublicTest" for i in range(9))
    (copy / "faces.csv").write_text(f"emotion,pixels,Usage\n{rows}\n")
    assert command(onnx_command.main, copy / "best.pth", "--data", copy / "faces.csv", "--limit", 5) == 0
    told = read_sidecar(copy / "best.onnx").parity
    assert (told["count"], told["of"]) == (5, 9)
    assert "faces.csv" in told["data"]
    assert set(told["by_batch"]) == {"1", "2", "3", "7", "64"}, "five pictures in every size of batch"
    # To calibrate it takes a training part, which is told before any work.
    with nothing_changes(copy):
        words = [copy / "best.pth", "--data", copy / "faces.csv", "--precision", "int8"]
        assert command(onnx_command.main, *words) == EXIT_USER_ERROR
        assert "train part is empty" in capsys.readouterr().err


@pytest.mark.usefixtures("exported_before")
def test_data_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, "vit", data__path="/nowhere/fer2013.csv")
    assert command(onnx_command.main, path) == 0
    shown = capsys.readouterr().out
    assert "/nowhere/fer2013.csv, which the model was judged on, is not here" in shown
    assert "not meaningful: these are not the pictures that the model was made for" in shown
    assert read_sidecar(tmp_path / "best.onnx").parity["meaningful"] is False


@pytest.mark.usefixtures("few_faces")
def test_an_onnx_file_without_its_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with itself, which is told, where its JSON file says that it had passed; else nobody says what it is."""
    (copy / "best.pth").unlink()
    assert command(trt.main, copy / "best.onnx", "--backend", "rtx", "--limit", 80) == 0
    assert "compared with best.onnx itself" in capsys.readouterr().out
    told = read_sidecar(copy / "best.engine").parity
    assert told["tolerance"]["loosened"] == ["limit=80"]
    assert "best.onnx itself, which had passed" in told["reference"]
    (copy / "best.onnx.json").unlink()
    with nothing_changes(copy):
        assert command(trt.main, copy / "best.onnx", "--backend", "rtx") == EXIT_USER_ERROR
        assert "nothing beside" in capsys.readouterr().err


def test_a_file_that_has_changed_under_its_json_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = read_sidecar(copy / "best.onnx")
    beside = copy / "best.onnx.json"
    beside.write_text(json.dumps(replace(told, sha256="e" * 64).to_dict()))
    with nothing_changes(copy):
        assert command(trt.main, copy / "best.onnx", "--backend", "rtx") == EXIT_USER_ERROR
    assert "best.onnx.json is about another file than best.onnx" in capsys.readouterr().err.replace(str(copy) + "/", "")


def test_labels_in_another_order_do_not_pass(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In an ONNX file that was given: what its checkpoint says is compared, not what it says itself."""
    graph = onnx.load(copy / "best.onnx")
    for entry in graph.metadata_props:
        plain = json.loads(entry.value)
        if entry.key == "labels":
            entry.value = json.dumps(sorted(plain))
        elif entry.key == "fer_dist":
            entry.value = json.dumps({**plain, "spec": {**plain["spec"], "labels": sorted(plain["spec"]["labels"])}})
    onnx.save(graph, copy / "best.onnx")
    (copy / "best.onnx.json").unlink()
    with nothing_changes(copy):
        assert command(trt.main, copy / "best.onnx", "--backend", "rtx", "--limit", 80) == EXIT_REJECTED
    assert "its labels are angry, disgust, fear, happy, neutral, sad, surprise, not angry" in capsys.readouterr().err


def test_a_tolerance_is_for_what_was_asked(copy: Path) -> None:
    """The float32 graph that float16 is made from is judged as ever; the line that executes the engine is as loose."""
    words = ["--precision", "fp16", "--backend", "rtx", "--limit", "80", *LOOSE]
    assert command(trt.main, copy / "best.pth", *words) == 0
    assert read_sidecar(copy / "best.onnx").parity["tolerance"]["loosened"] == ["limit=80"]
    told = read_sidecar(copy / "best.fp16.engine").parity
    assert told["tolerance"]["loosened"] == [*LOOSE[1].split(","), "limit=80"]
    assert told["execute"].endswith(f"--limit 80 --tolerance {LOOSE[1]}")


def test_nothing_to_make(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_changes(copy):
        assert command(onnx_command.main, copy / "best.onnx") == EXIT_USER_ERROR
    assert "is what it would become" in capsys.readouterr().err
