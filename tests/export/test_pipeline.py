"""`python -m export.onnx` and `python -m export.trt` as typed: what they leave, what they say, what they record."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from export import onnx as onnx_command
from export import trt
from export.console import Wish
from export.pipeline import export
from fer_dist.engine.checkpoint import load, write_safetensors
from fer_dist.errors import EXIT_REJECTED, UserError
from fer_dist.serve.artifact import contract, file_sha256, read_sidecar
from fer_dist.serve.dataset import data_settings
from fer_dist.serve.runner import open_runner
from tests.helpers.commands import Capture, refused
from tests.helpers.exporting import LOOSE, command, names, nothing_changes, saved, sidecar_of
from tests.helpers.tiny_models import pictures


def test_the_sidecars_of_a_graph_and_its_engine(whole: Path) -> None:
    assert names(whole) == ["best.engine", "best.engine.json", "best.onnx", "best.onnx.json", "best.pth"]
    checkpoint = load(whole / "best.pth")
    graph, engine = read_sidecar(whole / "best.onnx"), read_sidecar(whole / "best.engine")
    for path, model in ((whole / "best.onnx", graph), (whole / "best.engine", engine)):
        assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert model.bytes == path.stat().st_size
        assert model.spec == checkpoint.spec
        assert model.checkpoint_sha256 == file_sha256(whole / "best.pth")
        assert model.data == data_settings(checkpoint.config)
        assert model.data["data"]["embedded_val"] == 140
        assert {"fer-dist", "torch", "onnx", "onnxscript"} <= model.built_with.keys()
        assert sidecar_of(path)["contract"] == contract(checkpoint.spec)
        assert (model.kind, model.precision) == (path.suffix[1:], "fp32")
    assert (graph.parent, graph.parent_sha256) == ("best.pth", graph.checkpoint_sha256)
    assert (engine.parent, engine.parent_sha256) == ("best.onnx", graph.sha256)
    assert (graph.batch, engine.batch) == ((), (1, 8, 64))


def test_the_report_is_in_the_sidecar(whole: Path) -> None:
    """That of an engine which was not executed says so."""
    report = read_sidecar(whole / "best.onnx").parity
    assert (report["passed"], report["executed"], report["top1_agreement"]) == (True, True, 1)
    assert report["count"] == report["of"] == 140
    assert set(report["by_batch"]) >= {"1", "2", "3", "7", "64"}
    assert report["tolerance"] == {"agreement": 1.0, "relative": 1e-4, "accuracy": 0.0, "kl": 1e-6, "loosened": []}
    engine = read_sidecar(whole / "best.engine")
    assert (engine.built_with["backend"], engine.built_with["compute_capabilities"]) == ("rtx", [])
    assert engine.parity["executed"] is False
    assert engine.parity["execute"] == f"python -m export.parity {whole / 'best.pth'} {whole / 'best.engine'}"
    with pytest.raises(UserError, match="GPU"):
        open_runner(whole / "best.engine")


@pytest.mark.parametrize(("precision", "files"), [("fp16", 2), ("int8", 3)])
def test_attention_in_every_precision(precision: str, files: int, exported_before: None, tmp_path: Path) -> None:
    """ONNX files of patt_lite have the output, and say so in their contract."""
    path = saved(tmp_path, "patt_lite")
    words = ["--precision", precision, "--limit", 80, "--calibration", 16, *LOOSE]
    assert command(onnx_command.main, path, *words) == 0
    with open_runner(path) as reference:
        expected_NHW = reference.model.with_attention(pictures(5))[1].detach()  # type: ignore[attr-defined]
    found = sorted(tmp_path.glob("*.onnx"))
    assert len(found) == files
    for file in found:
        with open_runner(file, provider="cpu") as runner:
            attention_NHW = runner.run(pictures(5)).attention_NHW
        torch.testing.assert_close(attention_NHW, expected_NHW, rtol=0.1, atol=2e-3)
        assert sidecar_of(file)["contract"]["outputs"]["attention"]["shape"] == ["N", "h", "w"]
        assert read_sidecar(file).attends


@pytest.mark.usefixtures("exported_before")
def test_a_float16_engine_from_the_checkpoint(copy: Path, capsys: Capture) -> None:
    """A tolerance is for the requested precision, not for the float32 graph that float16 is made from."""
    words = ["--backend", "rtx", "--limit", "80", *LOOSE]
    assert command(trt.main, copy / "best.pth", "--precision", "fp16", *words) == 0
    shown = capsys.readouterr().out
    assert "with best.pth (torch" in shown, "the checkpoint is the reference"
    assert "NOT executed" in shown
    execute = f"python -m export.parity {copy / 'best.pth'} {copy / 'best.fp16.engine'} --limit 80 --tolerance"
    assert execute in shown
    assert read_sidecar(copy / "best.onnx").parity["tolerance"]["loosened"] == ["limit=80"]
    half = read_sidecar(copy / "best.fp16.onnx")
    assert (half.precision, half.parent, half.parent_sha256) == ("fp16", "best.onnx", file_sha256(copy / "best.onnx"))
    assert "float16: " in half.made[0]
    # The engine of the half-precision file itself keeps what its sidecar says about the precision.
    first = read_sidecar(copy / "best.fp16.engine")
    (copy / "best.fp16.engine").unlink()
    assert command(trt.main, copy / "best.fp16.onnx", *words) == 0
    for engine in (first, read_sidecar(copy / "best.fp16.engine")):
        assert (engine.parent, engine.made) == ("best.fp16.onnx", half.made)
        assert engine.parity["tolerance"]["loosened"] == [*LOOSE[1].split(","), "limit=80"]
        assert engine.parity["execute"] == f"{execute} {LOOSE[1]}"


def test_int8_in_both_forms_from_our_onnx_file(copy: Path, capsys: Capture) -> None:
    before = (copy / "best.onnx").read_bytes()
    words = ["--precision", "int8", "--calibration", "20", "--seed", "3", *LOOSE]
    assert command(onnx_command.main, copy / "best.onnx", *words) == 0
    for form in ("int8", "int8.cpu"):
        model = read_sidecar(copy / f"best.{form}.onnx")
        assert (model.precision, model.parent) == (form, "best.onnx")
        assert (model.calibration["pictures"], model.calibration["seed"]) == (20, 3)
        assert model.calibration["data"] == "training part of embedded drawn faces"
        assert any("ranges over 20 pictures" in line for line in model.made)
    assert (copy / "best.onnx").read_bytes() == before
    made = {f"best.{name}{more}" for name in ("int8.cpu.onnx", "int8.onnx", "onnx") for more in ("", ".json")}
    assert set(names(copy)) == made | {"best.pth"}
    with nothing_changes(copy):
        for main, wrong, reason in (
            (onnx_command.main, ["best.int8.onnx", "--precision", "fp16"], "cannot become"),
            (onnx_command.main, ["best.onnx"], "is what it would become"),
            (trt.main, ["best.int8.cpu.onnx", "--backend", "rtx"], "quantised for CPUs"),
        ):
            assert reason in refused(capsys, main, copy / wrong[0], *wrong[1:])


def test_a_second_export_gives_the_same_graph(copy: Path) -> None:
    """From the checkpoint as safetensors, with the parent as the only difference."""
    write_safetensors(copy / "shared.safetensors", load(copy / "best.pth"))
    assert export(Wish(path=copy / "shared.safetensors", limit=5)) == [copy / "shared.onnx"]
    graphs = [onnx.load(copy / name) for name in ("best.onnx", "shared.onnx")]
    assert graphs[0].graph.SerializeToString() == graphs[1].graph.SerializeToString()
    assert graphs[0].metadata_props != graphs[1].metadata_props


@pytest.mark.usefixtures("exported_before")
def test_data_and_limit(copy: Path, capsys: Capture) -> None:
    rows = "\n".join(f"{i % 7},{' '.join([str(i * 7)] * 48 * 48)},PublicTest" for i in range(9))
    (copy / "faces.csv").write_text(f"emotion,pixels,Usage\n{rows}\n")
    assert command(onnx_command.main, copy / "best.pth", "--data", copy / "faces.csv", "--limit", 5) == 0
    report = read_sidecar(copy / "best.onnx").parity
    assert (report["count"], report["of"]) == (5, 9)
    assert "faces.csv" in report["data"]
    assert set(report["by_batch"]) == {"1", "2", "3", "7", "64"}, "five pictures in every size of batch"
    # Calibration needs a training part; the error comes before any work.
    with nothing_changes(copy):
        words = [copy / "best.pth", "--data", copy / "faces.csv", "--precision", "int8"]
        assert "train part is empty" in refused(capsys, onnx_command.main, *words)


@pytest.mark.usefixtures("few_faces")
def test_an_onnx_file_without_its_checkpoint(copy: Path, capsys: Capture) -> None:
    """It is compared with itself, with a message, where its sidecar says that it has passed the gate."""
    (copy / "best.pth").unlink()
    assert command(trt.main, copy / "best.onnx", "--backend", "rtx", "--limit", 80) == 0
    assert "compared with best.onnx itself" in capsys.readouterr().out
    report = read_sidecar(copy / "best.engine").parity
    assert report["tolerance"]["loosened"] == ["limit=80"]
    assert "best.onnx itself, which had passed" in report["reference"]
    (copy / "best.onnx.json").unlink()
    with nothing_changes(copy):
        assert "nothing beside" in refused(capsys, trt.main, copy / "best.onnx", "--backend", "rtx")


def test_a_changed_onnx_file_is_refused(copy: Path, capsys: Capture) -> None:
    """By its sidecar; without one, by what its checkpoint says about the order of the labels."""
    about = json.dumps(replace(read_sidecar(copy / "best.onnx"), sha256="e" * 64).to_dict())
    (copy / "best.onnx.json").write_text(about)
    with nothing_changes(copy):
        err = refused(capsys, trt.main, copy / "best.onnx", "--backend", "rtx")
    assert "best.onnx.json is about another file than best.onnx" in err.replace(f"{copy}/", "")
    graph = onnx.load(copy / "best.onnx")
    texts = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    texts["labels"] = texts["fer_dist"]["spec"]["labels"] = sorted(texts["labels"])
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in texts.items()})
    onnx.save(graph, copy / "best.onnx")
    (copy / "best.onnx.json").unlink()
    with nothing_changes(copy):
        assert command(trt.main, copy / "best.onnx", "--backend", "rtx", "--limit", 80) == EXIT_REJECTED
    assert "its labels are angry, disgust, fear, happy, neutral, sad, surprise, not angry" in capsys.readouterr().err
