"""The command: what it prints, writes and refuses; and the published figures of the real archive."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fer_dist.audit import main


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["audit", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders with a black picture, and a train picture that is also in val under another label."""
    a, b, c = np.random.default_rng(0).integers(0, 256, (3, 48, 48), dtype=np.uint8)
    black = np.zeros_like(a)
    root = tmp_path / "data"
    for name, image in {
        "train/angry/Training_1.png": a,
        "train/happy/Training_2.png": b,
        "train/sad/Training_3.png": black,
        "test/fear/PublicTest_4.png": a,
        "test/happy/PublicTest_5.png": c,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def test_command_on_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    out = tmp_path / "new" / "report"
    assert command(monkeypatch, "--data", folder, "--out", out) == 0
    printed = capsys.readouterr()
    assert "pictures: 3 train + 2 val\n" in printed.out
    assert "val pictures copied from train: 1\n" in printed.out
    assert "near copies: 1 of 1\n" in printed.err  # no terminal: plain lines
    assert "\x1b" not in printed.out + printed.err
    plain = json.loads((out / "audit.json").read_text())
    assert next(iter(plain)) == "counts"
    assert plain["counts"]["black"] == 1
    (group,) = plain["exact"]
    assert [(p["label"], p["split"], Path(p["name"]).name) for p in group["pictures"]] == [
        ("fear", "val", "PublicTest_4.png"),
        ("angry", "train", "Training_1.png"),
    ]
    with Image.open(out / "audit.png") as sheet:
        sheet.load()
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "audit.png"]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")} == before


def test_an_earlier_report_is_replaced_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "audit.json").write_text("old")
    (out / "mine.txt").write_text("kept")
    with (out / "audit.json").open() as reader:  # who reads the old one goes on reading it
        assert command(monkeypatch, "--data", folder, "--out", out) == 0
        assert reader.read() == "old"
    assert json.loads((out / "audit.json").read_text())["counts"]["pictures"] == 5
    assert (out / "mine.txt").read_text() == "kept"


def test_command_on_the_embedded_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--data.embedded_train", "70", "--data.embedded_val=14")
    assert command(monkeypatch, "--out", tmp_path, *sizes) == 0
    out = capsys.readouterr().out
    assert out.startswith("auditing the embedded drawn faces; --data PATH names your own\n")
    assert "pictures: 70 train + 14 val + 14 test\n" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.cach_dir", "x"], "did you mean 'data.cache_dir'"),
        (["--data.size", "4"], "data.size is 4"),
        (["--data.on_error", "maybe"], "expected one of stop, skip"),
        (["--optim.lr", "1"], "--optim.lr is not a setting of the audit"),
        (["picture.png"], "unexpected argument 'picture.png'"),
        (["--data"], "expected one argument"),
        (["--data", "/no/such/place"], "/no/such/place"),
    ],
)
def test_wrong_arguments_leave_with_2(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_a_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert command(monkeypatch, "--data", folder, "--out", tmp_path / "file") == 2
    assert f"{tmp_path / 'file'} cannot be written" in capsys.readouterr().err
    (tmp_path / "out" / "audit.json").mkdir(parents=True)
    assert command(monkeypatch, "--data", folder, "--out", tmp_path / "out") == 2
    assert "audit.json cannot be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["audit.json"]  # nothing half done is left


def test_help_is_quick() -> None:
    code = (
        "import sys; sys.argv = ['audit', '--help']\n"
        "from fer_dist.audit import main\n"
        "try: main()\n"
        "finally: assert not {'numpy', 'torch', 'PIL', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--data.cache_dir" in done.stdout


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


def test_the_real_archive(
    real_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--data", real_archive, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert [line for line in FIGURES.splitlines() if line not in out.splitlines()] == []
    plain = json.loads((tmp_path / "audit.json").read_text())
    assert [p["name"].rpartition("/")[2] for p in plain["flat"]] == ["Training_3542668.jpg"]
    assert sum(p["label"] == "angry" for p in plain["blank"] if p["split"] == "train") == 7
    assert len({p["index"] for p in plain["leaks"]}) == 280
