"""JSON and CSV of predictions are complete, or not written."""

import csv
import errno
import json
from pathlib import Path
from unittest import mock

import pytest

from fer_dist.errors import UserError
from fer_dist.serve.faces import Box
from fer_dist.serve.predictor import Answer, Prediction
from fer_dist.serve.records import COLUMNS, Records
from fer_dist.spec import EXPRESSIONS

P_K = (0.0, 0.0, 0.0, 0.75, 0.25, 0.0, 0.0)
FACE = Prediction(label="happy", probabilities_K=P_K, box=Box(1.4, 2.6, 30, 40), confidence=0.91)
CROP = Prediction(label="happy", probabilities_K=P_K)
ANSWERS = [
    Answer(path=Path("two.png"), width=200, height=100, faces=(FACE, FACE)),
    Answer(path=Path('none, "quoted"\n.png'), width=20, height=10),
    Answer(path=Path("bad\udcff.png"), problem="no picture"),
    Answer(path=Path("crop.png"), width=48, height=48, faces=(CROP,)),
]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_face_is_recorded(count: int, tmp_path: Path) -> None:
    paths = tmp_path / "out.json", tmp_path / "out.csv"
    about = {"model": "best.pth", "labels": list(EXPRESSIONS)}
    with Records(*paths, about=about, labels=EXPRESSIONS) as records:
        for answer in ANSWERS[:count]:
            records.add(answer)
    shares = dict(zip(EXPRESSIONS, P_K, strict=True))
    face = {"box": [1, 3, 30, 40], "confidence": 0.91, "label": "happy", "probabilities": shares}
    pictures = [
        {"path": "two.png", "width": 200, "height": 100, "faces": [face, face]},
        {"path": 'none, "quoted"\n.png', "width": 20, "height": 10, "faces": []},
        {"path": "bad\udcff.png", "problem": "no picture"},
        {"path": "crop.png", "width": 48, "height": 48, "faces": [{"label": "happy", "probabilities": shares}]},
    ]
    assert json.loads(paths[0].read_text()) == about | {"pictures": pictures[:count]}
    with paths[1].open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == [*COLUMNS, *EXPRESSIONS, "problem"]
    p_K = [f"{p:.6f}" for p in P_K]
    expected = [
        ["two.png", "1", "1", "3", "30", "40", "0.91", "happy", *p_K, ""],
        ["two.png", "2", "1", "3", "30", "40", "0.91", "happy", *p_K, ""],
        ['none, "quoted"\n.png', *[""] * 14, "no face"],
        ["bad\\udcff.png", *[""] * 14, "no picture"],
        ["crop.png", "1", *[""] * 5, "happy", *p_K, ""],
    ]
    assert rows == expected[: count + (count > 0)]


@pytest.mark.parametrize("name", ["no/such/folder/x.json", "."])
def test_a_file_that_cannot_be_written_is_an_error_at_once(name: str, tmp_path: Path) -> None:
    """The other file is not begun either."""
    with pytest.raises(UserError, match="cannot write"):
        Records(tmp_path / "a.json", tmp_path / name, about={}, labels=EXPRESSIONS)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("old")
    records = Records(tmp_path / "a.json", tmp_path / "a.csv", about={}, labels=EXPRESSIONS)
    monkeypatch.setattr(records._json, "write", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=r"cannot write .*a\.json: No space"), records:
        records.add(ANSWERS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
