"""The predictor with a model and a detector that can be looked through."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fer_dist.data.decoding import Photo
from fer_dist.errors import UserError
from fer_dist.serve.faces import Box, Found
from fer_dist.serve.photos import PHOTO_SIDE
from fer_dist.serve.predictor import Answer, Predictor, newest_model
from fer_dist.serve.runner import Runner
from fer_dist.spec import InputSpec, ModelSpec

SIDE = 8


class ByLevel(Runner):
    """Says the class whose number is the crop's level divided by ten."""

    kind = "pth"
    runs_on = "nothing"

    def __init__(self) -> None:
        spec = ModelSpec(arch="patt_lite", input=InputSpec(size=SIDE, image_size=SIDE))
        super().__init__(Path("by_level"), spec, "fp32", "c" * 64)
        self.batches: list[int] = []

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(len(images_N1SS))
        classes_N = images_N1SS.float().mean((1, 2, 3)).div(10).round().long()
        logits_NK = 4.0 * torch.nn.functional.one_hot(classes_N, 7)
        return logits_NK, logits_NK.softmax(1)

    def _close(self) -> None: ...


class InStripes:
    """A face for each column that is not white, 8 x 8 pixels each."""

    name = "stripes"

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def find(self, rgb_HW3: NDArray[np.uint8]) -> list[Found]:
        self.threads.add(threading.current_thread().name)
        columns = range(0, rgb_HW3.shape[1], 8)
        return [Found(Box(x, 0, 8, 8), 0.9) for x in columns if rgb_HW3[4, x + 4, 0] < 255]


def write(path: Path, *classes: int) -> Path:
    """A picture with a face for each class; with none, a white one."""
    levels = [10 * label for label in classes] or [255]
    Image.fromarray(np.repeat(np.array([levels], np.uint8), 8, 0).repeat(8, 1)).save(path)
    return path


@pytest.fixture
def runner() -> Iterator[ByLevel]:
    with ByLevel() as opened:
        yield opened


def said(answer: Answer) -> list[str]:
    return [face.label for face in answer.faces]


def test_faces_of_several_pictures_make_one_batch(runner: ByLevel, tmp_path: Path) -> None:
    names = runner.spec.labels.names
    wanted = [[i % 7 for i in range(n, 2 * n)] for n in (3, 0, 1, 5, 0, 2)]
    paths = [write(tmp_path / f"{i}.png", *classes) for i, classes in enumerate(wanted)]
    answers = list(Predictor(runner, InStripes()).files(paths, batch=64, workers=2))
    assert [answer.path for answer in answers] == paths
    assert [said(answer) for answer in answers] == [[names[k] for k in classes] for classes in wanted]
    assert runner.batches == [11]
    face = answers[0].faces[1]
    assert face.box == Box(8, 0, 8, 8)
    assert face.confidence == 0.9
    assert sum(face.probabilities_K) == pytest.approx(1)
    assert face.label == names[int(np.argmax(face.probabilities_K))]


@pytest.mark.parametrize("workers", [1, 3, None])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_answers_do_not_depend_on_batch_and_threads(
    batch: int, workers: int | None, runner: ByLevel, tmp_path: Path
) -> None:
    chance = np.random.default_rng(0)
    wanted = [list(chance.integers(0, 7, chance.integers(0, 6))) for _ in range(40)]
    paths = [write(tmp_path / f"{i}.png", *classes) for i, classes in enumerate(wanted)]
    answers = list(Predictor(runner, InStripes()).files(paths, batch=batch, workers=workers))
    assert [said(answer) for answer in answers] == [[runner.spec.labels.names[k] for k in c] for c in wanted]
    assert max(runner.batches) <= batch
    assert sum(runner.batches) == sum(map(len, wanted))


