"""JSON and CSV of predictions are complete, or not written."""

import csv
import errno
import json
from pathlib import Path

import pytest

from fer_dist.errors import UserError
from fer_dist.serve.faces import Box
from fer_dist.serve.predictor import Answer, Prediction
from fer_dist.serve.records import COLUMNS, Records
from fer_dist.spec import EXPRESSIONS

P_K = (0.0, 0.0, 0.0, 0.75, 0.25, 0.0, 0.0)
FACE = Prediction(label="happy", probabilities_K=P_K, box=Box(1.4, 2.6, 30, 40), confidence=0.91)
ANSWERS = [
    Answer(path=Path("two.png"), width=200, height=100, faces=(FACE, FACE)),
    Answer(path=Path('none, "quoted"\n.png'), width=20, height=10),
    Answer(path=Path("bad\udcff.png"), problem="no picture"),
]


def write(folder: Path, answers: list[Answer]) -> tuple[Path, Path]:
    paths = folder / "out.json", folder / "out.csv"
    with Records(*paths, about={"model": "best.pth", "labels": list(EXPRESSIONS)}, labels=EXPRESSIONS) as records:
        for answer in answers:
            records.add(answer)
    return paths


def test_json_has_every_face(tmp_path: Path) -> None:
    plain = json.loads(write(tmp_path, ANSWERS)[0].read_text())
    assert list(plain) == ["model", "labels", "pictures"]
    two, none, bad = plain["pictures"]
    shares = dict(zip(EXPRESSIONS, P_K, strict=True))
    face = {"box": [1, 3, 30, 40], "confidence": 0.91, "label": "happy", "probabilities": shares}
    assert two["faces"] == [face, face]
    assert (none["width"], none["height"], none["faces"]) == (20, 10, [])
    assert bad == {"path": "bad\udcff.png", "problem": "no picture"}
    for count in (0, 1):
        assert len(json.loads(write(tmp_path, ANSWERS[:count])[0].read_text())["pictures"]) == count


def test_csv_has_a_row_for_each_face(tmp_path: Path) -> None:
    with write(tmp_path, ANSWERS)[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*COLUMNS, *EXPRESSIONS, "problem"]
    assert [(row["path"], row["face"], row["label"], row["problem"]) for row in rows] == [
        ("two.png", "1", "happy", ""),
        ("two.png", "2", "happy", ""),
        ('none, "quoted"\n.png', "", "", "no face"),
        ("bad\\udcff.png", "", "", "no picture"),
    ]
    assert (float(rows[1]["happy"]), rows[1]["height"]) == (0.75, "40")
    assert {len(row) for row in rows} == {len(COLUMNS) + 8}


def test_a_crop_has_no_box(tmp_path: Path) -> None:
    crop = Prediction(label="sad", probabilities_K=P_K[::-1])
    json_path, csv_path = write(tmp_path, [Answer(path=Path("a.png"), width=48, height=48, faces=(crop,))])
    assert list(json.loads(json_path.read_text())["pictures"][0]["faces"][0]) == ["label", "probabilities"]
    assert "a.png,1,,,,,,sad," in csv_path.read_text()


def test_an_error_leaves_the_old_files(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("old")
    with pytest.raises(KeyError), Records(tmp_path / "out.json", tmp_path / "out.csv", about={}, labels=EXPRESSIONS):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert (tmp_path / "out.json").read_text() == "old"


@pytest.mark.parametrize("name", ["no/such/folder/x.json", ".", "file/x.json"])
def test_a_file_that_cannot_be_written_is_an_error_at_once(name: str, tmp_path: Path) -> None:
    """The other file is not begun either."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        Records(tmp_path / "a.json", tmp_path / name, about={}, labels=EXPRESSIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    records = Records(tmp_path / "a.json", None, about={}, labels=EXPRESSIONS)
    monkeypatch.setattr(records._json, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.json: No space"), records:
        records.add(ANSWERS[0])
    assert list(tmp_path.iterdir()) == []
