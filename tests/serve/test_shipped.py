"""The model that comes with the package: where it is looked for, and, where it is there, whether it keeps its word."""

import json
from pathlib import Path

import pytest
import torch

from fer_dist.data.synthetic import draw_faces
from fer_dist.engine.checkpoint import load
from fer_dist.errors import EXIT_USER_ERROR, UserError
from fer_dist.evaluate import main as evaluate
from fer_dist.predict import main as predict
from fer_dist.serve import shipped
from fer_dist.serve.artifact import (
    ExportedModel,
    file_sha256,
    read_onnx_metadata,
    read_sidecar,
    sidecar,
    sidecar_json,
)
from fer_dist.serve.measured import measured
from fer_dist.serve.runner import open_runner
from tests.helpers.artifacts import CHECKPOINT
from tests.helpers.exporting import command, exported, lively


def ship_small(folder: Path) -> Path:
    """A small model in place of the one that ships, with its JSON file; accuracy 60% on 3,589 pictures, it says."""
    path = folder / shipped.NAME
    graph = exported(lively("patt_lite"), CHECKPOINT)
    path.write_bytes(graph.SerializeToString())
    spec, precision, _ = read_onnx_metadata({p.key: p.value for p in graph.metadata_props})
    about = ExportedModel(
        kind="onnx",
        precision=precision,
        spec=spec,
        sha256=file_sha256(path),
        bytes=path.stat().st_size,
        checkpoint_sha256=CHECKPOINT,
        parent="best.pth",
        parent_sha256=CHECKPOINT,
        data={"seed": 0, "data": {"path": "archive.zip"}},
        parity={"meaningful": True, "accuracy_candidate": 0.6, "count": 3589},
        attends=True,
    )
    sidecar(path).write_bytes(sidecar_json(about))
    return path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "assets"
    folder.mkdir()
    monkeypatch.setattr(shipped, "ASSETS", folder)
    return ship_small(folder)


