"""What a search leaves: tables that agree with its trials, and a best model that can be trained again."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fer_dist.config import Config, load_config
from fer_dist.errors import UserError
from tune.ledger import Ledger, Status, Trial
from tune.report import show, write_report

ROOT = Path(__file__).resolve().parents[2]
AXES = ("optim.lr", "optim.name", "train.micro_batch")
SETTINGS = {"searcher": "random", "scheduler": "asha", "seed": 3, "trials": 4, "note": None}


def epochs(*scores: float) -> list[dict[str, Any]]:
    """Records with these accuracies; macro-F1 is lower by 0.01, the loss lowest in the first epoch."""
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "lr": 1e-3,
            "train_loss": 1.0,
            "val": {"loss": 0.1 * epoch, "accuracy": score, "macro_f1": score - 0.01, "recall": {}, "count": 70},
            "seconds": 1.5,
        }
        for epoch, score in enumerate(scores, 1)
    ]


class Search:
    """A made-up search folder on the disk."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        self.folder, self.config = folder, config or Config()
        folder.mkdir(parents=True)
        self.ledger = Ledger(folder)

    def add(self, status: Status, scores: tuple[float, ...], reason: str = "", **values: Any) -> Path:
        """A trial; keywords are spelt `optim__lr`."""
        given = {name.replace("__", "."): value for name, value in values.items()}
        name = self.ledger.give(given)
        folder = self.folder / "trials" / name
        folder.mkdir(parents=True)
        own = {"run.name": name, "run.dir": str(folder.parent), "run.resume": "auto"}
        own |= {"run.progress": "none", "run.stop_signals": "none"}  # a trial is silent, and is stopped by Ray
        (folder / "config.yaml").write_text(self.config.override(given | own).to_yaml())
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in epochs(*scores)))
        if scores:
            (folder / "best.pth").write_bytes(f"weights of {name}".encode())
            order = sorted(epochs(*scores), key=lambda record: record["val"][self.config.train.monitor])
            best = order[0] if self.config.train.monitor == "loss" else order[-1]
            (folder / "report.json").write_text(json.dumps({"epoch": best["epoch"]}))
        if status != "running":
            self.ledger.end(name, status, reason, 7.5)
        return folder

    @property
    def trials(self) -> list[Trial]:
        return self.ledger.trials()

    def report(self, axes: tuple[str, ...] = AXES) -> Any:
        return write_report(self.folder, self.trials, self.config, axes, SETTINGS)

    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "results.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def results(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        text = (self.folder / "results.json").read_text()
        found: dict[str, Any] = json.loads(text, parse_constant=refuse)
        return found


@pytest.fixture
def search(tmp_path: Path) -> Search:
    """Four trials: 002 is the best by accuracy, 003 by loss, 004 has failed without an epoch."""
    made = Search(tmp_path / "tune_runs" / "x")
    made.add("finished", (0.5, 0.6, 0.55), optim__lr=1e-5, optim__name="adam", train__micro_batch=None)
    made.add("finished", (0.7, 0.9321, 0.8), optim__lr=1 / 3, optim__name="sgd", train__micro_batch=8)
    made.add("stopped", (0.4,), "by the scheduler", optim__lr=0.1, optim__name="sgd", train__micro_batch=None)
    made.add("failed", (), "UserError: no\x1b[31m data\n  -> give some", optim__lr=0.2, optim__name="adamw")
    return made


