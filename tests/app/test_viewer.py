"""What is behind the page: smoothing, frames per second, the HTML, the accuracy that is named."""

import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from fer_dist.data.decoding import Photo
from fer_dist.engine.checkpoint import Checkpoint, load, save
from fer_dist.serve import pagehtml
from fer_dist.serve.faces import Box, Found
from fer_dist.serve.measured import measured
from fer_dist.serve.predictor import Prediction, Predictor
from fer_dist.serve.runner import open_runner
from fer_dist.serve.viewer import FORGET_S, SETTLE_S, Stream, View, Viewer, plain
from fer_dist.spec import EXPRESSIONS
from tests.helpers.artifacts import trained

LABELS = EXPRESSIONS


def face(index: int, box: Box, sure: float = 0.94) -> Prediction:
    others = (1 - sure) / 6
    p_K = tuple(sure if i == index else others for i in range(7))
    return Prediction(label=LABELS[index], probabilities_K=p_K, box=box, confidence=0.9)


BOX = Box(100, 100, 80, 80)


def test_a_change_is_shown_after_the_time_constant_at_any_rate() -> None:
    """63% of the way after SETTLE_S, with 5 frames or with 50."""
    reached = []
    for frames in (5, 50):
        stream = Stream(labels=LABELS)
        stream.add((face(0, BOX),), 0.0)
        for number in range(1, frames + 1):
            (shown,) = stream.add((face(3, BOX),), number * SETTLE_S / frames)
        reached.append(shown.probabilities_K[3])
        assert sum(shown.probabilities_K) == pytest.approx(1)
        assert shown.label == LABELS[3]
    assert reached[0] == pytest.approx(reached[1])
    assert reached[0] == pytest.approx(0.01 + 0.93 * (1 - np.exp(-1)))


def test_one_wrong_frame_is_not_shown() -> None:
    stream = Stream(labels=LABELS)
    for number in range(10):
        stream.add((face(3, BOX),), 0.1 * number)
    (shown,) = stream.add((face(0, BOX),), 1.0)
    assert shown.label == LABELS[3]


def test_faces_are_told_apart() -> None:
    stream = Stream(labels=LABELS)
    far = Box(400, 100, 80, 80)
    stream.add((face(3, BOX), face(4, far)), 0.0)
    left, right = stream.add((face(3, BOX._replace(left=105)), face(4, far._replace(left=395))), 0.1)
    assert (left.label, right.label) == (LABELS[3], LABELS[4])
    assert left.probabilities_K[3] == pytest.approx(0.94)
    assert 100 < left.box.left < 105  # type: ignore[union-attr]


def test_a_face_that_was_away_is_another_one() -> None:
    stream = Stream(labels=LABELS)
    stream.add((face(3, BOX),), 0.0)
    assert stream.add((), 0.2) == ()
    (shown,) = stream.add((face(0, BOX),), 0.4)  # missed once: smoothed on
    assert shown.probabilities_K[0] < 0.9
    (shown,) = stream.add((face(4, BOX),), 0.5 + FORGET_S)
    assert shown.probabilities_K[4] == pytest.approx(0.94)


def test_frames_per_second() -> None:
    stream = Stream(labels=LABELS)
    assert stream.rate == 0
    for number in range(200):
        stream.add((), 10 + number / 8)
    assert stream.rate == pytest.approx(8)
    assert len(stream.moments) <= 30
    stream.add((), 1000.0)
    assert stream.rate == 0  # after a pause it starts again


def test_memory_does_not_grow_with_faces() -> None:
    stream = Stream(labels=LABELS)
    for number in range(5):
        stream.add(tuple(face(0, Box(20 * i, 1000 * number, 9, 9)) for i in range(400)), number / 10)
    assert len(stream.faces) <= 256


def test_html_of_faces() -> None:
    view = View(faces=(face(0, BOX), face(3, Box(0, 0, 200, 200))), picture=Image.new("RGB", (64, 48)))
    html = pagehtml.result(view, LABELS, rate=7.25)
    assert html.count('class="bar') == 8  # seven, and what holds them
    assert re.search(r'class="bar best"><span>happy</span>.*?<span>94%</span>', html)
    assert "2 faces; the bars are of the largest" in html
    assert "7.2 frames per second" in html
    assert 'class="heat"' not in html


def test_html_of_no_face() -> None:
    html = pagehtml.result(View(faces=(), picture=Image.new("RGB", (64, 48))), LABELS)
    assert "No face found" in html
    assert "bar" not in html


def test_html_of_a_strangers_words_is_harmless() -> None:
    wild = "<script>alert(1)</script>"
    labels = (wild, *LABELS[1:])
    told = Prediction(label=wild, probabilities_K=(1.0,) + (0.0,) * 6, box=BOX, confidence=1.0)
    html = pagehtml.result(View(faces=(told,), picture=Image.new("RGB", (64, 48))), labels) + pagehtml.problem(wild)
    assert "<script" not in html


