"""From an archive to what ships: which steps run again, what ships where int8 loses, the card and its numbers."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import model_card, reproduce, training_record
from benchmarks.model_card import CHECKPOINT, FLOAT, gather, render
from benchmarks.reproduce import HALF, INT8, Work
from fer_dist.engine.checkpoint import load, save
from fer_dist.engine.metrics import Metrics
from fer_dist.errors import EXIT_REJECTED, EXIT_USER_ERROR, UserError
from fer_dist.serve.artifact import ExportedModel, file_sha256, sidecar, sidecar_json
from fer_dist.serve.shipped import NAME, WEIGHTS
from fer_dist.spec import EXPRESSIONS
from tests.helpers.artifacts import SPEC
from tests.helpers.commands import Capture, Patch, refused
from tests.helpers.exporting import command, saved


class Stage:
    """Stands in for every command: notes it, and leaves what it would leave."""

    lost, code = 0.001, 0
    """Accuracy that int8 loses, and the exit code of its export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.data = folder / "secret" / "archive.zip"
        self.data.parent.mkdir(parents=True)
        self.data.write_bytes(b"pictures")
        self.run = folder / "runs" / "mine"
        self.run.mkdir(parents=True)
        checkpoint = load(saved(self.run, "patt_lite", data__path=str(self.data)))
        origin = {"device": "cpu, 2 cores, 1 threads per rank", "torch": "2", "commit": "c"}
        trained = replace(checkpoint, provenance=origin, record={"epoch": 2, "val": {"accuracy": 0.7}})
        save(self.run / "best.pth", trained)
        seconds = [{"epoch": e, "seconds": 1800.0} for e in (1, 2, 3)]
        (self.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in seconds))
        starts = [{"epochs": 0, "world_size": 2}, {"epochs": 2, "world_size": 4}]
        (self.run / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))

    def __call__(self, words: list[str], check: bool) -> "subprocess.CompletedProcess[str]":
        module, *rest = words[2:]
        self.calls.append(" ".join([module, *rest[-1:]]) if module == "export.onnx" else module)
        out = self.folder / "out"
        if module == "fer_dist.calibrate":
            assert not (out / CHECKPOINT).exists(), "the command replaces nothing"
            entry: dict[str, Any] = dict.fromkeys(("nll_before", "nll_after", "nll_cross_fitted"), 0.9)
            entry |= {"smoothing": 0.1, "ece_before": 0.0372, "ece_cross_fitted": 0.0211, "temperature": 1.25}
            entry |= {"count": 70, "split": "val"}
            save(out / CHECKPOINT, replace(load(self.run / "best.pth"), provenance={"calibration": entry}))
        elif module == "export.onnx":
            self.export(out, int8=rest[-1] == "int8")
            return subprocess.CompletedProcess(words, self.code if rest[-1] == "int8" else 0)
        elif module == "fer_dist.evaluate":
            folder = Path(rest[rest.index("--out") + 1])
            folder.mkdir(exist_ok=True)
            (folder / "report.json").write_text(json.dumps(self.report(rest[:2])))
        elif module == "benchmarks.robustness":
            rows = [("nothing", 0.7, 0.71), ("noise", 0.4, 0.5)]
            plain = [{"corruption": n, "artifacts": {rest[0]: a, rest[1]: b}} for n, a, b in rows]
            (out / "robustness.json").write_text(json.dumps({"rows": plain}))
        elif module == "benchmarks.training_record":
            (out / "training.json").write_text(json.dumps(training_record.record([self.run])))
        return subprocess.CompletedProcess(words, 0)

    def export(self, out: Path, *, int8: bool) -> None:
        """ONNX files that nobody opens, with JSON files that say what the gate said."""
        (out / FLOAT).write_bytes(b"float")
        path = out / (INT8 if int8 else HALF)
        if int8 and self.code:
            return
        path.write_bytes(b"small")
        parity: dict[str, Any] = dict.fromkeys(model_card._PARITY, 0.7) | {"passed": True, "count": 70, "of": 70}
        parity |= {"accuracy_delta": -self.lost if int8 else 0.0, "data": f"validation part of {self.data}"}
        about = ExportedModel(
            kind="onnx",
            precision="int8.cpu" if int8 else "fp16",
            spec=SPEC,
            sha256=file_sha256(path),
            bytes=5,
            checkpoint_sha256=file_sha256(out / CHECKPOINT),
            parent=FLOAT,
            parent_sha256=file_sha256(out / FLOAT),
            data={"seed": 0, "data": {"path": "/home/of/hidden/archive.zip"}},
            parity=parity,
        )
        sidecar(path).write_bytes(sidecar_json(about))

    def report(self, paths: list[str]) -> dict[str, Any]:
        """Of 70 pictures, 10 a class: 7 right, 3 taken for the next class."""
        confusion = 7 * np.eye(7, dtype=np.int64) + 3 * np.roll(np.eye(7, dtype=np.int64), 1, axis=1)
        one = Metrics(confusion_KK=confusion, loss_sum=63.0, count=70).report(EXPRESSIONS)
        one |= {"accuracy_clean": None, "accuracy_clean_interval_95": None, "count_clean": None, "ece": 0.03}
        one |= {"checkpoint_sha256": file_sha256(self.folder / "out" / CHECKPOINT)}
        artifacts = [{**one, "artifact": path} for path in paths]
        return {"artifacts": artifacts, "split": "val", "data": str(self.data), "key": "k" * 32}

    def words(self) -> tuple[object, ...]:
        return "--data", self.data, "--run", self.run, "--out", self.folder / "out"

    def go(self, *words: object) -> list[str]:
        """Run the command, which must succeed, and return the steps that it ran."""
        self.calls.clear()
        assert command(reproduce.main, *self.words(), *words) == 0
        return self.calls


