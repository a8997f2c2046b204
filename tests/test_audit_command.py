"""The command: what it prints, writes and refuses; and the published figures of the real archive."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fer_dist.audit import main
from tests.helpers.commands import Capture, Patch, data_folder, refused
from tests.helpers.exporting import command, nothing_changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders with a black picture, and a train picture that is also in val under another label."""
    parts = {"train": [("angry", 1), ("happy", 2), ("sad", 0)], "val": [("fear", 1), ("happy", 3)]}
    return data_folder(tmp_path / "data", parts)


def test_a_folder(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "report"
    with nothing_changes(folder):
        assert command(main, "--data", folder, "--out", out) == 0
    printed = capsys.readouterr()
    assert "pictures: 3 train + 2 val\n" in printed.out
    assert "val pictures copied from train: 1\n" in printed.out
    assert "near copies: 1 of 1\n" in printed.err  # no terminal: plain lines
    assert "\x1b" not in printed.out + printed.err
    plain = json.loads((out / "audit.json").read_text())
    assert next(iter(plain)) == "counts"
    assert plain["counts"]["black"] == 1
    (group,) = plain["exact"]
    assert [(p["label"], p["split"]) for p in group["pictures"]] == [("fear", "val"), ("angry", "train")]
    with Image.open(out / "audit.png") as sheet:
        sheet.load()
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "audit.png"]
    # An earlier report is replaced whole, and other files stay.
    (out / "audit.json").write_text("old")
    (out / "mine.txt").write_text("kept")
    with (out / "audit.json").open() as reader:  # who reads the old one goes on reading it
        assert command(main, "--data", folder, "--out", out) == 0
        assert reader.read() == "old"
    assert json.loads((out / "audit.json").read_text()) == plain
    assert (out / "mine.txt").read_text() == "kept"


def test_the_embedded_set(tmp_path: Path, capsys: Capture) -> None:
    sizes = ("--data.embedded_train", "70", "--data.embedded_val=14")
    assert command(main, "--out", tmp_path, *sizes) == 0
    out = capsys.readouterr().out
    assert out.startswith("auditing the embedded drawn faces; --data PATH names your own\n")
    assert "pictures: 70 train + 14 val + 14 test\n" in out


def test_wrong_arguments_are_refused(folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "out" / "audit.json").mkdir(parents=True)
    for line, message in (
        ("--data.cach_dir x", "did you mean 'data.cache_dir'"),
        ("--optim.lr 1", "--optim.lr is not a setting of the audit"),
        ("--data /no/such/place", "/no/such/place"),
        ("--data.size 4", "data.size is 4"),
        ("--data.on_error maybe", "expected one of stop, skip"),
        ("picture.png", "unexpected argument 'picture.png'"),
        ("--data data --out file", "file cannot be written"),
        ("--data data --out out", "audit.json cannot be written"),
    ):
        assert message in refused(capsys, main, *line.split(" "))
    assert command(main, "--data") == 2
    assert "expected one argument" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["audit.json"]  # nothing half done is left


# -- the real archive

FIGURES = """\
pictures: 28,709 train + 3,589 val
black pictures: 12 (11 train, 1 val)
nearly flat pictures (standard deviation under 3 grey levels): 1 (1 train, 0 val)
distinct pictures: 30,766
groups of exact copies: 1,273
groups of exact copies with conflicting labels: 47
groups of exact copies across splits: 270
val pictures copied from train: 280
pairs of near copies (correlation >= 0.98): 210 (51 with conflicting labels, 44 across splits)
pairs of mirrored copies (likewise): 0 (0 with conflicting labels, 0 across splits)
val pictures with only a near or mirrored copy in train: 21
"""


@pytest.mark.slow
def test_the_real_archive(real_archive: Path, tmp_path: Path, capsys: Capture) -> None:
    assert command(main, "--data", real_archive, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert [line for line in FIGURES.splitlines() if line not in out.splitlines()] == []
    plain = json.loads((tmp_path / "audit.json").read_text())
    assert [p["name"].rpartition("/")[2] for p in plain["flat"]] == ["Training_3542668.jpg"]
    assert sum(p["label"] == "angry" for p in plain["blank"] if p["split"] == "train") == 7
    assert len({p["index"] for p in plain["leaks"]}) == 280