class OneFace:
    """A detector that finds the same face everywhere."""

    name = "one"

    def find(self, rgb_HW3: object) -> list[Found]:
        return [Found(BOX, 0.9)]


def test_a_checkpoint(tmp_path: Path) -> None:
    """Faces, heat map, the accuracy out of the file, and the plain values of the API."""
    path, onnx = trained(tmp_path)
    photo = Photo(np.full((240, 320, 3), 90, np.uint8), 640, 480)
    with open_runner(path, device="cpu") as runner:
        assert measured(runner) is None
        assert "not known" in pagehtml.about(runner, None)
        viewer = Viewer(Predictor(runner, OneFace()))
        faces = viewer.predictor.photo(photo)
        view = viewer.shown(photo, faces, heat=True)
        assert view.heat is not None
        assert view.method == "attention rollout"
        assert viewer.shown(photo, faces, heat=False).heat is None
        told = plain(faces, photo, LABELS)
        assert told["faces"][0]["box"] == {"left": 200, "top": 200, "width": 160, "height": 160}
        with mock.patch.object(viewer.predictor, "lock") as lock:
            viewer.predictor.photo(photo)
        assert lock.__enter__.called
    with open_runner(onnx, provider="cpu") as runner:
        viewer = Viewer(Predictor(runner, OneFace()))
        assert viewer.shown(photo, faces, heat=True).heat is None  # this file has no attention
        assert measured(runner) is None


@pytest.mark.parametrize(("data", "drawn"), [({"path": "/home/me/archive.zip"}, False), ({"path": None}, True)])
def test_the_accuracy_of_a_checkpoint(tmp_path: Path, data: dict[str, object], drawn: bool) -> None:
    path, _ = trained(tmp_path)
    val = {"loss": 1.0, "accuracy": 0.671, "macro_f1": 0.6, "recall": {}, "count": 3589}
    record = {"epoch": 1, "step": 5, "lr": 0.1, "train_loss": 1.0, "val": val}
    saved = load(path)
    save(path, Checkpoint(spec=saved.spec, weights=saved.weights, config={"data": data}, record=record, provenance={}))
    with open_runner(path, device="cpu") as runner:
        known = measured(runner)
        assert known is not None
        assert known.drawn == drawn
        assert str(known).startswith("67.1% accuracy (95% interval 65.5 to 68.6%) on 3,589 pictures: ")
        assert ("archive.zip" in str(known)) != drawn
        assert "/home" not in pagehtml.about(runner, known)
        assert ("says little about photos" in pagehtml.about(runner, known)) == drawn


def test_the_accuracy_of_a_checkpoint_with_mirror_images(tmp_path: Path) -> None:
    """The app does not average over them: the page says that the number did."""
    path, _ = trained(tmp_path)
    val = {"loss": 1.0, "accuracy": 0.671, "macro_f1": 0.6, "recall": {}, "count": 3589}
    record = {"epoch": 1, "step": 5, "lr": 0.1, "train_loss": 1.0, "val": val}
    config = {"data": {"path": "a.zip"}, "train": {"flip_tta": True}}
    saved = load(path)
    save(path, Checkpoint(spec=saved.spec, weights=saved.weights, config=config, record=record, provenance={}))
    with open_runner(path, device="cpu") as runner:
        assert "on 3,589 pictures, each averaged with its mirror image: " in str(measured(runner))


@pytest.mark.parametrize(
    ("parity", "told"),
    [
        ({"count": 3000, "of": 3000}, "66.0% accuracy (95% interval 64.3 to 67.7%) on 3,000 pictures: "),
        ({"count": 300, "of": 3000}, "66.0% accuracy (95% interval 60.5 to 71.1%) on 300 of 3,000 pictures: "),
        ({"count": 300, "of": None}, "66.0% accuracy (95% interval 60.5 to 71.1%) on 300 pictures: "),
        ({"count": 3000, "of": 3000, "executed": False}, " pictures, by the graph that it was built from: "),
        ({"count": 3000, "of": 3000, "meaningful": False}, "None"),
        ({"count": -3, "of": 3000}, "None"),
    ],
)
def test_the_accuracy_of_an_exported_file(tmp_path: Path, parity: dict[str, object], told: str) -> None:
    """The gate's: of the artifact itself, as the app asks it, on as many pictures as it was given."""
    _, onnx = trained(tmp_path)
    beside = mock.Mock(parity={"meaningful": True, "accuracy_candidate": 0.66, **parity}, data={"data": {"path": "a"}})
    with (
        open_runner(onnx, provider="cpu") as runner,
        mock.patch("fer_dist.serve.measured.read_beside", return_value=beside),
    ):
        assert told in str(measured(runner))