@pytest.fixture
def none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of fer_dist without a model."""
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    return tmp_path


def face(folder: Path) -> Path:
    from PIL import Image

    path = folder / "face.png"
    Image.fromarray(draw_faces(7, 0, 0, seed=1).images_NHW[0]).save(path)
    return path


def test_it_comes_before_the_newest_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "mine" / "best.pth"
    run.parent.mkdir(parents=True)
    run.touch()
    monkeypatch.chdir(tmp_path)
    assert shipped.default_model() == small
    small.unlink()
    assert shipped.shipped_model() is None
    assert shipped.default_model() == Path("runs/mine/best.pth")
    run.unlink()
    with pytest.raises(UserError, match="no model is named"):
        shipped.default_model()


def test_predict_takes_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(predict, face(tmp_path), "--no-detect") == 0
    assert f"model {small} (patt_lite, fp32)" in capsys.readouterr().out


def test_predict_without_it(none: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(none)
    assert command(predict, face(none), "--no-detect") == EXIT_USER_ERROR
    assert "no model is named" in capsys.readouterr().err


def test_evaluate_takes_it(small: Path, tmp_path: Path) -> None:
    rows = ["emotion,pixels,Usage"]
    faces = draw_faces(7, 35, 0, seed=3)
    for image_HW, label, part in zip(faces.images_NHW, faces.labels_N, faces.usage_N, strict=True):
        rows.append(f"{label},{' '.join(map(str, image_HW.ravel()))},{('Training', 'PublicTest')[part]}")
    (tmp_path / "fer2013.csv").write_text("\n".join(rows) + "\n")
    assert command(evaluate, "--data", tmp_path / "fer2013.csv", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["artifact"], report["count"], report["split"]) == (str(small), 35, "val")


def test_evaluate_without_it(none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(evaluate, "--data", none / "fer2013.csv") == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert "no artifact is named, and no model came with this copy" in err
    assert "\n  -> name one" in err


def test_the_app_names_its_accuracy(small: Path) -> None:
    with open_runner(small) as runner:
        assert str(measured(runner)).startswith(
            "60.0% accuracy (95% interval 58.4 to 61.6%) on 3,589 pictures: validation part of"
        )


# -- the real one

MOST_BYTES = 6_000_000


@pytest.fixture
def real() -> Path:
    path = shipped.shipped_model()
    if path is None:
        pytest.skip(f"needs {shipped.ASSETS / shipped.NAME}, which is not there yet: make reproduce makes it")
    return path


def test_the_shipped_file(real: Path) -> None:
    """Small, whole, and what its JSON file says; judged on every picture of PublicTest; no folder of ours in it."""
    about = read_sidecar(real)
    assert (about.sha256, about.bytes) == (file_sha256(real), real.stat().st_size)
    assert about.bytes <= MOST_BYTES
    parity = about.parity
    assert parity["passed"] is True
    assert parity["meaningful"] is True
    assert (parity["count"], parity["of"]) == (3589, 3589)
    assert abs(parity["accuracy_delta"]) <= 0.005
    assert about.spec.temperature != 1
    for path in real.parent.iterdir():
        if path.suffix in (".json", ".md"):
            assert "/work" not in path.read_text(encoding="utf-8"), path
            assert "/tmp" not in path.read_text(encoding="utf-8"), path
    assert {path.suffix for path in real.parent.iterdir()} <= {".onnx", ".json", ".md", ".safetensors"}, "no pictures"
    with open_runner(real) as runner:
        assert runner.spec == about.spec
        known = measured(runner)
        assert known is not None
        assert (known.accuracy, known.pictures) == (parity["accuracy_candidate"], 3589)


def test_the_shipped_file_answers(real: Path) -> None:
    images_N1SS = torch.from_numpy(draw_faces(64, 0, 0, seed=1).images_NHW).unsqueeze(1)
    with open_runner(real) as runner:
        found = runner.run(images_N1SS)
        alone = runner.run(images_N1SS[:1])
    assert found.probabilities_NK.shape == (64, 7)
    assert found.probabilities_NK.sum(1) == pytest.approx(torch.ones(64), abs=1e-5)
    assert alone.probabilities_NK[0] == pytest.approx(found.probabilities_NK[0], abs=0.02)
    assert len(set(found.logits_NK.argmax(1).tolist())) >= 3


def test_its_weights(real: Path) -> None:
    """Those that it was exported from: small, from nobody's folders, and they answer as the file does."""
    path = real.with_name(shipped.WEIGHTS)
    assert path.stat().st_size <= MOST_BYTES
    checkpoint = load(path)
    assert checkpoint.config["data"]["path"] == "archive.zip"
    assert "/" not in f"{checkpoint.config['model']['weights']}{checkpoint.config['run']['dir']}"
    images_N1SS = torch.from_numpy(draw_faces(64, 0, 0, seed=1).images_NHW).unsqueeze(1)
    with open_runner(real) as runner, torch.inference_mode():
        assert checkpoint.spec == runner.spec
        found_NK = runner.run(images_N1SS).logits_NK
        expected_NK = checkpoint.model()(images_N1SS)
    assert (found_NK.argmax(1) == expected_NK.argmax(1)).float().mean() >= 0.9


def test_the_card_says_what_was_measured(real: Path) -> None:
    """MODEL_CARD.md is measured.json in words, and measured.json agrees with the file's own JSON."""
    from benchmarks.model_card import render

    facts = json.loads((real.parent / "measured.json").read_text(encoding="utf-8"))
    about = read_sidecar(real)
    assert facts["artifact"]["sha256"] == about.sha256
    assert facts["evaluation"]["none"]["shipped"]["accuracy"] == pytest.approx(about.parity["accuracy_candidate"])
    assert facts["calibration"]["temperature"] == about.spec.temperature
    card = (real.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card == render(facts)
    assert f"{100 * about.parity['accuracy_candidate']:.2f}%" in card