def left(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_all_files_are_there_and_no_others(search: Search) -> None:
    report = search.report()
    assert report.best is not None
    assert report.best.id == "002"
    names = ["best.pth", "best.yaml", "results.csv", "results.json", "search.png"]
    assert sorted(path.name for path in report.files) == names
    assert left(search.folder) == sorted([*names, "trials.jsonl"]), "nothing half-written stays"
    with Image.open(search.folder / "search.png") as image:
        assert image.format == "PNG"
        image.load()


def test_results_csv(search: Search) -> None:
    search.report()
    rows = search.rows()
    assert list(rows[0]) == [
        "trial", "status", *AXES, "epochs", "best_epoch", "accuracy", "macro_f1", "loss", "seconds", "reason",
    ]  # fmt: skip
    assert [row["trial"] for row in rows] == ["001", "002", "003", "004"], "in the order of their start"
    assert [row["status"] for row in rows] == ["finished", "finished", "stopped", "failed"]
    second = rows[1]
    assert float(second["optim.lr"]) == 1 / 3, "not rounded"
    assert (second["optim.name"], second["train.micro_batch"]) == ("sgd", "8")
    assert (second["epochs"], second["best_epoch"]) == ("3", "2")
    assert [float(second[name]) for name in ("accuracy", "macro_f1", "loss")] == [0.9321, 0.9321 - 0.01, 0.2]
    assert float(second["seconds"]) == 7.5
    assert rows[0]["train.micro_batch"] == "none"
    failed = rows[3]
    assert (failed["epochs"], failed["best_epoch"], failed["accuracy"], failed["loss"]) == ("0", "", "", "")
    assert failed["train.micro_batch"] == "", "it was given none"
    assert failed["reason"] == "UserError: no?[31m data -> give some"


def test_results_csv_by_loss(search: Search) -> None:
    search.config = search.config.override({"train.monitor": "loss"})
    report = search.report()
    rows = search.rows()
    assert list(rows[0])[7:10] == ["loss", "accuracy", "macro_f1"]
    assert [row["best_epoch"] for row in rows] == ["1", "1", "1", ""]
    assert report.best.id == "001", "of equals the first"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+a", "'+a"),
        ("-x", "'-x"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-3e-4", "-3e-4"),
        ("+5", "+5"),
        ("plain", "plain"),
        ('with "quotes", and\na line', 'with "quotes", and\na line'),
    ],
)
def test_no_spreadsheet_computes_a_text(tmp_path: Path, text: str, cell: str) -> None:
    search = Search(tmp_path / "x")
    search.add("finished", (0.5,), data__path=text)
    search.add("failed", (), text, optim__lr=0.1)
    search.report(("data.path",))
    assert search.rows()[0]["data.path"] == cell
    assert search.rows()[1]["reason"] == " ".join(cell.split())


def test_values_in_the_csv_are_spelt_as_on_the_command_line(tmp_path: Path) -> None:
    search = Search(tmp_path / "x")
    values = {"optim.lr": -0.5, "train.compile": True, "model.options": {"a": [1, None]}, "model.arch": "数据"}
    trial = Trial(id="001", folder=tmp_path, values=values, status="failed")
    write_report(search.folder, [trial], search.config, list(values), SETTINGS)
    row = search.rows()[0]
    assert [row[name] for name in values] == ["-0.5", "true", '{"a": [1, null]}', "数据"]


def test_results_json(search: Search) -> None:
    search.report()
    found = search.results()
    assert found["settings"] == SETTINGS
    assert (found["monitor"], found["axes"], found["epochs_trained"]) == ("accuracy", list(AXES), 7)
    values = {"optim.lr": 1 / 3, "optim.name": "sgd", "train.micro_batch": 8}
    scores = {"epoch": 2, "accuracy": 0.9321, "macro_f1": 0.9321 - 0.01, "loss": 0.2}
    assert found["best"] == {"trial": "002", "values": values, **scores}
    assert [one["trial"] for one in found["trials"]] == ["001", "002", "003", "004"]
    second = found["trials"][1]
    assert (second["values"], second["best"], second["status"], second["seconds"]) == (values, scores, "finished", 7.5)
    assert [point["epoch"] for point in second["curve"]] == [1, 2, 3]
    assert second["curve"][1] == scores
    failed = found["trials"][3]
    assert (failed["best"], failed["curve"]) == (None, [])
    assert failed["reason"] == "UserError: no\x1b[31m data\n  -> give some", "here it is whole"


