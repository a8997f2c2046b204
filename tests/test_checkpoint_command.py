"""`python -m fer_dist.checkpoint`: what it shows of whole and damaged files, and what it writes for sharing."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import yaml

from fer_dist.checkpoint import main
from fer_dist.engine.checkpoint import load, save, write_safetensors
from fer_dist.engine.trainer import Result, fit
from fer_dist.errors import UserError
from tests.helpers.commands import Capture, Patch, refused
from tests.helpers.exporting import command
from tests.helpers.small_runs import no_pictures, same, stateful


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with no_pictures():
        return fit(stateful("patt_lite", tmp_path_factory.mktemp("runs"), train__epochs=2))


def shown(capsys: Capture, *words: object) -> str:
    """Run the command, which must succeed, and return its standard output."""
    capsys.readouterr()
    assert command(main, *words) == 0
    return capsys.readouterr().out


def test_a_page_and_json(result: Result, capsys: Capture) -> None:
    path = result.folder / "last.pth"
    page, val, last = shown(capsys, path), result.records[-1]["val"], load(path)
    for line in (
        f"file         {path}",
        "valid        yes",
        f"sha256       {hashlib.sha256(path.read_bytes()).hexdigest()}",
        "labels       angry, disgust, fear, happy, sad, surprise, neutral",
        f"epoch        2, step 16, training loss {result.records[-1]['train_loss']:.4f}",
        "goes on      after step 16: 2 epochs, 0 steps of the next",
    ):
        assert f"{line}\n" in page
    assert f"accuracy {100 * val['accuracy']:.2f}%" in page
    assert yaml.safe_load(page.partition("settings\n")[2]) == last.config
    wanted: dict[str, Any] = {"spec": last.spec.to_dict(), "record": last.record, "provenance": last.provenance}
    wanted["parameters"] = sum(p.numel() for p in last.weights.values() if p.is_floating_point())
    wanted["valid"] = True
    found = json.loads(shown(capsys, path, "--json"))
    assert {name: found[name] for name in wanted} == wanted
    assert json.loads(shown(capsys, result.folder / "best.pth", "--json"))["resume"] is None


def test_a_folder_and_damage(result: Result, tmp_path: Path, capsys: Capture) -> None:
    lines = shown(capsys, result.folder).splitlines()
    names = ["checkpoints/step-00000016.pth", "checkpoints/step-00000012.pth", "best.pth"]
    assert [line.split()[0].removeprefix(f"{result.folder}/") for line in lines] == names
    assert all(" valid " in line for line in lines)
    assert lines[1].endswith("step 12, to go on from")
    bad = tmp_path / names[0]
    bad.parent.mkdir()
    bad.write_bytes((result.folder / "last.pth").read_bytes()[:-100])
    for argv, mark in (([bad], "valid        no: "), ([tmp_path], "DAMAGED"), ([bad, "--json"], '"valid": false')):
        assert command(main, *argv) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"error: {bad} is damaged or not a checkpoint: there is no checksum at its end")
        assert "cut off" in printed.out
        assert mark in printed.out


def test_wrong_arguments_are_refused(result: Result, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    for argv, message in (
        ([], "the following arguments are required: PATH"),
        (["--jason", "a"], "unrecognized arguments: --jason"),
        ([""], "holds no checkpoint"),
        (["nowhere.pth", "--safetensors", "x.pth"], "x.pth does not end in .safetensors\n  -> --safetensors x.safeten"),
    ):
        assert message in refused(capsys, main, *argv)
    assert "cannot read nowhere.pth: No such file" in refused(capsys, main, "nowhere.pth", fix=False)
    assert [*tmp_path.iterdir()] == []
    records: list[dict[str, Any]] = [{"epoch": []}, {"epoch": 1, "step": 2, "train_loss": 0.5, "val": "good"}]
    for record in records:
        save(tmp_path / "x.pth", dataclasses.replace(load(result.folder / "best.pth"), record=record))
        assert "holds metrics of another form" in refused(capsys, main, "x.pth", fix=False)


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    result: Result, tmp_path: Path, capsys: Capture
) -> None:
    origin = {"device": "\x1b[2J\x07evil\u202e", "fer_dist": "\x9b31m"}
    save(tmp_path / "x.pth", dataclasses.replace(load(result.folder / "best.pth"), provenance=origin))
    for words in ([], ["--json"]):
        page = shown(capsys, tmp_path / "x.pth", *words)
        assert "evil" in page
        assert not set(page) & set("\x1b\x07\x9b\u202e")


def test_the_model_shared_as_safetensors_is_the_model(result: Result, tmp_path: Path, capsys: Capture) -> None:
    best, path = result.folder / "best.pth", tmp_path / "model.safetensors"
    printed = shown(capsys, best, "--safetensors", path)
    assert f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}\n" in printed
    assert "exists" in refused(capsys, main, best, "--safetensors", path)
    ours, theirs = load(best), load(path)
    for name in ("weights", "spec", "config", "record", "provenance"):
        assert same(getattr(ours, name), getattr(theirs, name)), name
    assert theirs.resume == {}
    assert same(safetensors.torch.load_file(path), dict(ours.weights))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt", "transformers and timm require it"


def test_damaged_and_foreign_safetensors_are_refused(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, load(result.folder / "best.pth"))
    content = path.read_bytes()
    for place in range(len(content) // 2, len(content), len(content) // 20):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="is damaged or not a checkpoint: the checksum of its weights differs"):
            load(path)
    for part in (0, 1, 8, 15):
        path.write_bytes(content[: len(content) * part // 16])
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load(path)
    for about in (None, "", "[]", "{", "[" * 100_000, '{"format": 2}', '{"weights": 3}'):
        safetensors.torch.save_file({"a": torch.zeros(3)}, path, None if about is None else {"fer_dist": about})
        with pytest.raises(UserError, match="not a checkpoint"):
            load(path)
