"""The same few pictures in every form that FER2013 comes in, and the choice of who trains."""

import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from fer_dist.data.decoding import decode
from fer_dist.data.faces import TEST, TRAIN, VAL, Faces
from fer_dist.data.readers import read_faces
from fer_dist.data.split import hold_out_validation, require_part, training_index
from fer_dist.errors import UserError
from fer_dist.spec import EXPRESSIONS, LabelSet

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


def encoded(image: NDArray[np.uint8], form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, form)
    return out.getvalue()


def tree(names: Iterable[str]) -> dict[str, bytes]:
    return {name: encoded(IMAGES_NHW[i % 7]) for i, name in enumerate(names)}


def as_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return path


@pytest.mark.parametrize("header", ["emotion,pixels,Usage", "emotion, Usage, pixels"])
def test_csv_keeps_rows_in_order(tmp_path: Path, header: str) -> None:
    (tmp_path / "fer2013.csv").write_text(csv_text(header))
    faces = read(tmp_path / "fer2013.csv")
    assert np.array_equal(faces.images_NHW, IMAGES_NHW)
    assert faces.images_NHW.dtype == np.uint8
    assert faces.labels_N.tolist() == list(LABELS)
    assert faces.usage_N.tolist() == CODES
    assert list(faces.names[:2]) == ["row 1", "row 2"]


def test_csv_numbers_may_be_spelled_otherwise(tmp_path: Path) -> None:
    text = csv_text().replace(",", ",  ", 2).replace(" 7 ", " 007 ").replace("\n", "\r\n")
    (tmp_path / "fer2013.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())  # the mark that Excel writes
    assert np.array_equal(read(tmp_path / "fer2013.csv").images_NHW, IMAGES_NHW)


def test_competition_folder_is_all_training(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(csv_text("emotion,pixels"))
    (tmp_path / "test.csv").write_text(csv_text("pixels"))
    for path in (tmp_path, tmp_path / "train.csv"):
        faces = read(path)
        assert faces.usage_N.tolist() == [TRAIN] * 7
        assert any("no column Usage" in note for note in faces.notes)


def test_csv_inside_a_zip_or_folder(tmp_path: Path) -> None:
    files = {"fer/train.csv": b"x", "fer/fer2013.csv": csv_text().encode(), "__MACOSX/fer/._fer2013.csv": b"x"}
    for path in (as_zip(tmp_path / "a.zip", files), as_folder(tmp_path / "a", files)):
        faces = read(path)
        assert np.array_equal(faces.images_NHW, IMAGES_NHW)
        assert faces.usage_N.tolist() == CODES


@pytest.mark.parametrize("top", ["", "archive/", "a/b/"])
@pytest.mark.parametrize("zipped", [False, True])
def test_folder_and_zip_give_the_same(tmp_path: Path, top: str, zipped: bool) -> None:
    names = ["train/happy/b.png", "train/Anger/a.png", "test/neutral/c.png", "validation/5/d.png", "test/sad/e.png"]
    files = tree(top + name for name in names) | {f"{top}readme.txt": b"x", f"{top}train/happy/.hidden.png": b"x"}
    faces = read(as_zip(tmp_path / "a.zip", files) if zipped else as_folder(tmp_path / "a", files))
    assert list(faces.names) == sorted(top + name for name in names)
    assert [EXPRESSIONS[label] for label in faces.labels_N] == ["neutral", "sad", "angry", "happy", "surprise"]
    assert faces.usage_N.tolist() == [TEST, TEST, TRAIN, TRAIN, VAL]
    assert np.array_equal(faces.images_NHW, IMAGES_NHW[[2, 4, 1, 0, 3]])
    assert any("readme.txt" in note for note in faces.notes)


def test_prefixes_override_the_folder(tmp_path: Path) -> None:
    names = ["test/happy/PrivateTest_1.png", "test/happy/PublicTest_2.png", "test/happy/Training_3.png"]
    faces = read(as_folder(tmp_path, tree([*names, "test/happy/x_4.png"])))
    assert faces.usage_N.tolist() == [TEST, VAL, TRAIN, TEST]


def test_official_folder_names(tmp_path: Path) -> None:
    faces = read(as_folder(tmp_path, tree(["PrivateTest/sad/1.png", "PublicTest/sad/1.png", "Training/sad/1.png"])))
    assert faces.usage_N.tolist() == [TEST, VAL, TRAIN]


def test_plain_class_folders_are_training_and_say_so(tmp_path: Path) -> None:
    faces = read(as_folder(tmp_path, tree(["happy/1.png", "sad/2.png"])))
    assert faces.usage_N.tolist() == [TRAIN, TRAIN]
    assert any("no train and test folders" in note for note in faces.notes)


def test_train_csv_beside_pictures_is_not_read(tmp_path: Path) -> None:
    faces = read(as_folder(tmp_path, tree(["train/happy/1.png"]) | {"train.csv": b"file,label"}))
    assert list(faces.names) == ["train/happy/1.png"]


def test_larger_pictures_are_reduced_without_aliasing(tmp_path: Path) -> None:
    board_HW = (np.indices((96, 96)).sum(axis=0) % 2 * 255).astype(np.uint8)
    faces = read(as_folder(tmp_path, {"happy/1.png": encoded(board_HW)}))
    assert faces.images_NHW.shape == (1, 48, 48)
    assert np.abs(faces.images_NHW[0].astype(int) - 127).max() <= 4  # picking pixels would give 0 or 255


def test_size_holds_for_csv_and_smaller_pictures(tmp_path: Path) -> None:
    (tmp_path / "fer2013.csv").write_text(csv_text())
    assert read(tmp_path, size=32).images_NHW.shape == (7, 32, 32)
    assert decode(encoded(IMAGES_NHW[0]), 64).shape == (64, 64)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "JPEG", "WEBP"])
