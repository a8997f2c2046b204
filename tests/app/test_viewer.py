"""The parts of the app without its server: smoothing, frames per second, HTML, the accuracy that the page states."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from fer_dist.data.decoding import Photo
from fer_dist.serve import pagehtml
from fer_dist.serve.faces import Box, Found
from fer_dist.serve.measured import measured
from fer_dist.serve.predictor import Prediction, Predictor
from fer_dist.serve.runner import open_runner
from fer_dist.serve.viewer import FORGET_S, SETTLE_S, Stream, View, Viewer, plain
from fer_dist.spec import EXPRESSIONS as LABELS
from tests.helpers.artifacts import describe, saved, tiny_onnx, write

BOX = Box(100, 100, 80, 80)


def face(index: int, box: Box = BOX) -> Prediction:
    p_K = tuple(0.94 if i == index else 0.01 for i in range(7))
    return Prediction(label=LABELS[index], probabilities_K=p_K, box=box, confidence=0.9)


@pytest.fixture
def stream() -> Stream:
    return Stream(labels=LABELS)


@pytest.mark.parametrize("frames", [5, 50])
def test_a_change_is_shown_after_the_time_constant_at_any_rate(frames: int, stream: Stream) -> None:
    """63% of the way after SETTLE_S, and less before: one wrong frame is not shown."""
    stream.add((face(0),), 0.0)
    for number in range(1, frames + 1):
        (shown,) = stream.add((face(3),), number * SETTLE_S / frames)
        assert number > 1 or shown.label == LABELS[0]
    assert sum(shown.probabilities_K) == pytest.approx(1)
    assert shown.label == LABELS[3]
    assert shown.probabilities_K[3] == pytest.approx(0.01 + 0.93 * (1 - np.exp(-1)))


def test_faces_are_followed_by_their_boxes(stream: Stream) -> None:
    far = Box(400, 100, 80, 80)
    stream.add((face(3), face(4, far)), 0.0)
    left, right = stream.add((face(3, BOX._replace(left=105)), face(4, far._replace(left=395))), 0.1)
    assert (left.label, right.label) == (LABELS[3], LABELS[4])
    assert left.probabilities_K[3] == pytest.approx(0.94)
    assert 100 < left.box.left < 105  # type: ignore[union-attr]


def test_a_face_that_was_away_is_another_one(stream: Stream) -> None:
    stream.add((face(3),), 0.0)
    assert stream.add((), 0.2) == ()
    (shown,) = stream.add((face(0),), 0.4)  # missed once: still the same face
    assert shown.probabilities_K[0] < 0.9
    (shown,) = stream.add((face(4),), 0.5 + FORGET_S)
    assert shown.probabilities_K[4] == pytest.approx(0.94)


def test_frames_per_second_are_of_the_last_seconds(stream: Stream) -> None:
    assert stream.rate == 0
    for number in range(200):
        stream.add((), 10 + number / 8)
    assert stream.rate == pytest.approx(8)
    assert len(stream.moments) <= 30
    stream.add((), 1000.0)
    assert stream.rate == 0  # after a pause it starts again


def test_memory_does_not_grow_with_faces(stream: Stream) -> None:
    for number in range(5):
        stream.add(tuple(face(0, Box(20 * i, 1000 * number, 9, 9)) for i in range(400)), number / 10)
    assert len(stream.faces) <= 256


def html(*faces: Prediction, labels: tuple[str, ...] = LABELS) -> str:
    return pagehtml.result(View(faces=faces, picture=Image.new("RGB", (64, 48))), labels, rate=7.25)


def test_html_shows_the_bars_of_the_largest_face_and_escapes_text() -> None:
    found = html(face(0), face(3, Box(0, 0, 200, 200)))
    assert found.count('class="bar') == 8  # seven, and what holds them
    assert re.search(r'class="bar best"><span>happy</span>.*?<span>94%</span>', found)
    assert "2 faces; the bars are of the largest" in found
    assert "7.2 frames per second" in found
    assert 'class="heat"' not in found
    assert "No face found" in html()
    assert "bar" not in html()
    wild = "<script>alert(1)</script>"
    labelled = Prediction(label=wild, probabilities_K=(1.0,) + (0.0,) * 6, box=BOX)
    assert "<script" not in html(labelled, labels=(wild, *LABELS[1:])) + pagehtml.problem(wild)


def test_a_checkpoint_shows_where_it_looked(tmp_path: Path) -> None:
    photo = Photo(np.full((240, 320, 3), 90, np.uint8), 640, 480)
    detector = mock.Mock(find=lambda rgb_HW3: [Found(BOX, 0.9)])
    with open_runner(saved(tmp_path), device="cpu") as runner:
        assert "not known" in pagehtml.about(runner, measured(runner))
        viewer = Viewer(Predictor(runner, detector))
        faces = viewer.predictor.photo(photo)
        view = viewer.shown(photo, faces, heat=True)
        assert view.heat is not None
        assert view.method == "attention rollout"
        assert viewer.shown(photo, faces, heat=False).heat is None
        box = {"left": 200, "top": 200, "width": 160, "height": 160}
        assert plain(faces, photo, LABELS)["faces"][0]["box"] == box
        with mock.patch.object(viewer.predictor, "lock") as lock:
            viewer.predictor.photo(photo)
        assert lock.__enter__.called
    with open_runner(write(tmp_path, tiny_onnx()), provider="cpu") as runner:
        assert Viewer(Predictor(runner, detector)).shown(photo, faces, heat=True).heat is None  # it has no attention
        assert measured(runner) is None


@pytest.mark.parametrize(
    ("config", "drawn", "words"),
    [
        ({"data": {"path": "/home/me/archive.zip"}}, False, " pictures: validation part of archive.zip"),
        ({"data": {"path": None}}, True, " pictures: drawn faces that it was not trained on"),
        ({"data": {"path": "a.zip"}, "train": {"flip_tta": True}}, False, " averaged with its mirror image: "),
    ],
)
def test_the_accuracy_of_a_checkpoint(config: dict[str, Any], drawn: bool, words: str, tmp_path: Path) -> None:
    """The app does not average over mirror images: the page must say that the number does."""
    val = {"loss": 1.0, "accuracy": 0.671, "macro_f1": 0.6, "recall": {}, "count": 3589}
    record = {"epoch": 1, "step": 5, "lr": 0.1, "train_loss": 1.0, "val": val}
    with open_runner(saved(tmp_path, config=config, record=record), device="cpu") as runner:
        about = pagehtml.about(runner, measured(runner))
    assert "67.1% accuracy (95% interval 65.5 to 68.6%) on 3,589 pictures" in about
    assert words in about
    assert "/home" not in about
    assert ("says little about photos" in about) == drawn


@pytest.mark.parametrize(
    ("parity", "words"),
    [
        ({"of": 3000}, "66.0% accuracy (95% interval 60.5 to 71.1%) on 300 of 3,000 pictures: validation part of a"),
        ({}, "66.0% accuracy (95% interval 60.5 to 71.1%) on 300 pictures: "),
        ({"executed": False}, " pictures, by the graph that it was built from: "),
        ({"meaningful": False}, "None"),
        ({"count": -3}, "None"),
    ],
)
def test_the_accuracy_of_an_exported_file(parity: dict[str, Any], words: str, tmp_path: Path) -> None:
    """It is the one that the gate measured on the artifact itself."""
    parity = {"meaningful": True, "accuracy_candidate": 0.66, "count": 300} | parity
    path = write(tmp_path, tiny_onnx())
    describe(path, kind="onnx", precision="fp32", data={"data": {"path": "a"}}, parity=parity)
    with open_runner(path, provider="cpu") as runner:
        assert words in str(measured(runner))