@pytest.fixture
def made(tmp_path: Path, monkeypatch: Patch) -> Stage:
    """The stand-in, in place of `subprocess.run`."""
    stage = Stage(tmp_path)
    monkeypatch.setattr(subprocess, "run", stage)
    return stage


ALL = ["fer_dist.calibrate", "export.onnx int8", "fer_dist.evaluate", "fer_dist.evaluate"]
ALL += ["benchmarks.robustness", "benchmarks.training_record"]


def test_from_a_run_to_what_ships(made: Stage, tmp_path: Path) -> None:
    """Once; again nothing runs; of another archive, or where a file is gone, only what depends on it."""
    assets = tmp_path / "assets"
    assert made.go("--into", assets) == ALL
    assert {path.name for path in assets.iterdir()} == {NAME, f"{NAME}.json", WEIGHTS, "measured.json", "MODEL_CARD.md"}
    for path in assets.iterdir():
        assert not re.search(b"secret|hidden", path.read_bytes())
    assert load(assets / WEIGHTS).config["data"]["path"] == "archive.zip"
    about = json.loads((assets / f"{NAME}.json").read_text())
    assert (about["precision"], about["data"]["data"]["path"]) == ("int8.cpu", "archive.zip")
    assert about["parity"]["data"] == "validation part of archive.zip"
    assert made.go() == []
    (tmp_path / "out" / "robustness.json").unlink()
    assert made.go() == ["benchmarks.robustness"]
    made.data.write_bytes(b"other pictures")
    assert made.go() == ALL[:-1]
    # A model that is too large, or was not judged on all pictures, does not ship.
    work, path = Work(data=made.data, folder=tmp_path / "out", runs=(made.run,)), tmp_path / "out" / INT8
    plain = json.loads(sidecar(path).read_text())
    for wrong in ({"bytes": 6_000_001}, {"parity": {**plain["parity"], "count": 69}}):
        sidecar(path).write_text(json.dumps(plain | wrong))
        with pytest.raises(UserError, match="at most 6,000,000"):
            reproduce.ship(work, path)


@pytest.mark.parametrize(
    ("lost", "code", "shipped"), [(0.0051, 0, "fp16"), (0.001, EXIT_REJECTED, "fp16"), (0.005, 0, "int8.cpu")]
)
def test_float16_ships_where_int8_loses_more_than_half_a_point(
    lost: float, code: int, shipped: str, made: Stage, tmp_path: Path
) -> None:
    made.lost, made.code = lost, code
    assert made.go() == [*ALL[:2], *(["export.onnx fp16"] if shipped == "fp16" else []), *ALL[2:]]
    assert json.loads((tmp_path / "out" / "ship" / f"{NAME}.json").read_text())["precision"] == shipped


def test_missing_inputs_and_failed_steps_end_it(made: Stage, tmp_path: Path, capsys: Capture) -> None:
    """The step that has failed is repeated."""
    for option, name, message in (
        ("--data", "gone.zip", "gone.zip does not exist"),
        ("--failures", "gone.md", "gone.md is no file"),
        ("--run", "nothing", "best.pth is not there"),
    ):
        assert message in refused(capsys, reproduce.main, *made.words(), option, tmp_path / name)
    assert made.calls == []
    made.code = EXIT_USER_ERROR
    assert "export-int8 left with exit code 2" in refused(capsys, reproduce.main, *made.words())
    made.code = 0
    assert made.go() == ALL[1:]