def test_picture_formats(form: str) -> None:
    smooth_HW = np.repeat(np.arange(48, dtype=np.uint8)[None] * 5, 48, axis=0)
    assert np.abs(decode(encoded(smooth_HW, form), 48).astype(int) - smooth_HW).max() <= 8


def test_colour_palette_and_sixteen_bits_become_grey() -> None:
    ramp_HW = np.repeat(np.arange(48, dtype=np.uint8)[None] * 5, 48, axis=0)
    assert np.array_equal(decode(encoded(np.stack([ramp_HW] * 3, axis=-1)), 48), ramp_HW)
    out = io.BytesIO()
    Image.fromarray(ramp_HW).convert("P").save(out, "PNG", transparency=b"\0" * 256)
    assert np.array_equal(decode(out.getvalue(), 48), ramp_HW)
    out = io.BytesIO()
    Image.fromarray(ramp_HW.astype(np.uint16) * 257).save(out, "PNG")
    assert np.array_equal(decode(out.getvalue(), 48), ramp_HW)


def hub_table(labels: list[int] | list[str], names: list[str] | None, **more: list[str]) -> pa.Table:
    images = [{"bytes": encoded(image_HW), "path": None} for image_HW in IMAGES_NHW[: len(labels)]]
    table = pa.table({"image": images, "label": labels} | more)
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_parquet_folder_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        table = hub_table([0, 1], ["sadness", "happy"])
        parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    faces = read(tmp_path)
    assert faces.usage_N.tolist() == [TEST, TEST, TRAIN, TRAIN, VAL, VAL]
    assert [EXPRESSIONS[label] for label in faces.labels_N] == ["sad", "happy"] * 3
    assert faces.names[2] == "data/train-00000-of-00001.parquet row 1"
    assert np.array_equal(faces.images_NHW[:2], IMAGES_NHW[:2])


