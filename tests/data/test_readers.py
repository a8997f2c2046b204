"""The same few pictures in every form that FER2013 comes in, and the choice of who trains."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fer_dist.data.decoding import decode
from fer_dist.data.faces import TEST, TRAIN, VAL, Faces
from fer_dist.data.readers import read_faces
from fer_dist.data.split import hold_out_validation, require_part, training_index
from fer_dist.errors import UserError
from fer_dist.spec import EXPRESSIONS, LabelSet
from tests.helpers.picture_files import encoded, faces_of, write_folder, write_zip

IMAGES_NHW = np.random.default_rng(0).integers(0, 256, (7, 48, 48), dtype=np.uint8)
LABELS = (3, 0, 6, 5, 4, 1, 2)
USAGE = ("Training", "Training", "Training", "PublicTest", "PrivateTest", "Training", "PublicTest")
CODES = [TRAIN, TRAIN, TRAIN, VAL, TEST, TRAIN, VAL]


def read(path: Path, *, size: int = 48, ferplus: Path | None = None) -> Faces:
    return read_faces(path, size=size, labels=LabelSet(), on_error="stop", ferplus=ferplus)


def csv_text(header: str = "emotion,pixels,Usage") -> str:
    lines = [header]
    for image_HW, label, usage in zip(IMAGES_NHW, LABELS, USAGE, strict=True):
        cells = {"emotion": str(label), "pixels": " ".join(map(str, image_HW.ravel())), "usage": usage}
        lines.append(",".join(cells[word.strip().lower()] for word in header.split(",")))
    return "\n".join(lines) + "\n"


def tree(names: Iterable[str]) -> dict[str, bytes]:
    return {name: encoded(IMAGES_NHW[i % 7]) for i, name in enumerate(names)}


def test_csv_keeps_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "fer2013.csv"
    for header in ("emotion,pixels,Usage", "emotion, Usage, pixels"):
        path.write_text(csv_text(header))
        faces = read(path)
        assert np.array_equal(faces.images_NHW, IMAGES_NHW)
        assert faces.images_NHW.dtype == np.uint8
        assert faces.labels_N.tolist() == list(LABELS)
        assert faces.usage_N.tolist() == CODES
        assert list(faces.names[:2]) == ["row 1", "row 2"]
    text = csv_text().replace(",", ",  ", 2).replace(" 7 ", " 007 ").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # the mark that Excel writes
    assert np.array_equal(read(path).images_NHW, IMAGES_NHW)


def test_competition_folder_is_all_training(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(csv_text("emotion,pixels"))
    (tmp_path / "test.csv").write_text(csv_text("pixels"))
    for path in (tmp_path, tmp_path / "train.csv"):
        faces = read(path)
        assert faces.usage_N.tolist() == [TRAIN] * 7
        assert any("no column Usage" in note for note in faces.notes)
    (tmp_path / "happy").mkdir()  # next to pictures, train.csv is a list of them
    (tmp_path / "happy" / "1.png").write_bytes(encoded(IMAGES_NHW[0]))
    assert list(read(tmp_path).names) == ["happy/1.png"]


def test_csv_inside_a_zip_or_folder(tmp_path: Path) -> None:
    files = {"fer/train.csv": b"x", "fer/fer2013.csv": csv_text().encode(), "__MACOSX/fer/._fer2013.csv": b"x"}
    for path in (write_zip(tmp_path / "a.zip", files), write_folder(tmp_path / "a", files)):
        faces = read(path)
        assert np.array_equal(faces.images_NHW, IMAGES_NHW)
        assert faces.usage_N.tolist() == CODES


@pytest.mark.parametrize(("top", "zipped"), [("", False), ("", True), ("a/b/", False), ("archive/", True)])
def test_folder_and_zip_give_the_same(tmp_path: Path, top: str, zipped: bool) -> None:
    names = ["train/happy/b.png", "train/Anger/a.png", "test/neutral/c.png", "validation/5/d.png", "test/sad/e.png"]
    files = tree(top + name for name in names) | {f"{top}readme.txt": b"x", f"{top}train/happy/.hidden.png": b"x"}
    faces = read(write_zip(tmp_path / "a.zip", files) if zipped else write_folder(tmp_path / "a", files))
    assert list(faces.names) == sorted(top + name for name in names)
    assert [EXPRESSIONS[label] for label in faces.labels_N] == ["neutral", "sad", "angry", "happy", "surprise"]
    assert faces.usage_N.tolist() == [TEST, TEST, TRAIN, TRAIN, VAL]
    assert np.array_equal(faces.images_NHW, IMAGES_NHW[[2, 4, 1, 0, 3]])
    assert any("readme.txt" in note for note in faces.notes)


def test_the_split_of_a_picture_file(tmp_path: Path) -> None:
    for i, (names, codes) in enumerate(
        {
            ("PrivateTest/sad/1.png", "PublicTest/sad/1.png", "Training/sad/1.png"): [TEST, VAL, TRAIN],
            # FER2013's prefixes override the folder.
            ("test/sad/PrivateTest_1.png", "test/sad/PublicTest_2.png", "test/sad/Training_3.png"): [TEST, VAL, TRAIN],
            ("test/sad/x_4.png", "train/sad/x_4.png"): [TEST, TRAIN],
            ("happy/1.png", "sad/2.png"): [TRAIN, TRAIN],
        }.items()
    ):
        faces = read(write_folder(tmp_path / str(i), tree(names)))
        assert faces.usage_N.tolist() == codes
    assert any("no train and test folders" in note for note in faces.notes)


def test_pictures_of_other_sizes_are_resized_without_aliasing(tmp_path: Path) -> None:
    board_HW = (np.indices((96, 96)).sum(axis=0) % 2 * 255).astype(np.uint8)
    faces = read(write_folder(tmp_path, {"happy/1.png": encoded(board_HW)}))
    assert faces.images_NHW.shape == (1, 48, 48)
    assert np.abs(faces.images_NHW[0].astype(int) - 127).max() <= 4  # picking pixels would give 0 or 255
    (tmp_path / "fer2013.csv").write_text(csv_text())
    assert read(tmp_path, size=32).images_NHW.shape == (7, 32, 32)
    assert decode(encoded(IMAGES_NHW[0]), 64).shape == (64, 64)


def test_picture_formats_and_modes_become_grey() -> None:
    ramp_HW = np.repeat(np.arange(48, dtype=np.uint8)[None] * 5, 48, axis=0)
    for form in ("PNG", "BMP", "GIF", "JPEG", "WEBP"):
        assert np.abs(decode(encoded(ramp_HW, form), 48).astype(int) - ramp_HW).max() <= 8
    palette = encoded(Image.fromarray(ramp_HW).convert("P"), transparency=b"\0" * 256)
    for raw in (encoded(np.stack([ramp_HW] * 3, axis=-1)), palette, encoded(ramp_HW.astype(np.uint16) * 257)):
        assert np.array_equal(decode(raw, 48), ramp_HW)


def test_parquet_folder_of_the_hub(tmp_path: Path) -> None:
    images = [{"bytes": encoded(image_HW), "path": None} for image_HW in IMAGES_NHW[:2]]
    features = {"label": {"names": ["sadness", "happy"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": images, "label": [0, 1]}).replace_schema_metadata(metadata)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    faces = read(tmp_path)
    assert faces.usage_N.tolist() == [TEST, TEST, TRAIN, TRAIN, VAL, VAL]
    assert [EXPRESSIONS[label] for label in faces.labels_N] == ["sad", "happy"] * 3
    assert faces.names[2] == "data/train-00000-of-00001.parquet row 1"
    assert np.array_equal(faces.images_NHW[:2], IMAGES_NHW[:2])


def test_parquet_split_from_folder_prefix_or_column(tmp_path: Path) -> None:
    path = tmp_path / "test" / "0000.parquet"
    path.parent.mkdir()
    images = [{"bytes": encoded(IMAGES_NHW[0]), "path": name} for name in ("Training_1.png", "x.png")]
    parquet.write_table(pa.table({"img": images, "emotion": ["sad", "sad"]}), path)
    for source in (tmp_path, path):
        assert read(source).usage_N.tolist() == [TRAIN, TEST]
    plain = [encoded(image_HW) for image_HW in IMAGES_NHW[:3]]
    table = pa.table({"image": plain, "label": ["fear", "6", "happiness"], "Usage": list(USAGE[2:5])})
    parquet.write_table(table, path)
    faces = read(path)
    assert faces.labels_N.tolist() == [2, 6, 3]
    assert faces.usage_N.tolist() == [TRAIN, VAL, TEST]


def test_ferplus_votes_become_targets(tmp_path: Path) -> None:
    (tmp_path / "fer2013.csv").write_text(csv_text())
    votes = ["1,2,3,0,0,0,0,4,0,0", "0,0,0,0,5,0,0,0,5,0", "0,0,0,0,0,0,0,9,1,0", "0,0,0,0,0,0,0,0,0,10"]
    votes += ["0,0,0,0,0,0,1,0,0,0"] * 3
    header = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    rows = [header, *(f"{usage},x,{counts}" for usage, counts in zip(USAGE, votes, strict=True))]
    (tmp_path / "votes.csv").write_text("\n".join(rows) + "\n")
    faces = read(tmp_path / "fer2013.csv", ferplus=tmp_path / "votes.csv")
    assert faces.targets_NK is not None
    assert faces.targets_NK.dtype == np.float32
    assert list(faces.names) == [f"row {row}" for row in (1, 2, 4, 5, 6, 7)]  # row 3 trains, without a vote
    assert np.allclose(faces.targets_NK[0], [0, 0, 0, 2 / 6, 0, 3 / 6, 1 / 6])
    assert faces.targets_NK[1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert faces.targets_NK[2].tolist() == [0, 0, 0, 0, 0, 1, 0]  # row 4 judges, and keeps its label
    assert faces.labels_N.tolist() == [3, 0, 5, 4, 1, 2]
    assert any(note.startswith("2 pictures have no FER+ vote") for note in faces.notes)


def made(labels: list[int], usage: list[int]) -> Faces:
    return faces_of(np.random.default_rng(1).integers(0, 256, (len(labels), 4, 4), dtype=np.uint8), labels, usage)


def test_held_out_part_is_stratified_seeded_and_keeps_copies_together() -> None:
    faces = made([0] * 200 + [1] * 50, [TRAIN] * 250)
    faces.images_NHW[100:150] = faces.images_NHW[:50]
    held = hold_out_validation(faces, 0.2, seed=3)
    counts = np.bincount(held.labels_N[held.part(VAL)])
    assert abs(counts[0] - 40) <= 1
    assert counts[1] == 10
    assert np.array_equal(held.usage_N[:50], held.usage_N[100:150])
    assert np.array_equal(hold_out_validation(faces, 0.2, seed=3).usage_N, held.usage_N)
    assert not np.array_equal(hold_out_validation(faces, 0.2, seed=4).usage_N, held.usage_N)
    assert any("50 of 250" in note and "held out" in note for note in held.notes)
    assert held.images_NHW is faces.images_NHW
    assert not faces.part(VAL).size
    for usage in ([TRAIN, VAL], [TEST, TEST]):  # marked, and nothing to take from
        faces = made([0, 1], usage)
        assert hold_out_validation(faces, 0.5, seed=0) is faces


def test_training_index_drops_blanks_of_train_only_and_copies_if_requested() -> None:
    faces = made([0] * 6, [TRAIN, TRAIN, TRAIN, VAL, TEST, VAL])
    faces.images_NHW[1] = 9
    faces.images_NHW[3] = 0
    faces.images_NHW[2] = faces.images_NHW[4]
    index, notes = training_index(faces, drop_copies=False)
    assert index.tolist() == [0, 2]
    assert notes == ("1 blank training pictures are left out",)
    index, notes = training_index(faces, drop_copies=True)
    assert index.tolist() == [0]
    assert any("1 training pictures are copies" in note for note in notes)
    faces.images_NHW[:] = 0
    with pytest.raises(UserError, match="no training picture is left"):
        training_index(faces, drop_copies=False)
    require_part(faces, VAL)
    with pytest.raises(UserError, match=r"the test part is empty; found train 1, val 1, test 0"):
        require_part(made([0, 0], [TRAIN, VAL]), TEST)