def test_a_recipe_starts_from_the_best_model_of_the_one_before(made: Stage, tmp_path: Path, monkeypatch: Patch) -> None:
    """After a break, the second alone is trained again."""
    launched: list[list[str]] = []
    broken = True

    def call(words: list[str], check: bool) -> "subprocess.CompletedProcess[str]":
        if "fer_dist.train" not in words:
            return made(words, check=check)
        launched.append(words)
        folder = Path(words[words.index("--run.dir") + 1]) / words[words.index("--run.name") + 1]
        if folder.name == "two" and broken:
            return subprocess.CompletedProcess(words, 75)
        shutil.copytree(made.run, folder, dirs_exist_ok=True)
        (folder / "report.json").write_text("{}")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", call)
    weights, runs = tmp_path / "mobilenet.pth", tmp_path / "out" / "runs"
    weights.write_bytes(b"weights")
    words = ["--data", made.data, "--out", tmp_path / "out", "--recipe", "one,two", "--weights", weights]
    assert command(reproduce.main, *words) == EXIT_USER_ERROR
    broken = False
    assert command(reproduce.main, *words) == 0
    started = [(one[one.index("--config") + 1], one[one.index("--model.weights") + 1]) for one in launched]
    second = ("two", str(runs / "one" / "best.pth"))
    assert started == [("one", str(weights)), second, second]
    assert all(one[-2:] == ["--run.resume", "auto"] for one in launched)
    record = json.loads((tmp_path / "out" / "steps" / "training-record.json").read_text())["command"]
    assert record[2:4] == [str(runs / "one"), str(runs / "two")]


# -- the card


def test_the_card_says_what_was_measured(made: Stage, tmp_path: Path) -> None:
    (tmp_path / "failures.md").write_text("Hands before the mouth.\n")
    made.go("--failures", tmp_path / "failures.md")
    ship = tmp_path / "out" / "ship"
    facts, card = json.loads((ship / "measured.json").read_text()), (ship / "MODEL_CARD.md").read_text()
    assert facts == json.loads(json.dumps(gather(tmp_path / "out", "Hands before the mouth.")))
    assert card == render(facts)
    for text in (
        "**70.00%** (58.5 to 79.5)",
        "| angry | 70.00% | 70.00% | 70.00% | 10 |",
        "angry taken for disgust (3 of 10)",
        "label smoothing of the training, 0.1, is taken back",
        "temperature of 1.2500",
        "3.72% before, 2.11% after",
        "| noise | 40.00% | 50.00% |",
        'The worst of these is "noise"',
        "Hands before the mouth.",
        # Two epochs of half an hour on two ranks, one on four.
        "3 epochs, the best one 2 (seed 0; 4 ranks, cpu, 2 cores, 1 threads per rank; torch 2); 4.0 CPU-hours",
        "PrivateTest was not used for anything",
        "Article 5(1)(f)",
        "int8.cpu, as shipped",
    ):
        assert text in card, text
    assert not re.findall(r"\{\{|\{%|None|nan", card)
    assert all(len(line) <= 330 for line in card.splitlines())
    bare = render(facts | {"failures": "", "robustness": []})
    assert "Nobody has yet looked" in bare
    assert "has not been measured" in bare


def test_the_card_refuses_reports_of_another_model_or_part(made: Stage, tmp_path: Path) -> None:
    made.go()
    path, table = tmp_path / "out" / "evaluation-flip" / "report.json", tmp_path / "out" / "robustness.json"
    report, rows = path.read_text(), table.read_text()
    for file, content, problem in (
        (table, rows.replace("{", '{"limit": 300, ', 1), "of 300 pictures, not of all"),
        (path, report.replace('"split": "val"', '"split": "test"'), "not of the validation part"),
        (path, report.replace(file_sha256(tmp_path / "out" / CHECKPOINT), "0" * 64, 1), "of another model"),
        (path, "", "cannot read"),
    ):
        before = file.read_text()
        file.write_text(content)
        with pytest.raises(UserError, match=problem):
            gather(tmp_path / "out", "")
        file.write_text(before)


# -- the training


def test_multiply_adds_by_hand(tmp_path: Path, monkeypatch: Patch) -> None:
    """A 3x3 convolution to 4 channels on 48x48, and attention of 5 tokens with 8 numbers each."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 4, 3, padding=1, bias=False)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, images_N1SS: torch.Tensor) -> torch.Tensor:
            tokens = self.convolution(images_N1SS.float()).flatten()[:40].view(1, 5, 8)
            found: torch.Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return found

    checkpoint = load(saved(tmp_path, "patt_lite"))
    monkeypatch.setattr(type(checkpoint), "model", lambda self: Small().eval())
    convolution = 48 * 48 * 9 * 4
    attention = 5 * 8 * 24 + 2 * (5 * 5 * 4) * 2 + 5 * 8 * 8
    assert training_record.multiply_adds(checkpoint) == convolution + attention


def test_two_stages(tmp_path: Path) -> None:
    """Epochs and hours of both; each with its own settings, but without folders of this machine."""
    run = Stage(tmp_path).run
    whole = training_record.record([run, run])
    assert (whole["epochs"], whole["cpu_hours"]) == (6, 8.0)
    assert [one["cpu_hours"] for one in whole["stages"]] == [4.0, 4.0]
    model = load(run / "best.pth").config["model"]
    assert whole["stages"][0]["config"]["model"] == {k: v for k, v in model.items() if k != "weights"}
    (run / "starts.jsonl").unlink()
    with pytest.raises(UserError, match="is no run folder"):
        training_record.record([run])