def test_parquet_split_from_folder_or_prefix(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    paths = ["Training_1.png", "x.png"]
    images = [{"bytes": encoded(IMAGES_NHW[0]), "path": path} for path in paths]
    parquet.write_table(pa.table({"img": images, "emotion": ["sad", "sad"]}), tmp_path / "test" / "0000.parquet")
    for path in (tmp_path, tmp_path / "test" / "0000.parquet"):
        assert read(path).usage_N.tolist() == [TRAIN, TEST]


def test_parquet_with_usage_text_labels_and_plain_bytes(tmp_path: Path) -> None:
    images = [encoded(image_HW) for image_HW in IMAGES_NHW[:3]]
    table = pa.table({"image": images, "label": ["fear", "6", "happiness"], "Usage": list(USAGE[2:5])})
    parquet.write_table(table, tmp_path / "faces.parquet")
    faces = read(tmp_path / "faces.parquet")
    assert faces.labels_N.tolist() == [2, 6, 3]
    assert faces.usage_N.tolist() == [TRAIN, VAL, TEST]


FERPLUS = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF\n"


def test_ferplus_votes_become_targets(tmp_path: Path) -> None:
    (tmp_path / "fer2013.csv").write_text(csv_text())
    votes = ["1,2,3,0,0,0,0,4,0,0", "0,0,0,0,5,0,0,0,5,0", "0,0,0,0,0,0,0,9,1,0", "0,0,0,0,0,0,0,0,0,10"]
    votes += ["0,0,0,0,0,0,1,0,0,0"] * 3
    (tmp_path / "votes.csv").write_text(FERPLUS + "".join(f"{u},x,{v}\n" for u, v in zip(USAGE, votes, strict=True)))
    faces = read(tmp_path / "fer2013.csv", ferplus=tmp_path / "votes.csv")
    assert faces.targets_NK is not None
    assert faces.targets_NK.dtype == np.float32
    assert list(faces.names) == [f"row {row}" for row in (1, 2, 4, 5, 6, 7)]  # row 3 trains, without a vote
    assert np.allclose(faces.targets_NK[0], [0, 0, 0, 2 / 6, 0, 3 / 6, 1 / 6])
    assert faces.targets_NK[1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert faces.targets_NK[2].tolist() == [0, 0, 0, 0, 0, 1, 0]  # row 4 judges, and keeps its label
    assert faces.labels_N.tolist() == [3, 0, 5, 4, 1, 2]
    assert any(note.startswith("2 pictures have no FER+ vote") for note in faces.notes)


def made(labels: list[int], usage: list[int], images_NHW: NDArray[np.uint8] | None = None) -> Faces:
    if images_NHW is None:
        images_NHW = np.random.default_rng(1).integers(0, 256, (len(labels), 4, 4), dtype=np.uint8)
    names = [str(i) for i in range(len(labels))]
    return Faces(images_NHW=images_NHW, labels_N=np.array(labels), usage_N=np.array(usage), names=names)


def test_held_out_part_is_stratified_seeded_and_keeps_copies_together() -> None:
    faces = made([0] * 200 + [1] * 50, [TRAIN] * 250)
    faces.images_NHW[100:150] = faces.images_NHW[:50]
    held = hold_out_validation(faces, 0.2, seed=3)
    val = held.part(VAL)
    counts = np.bincount(held.labels_N[val])
    assert abs(counts[0] - 40) <= 1
    assert counts[1] == 10
    assert np.array_equal(held.usage_N[:50], held.usage_N[100:150])
    assert np.array_equal(hold_out_validation(faces, 0.2, seed=3).usage_N, held.usage_N)
    assert not np.array_equal(hold_out_validation(faces, 0.2, seed=4).usage_N, held.usage_N)
    assert any("50 of 250" in note and "held out" in note for note in held.notes)
    assert held.images_NHW is faces.images_NHW
    assert not faces.part(VAL).size


def test_marked_validation_is_left_alone() -> None:
    for usage in ([TRAIN, VAL], [TEST, TEST]):
        faces = made([0, 1], usage)
        assert hold_out_validation(faces, 0.5, seed=0) is faces


def test_training_index_drops_blanks_of_train_only_and_copies_if_asked() -> None:
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


def test_empty_parts_are_named() -> None:
    faces = made([0, 0], [TRAIN, VAL])
    require_part(faces, VAL)
    with pytest.raises(UserError, match=r"the test part is empty; found train 1, val 1, test 0"):
        require_part(faces, TEST)
    with pytest.raises(UserError, match="no training picture is left"):
        training_index(replace(faces, images_NHW=np.zeros((2, 4, 4), dtype=np.uint8)), drop_copies=False)