def test_a_number_that_is_none_is_no_json(search: Search) -> None:
    trials = search.trials
    trials[0].records[0]["val"]["macro_f1"] = float("nan")
    write_report(search.folder, trials, search.config, AXES, {"grace": float("inf")})
    assert search.results()["trials"][0]["curve"][0]["macro_f1"] is None
    assert search.results()["settings"] == {"grace": None}


def test_best_yaml(search: Search) -> None:
    base = search.config = search.config.override({"run.tensorboard": False, "run.progress": "plain", "run.keep": 7})
    search.add("finished", (0.1, 0.2, 0.99), optim__lr=0.7, optim__name="adam", train__micro_batch=4)
    search.report()
    path = search.folder / "best.yaml"
    was, now = load_config(str(search.folder / "trials" / "005" / "config.yaml")), load_config(str(path))
    assert (was.run.name, was.run.progress, was.run.stop_signals) == ("005", "none", "none")
    assert (now.run.name, now.run.dir, now.run.resume) == (None, "runs", "restart"), "a run of its own"
    assert (now.run.progress, now.run.stop_signals) == ("plain", base.run.stop_signals), "as in the search"
    assert (now.run.tensorboard, now.run.keep) == (False, 7), "the other settings of the run stay"
    assert now == replace(was, run=now.run), "and all that decides what it learns"
    assert (now.optim.lr, now.optim.name, now.train.micro_batch) == (0.7, "adam", 4)
    lines = path.read_text().splitlines()
    assert [line.startswith("#") for line in lines[:3]] == [True, True, False]
    assert "trial 005, accuracy 99.00% in epoch 3" in lines[0]
    assert str(search.folder) in lines[0]
    assert lines[1].endswith(f"torchrun --standalone --nproc_per_node=1 -m fer_dist.train --config {path}")


def test_a_line_end_in_a_name_ends_no_comment(tmp_path: Path) -> None:
    search = Search(tmp_path / "runs of\nmine")
    search.add("stopped", (0.5,), optim__lr=0.1)
    search.report(("optim.lr",))
    text = (search.folder / "best.yaml").read_text()
    assert [line[:1] for line in text.splitlines()[:3]] == ["#", "#", "s"]
    assert load_config(str(search.folder / "best.yaml")).optim.lr == 0.1