def test_a_file_that_cannot_be_read_is_an_answer(runner: ByLevel, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    paths = [text, write(tmp_path / "a.png", 3), tmp_path / "missing.png", write(tmp_path / "b.png")]
    answers = list(Predictor(runner, InStripes()).files(paths))
    assert [bool(answer.problem) for answer in answers] == [True, False, True, False]
    assert "no picture of the formats" in answers[0].problem
    assert (answers[0].width, answers[1].width) == (0, 8)
    assert answers[3].faces == ()


def test_a_frame_without_a_face_is_not_classified(runner: ByLevel, tmp_path: Path) -> None:
    (answer,) = Predictor(runner, InStripes()).files([write(tmp_path / "white.png")])
    assert not answer.faces
    assert not answer.problem
    assert runner.batches == []


def test_without_a_detector_the_picture_is_the_face(runner: ByLevel, tmp_path: Path) -> None:
    (answer,) = Predictor(runner, None).files([write(tmp_path / "a.png", 5)])
    assert said(answer) == ["surprise"]
    assert answer.faces[0].box is None
    assert answer.faces[0].confidence is None


def test_boxes_are_in_pixels_of_the_file(runner: ByLevel, tmp_path: Path) -> None:
    """A large picture is shrunk before anything looks at it."""
    times = 2 * PHOTO_SIDE // 16
    levels = np.repeat(np.array([[30, 40]], np.uint8), 8, 0).repeat(8, 1)
    Image.fromarray(levels).resize((16 * times, 8 * times), Image.Resampling.NEAREST).save(tmp_path / "a.png")

    class Halves(InStripes):
        def find(self, rgb_HW3: NDArray[np.uint8]) -> list[Found]:
            high, wide, _ = rgb_HW3.shape
            assert wide == PHOTO_SIDE
            return [Found(Box(0, 0, wide / 2, high), 0.9), Found(Box(wide / 2, 0, wide / 2, high), 0.8)]

    (answer,) = Predictor(runner, Halves()).files([tmp_path / "a.png"], keep=True)
    assert (answer.width, answer.height) == (2 * PHOTO_SIDE, PHOTO_SIDE)
    assert [face.box for face in answer.faces] == [
        Box(0, 0, PHOTO_SIDE, PHOTO_SIDE),
        Box(PHOTO_SIDE, 0, PHOTO_SIDE, PHOTO_SIDE),
    ]
    assert said(answer) == ["happy", "sad"]
    assert answer.rgb_HW3 is not None
    assert answer.rgb_HW3.shape == (PHOTO_SIDE // 2, PHOTO_SIDE, 3)


def test_one_picture_from_memory(runner: ByLevel) -> None:
    levels = np.array([[20, 255, 60]], np.uint8).repeat(8, 0).repeat(8, 1)[..., None].repeat(3, 2)
    faces = Predictor(runner, InStripes()).photo(Photo(levels, 48, 16))
    assert [face.label for face in faces] == ["fear", "neutral"]
    assert faces[1].box == Box(32, 0, 16, 16)


def test_only_a_few_pictures_are_ahead(runner: ByLevel, tmp_path: Path) -> None:
    """However many there are: what is read but not yet answered is bounded."""
    path, asked = write(tmp_path / "a.png", 1), 0

    def paths() -> Iterator[Path]:
        nonlocal asked
        for _ in range(3000):
            asked += 1
            yield path

    answers = Predictor(runner, InStripes()).files(paths(), batch=16, workers=2)
    for number, _ in zip(range(200), answers, strict=False):
        assert asked - number <= 16 + 2 * 2 + 2
    answers.close()  # type: ignore[attr-defined]
    assert asked < 240


def test_pictures_that_are_kept_are_bounded_too(
    runner: ByLevel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fer_dist.serve.predictor._HELD_BYTES", 3 * 8 * 8 * 3)
    paths = [write(tmp_path / "a.png", 1)] * 30
    assert all(answer.rgb_HW3 is not None for answer in Predictor(runner, InStripes()).files(paths, keep=True))
    assert max(runner.batches[:-1]) == 3


def test_threads_do_the_looking(runner: ByLevel, tmp_path: Path) -> None:
    detector = InStripes()
    list(Predictor(runner, detector).files([write(tmp_path / "a.png", 1)] * 50, workers=3))
    assert threading.current_thread().name not in detector.threads
    assert not any(thread.name.startswith("faces") for thread in threading.enumerate())


def test_a_model_that_fails_is_not_hidden(runner: ByLevel, tmp_path: Path) -> None:
    runner.close()
    with pytest.raises(UserError, match="is closed"):
        list(Predictor(runner, InStripes()).files([write(tmp_path / "a.png", 1)] * 5))


@pytest.mark.parametrize("margin", [-0.5, 2.1, float("nan")])
def test_margins_out_of_bounds(margin: float, runner: ByLevel) -> None:
    with pytest.raises(UserError, match=r"expected -0\.4\.\.2"):
        Predictor(runner, None, margin=margin)


def test_the_margin_reaches_the_crop(runner: ByLevel, tmp_path: Path) -> None:
    levels = np.full((24, 24), 60, np.uint8)
    levels[8:16, 8:16] = 0
    Image.fromarray(levels).save(tmp_path / "a.png")

    class Middle(InStripes):
        def find(self, rgb_HW3: NDArray[np.uint8]) -> list[Found]:
            return [Found(Box(8, 8, 8, 8), 0.9)]

    labels: list[Any] = []
    for margin in (0.0, 1.0):
        (answer,) = Predictor(runner, Middle(), margin=margin).files([tmp_path / "a.png"])
        labels += said(answer)
    assert labels == ["angry", "surprise"]  # 0, and 60 x 8/9


def test_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no runs/\*/best\.pth") as caught:
        newest_model()
    assert "make demo" in caught.value.fix
    for age, name in enumerate(("newest", "older", "oldest")):
        path = tmp_path / "runs" / name / "best.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_model() == Path("runs/newest/best.pth")
