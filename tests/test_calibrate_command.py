"""`python -m fer_dist.calibrate`: the temperature in a checkpoint and in what is exported from it; what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export.graph import to_onnx
from fer_dist.calibrate import _lines, _smoothing, main
from fer_dist.engine.checkpoint import load, save, write_safetensors
from fer_dist.engine.temperature import Fit
from fer_dist.evaluate import main as evaluate
from fer_dist.models.base import unsmoothed
from fer_dist.serve.artifact import file_sha256
from fer_dist.serve.runner import open_runner
from tests.helpers.commands import Capture, refused
from tests.helpers.exporting import command, content, drawn, nothing_changes, saved, too_sure
from tests.helpers.tiny_models import pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pth: a tiny patt_lite that is sure of answers which are often wrong; its validation part are drawn faces."""
    folder = tmp_path_factory.mktemp("calibrate")
    checkpoint = load(saved(folder, "patt_lite"))
    weights = too_sure(checkpoint, drawn(checkpoint.model()))
    save(folder / "best.pth", replace(checkpoint, weights=weights, provenance={"torch": "x"}))
    return folder


@pytest.fixture(scope="module")
def calibrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pth with its temperature."""
    out = tmp_path_factory.mktemp("calibrated") / "warm.pth"
    with nothing_changes(folder):
        assert command(main, folder / "best.pth", "--out", out) == 0
    return out


def report_of(path: Path, out: Path) -> dict[str, Any]:
    assert command(evaluate, path, "--out", out) == 0
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_it_is_as_sure_as_it_is_right(folder: Path, calibrated: Path, tmp_path: Path) -> None:
    """No label changes; the likelihood gains; the entry says what evaluate says."""
    before, after = load(folder / "best.pth"), load(calibrated)
    entry = after.provenance["calibration"]
    assert after.spec == replace(before.spec, temperature=entry["temperature"])
    assert entry["temperature"] > 1.5
    assert after.provenance == {"torch": "x", "calibration": entry}
    assert (entry["count"], entry["split"]) == (140, "val")
    assert entry["checkpoint_sha256"] == file_sha256(folder / "best.pth")
    assert all(torch.equal(after.weights[name], value) for name, value in before.weights.items())
    cold, warm = report_of(folder / "best.pth", tmp_path / "a"), report_of(calibrated, tmp_path / "b")
    assert cold["artifacts"][0]["confusion"] == warm["artifacts"][0]["confusion"]
    assert [cold["loss"], warm["loss"]] == pytest.approx([entry["nll_before"], entry["nll_after"]])
    assert cold["ece"] == pytest.approx(entry["ece_before"])
    assert max(warm["ece"], entry["ece_cross_fitted"]) < cold["ece"] - 0.05


def test_a_second_time_gives_the_same(folder: Path, calibrated: Path, tmp_path: Path, capsys: Capture) -> None:
    """A wrong temperature is replaced, whatever the seed of the folds; the default name is next to the input."""
    wanted, wrong = load(calibrated).spec.temperature, load(folder / "best.pth")
    write_safetensors(tmp_path / "wrong.safetensors", replace(wrong, spec=replace(wrong.spec, temperature=0.4)))
    assert command(main, tmp_path / "wrong.safetensors", "--seed", 3, "--batch", 50) == 0
    assert sorted(content(tmp_path)) == ["wrong.calibrated.pth", "wrong.safetensors"]
    again = load(tmp_path / "wrong.calibrated.pth")
    assert again.spec.temperature == pytest.approx(wanted, rel=1e-4)
    assert again.provenance["calibration"]["seed"] == 3
    assert f"temperature         {wanted:.4f}, in place of 0.4000\n" in capsys.readouterr().out


def test_label_smoothing_is_undone(folder: Path, calibrated: Path, tmp_path: Path, capsys: Capture) -> None:
    """Once, however often it is calibrated; the exported graph says and does it, and no label changes."""
    plain = load(saved(tmp_path, "patt_lite", "plain.pth", train__label_smoothing=0.2))
    save(tmp_path / "plain.pth", replace(plain, weights=load(folder / "best.pth").weights))
    for name, again in (("plain", "first"), ("first", "second")):
        assert command(main, tmp_path / f"{name}.pth", "--out", tmp_path / f"{again}.pth") == 0
        assert "label smoothing     0.2 in training, taken back" in capsys.readouterr().out
    first, second = (load(tmp_path / f"{name}.pth") for name in ("first", "second"))
    entry = first.provenance["calibration"]
    assert first.spec.smoothing == second.spec.smoothing == entry["smoothing"] == 0.2
    assert second.spec.temperature == pytest.approx(first.spec.temperature, rel=1e-4)
    assert entry["nll_before"] == pytest.approx(load(calibrated).provenance["calibration"]["nll_before"]), "as it was"
    warm, cold = first.model(), load(tmp_path / "plain.pth").model()
    (tmp_path / "first.onnx").write_bytes(to_onnx(warm, file_sha256(tmp_path / "first.pth")).SerializeToString())
    with open_runner(tmp_path / "first.onnx") as runner, torch.no_grad():
        spec, found, base = runner.spec, runner.run(pictures(9)), cold(pictures(9))
        assert warm.with_attention(pictures(9))[0] == pytest.approx(found.logits_NK, abs=1e-4)
    assert spec == first.spec
    assert found.logits_NK == pytest.approx(unsmoothed(base, 0.2) / spec.temperature, abs=1e-4)
    assert found.probabilities_NK == pytest.approx(found.logits_NK.softmax(1), abs=1e-5)
    assert torch.equal(found.logits_NK.argsort(1), base.argsort(1))


def test_invalid_settings_smooth_nothing() -> None:
    for value in (None, "0.1", 1, True, -0.1, 0.95, float("nan")):
        assert _smoothing({"train": {"label_smoothing": value}}) == _smoothing({"train": value}) == 0


def test_bad_arguments_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    best, there = folder / "best.pth", tmp_path / "there.pth"
    there.write_text("mine")
    (tmp_path / "one.csv").write_text(f"emotion,pixels,Usage\n3,{' '.join(['7', *['9'] * 2303])},PublicTest\n")
    few = saved(tmp_path, "patt_lite", "few.pth", data__embedded_val=14)
    lost = saved(tmp_path, "patt_lite", "lost.pth", data__path="/nowhere/fer2013.csv")
    hopeless = load(best)
    flipped = {n: -v if "classifier" in n else v for n, v in hopeless.weights.items()}
    save(tmp_path / "hopeless.pth", replace(hopeless, weights=flipped))
    for words, message in (
        ([], "required: PATH"),
        ([best, "--out", there], "exists, and is not replaced"),
        ([best, "--data", tmp_path / "nothing.csv"], "does not exist"),
        ([best, "--split", "train"], "--split"),
        ([best, "--out", tmp_path / "x.onnx"], "does not end in .pth"),
        ([tmp_path / "best.onnx"], "is no checkpoint"),
        ([tmp_path / "gone.pth"], "cannot read"),
        ([few], "14 pictures are too few for a temperature, expected at least 25"),
        ([lost], "/nowhere/fer2013.csv, its data, is not here"),
        ([best, "--split", "test", "--data", tmp_path / "one.csv"], "the test part is empty"),
        ([tmp_path / "hopeless.pth"], "no temperature within 0.01..100 is best for 140 pictures"),
        ([best, "--out", tmp_path / "no" / "folder.pth"], "cannot write"),
    ):
        with nothing_changes(folder), nothing_changes(tmp_path):
            assert message in refused(capsys, main, *words), words


def test_a_calibration_error_that_grew_is_noted() -> None:
    """As of one whose likelihood gains while its bins move apart."""
    values = {"nll_before": 0.92, "nll_after": 0.91, "nll_cross_fitted": 0.91, "count": 3589, "seed": 0}
    found = Fit(temperature=0.93, ece_before=0.037, ece_cross_fitted=0.047, **values)  # type: ignore[arg-type]
    assert "note: the calibration error grew" in _lines(found, 1.0, 0.0)[-1]
    assert "note" not in "".join(_lines(replace(found, ece_cross_fitted=0.02), 1.0, 0.0))