def test_best_pth_is_the_same_file_or_a_copy(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    search.report()
    source, target = search.folder / "trials" / "002" / "best.pth", search.folder / "best.pth"
    assert target.samefile(source)
    search.report()  # rename does nothing where both names are one file
    assert "tmp" not in " ".join(left(search.folder))

    def refuse(*names: object) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    search.report()
    assert not target.samefile(source)
    assert target.read_bytes() == b"weights of 002"
    assert "tmp" not in " ".join(left(search.folder))


def test_a_best_pth_of_another_epoch_is_left_out(search: Search) -> None:
    """A trial that was killed had told of its best epoch, but not saved it."""
    search.report()
    for content in ('{"epoch": 1}', "torn", '{"other": 2}', "[]"):
        (search.folder / "trials" / "002" / "report.json").write_text(content)
        report = search.report()
        assert report.best is not None
        assert report.best.id == "002"
        assert "best.pth" not in [path.name for path in report.files]
        assert not (search.folder / "best.pth").exists()


def test_best_pth_follows_the_best(search: Search) -> None:
    search.report()
    folder = search.add("finished", (0.99,), optim__lr=0.5, optim__name="adam", train__micro_batch=None)
    search.report()
    assert (search.folder / "best.pth").read_bytes() == b"weights of 005"
    assert (search.folder / "trials" / "002" / "best.pth").read_bytes() == b"weights of 002", "its own stays"
    (folder / "best.pth").unlink()
    report = search.report()
    assert "best.pth" not in [path.name for path in report.files]
    assert not (search.folder / "best.pth").exists(), "of another trial than best.yaml"


def test_no_trial_has_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = Search(tmp_path / "x")
    search.add("failed", (), "out of memory", optim__lr=0.1)
    search.add("running", (), optim__lr=0.2)
    report = search.report(("optim.lr",))
    assert report.best is None
    assert left(search.folder) == ["results.csv", "results.json", "search.png", "trials.jsonl"]
    assert [row["reason"] for row in search.rows()] == ["out of memory", ""]
    assert search.results()["best"] is None
    show(search.trials, "accuracy", ("optim.lr",), search.folder)
    printed = capsys.readouterr().out
    assert "out of memory" in printed
    assert printed.splitlines()[-1].startswith("best: none")


def test_no_trial_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = Search(tmp_path / "x")
    assert search.report().best is None
    assert search.rows() == []
    assert search.results()["trials"] == []
    show([], "loss", AXES, search.folder)
    assert "best: none" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(search: Search) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_report(search.folder / "missing", search.trials, search.config, AXES, SETTINGS)


def test_show(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    search.report()
    show(search.trials, "accuracy", AXES, search.folder)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[:5]]
    assert table[0][:3] == ["trial", "status", "accuracy"]
    assert table[0][-4:] == ["lr", "name", "micro_batch", "reason"]
    assert [row[0] for row in table[1:]] == ["002", "001", "003", "004"], "the best first, those without a score last"
    assert table[1] == ["002", "finished", "93.21%", "2", "3", "7.5", "0.3333", "sgd", "8"]
    assert lines[4].rstrip().endswith("UserError: no?[31m data")
    assert lines[5:] == [
        f"best: trial 002, accuracy 93.21% in epoch 2: {search.folder}/best.pth",
        "repeat it, or train it for longer: torchrun --standalone --nproc_per_node=1 -m fer_dist.train "
        f"--config {search.folder}/best.yaml",
        f"picture: {search.folder}/search.png",
    ]


def test_show_by_loss_in_a_folder_with_a_blank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = Search(tmp_path / "a b", Config().override({"train.monitor": "loss"}))
    folder = search.add("finished", (0.5, 0.6), optim__lr=0.1)
    (folder / "best.pth").unlink()
    search.report(("optim.lr",))
    show(search.trials, "loss", ("optim.lr",), search.folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "best: trial 001, loss 0.1000 in epoch 1", "there is no best.pth"
    assert lines[-2].endswith(f"--config '{search.folder}/best.yaml'")
    assert lines[-1] == f"picture: '{search.folder}/search.png'"


def test_show_cuts_and_keeps_apart(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [replace(search.trials[3], reason="x" * 200, values={"optim.name": "a :smile: [b]", "data.name": None})]
    show(trials, "accuracy", ("optim.name", "data.name"), search.folder)
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert head.split()[-3:] == ["optim.name", "data.name", "reason"], "two settings end in name"
    assert row.rstrip().endswith("x" * 79 + "…")
    assert "x" * 80 not in row
    assert "a :smile: [b]" in row, "taken for no markup"


@pytest.mark.parametrize(("columns", "head"), [(200, "global_batch"), (100, "settings")])
def test_show_fits_a_terminal(columns: int, head: str, search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting has a column where there is room for all of them."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    axes = [*AXES, "train.global_batch", "train.label_smoothing"]
    code = (
        "import json, sys; from pathlib import Path; from tune.ledger import Ledger; from tune.report import show\n"
        "sys.stdout.isatty = lambda: True\n"
        "folder = Path(sys.argv[1]); show(Ledger(folder).trials(), 'accuracy', json.loads(sys.argv[2]), folder)"
    )
    line = [sys.executable, "-c", code, str(search.folder), json.dumps(axes)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    table = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).split("best: ")[0].splitlines()
    assert any(head in line for line in table)
    assert max(map(len, table)) <= columns
    assert "…" not in "".join(table)
    text = " ".join("".join(table).split())
    assert "0.3333" in text
    assert "no?[31m data" in text


def test_help_is_fast() -> None:
    """The command imports this module before it knows that there is something to report."""
    heavy = ("torch", "numpy", "matplotlib", "rich", "ray")
    code = f"import sys, tune.report; print(*sorted(set(sys.modules) & set({heavy})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_neither_needs_ray() -> None:
    code = "import sys, tune.pictures, tune.report; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
