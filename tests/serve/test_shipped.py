"""The model that comes with the package: when it is taken, and whether the file keeps what its JSON file promises."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.model_card import render
from fer_dist.data.synthetic import draw_faces
from fer_dist.engine.checkpoint import load
from fer_dist.evaluate import main as evaluate
from fer_dist.predict import main as predict
from fer_dist.serve import shipped
from fer_dist.serve.artifact import file_sha256, read_sidecar
from fer_dist.serve.runner import open_runner
from tests.helpers.artifacts import describe, tiny_onnx, write
from tests.helpers.commands import refused
from tests.helpers.exporting import SETTINGS, command


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in place of the one that ships, as after training on drawn faces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    shipped.ASSETS.mkdir()
    path = write(shipped.ASSETS, tiny_onnx(), shipped.NAME)
    return describe(path, kind="onnx", precision="fp32", data=SETTINGS)


def test_predict_and_evaluate_take_the_shipped_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(draw_faces(7, 0, 0, seed=1).images_NHW[0]).save("face.png")
    assert command(predict, "face.png", "--no-detect") == 0
    assert f"model {small} (patt_lite, fp32)" in capsys.readouterr().out
    assert command(evaluate, "--out", "out") == 0
    report = json.loads(Path("out/report.json").read_text())
    assert (report["artifact"], report["count"], report["split"]) == (str(small), 140, "val")
    run = Path("runs/mine/best.pth")
    run.parent.mkdir(parents=True)
    run.touch()
    assert shipped.default_model() == small
    small.unlink()
    assert shipped.default_model() == run
    run.unlink()
    assert "no model is named" in refused(capsys, predict, "face.png", "--no-detect")
    assert "no artifact is named, and no model came with this copy" in refused(capsys, evaluate)


# The real file

REAL = shipped.ASSETS / shipped.NAME
MAX_BYTES = 6_000_000


def test_the_shipped_file_keeps_its_promises() -> None:
    """It is small and whole, judged on every picture of PublicTest, and names no folder of ours."""
    about = read_sidecar(REAL)
    assert (about.sha256, about.bytes) == (file_sha256(REAL), REAL.stat().st_size)
    assert about.bytes <= MAX_BYTES
    assert about.parity["passed"] is about.parity["meaningful"] is True
    assert (about.parity["count"], about.parity["of"]) == (3589, 3589)
    assert abs(about.parity["accuracy_delta"]) <= 0.005
    assert about.spec.temperature != 1
    files = list(REAL.parent.iterdir())
    assert {path.suffix for path in files} <= {".onnx", ".json", ".md", ".safetensors"}, "no pictures"
    for text in (path.read_text(encoding="utf-8") for path in files if path.suffix in (".json", ".md")):
        assert "/work" not in text
        assert "/tmp" not in text


def test_the_shipped_file_and_its_weights_agree() -> None:
    """The weights that it was exported from are small and name no folder of ours."""
    path = REAL.with_name(shipped.WEIGHTS)
    assert path.stat().st_size <= MAX_BYTES
    checkpoint = load(path)
    assert checkpoint.config["data"]["path"] == "archive.zip"
    assert "/" not in f"{checkpoint.config['model']['weights']}{checkpoint.config['run']['dir']}"
    with open_runner(REAL) as runner, torch.inference_mode():
        assert checkpoint.spec == runner.spec == read_sidecar(REAL).spec
        images_N1SS = torch.from_numpy(draw_faces(28, 0, 0, seed=1).images_NHW).unsqueeze(1)
        found_N = runner(images_N1SS).argmax(1)
        expected_NK = checkpoint.model()(images_N1SS)
    assert (found_N == expected_NK.argmax(1)).float().mean() >= 0.9
    assert len(set(found_N.tolist())) >= 3


def test_the_card_agrees_with_the_measurements() -> None:
    """MODEL_CARD.md is rendered from measured.json, which agrees with the JSON file of the model."""
    facts = json.loads((REAL.parent / "measured.json").read_text(encoding="utf-8"))
    about = read_sidecar(REAL)
    assert facts["artifact"]["sha256"] == about.sha256
    assert facts["evaluation"]["none"]["shipped"]["accuracy"] == pytest.approx(about.parity["accuracy_candidate"])
    assert facts["calibration"]["temperature"] == about.spec.temperature
    card = (REAL.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card == render(facts)
    assert f"{100 * about.parity['accuracy_candidate']:.2f}%" in card
