"""`python -m fer_dist.checkpoint`: what it shows of whole and damaged files, and what it writes for sharing."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import yaml

from fer_dist.checkpoint import main
from fer_dist.engine.checkpoint import Checkpoint, load, save
from fer_dist.engine.trainer import Result, fit
from fer_dist.errors import UserError
from tests.helpers.small_runs import no_pictures, same, stateful
from tests.helpers.tiny_models import pictures


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with no_pictures():
        return fit(stateful("patt_lite", tmp_path_factory.mktemp("runs"), train__epochs=2))


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_a_page(result: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = result.folder / "last.pth"
    assert command(monkeypatch, path) == 0
    shown = capsys.readouterr().out
    val = result.records[-1]["val"]
    for line in (
        f"file         {path}",
        "valid        yes",
        f"sha256       {hashlib.sha256(path.read_bytes()).hexdigest()}",
        "labels       angry, disgust, fear, happy, sad, surprise, neutral",
        f"epoch        2, step 16, training loss {result.records[-1]['train_loss']:.4f}",
        "goes on      after step 16: 2 epochs, 0 steps of the next",
    ):
        assert f"{line}\n" in shown
    assert f"accuracy {100 * val['accuracy']:.2f}%" in shown
    settings = yaml.safe_load(shown[shown.index("settings\n") + len("settings\n") :])
    assert settings == load(path).config


def test_json(result: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, result.folder / "best.pth", "--json") == 0
    best, found = load(result.folder / "best.pth"), json.loads(capsys.readouterr().out)
    assert found["valid"] is True
    assert found["spec"] == best.spec.to_dict()
    assert found["record"] == best.record
    assert found["provenance"] == best.provenance
    assert found["resume"] is None
    assert found["parameters"] == sum(p.numel() for p in best.weights.values() if p.is_floating_point())


def test_a_folder(result: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, result.folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].removeprefix(f"{result.folder}/") for line in lines] == [
        "checkpoints/step-00000016.pth",
        "checkpoints/step-00000012.pth",
        "best.pth",
    ]
    assert all(" valid " in line for line in lines)
    assert lines[1].endswith("step 12, to go on from")


def test_damage_is_shown_and_the_code_is_2(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    bad = tmp_path / "checkpoints" / "step-00000016.pth"
    bad.write_bytes((result.folder / "last.pth").read_bytes()[:-100])
    for argv in ([bad], [tmp_path], [bad, "--json"]):
        assert command(monkeypatch, *argv) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {bad} is damaged or not a checkpoint: there is no checksum at its end")
        assert "cut off" in printed.out
        assert {"--json": '"valid": false', str(tmp_path): "DAMAGED"}.get(
            str(argv[-1]), "valid        no: "
        ) in printed.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: PATH"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--jason", "a"], "unrecognized arguments: --jason"),
        (["nowhere.pth"], "cannot read nowhere.pth: No such file or directory"),
        ([""], "holds no checkpoint"),
        (
            ["nowhere.pth", "--safetensors", "x.pth"],
            "x.pth does not end in .safetensors\n  -> --safetensors x.safetensors",
        ),
    ],
)
def test_refusals(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_signs_of_a_stranger_do_not_reach_the_terminal(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = load(result.folder / "best.pth")
    origin = {"device": "\x1b[2J\x07evil\u202e", "fer_dist": "\x9b31m"}
    save(tmp_path / "x.pth", dataclasses.replace(best, provenance=origin))
    for words in ([], ["--json"]):
        assert command(monkeypatch, tmp_path / "x.pth", *words) == 0
        shown = capsys.readouterr().out
        assert "evil" in shown
        assert not set(shown) & set("\x1b\x07\x9b\u202e")


def test_metrics_of_another_form(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = load(result.folder / "best.pth")
    forms: list[dict[str, Any]] = [{"epoch": []}, {"epoch": 1, "step": 2, "train_loss": 0.5, "val": "good"}]
    for record in forms:
        save(tmp_path / "x.pth", dataclasses.replace(best, record=record))
        assert command(monkeypatch, tmp_path / "x.pth") == 2
        assert "holds metrics of another form" in capsys.readouterr().err


# -- safetensors


@pytest.fixture(scope="module")
def shared(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, result.folder / "best.pth", "--safetensors", path) == 0
    return path


def test_the_shared_model_is_the_model(result: Result, shared: Path) -> None:
    ours, theirs = load(result.folder / "best.pth"), load(shared)
    assert isinstance(theirs, Checkpoint)
    assert same(ours.weights, theirs.weights)
    assert (ours.spec, ours.config, ours.record, ours.provenance) == (
        theirs.spec,
        theirs.config,
        theirs.record,
        theirs.provenance,
    )
    assert theirs.resume == {}
    with torch.inference_mode():
        assert torch.equal(ours.model()(pictures(3)), theirs.model()(pictures(3)))


def test_other_programs_read_it(result: Result, shared: Path) -> None:
    assert same(safetensors.torch.load_file(shared), dict(load(result.folder / "best.pth").weights))
    with safetensors.safe_open(shared, framework="pt") as file:
        assert file.metadata()["format"] == "pt", "what transformers and timm ask for"


def test_the_hash_is_that_of_the_file(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    assert command(monkeypatch, result.folder / "last.pth", "--safetensors", path) == 0
    assert f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}\n" in capsys.readouterr().out
    assert command(monkeypatch, result.folder / "last.pth", "--safetensors", path) == 2
    assert "exists" in capsys.readouterr().err


def test_a_changed_bit_of_a_shared_model_is_an_error(shared: Path, tmp_path: Path) -> None:
    content = shared.read_bytes()
    path = tmp_path / "x.safetensors"
    for place in range(len(content) // 2, len(content), len(content) // 20):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or not a checkpoint: the checksum of its weights differs"):
            load(path)
    for part in range(16):
        path.write_bytes(content[: len(content) * part // 16])
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load(path)


@pytest.mark.parametrize("about", [None, "", "[]", "{", "[" * 100_000, '{"format": 2}', '{"weights": 3}'])
def test_safetensors_of_somebody_else(about: str | None, tmp_path: Path) -> None:
    metadata = None if about is None else {"fer_dist": about}
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match="not a checkpoint"):
        load(tmp_path / "x.safetensors")
